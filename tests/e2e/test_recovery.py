"""A worker dies or a message is lost: the job continues elsewhere, and no follower is misled."""

import json
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from sqlalchemy import select, update

from keepstream.client.lanes import pool_id
from keepstream.errors import ErrorCode
from keepstream.names import QUEUE
from keepstream.results import JobStatus, UsageSource
from keepstream.tables import jobs, now, requests, running
from tests.cluster import BRIEF, Cluster, wait_until


def test_killed_workers_job_is_run_again_by_another_one(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_workers(2, lease=BRIEF)
    job_id = cluster.enqueue(deltas=60, hold=5)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    cluster.worker_of(job_id).kill()
    cluster.release(job_id)

    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert result.status is JobStatus.COMPLETED
    assert [(attempt.reason, attempt.outcome) for attempt in result.attempts] == [
        ("first", "lost"),
        ("worker_lost", "finished"),
    ]
    assert transcript.text == result.text == "word " * 60
    assert transcript.sha256() == result.output_sha256


def test_usage_of_a_lost_attempt_is_estimated_from_the_log(cluster: Cluster) -> None:
    cluster.start_workers(2, lease=BRIEF)
    job_id = cluster.enqueue(deltas=60, hold=10)
    cluster.follow(job_id).wait_for("delta")
    cluster.worker_of(job_id).kill()
    cluster.release(job_id)

    lost, finished = cluster.wait_for(job_id).attempts
    assert lost.usage is not None
    assert finished.usage is not None
    assert (lost.usage.source, finished.usage.source) == (UsageSource.ESTIMATED, UsageSource.PROVIDER)
    total = cluster.result(job_id).usage
    assert total is not None
    assert total.source is UsageSource.ESTIMATED
    assert lost.usage.completion_tokens
    assert finished.usage.completion_tokens
    assert total.completion_tokens == lost.usage.completion_tokens + finished.usage.completion_tokens


def test_restarted_worker_takes_up_what_its_predecessor_left(cluster: Cluster) -> None:
    worker = cluster.start_worker(lease=BRIEF)
    job_id = cluster.enqueue(deltas=40, hold=1)
    cluster.wait_for_deltas(job_id)
    worker.kill()
    cluster.release(job_id)
    cluster.start_worker(lease=BRIEF)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    assert len(cluster.provider.attempts(job_id)) == 2


def test_job_that_kills_its_worker_each_time_ends_as_failed(cluster: Cluster) -> None:
    cluster.start_worker(lease=BRIEF)
    job_id = cluster.enqueue(deltas=2000, rate=20, limits={"max_attempts": 2})
    following = cluster.follow(job_id)
    for attempt in (1, 2):
        following.wait_for("delta", count=3, attempt=attempt)
        holder = cluster.worker_of(job_id)
        cluster.start_worker(lease=BRIEF)
        holder.kill()

    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.WORKER_LOST
    assert len(cluster.provider.attempts(job_id)) == 2
    assert result.partial
    assert result.text.startswith("word word ")
    assert transcript.text == result.text


def test_finished_stream_whose_worker_died_before_the_commit_is_rebuilt_from_the_log(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    worker = cluster.start_worker(lease=BRIEF)
    job_id = cluster.enqueue(text="The whole answer, paid for once.", hold=1, reasoning="Let me think.")
    following = cluster.follow(job_id)
    following.wait_for("delta")
    cluster.postgres.kill()
    cluster.release(job_id)
    following.wait_for("attempt.finished")
    worker.kill()
    cluster.postgres.start()
    cluster.start_worker(lease=BRIEF)

    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert result.status is JobStatus.COMPLETED
    assert result.text == transcript.text == "The whole answer, paid for once."
    assert result.choices[0].reasoning == "Let me think."
    assert [attempt.outcome for attempt in result.attempts] == ["lost", "recovered"]
    assert len(cluster.provider.attempts(job_id)) == 1
    assert result.usage is not None
    assert result.usage.source is UsageSource.PROVIDER


def test_worker_that_must_end_before_the_database_is_back_leaves_its_result_in_the_log(
    postgres_cluster: Cluster,
) -> None:
    cluster = postgres_cluster
    worker = cluster.start_worker(lease=BRIEF, shutdown_grace=1)
    job_id = cluster.enqueue(deltas=20, hold=1)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    cluster.postgres.kill()
    cluster.release(job_id)
    following.wait_for("attempt.finished")
    worker.terminate()
    worker.wait()
    cluster.postgres.start()
    cluster.start_worker(lease=BRIEF)

    assert following.to_the_end().text == "word " * 20
    assert [attempt.outcome for attempt in cluster.result(job_id).attempts] == ["lost", "recovered"]
    assert len(cluster.provider.attempts(job_id)) == 1


def test_total_time_is_bounded_across_the_deaths_of_workers(cluster: Cluster) -> None:
    cluster.start_workers(2, lease=BRIEF)
    job_id = cluster.enqueue(deltas=2000, rate=20, limits={"total_timeout": 25, "max_attempts": 100})
    cluster.wait_for_deltas(job_id)
    cluster.worker_of(job_id).kill()
    cluster.wait_for_deltas(job_id, attempt=2)
    result = cluster.wait_for(job_id)
    _, second = cluster.provider.attempts(job_id)
    assert second.ended is not None
    assert second.ended - second.started < 25, "the time of the first attempt counts"
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.TOTAL_TIMEOUT
    assert result.partial


def test_long_retry_after_survives_the_worker(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    fault = {"kind": "status", "status": 429, "headers": {"retry-after": "4"}}
    job_id = cluster.enqueue(deltas=3, faults=[fault])
    cluster.wait_for(job_id, "retrying")
    worker.kill()
    cluster.start_worker()

    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    first, second = cluster.provider.attempts(job_id)
    assert 4.0 <= second.started - first.started < 30


def test_stored_job_whose_message_was_lost_is_run(any_cluster: Cluster) -> None:
    cluster = any_cluster
    job_id = cluster.enqueue(deltas=3)
    with cluster.redis() as client:
        assert client.rpop(QUEUE) is not None
    cluster.start_worker()
    result = cluster.wait_for(job_id)
    assert result.status is JobStatus.COMPLETED
    assert len(result.attempts) == 1


def test_row_of_a_newer_version_does_not_hold_up_the_others(cluster: Cluster) -> None:
    job_ids = [cluster.enqueue(deltas=3) for _ in range(3)]
    with cluster.redis() as client:
        client.delete(QUEUE)
    with cluster.database() as connection:
        row = connection.execute(select(requests.c.job).where(requests.c.job_id == job_ids[1])).one()
        newer = json.dumps(json.loads(row.job) | {"of_a_later_version": True})
        connection.execute(update(requests).where(requests.c.job_id == job_ids[1]).values(job=newer))
    worker = cluster.start_worker()
    for job_id in (job_ids[0], job_ids[2]):
        assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    worker.wait_to_say("job_unreadable", job_id=job_ids[1])
    assert not cluster.result(job_ids[1]).status.terminal, "a worker of the newer version will take it"


def test_message_of_a_worker_that_died_before_the_claim_comes_back(postgres_cluster: Cluster) -> None:
    """Its producer wrote no row, so the message is the only copy."""
    cluster = postgres_cluster
    worker = cluster.start_worker()
    cluster.postgres.kill()
    job = cluster.job(deltas=3)
    cluster.send(job)
    with cluster.redis() as client:
        wait_until(lambda: client.hlen("unacked"), "the message to be taken")
        worker.kill()
        cluster.postgres.start()
        tags: Any = client.zrange("unacked_index", 0, -1)
        for tag in tags:
            client.zadd("unacked_index", {tag: 1})  # the time after which another worker may take it has passed
    cluster.start_worker()
    result = cluster.wait_for(job["id"], timeout=150)
    assert result.status is JobStatus.COMPLETED
    assert len(cluster.provider.attempts(job["id"])) == 1


def test_job_is_accepted_while_the_broker_is_down_and_runs_when_it_is_back(cluster: Cluster) -> None:
    cluster.start_worker()
    cluster.valkey.kill()
    job_id = cluster.enqueue(deltas=3)
    assert cluster.result(job_id).status is JobStatus.QUEUED
    cluster.valkey.start()
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED


def test_flushed_broker_loses_no_job(cluster: Cluster) -> None:
    job_ids = [cluster.enqueue(deltas=3) for _ in range(20)]
    with cluster.redis() as client:
        client.flushall()
    cluster.start_worker()
    assert {cluster.wait_for(job_id).status for job_id in job_ids} == {JobStatus.COMPLETED}


def test_claim_that_nobody_runs_is_let_go(cluster: Cluster) -> None:
    """As after a claim whose commit succeeded but whose answer was lost."""
    worker = cluster.start_worker()
    with cluster.redis() as client:
        job_id = cluster.enqueue(deltas=3)
        wait_until(lambda: client.llen(QUEUE) == 0, "the message to be taken")
    cluster.wait_for(job_id)
    with cluster.database() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(status="running", finished_at=None))
        connection.execute(
            running.insert().values(
                tenant="default",
                job_id=job_id,
                attempt=1,
                worker_id=worker.id,
                provider="default",
                model="scripted-1",
                lane=1,
                pool=pool_id(QUEUE, "interactive", [("default", "scripted-1")]),
                tokens=1,
                prompt_tokens=1,
                started_at=now(),
                cancel_requested=False,
            )
        )
    result = cluster.wait_for(job_id)
    assert result.status is JobStatus.COMPLETED
    assert result.attempts[-1].reason == "worker_lost"
    assert worker.said("unknown_claim_released", job_id=job_id)


@pytest.mark.parametrize("fault", ["cut", "eof", "garbage"])
def test_output_of_a_failed_attempt_is_void(shared_cluster: Cluster, fault: str) -> None:
    cluster = shared_cluster
    job_id = cluster.enqueue(text="one two three four five six", faults=[{"kind": fault, "after": 3}])
    following = cluster.follow(job_id)
    transcript = following.to_the_end()
    assert transcript.text == cluster.result(job_id).text == "one two three four five six"
    assert "attempt.failed" in following.types
    assert [attempt.outcome for attempt in cluster.result(job_id).attempts] == ["failed", "finished"]


def test_a_job_is_tried_again_when_it_is_due_and_not_when_its_worker_looks_anyway(cluster: Cluster) -> None:
    cluster.start_worker(heartbeat_interval=150.0, lease=450.0, sweep_interval=150.0)
    job_id = cluster.enqueue(text="well", faults=[{"kind": "cut", "after": 0}] * 4)
    attempts = cluster.wait_for(job_id).attempts
    assert [attempt.outcome for attempt in attempts] == ["failed"] * 4 + ["finished"]
    waits = [
        (after.started_at - before.finished_at).total_seconds()
        for before, after in pairwise(attempts)
        if before.finished_at is not None
    ]
    assert median(waits) < 3.0, waits  # each is some tenths; by chance it would be five seconds
