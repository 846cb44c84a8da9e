"""Zombies: workers that are frozen beyond their lease, and wake up when others have their jobs.

In: a sandbox.
Out: a report.

A process that was paused does not know it, and would continue where it stopped; only the database and the log can tell.
"""

from itertools import pairwise
from typing import Final

from keepstream.results import JobStatus
from tests.chaos.report import Report
from tests.chaos.sandbox import Sandbox
from tests.cluster import BRIEF, Cluster

ROUNDS: Final = 3
JOBS: Final = 12


def run(sandbox: Sandbox, _seed: int = 0, _jobs: int = 0, rounds: int = ROUNDS) -> Report:
    """Run the item and check the results."""
    report = Report(f"zombies (SIGSTOP beyond the lease, SIGCONT; {sandbox.database})")
    report.counts |= {"zombies": 0, "jobs taken over": 0, "times a zombie said so": 0}
    with sandbox.cluster("zombie", lease=BRIEF) as cluster:
        for _ in range(rounds):
            _round(report, cluster)
    return report


def _round(report: Report, cluster: Cluster) -> None:
    workers = cluster.start_workers(2)
    job_ids = [cluster.enqueue(deltas=90, rate=15) for _ in range(JOBS)]
    followers = {job_id: cluster.follow(job_id) for job_id in job_ids}
    for following in followers.values():
        following.wait_for("delta", count=5)
    zombie = cluster.worker_of(job_ids[0])
    taken_over = [job_id for job_id in job_ids if cluster.result(job_id).attempts[0].worker == zombie.id]
    cluster.freeze(zombie)
    for job_id in taken_over:
        followers[job_id].wait_for("delta", count=5, attempt=2)
    zombie.thaw()
    zombie.wait_to_say("attempt_superseded", times=len(taken_over))
    report.counts["zombies"] += 1
    report.counts["jobs taken over"] += len(taken_over)
    report.counts["times a zombie said so"] += len(zombie.said("attempt_superseded"))

    for job_id, following in followers.items():
        transcript = following.to_the_end()
        result = cluster.result(job_id)
        outcomes = ["lost", "finished"] if job_id in taken_over else ["finished"]
        report.check(
            "the row is the successor's",
            [f"{job_id}: {result.status} {result.attempts}"]
            if result.status is not JobStatus.COMPLETED or [attempt.outcome for attempt in result.attempts] != outcomes
            else [],
        )
        report.check(
            "followers hold what the row holds",
            [job_id] if transcript.sha256() != result.output_sha256 or result.text != "word " * 90 else [],
        )
        report.check(
            "nothing the zombie said is in the log after its successor's first word",
            [
                f"{job_id}: {after.id} after {before.id}"
                for events in (cluster.log(job_id), following.events)
                for before, after in pairwise(events)
                if after.attempt < before.attempt
            ],
        )
    report.check("the zombie is at work again", [] if zombie.running else [f"it ended with code {zombie.wait()}"])
    fresh = cluster.enqueue(deltas=3)
    report.check("jobs still run", [] if cluster.wait_for(fresh).status is JobStatus.COMPLETED else [fresh])
    for worker in workers:
        worker.kill()
