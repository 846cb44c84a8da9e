"""Claims of jobs for tests of what happens with them."""

from keepstream.jobs import Job
from keepstream_worker.store import Claim
from keepstream_worker.values import AttemptReason, JobKey, Target

TARGET = Target("default", "m")


def claim_of(key: JobKey, job: Job | str) -> Claim:
    """Return a claim of a job's first attempt."""
    return Claim(
        key=key,
        attempt=1,
        tries=1,
        max_attempts=None,
        reason=AttemptReason.FIRST,
        remaining_seconds=60.0,
        expired=False,
        cancel_requested=False,
        job=job,
        target=TARGET,
        chain=(TARGET,),
        queue="completions",
        job_class="interactive",
        lane=1,
        pool=1,
        tokens=500,
        prompt_tokens=10,
        max_tokens=None,
        chosen_at=0.0,
    )
