"""What two hundred worker processes ask of one database, idle and busy.

In: a ``Bench``.
Out: samples ``many_workers``.

Heartbeats, sweeps, turns, claims and endings are real; the streams between them are left out, and one process is many
workers, because a machine that holds two hundred processes is not at hand.
"""

import time
from typing import Final

import sqlalchemy as sa

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.crowds import CHOOSERS, Crowd, run_crowd
from benchmarks.deployment import Deployment, HeartbeatAges
from benchmarks.full_table import Backlog
from benchmarks.harness import BenchmarkError
from benchmarks.statements import Counted, counted_statements
from keepstream.tables import attempts, jobs

_PROCESSES: Final = 8
_WORKERS: Final = 25  #: In each process.
_JOBS: Final = 40_000
_TENANTS: Final = 10
_SETTLE_SECONDS: Final = 6.0  #: After which all have started, and one has the sweeps.
_SHOWN: Final = 8


def many_workers(bench: Bench) -> None:
    """Count statements while nothing is to be done, then jobs a second while there is much to do."""
    if bench.services.postgres_url is None:
        return
    workers = 5 if bench.quick else _WORKERS
    name = "many-workers"
    url = bench.services.new_database("postgresql", name)
    with Deployment(bench, url, name) as deployment:
        _measure_idle(bench, Crowd(url, name, _PROCESSES, workers, seconds=15.0 if bench.quick else 40.0))
        waiting = 4_000 if bench.quick else _JOBS
        for repetition in range(bench.repeat):
            full_table.add_backlog(deployment.database_url, Backlog(waiting, name, f"many{repetition}", _TENANTS))
            deployment.heartbeats.take()
            crowd = Crowd(url, name, _PROCESSES, workers, seconds=10.0 if bench.quick else 30.0)
            metrics = run_crowd(bench, crowd) | deployment.heartbeats.take()
            metrics["doubles"] += _doubles(deployment.engine)
            parameters: dict[str, float | str] = {"workers": _PROCESSES * workers, "state": "busy"}
            bench.record(Sample("many_workers", CHOOSERS, metrics, parameters, repetition))


def _measure_idle(bench: Bench, crowd: Crowd) -> None:
    found: list[tuple[Counted, float]] = []

    def count() -> None:
        time.sleep(_SETTLE_SECONDS)
        begin = time.monotonic()
        with counted_statements(bench.services, crowd.queue) as counted:
            time.sleep(crowd.seconds - 2 * _SETTLE_SECONDS)
        found.append((counted, time.monotonic() - begin))

    ages = HeartbeatAges(sa.create_engine(crowd.url, isolation_level="AUTOCOMMIT"))
    try:
        metrics = run_crowd(bench, crowd, count)
    finally:
        ages.close()
    (counted, seconds), workers = found[0], crowd.processes * crowd.workers
    for text, number in counted.by_text.most_common(_SHOWN):
        bench.say(f"{number / seconds:8.1f} a second: {text}")
    metrics = {
        "statements_per_second": counted.statements / seconds,
        "statements_per_worker_second": counted.statements / seconds / workers,
        "round_trips_per_worker_second": counted.round_trips / seconds / workers,
        "commits_per_worker_second": counted.transactions / seconds / workers,
        "deadlocks": metrics["deadlocks"],
        **ages.take(),
    }
    bench.record(Sample("many_workers", CHOOSERS, metrics, {"workers": workers, "state": "idle"}))


def _doubles(engine: sa.Engine) -> float:
    """Return how many jobs were run more than once."""
    more = sa.select(sa.func.count()).select_from(attempts).where(attempts.c.number > 1)
    unended = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status == "running")
    with engine.connect() as connection:
        if connection.scalar(unended):
            raise BenchmarkError("jobs that were chosen have not ended")
        return float(connection.scalar(more) or 0)
