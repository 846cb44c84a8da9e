"""Activity: what runs and what waits now, for people who look on.

In: a connection inside a transaction.  Out: an ``Activity``, to the command line.  Nothing is written, and nothing is
counted without end: of what runs and of what waits so many rows are looked at, of the latter the oldest.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from keepstream.client.waiting import Worker, living_workers
from keepstream.tables import now, pools, running, seconds_until, turns, waiting
from keepstream_worker.values import Target

COUNTED: Final = 10_000  #: Rows that are looked at of each kind.


class Waiting(NamedTuple):
    """Jobs that wait for the same."""

    tenant: str
    queue: str
    job_class: str
    chain: tuple[Target, ...]
    jobs: int
    not_due: int  #: Those of them whose next attempt is not due yet.


class Activity(NamedTuple):
    """What goes on."""

    at: datetime  #: By the database's clock.
    workers: Mapping[str, Worker]  #: Those that are alive, by id.
    running: Mapping[tuple[Target, str], int]  #: Jobs, by target and tenant.
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


def _running(connection: Connection) -> dict[tuple[Target, str], int]:
    some = select(running.c.provider, running.c.model, running.c.tenant).limit(COUNTED + 1).subquery()
    counted = select(some, func.count().label("jobs")).group_by(*some.c)
    return {(Target(row.provider, row.model), row.tenant): row.jobs for row in connection.execute(counted)}


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
            tuple(Target(provider, model) for provider, model in row.chain),
            row.jobs,
            row.not_due,
        )
        for row in rows
    ]
