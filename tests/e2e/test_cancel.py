"""Cancel works in every state, from any process, repeatedly, and for good."""

import time
from typing import Any

from keepstream import Client
from keepstream.errors import ErrorCode
from keepstream.jobs import parse_job
from keepstream.names import QUEUE, control_channel, job_keys
from keepstream.results import CompletionResult, JobStatus, UsageSource
from tests.cluster import BRIEF, Cluster, Following, wait_until

ENDLESS: dict[str, Any] = {"deltas": 2000, "rate": 20}


def check_cancelled(cluster: Cluster, following: Following) -> CompletionResult:
    """Check that the job ended as cancelled, with the output that its follower holds."""
    transcript = following.to_the_end()
    result = cluster.result(following.events[-1].job_id)
    assert result.status is JobStatus.CANCELLED
    assert result.error is not None
    assert result.error.code == ErrorCode.CANCELLED
    assert following.types[-1] == "job.cancelled"
    assert transcript.text == result.text
    assert transcript.sha256() == result.output_sha256
    return result


def test_queued_job_is_cancelled_at_once_and_never_started(any_cluster: Cluster) -> None:
    cluster = any_cluster
    job_id = cluster.enqueue(deltas=3)
    assert cluster.client.cancel(job_id) is JobStatus.CANCELLED
    following = cluster.follow(job_id)
    check_cancelled(cluster, following)
    cluster.start_worker()
    with cluster.redis() as client:
        wait_until(lambda: client.llen(QUEUE) == 0, "the worker to take the message")
    wait_until(lambda: cluster.log(job_id), "the event to be announced")
    assert [event.type for event in cluster.log(job_id)] == ["job.cancelled"]
    assert cluster.provider.attempts(job_id) == []


def test_running_job_is_stopped_and_keeps_its_partial_output(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    job_id = cluster.enqueue(**ENDLESS)
    following = cluster.follow(job_id)
    following.wait_for("delta", count=5)
    assert cluster.client.cancel(job_id) is JobStatus.RUNNING

    result = check_cancelled(cluster, following)
    assert result.partial
    assert result.text.startswith("word word word ")
    (attempt,) = result.attempts
    assert attempt.outcome == "cancelled"
    assert result.usage is not None
    assert result.usage.source is UsageSource.ESTIMATED
    wait_until(lambda: cluster.provider.attempts(job_id)[0].client_closed, "the provider's connection to be closed")


def test_job_without_output_yet_is_cancelled(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    job_id = cluster.enqueue(deltas=3, first_token_delay=600)
    cluster.wait_for(job_id, "running")
    following = cluster.follow(job_id)
    wait_until(lambda: cluster.provider.attempts(job_id), "the request to reach the provider")
    cluster.client.cancel(job_id)
    result = check_cancelled(cluster, following)
    assert result.choices == []
    assert result.usage is None or result.usage.total_tokens is None
    wait_until(lambda: cluster.provider.attempts(job_id)[0].client_closed, "the provider's connection to be closed")


def test_job_that_waits_for_its_next_attempt_is_cancelled(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    fault = {"kind": "status", "status": 429, "headers": {"retry-after": "30"}}
    job_id = cluster.enqueue(deltas=3, faults=[fault])
    following = cluster.follow(job_id)
    cluster.wait_for(job_id, "retrying")
    assert cluster.client.cancel(job_id) is JobStatus.CANCELLED
    check_cancelled(cluster, following)
    assert len(cluster.provider.attempts(job_id)) == 1


def test_output_of_the_last_attempt_is_kept_by_a_cancel_between_attempts(cluster: Cluster) -> None:
    cluster.start_worker(backoff_base=60, backoff_cap=120)
    job_id = cluster.enqueue(text="one two three four", faults=[{"kind": "cut", "after": 3}])
    following = cluster.follow(job_id)
    cluster.wait_for(job_id, "retrying", "completed")
    following.wait_for("attempt.failed")
    cluster.client.cancel(job_id)
    result = check_cancelled(cluster, following)
    assert result.text == "one two three"
    assert result.partial


def test_cancel_is_idempotent(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    job_id = cluster.enqueue(**ENDLESS)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    for _ in range(5):
        cluster.client.cancel(job_id)
    before = check_cancelled(cluster, following)
    for _ in range(5):
        assert cluster.client.cancel(job_id) is JobStatus.CANCELLED
    assert cluster.result(job_id) == before
    assert [event.type for event in cluster.log(job_id) if event.type.startswith("job.")] == ["job.cancelled"]


def test_cancel_of_a_completed_job_changes_nothing(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    job_id = cluster.enqueue(deltas=3)
    before = cluster.wait_for(job_id)
    assert cluster.client.cancel(job_id) is JobStatus.COMPLETED
    assert cluster.result(job_id) == before


def test_process_without_database_cancels_a_running_job(shared_cluster: Cluster) -> None:
    cluster = shared_cluster
    job_id = cluster.enqueue(**ENDLESS)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    cluster.make_client(database=False).cancel(job_id)
    check_cancelled(cluster, following)


def test_job_that_no_worker_has_met_is_cancelled_when_one_does(cluster: Cluster) -> None:
    producer = cluster.make_client(database=False)
    job_id = producer.enqueue(parse_job(cluster.job(**ENDLESS)))
    assert producer.cancel(job_id) is None
    cluster.start_worker()
    following = cluster.follow(job_id)
    check_cancelled(cluster, following)


def test_cancel_reaches_the_worker_while_redis_is_away(cluster_losing_redis: Cluster) -> None:
    cluster = cluster_losing_redis
    cluster.start_worker()
    job_id = cluster.enqueue(**ENDLESS)
    following = cluster.follow(job_id)
    following.wait_for("delta", count=3)
    cluster.valkey.kill()
    assert cluster.client.cancel(job_id) is JobStatus.RUNNING
    wait_until(lambda: cluster.provider.attempts(job_id)[0].client_closed, "the provider's connection to be closed")
    assert cluster.wait_for(job_id).status is JobStatus.CANCELLED
    cluster.valkey.start()
    check_cancelled(cluster, following)


def test_job_of_a_dead_worker_is_cancelled_by_another_one(cluster: Cluster) -> None:
    worker = cluster.start_worker(lease=BRIEF)
    job_id = cluster.enqueue(**ENDLESS)
    following = cluster.follow(job_id)
    following.wait_for("delta", count=3)
    worker.kill()
    assert cluster.client.cancel(job_id) is JobStatus.RUNNING
    cluster.start_worker(lease=BRIEF)
    result = cluster.wait_for(job_id)
    assert [attempt.outcome for attempt in result.attempts] == ["lost"]
    assert len(cluster.provider.attempts(job_id)) == 1
    following.to_the_end()
    assert result.status is JobStatus.CANCELLED


def test_cancelled_job_never_turns_completed(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    job_ids = [cluster.enqueue(deltas=10, rate=20) for _ in range(30)]
    answers = {}
    for job_id in job_ids:  # 10 deltas take half a second, so most cancels come close to an end
        answers[job_id] = cluster.client.cancel(job_id)
        time.sleep(0.02)
    ends = {job_id: cluster.wait_for(job_id).status for job_id in job_ids}
    for job_id in job_ids:
        expected = JobStatus.COMPLETED if answers[job_id] is JobStatus.COMPLETED else JobStatus.CANCELLED
        assert ends[job_id] is expected
        check = cluster.follow(job_id)
        assert check.to_the_end().sha256() == cluster.result(job_id).output_sha256


def test_a_cancel_by_a_client_without_a_database_leaves_nothing_for_long(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    job_id = cluster.enqueue(deltas=1)
    cluster.wait_for(job_id)
    key = job_keys("default", job_id).cancel
    with Client(cluster.valkey.url) as bare, cluster.redis() as client:
        wait_until(lambda: client.pubsub_numsub(control_channel())[0][1], "the worker to listen")
        assert bare.cancel(job_id) is None
        assert client.exists(key)
        wait_until(lambda: client.ttl(key) <= 60, "the worker to shorten the request's time")
    assert cluster.result(job_id).status is JobStatus.COMPLETED
    assert worker.running
