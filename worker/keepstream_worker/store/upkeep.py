"""Upkeep: signs of life, and jobs that nobody takes care of.

In: a worker's heartbeats and sweeps, from the sweeper.  Out: what it holds, what is to be sent or announced.
Exists so that whatever one process leaves undone another one finds; the statements are atomic, so several
sweepers at once do no harm.
"""

import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, func, select, tuple_, update

from keepstream.client.queries import end_from_outside
from keepstream.errors import ErrorCode
from keepstream.results import JobStatus
from keepstream.tables import jobs, now, seconds_from_now, workers
from keepstream_worker.store.values import RELEASED, WAITING, is_job, mark_lost
from keepstream_worker.values import JobKey

#: Claims beyond a job's max_attempts, each of which may still recover a finished stream from the log.
_SPARE_CLAIMS: Final = 3
#: Seconds for which a worker that is gone stays in the table, for `keepstream doctor` and for people.
_REMEMBERED: Final = 172_800.0


class Heartbeat(NamedTuple):
    """A sign of life."""

    worker_id: str
    lease: float


class HeartbeatResult(NamedTuple):
    """What a worker learns when it gives a sign of life."""

    lapsed: bool  #: It was silent for longer than its lease: others may have taken its jobs.
    owned: frozenset[tuple[JobKey, int]]  #: The jobs it holds, with their attempt.
    cancels: frozenset[JobKey]  #: Those of them that are to be cancelled.


def record_heartbeat(connection: Connection, heartbeats: list[Heartbeat]) -> list[HeartbeatResult]:
    """Renew each worker's row, or create it."""
    return [_heartbeat(connection, one) for one in heartbeats]


def _heartbeat(connection: Connection, one: Heartbeat) -> HeartbeatResult:
    alive = connection.execute(
        update(workers)
        .where(workers.c.id == one.worker_id, workers.c.heartbeat_at > seconds_from_now(-one.lease))
        .values(heartbeat_at=now())
    ).rowcount
    if not alive:
        renewed = connection.execute(
            update(workers).where(workers.c.id == one.worker_id).values(heartbeat_at=now())
        ).rowcount
        if not renewed:
            connection.execute(workers.insert().values(id=one.worker_id, started_at=now(), heartbeat_at=now()))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested_at.is_not(None)).where(
            jobs.c.worker_id == one.worker_id
        )
    ).all()
    return HeartbeatResult(
        lapsed=not alive,
        # Unpacked: with a row's names it takes half as long again, and a worker may hold thousands.
        owned=frozenset((JobKey(tenant, job_id), attempt) for tenant, job_id, attempt, _ in rows),
        cancels=frozenset(JobKey(tenant, job_id) for tenant, job_id, _, is_requested in rows if is_requested),
    )


def retire(connection: Connection, worker_ids: list[str]) -> list[None]:
    """Mark workers as gone at once, so that nobody waits for their lease."""
    connection.execute(
        update(workers).where(workers.c.id.in_(worker_ids)).values(heartbeat_at=seconds_from_now(-86_400.0))
    )
    return [None] * len(worker_ids)


# -- sweeping -------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What a sweeper asks for."""

    lease: float
    reap: bool  #: Whether the silence of other workers counts as death.
    asked_at: float  #: ``time.monotonic()`` of the question.
    resend_after: float
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
    """Find what nobody takes care of. Several sweepers at once do no harm: each row goes to one."""
    return [
        SweepResult(
            lost=_release_lost(connection, one) if one.reap else [],
            to_send=_take_due(connection, one),
            unannounced=_find_unannounced(connection, one) + _end_expired(connection, one),
        )
        for one in sweeps
    ]


def _release_lost(connection: Connection, one: Sweep) -> list[JobKey]:
    dead = select(workers.c.id).where(workers.c.heartbeat_at < seconds_from_now(-one.lease))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.tries, jobs.c.max_attempts, jobs.c.cancel_requested_at)
        .where(jobs.c.worker_id.in_(dead), jobs.c.status == JobStatus.RUNNING)
        .limit(one.limit)
        .with_for_update(skip_locked=True)
    ).all()
    if time.monotonic() - one.asked_at > one.lease / 2:
        return []  # the database has let us wait, so it has let the others wait as well: their silence proves nothing
    lost = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        mark_lost(connection, key, row.attempt)
        if row.cancel_requested_at is not None:
            end_from_outside(connection, *key, row.attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, "cancelled")
        elif row.tries > (row.max_attempts or one.max_attempts) + _SPARE_CLAIMS:
            message = "its workers died, each time"
            end_from_outside(connection, *key, row.attempt, JobStatus.FAILED, ErrorCode.WORKER_LOST, message)
        else:
            connection.execute(update(jobs).where(is_job(key), jobs.c.attempt == row.attempt).values(RELEASED))
        lost.append(key)
    _forget_workers(connection)
    return lost


class OwnedJob(NamedTuple):
    """A job as one worker holds it."""

    key: JobKey
    attempt: int
    worker_id: str


def release(connection: Connection, held: list[OwnedJob]) -> list[None]:
    """Let go of jobs that their own worker does not run, so that they are sent again."""
    for one in held:
        released = connection.execute(
            update(jobs)
            .where(is_job(one.key), jobs.c.attempt == one.attempt, jobs.c.worker_id == one.worker_id)
            .values(RELEASED)
        ).rowcount
        if released:
            mark_lost(connection, one.key, one.attempt)
    return [None] * len(held)


def requeue(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Leave the next attempt of waiting jobs to any worker, as soon as it is due."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=jobs.c.due_at)
    )
    return [None] * len(keys)


def schedule_resend(connection: Connection, keys: list[JobKey]) -> list[None]:
    """The broker was away: let the next sweeps try again."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=seconds_from_now(2.0), sends=0)
    )
    return [None] * len(keys)


def _forget_workers(connection: Connection) -> None:
    """Delete workers that have been gone for two days and hold nothing."""
    holding = select(jobs.c.worker_id).where(jobs.c.worker_id.is_not(None))
    connection.execute(
        delete(workers).where(workers.c.heartbeat_at < seconds_from_now(-_REMEMBERED), workers.c.id.not_in(holding))
    )


def _take_due(connection: Connection, one: Sweep) -> list[str]:
    """Take the jobs whose message is to be sent: those that have none, and those whose message must be lost."""
    if one.queue_length is None:
        return []
    waiting = and_(jobs.c.status.in_(WAITING), jobs.c.queue == one.queue)
    overdue = and_(waiting, jobs.c.resend_at <= now())
    to_send = _note_sent(connection, and_(overdue, jobs.c.sends == 0), one.resend_after, one.limit)
    if connection.scalar(select(jobs.c.id).where(overdue, jobs.c.sends > 0).limit(1)) is None:
        return to_send
    # These have a message, or had one. In a backlog all are still in the queue, and sending them again would
    # fill it without end; a message is missing only if more jobs are due than messages wait.
    due = connection.scalar(select(func.count()).select_from(jobs).where(waiting, jobs.c.due_at <= now()))
    missing = (due or 0) - one.queue_length - len(to_send)
    if missing > 0:
        to_send += _note_sent(connection, and_(overdue, jobs.c.sends > 0), one.resend_after, min(missing, one.limit))
    else:
        connection.execute(
            update(jobs).where(overdue, jobs.c.sends > 0).values(resend_at=seconds_from_now(one.resend_after))
        )
    return to_send


def _note_sent(connection: Connection, condition: Any, resend_after: float, limit: int) -> list[str]:
    """Note a message for each of the jobs, oldest first; return the jobs."""
    chosen = (
        select(jobs.c.tenant, jobs.c.id)
        .where(condition)
        .order_by(jobs.c.resend_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return list(
        connection.scalars(
            update(jobs)
            .where(tuple_(jobs.c.tenant, jobs.c.id).in_(chosen), condition)
            .values(sends=jobs.c.sends + 1, resend_at=seconds_from_now(resend_after))
            .returning(jobs.c.job)
        )
    )


def _end_expired(connection: Connection, one: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt)
        .where(jobs.c.status.in_(WAITING), jobs.c.expires_at <= now(), jobs.c.attempt == 0)
        .limit(one.limit)
        .with_for_update(skip_locked=True)
    ).all()
    ended = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        message = "the job waited past its expires_at"
        if end_from_outside(connection, *key, row.attempt, JobStatus.EXPIRED, ErrorCode.EXPIRED, message):
            ended.append(key)
    return ended


def _find_unannounced(connection: Connection, one: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id)
        .where(
            jobs.c.announced.is_(False),
            # The worker that ended it gets the time to announce it itself.
            jobs.c.finished_at <= seconds_from_now(-2.0),
        )
        .order_by(jobs.c.finished_at)
        .limit(one.limit)
    )
    return [JobKey(row.tenant, row.id) for row in rows]


_MARK_ANNOUNCED: Final = (
    update(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(bindparam("keys", expanding=True))).values(announced=True)
)


def mark_announced(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Note that the terminal events of these jobs are in the log."""
    connection.execute(_MARK_ANNOUNCED, {"keys": sorted(set(keys))})
    return [None] * len(keys)
