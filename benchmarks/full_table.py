"""Tables of a deployment that has run for long: jobs that have ended, by the million, and a backlog that waits.

In: the URL of a migrated database, and how much it is to hold.
Out: rows, made by the database itself, to the measures that ask whether size matters; as a command line, the same for
whoever wants to look around in such a database: ``python -m benchmarks.full_table URL --ended 1000000``.

Rows by the million go into tables without keys, which are made afterwards: that takes a fifth of the time.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    Integer,
    MetaData,
    String,
    Table,
    case,
    cast,
    create_engine,
    func,
    insert,
    literal,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

from benchmarks.wire import completion_body
from keepstream.client.lanes import lane_id
from keepstream.client.queries import new_rows
from keepstream.jobs import Job, parse_job
from keepstream.tables import arrivals, attempts, choices, jobs, pools, requests, seconds_from_now, waiting

_TENANTS: Final = 1000  #: Of the ended jobs.
_DAYS: Final = 30  #: Over which they were created.
_WITH_ANSWER: Final = 10  #: One in so many has its answer; a deployment purges these first.
_FAILED: Final = 50  #: One in so many has failed.
_LARGE: Final = (jobs, requests, attempts, choices)
_ID: Final = "the-id"  #: Replaced in each job's JSON.
_TENANT: Final = "the-tenant"


@dataclass(frozen=True, slots=True)
class Backlog:
    """Jobs that wait."""

    jobs: int
    queue: str
    name: str  #: The ids' and the tenants' beginning.
    tenants: int = 1
    script: Mapping[str, Any] = field(default_factory=lambda: {"deltas": 1})  #: What the scripted provider is to send.
    provider: str = "default"
    job_class: str = "interactive"


def fill(url: str, ended: int) -> None:
    """Add jobs that have ended, with their requests and attempts, and some of their answers; then tidy up."""
    if not ended:
        return
    with _engine(url) as engine, engine.begin() as connection, _without_keys(connection):
        for table, source in _ended_rows(connection, ended).items():
            _insert(connection, table, source)
    _tidy(url)


def add_backlog(url: str, backlog: Backlog) -> None:
    """Add jobs that wait, as clients would have stored them one by one; the next turns find them."""
    example = _example(backlog)
    rows = new_rows(example, backlog.queue)
    with _engine(url) as engine, engine.begin() as connection:
        _add_pool(connection, rows[pools])
        number = _number(connection, backlog.jobs)
        tenant = Table(
            "full_table_tenants",
            MetaData(),
            Column("n", Integer, primary_key=True),
            Column("name", String),
            Column("lane", waiting.c.lane.type),
            prefixes=["TEMPORARY"],
        )
        tenant.create(connection)
        connection.execute(insert(tenant), [_tenant_row(backlog, n) for n in range(backlog.tenants)])
        both = number.join(tenant, tenant.c.n == number.c.i % backlog.tenants)
        job_id = literal(f"{backlog.name}-") + cast(number.c.i, String)
        own: dict[Table, dict[str, ColumnElement[Any]]] = {
            jobs: {"tenant": tenant.c.name, "id": job_id, "created_at": seconds_from_now(literal(0.0))},
            requests: {
                "tenant": tenant.c.name,
                "job_id": job_id,
                "job": func.replace(func.replace(rows[requests]["job"], _ID, job_id), _TENANT, tenant.c.name),
            },
            waiting: {"tenant": tenant.c.name, "job_id": job_id, "lane": tenant.c.lane},
        }
        for table, columns in own.items():
            given = {
                name: literal(value, table.c[name].type) for name, value in rows[table].items() if value is not None
            }
            chosen = given | columns
            source = select(*(value.label(name) for name, value in chosen.items())).select_from(both)
            # In the order of age, which is that of the numbers.
            _insert(connection, table, source.order_by(number.c.i))
        # One arrival for each lane has it looked at from its oldest job on.
        mine = waiting.c.job_id.like(f"{backlog.name}-%")
        oldest = select(func.min(waiting.c.seq).label("seq"), waiting.c.lane, waiting.c.pool, waiting.c.tenant)
        _insert(connection, arrivals, oldest.where(mine).group_by(waiting.c.lane, waiting.c.pool, waiting.c.tenant))
        tenant.drop(connection)
    _tidy(url)


def _ended_rows(connection: Connection, ended: int) -> dict[Table, Any]:
    """Return what to select for each table; those after the first read it."""
    number = _number(connection, ended)
    i = number.c.i
    created = seconds_from_now((i - ended) * literal(_DAYS * 86400.0 / ended))
    finished = seconds_from_now((i - ended) * literal(_DAYS * 86400.0 / ended) + literal(3.0))
    has_failed = i % _FAILED == 0
    is_postgres = connection.dialect.name == "postgresql"
    random_id = cast(func.gen_random_uuid(), String) if is_postgres else func.hex(func.randomblob(16))
    example = new_rows(_example(Backlog(0, "completions", "ended")), "completions")
    job: dict[str, Any] = {
        **{name: literal(value, jobs.c[name].type) for name, value in example[jobs].items() if value is not None},
        "tenant": literal("tenant-") + cast(i % _TENANTS, String),
        "id": random_id,
        "status": _either(has_failed, "failed", "completed"),
        "created_at": created,
        "started_at": created,
        "finished_at": finished,
        "deadline_at": finished,
        "attempt": literal(1),
        "tries": literal(1),
        "output_sha256": literal("0" * 64),
        "prompt_tokens": literal(20),
        "completion_tokens": literal(100),
        "total_tokens": literal(120),
        "usage_source": literal("provider"),
        "terminal_event_id": literal("00000000000000000000000000000000"),
    }
    ids = {"tenant": jobs.c.tenant, "job_id": jobs.c.id}
    request = {
        **ids,
        "job": func.replace(func.replace(example[requests]["job"], _ID, jobs.c.id), _TENANT, jobs.c.tenant),
    }
    attempt = {
        **ids,
        "number": literal(1),
        "reason": literal("first"),
        "outcome": _either(jobs.c.status == "failed", "failed", "finished"),
        "worker_id": literal("worker-1:1:00000000"),
        "provider": jobs.c.provider,
        "model": jobs.c.model,
        "started_at": jobs.c.started_at,
        "finished_at": jobs.c.finished_at,
        "first_token_ms": literal(300.0),
        "http_status": literal(200),
        "prompt_tokens": literal(20),
        "completion_tokens": literal(100),
        "total_tokens": literal(120),
        "usage_source": literal("provider"),
        "usage": literal({"prompt_tokens": 20, "completion_tokens": 100}, attempts.c.usage.type),
    }
    answer = {
        **ids,
        "index": literal(0),
        "content": literal("word " * 60),
        "reasoning": literal(""),
        "refusal": literal(""),
        "finish_reason": literal("stop"),
    }
    has_answer = func.substr(jobs.c.id, 1, 1).in_(["0", "1"]) & (jobs.c.status == "completed")
    terminal = jobs.c.finished_at.is_not(None)
    return {
        jobs: select(*(value.label(name) for name, value in job.items())).select_from(number),
        requests: select(*(value.label(name) for name, value in request.items())).where(terminal),
        attempts: select(*(value.label(name) for name, value in attempt.items())).where(terminal),
        choices: select(*(value.label(name) for name, value in answer.items())).where(terminal & has_answer),
    }


def _either(condition: ColumnElement[bool], one: str, other: str) -> ColumnElement[str]:
    return case((condition, one), else_=other)


def _number(connection: Connection, count: int) -> FromClause:
    """Return the numbers from 1 to ``count`` as a column ``i``."""
    if connection.dialect.name == "postgresql":
        return select(func.generate_series(1, count).column_valued("i").label("i")).subquery("number")
    number = select(literal(1).label("i")).cte("number", recursive=True)
    return number.union_all(select(number.c.i + 1).where(number.c.i < count))


def _insert(connection: Connection, table: Table, source: Any) -> None:
    connection.execute(insert(table).from_select([each.name for each in source.selected_columns], source))


def _example(backlog: Backlog) -> Job:
    return parse_job(
        {
            "v": 2,
            "id": _ID,
            "tenant": _TENANT,
            "provider": backlog.provider,
            "class": backlog.job_class,
            "request": completion_body(dict(backlog.script)),
        }
    )


def _tenant_row(backlog: Backlog, n: int) -> dict[str, Any]:
    name = f"{backlog.name}-tenant-{n}"
    return {"n": n, "name": name, "lane": lane_id(name, backlog.job_class, backlog.queue)}


def _add_pool(connection: Connection, row: dict[str, Any]) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(dialect.insert(pools).values(row).on_conflict_do_nothing())


@contextmanager
def _without_keys(connection: Connection) -> Iterator[None]:
    """Take keys and indexes away, and put them back at the end."""
    if connection.dialect.name != "postgresql":
        indexes = [index for table in _LARGE for index in table.indexes]
        for index in indexes:
            index.drop(connection)
        yield
        for index in indexes:
            index.create(connection)
        return
    connection.execute(text("SET LOCAL maintenance_work_mem = '512MB'; SET LOCAL synchronous_commit = off"))
    names = [table.name for table in _LARGE]
    indexes_made = connection.execute(_INDEXES, {"tables": names}).all()
    constraints = connection.execute(_CONSTRAINTS, {"tables": names}).all()
    for name, _ in indexes_made:
        connection.execute(text(f"DROP INDEX {name}"))
    for table, name, _, _ in constraints:  # foreign keys first
        connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
    yield
    for table, name, kind, definition in reversed(constraints):
        # The rows are known to fit; to look for each one's job would take minutes.
        unchecked = " NOT VALID" if kind == "f" else ""
        connection.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}{unchecked}"))
    for _, definition in indexes_made:
        connection.execute(text(definition))


_INDEXES: Final = text(
    "SELECT i.relname, pg_get_indexdef(x.indexrelid) FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
    "JOIN pg_class t ON t.oid = x.indrelid WHERE t.relname = ANY(:tables) AND NOT x.indisprimary"
)
_CONSTRAINTS: Final = text(
    "SELECT t.relname, c.conname, c.contype::text, pg_get_constraintdef(c.oid) FROM pg_constraint c "
    "JOIN pg_class t ON t.oid = c.conrelid WHERE c.contype IN ('p', 'f') AND (t.relname = ANY(:tables) OR "
    "c.confrelid IN (SELECT oid FROM pg_class WHERE relname = ANY(:tables))) ORDER BY c.contype"
)


@contextmanager
def _engine(url: str, **options: Any) -> Iterator[Engine]:
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        engine.dispose()


def _tidy(url: str) -> None:
    """Leave it as the database's own upkeep would have, some time later."""
    with _engine(url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("VACUUM ANALYZE"))
            connection.execute(text("CHECKPOINT"))
        else:
            connection.execute(text("ANALYZE"))
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


def main() -> None:
    """Fill the database that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_table", description="Fill a migrated database.")
    parser.add_argument("url", help="SQLAlchemy URL of a database that `keepstream migrate` has prepared")
    parser.add_argument("--ended", type=int, default=0, help="jobs that have ended")
    parser.add_argument("--waiting", type=int, default=0, help="jobs that wait")
    parser.add_argument("--tenants", type=int, default=_TENANTS, help="whose jobs wait (default %(default)s)")
    parser.add_argument("--queue", default="backlog", help="where they wait (default %(default)s)")
    arguments = parser.parse_args()
    fill(arguments.url, arguments.ended)
    if arguments.waiting:
        add_backlog(arguments.url, Backlog(arguments.waiting, arguments.queue, "backlog", arguments.tenants))


if __name__ == "__main__":
    main()
