"""Heartbeats: which workers are alive, and what each of them should know.

In: signs of life, from the heartbeat; looks, from the chooser.  Out: the workers' rows; to each worker the jobs that it
owns, what is known of those that wait, and which providers no worker has.
"""

import json
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    Float,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)

from keepstream.tables import arrivals, epoch_seconds, leases, now, running, seconds_from_now, turns, workers
from keepstream_worker.turn import LATE_ARRIVALS
from keepstream_worker.values import JobKey

#: Seconds for which a worker that is gone stays in the table, for `keepstream doctor` and for people.
_REMEMBERED: Final = 172_800.0
_FORGOTTEN_AT_ONCE: Final = 200
#: How old the last sign of life of a worker seems that is gone.
_RETIRED: Final = 86_400.0
#: Seconds in which a worker that is gone may be back, with the providers that it had: it is replaced, or moved.
_RETURNS_WITHIN: Final = 300.0
#: Arrivals that are counted: many more than turns may have left.
_COUNTED: Final = LATE_ARRIVALS + 500
#: The lease of whoever sweeps.
SWEEPER: Final = "sweeper"


class Heartbeat(NamedTuple):
    """A sign of life."""

    worker_id: str
    lease: float  #: Seconds of silence after which a worker is taken for dead.
    queue: str  #: Where it takes its jobs from.
    places: int  #: Jobs that it runs at once.
    running: int  #: Jobs that it runs now.
    known_turn: int = -1  #: As of ``Look``.
    providers: tuple[str, ...] | None = None  #: Those that it can ask; None: it does not say.


class Look(NamedTuple):
    """A worker asks what is known of the jobs that wait."""

    known_turn: int = -1  #: The newest turn whose state it has; -1: none.


class Looked(NamedTuple):
    """What is known of the jobs that wait."""

    now: float  #: Seconds since the epoch, by the database's clock.
    turn: int  #: The newest; 0: none was ever taken.
    state: str | None  #: Its state, JSON; None: the worker has it.
    ready: dict[str, float]  #: As the newest turn has it; see ``keepstream_worker.turn.Decision``.
    arrivals: int  #: How many jobs have arrived after it, or were left by turns; of very many some are counted.


class HeartbeatResult(NamedTuple):
    """What a worker learns when it gives a sign of life."""

    lapsed: bool  #: It was silent for longer than its lease: others may have taken its jobs.
    owned: frozenset[tuple[JobKey, int]]  #: The jobs it owns, with their attempt.
    cancels: frozenset[JobKey]  #: Those of them that are to be cancelled.
    sweeper_free: bool  #: Whether nobody sweeps.
    looked: Looked


def _count(some: Any) -> Any:
    """Return how many rows a selection of arrivals has; of very many, some."""
    # In their order, so that they are found by the index, whatever of deleted rows is in the way.
    ordered = some.order_by(arrivals.c.seq).limit(_COUNTED).subquery()
    return select(func.count()).select_from(ordered).scalar_subquery()


def _newest(dialect: str) -> Any:
    """Return what is read of the newest turn, as one value, so that it is one probe: number, ready, state, arrivals."""
    pack = func.json_build_array if dialect == "postgresql" else func.json_array
    known = bindparam("known_turn", type_=BigInteger)
    # No turn looks below its bound, so neither do we: what was deleted there may still be in the way.
    arrived = _count(select(arrivals.c.seq).where(arrivals.c.seq >= turns.c.arrivals_low).correlate(turns))
    newest = (
        select(
            cast(pack(turns.c.n, turns.c.ready, case((turns.c.n > known, turns.c.state), else_=None), arrived), Text)
        )
        .order_by(turns.c.n.desc())
        .limit(1)
        .scalar_subquery()
    )
    none = pack(0, "{}", case((known < 0, "{}"), else_=None), _count(select(arrivals.c.seq)))
    return func.coalesce(newest, cast(none, Text)).label("newest")


_NEWEST: Final = {dialect: _newest(dialect) for dialect in ("postgresql", "sqlite")}
_NOW: Final = epoch_seconds(now()).label("now")
_LOOK: Final = {dialect: select(_NOW, newest) for dialect, newest in _NEWEST.items()}


def look(connection: Connection, looks: list[Look]) -> list[Looked]:
    """Return what is known of the jobs that wait: a few probes, however many there are."""
    statement = _LOOK[connection.dialect.name]
    return [_looked(connection.execute(statement, item._asdict()).one()) for item in looks]


def _looked(row: Any) -> Looked:
    turn, ready, state, arrived = json.loads(row.newest)
    return Looked(row.now, turn, state, json.loads(ready), arrived)


#: What a worker says of itself.
_SAID: Final = ("lease", "queue", "places", "running", "providers")
_SIGN: Final = {
    "heartbeat_at": now(),
    **{column: bindparam(f"new_{column}", type_=workers.c[column].type) for column in _SAID},
}
_IS_WORKER: Final = workers.c.id == bindparam("of_worker")
_RENEW: Final = update(workers).where(_IS_WORKER).values(_SIGN)
_IS_ALIVE: Final = workers.c.heartbeat_at > seconds_from_now(-bindparam("new_lease", type_=Float))
_APPEAR: Final = workers.insert().values(_SIGN | {"id": bindparam("of_worker"), "started_at": now()})

_OWNED: Final = running.c.worker_id == bindparam("of_worker")
_LED: Final = exists().where(leases.c.name == SWEEPER, leases.c.until > now())


def _answer(dialect: str) -> Any:
    return _NOW, _NEWEST[dialect], exists().where(_OWNED).label("owns"), _LED.label("led")


_RENEW_IN_TIME: Final = {
    dialect: _RENEW.where(_IS_ALIVE).returning(*_answer(dialect)) for dialect in ("postgresql", "sqlite")
}
_ANSWER: Final = {dialect: select(*_answer(dialect)) for dialect in ("postgresql", "sqlite")}
_JOBS: Final = select(running.c.tenant, running.c.job_id, running.c.attempt, running.c.cancel_requested).where(_OWNED)


def record_heartbeat(connection: Connection, heartbeats: list[Heartbeat]) -> list[HeartbeatResult]:
    """Renew each worker's row, or create it: one statement, and one more for a worker that owns jobs."""
    return [_record(connection, heartbeat) for heartbeat in heartbeats]


def _record(connection: Connection, heartbeat: Heartbeat) -> HeartbeatResult:
    values = {
        "of_worker": heartbeat.worker_id,
        "known_turn": heartbeat.known_turn,
        **{f"new_{column}": getattr(heartbeat, column) for column in _SAID},
    }
    answer = connection.execute(_RENEW_IN_TIME[connection.dialect.name], values).one_or_none()
    lapsed = answer is None
    if answer is None:
        if not connection.execute(_RENEW, values).rowcount:
            connection.execute(_APPEAR, values)
        answer = connection.execute(_ANSWER[connection.dialect.name], values).one()
    rows = connection.execute(_JOBS, values).all() if answer.owns else ()
    return HeartbeatResult(
        lapsed=lapsed,
        # Unpacked: with a row's names it takes half as long again, and a worker may own thousands.
        owned=frozenset((JobKey(tenant, job_id), attempt) for tenant, job_id, attempt, _ in rows),
        cancels=frozenset(JobKey(tenant, job_id) for tenant, job_id, _, is_requested in rows if is_requested),
        sweeper_free=not answer.led,
        looked=_looked(answer),
    )


def retire(connection: Connection, worker_ids: list[str]) -> list[None]:
    """Mark workers as gone at once, so that nobody waits for their lease."""
    connection.execute(
        update(workers).where(workers.c.id.in_(worker_ids)).values(heartbeat_at=seconds_from_now(-_RETIRED))
    )
    return [None] * len(worker_ids)


class Wanted(NamedTuple):
    """Providers for which jobs wait."""

    queue: str
    providers: frozenset[str]


def _was_here(since: float, until: float = 0.0) -> Any:
    """Select workers that gave their last sign of life within so many seconds, before the last ``until`` ones."""
    heard = workers.c.heartbeat_at
    after = heard > seconds_from_now(-since - until)
    return and_(after, heard <= seconds_from_now(-until)) if until else after


_PROVIDERS: Final = select(workers.c.providers).where(
    workers.c.queue == bindparam("of_queue"), or_(_was_here(_RETURNS_WITHIN), _was_here(_RETURNS_WITHIN, _RETIRED))
)


def find_unknown(connection: Connection, wanted: list[Wanted]) -> list[frozenset[str]]:
    """Return which of the providers no worker of the queue can ask, nor could one that was alive minutes ago."""
    return [_unknown(connection, question) for question in wanted]


def _unknown(connection: Connection, wanted: Wanted) -> frozenset[str]:
    left = wanted.providers
    for names in connection.scalars(_PROVIDERS, {"of_queue": wanted.queue}):
        if names is None:  # of a version that does not say it: it may have all
            return frozenset()
        left = left.difference(names)
    return left


_FORGET: Final = delete(workers).where(
    workers.c.id.in_(
        select(workers.c.id)
        .where(
            workers.c.heartbeat_at < seconds_from_now(-_REMEMBERED),
            ~exists().where(running.c.worker_id == workers.c.id),
        )
        .order_by(workers.c.heartbeat_at)
        .limit(_FORGOTTEN_AT_ONCE)
    ),
    workers.c.heartbeat_at < seconds_from_now(-_REMEMBERED),
)


def forget_workers(connection: Connection) -> None:
    """Delete workers that have been gone for two days and own nothing."""
    connection.execute(_FORGET)
