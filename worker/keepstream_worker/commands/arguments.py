"""What people and scripts write on the command line, turned into values.

In: texts and files named by arguments.
Out: JSON values, durations and job documents, to the commands; wrong input ends the command with one line.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from keepstream_worker.commands.exits import INVALID, fail

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="The id that `keepstream submit` printed.")]
Tenant = Annotated[str, typer.Option(help="Whose jobs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document per line.")]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def read_job(file: str) -> dict[str, Any]:
    """Return the job in a JSON file; ``-`` is standard input."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file} cannot be read: {_reason(error)}", INVALID)
    job = parse_json(text, "standard input" if file == "-" else file)
    if not isinstance(job, dict):
        fail(f"{file}: a job is a JSON object; see: keepstream schema job", INVALID)
    return job


def read_tools(path: Path) -> list[Any]:
    """Return the tools of a JSON file: one or a list, each as a tool or as the function alone."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {_reason(error)}", INVALID)
    tools = content if isinstance(content, list) else [content]
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool for tool in tools
    ]


def parse_param(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``; a value that is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        fail(f"--param {text}: write NAME=VALUE, temperature=0.2 for instance", INVALID)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_json(text: str, where: str) -> Any:
    """Return a JSON value; ``where`` says in the message of a failure what was read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        fail(f"{where}: this is not valid JSON{place}", INVALID)


def parse_duration(text: str) -> float:
    """Return the seconds of a number with a unit: 90s, 15m, 2h or 30d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        fail(f"{text} is no duration; write a number and its unit: 90s, 15m, 2h or 30d", INVALID)
    return float(match[1]) * _UNITS[match[2]]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"
