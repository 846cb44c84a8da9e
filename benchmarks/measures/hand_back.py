"""How soon a job goes on elsewhere when its worker is stopped or killed, with an empty queue and behind a backlog.

In: a ``Bench``.
Out: samples ``hand_back``.

A deploy stops every worker; what it interrupts must not go behind everything that waits.
"""

import statistics
import time
from typing import Final

import sqlalchemy as sa

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.contenders import KEEPSTREAM
from benchmarks.deployment import Deployment, Order, wait_until
from benchmarks.full_table import Backlog
from benchmarks.harness import BenchmarkError
from keepstream.tables import running

_JOBS: Final = 10  #: Long ones, which are interrupted.
_PLACES: Final = 20
_GRACE: Final = 1.0  #: Seconds; the jobs run longer.
_LONG: Final = {"deltas": 1200, "rate": 10}
_SHORT: Final = {"deltas": 4, "rate": 8}
_WAIT_SECONDS: Final = 90.0


def hand_back(bench: Bench) -> None:
    """Stop a worker by SIGTERM and by SIGKILL, without and with a backlog."""
    if bench.services.postgres_url is None:
        return
    backlog = 2_000 if bench.quick else 100_000
    for repetition in range(bench.repeat):
        for waiting in (0, backlog):
            for how in ("sigterm", "sigkill"):
                _interrupt(bench, how, waiting, repetition)


def _interrupt(bench: Bench, how: str, waiting: int, repetition: int) -> None:
    name = f"hand-back-{how}-{waiting}-{repetition}"
    url = bench.services.new_database("postgresql", name)
    with Deployment(bench, url, name, concurrency=_PLACES, shutdown_grace=_GRACE) as deployment:
        first = deployment.start_worker()
        jobs = [f"long-{number}" for number in range(_JOBS)]
        deployment.submit(Order(job, _LONG, "patient") for job in jobs)
        seen = deployment.watcher.jobs
        wait_until(lambda: all(j in seen and seen[j].first_delta for j in jobs), "the jobs to run", _WAIT_SECONDS)
        second = deployment.start_worker()
        if waiting:
            full_table.add_backlog(deployment.database_url, Backlog(waiting, name, "backlog", 1, _SHORT))
            busy = sa.select(sa.func.count()).where(running.c.worker_id == second.id)
            wait_until(lambda: deployment.query(busy)[0][0] >= _PLACES, "the other worker to be full", _WAIT_SECONDS)
        begin = time.monotonic()
        (first.terminate if how == "sigterm" else first.kill)()
        wait_until(lambda: all(2 in seen[j].first_delta for j in jobs), "the jobs to go on", _WAIT_SECONDS)
        if any(len(seen[job].started) != 2 for job in jobs):
            raise BenchmarkError("a job was started more than twice")
        grace = _GRACE if how == "sigterm" else 0.0
        waits = [seen[job].started[2] - begin - grace for job in jobs]
        metrics = {
            "started_p50_s": statistics.median(waits),
            "started_most_s": max(waits),
            "first_delta_most_s": max(seen[job].first_delta[2] - begin - grace for job in jobs),
        }
        bench.record(Sample("hand_back", KEEPSTREAM, metrics, {"how": how, "waiting": waiting}, repetition))
        for worker in deployment.workers:
            worker.kill()
