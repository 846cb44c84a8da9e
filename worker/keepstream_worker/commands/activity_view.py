"""The activity view: `keepstream top` and `keepstream limits` on a console.

In: pictures of what goes on.  Out: a screen that fits its console, and tables.
"""

from collections.abc import Sequence
from datetime import UTC
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from keepstream_worker.commands.activity import LimitRow, Picture, Row
from keepstream_worker.commands.formats import count, printable
from keepstream_worker.store.activity import COUNTED

_BAR: Final = 8  #: Columns.
_NAME: Final = 30  #: Columns at most, of a name.
_FIXED_LINES: Final = 7  #: Of the screen: its head, the heads of two tables, blank lines, the foot.
_NARROW: Final = 70  #: Columns below which there is no room for bars,
_VERY_NARROW: Final = 50  #: and below which there is none for reasons.


def screen(picture: Picture, width: int, height: int, trouble: str | None = None) -> RenderableType:
    """Return what `top` shows on so many columns and lines; ``trouble`` is why it is not of now."""
    lines = max(4, height - _FIXED_LINES)
    tenants = min(max(len(picture.tenants), 1), max(2, lines // 3))
    targets = lines - tenants
    return Group(
        _head(picture, trouble),
        Text(),
        _table("target", picture.targets, targets, width),
        Text(),
        _table("tenant", picture.tenants, tenants, width),
        Text(),
        Text("Ctrl-C ends this; a job's own reason: keepstream get JOB_ID", "dim", no_wrap=True, overflow="ellipsis"),
    )


def _head(picture: Picture, trouble: str | None) -> Text:
    activity = picture.activity
    running, waiting = _number(picture.running), _number(picture.waiting)
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(f"{activity.at.astimezone(UTC):%H:%M:%S} UTC  ", "dim")
    if trouble is not None:
        return head.append(printable(trouble), "red")
    head.append(count(len(activity.workers), "worker", "workers"), "" if activity.workers else "red")
    head.append("   ")
    head.append(running, "bold cyan")
    head.append(f" of {picture.places} running   ")
    head.append(waiting, "bold yellow" if picture.waiting else "bold green")
    head.append(" waiting")
    return head


def _table(title: str, rows: Sequence[Row], lines: int, width: int) -> Table:
    """Return a table of so many lines below its head at most."""
    shown = len(rows) if len(rows) <= lines else lines - 1
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True, show_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True, overflow="ellipsis", max_width=min(_NAME, width * 2 // 5))
    has_bars = width >= _NARROW and any(row.most for row in rows[:shown])
    if has_bars:
        table.add_column("", no_wrap=True, width=_BAR)
    table.add_column("running", no_wrap=True, justify="right", min_width=7)
    table.add_column("waiting", no_wrap=True, justify="right", min_width=7)
    has_reasons = width >= _VERY_NARROW
    if has_reasons:
        table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows[:shown]:
        bar = [_bar(row.running, row.most)] if has_bars else []
        running = f"{row.running} of {row.most}" if row.most is not None else str(row.running)
        why = [_why(row)] if has_reasons else []
        table.add_row(Text(printable(row.name)), *bar, running, _number(row.waiting), *why)
    if len(rows) > shown:
        table.add_row(Text(f"… and {len(rows) - shown} more", "dim"))
    if not rows:
        table.add_row(Text("nothing runs or waits", "dim"))
    return table


def _why(row: Row) -> Text:
    if row.waits_for is None:
        return Text()
    return Text(printable(row.waits_for.text), "yellow" if row.waits_for.passes else "red")


def _bar(used: int, most: int | None) -> Text:
    if not most:
        return Text("")
    full = min(_BAR, round(_BAR * used / most))
    style = "red" if used >= most else "yellow" if used >= 0.8 * most else "green"
    return Text.assemble(("━" * full, style), ("─" * (_BAR - full), "dim"))


def _number(number: int) -> str:
    return f"over {COUNTED}" if number > COUNTED else str(number)


def show_limits(console: Console, picture: Picture, doubts: Sequence[str]) -> None:
    """Show what is used of each limit, and what is hardly meant in their configuration."""
    if picture.limits:
        table = _limits_table("target or provider", "streams", "requests", "tokens", "waiting", "closed")
        for row in picture.limits:
            table.add_row(
                Text(printable(row.use.key)),
                _streams(row),
                _bucket(row.use.requests_left, row.use.limits.requests_per_minute),
                _bucket(row.use.tokens_left, row.use.limits.tokens_per_minute),
                _number(row.waiting),
                _closed(row),
            )
        console.print(table)
        console.print(Text("requests and tokens: what may be used at once, of what a minute allows", "dim"))
    else:
        console.print("no provider has a limit that is configured or learned yet")
    limited = [row for row in picture.tenant_limits if row.concurrency is not None or row.weight != 1]
    if limited:
        console.print()
        table = _limits_table("tenant", "jobs", "weight", "waiting")
        for tenant in limited:
            jobs = (
                f"{tenant.running} of {tenant.concurrency}" if tenant.concurrency is not None else str(tenant.running)
            )
            table.add_row(Text(printable(tenant.name)), jobs, f"{tenant.weight:g}", _number(tenant.waiting))
        console.print(table)
    for doubt in doubts:
        console.print(Text(printable(doubt), "yellow"))


def _limits_table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for position, title in enumerate(titles):
        table.add_column(title, overflow="fold", justify="left" if position in (0, 5) else "right")
    return table


def _streams(row: LimitRow) -> str:
    use = row.use
    if use.limits.concurrency is not None:
        return f"{use.running} of {use.limits.concurrency}"
    if use.ceiling is not None:
        return f"{use.running} of {use.ceiling:.0f} (learned)"
    return str(use.running)


def _bucket(left: float | None, per_minute: float | None) -> str:
    if per_minute is None:
        return ""
    return f"{per_minute:g}" if left is None else f"{left:.0f} of {per_minute:g}"


def _closed(row: LimitRow) -> Text:
    return Text() if row.use.closed is None else Text(row.use.closed.why.replace("_", " "), "yellow")
