"""What the store's statements have in common: a job's key, why attempts are made, how they end.

In: nothing.  Out: values and conditions, to the other modules of the store and to the engine.  Exists so
that the statements share one vocabulary.
"""

from typing import Any, Final

from sqlalchemy import Connection, and_, update

from keepstream.errors import ErrorCode
from keepstream.results import JobStatus, UsageSource
from keepstream.tables import attempts, jobs, now
from keepstream_worker.values import JobKey, Outcome

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
