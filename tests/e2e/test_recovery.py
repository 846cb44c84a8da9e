"""A worker dies or a message is lost: the job goes on elsewhere, and nobody is told anything wrong."""

import time
from typing import Any

import pytest
from sqlalchemy import update

from api_contracts.errors import ErrorCode
from api_contracts.names import QUEUE
from api_contracts.results import JobStatus, UsageSource
from api_contracts.tables import jobs, now
from tests.harness import Stand, wait_until


def make_due(stand: Stand, job_id: str) -> None:
    """Let the time pass after which a waiting job's message is sent again."""
    with stand.database() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(resend_at=now()))


def test_killed_workers_job_is_run_again_by_another_one(any_stand: Stand) -> None:
    stand = any_stand
    stand.start_workers(2)
    job_id = stand.enqueue(deltas=60, rate=15)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    stand.worker_of(job_id).kill()

    transcript = following.to_the_end()
    result = stand.result(job_id)
    assert result.status is JobStatus.COMPLETED
    assert [(one.reason, one.outcome) for one in result.attempts] == [("first", "lost"), ("worker_lost", "finished")]
    assert transcript.text == result.text == "word " * 60
    assert transcript.sha256() == result.output_sha256


def test_usage_of_a_lost_attempt_is_estimated_from_the_log(stand: Stand) -> None:
    stand.start_workers(2)
    job_id = stand.enqueue(deltas=60, rate=15)
    stand.follow(job_id).wait_for("delta", count=10)
    stand.worker_of(job_id).kill()

    lost, finished = stand.wait_for(job_id).attempts
    assert lost.usage is not None
    assert finished.usage is not None
    assert (lost.usage.source, finished.usage.source) == (UsageSource.ESTIMATED, UsageSource.PROVIDER)
    total = stand.result(job_id).usage
    assert total is not None
    assert total.source is UsageSource.ESTIMATED
    assert lost.usage.completion_tokens
    assert finished.usage.completion_tokens
    assert total.completion_tokens == lost.usage.completion_tokens + finished.usage.completion_tokens


def test_restarted_worker_takes_up_what_its_predecessor_left(stand: Stand) -> None:
    worker = stand.start_worker()
    job_id = stand.enqueue(deltas=40, rate=20)
    stand.wait_for_deltas(job_id)
    worker.kill()
    stand.start_worker()
    assert stand.wait_for(job_id).status is JobStatus.COMPLETED
    assert len(stand.provider.attempts(job_id)) == 2


def test_job_that_kills_its_worker_each_time_ends_as_failed(stand: Stand) -> None:
    stand.start_worker()
    job_id = stand.enqueue(deltas=2000, rate=20, limits={"max_attempts": 2})
    following = stand.follow(job_id)
    for attempt in (1, 2):
        following.wait_for("delta", count=3, attempt=attempt)
        holder = stand.worker_of(job_id)
        stand.start_worker()
        holder.kill()

    transcript = following.to_the_end()
    result = stand.result(job_id)
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.WORKER_LOST
    assert len(stand.provider.attempts(job_id)) == 2
    assert result.partial
    assert result.text.startswith("word word ")
    assert transcript.text == result.text


def test_finished_stream_whose_worker_died_before_the_commit_is_rebuilt_from_the_log(postgres_stand: Stand) -> None:
    stand = postgres_stand
    worker = stand.start_worker()
    job_id = stand.enqueue(text="The whole answer, paid for once.", rate=10, reasoning="Let me think.")
    following = stand.follow(job_id)
    following.wait_for("delta")
    stand.postgres.kill()
    following.wait_for("attempt.finished")
    worker.kill()
    stand.postgres.start()
    stand.start_worker()

    transcript = following.to_the_end()
    result = stand.result(job_id)
    assert result.status is JobStatus.COMPLETED
    assert result.text == transcript.text == "The whole answer, paid for once."
    assert result.choices[0].reasoning == "Let me think."
    assert [one.outcome for one in result.attempts] == ["lost", "recovered"]
    assert len(stand.provider.attempts(job_id)) == 1
    assert result.usage is not None
    assert result.usage.source is UsageSource.PROVIDER


def test_worker_that_must_end_before_the_database_is_back_leaves_its_result_in_the_log(postgres_stand: Stand) -> None:
    stand = postgres_stand
    worker = stand.start_worker(shutdown_grace=1)
    job_id = stand.enqueue(deltas=20, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta")
    stand.postgres.kill()
    following.wait_for("attempt.finished")
    worker.terminate()
    worker.wait()
    stand.postgres.start()
    stand.start_worker()

    assert following.to_the_end().text == "word " * 20
    assert [one.outcome for one in stand.result(job_id).attempts] == ["lost", "recovered"]
    assert len(stand.provider.attempts(job_id)) == 1


def test_total_time_is_bounded_across_the_deaths_of_workers(stand: Stand) -> None:
    stand.start_workers(2)
    job_id = stand.enqueue(deltas=2000, rate=20, limits={"total_timeout": 10, "max_attempts": 100})
    stand.wait_for_deltas(job_id)
    began = time.monotonic()
    stand.worker_of(job_id).kill()
    stand.wait_for_deltas(job_id, attempt=2)
    result = stand.wait_for(job_id)
    assert time.monotonic() - began < 10 + 5
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.TOTAL_TIMEOUT
    assert result.partial


def test_long_retry_after_survives_the_worker(stand: Stand) -> None:
    worker = stand.start_worker(sleep_limit=1)
    fault = {"kind": "status", "status": 429, "headers": {"retry-after": "4"}}
    job_id = stand.enqueue(deltas=3, faults=[fault])
    stand.wait_for(job_id, "retrying")
    worker.kill()
    stand.start_worker(sleep_limit=1)

    assert stand.wait_for(job_id).status is JobStatus.COMPLETED
    first, second = stand.provider.attempts(job_id)
    assert 4.0 <= second.started - first.started < 30


def test_queued_row_whose_message_was_lost_is_sent_again(any_stand: Stand) -> None:
    stand = any_stand
    job_id = stand.enqueue(deltas=3)
    with stand.redis() as client:
        assert client.rpop(QUEUE) is not None
    make_due(stand, job_id)
    stand.start_worker()
    result = stand.wait_for(job_id)
    assert result.status is JobStatus.COMPLETED
    assert len(result.attempts) == 1


def test_message_of_a_worker_that_died_before_the_claim_comes_back(postgres_stand: Stand) -> None:
    """Its producer wrote no row, so the message is all there is."""
    stand = postgres_stand
    worker = stand.start_worker()
    stand.postgres.kill()
    job = stand.job(deltas=3)
    stand.send(job)
    with stand.redis() as client:
        wait_until(lambda: client.hlen("unacked"), "the message to be taken")
        worker.kill()
        stand.postgres.start()
        tags: Any = client.zrange("unacked_index", 0, -1)
        for tag in tags:
            client.zadd("unacked_index", {tag: 1})  # let the time pass after which it may be given to another one
    stand.start_worker()
    result = stand.wait_for(job["id"], timeout=150)
    assert result.status is JobStatus.COMPLETED
    assert len(stand.provider.attempts(job["id"])) == 1


def test_job_is_accepted_while_the_broker_is_down_and_runs_when_it_is_back(stand: Stand) -> None:
    stand.start_worker()
    stand.valkey.kill()
    job_id = stand.enqueue(deltas=3)
    assert stand.result(job_id).status is JobStatus.QUEUED
    stand.valkey.start()
    assert stand.wait_for(job_id).status is JobStatus.COMPLETED


def test_flushed_broker_loses_no_job(stand: Stand) -> None:
    job_ids = [stand.enqueue(deltas=3) for _ in range(20)]
    with stand.redis() as client:
        client.flushall()
    for job_id in job_ids:
        make_due(stand, job_id)
    stand.start_worker()
    assert {stand.wait_for(job_id).status for job_id in job_ids} == {JobStatus.COMPLETED}


def test_claim_that_nobody_runs_is_let_go(stand: Stand) -> None:
    """As after a claim whose commit went through while its answer was lost."""
    worker = stand.start_worker()
    with stand.redis() as client:
        job_id = stand.enqueue(deltas=3)
        wait_until(lambda: client.llen(QUEUE) == 0, "the message to be taken")
    stand.wait_for(job_id)
    with stand.database() as connection:
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(status="running", worker_id=worker.id, finished_at=None)
        )
    result = stand.wait_for(job_id)
    assert result.status is JobStatus.COMPLETED
    assert result.attempts[-1].reason == "worker_lost"
    assert worker.said("job_orphaned", job_id=job_id)


@pytest.mark.parametrize("fault", ["cut", "eof", "garbage"])
def test_output_of_a_failed_attempt_is_void(shared_stand: Stand, fault: str) -> None:
    stand = shared_stand
    job_id = stand.enqueue(text="one two three four five six", faults=[{"kind": fault, "after": 3}])
    following = stand.follow(job_id)
    transcript = following.to_the_end()
    assert transcript.text == stand.result(job_id).text == "one two three four five six"
    assert "attempt.failed" in following.types
    assert [one.outcome for one in stand.result(job_id).attempts] == ["failed", "finished"]
