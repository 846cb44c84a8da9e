"""Workers keep taking jobs, whatever happens to the broker, and do so as soon as there is a free slot."""

import time

import pytest

from keepstream.results import JobStatus
from tests.cluster import Cluster


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
        job_id = cluster.enqueue(deltas=3)
        assert cluster.wait_for(job_id, timeout=25).status is JobStatus.COMPLETED, "sooner than it would be sent again"


def test_place_that_becomes_free_is_filled_at_once(cluster: Cluster) -> None:
    cluster.start_worker(concurrency=2)
    job_ids = [cluster.enqueue(deltas=2, rate=20) for _ in range(40)]  # 0.1 s each: two seconds in all
    results = [cluster.wait_for(job_id) for job_id in job_ids]
    began = min(result.started_at for result in results if result.started_at)
    ended = max(result.finished_at for result in results if result.finished_at)
    assert (ended - began).total_seconds() < 10, "with a pause of a second at each place it would be twenty"
    running = [(result.started_at, result.finished_at) for result in results]
    for moment, _ in running:
        assert moment is not None
        assert sum(1 for start, end in running if start and end and start <= moment < end) <= 2
