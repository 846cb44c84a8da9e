"""The activity view: `keepstream top` and `keepstream limits` on a console.

In: pictures of what goes on.  Out: a screen that fits its console, and tables.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from keepstream.client.overview import COUNTED
from keepstream_worker.commands.activity import LimitRow, Picture, Row
from keepstream_worker.commands.formats import clock_time, count, printable
from keepstream_worker.limits import Limits
from keepstream_worker.scheduling.report import Used

_BAR: Final = 8  #: Columns.
_NAME: Final = 48  #: Columns at most, of a name.
_FIXED_LINES: Final = 7  #: Of the screen: its head, the heads of two tables, blank lines, the foot.
_WIDE: Final = 110  #: Columns from which a reason has room beside the numbers; below, it gets a line of its own.
_LEAST_NAME: Final = 24  #: Columns at least, where there is room, so that what is beside it does not move about.
_NARROW: Final = 50  #: Columns below which there is no room for bars.


def screen(picture: Picture, width: int, height: int, trouble: str | None = None) -> RenderableType:
    """Return what `top` shows on so many columns and lines; ``trouble`` is why it is not of now."""
    targets = [_Block(row, _reason_of(row, f"{row.name}: ")) for row in picture.targets]
    tenants = [_Block(row, _reason_of(row)) for row in picture.tenants]
    wide = width >= _WIDE
    lines = max(4, height - _FIXED_LINES)
    needed = [max(1, sum(block.lines(wide=wide) for block in blocks)) for blocks in (targets, tenants)]
    for_tenants = min(needed[1], max(2, lines // 3, lines - needed[0]))
    return Group(
        _head(picture, trouble),
        Text(),
        _table("target", targets, lines - for_tenants, width),
        Text(),
        _table("tenant", tenants, for_tenants, width),
        Text(),
        Text("Ctrl-C ends this; a job's own reason: keepstream get JOB_ID", "dim", no_wrap=True, overflow="ellipsis"),
    )


class _Block(NamedTuple):
    """A row of a table, and why its jobs wait."""

    row: Row
    reason: Text | None

    def lines(self, *, wide: bool) -> int:
        """Return how many lines it takes."""
        return 1 if wide or self.reason is None else 2


def _reason_of(row: Row, own_name: str = "") -> Text | None:
    """Return what most of those that wait wait for; the row's own name need not be repeated."""
    if row.waits_for is None:
        return None
    return Text(printable(row.waits_for.text.removeprefix(own_name)), "yellow" if row.waits_for.passes else "red")


def _head(picture: Picture, trouble: str | None) -> Text:
    activity = picture.activity
    running, waiting = _number(picture.running), _number(picture.waiting)
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(f"{clock_time(activity.at)}  ", "dim")
    if trouble is not None:
        return head.append(printable(trouble), "red")
    head.append(count(len(activity.workers), "worker", "workers"), "" if activity.workers else "red")
    head.append("   ")
    head.append(running, "bold cyan")
    head.append(f" of {picture.places} running   ")
    head.append(waiting, "bold yellow" if picture.waiting else "bold green")
    head.append(" waiting")
    return head


def _table(title: str, blocks: Sequence[_Block], lines: int, width: int) -> RenderableType:
    """Return a table of so many lines below its head at most."""
    wide = width >= _WIDE
    shown = blocks[: _fitting(blocks, lines, wide=wide)]
    rows = [block.row for block in shown]
    has_bars = width >= _NARROW and any(row.most for row in rows)
    running = max(map(len, ["running", *map(_running, rows)]))
    waiting = max(map(len, ["waiting", *(_number(row.waiting) for row in rows)]))
    room = min(_NAME, width * 2 // 5) if wide else width - running - waiting - 4 - (_BAR + 2 if has_bars else 0)
    names = min(max(8, room), max(map(cell_len, [title, " " * _LEAST_NAME, *(printable(row.name) for row in rows)])))

    def line(name: Text, bar: Text, runs: str, waits: str, *rest: Text) -> Text:
        for text, columns in ((name, names), (bar, _BAR)):
            text.truncate(columns, overflow="ellipsis", pad=True)
        cells = [name, *([bar] if has_bars else []), Text(runs.rjust(running)), Text(waits.rjust(waiting)), *rest]
        return _one_line(Text("  ").join(cells))

    table = [line(Text(title), Text(), "running", "waiting", *([Text("waits for")] if wide else []))]
    table[0].stylize("bold")
    for row, reason in shown:
        beside = [reason] if wide and reason is not None else []
        name, bar = Text(printable(row.name)), _bar(row.running, row.most)
        table.append(line(name, bar, _running(row), _number(row.waiting), *beside))
        if reason is not None and not wide:
            table.append(_one_line(Text.assemble(("  waits for ", "dim"), reason)))
    if len(blocks) > len(shown):
        table.append(Text(f"… and {len(blocks) - len(shown)} more", "dim"))
    if not blocks:
        table.append(Text("nothing runs or waits", "dim"))
    return Group(*table)


def _fitting(blocks: Sequence[_Block], lines: int, *, wide: bool) -> int:
    """Return how many of the first blocks fit on so many lines, with one that says how many do not."""
    if sum(block.lines(wide=wide) for block in blocks) <= lines:
        return len(blocks)
    left, fitting = lines - 1, 0
    for block in blocks:
        left -= block.lines(wide=wide)
        if left < 0:
            break
        fitting += 1
    return fitting


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _running(row: Row) -> str:
    return str(row.running) if row.most is None else f"{row.running} of {row.most}"


def _bar(used: int, most: int | None) -> Text:
    if not most:
        return Text("")
    full = min(_BAR, max(round(_BAR * used / most), 1 if used else 0))
    style = "red" if used >= most else "yellow" if used >= 0.8 * most else "green"
    return Text.assemble(("━" * full, style), ("─" * (_BAR - full), "dim"))


def _number(number: int) -> str:
    return f"over {COUNTED}" if number > COUNTED else str(number)


def show_limits(console: Console, picture: Picture, doubts: Sequence[str]) -> None:
    """Show what is used of each limit, and what is hardly meant in their configuration."""
    if picture.limits:
        table = _limits_table("target or provider")
        for row in picture.limits:
            table.add_row(Text(printable(row.use.key)), _uses(row), _number(row.waiting))
        console.print(table)
        if any(row.use.requests or row.use.tokens for row in picture.limits):
            console.print(Text("requests, tokens: of what may be used at once; it comes back at the rate", "dim"))
    else:
        console.print("no provider has a limit that is configured or learned yet")
    if picture.patterns:
        table = _limits_table("each model that fits, by itself", "allowed")
        for pattern in picture.patterns:
            table.add_row(Text(printable(pattern.name)), "\n".join(_allowed(pattern.limits)))
        console.print()
        console.print(table)
    limited = [row for row in picture.tenant_limits if row.jobs.allowed is not None or row.weight != 1]
    if limited:
        console.print()
        table = _limits_table("tenant")
        for tenant in limited:
            jobs = f"{_used(tenant.jobs, 'jobs')}; weight {tenant.weight:g}"
            table.add_row(Text(printable(tenant.name)), jobs, _number(tenant.waiting))
        console.print(table)
    for doubt in doubts:
        console.print(Text(printable(doubt), "yellow"))


def _limits_table(first: str, second: str = "used of allowed") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column(first, overflow="fold", min_width=len(first), max_width=_NAME)
    table.add_column(second, overflow="fold", ratio=1)
    if second != "allowed":
        table.add_column("waiting", justify="right", no_wrap=True)
    return table


def _uses(row: LimitRow) -> Text:
    """Return what is used of each limit, a line each, and why it takes no more."""
    use = row.use
    lines = [
        Text(_used(used, what))
        for used, what in ((use.streams, "streams"), (use.requests, "requests"), (use.tokens, "tokens"))
        if used is not None and (used is not use.streams or used.allowed is not None or used.used)
    ]
    if use.closed is not None and use.closed.why != "concurrency":  # which the numbers say
        lines.append(Text(row.closed, "red" if use.closed.why in {"broken", "probing"} else "yellow"))
    return Text("\n").join(lines or [Text("nothing", "dim")])


def _used(used: Used, what: str) -> str:
    text = f"{used.used:,} {what}, no limit" if used.allowed is None else f"{used.used:,} of {used.allowed:,} {what}"
    if used.per_minute is not None:
        text += f", {_plain(used.per_minute)} a minute"
    return f"{text} (learned)" if used.learned else text


def _allowed(limits: Limits) -> list[str]:
    found = (
        (limits.concurrency, "streams"),
        (limits.requests_per_minute, "requests a minute"),
        (limits.tokens_per_minute, "tokens a minute"),
    )
    return [f"{_plain(number)} {what}" for number, what in found if number is not None]


def _plain(number: float) -> str:
    return f"{number:,.10g}"
