"""Statements, explained: what they read, in a database in which nothing or very much is stored.

In: an engine; a connection to an empty database.  Out: the plan of each statement, taken just before it is executed: on
PostgreSQL by doing it and taking it back, so that what it reads is counted; on SQLite without doing it.  Rows.
"""

import json
from typing import Any, Final

from sqlalchemy import JSON, Connection, Engine, event, insert, select, text

from keepstream import tables
from keepstream.client import queries
from keepstream.tables import epoch_seconds, now, rejected_messages, requests, waiting, workers
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
                is_by_key = "IN (SELECT json_extract(" in statement  # the rows of so many keys may be sorted
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


#: Tables from which rows are deleted, or in which they are replaced, while jobs wait, run and end.
_BRIEF: Final = (
    tables.waiting,
    tables.arrivals,
    tables.running,
    tables.announcements,
    tables.standings,
    tables.turns,
    tables.workers,
    tables.leases,
)
DEAD: Final = 5000  #: Rows in each table.


def leave_dead(engine: Engine) -> None:
    """Store very many rows on PostgreSQL and delete them, as in the time for which a transaction is held open.

    Each table's statistics say that it holds hardly anything, so that any index seems good enough.
    """
    with engine.begin() as connection:
        for table in _BRIEF:
            columns = {column.name: _dead_value(column) for column in table.columns}
            names = ", ".join(f'"{name}"' for name in columns)
            values = ", ".join(columns.values())
            series = f"generate_series(1, {DEAD}) AS n ORDER BY md5(n::text)"  # each lies on another page than the next
            connection.execute(text(f"INSERT INTO {table.name} ({names}) SELECT {values} FROM {series}"))
    with engine.begin() as connection:
        for table in _BRIEF:
            connection.execute(table.delete())
        moment = connection.scalar(select(epoch_seconds(now())))
        state = json.dumps({"s": [{}, moment, moment]})  # since when jobs run is known
        newest = {"n": DEAD + 1, "arrivals_low": DEAD + 1, "ready": "{}", "closed": "{}", "state": state}
        connection.execute(tables.turns.insert().values(newest))
        connection.execute(text(f"SELECT setval(pg_get_serial_sequence('keepstream_waiting', 'seq'), {DEAD})"))
    vacuum(engine)


def vacuum(engine: Engine) -> None:
    """Do what PostgreSQL does by itself now and then."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE)"))


def _dead_value(column: Any) -> str:
    """Return an expression of ``n``, the number of a row; rows are of one tenant, provider, queue and lane."""
    if column.name in {"seq", "n", "number", "arrivals_low"}:
        return "n"
    if column.name in {"job_id", "id", "name"}:
        return "'dead-' || n"
    if column.name == "provider":
        return "'default'"
    if column.name == "tenant":
        return "'fresh'"
    if column.name.endswith(("_at", "_due", "until")):
        return "statement_timestamp() - make_interval(secs => 999 - n / 100.0)"
    kind = column.type.python_type
    if kind is bool:
        return "false"
    if kind in {int, float}:
        return "n" if column.name == "time" else "1"
    return "'{}'" if isinstance(column.type, JSON) else "'x'"


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
