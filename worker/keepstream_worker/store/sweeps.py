"""Sweeps: jobs that nobody takes care of, and rows that nobody needs.

In: what a sweeper asks for, from ``keepstream_worker.upkeep``.  Out: jobs of dead workers, released or ended; ends to
be announced; arrivals that turns have passed by, found again; old rows, deleted.

Whatever one process leaves undone another one finds.  One worker sweeps at a time; two would do no harm: each row goes
to one.  Each function is a step of its own, so that none undoes another's work when its time is up. Each statement
takes a bounded number of rows, by an index, and as a rule from a bound on: what was deleted before may be in the way.
"""

import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    Float,
    Integer,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client.endings import (
    EXPIRED_MESSAGE,
    TOTAL_TIMEOUT_MESSAGE,
    end_unclaimed,
)
from keepstream.errors import ErrorCode
from keepstream.results import JobStatus
from keepstream.tables import (
    announcements,
    arrivals,
    epoch_seconds,
    jobs,
    leases,
    now,
    pools,
    running,
    seconds_from_now,
    seconds_until,
    standings,
    turns,
    waiting,
    workers,
)
from keepstream_worker.store.conditions import among, each, is_named, name
from keepstream_worker.store.heartbeats import SWEEPER, forget_workers
from keepstream_worker.store.pools import find_pools
from keepstream_worker.store.turns import look_for_arrivals_below
from keepstream_worker.store.waiting import OwnedJob, Released, drop_running, drop_waiting, take_away
from keepstream_worker.turn import FoundPool
from keepstream_worker.values import JobKey

#: Turns that are kept, for people; only the newest counts.
_KEPT_TURNS: Final = 100
#: Arrivals beyond which pools are not swept: each would have to be looked at.
_MANY_ARRIVALS: Final = 1000
#: Seconds before now from which on a sweep looks that does not look at everything.
_RECENT: Final = 60.0
#: Numbers below those that turns look at from which on it looks for arrivals.
_RECENT_ARRIVALS: Final = 100_000
#: Seconds, and numbers, for all.
_EVER: Final = 3e9
_ALL_ARRIVALS: Final = 2**62
#: Seconds in which a job's worker announces its end itself.
_ANNOUNCED_WITHIN: Final = 2.0


class Candidacy(NamedTuple):
    """A worker would sweep."""

    worker_id: str
    seconds: float  #: For which it is the one to sweep; 0: no longer.


def _lead_statement(dialect: Any) -> Any:
    until = seconds_from_now(bindparam("seconds", type_=Float))
    insert = dialect.insert(leases).values(name=SWEEPER, holder=bindparam("holder"), until=until)
    is_free = or_(leases.c.until <= now(), leases.c.holder == insert.excluded.holder)
    return insert.on_conflict_do_update(
        index_elements=[leases.c.name],
        set_={"holder": insert.excluded.holder, "until": insert.excluded.until},
        where=is_free,
    ).returning(leases.c.holder)


_LEAD: Final = {"postgresql": _lead_statement(postgresql), "sqlite": _lead_statement(sqlite)}
_STAND_DOWN: Final = delete(leases).where(leases.c.name == SWEEPER, leases.c.holder == bindparam("holder"))


def lead(connection: Connection, candidacies: list[Candidacy]) -> list[bool]:
    """Return whether each worker is the one to sweep from now on, for as long as it asked."""
    return [_lead(connection, candidacy) for candidacy in candidacies]


def _lead(connection: Connection, candidacy: Candidacy) -> bool:
    if candidacy.seconds <= 0:
        connection.execute(_STAND_DOWN, {"holder": candidacy.worker_id})
        return False
    values = {"holder": candidacy.worker_id, "seconds": candidacy.seconds}
    return connection.scalar(_LEAD[connection.dialect.name], values) is not None


class Sweep(NamedTuple):
    """What a sweeper asks for."""

    lease: float  #: Seconds of silence after which a worker is taken for dead, if its own lease is not longer.
    reap: bool  #: Whether the silence of other workers counts as death.
    asked_at: float  #: ``time.monotonic()`` of the question.
    max_attempts: int  #: For jobs that do not say.
    limit: int  #: Rows of each kind at most.
    whole: bool = True  #: Whether to look at all rows, however old; else at those of the last minute.


def release_lost(connection: Connection, sweeps: list[Sweep]) -> list[list[Released]]:
    """Let jobs of dead workers wait again, or end; return them."""
    _hurry(connection)
    return [_release_lost(connection, request) if request.reap else [] for request in sweeps]


def end_expired(connection: Connection, sweeps: list[Sweep]) -> list[list[JobKey]]:
    """End jobs that wait past their time; return them."""
    _hurry(connection)
    return [_end_expired(connection, request) for request in sweeps]


def find_unannounced(connection: Connection, sweeps: list[Sweep]) -> list[list[JobKey]]:
    """Return jobs that have ended, but whose terminal event may be missing."""
    _hurry(connection)
    return [_find_unannounced(connection, request) for request in sweeps]


def _since(request: Sweep) -> float:
    return _EVER if request.whole else _RECENT


def _hurry(connection: Connection) -> None:
    """Have what is slow given up: it must not hold up the work of others."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = '1s'; SET LOCAL lock_timeout = '1s'")


#: A worker may have another lease than the one that sweeps, and give its signs of life as seldom as that allows, while
#: the setting is changed on one worker after the other: the longer one counts.
_IS_SILENT: Final = and_(
    workers.c.heartbeat_at < seconds_from_now(-bindparam("lease", type_=Float)),
    seconds_until(workers.c.heartbeat_at) < -workers.c.lease,
)
_SILENT: Final = select(workers.c.id).where(_IS_SILENT).scalar_subquery()
#: On PostgreSQL from an array, so that each worker's jobs are looked up, and not all of which dead rows are left.
_OF_SILENT: Final = {
    "postgresql": running.c.worker_id == any_(func.array(_SILENT)),
    "sqlite": and_(workers.c.id == running.c.worker_id, _IS_SILENT),
}
_FIND_LOST: Final = {
    dialect: select(running.c.tenant, running.c.job_id, running.c.attempt, running.c.worker_id)
    .where(of_silent)
    .limit(bindparam("limit", type_=Integer))
    for dialect, of_silent in _OF_SILENT.items()
}
#: What somebody else has locked is looked after already.
_TAKE_OVER: Final = {
    dialect: select(
        jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.tries, jobs.c.max_attempts, jobs.c.cancel_requested_at
    )
    .where(named)
    .order_by(jobs.c.tenant, jobs.c.id)
    .with_for_update(skip_locked=True, key_share=True)
    for dialect, named in among(jobs).items()
}


def _release_lost(connection: Connection, request: Sweep) -> list[Released]:
    find_lost = _FIND_LOST[connection.dialect.name]
    found = connection.execute(find_lost, {"lease": request.lease, "limit": request.limit}).all()
    owned = {JobKey(tenant, job_id): (attempt, worker_id) for tenant, job_id, attempt, worker_id in found}
    rows = each(connection, _TAKE_OVER, owned)
    if time.monotonic() - request.asked_at > request.lease / 2:
        return []  # the database kept us waiting, so it kept the others waiting too: their silence proves nothing
    lost = []
    missing = set(owned)
    for row in rows:
        key = JobKey(row.tenant, row.id)
        missing.discard(key)
        attempt, worker_id = owned[key]
        released = take_away(connection, row, OwnedJob(key, attempt, worker_id), request.max_attempts)
        if released is not None:  # else its worker has ended it meanwhile
            lost.append(released)
    drop_running(connection, missing)
    forget_workers(connection)
    return lost


_FIND_EXPIRED: Final = (
    select(waiting.c.tenant, waiting.c.job_id)
    .where(waiting.c.expires_at <= now(), waiting.c.expires_at > seconds_from_now(-bindparam("since", type_=Float)))
    .order_by(waiting.c.expires_at)
    .limit(bindparam("limit", type_=Integer))
)
_STILL_WAITING: Final = {
    dialect: select(waiting.c.tenant, waiting.c.job_id).where(named).with_for_update(skip_locked=True)
    for dialect, named in among(waiting).items()
}


def _end_expired(connection: Connection, request: Sweep) -> list[JobKey]:
    found = connection.execute(_FIND_EXPIRED, {"limit": request.limit, "since": _since(request)}).all()
    keys = [JobKey(tenant, job_id) for tenant, job_id in found]
    rows = {JobKey(row.tenant, row.id): row for row in each(connection, _TAKE_OVER, keys)}
    drop_waiting(connection, set(keys) - rows.keys())
    # What a turn has taken meanwhile is its worker's to end.
    waits = each(connection, _STILL_WAITING, rows)
    ended = []
    for key in sorted(JobKey(tenant, job_id) for tenant, job_id in waits):
        attempt = rows[key].attempt
        if attempt:
            status, code, message = JobStatus.FAILED, ErrorCode.TOTAL_TIMEOUT, TOTAL_TIMEOUT_MESSAGE
        else:
            status, code, message = JobStatus.EXPIRED, ErrorCode.EXPIRED, EXPIRED_MESSAGE
        end_unclaimed(connection, *key, attempt, status, code, message)
        ended.append(key)
    return ended


_FIND_UNANNOUNCED: Final = (
    select(announcements.c.tenant, announcements.c.job_id)
    .where(
        announcements.c.ended_at <= seconds_from_now(-_ANNOUNCED_WITHIN),
        announcements.c.ended_at > seconds_from_now(-bindparam("since", type_=Float)),
    )
    .order_by(announcements.c.ended_at)
    .limit(bindparam("limit", type_=Integer))
)


def _find_unannounced(connection: Connection, request: Sweep) -> list[JobKey]:
    rows = connection.execute(_FIND_UNANNOUNCED, {"limit": request.limit, "since": _since(request)})
    return [JobKey(tenant, job_id) for tenant, job_id in rows]


#: A sweeper, and the worker that ended them, may do so at the same time: what one has locked the other leaves to it.
_MARK_ANNOUNCED: Final[dict[str, Any]] = {
    "sqlite": delete(announcements).where(is_named(announcements)),
    "postgresql": text("""
DELETE FROM keepstream_announcements WHERE ctid = ANY(ARRAY(
  SELECT a.place FROM unnest(CAST(:tenants AS text[]), CAST(:job_ids AS text[])) k(tenant, job_id)
  CROSS JOIN LATERAL (
    SELECT ctid AS place FROM keepstream_announcements WHERE tenant = k.tenant AND job_id = k.job_id
    FOR UPDATE SKIP LOCKED
  ) a
))
"""),
}


def mark_announced(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Note that the terminal events of these jobs are in the log."""
    unique = sorted(set(keys))
    values: Any
    if connection.dialect.name == "postgresql":
        values = {"tenants": [key.tenant for key in unique], "job_ids": [key.id for key in unique]}
    else:
        values = [name(key) for key in unique]
    connection.execute(_MARK_ANNOUNCED[connection.dialect.name], values)
    return [None] * len(keys)


# -- rows that nobody needs --


class Tidying(NamedTuple):
    """What is to be tidied up."""

    limit: int  #: Rows of each kind at most.
    whole: bool = True  #: As of ``Sweep``.
    turns_from: int = 0  #: As the last answer said: what was deleted before is not looked at again.
    pools_from: int = 0  #: As the last answer said: where the walk through the pools goes on.
    standings_from: int = 0  #: The same of the walk through their standings.
    arrivals_from: int = 0  #: The same of the walk through arrivals that turns have passed by.
    #: By queue and class: the virtual time below which a lane in which nothing waits means nothing any more.
    idle_times: Mapping[tuple[str, str], float] = {}


def find_late_arrivals(connection: Connection, tidyings: list[Tidying]) -> list[int]:
    """Have arrivals handled that turns have passed by; return each ``arrivals_from``.

    A transaction of its own: who waits for the turn must hold nothing that a turn may want.
    """
    _hurry(connection)
    return [
        look_for_arrivals_below(connection, _ALL_ARRIVALS if request.whole else _RECENT_ARRIVALS, request.arrivals_from)
        for request in tidyings
    ]


def delete_old_turns(connection: Connection, tidyings: list[Tidying]) -> list[int]:
    """Delete turns that are not kept for people any more; return each ``turns_from``."""
    _hurry(connection)
    return [_delete_old_turns(connection, request) for request in tidyings]


def delete_idle_standings(connection: Connection, tidyings: list[Tidying]) -> list[int]:
    """Delete standings that mean nothing any more, of some pools; return each ``standings_from``."""
    _hurry(connection)
    return [_delete_idle_standings(connection, request) for request in tidyings]


_ARRIVED: Final = select(func.count()).select_from(
    select(arrivals.c.seq).order_by(arrivals.c.seq.desc()).limit(_MANY_ARRIVALS + 1).subquery()
)
_POOLS: Final = (
    select(pools.c.id)
    .where(pools.c.id >= bindparam("id_from", type_=BigInteger))
    .order_by(pools.c.id)
    .limit(bindparam("limit", type_=Integer))
)
_IN_USE: Final = or_(
    exists().where(standings.c.pool == pools.c.id, standings.c.active.is_not(None)),
    exists().where(standings.c.pool == pools.c.id, standings.c.active.is_(None)),
    exists().where(waiting.c.pool == pools.c.id, waiting.c.restarted_due.is_not(None)),
    pools.c.id.in_(select(running.c.pool)),
    pools.c.id.in_(select(arrivals.c.pool)),
)
_DELETE_POOLS: Final = delete(pools).where(
    pools.c.id >= bindparam("first", type_=BigInteger), pools.c.id <= bindparam("last", type_=BigInteger), ~_IN_USE
)


def _some_pools(connection: Connection, id_from: int, limit: int) -> tuple[int, int, int] | None:
    """Return the first and the last of a number of pools, and where to go on after them; None: there are none."""
    ids = connection.scalars(_POOLS, {"id_from": id_from, "limit": limit}).all()
    return (ids[0], ids[-1], ids[-1] + 1 if len(ids) == limit else 0) if ids else None


def delete_idle_pools(connection: Connection, tidyings: list[Tidying]) -> list[int]:
    """Delete pools in which nothing waits and from which nothing runs; return each ``pools_from``.

    A job that is stored meanwhile may lose its pool; ``misplaced.put_right`` gives it back.
    """
    _hurry(connection)
    return [_delete_idle_pools(connection, request) for request in tidyings]


def _delete_idle_pools(connection: Connection, request: Tidying) -> int:
    some = _some_pools(connection, request.pools_from, request.limit)
    if some is None:
        return 0
    first, last, next_from = some
    if (connection.scalar(_ARRIVED) or 0) <= _MANY_ARRIVALS:
        connection.execute(_DELETE_POOLS, {"first": first, "last": last})
    return next_from


_FIRST_TIME: Final = (
    select(standings.c.time)
    .where(standings.c.pool == pools.c.id, standings.c.active.is_not(None))
    .order_by(standings.c.time)
    .limit(1)
    .scalar_subquery()
)
_FIRST_DUE: Final = (
    select(epoch_seconds(waiting.c.restarted_due))
    .where(waiting.c.pool == pools.c.id, waiting.c.restarted_due.is_not(None))
    .order_by(waiting.c.restarted_due)
    .limit(1)
    .scalar_subquery()
)
_FIND_WAITING: Final = (
    select(pools.c.id, _FIRST_TIME.label("time"), _FIRST_DUE.label("due"))
    .where(pools.c.id >= bindparam("id_from", type_=BigInteger))
    .order_by(pools.c.id)
    .limit(bindparam("limit", type_=Integer))
)


def find_waiting_pools(connection: Connection, tidyings: list[Tidying]) -> list[list[FoundPool]]:
    """Return those of the pools from ``pools_from`` on in which jobs wait, whatever turns know of them."""
    _hurry(connection)
    return [_find_waiting_pools(connection, request) for request in tidyings]


def _find_waiting_pools(connection: Connection, request: Tidying) -> list[FoundPool]:
    rows = connection.execute(_FIND_WAITING, {"id_from": request.pools_from, "limit": request.limit}).all()
    waits = {row.id: row for row in rows if row.time is not None or row.due is not None}
    known = find_pools(connection, waits)
    return [FoundPool(known[id_], row.time, row.due) for id_, row in waits.items() if id_ in known]


class Parked(NamedTuple):
    """A step of the walk through the tenants whose lanes are parked."""

    after: str  #: The tenant at which the last step ended.
    limit: int


_PARKED: Final = (
    select(standings.c.tenant)
    .where(standings.c.parked.is_not(None), standings.c.tenant > bindparam("after"))
    .distinct()
    .order_by(standings.c.tenant)
    .limit(bindparam("limit", type_=Integer))
)


def find_parked(connection: Connection, steps: list[Parked]) -> list[list[str]]:
    """Return tenants whose lanes are parked, in their order."""
    _hurry(connection)
    return [list(connection.scalars(_PARKED, step._asdict())) for step in steps]


_NEWEST_TURN: Final = select(turns.c.n).order_by(turns.c.n.desc()).limit(1)
_DELETE_TURNS: Final = delete(turns).where(turns.c.n >= bindparam("oldest"), turns.c.n < bindparam("kept"))


def _delete_old_turns(connection: Connection, request: Tidying) -> int:
    newest: int = connection.scalar(_NEWEST_TURN) or 0
    oldest: int | None = connection.scalar(_OLDEST_TURN, {"turns_from": request.turns_from})
    if oldest is None:  # a restored database, for instance, has turns that are older than what was deleted
        return 0
    kept = min(max(newest - _KEPT_TURNS, oldest), oldest + 10 * request.limit)
    connection.execute(_DELETE_TURNS, {"oldest": oldest, "kept": kept})
    return kept


_OLDEST_TURN: Final = select(turns.c.n).where(turns.c.n >= bindparam("turns_from")).order_by(turns.c.n).limit(1)

_DELETE_IDLE: Final = {
    "postgresql": """
DELETE FROM keepstream_standings WHERE ctid = ANY(ARRAY(
  SELECT s.ctid FROM keepstream_pools p JOIN keepstream_standings s ON s.pool = p.id
  WHERE p.id >= :first AND p.id <= :last AND p.queue = :queue AND p.class = :job_class
    AND s.active IS NULL AND s.parked IS NULL AND s.time < :time
  LIMIT :limit FOR UPDATE OF s SKIP LOCKED))
""",
    "sqlite": """
DELETE FROM keepstream_standings WHERE rowid IN (
  SELECT s.rowid FROM keepstream_pools p JOIN keepstream_standings s ON s.pool = p.id
  WHERE p.id >= :first AND p.id <= :last AND +p.queue = :queue AND +p.class = :job_class
    AND s.active IS NULL AND s.parked IS NULL AND s.time < :time
  LIMIT :limit)
""",
}


def _delete_idle_standings(connection: Connection, request: Tidying) -> int:
    some = _some_pools(connection, request.standings_from, request.limit)
    if some is None:
        return 0
    first, last, next_from = some
    statement = text(_DELETE_IDLE[connection.dialect.name])
    deleted = []
    for (queue, job_class), moment in request.idle_times.items():
        values = {"queue": queue, "job_class": job_class, "time": moment, "limit": request.limit}
        deleted.append(connection.execute(statement, values | {"first": first, "last": last}).rowcount)
    return request.standings_from if request.limit in deleted else next_from  # in these pools there may be more
