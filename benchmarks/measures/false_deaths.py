"""Whether a living worker is ever taken for dead, because it, or the database, has much to do.

In: a ``Bench``.
Out: samples ``no_false_deaths``.

One worker has a backlog of a hundred thousand jobs, another runs long streams of another queue, and a third is idle and
could sweep.
"""

import time
from typing import Final

import sqlalchemy as sa

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.contenders import KEEPSTREAM
from benchmarks.deployment import Deployment, Order
from benchmarks.full_table import Backlog
from keepstream.tables import attempts

_PLACES: Final = 60
_OTHER: Final = "other"
_STREAM: Final = {"deltas": 40, "rate": 2}  #: Twenty seconds.
_LEASE: Final = 6.0  #: Seconds, as it is by default.
_SAID_SECONDS: Final = 60.0


def no_false_deaths(bench: Bench) -> None:
    """Run for ten minutes; count attempts that were lost or interrupted though nobody died."""
    if bench.services.postgres_url is None:
        return
    seconds, waiting = (20.0, 5_000) if bench.quick else (600.0, 100_000)
    name = "no-false-deaths"
    with Deployment(
        bench, bench.services.new_database("postgresql", name), name, concurrency=_PLACES, lease=_LEASE
    ) as deployment:
        full_table.add_backlog(deployment.database_url, Backlog(waiting, name, "backlog", 1, _STREAM))
        deployment.start_worker()
        deployment.start_worker(queue=f"{name}-{_OTHER}")
        deployment.start_worker(queue=f"{name}-idle")
        long = {"deltas": int(seconds * 2), "rate": 2}
        deployment.submit((Order(f"long-{number}", long) for number in range(_PLACES)), queue=f"{name}-{_OTHER}")
        deployment.heartbeats.take()
        begin = said = time.monotonic()
        while time.monotonic() - begin < seconds:
            time.sleep(0.5)
            if time.monotonic() - said > _SAID_SECONDS:
                said = time.monotonic()
                bench.say(f"{said - begin:.0f} s: {dict(deployment.query(_OUTCOMES))}")
        outcomes: dict[str, int] = dict(deployment.query(_OUTCOMES))
        metrics = {
            "attempts": float(sum(outcomes.values())),
            "lost": float(outcomes.get("lost", 0) + outcomes.get("interrupted", 0)),
            **deployment.heartbeats.take(),
        }
        parameters = {"waiting": waiting, "seconds": seconds}
        bench.record(Sample("no_false_deaths", KEEPSTREAM, metrics, parameters))


_OUTCOMES: Final = sa.select(sa.func.coalesce(attempts.c.outcome, "running"), sa.func.count()).group_by(
    attempts.c.outcome
)
