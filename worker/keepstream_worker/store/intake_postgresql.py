"""The statement by which PostgreSQL stores new jobs: one for all their rows, because each costs a round trip.

In: rows by table, as ``keepstream.client.queries.new_rows`` has them, and how those start that start at once.  Out:
which jobs are new.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Table

from keepstream.client.groups import array_of, array_values
from keepstream.tables import jobs, pools, requests, waiting
from keepstream_worker.store.claims import Direct, Rows

#: What is said besides of jobs that start at once; null of those that wait.
_START: Final = {
    "worker_id": "text",
    "total_timeout": "float8",
    "provider": "text",
    "model": "text",
    "tokens": "bigint",
}


def insert(
    connection: Connection, given: Sequence[tuple[Rows, Direct | None]]
) -> Iterable[tuple[str, str, bool, float]]:
    """Insert jobs that have no row yet; return the new ones: tenant, id, whether it has expired, and the moment."""
    columns = tuple((table, name) for table, row in given[0][0].items() for name in row)
    values = {
        _name(table, name): array_values(table, name, [rows[table][name] for rows, _ in given])
        for table, name in columns
    }
    starts = [
        (None,) * len(_START)
        if direct is None
        else (direct.worker_id, direct.total_timeout, *direct.target, direct.tokens)
        for _, direct in given
    ]
    values |= {f"at_{name}": list(column) for name, column in zip(_START, zip(*starts, strict=True), strict=True)}
    return connection.exec_driver_sql(_statement(columns), values)


def _name(table: Table, name: str) -> str:
    return f"{table.name}_{name}"


@cache
def _statement(columns: tuple[tuple[Table, str], ...]) -> str:
    names = [_name(table, name) for table, name in columns] + [f"at_{name}" for name in _START]

    def into(table: Table, **further: str) -> str:
        """Return the beginning of an insertion of what was given of a table's columns."""
        given = {name: f"g.{_name(table, name)}" for of, name in columns if of is table} | further
        names = ", ".join(f'"{name}"' for name in given)
        return f"INSERT INTO {table.name} ({names}) SELECT {', '.join(given.values())}"  # of constants

    arrays = ", ".join(
        [array_of(table, name, _name(table, name)) for table, name in columns]
        + [f"%(at_{name})s::{type_}[]" for name, type_ in _START.items()]
    )
    started = "CASE WHEN g.at_worker_id IS NOT NULL THEN statement_timestamp() END"
    seconds = f"coalesce(g.{_name(jobs, 'total_timeout')}, g.at_total_timeout)"
    deadline = f"CASE WHEN g.at_worker_id IS NOT NULL THEN statement_timestamp() + make_interval(secs => {seconds}) END"
    place = ", ".join(f"g.{_name(waiting, name)}" for name in ("tenant", "job_id", "lane", "pool"))
    sizes = ", ".join(f"g.{_name(waiting, name)}" for name in ("prompt_tokens", "max_tokens"))
    return f"""
WITH given AS (
  SELECT * FROM unnest({arrays}) g({", ".join(names)})
), new AS (
  {into(jobs, created_at="statement_timestamp()", started_at=started, deadline_at=deadline)}
  FROM given g ON CONFLICT DO NOTHING RETURNING tenant, id
), kept AS (
  SELECT g.* FROM new n JOIN given g ON g.{_name(jobs, "tenant")} = n.tenant AND g.{_name(jobs, "id")} = n.id
), request AS (
  {into(requests)} FROM kept g
), pool AS (
  {into(pools)} FROM kept g ORDER BY g.{_name(pools, "id")} ON CONFLICT DO NOTHING
), place AS (
  {into(waiting)} FROM kept g WHERE g.at_worker_id IS NULL RETURNING seq, lane, pool, tenant
), arrival AS (
  INSERT INTO keepstream_arrivals (seq, lane, pool, tenant) SELECT * FROM place
), run AS (
  INSERT INTO keepstream_running (tenant, job_id, lane, pool, prompt_tokens, max_tokens, attempt, worker_id, provider,
    model, tokens, started_at, cancel_requested)
  SELECT {place}, {sizes}, 1, g.at_worker_id, g.at_provider, g.at_model, g.at_tokens, statement_timestamp(), false
  FROM kept g WHERE g.at_worker_id IS NOT NULL
), attempt AS (
  INSERT INTO keepstream_attempts (tenant, job_id, number, reason, worker_id, provider, model, started_at)
  SELECT g.{_name(jobs, "tenant")}, g.{_name(jobs, "id")}, 1, g.{_name(jobs, "next_reason")}, g.at_worker_id,
    g.at_provider, g.at_model, statement_timestamp()
  FROM kept g WHERE g.at_worker_id IS NOT NULL
)
SELECT g.{_name(jobs, "tenant")}, g.{_name(jobs, "id")},
  coalesce(g.{_name(jobs, "expires_at")} <= statement_timestamp(), false),
  extract(epoch FROM statement_timestamp())::float8
FROM kept g
"""  # noqa: S608  # of constants


_TAKE: Final = """
WITH given AS (
  SELECT * FROM unnest(%(seqs)s::bigint[], %(worker_ids)s::text[], %(total_timeouts)s::float8[], %(providers)s::text[],
    %(models)s::text[], %(tokens)s::bigint[]) g(seq, worker_id, total_timeout, provider, model, tokens)
), gone AS (
  DELETE FROM keepstream_waiting WHERE seq = ANY(%(seqs)s::bigint[])
  RETURNING seq, tenant, job_id, lane, pool, prompt_tokens, max_tokens
), started AS (
  SELECT * FROM gone JOIN given USING (seq)
), arrived AS (
  DELETE FROM keepstream_arrivals WHERE seq = ANY(ARRAY(SELECT seq FROM gone))
), run AS (
  INSERT INTO keepstream_running (tenant, job_id, lane, pool, prompt_tokens, max_tokens, attempt, worker_id, provider,
    model, tokens, started_at, cancel_requested)
  SELECT tenant, job_id, lane, pool, prompt_tokens, max_tokens, 1, worker_id, provider, model, tokens,
    statement_timestamp(), false
  FROM started
), job AS (
  UPDATE keepstream_jobs j SET status = 'running', attempt = 1, tries = j.tries + 1, started_at = statement_timestamp(),
    deadline_at = statement_timestamp() + make_interval(secs => coalesce(j.total_timeout, s.total_timeout))
  FROM started s WHERE j.tenant = s.tenant AND j.id = s.job_id
), attempt AS (
  INSERT INTO keepstream_attempts (tenant, job_id, number, reason, worker_id, provider, model, started_at)
  SELECT tenant, job_id, 1, 'first', worker_id, provider, model, statement_timestamp() FROM started
)
SELECT tenant, job_id FROM gone
"""


def take(connection: Connection, starts: Sequence[tuple[Any, Direct]]) -> Iterable[tuple[str, str]]:
    """Start jobs that wait, whose rows are given; return which did: a turn may have been quicker."""
    values = {
        "seqs": [row.seq for row, _ in starts],
        "worker_ids": [direct.worker_id for _, direct in starts],
        "total_timeouts": [direct.total_timeout for _, direct in starts],
        "providers": [direct.target.provider for _, direct in starts],
        "models": [direct.target.model for _, direct in starts],
        "tokens": [direct.tokens for _, direct in starts],
    }
    return connection.exec_driver_sql(_TAKE, values)
