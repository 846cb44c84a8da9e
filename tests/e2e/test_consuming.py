"""Workers keep taking jobs, whatever happens to the broker, and do so as soon as there is a free slot."""

import time
from functools import partial
from statistics import median

import pytest

from keepstream.names import QUEUE
from keepstream.results import JobStatus
from tests.cluster import Cluster, wait_until


@pytest.mark.parametrize("trouble", ["killed", "frozen", "connections cut"])
def test_worker_takes_jobs_again_after_trouble_with_the_broker(cluster: Cluster, trouble: str) -> None:
    cluster.start_worker()
    cluster.wait_for(cluster.enqueue(deltas=3))
    for _ in range(3):
        match trouble:
            case "killed":
                cluster.valkey.kill()
                cluster.valkey.start()
            case "frozen":
                cluster.valkey.freeze()
                time.sleep(1)  # the duration is the fault itself; nothing is awaited
                cluster.valkey.thaw()
            case _:
                with cluster.redis() as client:
                    for kind in ("normal", "pubsub"):
                        client.client_kill_filter(_type=kind, skipme=True)
        assert cluster.wait_for(cluster.enqueue(deltas=3)).status is JobStatus.COMPLETED
        with cluster.redis() as client:
            wait_until(partial(lambda client: client.llen(QUEUE) == 0, client), "its message to be taken, too")


def test_place_that_becomes_free_is_filled_at_once(cluster: Cluster) -> None:
    cluster.start_worker(concurrency=2)
    job_ids = [cluster.enqueue(deltas=2, rate=20) for _ in range(40)]
    results = [cluster.wait_for(job_id) for job_id in job_ids]
    running = [
        (result.started_at, result.finished_at) for result in results if result.started_at and result.finished_at
    ]
    assert len(running) == 40
    free, taken = sorted(end for _, end in running), sorted(start for start, _ in running)[2:]
    pauses = [(start - end).total_seconds() for end, start in zip(free, taken, strict=False)]
    assert median(pauses) < 0.5, "a place that is not filled at once would wait for a second"
    for moment, _ in running:
        assert sum(1 for start, end in running if start <= moment < end) <= 2
