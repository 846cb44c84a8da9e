"""Short jobs per second, on SQLite and on PostgreSQL.

In: a ``Bench``.
Out: samples ``short_jobs``.

A job of 20 deltas costs more in claims, commits and acknowledgements than in deltas.
"""

from contextlib import ExitStack
from typing import Final

from benchmarks.bench import Bench, Load, Sample

_DELTAS: Final = 20


def short_jobs(bench: Bench) -> None:
    """Submit many short jobs at once, results and events included."""
    load = Load(300 if bench.quick else 1000, _DELTAS)
    tutorials_load = Load(60 if bench.quick else 200, _DELTAS)
    for database in ("sqlite", "postgresql"):
        if database == "postgresql" and bench.services.postgres_url is None:
            return
        with ExitStack() as stack:
            runs = [(stack.enter_context(bench.keepstream(database=database)), load)]
            tutorials = (stack.enter_context(bench.tutorial(pool, database=database)) for pool in bench.pools)
            runs += [(worker, tutorials_load) for worker in tutorials]
            for repetition in range(bench.repeat):
                for worker, own_load in runs:
                    outcome = bench.round(worker, own_load)
                    metrics = {
                        "jobs_per_second": own_load.streams / outcome.used.wall,
                        "jobs_per_core_second": own_load.streams / outcome.used.cpu,
                        "cpu_ms_per_job": outcome.used.cpu / own_load.streams * 1e3,
                        "core_share": outcome.used.cpu / outcome.used.wall,
                        "failed": outcome.failed,
                    }
                    parameters = {"database": database, "jobs": own_load.streams}
                    bench.record(Sample("short_jobs", worker.name, metrics, parameters, repetition))
