"""What a client asks costs as much with 100,000 jobs that ended and as many that wait as with none.

Each statement is explained just before it is executed: on PostgreSQL by doing it and taking it back, so that what it
reads is counted; on SQLite by its plan.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text

from keepstream import tables
from keepstream.client import queries
from keepstream.client.database import make_engine
from keepstream.client.listing import list_jobs
from keepstream.results import JobStatus
from keepstream.tables import metadata, now, rejected_messages, requests, waiting, workers
from keepstream_worker.store import activity, inspection
from tests.jobs import make_job
from tests.stored_jobs import change, finish, pause, start

MANY: Final = 100_000
RUNNING: Final = 1000
WORKERS: Final = 200
#: SQLite calls it a scan to read the newest rows by the key, of which there is a limit.
BY_THEIR_END: Final = frozenset({"keepstream_turns", "keepstream_waiting"})
PAGE: Final = 50


class Explained(list[tuple[str, Any]]):
    """The statements of an engine, with their plans."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._is_postgresql = engine.dialect.name == "postgresql"
        event.listen(engine, "before_cursor_execute", self._explain)

    def _explain(
        self, _connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, many: Any
    ) -> None:
        if statement.startswith("BEGIN"):
            return
        values = parameters[0] if many else parameters
        other = cursor.connection.cursor()
        if self._is_postgresql:
            other.execute("SAVEPOINT explained")
            other.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", values)
            self.append((statement, other.fetchone()[0][0]["Plan"]))
            other.execute("ROLLBACK TO SAVEPOINT explained")
        else:
            other.execute(f"EXPLAIN QUERY PLAN {statement}", values)
            self.append((statement, [row[-1] for row in other.fetchall()]))

    def check(self, buffers: int, *, scanned: frozenset[str] = BY_THEIR_END) -> None:
        """See that no statement has read more than so many pages, or whole tables but those that are named."""
        assert self
        for statement, plan in self:
            if self._is_postgresql:
                read = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
                assert read <= buffers, (read, statement, plan)
            else:
                whole = {step.split()[1] for step in plan if step.startswith("SCAN") and "INDEX" not in step}
                whole = {name for name in whole if name.startswith("keepstream_")}
                assert whole <= scanned, (statement, plan)
                assert not any("TEMP B-TREE FOR ORDER BY" in step for step in plan), (statement, plan)
        self.clear()


@pytest.fixture(params=["empty", pytest.param("full", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, database_url: str) -> Iterator[Engine]:
    """A database in which nothing or very much is stored; a client's engine to it."""
    maker = create_engine(database_url)
    metadata.create_all(maker)
    if request.param == "full":
        with make_engine(database_url).begin() as connection:
            fill(connection)
            connection.execute(text("ANALYZE"))
    maker.dispose()
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def fill(connection: Connection) -> None:
    """Let many jobs of several tenants have ended, wait or run, and many messages be rejected."""
    for job_id in ("ended", "waits", "runs", "retries"):
        queries.enqueue(connection, make_job(id=job_id))
    start(connection, "ended")
    finish(connection, "ended")
    start(connection, "runs")
    start(connection, "retries")
    pause(connection, "retries", seconds=-60)
    _multiply(connection, tables.jobs, "id", {"ended": MANY, "waits": MANY, "runs": RUNNING, "retries": RUNNING})
    _multiply(connection, requests, "job_id", {"ended": MANY, "waits": MANY, "runs": RUNNING, "retries": RUNNING})
    _multiply(connection, waiting, "job_id", {"waits": MANY, "retries": RUNNING})
    _multiply(connection, tables.running, "job_id", {"runs": RUNNING})
    sign = {"started_at": now(), "heartbeat_at": now(), "lease": 60, "queue": "completions", "places": 9, "running": 9}
    for number in range(WORKERS):
        connection.execute(insert(workers).values(id=f"w{number}", **sign))
    message = {"rejected_at": now(), "reason": "not JSON", "size": 3}
    connection.execute(insert(rejected_messages).values(id="ended", **message))
    _multiply(connection, rejected_messages, "id", {"ended": MANY})
    turn = {"arrivals_low": 0, "ready": "{}", "closed": "{}", "state": "{}"}
    connection.execute(insert(tables.turns).values([{"n": number, **turn} for number in range(1, 1000)]))


def _multiply(connection: Connection, table: Any, key: str, numbers: dict[str, int]) -> None:
    """Copy rows; every tenth copy is the default tenant's, the others belong to ten others."""
    for job_id, many in numbers.items():
        series = (
            f"SELECT n FROM generate_series(1, {many}) AS n"
            if connection.dialect.name == "postgresql"
            else f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {many}) SELECT n FROM c"
        )
        values = {key: f"'{job_id}-' || n", "tenant": "CASE WHEN n % 10 = 0 THEN 'default' ELSE 't' || n % 10 END"}
        columns = [column.name for column in table.columns if column.name != "seq"]
        chosen = ", ".join(values.get(name, f't."{name}"') for name in columns)
        names = ", ".join(f'"{name}"' for name in columns)
        connection.execute(
            text(
                f"INSERT INTO {table.name} ({names}) SELECT {chosen} FROM {table.name} AS t, ({series}) AS numbers"
                f" WHERE t.{key} = '{job_id}'"
            )
        )


def test_a_client_reads_and_locks_a_few_pages(engine: Engine) -> None:
    """Enqueue, again, look, cancel in each state, retry."""
    explained = Explained(engine)

    def do(call: Callable[..., Any], *arguments: Any, buffers: int = 60, **keywords: Any) -> Any:
        with engine.begin() as connection:
            explained.clear()
            answer = call(connection, *arguments, **keywords)
        explained.check(buffers)
        return answer

    job = make_job(id="new", expires_at="2990-01-01T00:00:00Z", max_tokens=5)
    assert do(queries.enqueue, job)
    assert not do(queries.enqueue, job)
    for whole in (True, False):
        assert do(queries.get, "default", "new", whole=whole).status is JobStatus.QUEUED
    assert do(queries.get_summary, "default", "new").waiting_for is not None
    assert do(queries.get_for_retry, "default", "new").job == job
    assert do(queries.cancel, "default", "new") is JobStatus.CANCELLED
    assert do(queries.cancel, "default", "new") is JobStatus.CANCELLED
    assert do(queries.cancel, "default", "nothing") is None
    with engine.begin() as connection:
        for job_id in ("running", "pausing"):
            queries.enqueue(connection, make_job(id=job_id))
            start(connection, job_id)
        pause(connection, "pausing", seconds=60)
    for job_id, status in (("running", JobStatus.RUNNING), ("pausing", JobStatus.CANCELLED)):
        assert do(queries.get_summary, "default", job_id) is not None
        assert do(queries.cancel, "default", job_id) is status


def test_a_page_of_waiting_jobs_reads_as_much_as_its_jobs_need(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(PAGE):
            queries.enqueue(connection, make_job(id=f"page-{number}"))
        change(connection, "page-0", metadata={})
    explained = Explained(engine)
    with engine.begin() as connection:
        page = list_jobs(connection, "default", limit=PAGE)
        found = queries.get_summaries(connection, "default", [job.id for job in page])
    assert [job.waiting_for for job in page] == [found[job.id].waiting_for for job in page]
    assert {job.waiting_for and job.waiting_for.cause for job in page} <= {"worker", "pickup", "place"}
    assert len(explained) < 20
    explained.check(PAGE * 6)


def test_an_overview_counts_no_further_than_it_says(engine: Engine) -> None:
    explained = Explained(engine)
    with engine.begin() as connection:
        overview = inspection.overview(connection, 60.0)
        if overview.workers:
            assert (overview.backlog.queued, overview.rejected) == (inspection.COUNTED + 1,) * 2
            assert (overview.backlog.running, overview.backlog.retrying) == (RUNNING + 1, RUNNING + 1)
        inspection.rejected(connection, 50)
        seen = activity.look(connection)
        assert seen.more_waiting == bool(overview.workers)
        assert connection.scalar(select(waiting.c.seq).limit(1)) is None or overview.backlog.oldest_wait is not None
    # It stops where it has counted enough, so a walk through what waits or runs is as good as one by an index.
    explained.check(600, scanned=BY_THEIR_END | {"keepstream_running", "keepstream_workers", "keepstream_pools"})
