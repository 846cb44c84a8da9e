"""Inspection: the operator's questions to the database.

In: a connection inside a transaction.  Out: who works, how much waits, what was rejected; to the doctor and the
command line.  Nothing is written.
"""

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from keepstream.results import JobStatus
from keepstream.tables import jobs, rejected_messages, seconds_from_now, seconds_until, workers


class Backlog(NamedTuple):
    """Jobs that have not ended yet, of all tenants."""

    queued: int
    running: int
    retrying: int
    oldest_wait: float | None  #: Seconds for which the oldest due job waits; None: none waits.


class Overview(NamedTuple):
    """What goes on, in all tenants."""

    workers: list[str]  #: Ids of the workers that are alive; an id begins with the name of the worker's host.
    backlog: Backlog
    rejected: int  #: Messages of the last 24 hours that were no valid jobs.


class RejectedMessage(NamedTuple):
    """A message from the queue that is no valid job."""

    id: str
    rejected_at: datetime
    reason: str
    tenant: str | None  #: If the message named one.
    job_id: str | None  #: If the message named one.
    size: int  #: Bytes; 0 if it was not measured.


def overview(connection: Connection, lease: float) -> Overview:
    """Return what goes on; a worker is alive that gave a sign of life within ``lease`` seconds."""
    alive = select(workers.c.id).where(workers.c.heartbeat_at > seconds_from_now(-lease)).order_by(workers.c.id)
    recent = rejected_messages.c.rejected_at > seconds_from_now(-86_400.0)
    return Overview(
        workers=list(connection.scalars(alive)),
        backlog=_backlog(connection),
        rejected=connection.scalar(select(func.count()).select_from(rejected_messages).where(recent)) or 0,
    )


def _backlog(connection: Connection) -> Backlog:
    waiting = (JobStatus.QUEUED, JobStatus.RETRYING)  # spelled as the partial index has it
    counts = {
        row.status: row.jobs
        for row in connection.execute(
            select(jobs.c.status, func.count().label("jobs")).where(jobs.c.status.in_(waiting)).group_by(jobs.c.status)
        )
    }
    running = connection.scalar(select(func.count()).select_from(jobs).where(jobs.c.worker_id.is_not(None))) or 0
    until_due = connection.scalar(select(seconds_until(func.min(jobs.c.due_at))).where(jobs.c.status.in_(waiting)))
    return Backlog(
        queued=counts.get(JobStatus.QUEUED, 0),
        running=running,
        retrying=counts.get(JobStatus.RETRYING, 0),
        oldest_wait=None if until_due is None else max(0.0, -until_due),
    )


def rejected(connection: Connection, limit: int) -> list[RejectedMessage]:
    """Return the messages that were rejected, newest first."""
    newest = select(rejected_messages).order_by(rejected_messages.c.rejected_at.desc()).limit(limit)
    return [
        RejectedMessage(row.id, row.rejected_at, row.reason, row.tenant, row.job_id, row.size)
        for row in connection.execute(newest)
    ]
