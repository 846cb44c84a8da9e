"""The statements by which SQLite stores new jobs: one for each table.

In: rows by table, as ``keepstream.client.queries.new_rows`` has them, and how those start that start at once.  Out:
which jobs are new.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Float, bindparam, delete
from sqlalchemy.dialects import sqlite

from keepstream.tables import arrivals, jobs, now, pools, requests, running, seconds_from_now, waiting
from keepstream_worker.store.claims import HAS_EXPIRED, NOW, Direct, Rows, Start, open_attempts, start
from keepstream_worker.store.pools import add_pools
from keepstream_worker.store.waiting import OwnedJob, note_arrivals
from keepstream_worker.values import AttemptReason, JobKey

_STARTED_AT: Final = {"started_at": now(), "deadline_at": seconds_from_now(bindparam("seconds", type_=Float))}


def _new(**further: Any) -> Any:
    statement = sqlite.insert(jobs).values(created_at=now(), **further).on_conflict_do_nothing()
    return statement.returning(jobs.c.tenant, jobs.c.id, HAS_EXPIRED, NOW)


_NEW: Final = _new()
_STARTED: Final = _new(**_STARTED_AT)
_RUN: Final = running.insert().values(attempt=1, started_at=now(), cancel_requested=False)


def insert(connection: Connection, given: Sequence[tuple[Rows, Direct | None]]) -> list[tuple[str, str, bool, float]]:
    """Insert jobs that have no row yet; return the new ones: tenant, id, whether it has expired, and the moment."""
    new = _insert_jobs(connection, _NEW, [dict(rows[jobs]) for rows, direct in given if direct is None])
    new += _insert_jobs(
        connection,
        _STARTED,
        [
            {**rows[jobs], "seconds": rows[jobs]["total_timeout"] or direct.total_timeout}
            for rows, direct in given
            if direct is not None
        ],
    )
    keys = {JobKey(tenant, job_id) for tenant, job_id, _, _ in new}
    kept = [(rows, direct) for rows, direct in given if _key(rows) in keys]
    if kept:
        connection.execute(requests.insert(), [rows[requests] for rows, _ in kept])
        add_pools(connection, [rows[pools] for rows, _ in kept])
    waits = [rows for rows, direct in kept if direct is None]
    if waits:
        connection.execute(waiting.insert(), [rows[waiting] for rows in waits])
        note_arrivals(connection, [_key(rows) for rows in waits])
    starts = [(rows, direct) for rows, direct in kept if direct is not None]
    _run(connection, [(rows[waiting], direct) for rows, direct in starts])
    open_attempts(connection, [_first(_key(rows), direct) for rows, direct in starts])
    return new


def _key(rows: Rows) -> JobKey:
    return JobKey(rows[jobs]["tenant"], rows[jobs]["id"])


def _insert_jobs(connection: Connection, statement: Any, rows: list[dict[str, Any]]) -> list[Any]:
    return list(connection.execute(statement, rows)) if rows else []


def _run(connection: Connection, starts: Sequence[tuple[Mapping[str, Any], Direct]]) -> None:
    """Insert jobs among those that run; of each, its row among those that wait, or what would be that."""
    if starts:
        connection.execute(
            _RUN, [{**{column: row[column] for column in _KEPT}, **_at(direct)} for row, direct in starts]
        )


#: What a job keeps when it starts.
_KEPT: Final = ("tenant", "job_id", "lane", "pool", "prompt_tokens", "max_tokens")


def _at(direct: Direct) -> dict[str, Any]:
    return {
        "worker_id": direct.worker_id,
        "provider": direct.target.provider,
        "model": direct.target.model,
        "tokens": direct.tokens,
    }


def _first(key: JobKey, direct: Direct) -> Start:
    return Start(OwnedJob(key, 1, direct.worker_id), AttemptReason.FIRST, direct.target, direct.total_timeout)


_LEAVE: Final = delete(waiting).where(waiting.c.seq == bindparam("of_seq"))
_ARRIVED: Final = delete(arrivals).where(arrivals.c.seq == bindparam("of_seq"))


def take(connection: Connection, starts: Sequence[tuple[Any, Direct]]) -> list[tuple[str, str]]:
    """Start jobs that wait, whose rows are given; return which did: all, because nobody else writes now."""
    seqs = [{"of_seq": row.seq} for row, _ in starts]
    connection.execute(_LEAVE, seqs)
    connection.execute(_ARRIVED, seqs)
    _run(connection, [({**row._asdict(), "job_id": row.id}, direct) for row, direct in starts])
    start(connection, [_first(JobKey(row.tenant, row.id), direct) for row, direct in starts])
    return [(row.tenant, row.id) for row, _ in starts]
