"""The overview: what operators look at, of all tenants.

In: a connection inside a transaction.  Out: what runs and what waits, what the last minutes, hours and days brought,
whose jobs there are, which messages were rejected; to the command line and to the gateway's console.

Nothing is written, and nothing is counted without end: of what runs and of what waits so many rows are looked at, of
the latter the oldest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from keepstream.client.waiting import Worker, closed_reason, living_workers
from keepstream.jobs import Chain
from keepstream.results import WaitingFor
from keepstream.tables import (
    FIRST_OUTPUT_CLASSES,
    epoch_seconds,
    jobs,
    minutes,
    now,
    pools,
    rejected_messages,
    running,
    seconds_until,
    turns,
    waiting,
)

COUNTED: Final = 10_000  #: Rows that are looked at of each kind.
TENANTS: Final = 1000  #: That are looked at, by name.
_AT_ONCE: Final = 500  #: Tenants that one statement names.

# -- now ------------------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """Jobs that wait for the same."""

    tenant: str
    queue: str
    job_class: str
    chain: Chain
    jobs: int
    not_due: int  #: Those of them whose next attempt is not due yet.


class Activity(NamedTuple):
    """What goes on."""

    at: datetime  #: By the database's clock.
    workers: Mapping[str, Worker]  #: Those that are alive, by id.
    running: Mapping[tuple[tuple[str, str], str], int]  #: Jobs, by target (provider and model) and tenant.
    waiting: list[Waiting]  #: Of each tenant and pool one.
    more_running: bool  #: Whether more than ``COUNTED`` run.
    more_waiting: bool  #: The same.
    closed: Mapping[str, Any]  #: What the newest turn found closed.
    state: str  #: What it left for the next: JSON.


def look(connection: Connection) -> Activity:
    """Return what goes on."""
    newest = connection.execute(select(turns.c.closed, turns.c.state).order_by(turns.c.n.desc()).limit(1)).one_or_none()
    runs = _running(connection)
    waits = _waiting(connection)
    return Activity(
        at=connection.execute(select(now())).scalar_one(),
        workers=living_workers(connection),
        running=runs,
        waiting=waits,
        more_running=sum(runs.values()) > COUNTED,
        more_waiting=sum(each.jobs for each in waits) > COUNTED,
        closed={} if newest is None else json.loads(newest.closed),
        state="{}" if newest is None else newest.state,
    )


def reason(each: Waiting, activity: Activity) -> WaitingFor:
    """Return what jobs wait for that wait for the same."""
    here = [worker for worker in activity.workers.values() if worker.queue == each.queue]
    if not here:
        return WaitingFor(cause="worker", text=f"a worker: none is alive for the queue '{each.queue}'")
    if each.not_due == each.jobs:
        return WaitingFor(cause="retry", text="the next attempt, which is not due yet")
    closed = closed_reason(activity.closed, each.tenant, each.chain, activity.at)
    if closed is not None:
        return closed
    if all(worker.running >= worker.places for worker in here):
        return WaitingFor(cause="place", text="a free place: all workers are busy")
    return WaitingFor(cause="pickup", text="a worker to take it")


def _running(connection: Connection) -> dict[tuple[tuple[str, str], str], int]:
    some = select(running.c.provider, running.c.model, running.c.tenant).limit(COUNTED + 1).subquery()
    counted = select(some, func.count().label("jobs")).group_by(*some.c)
    return {((row.provider, row.model), row.tenant): row.jobs for row in connection.execute(counted)}


def _waiting(connection: Connection) -> list[Waiting]:
    due = seconds_until(waiting.c.restarted_due) > 0
    some = (
        select(waiting.c.tenant, waiting.c.pool, due.label("not_due"))
        .order_by(waiting.c.seq)
        .limit(COUNTED + 1)
        .subquery()
    )
    counted = (
        select(
            some.c.tenant,
            some.c.pool,
            func.count().label("jobs"),
            func.count().filter(some.c.not_due).label("not_due"),
        )
        .group_by(some.c.tenant, some.c.pool)
        .subquery()
    )
    columns = (counted, pools.c.queue, pools.c["class"].label("job_class"), pools.c.chain)
    rows = connection.execute(select(*columns).join(pools, pools.c.id == counted.c.pool))
    return [
        Waiting(
            row.tenant,
            row.queue,
            row.job_class,
            tuple((provider, model) for provider, model in row.chain),
            row.jobs,
            row.not_due,
        )
        for row in rows
    ]


# -- over time ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sums:
    """What all workers did in some minutes."""

    minute: int  #: The first, since 1970-01-01 00:00 UTC.
    completed: int  #: Attempts that ended well.
    failed: int
    other: int  #: Attempts that ended in another way: cancelled, interrupted, lost.
    deltas: int
    prompt_tokens: int
    completion_tokens: int
    first_outputs: tuple[int, ...]  #: Attempts by the time until their first output: ``FIRST_OUTPUT_CLASSES``.


@dataclass(frozen=True, slots=True)
class Errors:
    """Attempts that failed for the same reason."""

    code: str
    provider: str
    model: str
    attempts: int


@dataclass(frozen=True, slots=True)
class History:
    """What a time brought."""

    at: float  #: Now: seconds since the epoch by the database's clock.
    sums: list[Sums]  #: By time; where nothing was done, there is none.
    errors: list[Errors]  #: Those with most attempts first.


_SUCCESSES: Final = ("finished", "recovered")
_ERRORS: Final = 20  #: That are told apart.


def history(connection: Connection, length: int, step: int) -> History:
    """Return what the last ``length`` minutes brought, in sums of ``step`` minutes, which begin at multiples of it."""
    at = float(connection.execute(select(epoch_seconds(now()))).scalar_one())
    since = minutes.c.minute >= (int(at // 60) - length) // step * step + step
    first = minutes.c.minute - minutes.c.minute % step
    is_success = minutes.c.outcome.in_(_SUCCESSES)
    is_failure = minutes.c.outcome == "failed"
    summed = {
        "completed": func.sum(minutes.c.attempts).filter(is_success),
        "failed": func.sum(minutes.c.attempts).filter(is_failure),
        "attempts": func.sum(minutes.c.attempts),
        **{name: func.sum(minutes.c[name]) for name in ("deltas", "prompt_tokens", "completion_tokens")},
        **{name: func.sum(minutes.c[name]) for name in _FIRST_OUTPUTS},
    }
    by_time = (
        select(first.label("first"), *(value.label(name) for name, value in summed.items()))
        .where(since)
        .group_by(first)
    )
    total = func.sum(minutes.c.attempts)
    by_code = (
        select(minutes.c.error_code, minutes.c.provider, minutes.c.model, total.label("attempts"))
        .where(since, is_failure)
        .group_by(minutes.c.error_code, minutes.c.provider, minutes.c.model)
    )
    errors = [Errors(*row) for row in connection.execute(by_code)]
    return History(
        at,
        sorted((_sums(row) for row in connection.execute(by_time)), key=lambda sums: sums.minute),
        sorted(errors, key=lambda each: -each.attempts)[:_ERRORS],
    )


_FIRST_OUTPUTS: Final = tuple(f"first_output_{number}" for number in range(len(FIRST_OUTPUT_CLASSES) + 1))


def _sums(row: Any) -> Sums:
    completed, failed = int(row.completed or 0), int(row.failed or 0)
    return Sums(
        minute=row.first,
        completed=completed,
        failed=failed,
        other=int(row.attempts) - completed - failed,
        deltas=int(row.deltas),
        prompt_tokens=int(row.prompt_tokens),
        completion_tokens=int(row.completion_tokens),
        first_outputs=tuple(int(getattr(row, name)) for name in _FIRST_OUTPUTS),
    )


# -- messages and tenants -------------------------------------------------------------------------


class RejectedMessage(NamedTuple):
    """A message from the queue that is no valid job."""

    id: str
    rejected_at: datetime
    reason: str
    tenant: str | None  #: If the message named one.
    job_id: str | None  #: If the message named one.
    size: int  #: Bytes; 0 if it was not measured.


def rejected(connection: Connection, limit: int, *, before: datetime | None = None) -> list[RejectedMessage]:
    """Return the messages that were rejected, newest first; with ``before``, those that were rejected earlier."""
    newest = select(rejected_messages).order_by(rejected_messages.c.rejected_at.desc()).limit(limit)
    if before is not None:
        newest = newest.where(rejected_messages.c.rejected_at < before)
    return [
        RejectedMessage(row.id, row.rejected_at, row.reason, row.tenant, row.job_id, row.size)
        for row in connection.execute(newest)
    ]


def tenants(connection: Connection, limit: int = TENANTS) -> list[str]:
    """Return the tenants that have jobs, by name, at most so many.

    Each is found by one look into the index, however many jobs it has.
    """
    known = select(func.min(jobs.c.tenant).label("tenant")).cte("known", recursive=True)
    after = select(func.min(jobs.c.tenant)).where(jobs.c.tenant > known.c.tenant).scalar_subquery()
    known = known.union_all(select(after).where(known.c.tenant.is_not(None)))
    names = connection.scalars(select(known.c.tenant).limit(limit + 1)).all()
    return [name for name in names if name is not None][:limit]


def owners(connection: Connection, job_id: str) -> list[str]:
    """Return the tenants that have a job of this id, of the first ``TENANTS`` by name."""
    among = tenants(connection)
    found: list[str] = []
    for start in range(0, len(among), _AT_ONCE):
        here = jobs.c.tenant.in_(among[start : start + _AT_ONCE]), jobs.c.id == job_id
        found += connection.scalars(select(jobs.c.tenant).where(*here))
    return sorted(found)
