"""Standard output: a console for people, lines for programs.

In: texts, from the commands.
Out: standard output.
"""

import codecs
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

COMMAND: Final = "keepstream"

#: What our own texts show on a console that has only ASCII; any other character that it lacks becomes "?".
_PLAIN: Final = str.maketrans({"✓": "+", "✗": "x", "·": "-", "…": "~", "→": ">", "━": "#", "─": "."})


def make_streams_tolerant() -> None:
    """Let standard output and error stand any text, whatever the locale."""
    codecs.register_error("keepstream", _substitute)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="keepstream")  # type: ignore[union-attr]


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(character if character.isascii() else "?" for character in missing), error.end


def make_console() -> "Console":
    """Return a console on standard output, 120 columns wide if that is a pipe or a file."""
    from rich.console import Console

    if "COLUMNS" in os.environ:
        return Console(highlight=False)
    try:
        size = os.get_terminal_size(sys.stdout.fileno())  # which Rich asks only of terminals that can do much
    except (OSError, ValueError):
        size = os.terminal_size((0, 0))
    if sys.stdout.isatty() and size.columns > 0:
        return Console(highlight=False, width=size.columns, height=size.lines)
    return Console(highlight=False, width=120)  # a pipe has no width and should get whole lines


def print_lines(lines: Iterable[str]) -> None:
    """Write lines, each at once, so that a program that reads them can work while more are to come."""
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def json_text(value: "BaseModel", indent: int | None = None) -> str:
    """Return a value as JSON, whatever callers wrote: half of a character stays escaped, as it came."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value.model_dump(mode="json"), ensure_ascii=False, indent=indent, separators=separators)
    return text.encode("utf-8", "backslashreplace").decode()


def own_command() -> str:
    """Return how to type our own command in this shell: by its name, or by its path if another or none has the name."""
    ours = Path(sys.argv[0])
    if ours.name != COMMAND or not ours.exists():  # run as a module
        return COMMAND
    found = shutil.which(COMMAND)
    if found is not None and Path(found).samefile(ours):
        return COMMAND
    return shlex.quote(os.path.relpath(ours) if ours.is_relative_to(Path.cwd()) else str(ours))
