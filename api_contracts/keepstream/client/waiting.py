"""Waiting: what a job that does not go on waits for.

In: rows of jobs, from ``queries`` and ``listing``.  Out: a ``WaitingFor`` of each that waits.

Looking costs a few statements for all jobs of a page, however many others there are: their rows in the narrow tables,
the workers, why the newest turn left what it left, and of the backlog no more than is counted.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import ColumnElement, Connection, Table, func, select

from keepstream.client.results_from_rows import StoredRow
from keepstream.results import JobStatus, WaitingFor
from keepstream.tables import jobs, now, pools, running, seconds_from_now, seconds_until, turns, waiting, workers

#: What ``reasons`` needs of a job, besides its id and status.
COLUMNS: Final = (jobs.c.queue,)

_COUNTED: Final = 100  #: Waiting jobs that are counted; beyond them there are "more than" so many.
_LONGEST_LEASE: Final = 3600.0  #: Seconds; workers silent for longer are gone, whatever their lease was.
SOON: Final = 0.5  #: Seconds; a job that is due by then is due.
_AT_ONCE: Final = 500  #: Jobs that one statement names.
_PASSED_OVER: Final = frozenset({"cooling", "broken"})  #: Causes for which a job goes on to its next target.


class Worker(NamedTuple):
    """A worker that is alive."""

    queue: str
    places: int
    running: int
    providers: frozenset[str] | None = None  #: Those that it can ask; None: it does not say.

    def can_ask(self, provider: str) -> bool:
        """Whether it can run jobs of a provider, as far as is known."""
        return self.providers is None or provider in self.providers


JobName: TypeAlias = tuple[str, str]  #: A job's tenant and id.


class _Surroundings(NamedTuple):
    """What decides how long the jobs of a page wait."""

    now: datetime
    workers: Mapping[str, Worker]  #: Those alive, by id.
    waiting: Mapping[JobName, StoredRow]  #: The jobs' rows.
    running: Mapping[JobName, StoredRow]  #: The same.
    chains: Mapping[int, Sequence[Sequence[str]]]  #: Of the pools in which they wait.
    closed: Mapping[str, Any]  #: As the newest turn left it.
    backlog: int  #: Jobs of all tenants that wait; more than ``_COUNTED`` are not counted.


def reasons(connection: Connection, tenant: str, rows: Sequence[StoredRow]) -> dict[str, WaitingFor]:
    """Return, by id, what those of a tenant's jobs wait for that wait; ``rows`` have ``COLUMNS``, id and status."""
    found = _reasons(connection, [((tenant, row.id), row) for row in rows])
    return {job_id: reason for (_, job_id), reason in found.items()}


def reasons_of_all(connection: Connection, rows: Sequence[StoredRow]) -> dict[JobName, WaitingFor]:
    """Return the same of jobs of several tenants; ``rows`` have the tenant as well."""
    return _reasons(connection, [((row.tenant, row.id), row) for row in rows])


def _reasons(connection: Connection, rows: Sequence[tuple[JobName, StoredRow]]) -> dict[JobName, WaitingFor]:
    unended = {name: row for name, row in rows if not JobStatus(row.status).terminal}
    if not unended:
        return {}
    around = _look_around(connection, list(unended))
    found = {name: _reason(row, name, around) for name, row in unended.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def living_workers(connection: Connection) -> dict[str, Worker]:
    """Return the workers that are alive, by id."""
    columns = workers.c.id, workers.c.queue, workers.c.places, workers.c.running, workers.c.providers
    recent = select(*columns).where(
        workers.c.heartbeat_at > seconds_from_now(-_LONGEST_LEASE),
        seconds_until(workers.c.heartbeat_at) > -workers.c.lease,
    )
    return {
        id_: Worker(queue, places, running, None if names is None else frozenset(names))
        for id_, queue, places, running, names in connection.execute(recent)
    }


def closed_now(connection: Connection) -> dict[str, Any]:
    """Return what the newest turn found closed; ``closed_reason`` says what that is."""
    text = connection.scalar(select(turns.c.closed).order_by(turns.c.n.desc()).limit(1))
    closed: dict[str, Any] = {} if text is None else json.loads(text)
    return closed


def _look_around(connection: Connection, names: Sequence[JobName]) -> _Surroundings:
    until = seconds_until(waiting.c.restarted_due).label("seconds_until_due")
    # Those that wait first: a turn takes a job from there to those that run, never the other way.
    places = dict(_rows(connection, names, waiting, waiting.c.pool, waiting.c.restarted_due, until))
    runs = dict(_rows(connection, names, running, running.c.worker_id))
    pool_ids = {row.pool for row in places.values()}
    chains = select(pools.c.id, pools.c.chain).where(pools.c.id.in_(pool_ids))
    # The newest, because before the oldest there may be many that are gone.
    some = select(waiting.c.seq).order_by(waiting.c.seq.desc()).limit(_COUNTED + 1).subquery()
    return _Surroundings(
        now=connection.scalar(select(now())) or datetime.now(UTC),
        workers=living_workers(connection),
        waiting=places,
        running=runs,
        chains={row.id: row.chain for row in connection.execute(chains)} if pool_ids else {},
        closed=closed_now(connection),
        backlog=connection.scalar(select(func.count()).select_from(some)) or 0,
    )


def _rows(
    connection: Connection, names: Sequence[JobName], table: Table, *columns: ColumnElement[Any]
) -> Iterator[tuple[JobName, StoredRow]]:
    by_tenant: dict[str, list[str]] = {}
    for tenant, job_id in names:
        by_tenant.setdefault(tenant, []).append(job_id)
    for tenant, job_ids in by_tenant.items():
        for start in range(0, len(job_ids), _AT_ONCE):
            mine = table.c.tenant == tenant, table.c.job_id.in_(job_ids[start : start + _AT_ONCE])
            for row in connection.execute(select(table.c.job_id, *columns).where(*mine)):
                yield (tenant, row.job_id), row


def _reason(job: StoredRow, name: JobName, around: _Surroundings) -> WaitingFor | None:
    """Return what a job that has not ended waits for; None: nothing is in its way."""
    if name in around.running:
        return None if around.running[name].worker_id in around.workers else ABANDONED
    if name not in around.waiting:
        return None  # it moved while we looked
    place = around.waiting[name]
    next_attempt = None
    if place.restarted_due is not None and place.seconds_until_due > SOON:
        next_attempt = f"its next attempt, due at {_clock_time(place.restarted_due)}"
    return reason_in_pool(
        name[0],
        job.queue,
        around.chains.get(place.pool, ()),
        workers=around.workers,
        closed=around.closed,
        at=around.now,
        backlog=around.backlog,
        next_attempt=next_attempt,
    )


#: What a job waits for that runs on a worker which is gone.
ABANDONED: Final = WaitingFor(cause="worker", text="another worker to take it over: its own gives no sign of life")


def reason_in_pool(
    tenant: str,
    queue: str,
    chain: Sequence[Sequence[str]],
    *,
    workers: Mapping[str, Worker],
    closed: Mapping[str, Any],
    at: datetime,
    backlog: int,
    next_attempt: str | None,
) -> WaitingFor:
    """Return what a tenant's jobs wait for in a pool; all who tell it have it from here.

    Args:
        tenant: Whose they are.
        queue: The pool's.
        chain: The pool's targets.
        workers: Those that are alive, by id.
        closed: What the newest turn found closed.
        at: Now, by the database's clock.
        backlog: Jobs of all tenants that wait.
        next_attempt: What is waited for if the next attempt is not due yet; None: it is.
    """
    here = [worker for worker in workers.values() if worker.queue == queue]
    if not here:
        return WaitingFor(cause="worker", text=f"a worker: none is alive for the queue '{queue}'")
    if next_attempt is not None:
        return WaitingFor(cause="retry", text=next_attempt)
    if chain:
        provider = chain[0][0]
        here = [worker for worker in here if worker.can_ask(provider)]
        if not here:
            text = f"a worker that has the provider '{provider}': none that is alive does"
            return WaitingFor(cause="worker", text=text)
    why = closed_reason(closed, tenant, chain, at)
    if why is not None:
        return why
    if all(worker.running >= worker.places for worker in here):
        busy = "the only worker is busy" if len(here) == 1 else f"all {len(here)} workers are busy"
        return WaitingFor(cause="place", text=f"a free place: {busy}, and {_count(backlog)}")
    return WaitingFor(cause="pickup", text="a worker to take it")


def closed_reason(
    closed: Mapping[str, Any], tenant: str, chain: Collection[Sequence[str]], at: datetime
) -> WaitingFor | None:
    """Return why a turn leaves a tenant's jobs with these targets waiting; None: nothing is closed for them.

    If all targets rest or are broken, it is that of the one which opens soonest.

    ``closed`` says ``why`` of each ``PROVIDER/MODEL``, ``PROVIDER`` and ``tenant:NAME`` that is closed, with
    ``running`` jobs and the ``most`` there may be, or ``until``, seconds since the epoch; null: not known.
    """
    at_limit = closed.get(f"tenant:{tenant}")
    if at_limit is not None:
        return WaitingFor(cause="tenant", text=f"tenant {tenant}: {_used(at_limit)} at once")
    opens: dict[float, WaitingFor] = {}  # When a job goes on at a target that rests or is broken, soonest or first.
    for provider, model in chain:
        found = _target_reason(closed, provider, model, at.timestamp())
        if found is None:
            break  # and yet jobs wait: for the end of a short cool-down of a target before it
        reason, until = found
        if reason.cause not in _PASSED_OVER:
            return reason
        opens.setdefault(until, reason)
    return opens[min(opens)] if opens else None


def _target_reason(closed: Mapping[str, Any], provider: str, model: str, at: float) -> tuple[WaitingFor, float] | None:
    """Return why a target takes no job, and until when, in seconds since the epoch; infinite: not known."""
    for key, name in ((f"{provider}/{model}", f"{provider}/{model}"), (provider, f"provider {provider}")):
        entry = closed.get(key)
        until = None if entry is None else entry.get("until")
        if entry is None or (until is not None and until < at):
            continue
        cause = "broken" if entry["why"] == "probing" else entry["why"]
        reason = WaitingFor(cause=cause, text=f"{name}: {closed_words(entry)}")
        return reason, math.inf if until is None else until
    return None


def closed_words(entry: Mapping[str, Any]) -> str:
    """Return in words why a target or provider takes no job, by what ``closed`` says of it."""
    why, until = entry["why"], entry.get("until")
    when = "" if until is None else _clock_time(datetime.fromtimestamp(until, UTC))
    if why == "concurrency":
        return f"{_used(entry)} streams"
    if why == "cooling":
        return f"cool-down until {when}" if when else "cool-down"
    if why == "broken":
        return f"broken; next try at {when}" if when else "broken"
    if why == "probing":
        return "broken; one job is trying it"
    return f"{why.replace('_', ' ')}; next at {when}" if when else str(why).replace("_", " ")


def _used(entry: Mapping[str, Any]) -> str:
    return f"{entry['running']} of {entry['most']}"


def _clock_time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%H:%M:%S} UTC"


def _count(waiting_jobs: int) -> str:
    if waiting_jobs > _COUNTED:
        return f"more than {_COUNTED} jobs wait"
    return "1 job waits" if waiting_jobs == 1 else f"{waiting_jobs} jobs wait"
