"""Waiting: jobs go back to where any worker may claim them, and their messages are to be sent.

In: jobs that their worker does not run, or whose message could not be sent, from the engine, the heartbeat
and the sweeper.  Out: their rows, due for a claim and for a sweep.
"""

from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, tuple_, update

from keepstream.errors import ErrorCode
from keepstream.results import JobStatus, UsageSource
from keepstream.tables import attempts, jobs, now, seconds_from_now
from keepstream_worker.store.conditions import WAITING, is_job, of_job
from keepstream_worker.values import AttemptReason, JobKey, Outcome

#: What becomes of a job whose worker does not run it any more.
RELEASED: Final[dict[str, Any]] = {
    "status": JobStatus.RETRYING,
    "worker_id": None,
    "next_reason": AttemptReason.WORKER_LOST,
    "due_at": now(),
    "resend_at": now(),
    "sends": 0,
}


class OwnedJob(NamedTuple):
    """A job as one worker owns it."""

    key: JobKey
    attempt: int
    worker_id: str


def release(connection: Connection, owned_jobs: list[OwnedJob]) -> list[None]:
    """Give up jobs that their own worker does not run, so that they are sent again."""
    for owned in owned_jobs:
        released = connection.execute(
            update(jobs)
            .where(is_job(owned.key), jobs.c.attempt == owned.attempt, jobs.c.worker_id == owned.worker_id)
            .values(RELEASED)
        ).rowcount
        if released:
            mark_lost(connection, owned.key, owned.attempt)
    return [None] * len(owned_jobs)


def mark_lost(connection: Connection, key: JobKey, attempt: int) -> None:
    """Note that an attempt's worker died."""
    connection.execute(
        update(attempts)
        .where(of_job(attempts, key), attempts.c.number == attempt)
        .values(
            outcome=Outcome.LOST,
            finished_at=now(),
            error_code=ErrorCode.WORKER_LOST,
            error_message="the worker died",
            retryable=True,
            usage_source=UsageSource.UNKNOWN,
        )
    )


def requeue(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Leave the next attempt of waiting jobs to any worker, as soon as it is due."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=jobs.c.due_at)
    )
    return [None] * len(keys)


def schedule_resend(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Let the next sweeps send the messages of waiting jobs, because the broker was away."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=seconds_from_now(2.0), sends=0)
    )
    return [None] * len(keys)
