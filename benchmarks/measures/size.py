"""Whether size matters: the same work on an empty database and on one with millions of ended and waiting jobs.

In: a ``Bench``.
Out: samples ``size`` (a short job's whole time, the age of heartbeats), ``size_choices`` (jobs chosen a second by eight
processes), and both once more, as ``size_held``, while a transaction is held open.

A database's plans, its indexes and what is left of deleted rows change with size and with age; a job should not notice.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import sqlalchemy as sa

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.contenders import KEEPSTREAM
from benchmarks.crowds import CHOOSERS, Crowd, run_crowd
from benchmarks.deployment import Deployment, Order, times_ms
from benchmarks.full_table import Backlog

_ENDED: Final = {"postgresql": 10_000_000, "sqlite": 1_000_000}
_WAITING: Final = {"postgresql": 1_000_000, "sqlite": 100_000}
_QUICK_ENDED: Final = 20_000
_QUICK_WAITING: Final = 6_000
_TENANTS: Final = 100  #: Whose jobs wait.
_CHOSEN: Final = 40_000  #: Jobs for the choosers of an empty database, which have to have some.
_ELSEWHERE: Final = "elsewhere"  #: The queue in which half of the backlog waits.
_SCRIPT: Final = {"deltas": 20, "delta_text": " token"}
_FOREVER: Final = 86_400
_HELD_SECONDS: Final = 600.0
_PACE: Final = 20.0  #: Jobs a second, beside those that come one after the other.
_WAIT_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.03
_numbers: Final = itertools.count()

#: Half of the backlog waits for a provider whose only place is taken for good.
_PROVIDERS: Final = """
[providers.closed]
base_url = "{base_url}"
api_key_env = "OPENAI_API_KEY"
concurrency = 1
"""


def size(bench: Bench) -> None:
    """Measure both databases, empty and full."""
    for kind in ("postgresql", "sqlite"):
        if kind == "postgresql" and bench.services.postgres_url is None:
            continue
        with ExitStack() as stack:
            both = {name: stack.enter_context(_deployment(bench, kind, name)) for name in ("empty", "full")}
            _fill(bench, kind, both["full"])
            for deployment in both.values():
                deployment.start_worker()
                _whole_times(deployment, 20, 1.0)
            for repetition in range(bench.repeat):
                for name, deployment in both.items():
                    _measure_times(bench, "size", kind, name, deployment, repetition)
            waiting = _QUICK_WAITING if bench.quick else _CHOSEN
            full_table.add_backlog(both["empty"].database_url, Backlog(waiting, _ELSEWHERE, "few", _TENANTS))
            for repetition in range(bench.repeat):
                for name, deployment in both.items():
                    _measure_choices(bench, "size_choices", kind, name, deployment, repetition)
            if kind == "postgresql":
                _hold(bench, kind, both["full"])


@contextmanager
def _deployment(bench: Bench, kind: str, name: str) -> Iterator[Deployment]:
    url = bench.services.new_database(kind, f"size-{name}")
    settings: dict[str, Any] = {"first_token_timeout": _FOREVER, "total_timeout": _FOREVER, "shutdown_grace": 1}
    providers = _PROVIDERS.format(base_url=bench.services.base_url)
    with Deployment(bench, url, f"size-{kind}-{name}", providers=providers, **settings) as made:
        yield made


def _fill(bench: Bench, kind: str, deployment: Deployment) -> None:
    ended, waiting = (_QUICK_ENDED, _QUICK_WAITING) if bench.quick else (_ENDED[kind], _WAITING[kind])
    begin = time.monotonic()
    full_table.fill(deployment.database_url, ended)
    stuck = {"delay": _FOREVER}
    for backlog in (
        Backlog(waiting // 2, _ELSEWHERE, "elsewhere", _TENANTS),
        Backlog(waiting // 2, deployment.name, "closed", _TENANTS, stuck, provider="closed"),
    ):
        full_table.add_backlog(deployment.database_url, backlog)
    bench.say(f"{kind}: {ended:,} ended and {waiting:,} waiting jobs made in {time.monotonic() - begin:.0f} s")


def _measure_times(bench: Bench, measure: str, kind: str, table: str, deployment: Deployment, repetition: int) -> None:
    deployment.heartbeats.take()
    jobs, seconds = (30, 2.0) if bench.quick else (200, 15.0)
    metrics = _whole_times(deployment, jobs, seconds) | deployment.heartbeats.take()
    bench.record(Sample(measure, KEEPSTREAM, metrics, {"database": kind, "table": table}, repetition))


def _whole_times(deployment: Deployment, jobs: int, seconds: float) -> dict[str, float]:
    """Return the times from submitting a job to its terminal event: one after the other, then at a steady pace."""
    alone = []
    for _ in range(jobs):
        job = f"size-{next(_numbers)}"
        begin = time.monotonic()
        deployment.submit([Order(job, _SCRIPT)])
        deployment.wait_for_ends([job], _WAIT_SECONDS)
        alone.append((deployment.watcher.jobs[job].ended or 0.0) - begin)
        time.sleep(_PAUSE_SECONDS)
    sent: dict[str, float] = {}
    begin = time.monotonic()
    for number in range(int(seconds * _PACE)):
        time.sleep(max(0.0, begin + number / _PACE - time.monotonic()))
        job = f"size-{next(_numbers)}"
        sent[job] = time.monotonic()
        deployment.submit([Order(job, _SCRIPT)])
    deployment.wait_for_ends(list(sent), _WAIT_SECONDS)
    paced = [(deployment.watcher.jobs[job].ended or 0.0) - begin for job, begin in sent.items()]
    return times_ms(alone) | {f"paced_{name}": value for name, value in times_ms(paced).items()}


def _measure_choices(
    bench: Bench, measure: str, kind: str, table: str, deployment: Deployment, repetition: int
) -> None:
    seconds = 6.0 if bench.quick else 12.0
    deployment.heartbeats.take()
    metrics = run_crowd(bench, Crowd(deployment.database_url, _ELSEWHERE, seconds=seconds))
    metrics |= deployment.heartbeats.take()
    bench.record(Sample(measure, CHOOSERS, metrics, {"database": kind, "table": table}, repetition))


def _hold(bench: Bench, kind: str, deployment: Deployment) -> None:
    """Measure at the end of a time in which a transaction was held open, so that nothing that died could be removed."""
    held = 10.0 if bench.quick else _HELD_SECONDS
    begin = time.monotonic()
    with sa.create_engine(deployment.database_url, isolation_level="REPEATABLE READ").connect() as connection:
        connection.execute(sa.text("SELECT txid_current()"))
        run_crowd(bench, Crowd(deployment.database_url, _ELSEWHERE, seconds=6.0 if bench.quick else 30.0))
        while time.monotonic() - begin < held:
            _whole_times(deployment, 0, 5.0)
        for repetition in range(bench.repeat):
            _measure_times(bench, "size_held", kind, "full", deployment, repetition)
            _measure_choices(bench, "size_held_choices", kind, "full", deployment, repetition)
        connection.rollback()
