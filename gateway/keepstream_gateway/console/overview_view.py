"""The overview as people see it.

In: what goes on, and what a time brought.  Out: an ``OverviewView`` to the page, and the figures of its charts.  Pure.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from keepstream.client.overview import COUNTED, Activity, History, Sums, reason
from keepstream.client.waiting import closed_words
from keepstream.results import WaitingFor
from keepstream.tables import FIRST_OUTPUT_CLASSES
from keepstream_gateway.console.words import NOTHING, about, count, duration, plural

_ROWS: Final = 12  #: Of a table on the page.
_MINUTE: Final = 60


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
class LimitRow:
    """What takes no more jobs at present."""

    name: str
    text: str
    share: float | None  #: Used of what is allowed.


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Attempts that failed for the same reason."""

    code: str
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
    waits = [(each.chain[0], each.tenant, each.jobs, reason(each, activity)) for each in activity.waiting]
    workers = sorted(activity.workers.items())
    return OverviewView(
        span=span,
        summary=_summary(activity, [(jobs, why) for _, _, jobs, why in waits]),
        tiles=_tiles(activity, past, recent, span),
        charts=CHARTS,
        figures=_figures(span, past),
        targets=_rows(
            ((f"{provider}/{model}", jobs) for ((provider, model), _), jobs in activity.running.items()),
            [("/".join(target), jobs, why) for target, _, jobs, why in waits],
        ),
        tenants=_rows(
            ((tenant, jobs) for (_, tenant), jobs in activity.running.items()),
            [(tenant, jobs, why) for _, tenant, jobs, why in waits],
        ),
        reasons=_reasons([(jobs, why) for _, _, jobs, why in waits]),
        limits=_limits(activity),
        errors=[
            ErrorRow(error.code or "unknown", f"{error.provider}/{error.model}", count(error.attempts))
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
        for chart in CHARTS
    }
    return {"at": [point["at"] for point in points], "charts": lines}


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
        return {"at": minute * _MINUTE, "deltas": [0], "attempts": [0, 0, 0], "first": [None, None], "tokens": [0, 0]}
    return {
        "at": minute * _MINUTE,
        "deltas": [round(sums.deltas / lasted, 2)],
        "attempts": [a_minute(sums.completed), a_minute(sums.failed), a_minute(sums.other)],
        "first": [quantile(sums.first_outputs, 0.5), quantile(sums.first_outputs, 0.95)],
        "tokens": [a_minute(sums.prompt_tokens), a_minute(sums.completion_tokens)],
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


def _summary(activity: Activity, waits: Sequence[tuple[int, WaitingFor]]) -> Said:
    runs, waiting = sum(activity.running.values()), sum(jobs for jobs, _ in waits)
    blocked = Counter[str]()
    for jobs, why in waits:
        if not why.passes:
            blocked[why.text] += jobs
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
    for jobs, why in waits:
        most[why.text] += jobs
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
    ]


def _at_most(seconds: float) -> str:
    return f"more than {duration(seconds)}" if seconds >= FIRST_OUTPUT_CLASSES[-1] else duration(seconds)


def _counted(jobs: int, more: bool) -> str:  # noqa: FBT001  # as above
    return f"> {count(COUNTED)}" if more else count(jobs)


def _not_due(activity: Activity) -> str:
    later = sum(each.not_due for each in activity.waiting)
    if later:
        return f"{count(later)} for a later attempt"
    tenants = len({each.tenant for each in activity.waiting})
    return f"of {plural(tenants, 'tenant')}" if tenants else "nothing is held up"


def _rows(running: Iterable[tuple[str, int]], waiting: Sequence[tuple[str, int, WaitingFor]]) -> list[Row]:
    runs, waits = Counter[str](), Counter[str]()
    for name, jobs in running:
        runs[name] += jobs
    reasons: dict[str, Counter[str]] = {}
    for name, jobs, why in waiting:
        waits[name] += jobs
        reasons.setdefault(name, Counter())[why.text] += jobs
    names = sorted(runs.keys() | waits.keys(), key=lambda name: (-runs[name] - waits[name], name))
    return [
        Row(
            name,
            count(runs[name]),
            count(waits[name]),
            f"waits for {reasons[name].most_common(1)[0][0]}" if name in reasons else "",
        )
        for name in names[:_ROWS]
    ]


_ADVICE: Final = {
    "worker": "Start a worker for this queue: keepstream worker",
    "broken": "Look at the newest failed attempts; the provider answers none.",
}


def _reasons(waits: Sequence[tuple[int, WaitingFor]]) -> list[ReasonRow]:
    jobs: Counter[tuple[str, str]] = Counter()
    for number, why in waits:
        jobs[why.cause, why.text] += number
    return [ReasonRow(text, count(number), _ADVICE.get(cause, "")) for (cause, text), number in jobs.most_common(_ROWS)]


def _limits(activity: Activity) -> list[LimitRow]:
    rows = []
    for name, entry in sorted(activity.closed.items()):
        until = entry.get("until")
        if until is not None and until < activity.at.timestamp():
            continue
        if name.startswith("tenant:"):
            rows.append(
                LimitRow(f"tenant {name.removeprefix('tenant:')}", f"{entry['running']} of {entry['most']} jobs", 1.0)
            )
        else:
            rows.append(LimitRow(name, closed_words(entry), _share(entry)))
    return rows[:_ROWS]


def _share(entry: Mapping[str, Any]) -> float | None:
    running, most = entry.get("running"), entry.get("most")
    return running / most if running is not None and most else None


def _figures(span: Span, past: History) -> Figures:
    names = [
        f"{chart.title}: {line}" if len(chart.lines) > 1 else chart.title for chart in CHARTS for line in chart.lines
    ]
    by_minute = {sums.minute for sums in past.sums}
    rows = [
        FigureRow(
            f"{datetime.fromtimestamp(point['at'], UTC):%m-%d %H:%M}",
            [NOTHING if value is None else f"{value:,g}" for chart in CHARTS for value in point[chart.name]],
        )
        for point in reversed(_points(span, past))
        if point["at"] // _MINUTE in by_minute
    ]
    return Figures(names, rows)
