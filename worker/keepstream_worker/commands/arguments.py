"""What people and scripts write on the command line, turned into values.

In: texts and files named by arguments.
Out: JSON values, durations and job documents, to the commands; wrong input ends the command with one line.
"""

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from keepstream_worker.commands.exits import INVALID, fail

if TYPE_CHECKING:
    from keepstream.results import JobStatus

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="The id that `keepstream submit` printed.")]
Tenant = Annotated[str, typer.Option(help="Whose jobs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document per line.")]

_DURATION: Final = r"(\d+(?:\.\d+)?)([smhd])"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST: Final = 36_500 * 86_400  #: Seconds; dates and databases have an end.


def read_job(file: str) -> dict[str, Any]:
    """Return the job in a JSON file, which may hold its request alone; ``-`` is standard input."""
    from keepstream import Job

    job = parse_json(_read(file), _name(file))
    if not isinstance(job, dict):
        fail(f"{_name(file)}: a job is a JSON object; see: keepstream schema job", INVALID)
    if job.keys() & {"v", "request"}:
        return job
    # "metadata" and "provider" may be the API's own; all other names of the envelope are ours alone.
    misplaced = sorted(job.keys() & ((Job.model_fields.keys() | {"class"}) - {"job_class", "metadata", "provider"}))
    if misplaced:
        example = f'{{"v": 2, "request": {{…}}, "{misplaced[0]}": …}}'
        fail(f"{_name(file)}: '{misplaced[0]}' belongs beside the request, not in it; write {example}", INVALID)
    return {"v": 2, "request": job}


def read_message(texts: Sequence[str] | None, job_file: str | None) -> str | None:
    """Return the user's message, if there is one; ``-`` is standard input, without the last line's end."""
    if not texts:
        return None
    if len(texts) > 1:
        advice = "give one text, or write the conversation to a file for --file"
        fail(f"--message was given {len(texts)} times; {advice}", INVALID)
    if texts[0] != "-":
        return texts[0]
    if job_file == "-":
        fail("--file - and --message - both read standard input; use only one of them", INVALID)
    message = _read("-").removesuffix("\n")
    if not message:
        fail("--message -: standard input is empty", INVALID)
    return message


def read_tools(path: Path) -> list[Any]:
    """Return the tools of a JSON file: one or a list, each as a tool or as the function alone."""
    content = parse_json(_read(str(path)), str(path))
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


def parse_target(text: str) -> dict[str, str]:
    """Return the target that ``PROVIDER/MODEL`` names; a model's name may have slashes of its own."""
    provider, _, model = text.partition("/")
    if not provider or not model:
        fail(f"--fallback {text}: write PROVIDER/MODEL", INVALID)
    return {"provider": provider, "model": model}


def parse_metadata(text: str) -> tuple[str, str]:
    """Return name and value of ``NAME=VALUE``, by which jobs are found; values are compared as texts."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        fail(f"--metadata {text}: write NAME=VALUE, conversation=4711 for instance", INVALID)
    return name, value


def parse_statuses(words: Sequence[str]) -> list["JobStatus"]:
    """Return the statuses that words name; ``active`` and ``ended`` name several."""
    from keepstream.results import TERMINAL_STATUSES, JobStatus

    classes = {"active": set(JobStatus) - TERMINAL_STATUSES, "ended": set(TERMINAL_STATUSES)}
    known = classes | {status.value: {status} for status in JobStatus}
    for word in words:
        if word not in known:
            fail(f"--status {word}: choose one of {', '.join([*JobStatus, *classes])}", INVALID)
    return sorted(status for word in words for status in known[word])


def parse_moment(text: str, option: str) -> datetime:
    """Return the time that a text names: so long ago (2h), or by date and clock (2030-01-31T09:00Z).

    Without an offset it is this machine's local time.
    """
    if re.fullmatch(_DURATION, text):
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        fail(f"{option} {text}: write how long ago (90s, 15m, 2h, 30d) or when (2030-01-31T09:00Z)", INVALID)


def parse_json(text: str, where: str) -> Any:
    """Return a JSON value; ``where`` says in the message of a failure what was read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        fail(f"{where}: this is not valid JSON{place}", INVALID)


def parse_duration(text: str) -> float:
    """Return the seconds of a number with a unit: 90s, 15m, 2h or 30d."""
    match = re.fullmatch(_DURATION, text)
    if match is None:
        fail(f"{text} is no duration; write a number and its unit: 90s, 15m, 2h or 30d", INVALID)
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > _LONGEST:
        fail(f"{text} is too long; durations go up to {_LONGEST // _UNITS['d']}d", INVALID)
    return seconds


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"
        fail(f"{_name(file)} cannot be read: {reason}", INVALID)


def _name(file: str) -> str:
    return "standard input" if file == "-" else file
