"""Sweeps: jobs that nobody takes care of.

In: what a sweeper asks for, from ``keepstream_worker.upkeep``.  Out: jobs of dead workers, released or ended; messages
to be sent; ends to be announced.

Whatever one process leaves undone another one finds.  The statements are atomic, so several sweepers at once do no
harm: each row goes to one.
"""

import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, bindparam, func, select, tuple_, update

from keepstream.client.endings import CANCELLED_MESSAGE, EXPIRED_MESSAGE, WORKERS_LOST_MESSAGE, end_unclaimed
from keepstream.errors import ErrorCode
from keepstream.results import JobStatus
from keepstream.tables import jobs, now, seconds_from_now, workers
from keepstream_worker.store.conditions import WAITING, is_job
from keepstream_worker.store.heartbeats import forget_workers
from keepstream_worker.store.waiting import RELEASED, mark_lost
from keepstream_worker.values import JobKey

#: Claims beyond a job's max_attempts, each of which may still recover a finished stream from the log.
_SPARE_CLAIMS: Final = 3


class Sweep(NamedTuple):
    """What a sweeper asks for."""

    lease: float  #: Seconds of silence after which a worker is taken for dead.
    reap: bool  #: Whether the silence of other workers counts as death.
    asked_at: float  #: ``time.monotonic()`` of the question.
    resend_after: float  #: Seconds until a message that was sent counts as overdue.
    queue: str  #: The only one that this worker sends to.
    queue_length: int | None  #: Messages that wait on the queue; None: the broker is away, so nothing can be sent.
    max_attempts: int  #: For jobs that do not say.
    limit: int  #: Rows of each kind at most.


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep found, and has already changed in the rows."""

    lost: list[JobKey]  #: Their worker died; they are waiting again, or ended.
    to_send: list[str]  #: Jobs (JSON) whose message is to be sent.
    unannounced: list[JobKey]  #: Ended, but their terminal event may be missing.


def sweep(connection: Connection, sweeps: list[Sweep]) -> list[SweepResult]:
    """Find what nobody takes care of, take it over, and return it."""
    return [
        SweepResult(
            lost=_release_lost(connection, request) if request.reap else [],
            to_send=_take_due(connection, request),
            unannounced=_find_unannounced(connection, request) + _end_expired(connection, request),
        )
        for request in sweeps
    ]


def _release_lost(connection: Connection, request: Sweep) -> list[JobKey]:
    dead = select(workers.c.id).where(workers.c.heartbeat_at < seconds_from_now(-request.lease))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.tries, jobs.c.max_attempts, jobs.c.cancel_requested_at)
        .where(jobs.c.worker_id.in_(dead), jobs.c.status == JobStatus.RUNNING)
        .limit(request.limit)
        .with_for_update(skip_locked=True)
    ).all()
    if time.monotonic() - request.asked_at > request.lease / 2:
        return []  # the database kept us waiting, so it kept the others waiting too: their silence proves nothing
    lost = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        mark_lost(connection, key, row.attempt)
        if row.cancel_requested_at is not None:
            end_unclaimed(connection, *key, row.attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, CANCELLED_MESSAGE)
        elif row.tries > (row.max_attempts or request.max_attempts) + _SPARE_CLAIMS:
            end_unclaimed(connection, *key, row.attempt, JobStatus.FAILED, ErrorCode.WORKER_LOST, WORKERS_LOST_MESSAGE)
        else:
            connection.execute(update(jobs).where(is_job(key), jobs.c.attempt == row.attempt).values(RELEASED))
        lost.append(key)
    forget_workers(connection)
    return lost


def _take_due(connection: Connection, request: Sweep) -> list[str]:
    """Take the jobs whose message is to be sent: those that have none, and those whose message must be lost."""
    if request.queue_length is None:
        return []
    waiting = and_(jobs.c.status.in_(WAITING), jobs.c.queue == request.queue)
    overdue = and_(waiting, jobs.c.resend_at <= now())
    unsent, sent = and_(overdue, jobs.c.sends == 0), and_(overdue, jobs.c.sends > 0)
    to_send = _note_sent(connection, unsent, request.resend_after, request.limit)
    if connection.scalar(select(jobs.c.id).where(sent).limit(1)) is None:
        return to_send
    # These have a message, or had one. In a backlog all are still in the queue, and sending them again would
    # fill it without end; a message is missing only if more jobs are due than messages wait.
    due = connection.scalar(select(func.count()).select_from(jobs).where(waiting, jobs.c.due_at <= now()))
    missing = (due or 0) - request.queue_length - len(to_send)
    if missing > 0:
        to_send += _note_sent(connection, sent, request.resend_after, min(missing, request.limit))
    else:
        connection.execute(update(jobs).where(sent).values(resend_at=seconds_from_now(request.resend_after)))
    return to_send


def _note_sent(connection: Connection, condition: Any, resend_after: float, limit: int) -> list[str]:
    """Count a message for each job that meets the condition, oldest first; return the jobs."""
    # A CTE, because PostgreSQL may run a sub-select once for each row it is compared with, each time with a new limit.
    chosen = (
        select(jobs.c.tenant, jobs.c.id)
        .where(condition)
        .order_by(jobs.c.resend_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("chosen")
    )
    return list(
        connection.scalars(
            update(jobs)
            .where(tuple_(jobs.c.tenant, jobs.c.id).in_(select(chosen.c.tenant, chosen.c.id)), condition)
            .values(sends=jobs.c.sends + 1, resend_at=seconds_from_now(resend_after))
            .returning(jobs.c.job)
        )
    )


def _end_expired(connection: Connection, request: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt)
        .where(jobs.c.status.in_(WAITING), jobs.c.expires_at <= now(), jobs.c.attempt == 0)
        .limit(request.limit)
        .with_for_update(skip_locked=True)
    ).all()
    ended = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        end_unclaimed(connection, *key, row.attempt, JobStatus.EXPIRED, ErrorCode.EXPIRED, EXPIRED_MESSAGE)
        ended.append(key)
    return ended


def _find_unannounced(connection: Connection, request: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id)
        .where(
            jobs.c.announced.is_(False),
            # The worker that ended it gets the time to announce it itself.
            jobs.c.finished_at <= seconds_from_now(-2.0),
        )
        .order_by(jobs.c.finished_at)
        .limit(request.limit)
    )
    return [JobKey(row.tenant, row.id) for row in rows]


_MARK_ANNOUNCED: Final = (
    update(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(bindparam("keys", expanding=True))).values(announced=True)
)


def mark_announced(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Note that the terminal events of these jobs are in the log."""
    connection.execute(_MARK_ANNOUNCED, {"keys": sorted(set(keys))})
    return [None] * len(keys)
