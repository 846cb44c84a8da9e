"""The overview: what operators look at, of all tenants.

In: a connection inside a transaction.  Out: what runs and what waits, what the last minutes, hours and days brought,
whose jobs there are, which messages were rejected; to the command line and to the gateway's console.

Nothing is written, and nothing is counted without end: of what runs and of what waits so many rows are looked at, of
the latter the oldest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, false, func, select, tuple_

from keepstream.client.waiting import ABANDONED, SOON, Worker, living_workers, reason_in_pool
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
    reports,
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
    is_due: bool = True  #: False: their next attempts are not due yet.


LIMITS: Final = "limits"  #: The name of the report of limits.


class Used(NamedTuple):
    """What is used of a limit."""

    used: int
    allowed: int | None  #: At once; None: nothing limits it.
    per_minute: float | None = None  #: At this rate it comes back; None: when a job ends.
    learned: bool = False  #: Whether the limit was learned, rather than configured.


class Limit(NamedTuple):
    """What is used of the limits of a target, or of a provider as a whole."""

    name: str  #: ``PROVIDER/MODEL`` or ``PROVIDER``.
    streams: Used
    requests: Used | None  #: None: there is no limit.
    tokens: Used | None  #: The same; more used than allowed: a debt.


class Limits(NamedTuple):
    """The limits, as a worker told them last: workers have the configuration, and one of them tells it for all."""

    told_at: datetime
    limits: list[Limit]
    tenants: Mapping[str, int | None]  #: Jobs that one may run at once; who is not named, as many as the others.
    other_tenants: int | None  #: None: no limit.

    def of_tenant(self, tenant: str) -> int | None:
        """Return how many jobs a tenant may run at once; None: no limit."""
        return self.tenants.get(tenant, self.other_tenants)


class Activity(NamedTuple):
    """What goes on."""

    at: datetime  #: By the database's clock.
    workers: Mapping[str, Worker]  #: Those that are alive, by id.
    running: Mapping[tuple[tuple[str, str], str], int]  #: Jobs, by target (provider and model) and tenant.
    abandoned: Mapping[tuple[tuple[str, str], str], int]  #: Those of them whose workers give no sign of life.
    waiting: list[Waiting]  #: Of each tenant and pool one, and one of those that are not due.
    more_running: bool  #: Whether more than ``COUNTED`` run.
    more_waiting: bool  #: The same.
    closed: Mapping[str, Any]  #: What the newest turn found closed.
    state: str  #: What it left for the next: JSON.
    limits: Limits | None = None  #: None: no worker has told of them yet.


def look(connection: Connection) -> Activity:
    """Return what goes on."""
    newest = connection.execute(select(turns.c.closed, turns.c.state).order_by(turns.c.n.desc()).limit(1)).one_or_none()
    workers = living_workers(connection)
    runs = _running(connection)
    waits = _waiting(connection)
    return Activity(
        at=connection.execute(select(now())).scalar_one(),
        workers=workers,
        running=_by_target_and_tenant(runs),
        abandoned=_by_target_and_tenant(row for row in runs if row.worker_id not in workers),
        waiting=waits,
        more_running=sum(row.jobs for row in runs) > COUNTED,
        more_waiting=sum(each.jobs for each in waits) > COUNTED,
        closed={} if newest is None else json.loads(newest.closed),
        state="{}" if newest is None else newest.state,
        limits=_limits(connection),
    )


def _limits(connection: Connection) -> Limits | None:
    told = connection.execute(select(reports.c.told_at, reports.c.report).where(reports.c.name == LIMITS)).one_or_none()
    if told is None:
        return None
    report: dict[str, Any] = told.report
    limits = [
        Limit(each["name"], Used(**each["streams"]), *(each[name] and Used(**each[name]) for name in _RATES))
        for each in report["limits"]
    ]
    return Limits(told.told_at, limits, report["tenants"], report["other_tenants"])


_RATES: Final = ("requests", "tokens")


class Waits(NamedTuple):
    """Jobs, and what they wait for."""

    target: tuple[str, str]  #: Provider and model.
    tenant: str
    jobs: int
    why: WaitingFor


def what_waits(activity: Activity) -> list[Waits]:
    """Return what waits and for what, those that run on a worker that is gone last."""
    backlog = sum(each.jobs for each in activity.waiting)
    waiting_jobs = [
        Waits(
            each.chain[0],
            each.tenant,
            each.jobs,
            reason_in_pool(
                each.tenant,
                each.queue,
                each.chain,
                workers=activity.workers,
                closed=activity.closed,
                at=activity.at,
                backlog=backlog,
                next_attempt=None if each.is_due else "the next attempt, which is not due yet",
            ),
        )
        for each in activity.waiting
    ]
    return waiting_jobs + [
        Waits(target, tenant, jobs, ABANDONED) for (target, tenant), jobs in activity.abandoned.items()
    ]


def _running(connection: Connection) -> Sequence[Row[Any]]:
    columns = running.c.provider, running.c.model, running.c.tenant, running.c.worker_id
    some = select(*columns).limit(COUNTED + 1).subquery()
    return connection.execute(select(some, func.count().label("jobs")).group_by(*some.c)).all()


def _by_target_and_tenant(rows: Iterable[Row[Any]]) -> dict[tuple[tuple[str, str], str], int]:
    counted: dict[tuple[tuple[str, str], str], int] = {}
    for row in rows:
        key = (row.provider, row.model), row.tenant
        counted[key] = counted.get(key, 0) + row.jobs
    return counted


def _waiting(connection: Connection) -> list[Waiting]:
    later = func.coalesce(seconds_until(waiting.c.restarted_due) > SOON, false())
    some = (
        select(waiting.c.tenant, waiting.c.pool, later.label("later"))
        .order_by(waiting.c.seq)
        .limit(COUNTED + 1)
        .subquery()
    )
    counted = select(some, func.count().label("jobs")).group_by(*some.c).subquery()
    columns = (counted, pools.c.queue, pools.c["class"].label("job_class"), pools.c.chain)
    rows = connection.execute(select(*columns).join(pools, pools.c.id == counted.c.pool))
    return [
        Waiting(
            row.tenant,
            row.queue,
            row.job_class,
            tuple((provider, model) for provider, model in row.chain),
            row.jobs,
            not row.later,
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
    cost: float | None  #: As providers reported it; None: none did.
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
        **{name: func.sum(minutes.c[name]) for name in ("deltas", "prompt_tokens", "completion_tokens", "cost")},
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
        .order_by(total.desc(), minutes.c.error_code, minutes.c.provider, minutes.c.model)
        .limit(_ERRORS)  # there, and not here: a tenant may name another model for each job
    )
    return History(
        at,
        sorted((_sums(row) for row in connection.execute(by_time)), key=lambda sums: sums.minute),
        [Errors(*row) for row in connection.execute(by_code)],
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
        cost=None if row.cost is None else float(row.cost),
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


def rejected(connection: Connection, limit: int, *, before: str | None = None) -> list[RejectedMessage]:
    """Return the messages that were rejected, newest first; with ``before``, a message's id, those that come after it.

    If that message has been deleted meanwhile, there are none.
    """
    age = rejected_messages.c.rejected_at, rejected_messages.c.id
    newest = select(rejected_messages).order_by(*(column.desc() for column in age)).limit(limit)
    if before is not None:
        # Read by the database: SQLite keeps times as texts, which differ from bound ones in their zeros.
        newest = newest.where(tuple_(*age) < select(*age).where(rejected_messages.c.id == before).scalar_subquery())
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
