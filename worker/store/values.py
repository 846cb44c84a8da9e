"""What the store's statements have in common: a job's key, why attempts are made, how they end.

In: nothing.  Out: values and conditions, to the other modules of the store and to the engine.  Exists so
that the statements share one vocabulary.
"""

from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, update

from api_contracts.errors import ErrorCode
from api_contracts.results import JobStatus, UsageSource
from api_contracts.tables import attempts, jobs, now

WAITING: Final = (JobStatus.QUEUED, JobStatus.RETRYING)

#: What becomes of a job whose worker does not run it any more.
RELEASED: Final[dict[str, Any]] = {
    "status": JobStatus.RETRYING,
    "worker_id": None,
    "next_reason": "worker_lost",
    "due_at": now(),
    "resend_at": now(),
    "sends": 0,
}


class JobKey(NamedTuple):
    """What identifies a job."""

    tenant: str
    id: str


class Reason(StrEnum):
    """Why an attempt is made."""

    FIRST = "first"
    RETRY = "retry"  #: The attempt before failed.
    WORKER_LOST = "worker_lost"  #: The worker of the attempt before died.
    INTERRUPTED = "interrupted"  #: The worker of the attempt before was shut down.


class Outcome(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    RECOVERED = "recovered"  #: Made no stream: carried over what the attempt before had finished.
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    UNSTARTED = "unstarted"  #: There was no time or no try left; such an attempt leaves no row.


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


def is_job(key: JobKey) -> Any:
    """Select a job's row."""
    return and_(jobs.c.tenant == key.tenant, jobs.c.id == key.id)


def of_job(table: Any, key: JobKey) -> Any:
    """Select a table's rows of a job."""
    return and_(table.c.tenant == key.tenant, table.c.job_id == key.id)
