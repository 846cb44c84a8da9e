"""The statements of a turn on PostgreSQL: few, because each costs a round trip, and all other workers wait meanwhile.

In: what ``keepstream_worker.store.turns`` asks for.  Out: rows as values; what was decided, written by one statement.

They are planned anew each time, when tables may be empty or full, and every row that a turn reads is found by an index
from a known bound on: so the planner is not left the choice of bitmaps, which would never mark the entries of deleted
rows, or of joins that read one side as a whole.  A table that holds few rows may hold very many dead ones, of which the
planner knows nothing: so what is looked for comes from a list, each by itself (``LATERAL``, with an offset or a lock
that keeps it so), and rows that are to be changed come by their number in an array, or by their place (``ctid``).
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection

from keepstream_worker.store.turn_values import Newest, Span, Written
from keepstream_worker.turn import LATE_STARTS, Arrival, Decision, Oldest, Question, Standing, WaitingJob
from keepstream_worker.values import JobKey, Target

#: The wait for the turn is bounded by how many wait for it. Whoever has it and falls silent is cut off soon.
_TAKE: Final = """
SET LOCAL synchronous_commit = off;
SET LOCAL statement_timeout = '60s';
SET LOCAL lock_timeout = '60s';
SET LOCAL idle_in_transaction_session_timeout = '2s';
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SELECT pg_advisory_xact_lock(hashtextextended('keepstream turn ' || current_schema(), 0));
SET LOCAL statement_timeout = '2s';
SET LOCAL lock_timeout = '1s'
"""

_NEWEST: Final = """
SELECT t.n, t.state, extract(epoch FROM statement_timestamp())::float8, (
  SELECT json_agg(json_build_array(seq, lane, pool, tenant, extract(epoch FROM restarted_due)::float8))
  FROM (SELECT * FROM keepstream_arrivals WHERE seq >= coalesce(t.arrivals_low, 0) ORDER BY seq LIMIT %(most)s) a
)::text
FROM (SELECT 1) one LEFT JOIN LATERAL (SELECT * FROM keepstream_turns ORDER BY n DESC LIMIT 1) t ON true
"""


def open_turn(connection: Connection, most_arrivals: int) -> Newest:
    """Wait for the turn; return what the turn before has left, and what has arrived since."""
    connection.exec_driver_sql(_TAKE)
    # A statement of its own: one that locks and reads would see what was before the lock.
    n, state, now, arrivals = connection.exec_driver_sql(_NEWEST, {"most": most_arrivals}).one()
    found = tuple(Arrival(*arrival) for arrival in json.loads(arrivals or "[]"))
    return Newest(n or 0, state or "{}", now, found)


_JOB: Final = "w.seq, w.tenant, w.job_id, w.lane, w.pool, w.attempt, w.prompt_tokens, w.max_tokens"
_RESTARTED: Final = f"""
SELECT {_JOB}, extract(epoch FROM w.restarted_due)::float8, false
FROM unnest(%(pools)s::bigint[]) p(pool) CROSS JOIN LATERAL (
  SELECT * FROM keepstream_waiting
  WHERE pool = p.pool AND restarted_due IS NOT NULL AND tenant <> ALL(%(full_tenants)s::text[])
  ORDER BY restarted_due LIMIT %(most)s
) w
UNION ALL
SELECT {_JOB}, extract(epoch FROM w.restarted_due)::float8, false
FROM unnest(%(seqs)s::bigint[]) a(seq)
CROSS JOIN LATERAL (SELECT * FROM keepstream_waiting WHERE seq = a.seq OFFSET 0) w
"""  # noqa: S608  # of constants


def find_restarted(connection: Connection, question: Question, seqs: Sequence[int]) -> list[WaitingJob]:
    """Return jobs that were started before: the first of the pools asked for, and those of ``seqs``."""
    values = {
        "pools": list(question.restarted_pools),
        "full_tenants": list(question.full_tenants),
        "most": question.restarted + 1,
        "seqs": list(seqs),
    }
    return _jobs(connection.exec_driver_sql(_RESTARTED, values))


_RESTARTED_POOLS: Final = """
SELECT p.pool FROM unnest(%(pools)s::bigint[]) p(pool) CROSS JOIN LATERAL (
  SELECT 1 FROM keepstream_waiting WHERE pool = p.pool AND restarted_due IS NOT NULL ORDER BY restarted_due LIMIT 1
) w
"""


def find_restarted_pools(connection: Connection, pools: Sequence[int]) -> frozenset[int]:
    """Return those of the pools in which jobs wait that were started before."""
    return frozenset(pool for (pool,) in connection.exec_driver_sql(_RESTARTED_POOLS, {"pools": list(pools)}))


def _jobs(rows: Iterable[Any]) -> list[WaitingJob]:
    return [WaitingJob(seq, JobKey(tenant, job_id), *rest) for seq, tenant, job_id, *rest in rows]


_STANDING: Final = "s.lane, s.pool, s.tenant, s.time, s.head, s.active IS NOT NULL, s.parked IS NOT NULL"
_OF_POOLS: Final = f"""
SELECT {_STANDING}
FROM unnest(%(pools)s::bigint[], %(lows)s::float8[]) p(pool, low) CROSS JOIN LATERAL (
  SELECT * FROM keepstream_standings
  WHERE pool = p.pool AND active IS NOT NULL AND time >= p.low ORDER BY time, lane LIMIT %(most)s
) s
"""  # noqa: S608  # of constants
_OF_LANES: Final = f"""
SELECT {_STANDING}
FROM unnest(%(lanes)s::bigint[], %(times)s::float8[]) l(lane, low)
CROSS JOIN LATERAL (SELECT * FROM keepstream_standings WHERE lane = l.lane AND time >= l.low OFFSET 0) s
"""  # noqa: S608  # of constants
#: Of a lane that waits those with its time, which is the highest: below it, down to where standings mean nothing, there
#: may be all versions of the last hundred thousand tokens. If the highest does not wait, it may be that of a job which
#: took less than was thought, and another one waits below.
_OF_TOLD: Final = f"""
SELECT {_STANDING}
FROM (
  SELECT l.lane, CASE WHEN t.active IS NULL AND t.parked IS NULL THEN l.low ELSE t.time END AS low
  FROM unnest(%(told)s::bigint[], %(told_times)s::float8[]) l(lane, low) CROSS JOIN LATERAL (
    SELECT * FROM keepstream_standings WHERE lane = l.lane AND time >= l.low ORDER BY time DESC LIMIT 1
  ) t OFFSET 0
) l CROSS JOIN LATERAL (SELECT * FROM keepstream_standings WHERE lane = l.lane AND time >= l.low OFFSET 0) s
"""  # noqa: S608  # of constants
_OF_TENANTS: Final = f"""
SELECT {_STANDING}
FROM unnest(%(tenants)s::text[]) t(tenant)
CROSS JOIN LATERAL (SELECT * FROM keepstream_standings WHERE tenant = t.tenant AND parked IS NOT NULL OFFSET 0) s
"""  # noqa: S608  # of constants


def find_standings(connection: Connection, question: Question, lanes: Sequence[tuple[int, float]]) -> list[Standing]:
    """Return standings: the first of the pools asked for, by pool and time; of lanes; of parked tenants.

    Of the lanes asked for at least those that wait, if any does, or else the highest; of ``lanes`` all.
    """
    parts = []
    values: dict[str, Any] = {}
    if question.pools:
        parts.append(_OF_POOLS)
        values["pools"], values["lows"] = (list(column) for column in zip(*question.pools, strict=True))
        values["most"] = question.standings
    if question.lanes:
        parts.append(_OF_TOLD)
        values["told"], values["told_times"] = (list(column) for column in zip(*question.lanes, strict=True))
    if lanes:
        parts.append(_OF_LANES)
        values["lanes"], values["times"] = (list(column) for column in zip(*lanes, strict=True))
    if question.parked_tenants:
        parts.append(_OF_TENANTS)
        values["tenants"] = list(question.parked_tenants)
    return [Standing(*row) for row in connection.exec_driver_sql("UNION ALL".join(parts), values)]


#: By lane, pool and seq, and not by seq alone, which the key could serve as well, with the jobs of all other lanes.
_NEW_JOBS: Final = f"""
SELECT {_JOB}, NULL::float8, coalesce(w.expires_at <= statement_timestamp(), false)
FROM unnest(%(lanes)s::bigint[], %(pools)s::bigint[], %(lows)s::bigint[], %(most)s::bigint[]) s(lane, pool, low, most)
CROSS JOIN LATERAL (
  SELECT * FROM keepstream_waiting
  WHERE restarted_due IS NULL AND (lane, pool, seq) >= (s.lane, s.pool, s.low) AND (lane, pool) <= (s.lane, s.pool)
  ORDER BY lane, pool, seq LIMIT s.most
) w
"""  # noqa: S608  # of constants


def find_jobs(connection: Connection, spans: Sequence[Span]) -> list[WaitingJob]:
    """Return new jobs, oldest first."""
    values = {
        "lanes": [span.lane for span in spans],
        "pools": [span.pool for span in spans],
        "lows": [span.low for span in spans],
        "most": [span.most + 1 for span in spans],
    }
    return _jobs(connection.exec_driver_sql(_NEW_JOBS, values))


#: The pair is compared with a pair because only the index of both can do that: that of the moments would do, too, if
#: one provider's oldest job were not so much older than another's.
_RUNNING: Final = """
unnest(%(providers)s::text[], %(moments)s::float8[]) p(provider, oldest) CROSS JOIN LATERAL (
  SELECT * FROM keepstream_running
  WHERE provider = p.provider AND (provider, started_at) >= (p.provider, to_timestamp(p.oldest)) OFFSET 0
) r"""
_COUNT_TARGETS: Final = f"""
SELECT r.provider, r.model, count(*) FROM {_RUNNING} GROUP BY r.provider, r.model
"""  # noqa: S608  # of constants
#: Tenants are looked for among all that run: the key, which begins with theirs, holds entries of all jobs that ended
#: while a transaction was held open.
_COUNT_TENANTS: Final = f"""
SELECT r.tenant, count(*) AS number FROM (
  SELECT r.tenant FROM {_RUNNING}
  UNION ALL
  SELECT o.tenant FROM (
    SELECT tenant, provider FROM keepstream_running WHERE started_at >= to_timestamp(%(others)s::float8) OFFSET 0
  ) o WHERE o.provider <> ALL(%(providers)s::text[])
) r WHERE r.tenant = ANY(%(tenants)s::text[]) GROUP BY r.tenant
"""  # noqa: S608  # of constants
#: From one provider to the next, the first entry of each that is no deleted job's.
_OLDEST: Final = """
WITH RECURSIVE oldest AS (
  (SELECT provider, started_at FROM keepstream_running ORDER BY provider, started_at LIMIT 1)
  UNION ALL
  SELECT r.* FROM oldest o CROSS JOIN LATERAL (
    SELECT provider, started_at FROM keepstream_running
    WHERE provider > o.provider ORDER BY provider, started_at LIMIT 1
  ) r
)
SELECT provider, extract(epoch FROM started_at)::float8 FROM oldest
UNION ALL SELECT NULL, extract(epoch FROM statement_timestamp())::float8
"""


def count_running(
    connection: Connection, providers: Sequence[str], tenants: Sequence[str], oldest: Oldest
) -> tuple[dict[Target, int], dict[str, int]]:
    """Return how many jobs run, none of which was started before ``oldest``, by target and by tenant."""
    targets: dict[Target, int] = {}
    if providers:
        moments = [oldest.by_provider.get(provider, oldest.others) for provider in providers]
        rows = connection.exec_driver_sql(_COUNT_TARGETS, {"providers": list(providers), "moments": moments})
        targets = {Target(provider, model): count for provider, model, count in rows}
    counts: dict[str, int] = {}
    if tenants:
        values = {
            "providers": list(oldest.by_provider),
            "moments": list(oldest.by_provider.values()),
            "others": oldest.others,
            "tenants": list(tenants),
        }
        rows = connection.exec_driver_sql(_COUNT_TENANTS, values)
        counts = {row.tenant: row.number for row in rows}
    return targets, counts


def find_oldest(connection: Connection) -> Oldest:
    """Return since when the jobs were started that run.

    It reads what has ended before them while a transaction was held open.
    """
    moments = {provider: moment - LATE_STARTS for provider, moment in connection.exec_driver_sql(_OLDEST)}
    return Oldest(moments, moments.pop(None))


#: The parts of the writing statement, each used if there is something to write: planning all of them takes longer than
#: executing those that are needed.
#:
#: A waiting job that somebody else has locked is about to be ended, or started: it is left out, and found again by the
#: note of its arrival if that is taken back. A note that is there may be locked too; inserting it again would wait.
_PICK: Final = """
pick AS (
  SELECT * FROM unnest(%(seqs)s::bigint[], %(providers)s::text[], %(models)s::text[], %(tokens)s::bigint[])
    p(seq, provider, model, tokens)
), free AS (
  SELECT w.seq FROM pick
  CROSS JOIN LATERAL (SELECT seq FROM keepstream_waiting WHERE seq = pick.seq FOR UPDATE SKIP LOCKED) w
), gone AS (
  DELETE FROM keepstream_waiting w WHERE w.seq = ANY(ARRAY(SELECT seq FROM free))
  RETURNING w.seq, w.tenant, w.job_id, w.lane, w.pool, w.attempt, w.prompt_tokens, w.max_tokens
), started AS (
  INSERT INTO keepstream_running (tenant, job_id, attempt, worker_id, provider, model, lane, pool, tokens,
    prompt_tokens, max_tokens, started_at, cancel_requested)
  SELECT g.tenant, g.job_id, g.attempt + 1, %(worker_id)s, p.provider, p.model, g.lane, g.pool, p.tokens,
    g.prompt_tokens, g.max_tokens, statement_timestamp(), false
  FROM gone g JOIN pick p ON p.seq = g.seq
), held AS (
  SELECT w.seq, w.lane, w.pool, w.tenant, w.restarted_due
  FROM (SELECT seq FROM pick WHERE seq NOT IN (SELECT seq FROM free) OFFSET 0) p
  CROSS JOIN LATERAL (SELECT * FROM keepstream_waiting WHERE seq = p.seq OFFSET 0) w
), noted AS (
  INSERT INTO keepstream_arrivals (seq, lane, pool, tenant, restarted_due)
  SELECT * FROM held h WHERE NOT EXISTS (SELECT FROM keepstream_arrivals a WHERE a.seq = h.seq)
)"""
_NO_PICK: Final = """
gone AS (SELECT 0::bigint AS seq WHERE false), held AS (SELECT 0::bigint AS seq WHERE false)"""
#: An arrival that somebody has locked goes with its job.
_ARRIVED: Final = """
handled AS (
  SELECT a.seq FROM unnest(%(arrivals)s::bigint[]) h(seq)
  CROSS JOIN LATERAL (SELECT seq FROM keepstream_arrivals WHERE seq = h.seq FOR UPDATE SKIP LOCKED) a
  WHERE h.seq NOT IN (SELECT seq FROM held)
), arrived AS (
  DELETE FROM keepstream_arrivals WHERE seq = ANY(ARRAY(SELECT seq FROM handled))
)"""
_MOVE: Final = """
move AS (
  SELECT * FROM unnest(%(lanes)s::bigint[], %(pools)s::bigint[], %(old_times)s::float8[], %(was_active)s::bool[],
      %(times)s::float8[], %(heads)s::bigint[], %(active)s::int[], %(parked)s::int[])
    m(lane, pool, old_time, was_active, time, head, active, parked)
), met AS (
  SELECT s.place, m.* FROM move m CROSS JOIN LATERAL (
    SELECT ctid AS place FROM keepstream_standings
    WHERE lane = m.lane AND time = m.old_time AND pool = m.pool AND (active IS NOT NULL) = m.was_active OFFSET 0
  ) s
), moved AS (
  UPDATE keepstream_standings s SET time = m.time, head = m.head, active = m.active, parked = m.parked
  FROM met m WHERE s.ctid = m.place RETURNING 1
)"""
_NO_MOVE: Final = """
move AS (SELECT 0::bigint AS lane, 0::bigint AS pool WHERE false), moved AS (SELECT 1 WHERE false)"""
_RETIME: Final = """
other AS (
  SELECT s.place, r.time
  FROM unnest(%(retimed_lanes)s::bigint[], %(retimed_from)s::float8[], %(retimed_to)s::float8[]) r(lane, old_time, time)
  CROSS JOIN LATERAL (
    SELECT ctid AS place, lane, pool FROM keepstream_standings WHERE lane = r.lane AND time = r.old_time OFFSET 0
  ) s
  WHERE NOT EXISTS (SELECT FROM move m WHERE m.lane = s.lane AND m.pool = s.pool)
), retimed AS (
  UPDATE keepstream_standings s SET time = o.time FROM other o WHERE s.ctid = o.place
)"""
_ADD: Final = """
added AS (
  INSERT INTO keepstream_standings (lane, pool, tenant, time, head, active, parked)
  SELECT * FROM unnest(%(new_lanes)s::bigint[], %(new_pools)s::bigint[], %(new_tenants)s::text[],
    %(new_times)s::float8[], %(new_heads)s::bigint[], %(new_active)s::int[], %(new_parked)s::int[])
)"""
_APPEND: Final = """
appended AS (
  INSERT INTO keepstream_turns (n, arrivals_low, ready, closed, state)
  SELECT %(n)s, least(%(arrivals_low)s, (SELECT min(seq) FROM held)), %(ready)s, %(closed)s, %(state)s
)
SELECT (SELECT array_agg(seq) FROM gone), (SELECT count(*) FROM moved)
"""


@cache
def _write_statement(*, picks: bool, arrivals: bool, moves: bool, times: bool, new: bool) -> str:
    parts = [
        _PICK if picks else _NO_PICK,
        _ARRIVED if arrivals else None,
        _MOVE if moves else _NO_MOVE,
        _RETIME if times else None,
        _ADD if new else None,
        _APPEND,
    ]
    return "WITH" + ",".join(part for part in parts if part is not None)


def write(connection: Connection, worker_id: str, n: int, decision: Decision) -> Written:
    """Write what was decided, as turn ``n``."""
    statement = _write_statement(
        picks=bool(decision.picks),
        arrivals=bool(decision.arrivals),
        moves=bool(decision.moves),
        times=bool(decision.times),
        new=bool(decision.new_standings),
    )
    taken, moved = connection.exec_driver_sql(statement, _values(worker_id, n, decision)).one()
    return Written(frozenset(taken or ()), moved)


def _values(worker_id: str, n: int, decision: Decision) -> dict[str, Any]:
    values: dict[str, Any] = {
        "n": n,
        "arrivals_low": decision.arrivals_low,
        "ready": json.dumps(dict(decision.ready)),
        "closed": json.dumps(decision.closed),
        "state": decision.state,
    }
    if decision.picks:
        values |= {
            "worker_id": worker_id,
            "seqs": [pick.job.seq for pick in decision.picks],
            "providers": [pick.target.provider for pick in decision.picks],
            "models": [pick.target.model for pick in decision.picks],
            "tokens": [pick.tokens for pick in decision.picks],
        }
    if decision.arrivals:
        values["arrivals"] = list(decision.arrivals)
    if decision.moves:
        values |= {
            "lanes": [move.old.lane for move in decision.moves],
            "pools": [move.old.pool for move in decision.moves],
            "old_times": [move.old.time for move in decision.moves],
            "was_active": [move.old.active for move in decision.moves],
            "times": [move.new.time for move in decision.moves],
            "heads": [move.new.head for move in decision.moves],
            "active": [int(move.new.active) or None for move in decision.moves],
            "parked": [int(move.new.parked) or None for move in decision.moves],
        }
    if decision.times:
        values |= {
            "retimed_lanes": [retimed.lane for retimed in decision.times],
            "retimed_from": [retimed.old for retimed in decision.times],
            "retimed_to": [retimed.new for retimed in decision.times],
        }
    if decision.new_standings:
        values |= {
            "new_lanes": [standing.lane for standing in decision.new_standings],
            "new_pools": [standing.pool for standing in decision.new_standings],
            "new_tenants": [standing.tenant for standing in decision.new_standings],
            "new_times": [standing.time for standing in decision.new_standings],
            "new_heads": [standing.head for standing in decision.new_standings],
            "new_active": [int(standing.active) or None for standing in decision.new_standings],
            "new_parked": [int(standing.parked) or None for standing in decision.new_standings],
        }
    return values


_STALE: Final = """
SELECT min(seq), max(seq), count(*) FROM (
  SELECT seq FROM keepstream_arrivals
  WHERE seq < (SELECT arrivals_low FROM keepstream_turns ORDER BY n DESC LIMIT 1)
    AND seq >= (SELECT arrivals_low - %(numbers)s::bigint FROM keepstream_turns ORDER BY n DESC LIMIT 1)
    AND seq >= %(seq_from)s::bigint
  ORDER BY seq LIMIT %(most)s
) a
"""
_LOWER: Final = """
INSERT INTO keepstream_turns (n, arrivals_low, ready, closed, state)
SELECT n + 1, least(arrivals_low, %(seq)s), ready, closed, state FROM keepstream_turns ORDER BY n DESC LIMIT 1
"""


def lower(connection: Connection, numbers: int, seq_from: int, most: int) -> int:
    """Have the next turn begin with the oldest arrival from ``seq_from`` on that lies below what turns look at.

    At most so far below; return where to go on after as many as one turn handles, or 0.
    """
    values = {"numbers": numbers, "seq_from": seq_from, "most": most}
    first, last, number = connection.exec_driver_sql(_STALE, values).one()
    if first is not None:
        connection.exec_driver_sql(_TAKE)
        connection.exec_driver_sql(_LOWER, {"seq": first})
    return last + 1 if number == most else 0
