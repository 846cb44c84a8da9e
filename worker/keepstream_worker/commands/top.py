"""The commands that look on: `keepstream top`, live, and `keepstream limits`.

In: the database and the policy.  Out: screens on a terminal, one after the other; tables or JSON on standard output.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.live import Live

from keepstream.client import overview
from keepstream.client.database import ClientDatabase
from keepstream.errors import StoreUnavailableError
from keepstream_worker.commands.activity import Picture, as_json, draw, limits_json
from keepstream_worker.commands.activity_view import screen, show_limits
from keepstream_worker.commands.output import make_console
from keepstream_worker.limits import Policy


def show_top(database: ClientDatabase, policy: Policy, *, every: float, once: bool, as_json: bool) -> None:
    """Show what goes on, once or until Ctrl-C, which is the way to end it."""
    try:
        picture = _look(database, policy)
        if as_json:
            typer.echo(_dump(picture))
        elif once or not sys.stdout.isatty():
            console = make_console()
            lines = len(picture.targets) + len(picture.tenants)
            console.print(screen(picture, console.width, 3 * lines + 20))
        else:
            _go_on(database, policy, picture, every)
    finally:
        database.close()


def _go_on(database: ClientDatabase, policy: Policy, picture: Picture, every: float) -> None:
    console = make_console()
    trouble = None
    try:
        with _ended_by_signals(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                columns, lines = os.get_terminal_size(sys.stdout.fileno())  # which may change
                if columns > 0 and lines > 0:
                    console.width, console.height = columns, lines
                live.update(screen(picture, console.width, console.height, trouble), refresh=True)
                time.sleep(every)
                try:
                    picture, trouble = _look(database, policy), None
                except StoreUnavailableError as error:
                    trouble = str(error)
    except KeyboardInterrupt:
        pass


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, like Ctrl-C, give the terminal back what was on it."""

    def end(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def show_limits_now(database: ClientDatabase, policy: Policy, *, as_json: bool) -> None:
    """Show what is used of each limit."""
    try:
        picture = _look(database, policy)
    finally:
        database.close()
    if as_json:
        typer.echo(json.dumps(limits_json(picture), indent=2))
    else:
        show_limits(make_console(), picture, policy.doubts())


def _look(database: ClientDatabase, policy: Policy) -> Picture:
    with database.transaction() as connection:
        seen = overview.look(connection)
    return draw(seen, policy)


def _dump(picture: Picture) -> str:
    return json.dumps(as_json(picture), indent=2)
