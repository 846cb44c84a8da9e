"""Times: how long a fault is felt with the default settings.

In: a sandbox.
Out: a report of three times: from a worker's death to the next attempt's first event, from a cancel to the provider's
closed connection, and from SIGTERM to the jobs running elsewhere. The documents quote them.
"""

import threading
import time
from typing import Any, Final

import redis
from redis.exceptions import RedisError

from keepstream.events import parse_event
from tests.chaos.report import Report, spread
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster, WorkerProcess, wait_until

WORKERS: Final = 3
JOBS: Final = 30
KILLS: Final = 6
CANCELS: Final = 200
_ENDLESS: Final[dict[str, Any]] = {"deltas": 100_000, "rate": 5, "limits": {"max_attempts": 100}}
_SETTLED: Final = 8.0  #: Seconds after which workers that have just started judge others' silence.
_LONGEST_RECOVERY: Final = 30.0  #: Seconds; the lease is 6, and the machine may be busy.


class _Watch(threading.Thread):
    """Records when the first event of each attempt arrived."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.first: dict[tuple[str, int], float] = {}
        self._pubsub = redis.Redis.from_url(cluster.valkey.url).pubsub()
        self._pubsub.psubscribe("keepstream:*:events")
        self.start()

    def run(self) -> None:
        try:
            for message in self._pubsub.listen():
                if message["type"] == "pmessage":
                    event = parse_event(message["data"])
                    self.first.setdefault((event.job_id, event.attempt), time.monotonic())
        except (RedisError, OSError, ValueError):  # closed
            return


def run(
    sandbox: Sandbox, _seed: int = 0, _jobs: int = 0, kills: int = KILLS, cancels: int = CANCELS, jobs: int = JOBS
) -> Report:
    """Measure, and fail only on defects."""
    report = Report(f"times (default settings, {WORKERS} workers, {sandbox.database})")
    with sandbox.cluster("times", base={}) as cluster:
        workers = cluster.start_workers(WORKERS)
        watch = _Watch(cluster)
        job_ids = [cluster.enqueue(**_ENDLESS) for _ in range(jobs)]
        for job_id in job_ids:
            cluster.wait_for_deltas(job_id)
        time.sleep(_SETTLED)

        killed: list[float] = []
        for number in range(kills):
            victim = workers.pop(0)
            held = _held_by(cluster, victim, job_ids)
            moment = time.monotonic()
            victim.kill()
            killed += _moved(cluster, watch, held, moment)
            workers.append(cluster.start_worker())
            report.count("workers killed", number + 1)
        report.count("worker killed → next attempt's first event", spread(killed))

        handed_over: list[float] = []
        for hurried in (True, False):
            leaver = max(workers, key=lambda worker: len(_held_by(cluster, worker, job_ids)))
            held = _held_by(cluster, leaver, job_ids)
            leaver.terminate()
            if hurried:
                leaver.wait_to_say("worker_draining")
                leaver.terminate()
            moment = time.monotonic()
            elsewhere = _moved(cluster, watch, held, moment)
            label = "SIGTERM twice" if hurried else "SIGTERM, grace period of 30 s included"
            report.count(f"{label} → jobs running elsewhere", spread(elsewhere))
            handed_over += elsewhere
            leaver.wait()
            workers.remove(leaver)
            workers.append(cluster.start_worker())

        closed = _cancel_all(cluster, [*job_ids, *(cluster.enqueue(**_ENDLESS) for _ in range(cancels - len(job_ids)))])
        report.count("cancel → provider's connection closed", spread(closed))
        report.check(
            "no recovery takes longer than it may",
            [f"{value:.1f} s" for value in killed if value > _LONGEST_RECOVERY],
        )
        report.check("every cancel closed its connection", [] if len(closed) == cancels else [f"{len(closed)}"])
    return report


def _held_by(cluster: Cluster, worker: WorkerProcess, job_ids: list[str]) -> dict[str, int]:
    """Return the jobs that a worker runs, with their attempt."""
    held = {}
    for job_id in job_ids:
        last = cluster.result(job_id).attempts[-1]
        if last.worker == worker.id and last.outcome is None:
            held[job_id] = last.number
    return held


def _moved(cluster: Cluster, watch: _Watch, held: dict[str, int], moment: float) -> list[float]:
    """Wait until jobs have a newer attempt; return the seconds to the first event of each."""
    successors = {(job_id, attempt + 1) for job_id, attempt in held.items()}
    wait_until(lambda: successors <= watch.first.keys(), f"{len(held)} jobs to run elsewhere")
    return [watch.first[job_id, attempt + 1] - moment for job_id, attempt in held.items()]


def _cancel_all(cluster: Cluster, job_ids: list[str]) -> list[float]:
    """Cancel jobs one after the other; return the seconds from each call to the closed connection."""
    for job_id in job_ids:
        cluster.wait_for_deltas(job_id, attempt=len(cluster.provider.attempts(job_id)) or 1)
    called = {}
    for job_id in job_ids:
        called[job_id] = time.monotonic()
        cluster.client.cancel(job_id)
        time.sleep(0.01)  # one at a time, as people would
    for job_id in job_ids:
        cluster.wait_for(job_id)
    history = cluster.provider.history()
    closed = [(history[job_id][-1].client_closed, moment) for job_id, moment in called.items()]
    return [moment_closed - moment for moment_closed, moment in closed if moment_closed is not None]
