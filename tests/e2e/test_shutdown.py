"""A worker is asked to stop: what can finish does, the rest continues elsewhere at once, and nothing fails."""

from keepstream.names import QUEUE
from keepstream.results import JobStatus
from tests.cluster import PATIENCE, Cluster, wait_until


def test_streams_finish_within_the_grace_period(any_cluster: Cluster) -> None:
    cluster = any_cluster
    worker = cluster.start_worker(shutdown_grace=PATIENCE)
    job_ids = [cluster.enqueue(deltas=40, hold=1) for _ in range(5)]
    for job_id in job_ids:
        cluster.wait_for_deltas(job_id)
    worker.terminate()
    worker.wait_to_say("worker_draining")
    cluster.release(*job_ids)
    assert worker.wait() == 0
    for job_id in job_ids:
        result = cluster.result(job_id)
        assert result.status is JobStatus.COMPLETED
        assert len(result.attempts) == 1
        assert [event.type for event in cluster.log(job_id)][-1] == "job.completed"
    assert worker.said("worker_stopped", interrupted=0, left=0)


def test_ending_worker_takes_no_new_job(cluster: Cluster) -> None:
    ending = cluster.start_worker(shutdown_grace=PATIENCE)
    long = cluster.enqueue(deltas=120, hold=1)
    cluster.wait_for_deltas(long)
    ending.terminate()
    ending.wait_to_say("worker_draining")
    late = [cluster.enqueue(deltas=3) for _ in range(10)]
    fresh = cluster.start_worker()
    for job_id in late:
        assert [attempt.worker for attempt in cluster.wait_for(job_id).attempts] == [fresh.id]
    cluster.release(long)
    assert ending.wait() == 0
    assert [attempt.worker for attempt in cluster.result(long).attempts] == [ending.id]


def test_what_outlasts_the_grace_period_runs_elsewhere_at_once(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_workers(2, shutdown_grace=1, lease=600)  # nobody could wait for that to run out
    job_ids = [cluster.enqueue(deltas=160, hold=5, limits={"max_attempts": 1}) for _ in range(6)]
    followers = {job_id: cluster.follow(job_id) for job_id in job_ids}
    for following in followers.values():
        following.wait_for("delta")
    ending = cluster.worker_of(job_ids[0])
    interrupted = [job_id for job_id in job_ids if cluster.result(job_id).attempts[0].worker == ending.id]
    ending.terminate()
    for job_id in interrupted:
        cluster.wait_for_deltas(job_id, attempt=2)
    assert ending.wait() == 0
    cluster.release(*job_ids)
    for job_id, following in followers.items():
        transcript = following.to_the_end()
        result = cluster.result(job_id)
        # An interruption counts against no limit, or a rolling deploy would fail jobs.
        outcomes = ["interrupted", "finished"] if job_id in interrupted else ["finished"]
        assert [attempt.outcome for attempt in result.attempts] == outcomes
        assert result.status is JobStatus.COMPLETED
        assert transcript.text == result.text == "word " * 160


def test_second_sigterm_hands_everything_back_at_once(cluster: Cluster) -> None:
    cluster.start_workers(2, shutdown_grace=600)
    job_id = cluster.enqueue(deltas=100, hold=5)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    ending = cluster.worker_of(job_id)
    ending.terminate()
    ending.wait_to_say("worker_draining")
    ending.terminate()
    ending.wait()
    cluster.release(job_id)
    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert result.status is JobStatus.COMPLETED
    assert transcript.sha256() == result.output_sha256
    assert [attempt.outcome for attempt in result.attempts] == ["interrupted", "finished"]


def test_waiting_jobs_are_stored_and_left_to_others(cluster: Cluster) -> None:
    ending = cluster.start_worker(concurrency=2, shutdown_grace=1)
    job_ids = [cluster.enqueue(deltas=60, hold=1) for _ in range(6)]
    for job_id in job_ids[:2]:
        cluster.wait_for_deltas(job_id)
    with cluster.redis() as client:
        wait_until(lambda: client.llen(QUEUE) == 0, "all messages to be stored")
    assert [cluster.result(job_id).status for job_id in job_ids].count(JobStatus.QUEUED) == 4
    ending.terminate()
    assert ending.wait() == 0
    cluster.release(*job_ids)
    cluster.start_worker()
    for job_id in job_ids:
        assert cluster.wait_for(job_id).status is JobStatus.COMPLETED


def test_worker_ends_in_time_while_redis_is_away(cluster: Cluster) -> None:
    ending = cluster.start_worker(shutdown_grace=1)
    job_id = cluster.enqueue(deltas=200, hold=5)
    cluster.wait_for_deltas(job_id, 5)
    cluster.valkey.kill()
    ending.terminate()
    ending.wait()
    assert cluster.result(job_id).status is JobStatus.RETRYING
    cluster.release(job_id)
    cluster.valkey.start()
    cluster.start_worker()
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED


def test_job_that_waits_for_its_next_attempt_is_left_to_others(cluster: Cluster) -> None:
    ending = cluster.start_worker()
    fault = {"kind": "status", "status": 429, "headers": {"retry-after": "3"}}
    job_id = cluster.enqueue(deltas=3, faults=[fault])
    cluster.wait_for(job_id, "retrying")
    ending.terminate()
    assert ending.wait() == 0
    cluster.start_worker()
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
