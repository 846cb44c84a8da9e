"""A job is one job, however often it is enqueued, sent, delivered or ended."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from keepstream.errors import ErrorCode, IdempotencyConflictError
from keepstream.names import QUEUE
from keepstream.results import JobStatus
from keepstream.tables import rejected_messages
from tests.cluster import Cluster, wait_until


def wait_for_empty_queue(cluster: Cluster) -> None:
    """Wait until the workers have taken, and acknowledged, all messages."""
    with cluster.redis() as client:
        wait_until(lambda: client.llen(QUEUE) + client.hlen("unacked") == 0, "the queue to be empty")


def test_duplicate_messages_make_one_stream(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_workers(2)
    jobs = [cluster.job(deltas=10, rate=20) for _ in range(10)]
    for _ in range(5):
        cluster.send(*jobs)
    for job in jobs:
        result = cluster.wait_for(job["id"])
        assert result.status is JobStatus.COMPLETED
        assert len(result.attempts) == 1
    wait_for_empty_queue(cluster)
    assert all(len(cluster.provider.attempts(job["id"])) == 1 for job in jobs)


def test_message_delivered_after_the_end_changes_nothing(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    job = cluster.job(deltas=3)
    cluster.send(job)
    before = cluster.wait_for(job["id"])
    end = wait_until(lambda: [event for event in cluster.log(job["id"]) if event.type == "job.completed"], "the end")
    for _ in range(5):
        cluster.send(job)
    wait_for_empty_queue(cluster)
    assert cluster.result(job["id"]) == before
    assert [event for event in cluster.log(job["id"]) if event.type.startswith("job.")] == end
    assert len(cluster.provider.attempts(job["id"])) == 1


def test_same_idempotency_key_is_the_same_job(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    request: dict[str, Any] = {"model": "scripted-1", "messages": [{"role": "user", "content": "Hello"}]}
    script = {"key": "order-7", "deltas": 3}

    def enqueue(script: dict[str, Any]) -> str:
        return cluster.client.enqueue(request | {"script": script}, idempotency_key="order-7")

    job_ids = {enqueue(script) for _ in range(5)}
    assert len(job_ids) == 1
    cluster.wait_for(*job_ids)
    assert {enqueue(script)} == job_ids
    assert len(cluster.provider.attempts("order-7")) == 1
    with pytest.raises(IdempotencyConflictError):
        enqueue(script | {"deltas": 4})


def test_message_that_reuses_an_id_for_another_request_is_recorded_and_harms_nothing(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    job = cluster.job(deltas=3)
    cluster.send(job)
    before = cluster.wait_for(job["id"])
    cluster.send(job | {"request": job["request"] | {"model": "scripted-2"}})

    def recorded() -> list[str]:
        with cluster.database() as connection:
            return list(
                connection.scalars(select(rejected_messages.c.reason).where(rejected_messages.c.job_id == job["id"]))
            )

    assert len(wait_until(recorded, "the message to be recorded")) == 1
    assert cluster.result(job["id"]) == before


def test_job_that_waited_too_long_ends_as_expired(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker(concurrency=1)
    cluster.wait_for_deltas(cluster.enqueue(deltas=2000, rate=20))  # the only place is taken
    soon = datetime.now(UTC) + timedelta(seconds=1)
    job_id = cluster.enqueue(deltas=3, limits={"expires_at": soon})
    following = cluster.follow(job_id)
    following.to_the_end()
    result = cluster.result(job_id)
    assert result.status is JobStatus.EXPIRED
    assert result.error is not None
    assert result.error.code == ErrorCode.EXPIRED
    assert following.types == ["job.expired"]
    assert cluster.provider.attempts(job_id) == []


def test_job_whose_message_comes_too_late_ends_as_expired(cluster: Cluster) -> None:
    job = cluster.job(deltas=3, limits={"expires_at": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()})
    cluster.send(job)
    cluster.start_worker()
    following = cluster.follow(job["id"])
    following.to_the_end()
    assert cluster.result(job["id"]).status is JobStatus.EXPIRED
    assert cluster.provider.attempts(job["id"]) == []


def test_started_job_does_not_expire(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    soon = datetime.now(UTC) + timedelta(seconds=10)
    job_id = cluster.enqueue(deltas=40, hold=1, limits={"expires_at": soon})
    cluster.wait_for_deltas(job_id)
    later = soon + timedelta(seconds=2)  # several sweeps
    wait_until(lambda: datetime.now(UTC) > later, "the job's time to be over")
    cluster.release(job_id)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED


def test_restored_unacknowledged_messages_do_no_harm(shared_cluster: Cluster) -> None:
    """As after Redis' visibility timeout, hours later."""
    cluster = shared_cluster
    job = cluster.job(deltas=40, rate=20)
    cluster.send(job)
    cluster.wait_for_deltas(job["id"])
    wait_for_empty_queue(cluster)  # a running job holds no unacknowledged message, so there is nothing to restore
    cluster.send(job)
    result = cluster.wait_for(job["id"])
    assert len(result.attempts) == 1
    wait_for_empty_queue(cluster)
