"""Command groups: one per panel of `keepstream --help`.

In: functions and examples of their use, from `try_it`, `jobs` and `operate`.
Out: Typer applications, to `main`.
"""

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

import typer

from keepstream_worker.commands.exits import EXIT_CODES

Command = TypeVar("Command", bound=Callable[..., None])


class CommandGroup:
    """Commands that the help shows together, under the title ``panel``."""

    def __init__(self, panel: str) -> None:
        self.app = typer.Typer()
        self._panel = panel

    def command(self, *examples: str, name: str | None = None) -> Callable[[Command], Command]:
        """Make a function a command; its docstring becomes the help, with ``examples`` below it."""
        example_lines = "\n".join(f"  [cyan]{line}[/]" for line in examples)
        epilog = f"[bold]Examples[/]\n{example_lines}\n\n[dim]{EXIT_CODES}[/]"

        def register(function: Command) -> Command:
            # The docstring's lines are broken for the source; the help is as wide as the console.
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
            return self.app.command(name, help=text, rich_help_panel=self._panel, epilog=epilog)(function)

        return register
