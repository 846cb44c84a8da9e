"""Rolling deploy: generation after generation of workers is replaced under load.

In: a sandbox and a seed.
Out: a report.

Deploys are the most frequent of all faults, and nobody should notice one.
"""

import random
import threading
import time
from collections import Counter
from typing import Final

from keepstream.results import CompletionResult, JobStatus
from tests.chaos.report import Report, spread
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster

GENERATIONS: Final = 3
WORKERS: Final = 3
GRACE: Final = 6.0
RATE: Final = 20.0  #: Deltas per second of each stream.
SLACK: Final = 1.0  #: Seconds by which a stream that just fits into the grace period may miss it.


def run(
    sandbox: Sandbox,
    seed: int,
    _jobs: int = 0,
    generations: int = GENERATIONS,
    workers: int = WORKERS,
    grace: float = GRACE,
    slack: float = SLACK,
) -> Report:
    """Run the item and check the results."""
    report = Report(f"rolling deploy ({generations} generations of {workers} workers, {sandbox.database})")
    with sandbox.cluster("deploy", shutdown_grace=grace) as cluster:
        current = cluster.start_workers(workers)
        load = _Load(cluster, random.Random(seed), grace)
        told: dict[str, float] = {}  # worker id → when it was told to end
        took: list[float] = []
        codes: Counter[str] = Counter()
        for _ in range(generations - 1):
            for worker in list(current):
                current.append(cluster.start_worker())
                told[worker.id] = time.monotonic()
                worker.terminate()
                codes[f"exit code {worker.wait()}"] += 1
                took.append(time.monotonic() - told[worker.id])
                current.remove(worker)
        load.stop()
        results = [cluster.wait_for(job_id) for job_id in load.job_ids]
        report.count("workers replaced", len(told))
        report.count("time a worker took to end", spread(took))
        report.count_each("worker", codes)
        _judge(report, cluster, results, told, grace - slack)
    return report


class _Load(threading.Thread):
    """Enqueues streams that fit into the grace period, and some that do not, until it is stopped."""

    def __init__(self, cluster: Cluster, dice: random.Random, grace: float) -> None:
        super().__init__(daemon=True)
        self.job_ids: list[str] = []
        self._cluster = cluster
        self._dice = dice
        self._grace = grace
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopping.wait(self._dice.expovariate(3)):
            share = self._dice.uniform(0.1, 0.7) if self._dice.random() < 0.9 else 3  # of the grace period
            seconds = share * self._grace
            self.job_ids.append(self._cluster.enqueue(deltas=int(seconds * RATE), rate=RATE))

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def _judge(
    report: Report, cluster: Cluster, results: list[CompletionResult], told: dict[str, float], enough: float
) -> None:
    streams = cluster.provider.history()
    restarted = [result for result in results if len(result.attempts) > 1]
    report.count_each("job", Counter(result.status.value for result in results))
    report.count_each("attempt", Counter(str(one.outcome) for result in results for one in result.attempts))
    report.count("jobs that ran on two workers or more", len(restarted))
    report.check("no job fails", [f"{one.id}: {one.error}" for one in results if one.status is not JobStatus.COMPLETED])
    report.check(
        "attempts end only by finishing or at the end of the grace period",
        [
            f"{result.id}: {one.outcome}, {one.error}"
            for result in results
            for one in result.attempts
            if one.outcome not in ("finished", "interrupted")
        ],
    )
    report.check(
        "no attempt is restarted that could have finished",
        [
            f"{result.id}: attempt {one.number}"
            for result in restarted
            for one, stream in zip(result.attempts, streams[result.id], strict=True)
            if one.outcome == "interrupted" and stream.started + _seconds(result) < told[str(one.worker)] + enough
        ],
    )


def _seconds(result: CompletionResult) -> float:
    """The duration of the job's whole stream, in seconds."""
    return len(result.text.split()) / RATE
