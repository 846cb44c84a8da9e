"""Standard output: a console for people, lines for programs.

In: texts, from the commands.
Out: standard output.
"""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> "Console":
    """Return a console on standard output, 120 columns wide if that is a pipe or a file."""
    from rich.console import Console

    # A pipe has no width and should get whole lines.
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def print_lines(lines: Iterable[str]) -> None:
    """Write lines, each at once, so that a program that reads them can work while more are to come."""
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
