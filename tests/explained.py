"""Statements, explained: what they read, in a database in which nothing or very much is stored.

In: an engine; a connection to an empty database.  Out: the plan of each statement, taken just before it is executed: on
PostgreSQL by doing it and taking it back, so that what it reads is counted; on SQLite without doing it.  Rows.
"""

from typing import Any, Final

from sqlalchemy import Connection, Engine, event, insert, text

from keepstream import tables
from keepstream.client import queries
from keepstream.tables import now, rejected_messages, requests, waiting, workers
from tests.jobs import make_job
from tests.stored_jobs import finish, pause, start

MANY: Final = 100_000
RUNNING: Final = 1000
WORKERS: Final = 200
#: SQLite calls it a scan to read the newest rows by the key, of which there is a limit.
BY_THEIR_END: Final = frozenset({"keepstream_turns", "keepstream_waiting"})


def read(plan: Any) -> int:
    """Return how many pages a statement has read on PostgreSQL."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


class Explained(list[tuple[str, Any]]):
    """The statements of an engine, with their plans."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._engine = engine
        event.listen(engine, "before_cursor_execute", self._explain)

    def stop(self) -> None:
        """Explain no more."""
        event.remove(self._engine, "before_cursor_execute", self._explain)

    def _explain(
        self, _connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, many: Any
    ) -> None:
        if statement.lstrip().startswith(("BEGIN", "SET")):
            return
        values = parameters[0] if many and isinstance(parameters, list) else parameters
        other = cursor.connection.cursor()
        if self._is_postgresql:
            other.execute("SAVEPOINT explained")
            other.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", values)
            self.append((statement, other.fetchone()[0][0]["Plan"]))
            other.execute("ROLLBACK TO SAVEPOINT explained")
        else:
            other.execute(f"EXPLAIN QUERY PLAN {statement}", values)
            self.append((statement, [row[-1] for row in other.fetchall()]))

    def check(self, buffers: int, *, scanned: frozenset[str] = BY_THEIR_END, sorts: bool = False) -> None:
        """See that no statement has read more than so many pages, or whole tables but those that are named.

        Nor has any sorted what it read, unless it ``sorts`` what it has added up.
        """
        assert self
        for statement, plan in self:
            if self._is_postgresql:
                assert read(plan) <= buffers, (read(plan), statement, plan)
            else:
                whole = {step.split()[1] for step in plan if step.startswith("SCAN") and "INDEX" not in step}
                whole = {name for name in whole if name.startswith("keepstream_")}
                assert whole <= scanned, (statement, plan)
                is_by_key = "IN (VALUES" in statement  # the rows of so many keys may be sorted
                assert sorts or is_by_key or not any("TEMP B-TREE FOR ORDER BY" in step for step in plan), (
                    statement,
                    plan,
                )
        self.clear()


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
    share = "('w' || length(job_id) || substr(job_id, -1))"
    connection.execute(text(f"UPDATE keepstream_running SET worker_id = {share} WHERE job_id <> 'runs'"))
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
