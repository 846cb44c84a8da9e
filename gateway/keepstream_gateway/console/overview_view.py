"""The overview as people see it.

In: what goes on, and what a time brought.  Out: an ``OverviewView`` to the page, and the figures of its charts.  Pure.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode

from keepstream.client.overview import COUNTED, Activity, History, Limit, Sums, Used, Waits, what_waits
from keepstream.client.waiting import closed_words
from keepstream.tables import FIRST_OUTPUT_CLASSES
from keepstream_gateway.console.words import NOTHING, about, amount, count, duration, moment, plural

_ROWS: Final = 12  #: Of a table on the page.
_MINUTE: Final = 60
_HOUR: Final = 3600
_FRESH: Final = 60.0  #: Seconds for which a report of limits is as good as one of now.


@dataclass(frozen=True, slots=True)
class Span:
    """A time to look back at, and how finely."""

    name: str
    words: str
    length: int  #: Minutes.
    step: int  #: Minutes that one point of a chart stands for.


SPANS: Final = (
    Span("1h", "last hour", 60, 1),
    Span("6h", "last 6 hours", 360, 5),
    Span("24h", "last 24 hours", 1440, 15),
    Span("7d", "last 7 days", 10_080, 60),
)
RECENT: Final = Span("5min", "last five minutes", 5, 1)  #: For what happens now.


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, whose figures are fetched by its name."""

    name: str
    title: str
    unit: str  #: After each figure.
    lines: tuple[str, ...]


CHARTS: Final = (
    Chart("deltas", "Deltas a second", "", ("deltas",)),
    Chart("attempts", "Attempts ended a minute", "", ("completed", "failed", "other")),
    Chart("first", "Time to the first token", " s", ("half within", "95 % within")),
    Chart("tokens", "Tokens a minute", "", ("read", "written")),
)
#: There only if a provider has reported a cost: nobody else knows one.
COST: Final = Chart("cost", "Cost an hour, as providers report it", "", ("cost",))


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence, and its tone."""

    text: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that is seen at a glance."""

    name: str
    value: str
    words: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What runs and waits of a target or tenant."""

    name: str
    running: str
    waiting: str
    reason: str  #: What most of those that wait wait for; empty: nothing waits.


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """Jobs that wait for the same."""

    text: str
    jobs: str
    advice: str  #: What somebody should do; empty: it passes by itself.


@dataclass(frozen=True, slots=True)
class UsedRow:
    """What is used of a limit."""

    text: str
    share: float | None  #: Of what is allowed; None: nothing limits it.


@dataclass(frozen=True, slots=True)
class LimitRow:
    """What is used of the limits of a target, a provider or a tenant."""

    name: str
    used: list[UsedRow]
    closed: Said | None  #: Why no further job can go there.


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Attempts that failed for the same reason."""

    code: str
    address: str  #: Of the jobs that ended with it.
    target: str
    attempts: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker."""

    name: str
    queue: str
    words: str
    share: float


@dataclass(frozen=True, slots=True)
class FigureRow:
    """The figures of all charts for one step."""

    at: str
    cells: list[str]


@dataclass(frozen=True, slots=True)
class Figures:
    """The charts as a table."""

    names: list[str]
    rows: list[FigureRow]


@dataclass(frozen=True, slots=True)
class OverviewView:
    """The page."""

    span: Span
    summary: Said
    tiles: list[Tile]
    charts: Sequence[Chart]
    figures: Figures
    targets: list[Row]
    tenants: list[Row]
    reasons: list[ReasonRow]
    limits: list[LimitRow]
    has_rates: bool  #: Whether limits of requests or tokens are among them.
    limits_at: str  #: When they were told, if that was not just now.
    errors: list[ErrorRow]
    workers: list[WorkerRow]
    more_workers: int


def span_named(name: str) -> Span:
    """Return a span by its name; an unknown name is the first's."""
    return next((span for span in SPANS if span.name == name), SPANS[0])


def show(span: Span, activity: Activity, past: History, recent: History) -> OverviewView:
    """Return the page.

    Args:
        span: The time of its charts.
        activity: What goes on.
        past: What that time brought.
        recent: What ``RECENT`` brought.
    """
    waits = what_waits(activity)
    workers = sorted(activity.workers.items())
    return OverviewView(
        span=span,
        summary=_summary(activity, waits),
        tiles=_tiles(activity, past, recent, span),
        charts=_charts(past),
        figures=_figures(span, past),
        targets=_rows(
            ((f"{provider}/{model}", jobs) for ((provider, model), _), jobs in activity.running.items()),
            (("/".join(each.chain[0]), each.jobs) for each in activity.waiting),
            [("/".join(each.target), each) for each in waits],
        ),
        tenants=_rows(
            ((tenant, jobs) for (_, tenant), jobs in activity.running.items()),
            ((each.tenant, each.jobs) for each in activity.waiting),
            [(each.tenant, each) for each in waits],
        ),
        reasons=_reasons(waits),
        limits=_limits(activity),
        has_rates=any(limit.requests or limit.tokens for limit in (activity.limits.limits if activity.limits else ())),
        limits_at=_told_at(activity),
        errors=[
            ErrorRow(
                error.code or "unknown",
                f"/jobs?{urlencode({'error': error.code, 'provider': error.provider, 'model': error.model})}",
                f"{error.provider}/{error.model}",
                count(error.attempts),
            )
            for error in past.errors
        ],
        workers=[
            WorkerRow(
                name,
                worker.queue,
                f"{count(worker.running)} of {count(worker.places)}",
                worker.running / worker.places if worker.places else 0.0,
            )
            for name, worker in workers[:_ROWS]
        ],
        more_workers=max(0, len(workers) - _ROWS),
    )


def series(span: Span, past: History) -> dict[str, Any]:
    """Return the figures of the charts, for the page's script: times in seconds since the epoch, and lines by chart."""
    points = _points(span, past)
    lines = {
        chart.name: [[point[chart.name][line] for point in points] for line in range(len(chart.lines))]
        for chart in _charts(past)
    }
    return {"at": [point["at"] for point in points], "charts": lines}


def _charts(past: History) -> Sequence[Chart]:
    return CHARTS if all(sums.cost is None for sums in past.sums) else (*CHARTS, COST)


def _points(span: Span, past: History) -> list[dict[str, Any]]:
    """Return the figures of each step, the oldest first; the last one may be under way."""
    current = int(past.at // _MINUTE)
    first = (current - span.length) // span.step * span.step + span.step
    by_minute = {sums.minute: sums for sums in past.sums}
    points = []
    for minute in range(first, current + 1, span.step):
        lasted = min(span.step * _MINUTE, past.at - minute * _MINUTE)
        if lasted < _MINUTE / 2:  # too little to say something of
            continue
        points.append(_point(minute, lasted, by_minute.get(minute)))
    return points


def _point(minute: int, lasted: float, sums: Sums | None) -> dict[str, Any]:
    """Return the figures of one step that lasted so many seconds."""

    def a_minute(number: int) -> float:
        return round(number * _MINUTE / lasted, 2)

    if sums is None:
        nothing = {"deltas": [0], "attempts": [0, 0, 0], "first": [None, None], "tokens": [0, 0], "cost": [None]}
        return {"at": minute * _MINUTE, **nothing}
    return {
        "at": minute * _MINUTE,
        "deltas": [round(sums.deltas / lasted, 2)],
        "attempts": [a_minute(sums.completed), a_minute(sums.failed), a_minute(sums.other)],
        "first": [quantile(sums.first_outputs, 0.5), quantile(sums.first_outputs, 0.95)],
        "tokens": [a_minute(sums.prompt_tokens), a_minute(sums.completion_tokens)],
        "cost": [None if sums.cost is None else float(f"{sums.cost * _HOUR / lasted:.4g}")],
    }


def quantile(classes: Sequence[int], share: float) -> float | None:
    """Return the seconds within which this share of attempts had their first output, about; None: there were none.

    ``classes`` are their numbers by ``FIRST_OUTPUT_CLASSES``; what took longer than the last counts as that.
    """
    wanted = sum(classes) * share
    if not wanted:
        return None
    low = 0.0
    for number, high in zip(classes, FIRST_OUTPUT_CLASSES, strict=False):
        if wanted <= number:
            return round(low + (high - low) * wanted / number, 3)
        wanted -= number
        low = high
    return low


def _summary(activity: Activity, waits: Sequence[Waits]) -> Said:
    runs, waiting = sum(activity.running.values()), sum(each.jobs for each in activity.waiting)
    blocked = Counter[str]()
    for each in waits:
        if not each.why.passes:
            blocked[each.why.text] += each.jobs
    if blocked:
        ((text, jobs),) = blocked.most_common(1)
        return Said(
            f"{_many(jobs, activity.more_waiting)} {_wait(jobs)} for {text}. That does not pass by itself.", "bad"
        )
    if not activity.workers:
        return Said(
            "No worker is alive. Jobs are accepted and kept, and wait for one: start it with 'keepstream worker'.",
            "warn",
        )
    workers = plural(len(activity.workers), "worker")
    if not runs and not waiting:
        return Said(
            f"All is quiet: {workers} {'is' if len(activity.workers) == 1 else 'are'} ready, and nothing waits."
        )
    running = f"{_many(runs, activity.more_running)} {'runs' if runs == 1 else 'run'} on {workers}"
    if not waiting:
        return Said(f"{running}, and nothing waits.")
    most = Counter[str]()
    for each in waits:
        most[each.why.text] += each.jobs
    ((text, _),) = most.most_common(1)
    return Said(f"{running}; {_many(waiting, activity.more_waiting)} {_wait(waiting)}, most of them for {text}.")


def _wait(jobs: int) -> str:
    return "waits" if jobs == 1 else "wait"


def _many(jobs: int, more: bool) -> str:  # noqa: FBT001  # read by position, as a sentence
    return f"More than {count(COUNTED)} jobs" if more else plural(jobs, "job")


def _tiles(activity: Activity, past: History, recent: History, span: Span) -> list[Tile]:
    runs = sum(activity.running.values())
    waiting = sum(each.jobs for each in activity.waiting)
    places = sum(worker.places for worker in activity.workers.values())
    newest = [sums for sums in recent.sums if sums.minute >= int(recent.at // _MINUTE) - 1]
    lasted = _MINUTE + recent.at % _MINUTE
    ended = sum(sums.completed + sums.failed + sums.other for sums in newest) * _MINUTE / lasted
    first = [sum(column) for column in zip(*(sums.first_outputs for sums in recent.sums), strict=True)]
    half, most = quantile(first, 0.5), quantile(first, 0.95)
    failed, all_of_them = (
        sum(sums.failed for sums in past.sums),
        sum(sums.completed + sums.failed + sums.other for sums in past.sums),
    )
    read, written = sum(sums.prompt_tokens for sums in past.sums), sum(sums.completion_tokens for sums in past.sums)
    costs = [sums.cost for sums in past.sums if sums.cost is not None]
    cost = [Tile("Cost", amount(sum(costs)), f"as providers report it, {span.words}")] if costs else []
    return [
        Tile("Running", _counted(runs, activity.more_running), f"of {plural(places, 'place')}"),
        Tile("Waiting", _counted(waiting, activity.more_waiting), _not_due(activity)),
        Tile(
            "Deltas a second",
            about(sum(sums.deltas for sums in newest) / lasted),
            f"{about(ended)} attempts ended a minute",
        ),
        Tile(
            "First token",
            NOTHING if half is None else duration(half),
            "nothing has come lately" if most is None else f"95 % within {_at_most(most)}",
        ),
        Tile("Failed attempts", count(failed), f"of {count(all_of_them)}, {span.words}"),
        Tile("Tokens", about(read + written), f"{about(read)} read, {about(written)} written, {span.words}"),
        *cost,
    ]


def _at_most(seconds: float) -> str:
    return f"more than {duration(seconds)}" if seconds >= FIRST_OUTPUT_CLASSES[-1] else duration(seconds)


def _counted(jobs: int, more: bool) -> str:  # noqa: FBT001  # as above
    return f"> {count(COUNTED)}" if more else count(jobs)


def _not_due(activity: Activity) -> str:
    later = sum(each.jobs for each in activity.waiting if not each.is_due)
    if later:
        return f"{count(later)} for a later attempt"
    tenants = len({each.tenant for each in activity.waiting})
    return f"of {plural(tenants, 'tenant')}" if tenants else "nothing is held up"


def _rows(
    running: Iterable[tuple[str, int]], waiting: Iterable[tuple[str, int]], waits: Sequence[tuple[str, Waits]]
) -> list[Row]:
    runs, waiting_jobs = Counter[str](), Counter[str]()
    for counter, counted in ((runs, running), (waiting_jobs, waiting)):
        for name, jobs in counted:
            counter[name] += jobs
    reasons: dict[str, Counter[str]] = {}
    for name, each in waits:
        reasons.setdefault(name, Counter())[each.why.text] += each.jobs
    names = sorted(runs.keys() | waiting_jobs.keys(), key=lambda name: (-runs[name] - waiting_jobs[name], name))
    return [
        Row(
            name,
            count(runs[name]),
            count(waiting_jobs[name]),
            f"waits for {reasons[name].most_common(1)[0][0]}" if name in reasons else "",
        )
        for name in names[:_ROWS]
    ]


_ADVICE: Final = {
    "worker": "No worker that is alive can take them; start one that can: keepstream worker",
    "broken": "Look at the newest failed attempts; the provider answers none.",
}


def _reasons(waits: Sequence[Waits]) -> list[ReasonRow]:
    jobs: Counter[tuple[str, str]] = Counter()
    for each in waits:
        jobs[each.why.cause, each.why.text] += each.jobs
    return [ReasonRow(text, count(number), _ADVICE.get(cause, "")) for (cause, text), number in jobs.most_common(_ROWS)]


def _limits(activity: Activity) -> list[LimitRow]:
    """Return the limits, those that are closed first, then those of which most is used."""
    at = activity.at.timestamp()
    closed = {
        name: entry
        for name, entry in activity.closed.items()
        if entry.get("until") is None or entry["until"] >= at  # the newest turn may have been long ago
    }
    told = activity.limits
    rows = [_limit(limit, closed.pop(limit.name, None), activity) for limit in (told.limits if told else ())]
    by_tenant = Counter[str]()
    for (_, tenant), jobs in activity.running.items():
        by_tenant[tenant] += jobs
    for tenant in {each.tenant for each in activity.waiting} | by_tenant.keys():
        full = closed.pop(f"tenant:{tenant}", None)
        most = full["most"] if full else told.of_tenant(tenant) if told else None
        if most is not None:
            rows.append(LimitRow(f"tenant {tenant}", [_used("jobs", Used(by_tenant[tenant], most))], None))
    rows += [
        LimitRow(name, [], _said(entry)) for name, entry in closed.items() if not name.startswith("tenant:")
    ]  # of a worker of a version that does not tell limits
    rows = [row for row in rows if row.closed is not None or any(used.share is not None for used in row.used)]
    return sorted(rows, key=lambda row: (row.closed is None, -max((_share(used) for used in row.used), default=0.0)))[
        :_ROWS
    ]


def _limit(limit: Limit, closed: Mapping[str, Any] | None, activity: Activity) -> LimitRow:
    running = sum(
        jobs
        for ((provider, model), _), jobs in activity.running.items()
        if limit.name in {provider, f"{provider}/{model}"}
    )
    used = [
        _used(what, used)
        for what, used in (
            ("streams", limit.streams._replace(used=running)),
            ("requests", limit.requests),
            ("tokens", limit.tokens),
        )
        if used is not None and (used.allowed is not None or used.used)
    ]
    return LimitRow(limit.name, used, None if closed is None or closed["why"] == "concurrency" else _said(closed))


def _used(what: str, used: Used) -> UsedRow:
    if used.allowed is None:
        return UsedRow(f"{count(used.used)} {what}, no limit", None)
    text = f"{count(used.used)} of {count(used.allowed)} {what}"
    if used.per_minute is not None:
        text += f", {used.per_minute:,.10g} a minute"
    if used.learned:
        text += " (learned)"
    return UsedRow(text, used.used / used.allowed if used.allowed else 1.0)


def _share(used: UsedRow) -> float:
    return used.share or 0.0


def _said(entry: Mapping[str, Any]) -> Said:
    return Said(closed_words(entry), "bad" if entry["why"] in {"broken", "probing"} else "warn")


def _told_at(activity: Activity) -> str:
    if activity.limits is None or (activity.at - activity.limits.told_at).total_seconds() < _FRESH:
        return ""
    return moment(activity.limits.told_at, activity.at).full


def _figures(span: Span, past: History) -> Figures:
    charts = _charts(past)
    names = [
        f"{chart.title}: {line}" if len(chart.lines) > 1 else chart.title for chart in charts for line in chart.lines
    ]
    by_minute = {sums.minute for sums in past.sums}
    rows = [
        FigureRow(
            f"{datetime.fromtimestamp(point['at'], UTC):%m-%d %H:%M}",
            [NOTHING if value is None else f"{value:,g}" for chart in charts for value in point[chart.name]],
        )
        for point in reversed(_points(span, past))
        if point["at"] // _MINUTE in by_minute
    ]
    return Figures(names, rows)
