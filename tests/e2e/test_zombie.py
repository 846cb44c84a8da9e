"""A worker that was frozen beyond its lease wakes up: it changes nothing, and logs it."""

from keepstream.results import JobStatus
from tests.cluster import BRIEF, Cluster, wait_until


def test_worker_frozen_beyond_its_lease_changes_nothing_when_it_wakes(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_workers(2, lease=BRIEF)
    job_ids = [cluster.enqueue(deltas=75, hold=5) for _ in range(6)]
    followers = {job_id: cluster.follow(job_id) for job_id in job_ids}
    for following in followers.values():
        following.wait_for("delta")
    zombie = cluster.worker_of(job_ids[0])
    taken_over = [job_id for job_id in job_ids if cluster.result(job_id).attempts[0].worker == zombie.id]
    cluster.freeze(zombie)
    for job_id in taken_over:
        followers[job_id].wait_for("delta", attempt=2)
    cluster.release(*taken_over, until=20)  # what the provider goes on to send to the zombie, too
    zombie.thaw()

    zombie.wait_to_say("attempt_superseded", times=len(taken_over))
    cluster.release(*job_ids)
    for job_id in taken_over:
        assert zombie.said("attempt_superseded", job_id=job_id)
        transcript = followers[job_id].to_the_end()
        result = cluster.result(job_id)
        assert result.status is JobStatus.COMPLETED
        lost, finished = result.attempts
        assert (lost.worker, lost.outcome, finished.outcome) == (zombie.id, "lost", "finished")
        assert finished.worker != zombie.id
        assert transcript.text == result.text == "word " * 75
        for events in (followers[job_id].events, cluster.log(job_id)):
            assert [event.attempt for event in events] == sorted(event.attempt for event in events)


def test_worker_frozen_within_its_lease_goes_on(cluster: Cluster) -> None:
    cluster.start_workers(2, lease=60)
    job_id = cluster.enqueue(deltas=60, hold=5)
    following = cluster.follow(job_id)
    following.wait_for("delta")
    worker = cluster.worker_of(job_id)
    cluster.freeze(worker)
    cluster.release(job_id, until=40)
    cluster.wait_for_deltas(job_id, 40)
    worker.thaw()
    cluster.release(job_id)
    assert following.to_the_end().text == "word " * 60
    assert len(cluster.result(job_id).attempts) == 1


def test_worker_frozen_while_its_job_is_ended_by_others_says_nothing_after_the_end(cluster: Cluster) -> None:
    zombie = cluster.start_worker(lease=BRIEF)
    job_id = cluster.enqueue(deltas=2000, rate=20)
    following = cluster.follow(job_id)
    following.wait_for("delta", count=5)
    cluster.freeze(zombie)
    cluster.start_worker(lease=BRIEF)
    cluster.client.cancel(job_id)
    following.to_the_end()
    wait_until(
        lambda: [event for event in cluster.log(job_id) if event.type == "job.cancelled"], "the end to be in the log"
    )
    log = cluster.log(job_id)
    before = cluster.result(job_id)
    assert before.status is JobStatus.CANCELLED
    zombie.thaw()
    zombie.wait_to_say("attempt_superseded", job_id=job_id)
    assert cluster.log(job_id) == log
    # It may only add what its own attempt cost.
    after = cluster.result(job_id)
    unchanged = {"attempts": before.attempts, "usage": before.usage}
    assert after.model_copy(update=unchanged) == before
    assert [attempt.model_copy(update={"usage": None}) for attempt in after.attempts] == [
        attempt.model_copy(update={"usage": None}) for attempt in before.attempts
    ]
