"""Waiting: jobs that were started before go back to where a turn finds them.

In: jobs whose attempt has ended, from ``endings``; jobs that their worker does not run, from the heartbeat and the
sweep.  Out: their rows among those that wait, due at their moment, and notes of their arrival; or, where a cancel came
or too many workers died of them, their end.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Float, bindparam, delete, exists, func, select, update

from keepstream.client.endings import CANCELLED_MESSAGE, WORKERS_LOST_MESSAGE, end_unclaimed
from keepstream.errors import ErrorCode
from keepstream.results import JobStatus, UsageSource
from keepstream.tables import arrivals, attempts, jobs, now, running, seconds_from_now, waiting
from keepstream_worker.store.conditions import among, each, is_named, name
from keepstream_worker.store.pools import find_pools
from keepstream_worker.values import AttemptReason, JobKey, Outcome, Target

#: Claims beyond a job's max_attempts, each of which may still recover a finished stream from the log.
_SPARE_CLAIMS: Final = 3


class OwnedJob(NamedTuple):
    """A job as one worker owns it."""

    key: JobKey
    attempt: int
    worker_id: str


class Released(NamedTuple):
    """A job that its worker does not run any more, and what it was given."""

    key: JobKey
    lane: int
    pool: int
    job_class: str
    target: Target
    tokens: int  #: Charged for the attempt.
    chosen_at: float  #: Seconds since the epoch, by the database's clock.
    begun: bool  #: Whether the attempt had begun.


class Restart(NamedTuple):
    """A job that is to go on later."""

    key: JobKey
    attempt: int  #: The newest so far.
    lane: int
    pool: int
    prompt_tokens: int
    max_tokens: int | None
    due_in: float = 0.0  #: Seconds.


_WAIT: Final = waiting.insert().values(
    restarted_due=seconds_from_now(bindparam("due_in", type_=Float)),
    # Whatever it waits for, a job that has started ends with its total time, and one that has not when it expires.
    expires_at=select(func.coalesce(jobs.c.deadline_at, jobs.c.expires_at)).where(is_named(jobs)).scalar_subquery(),
)
_ARRIVAL_COLUMNS: Final = ("seq", "lane", "pool", "tenant", "restarted_due")
_ARRIVE: Final = arrivals.insert().from_select(
    _ARRIVAL_COLUMNS, select(*(waiting.c[column] for column in _ARRIVAL_COLUMNS)).where(is_named(waiting))
)


def restart(connection: Connection, restarts: Sequence[Restart]) -> None:
    """Let jobs wait that do not run any more, and whose rows the caller's transaction has locked."""
    if not restarts:
        return
    connection.execute(
        _WAIT,
        [
            {
                "tenant": job.key.tenant,
                "job_id": job.key.id,
                "lane": job.lane,
                "pool": job.pool,
                "attempt": job.attempt,
                "prompt_tokens": job.prompt_tokens,
                "max_tokens": job.max_tokens,
                "due_in": job.due_in,
            }
            | name(job.key)
            for job in restarts
        ],
    )
    note_arrivals(connection, [job.key for job in restarts])


def note_arrivals(connection: Connection, keys: Iterable[JobKey]) -> None:
    """Note the arrivals of jobs that have come to wait in this transaction."""
    connection.execute(_ARRIVE, [name(key) for key in keys])


_LOCK: Final = {
    dialect: select(
        jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.tries, jobs.c.max_attempts, jobs.c.cancel_requested_at
    )
    .where(named)
    .order_by(jobs.c.tenant, jobs.c.id)
    .with_for_update(key_share=True)
    for dialect, named in among(jobs).items()
}
#: Not to be found by its worker, as in ``endings``.
_GIVE_UP: Final = (
    delete(running)
    .where(
        is_named(running),
        running.c.attempt == bindparam("of_attempt"),
        running.c.worker_id.concat("") == bindparam("of_worker"),
    )
    .returning(running)
)


def release(connection: Connection, owned_jobs: list[OwnedJob]) -> list[Released | None]:
    """Give up jobs that their own worker does not run, so that any worker may go on with them; None: it does.

    One whose cancel came meanwhile ends.
    """
    ordered = sorted(set(owned_jobs))
    rows = {JobKey(row.tenant, row.id): row for row in each(connection, _LOCK, [owned.key for owned in ordered])}
    found = {owned: take_away(connection, rows[owned.key], owned) for owned in ordered if owned.key in rows}
    drop_running(connection, {owned.key for owned in ordered} - rows.keys())
    return [found.get(owned) for owned in owned_jobs]


def take_away(connection: Connection, row: Any, owned: OwnedJob, max_attempts: int | None = None) -> Released | None:
    """Take a job from a worker that does not run it: it waits again, or ends; None: it runs, or has ended.

    Args:
        connection: In a transaction.
        row: The job's, which the transaction has locked, with the columns of ``_LOCK``.
        owned: As the worker has it.
        max_attempts: For a job that does not say; None: it does not end for the number of its attempts.
    """
    place = give_up(connection, owned)
    if place is None:
        return None
    begun = row.attempt == place.attempt
    pool = find_pools(connection, {place.pool}).get(place.pool)
    released = Released(
        owned.key,
        place.lane,
        place.pool,
        "" if pool is None else pool.job_class,
        Target(place.provider, place.model),
        place.tokens,
        place.started_at.timestamp(),
        begun,
    )
    if row.cancel_requested_at is not None:
        status, code, message = JobStatus.CANCELLED, ErrorCode.CANCELLED, CANCELLED_MESSAGE
    elif begun and max_attempts is not None and row.tries > (row.max_attempts or max_attempts) + _SPARE_CLAIMS:
        status, code, message = JobStatus.FAILED, ErrorCode.WORKER_LOST, WORKERS_LOST_MESSAGE
    else:
        _put_back(connection, place, begun=begun)
        return released
    if begun:
        _mark_lost(connection, owned.key, place.attempt)
    end_unclaimed(connection, *owned.key, row.attempt, status, code, message)
    return released


def give_up(connection: Connection, owned: OwnedJob) -> Any | None:
    """Take a job from those that run, if it is still run as said; return its row there."""
    values = name(owned.key) | {"of_attempt": owned.attempt, "of_worker": owned.worker_id}
    return connection.execute(_GIVE_UP, values).one_or_none()


_NO_JOB: Final = {
    table: ~exists().where(jobs.c.tenant == table.c.tenant, jobs.c.id == table.c.job_id) for table in (waiting, running)
}
_DROP_WAITING: Final = delete(waiting).where(is_named(waiting), _NO_JOB[waiting])
_DROP_RUNNING: Final = delete(running).where(is_named(running), _NO_JOB[running])


def drop_waiting(connection: Connection, keys: Collection[JobKey]) -> None:
    """Take those of the jobs from the ones that wait which somebody has deleted by hand."""
    if keys:
        connection.execute(_DROP_WAITING, [name(key) for key in sorted(keys)])


def drop_running(connection: Connection, keys: Collection[JobKey]) -> None:
    """Take them from the ones that run: else they would keep their places for ever, and be looked at first."""
    if keys:
        connection.execute(_DROP_RUNNING, [name(key) for key in sorted(keys)])


_MARK_LOST: Final = (
    update(attempts)
    .where(is_named(attempts), attempts.c.number == bindparam("of_number"))
    .values(
        outcome=Outcome.LOST,
        finished_at=now(),
        error_code=ErrorCode.WORKER_LOST,
        error_message="the worker died",
        retryable=True,
        usage_source=UsageSource.UNKNOWN,
    )
)
_RELEASE: Final = (
    update(jobs).where(is_named(jobs)).values(status=JobStatus.RETRYING, next_reason=AttemptReason.WORKER_LOST)
)


def _mark_lost(connection: Connection, key: JobKey, attempt: int) -> None:
    """Note that an attempt's worker died."""
    connection.execute(_MARK_LOST, name(key) | {"of_number": attempt})


def _put_back(connection: Connection, row: Any, *, begun: bool) -> None:
    """Let a job go on at once whose worker does not run it any more; ``row`` is the one it had among those that run.

    An attempt that had not begun leaves no trace: its number is given again.
    """
    key = JobKey(row.tenant, row.job_id)
    if begun:
        _mark_lost(connection, key, row.attempt)
        connection.execute(_RELEASE, name(key))
    attempt = row.attempt if begun else row.attempt - 1
    restart(connection, [Restart(key, attempt, row.lane, row.pool, row.prompt_tokens, row.max_tokens)])
