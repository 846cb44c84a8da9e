"""Retention: what is old enough to be deleted.

In: an age, from the command line.  Out: fewer rows; how many were deleted, or would be.
"""

from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, select, tuple_

from keepstream.results import TERMINAL_STATUSES
from keepstream.tables import jobs, rejected_messages, seconds_from_now


class PurgeCounts(NamedTuple):
    """How much a purge deleted, or would delete."""

    jobs: int
    rejected_messages: int


def purgeable(connection: Connection, older_than_seconds: float, tenant: str | None = None) -> PurgeCounts:
    """Return how much ``purge`` with the same arguments would delete, if it were repeated to the end."""
    ended = select(func.count()).select_from(jobs).where(*_ended_before(older_than_seconds, tenant))
    rejected = select(func.count()).select_from(rejected_messages).where(*_rejected_before(older_than_seconds, tenant))
    return PurgeCounts(connection.execute(ended).scalar_one(), connection.execute(rejected).scalar_one())


def purge(
    connection: Connection, older_than_seconds: float, tenant: str | None = None, limit: int = 500
) -> PurgeCounts:
    """Delete jobs that ended that long ago and were announced, oldest first; return how much was deleted.

    Rejected messages of that age, which may hold prompts, are deleted too.  Nothing is left to delete once both counts
    are 0.

    Args:
        connection: Inside a transaction.
        older_than_seconds: Age since a job's end, or since the rejection, by the database's clock.
        tenant: Whose jobs and messages; None: everybody's.
        limit: Jobs at most, and messages at most, so that nobody has to wait for the transaction's locks.
    """
    # One statement each, because on SQLite a transaction that reads first may find that it cannot write.  CTEs, because
    # PostgreSQL may run a sub-select once for each row it is compared with, each time with a new limit.
    rejected = (
        select(rejected_messages.c.id)
        .where(*_rejected_before(older_than_seconds, tenant))
        .order_by(rejected_messages.c.rejected_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("rejected")
    )
    delete_rejected = delete(rejected_messages).where(rejected_messages.c.id.in_(select(rejected.c.id)))
    deleted_messages = connection.execute(delete_rejected.returning(rejected_messages.c.id)).all()
    ended = (
        select(jobs.c.tenant, jobs.c.id)
        .where(*_ended_before(older_than_seconds, tenant))
        .order_by(jobs.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("ended")
    )
    # The foreign keys delete what belongs to the jobs.
    delete_ended = delete(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(select(ended.c.tenant, ended.c.id)))
    deleted_jobs = connection.execute(delete_ended.returning(jobs.c.id)).all()
    # Not the cursors' counts: SQLite's driver has none for a statement that begins with WITH.
    return PurgeCounts(len(deleted_jobs), len(deleted_messages))


def _ended_before(seconds: float, tenant: str | None) -> list[ColumnElement[bool]]:
    conditions = [
        jobs.c.status.in_(TERMINAL_STATUSES),
        jobs.c.announced.is_(True),
        jobs.c.finished_at < seconds_from_now(-seconds),
    ]
    return conditions if tenant is None else [*conditions, jobs.c.tenant == tenant]


def _rejected_before(seconds: float, tenant: str | None) -> list[ColumnElement[bool]]:
    conditions = [rejected_messages.c.rejected_at < seconds_from_now(-seconds)]
    return conditions if tenant is None else [*conditions, rejected_messages.c.tenant == tenant]
