"""Crowds: several processes of choosers at once.

In: a ``Bench``, a database and a queue; how many, and for how long.
Out: what they chose a second, and how long their turns took, to the measures.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from benchmarks.bench import Bench, percentile
from benchmarks.harness import Process, python

CHOOSERS: Final = "choosers"  #: Their name in the samples.

_START_SECONDS: Final = 120.0
_END_SECONDS: Final = 90.0
_WARM_SECONDS: Final = 2  #: At both ends, which do not count: connections are opened, and the last jobs end.


@dataclass(frozen=True, slots=True)
class Crowd:
    """Workers, and where their jobs wait."""

    url: str
    queue: str
    processes: int = 8
    workers: int = 1  #: In each process.
    places: int = 10  #: Of each worker.
    seconds: float = 10.0
    providers: Path | None = None


def run_crowd(bench: Bench, crowd: Crowd, meanwhile: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Let them choose; return metrics. ``meanwhile`` is called once all are at it.

    Raises:
        BenchmarkError: one of them ended early.
    """
    command = python("benchmarks.choosers", "--url", crowd.url, "--queue", crowd.queue)
    command += ["--workers", str(crowd.workers), "--places", str(crowd.places), "--seconds", str(crowd.seconds)]
    if crowd.providers is not None:
        command += ["--providers", str(crowd.providers)]
    cores = bench.cores.worker | bench.cores.rest
    deadlocks, postgres_cpu = _deadlocks(crowd.url), bench.services.postgres_cpu()
    with ExitStack() as stack:
        processes = []
        for number in range(crowd.processes):
            log = bench.new_file(f"choosers-{number}.log")
            process = Process("choosers", command, cores, log, speaks=True)
            stack.callback(process.close)
            processes.append(process)
        for process in processes:
            process.expect("ready", _START_SECONDS)
        for process in processes:
            process.send("go")
        meanwhile()
        results = [process.expect("ended", crowd.seconds + _END_SECONDS) for process in processes]
    chosen: Counter[int] = Counter()
    for result in results:
        chosen.update({int(second): count for second, count in result["chosen"].items()})
    counted = sorted(chosen)[_WARM_SECONDS : -_WARM_SECONDS or None]
    jobs = sum(result["jobs"] for result in results)
    cpu = sum(result["cpu_seconds"] for result in results)
    if crowd.url.startswith("postgresql"):
        cpu += bench.services.postgres_cpu() - postgres_cpu
    turns = sorted(seconds * 1e3 for result in results for seconds in result["turn_seconds"])
    return {
        "jobs_per_second": sum(chosen[second] for second in counted) / len(counted) if counted else 0.0,
        "jobs": float(jobs),
        "cpu_ms_per_job": cpu / jobs * 1e3 if jobs else float("nan"),
        "doubles": float(sum(result["doubles"] for result in results)),
        "turns": float(sum(result["turns"] for result in results)),
        "turn_p50_ms": percentile(turns, 0.5),
        "turn_p99_ms": percentile(turns, 0.99),
        "deadlocks": _deadlocks(crowd.url) - deadlocks,
    }


def _deadlocks(url: str) -> float:
    if not url.startswith("postgresql"):
        return 0.0
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        count = connection.execute(
            sa.text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        ).scalar()
    engine.dispose()
    return float(count or 0)
