"""The statements of a turn on SQLite: the same as on PostgreSQL, one row or one place after the other.

In: what ``keepstream_worker.store.turns`` asks for.  Out: rows as values; what was decided, written.

The transaction has the database's only write lock from its beginning, so nothing changes between two statements.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import Connection

from keepstream_worker.store.turn_values import Newest, Span, Written
from keepstream_worker.turn import Arrival, Decision, Oldest, Question, Standing, WaitingJob
from keepstream_worker.values import JobKey, Target


def _epoch(column: str) -> str:
    return f"((julianday({column}) - 2440587.5) * 86400.0)"


_NEWEST: Final = f"""
SELECT {_epoch("'now'")}, t.n, t.state, t.arrivals_low
FROM (SELECT 1) LEFT JOIN (SELECT * FROM keepstream_turns ORDER BY n DESC LIMIT 1) t ON true
"""  # noqa: S608  # of constants
_ARRIVALS: Final = f"""
SELECT seq, lane, pool, tenant, {_epoch("restarted_due")}
FROM keepstream_arrivals WHERE seq >= ? ORDER BY seq LIMIT ?
"""  # noqa: S608  # of constants


def open_turn(connection: Connection, most_arrivals: int) -> Newest:
    """Return what the turn before has left, and what has arrived since."""
    now, n, state, low = connection.exec_driver_sql(_NEWEST).one()
    found = connection.exec_driver_sql(_ARRIVALS, (low or 0, most_arrivals))
    return Newest(n or 0, state or "{}", now, tuple(Arrival(*row) for row in found))


_JOB: Final = "seq, tenant, job_id, lane, pool, attempt, prompt_tokens, max_tokens"
_RESTARTED_JOB: Final = f"SELECT {_JOB}, {_epoch('restarted_due')}, 0 FROM keepstream_waiting"  # noqa: S608  # of constants
_RESTARTED: Final = f"""
{_RESTARTED_JOB} WHERE pool = ? AND restarted_due IS NOT NULL AND tenant NOT IN (SELECT value FROM json_each(?))
ORDER BY restarted_due LIMIT ?
"""  # noqa: S608  # of constants
_OF_SEQ: Final = f"{_RESTARTED_JOB} WHERE seq = ?"


def find_restarted(connection: Connection, question: Question, seqs: Sequence[int]) -> list[WaitingJob]:
    """Return jobs that were started before: the first of the pools asked for, and those of ``seqs``."""
    full_tenants = json.dumps(question.full_tenants)
    asked: list[tuple[str, tuple[Any, ...]]] = []
    asked += [(_RESTARTED, (pool, full_tenants, question.restarted + 1)) for pool in question.restarted_pools]
    asked += [(_OF_SEQ, (seq,)) for seq in seqs]
    return [job for statement, values in asked for job in _jobs(connection.exec_driver_sql(statement, values))]


_HAS_RESTARTED: Final = "SELECT 1 FROM keepstream_waiting WHERE pool = ? AND restarted_due IS NOT NULL LIMIT 1"


def find_restarted_pools(connection: Connection, pools: Sequence[int]) -> frozenset[int]:
    """Return those of the pools in which jobs wait that were started before."""
    return frozenset(pool for pool in pools if connection.exec_driver_sql(_HAS_RESTARTED, (pool,)).first())


def _jobs(rows: Iterable[Any]) -> list[WaitingJob]:
    return [
        WaitingJob(seq, JobKey(tenant, job_id), *rest)._replace(expired=bool(expired))
        for seq, tenant, job_id, *rest, expired in rows
    ]


_STANDING: Final = """
SELECT lane, pool, tenant, time, head, active IS NOT NULL, parked IS NOT NULL FROM keepstream_standings
"""
_OF_POOL: Final = f"{_STANDING} WHERE pool = ? AND active IS NOT NULL AND time >= ? ORDER BY time, lane LIMIT ?"
_OF_LANE: Final = f"{_STANDING} WHERE lane = ? AND time >= ?"
_OF_TENANT: Final = f"{_STANDING} WHERE tenant = ? AND parked IS NOT NULL"


def find_standings(connection: Connection, question: Question, lanes: Sequence[tuple[int, float]]) -> list[Standing]:
    """Return standings: the first of the pools asked for, by pool and time; of lanes; of parked tenants."""
    asked: list[tuple[str, tuple[Any, ...]]] = [(_OF_POOL, (*pool, question.standings)) for pool in question.pools]
    asked += [(_OF_LANE, lane) for lane in (*question.lanes, *lanes)]
    asked += [(_OF_TENANT, (tenant,)) for tenant in question.parked_tenants]
    return [
        Standing(lane, pool, tenant, time, head, bool(active), bool(parked))
        for statement, values in asked
        for lane, pool, tenant, time, head, active, parked in connection.exec_driver_sql(statement, values)
    ]


_NEW_JOBS: Final = f"""
SELECT {_JOB}, NULL, coalesce(expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now'), 0) FROM keepstream_waiting
WHERE lane = ? AND pool = ? AND restarted_due IS NULL AND seq >= ? ORDER BY seq LIMIT ?
"""  # noqa: S608  # of constants


def find_jobs(connection: Connection, spans: Sequence[Span]) -> list[WaitingJob]:
    """Return new jobs, oldest first."""
    return [
        job
        for span in spans
        for job in _jobs(connection.exec_driver_sql(_NEW_JOBS, (span.lane, span.pool, span.low, span.most + 1)))
    ]


_COUNT_TARGETS: Final = """
SELECT model, count(*) FROM keepstream_running INDEXED BY ix_keepstream_running_provider
WHERE provider = ? GROUP BY model
"""
_COUNT_TENANT: Final = "SELECT count(*) FROM keepstream_running WHERE tenant = ?"


def count_running(
    connection: Connection,
    providers: Sequence[str],
    tenants: Sequence[str],
    _oldest: Oldest,  # nothing of a deleted row is left here
) -> tuple[dict[Target, int], dict[str, int]]:
    """Return how many jobs run, by target and by tenant."""
    targets = {
        Target(provider, model): count
        for provider in providers
        for model, count in connection.exec_driver_sql(_COUNT_TARGETS, (provider,))
    }
    counts = {tenant: connection.exec_driver_sql(_COUNT_TENANT, (tenant,)).scalar_one() for tenant in tenants}
    return targets, {tenant: count for tenant, count in counts.items() if count}


def find_oldest(_connection: Connection) -> None:
    """Return None: it makes no difference here."""


_START: Final = """
INSERT INTO keepstream_running (tenant, job_id, attempt, worker_id, provider, model, lane, pool, tokens,
  prompt_tokens, max_tokens, started_at, cancel_requested)
SELECT tenant, job_id, attempt + 1, ?, ?, ?, lane, pool, ?, prompt_tokens, max_tokens,
  strftime('%Y-%m-%d %H:%M:%f', 'now'), 0
FROM keepstream_waiting WHERE seq = ?
"""
_LEAVE: Final = "DELETE FROM keepstream_waiting WHERE seq IN (SELECT value FROM json_each(?)) RETURNING seq"
_HANDLED: Final = "DELETE FROM keepstream_arrivals WHERE seq IN (SELECT value FROM json_each(?))"
_MOVE: Final = """
UPDATE keepstream_standings SET time = ?, head = ?, active = ?, parked = ?
WHERE lane = ? AND time = ? AND pool = ? AND (active IS NOT NULL) = ?
"""
_RETIME: Final = """
UPDATE keepstream_standings SET time = ?
WHERE lane = ? AND time = ? AND pool NOT IN (SELECT value FROM json_each(?))
"""
_ADD: Final = """
INSERT INTO keepstream_standings (lane, pool, tenant, time, head, active, parked) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_APPEND: Final = "INSERT INTO keepstream_turns (n, arrivals_low, ready, closed, state) VALUES (?, ?, ?, ?, ?)"


def write(connection: Connection, worker_id: str, n: int, decision: Decision) -> Written:
    """Write what was decided, as turn ``n``."""
    moved_pools: dict[int, list[int]] = {}
    for move in decision.moves:
        moved_pools.setdefault(move.old.lane, []).append(move.old.pool)
    moved = _execute(
        connection,
        _MOVE,
        [
            (
                *(new.time, new.head, int(new.active) or None, int(new.parked) or None),
                *(old.lane, old.time, old.pool, old.active),
            )
            for old, new in decision.moves
        ],
    )
    _execute(
        connection,
        _RETIME,
        [
            (retimed.new, retimed.lane, retimed.old, json.dumps(moved_pools.get(retimed.lane, [])))
            for retimed in decision.times
        ],
    )
    _execute(
        connection,
        _ADD,
        [
            (*standing[:5], int(standing.active) or None, int(standing.parked) or None)
            for standing in decision.new_standings
        ],
    )
    picks = [(worker_id, *pick.target, pick.tokens, pick.job.seq) for pick in decision.picks]
    _execute(connection, _START, picks)
    taken = frozenset(
        seq for (seq,) in connection.exec_driver_sql(_LEAVE, (json.dumps([pick.job.seq for pick in decision.picks]),))
    )
    connection.exec_driver_sql(_HANDLED, (json.dumps(decision.arrivals),))
    row = (n, decision.arrivals_low, json.dumps(dict(decision.ready)), json.dumps(decision.closed), decision.state)
    _execute(connection, _APPEND, [row])
    return Written(taken, moved)


def _execute(connection: Connection, statement: str, values: list[tuple[Any, ...]]) -> int:
    """Execute a statement for each of ``values``; return how many rows it changed in all."""
    return connection.exec_driver_sql(statement, values).rowcount if values else 0


_STALE: Final = """
SELECT min(seq), max(seq), count(*) FROM (
  SELECT seq FROM keepstream_arrivals
  WHERE seq < (SELECT arrivals_low FROM keepstream_turns ORDER BY n DESC LIMIT 1)
    AND seq >= max(?, (SELECT arrivals_low - ? FROM keepstream_turns ORDER BY n DESC LIMIT 1))
  ORDER BY seq LIMIT ?
) a
"""
_LOWER: Final = """
INSERT INTO keepstream_turns (n, arrivals_low, ready, closed, state)
SELECT n + 1, min(arrivals_low, ?), ready, closed, state FROM keepstream_turns ORDER BY n DESC LIMIT 1
"""


def lower(connection: Connection, numbers: int, seq_from: int, most: int) -> int:
    """Have the next turn begin with the oldest arrival from ``seq_from`` on that lies below what turns look at.

    At most so far below; return where to go on after as many as one turn handles, or 0.
    """
    first, last, number = connection.exec_driver_sql(_STALE, (seq_from, numbers, most)).one()
    if first is not None:
        connection.exec_driver_sql(_LOWER, (first,))
    return last + 1 if number == most else 0
