"""A job is one job, however often it is enqueued, sent, delivered or ended."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from api_contracts.errors import ErrorCode, IdempotencyConflictError
from api_contracts.names import QUEUE
from api_contracts.results import JobStatus
from api_contracts.tables import rejected_messages
from tests.harness import Stand, wait_until


def wait_for_empty_queue(stand: Stand) -> None:
    """Wait until the workers have taken, and acknowledged, all messages."""
    with stand.redis() as client:
        wait_until(lambda: client.llen(QUEUE) + client.hlen("unacked") == 0, "the queue to be empty")


def test_duplicate_messages_make_one_stream(any_stand: Stand) -> None:
    stand = any_stand
    stand.start_workers(2)
    jobs = [stand.job(deltas=10, rate=20) for _ in range(10)]
    for _ in range(5):
        stand.send(*jobs)
    for job in jobs:
        result = stand.wait_for(job["id"])
        assert result.status is JobStatus.COMPLETED
        assert len(result.attempts) == 1
    wait_for_empty_queue(stand)
    assert all(len(stand.provider.attempts(job["id"])) == 1 for job in jobs)


def test_message_delivered_after_the_end_changes_nothing(shared_stand: Stand) -> None:
    stand = shared_stand
    job = stand.job(deltas=3)
    stand.send(job)
    before = stand.wait_for(job["id"])
    told = wait_until(lambda: [e for e in stand.log(job["id"]) if e.type == "job.completed"], "the end")
    for _ in range(5):
        stand.send(job)
    wait_for_empty_queue(stand)
    assert stand.result(job["id"]) == before
    assert [one for one in stand.log(job["id"]) if one.type.startswith("job.")] == told
    assert len(stand.provider.attempts(job["id"])) == 1


def test_same_idempotency_key_is_the_same_job(any_stand: Stand) -> None:
    stand = any_stand
    stand.start_worker()
    request = {"model": "scripted-1", "messages": [{"role": "user", "content": "Hello"}], "idempotency_key": "order-7"}
    script = {"key": "order-7", "deltas": 3}
    job_ids = {stand.client.enqueue(**request, script=script) for _ in range(5)}
    assert len(job_ids) == 1
    stand.wait_for(*job_ids)
    assert {stand.client.enqueue(**request, script=script)} == job_ids
    assert len(stand.provider.attempts("order-7")) == 1
    with pytest.raises(IdempotencyConflictError):
        stand.client.enqueue(**request, script=script | {"deltas": 4})


def test_message_that_reuses_an_id_for_another_request_is_recorded_and_harms_nothing(any_stand: Stand) -> None:
    stand = any_stand
    stand.start_worker()
    job = stand.job(deltas=3)
    stand.send(job)
    before = stand.wait_for(job["id"])
    stand.send(job | {"model": "scripted-2"})

    def recorded() -> list[str]:
        with stand.database() as connection:
            return list(
                connection.scalars(select(rejected_messages.c.reason).where(rejected_messages.c.job_id == job["id"]))
            )

    assert len(wait_until(recorded, "the message to be recorded")) == 1
    assert stand.result(job["id"]) == before


def test_job_that_waited_too_long_ends_as_expired(any_stand: Stand) -> None:
    stand = any_stand
    soon = datetime.now(UTC) + timedelta(seconds=1)
    job_id = stand.enqueue(deltas=3, limits={"expires_at": soon})
    with stand.redis() as client:
        client.rpop(QUEUE)  # so that it is the sweeper who finds it
    stand.start_worker()
    following = stand.follow(job_id)
    following.to_the_end()
    result = stand.result(job_id)
    assert result.status is JobStatus.EXPIRED
    assert result.error is not None
    assert result.error.code == ErrorCode.EXPIRED
    assert following.types == ["job.expired"]
    assert stand.provider.attempts(job_id) == []


def test_job_whose_message_comes_too_late_ends_as_expired(stand: Stand) -> None:
    job = stand.job(deltas=3, limits={"expires_at": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()})
    stand.send(job)
    stand.start_worker()
    following = stand.follow(job["id"])
    following.to_the_end()
    assert stand.result(job["id"]).status is JobStatus.EXPIRED
    assert stand.provider.attempts(job["id"]) == []


def test_started_job_does_not_expire(shared_stand: Stand) -> None:
    stand = shared_stand
    soon = datetime.now(UTC) + timedelta(seconds=5)
    job_id = stand.enqueue(deltas=160, rate=20, limits={"expires_at": soon})
    assert stand.wait_for(job_id).status is JobStatus.COMPLETED


def test_restored_unacknowledged_messages_do_no_harm(shared_stand: Stand) -> None:
    """As Redis' visibility timeout would do it, hours later."""
    stand = shared_stand
    job = stand.job(deltas=40, rate=20)
    stand.send(job)
    stand.wait_for_deltas(job["id"])
    wait_for_empty_queue(stand)  # a running job holds no unacknowledged message, so there is nothing to restore
    stand.send(job)
    result = stand.wait_for(job["id"])
    assert len(result.attempts) == 1
    wait_for_empty_queue(stand)
