"""Listings on SQLite and PostgreSQL: what they find, and that they stay cheap in a large table."""

import itertools
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, select, text

from keepstream import tables
from keepstream.client import queries
from keepstream.client.database import make_engine
from keepstream.client.listing import LOOKED_AT, STRETCH, Wanted, list_jobs
from keepstream.results import JobPage, JobStatus, JobSummary
from keepstream.tables import jobs, workers
from tests.jobs import make_job
from tests.stored_jobs import finish, start

MANY: Final = 100_000
NOTHING = {"conversation": "nobody's"}


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def engine_with_tables(database_url: str) -> Engine:
    maker = create_engine(database_url)
    tables.metadata.create_all(maker)
    maker.dispose()
    return make_engine(database_url)


def add(connection: Connection, job_id: str, *, age: float = 0.0, status: str = "completed", **fields: Any) -> None:
    """Add a job that is some seconds old."""
    job = make_job(id=job_id, **fields)
    values = {"status": status, "created_at": tables.seconds_from_now(-age)}
    connection.execute(jobs.insert().values(queries.new_rows(job)[jobs] | values))


def found(connection: Connection, **wanted: Any) -> list[str]:
    return [job.id for job in list_jobs(connection, "default", Wanted(**wanted))]


# -- what is found --


def test_metadata_are_compared_as_text(connection: Connection) -> None:
    add(connection, "text", metadata={"order": "4711", "kind": "a"})
    add(connection, "number", metadata={"order": 4711, "kind": "a"})
    add(connection, "other", metadata={"order": "4712"})
    add(connection, "none")
    add(connection, "odd", metadata={"order": "\x00", "list": [1, {"a": None}], "yes": True})
    assert sorted(found(connection, metadata={"order": "4711"})) == ["number", "text"]
    assert sorted(found(connection, metadata={"order": 4711})) == ["number", "text"]
    assert found(connection, metadata={"order": "4711", "kind": "b"}) == []
    assert found(connection, metadata={"yes": "true", "list": [1, {"a": None}]}) == ["odd"]


def test_jobs_are_found_by_their_time(connection: Connection) -> None:
    for hours in range(5):
        add(connection, f"{hours}-hours-old", age=hours * 3600 + 60)
    clock = connection.scalar(select(tables.now()))
    assert isinstance(clock, datetime)
    some = {"since": clock - timedelta(hours=3), "until": clock - timedelta(hours=1)}
    assert found(connection, **some) == ["1-hours-old", "2-hours-old"]
    assert found(connection, **some, statuses=[JobStatus.COMPLETED]) == ["1-hours-old", "2-hours-old"]


def test_jobs_are_found_by_several_statuses(connection: Connection) -> None:
    for status in JobStatus:
        add(connection, status.value, status=status.value)
    assert set(found(connection, statuses=[JobStatus.FAILED, JobStatus.EXPIRED])) == {"failed", "expired"}


def test_a_listing_shows_the_beginning_of_the_last_user_message(connection: Connection) -> None:
    prompt = "  Why \x00 is\nthe\tsky \ud800 blue?  " + "x" * 1_000_000
    add(
        connection,
        "a",
        messages=[
            {"role": "user", "content": "No"},
            {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": "Because"},
            {"role": "tool", "content": None},
        ],
    )
    (job,) = list_jobs(connection, "default")
    assert job.prompt_start.startswith("Why is the sky blue? xxx")
    assert len(job.prompt_start) == 160


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "x"}], [{"role": "user"}], [{"content": 1}]])
def test_a_request_without_a_user_message_has_no_beginning(connection: Connection, messages: list[Any]) -> None:
    add(connection, "a", messages=messages)
    (job,) = list_jobs(connection, "default")
    assert job.prompt_start == ""


def test_a_listing_says_what_its_jobs_wait_for(connection: Connection) -> None:
    for status in ("queued", "running", "completed"):
        queries.enqueue(connection, make_job(id=status))
    start(connection, "running")
    finish(connection, "completed")
    connection.execute(
        workers.insert().values(
            id="w", started_at=tables.now(), heartbeat_at=tables.now(), lease=60, queue="elsewhere", places=1, running=1
        )
    )
    causes = {job.id: job.waiting_for and job.waiting_for.cause for job in list_jobs(connection, "default")}
    assert causes == {"queued": "worker", "running": None, "completed": None}


def test_jobs_that_come_while_a_listing_walks_shift_nothing(database_url: str) -> None:
    engine = engine_with_tables(database_url)
    there = [f"there-{n:04}" for n in range(STRETCH + 10)]
    with engine.begin() as connection:
        for n, job_id in enumerate(there):
            add(connection, job_id, age=60 + n, status="failed")
    newcomers = itertools.count()

    def come(*_: Any) -> None:
        with engine.begin() as other:
            for _n in range(3):
                add(other, f"came-{next(newcomers)}", status="failed")

    with engine.begin() as connection:
        event.listen(connection, "after_cursor_execute", come)
        page = list_jobs(connection, "default", Wanted([JobStatus.FAILED]), limit=LOOKED_AT)
    engine.dispose()
    assert next(newcomers) >= 6
    assert [job.id for job in page if job.id in there] == there


# -- a large table --


def fill(engine: Engine) -> None:
    """Add many jobs of one tenant: one a second, one in ten thousand of them failed; other tenants have as many."""
    job = make_job(id="template", metadata={"conversation": "4711"})
    with engine.begin() as connection:
        connection.execute(
            jobs.insert().values(queries.new_rows(job)[jobs] | {"created_at": tables.now(), "status": "completed"})
        )
        postgres = connection.dialect.name == "postgresql"
        numbers = (
            f"SELECT n FROM generate_series(1, {MANY}) AS n"
            if postgres
            else f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {MANY}) SELECT n FROM c"
        )
        created = (
            "clock_timestamp() - n * interval '1 second'"
            if postgres
            else "strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || n || ' seconds')"
        )
        values = {
            "id": "'job-' || n",
            "created_at": created,
            "status": "CASE WHEN n % 10000 = 9999 THEN 'failed' ELSE 'completed' END",
        }
        columns = [column.name for column in jobs.columns]
        for tenant in ("'default'", "'tenant-' || n % 7"):
            chosen = ", ".join((values | {"tenant": tenant}).get(name, f"t.{name}") for name in columns)
            connection.execute(
                text(
                    f"INSERT INTO keepstream_jobs ({', '.join(columns)})"
                    f" SELECT {chosen} FROM keepstream_jobs t, ({numbers}) AS numbers WHERE t.id = 'template'"
                )
            )
        connection.execute(jobs.delete().where(jobs.c.id == "template"))
        connection.execute(text("ANALYZE"))


@pytest.mark.slow
def test_whatever_is_asked_a_listing_of_a_large_table_looks_at_a_limited_number_of_rows(database_url: str) -> None:
    engine = engine_with_tables(database_url)
    fill(engine)
    questions: dict[str, dict[str, Any]] = {
        "everything": {},
        "a rare status": {"statuses": [JobStatus.FAILED]},
        "a status that nobody has": {"statuses": [JobStatus.RUNNING]},
        "active jobs": {"statuses": [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.RETRYING]},
        "another model": {"model": "other"},
        "another provider": {"provider": "other"},
        "nobody's metadata": {"metadata": NOTHING},
        "everybody's metadata": {"metadata": {"conversation": "4711"}},
    }
    with engine.begin() as connection:
        clock = connection.scalar(select(tables.now()))
        assert isinstance(clock, datetime)
        times: dict[str, Any] = {"since": clock - timedelta(seconds=MANY / 2), "until": clock - timedelta(seconds=10)}
        for question, wanted in questions.items():
            for limits in ({}, times):
                for before in (None, "job-50"):
                    page = _examined(connection, Wanted(**wanted, **limits), before, question)
                    assert (page.looked_back_to is None) == (question in ("everything", "everybody's metadata"))
    engine.dispose()


def _examined(connection: Connection, wanted: Wanted, before: str | None, question: str) -> JobPage:
    """Make a listing, and look at the plan and the rows of each of its statements."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    try:
        page = list_jobs(connection, "default", wanted, before=before)
    finally:
        event.remove(connection, "before_cursor_execute", note)
    assert len(statements) <= 2 * LOOKED_AT / STRETCH + 3
    for statement, parameters in statements:
        assert "keepstream_requests" not in statement  # they may have megabytes
        if connection.dialect.name == "postgresql":
            (plan,) = connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters
            ).scalar_one()
            for node in _nodes(plan["Plan"]):
                if node.get("Relation Name") == "keepstream_jobs":
                    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                    assert rows <= STRETCH, (question, json.dumps(node))
            assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] <= 2 * STRETCH, question
        else:
            steps = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            for step in steps:
                assert "keepstream_jobs" not in step or "INDEX" in step, (question, steps)
    return page


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


@pytest.mark.slow
def test_a_listing_that_stopped_says_where_and_goes_on_there(database_url: str) -> None:
    engine = engine_with_tables(database_url)
    fill(engine)
    with engine.begin() as connection:
        before = None
        rare: list[JobSummary] = []
        pages = 0
        while True:
            page = list_jobs(connection, "default", Wanted([JobStatus.FAILED]), before=before)
            rare += page
            pages += 1
            assert (page.next_before is None) == (page.looked_back_to is None)
            if page.next_before is None:
                break
            before = page.next_before
    engine.dispose()
    assert [job.id for job in rare] == [f"job-{n}" for n in range(9999, MANY, 10_000)]
    assert pages == MANY // LOOKED_AT + 1
