"""Retention: what is old enough to be deleted.

In: an age, from the command line.  Out: fewer rows.
"""

from sqlalchemy import Connection, delete, select, tuple_

from keepstream.results import TERMINAL_STATUSES
from keepstream.tables import jobs, rejected_messages, seconds_from_now


def purge(connection: Connection, older_than_seconds: float, tenant: str | None = None, limit: int = 500) -> int:
    """Delete jobs that ended that long ago and were announced, oldest first; return how many were deleted.

    Rejected messages of that age, which may hold prompts, are deleted too.

    Args:
        connection: Inside a transaction.
        older_than_seconds: Age since a job's end, by the database's clock.
        tenant: Whose jobs; None: everybody's.
        limit: Jobs at most, so that nobody has to wait for the transaction's locks.
    """
    oldest_kept = seconds_from_now(-older_than_seconds)
    rejected = delete(rejected_messages).where(rejected_messages.c.rejected_at < oldest_kept)
    if tenant is not None:
        rejected = rejected.where(rejected_messages.c.tenant == tenant)
    connection.execute(rejected)
    ended = (
        select(jobs.c.tenant, jobs.c.id)
        .where(jobs.c.status.in_(TERMINAL_STATUSES), jobs.c.announced, jobs.c.finished_at < oldest_kept)
        .order_by(jobs.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    if tenant is not None:
        ended = ended.where(jobs.c.tenant == tenant)
    # One statement, because on SQLite a transaction that reads first may find that it cannot write. The foreign
    # keys delete what belongs to the jobs.
    return connection.execute(delete(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(ended))).rowcount
