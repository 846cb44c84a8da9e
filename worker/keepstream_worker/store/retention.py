"""Retention: what is old enough to be deleted.

In: an age, from the command line.  Out: fewer rows, or how many there would be.
"""

from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, select, tuple_

from keepstream.results import TERMINAL_STATUSES
from keepstream.tables import jobs, rejected_messages, seconds_from_now


class Purgeable(NamedTuple):
    """How much a purge would delete."""

    jobs: int
    rejected_messages: int


def purgeable(connection: Connection, older_than_seconds: float, tenant: str | None = None) -> Purgeable:
    """Return how much ``purge`` with the same arguments would delete, if it were repeated to the end."""
    ended = select(func.count()).select_from(jobs).where(*_ended_before(older_than_seconds, tenant))
    rejected = select(func.count()).select_from(rejected_messages).where(*_rejected_before(older_than_seconds, tenant))
    return Purgeable(connection.execute(ended).scalar_one(), connection.execute(rejected).scalar_one())


def purge(connection: Connection, older_than_seconds: float, tenant: str | None = None, limit: int = 500) -> int:
    """Delete jobs that ended that long ago and were announced, oldest first; return how many were deleted.

    Rejected messages of that age, which may hold prompts, are deleted too.

    Args:
        connection: Inside a transaction.
        older_than_seconds: Age since a job's end, by the database's clock.
        tenant: Whose jobs; None: everybody's.
        limit: Jobs at most, so that nobody has to wait for the transaction's locks.
    """
    connection.execute(delete(rejected_messages).where(*_rejected_before(older_than_seconds, tenant)))
    ended = (
        select(jobs.c.tenant, jobs.c.id)
        .where(*_ended_before(older_than_seconds, tenant))
        .order_by(jobs.c.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    # One statement, because on SQLite a transaction that reads first may find that it cannot write. The foreign
    # keys delete what belongs to the jobs.
    return connection.execute(delete(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(ended))).rowcount


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
