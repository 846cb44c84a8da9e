"""What is old is purged, in steps whose cost does not grow with the table."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, delete, event, func, insert, select, text, update

from keepstream import tables
from keepstream.client import queries
from keepstream.results import JobStatus
from keepstream.tables import attempts, choices, jobs, now, rejected_messages, requests, seconds_from_now
from keepstream_worker.store.retention import purge
from tests.jobs import make_job
from tests.stored_jobs import change, finish, start

Transaction = Callable[[], AbstractContextManager[Connection]]
OLD = 100.0  #: Seconds.
MANY = 100_000


@pytest.fixture
def transaction(engine: Engine) -> Transaction:
    return engine.begin


def add(connection: Connection, job_id: str, tenant: str = "a", age: float = OLD, status: str = "completed") -> None:
    """Add a job that ended some seconds ago, and was made a second before."""
    queries.enqueue(connection, make_job(id=job_id, tenant=tenant))
    start(connection, job_id, tenant)
    finish(connection, job_id, JobStatus(status), tenant)
    change(
        connection,
        job_id,
        tenant,
        created_at=seconds_from_now(-age - 1),
        started_at=seconds_from_now(-age),
        finished_at=seconds_from_now(-age),
    )


def reject(connection: Connection, message_id: str, tenant: str | None = None, age: float = OLD) -> None:
    values = {"id": message_id, "reason": "not JSON", "size": 3, "tenant": tenant}
    connection.execute(insert(rejected_messages).values(rejected_at=seconds_from_now(-age), **values))


def left(transaction: Transaction) -> set[str]:
    with transaction() as connection:
        return set(connection.scalars(select(jobs.c.id))) | set(connection.scalars(select(rejected_messages.c.id)))


def test_old_ended_jobs_are_purged_with_all_that_is_theirs(transaction: Transaction) -> None:
    with transaction() as connection:
        for job_id in ("old", "fresh", "unannounced", "long", "other"):
            add(connection, job_id, "b" if job_id == "other" else "a")
        change(connection, "fresh", "a", finished_at=now())  # though it was made long ago
        connection.execute(insert(tables.announcements).values(tenant="a", job_id="unannounced", ended_at=now()))
        change(connection, "long", "a", status="running", finished_at=None)
        for job_id in ("old", "fresh"):
            output = {"content": "x", "reasoning": "", "refusal": ""}
            connection.execute(choices.insert().values(tenant="a", job_id=job_id, index=0, **output))
            tried = {"reason": "first", "worker_id": "w", "provider": "p", "model": "m", "started_at": now()}
            connection.execute(attempts.insert().values(tenant="a", job_id=job_id, number=1, **tried))
    assert purge(transaction, OLD / 2, "a", count_only=True) == (1, 0)
    assert "old" in left(transaction)
    assert purge(transaction, OLD / 2, "a") == (1, 0)
    assert left(transaction) == {"fresh", "unannounced", "long", "other"}
    with transaction() as connection:
        assert set(connection.scalars(select(requests.c.job_id))) == {"fresh", "unannounced", "long", "other"}
        assert connection.scalars(select(choices.c.job_id)).all() == ["fresh"]
        assert connection.scalars(select(attempts.c.job_id)).all() == ["fresh"]
    assert purge(transaction, OLD / 2) == (1, 0)
    assert purge(transaction, OLD / 2) == (0, 0)


def test_rejected_messages_of_that_age_are_purged(transaction: Transaction) -> None:
    with transaction() as connection:
        reject(connection, "r1")
        reject(connection, "r2", "a")
        reject(connection, "r3", age=0)
    assert purge(transaction, OLD / 2, "a") == (0, 1)
    assert left(transaction) == {"r1", "r3"}
    assert purge(transaction, OLD / 2) == (0, 1)
    assert left(transaction) == {"r3"}


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_every_step_goes_on_where_the_one_before_ended(transaction: Transaction, step: int) -> None:
    with transaction() as connection:
        for tenant in ("a", "b", "c"):
            for number in range(5):  # some of one moment
                add(connection, f"{tenant}-{number}", tenant, age=OLD + number // 2)
        change(connection, "b-1", "b", status="running", finished_at=None)
        for number in range(5):
            reject(connection, f"r-{number}", "ab"[number % 2], age=OLD + number // 2)
        # Equal to the last digit, wherever times are kept as texts.
        moment = connection.scalar(select(func.max(jobs.c.created_at)))
        connection.execute(update(jobs).where(jobs.c.tenant == "c").values(created_at=moment))
    assert purge(transaction, OLD / 2, count_only=True, step=step) == (14, 5)
    assert purge(transaction, OLD / 2, "a", step=step) == (5, 3)
    assert purge(transaction, OLD / 2, step=step) == (9, 2)
    assert left(transaction) == {"b-1"}


def test_a_step_deletes_no_more_than_it_looks_at(transaction: Transaction, engine: Engine) -> None:
    with transaction() as connection:
        for number in range(10):
            add(connection, f"job-{number}")
    sizes: list[int] = []

    def count(connection: Connection) -> None:
        sizes.append(connection.execute(select(func.count()).select_from(jobs)).scalar_one())

    event.listen(engine, "commit", count)
    try:
        assert purge(transaction, OLD / 2, step=3) == (10, 0)
    finally:
        event.remove(engine, "commit", count)
    assert max(before - after for before, after in pairwise(sizes)) == 3


@pytest.mark.slow
def test_a_purge_of_a_large_table_reads_what_it_deletes_and_little_else(
    transaction: Transaction, engine: Engine
) -> None:
    """Of three tenants' jobs it takes some old ones; by age they are neither together nor at one end of the table."""
    postgres = engine.dialect.name == "postgresql"
    with transaction() as connection:
        add(connection, "template", "z")
        fill(connection, postgres=postgres)
        connection.execute(delete(jobs).where(jobs.c.tenant == "z"))
        connection.execute(text("ANALYZE"))
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        counts = purge(transaction, MANY - 2000.0, count_only=True)
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert all(2000 <= count < 4000 for count in counts)  # one more of each with each second since they were made
    assert len(seen) < 30
    with transaction() as connection:
        for statement, parameters in seen:
            if not postgres:
                for *_, step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters):
                    # Messages of one moment are sorted by their ids; the index has the moments in order.
                    ties = "TEMP B-TREE FOR RIGHT PART" in step and "rejected" in statement
                    assert "INDEX" in step or "SUBQUERY" in step or ties, (statement, step)
                continue
            explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
            (plan,) = connection.exec_driver_sql(explain, parameters).scalar_one()
            assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 3000, statement
            assert all(node["Node Type"] != "Sort" for node in nodes(plan["Plan"])), statement


def fill(connection: Connection, *, postgres: bool) -> None:
    """Give three tenants jobs of which one was made each second, and let there be as many rejected messages."""
    numbers = (
        f"SELECT n FROM generate_series(1, {MANY}) AS n"
        if postgres
        else f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {MANY}) SELECT n FROM c"
    )
    made = (
        "statement_timestamp() - n * interval '1 second'"
        if postgres
        else "strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || n || ' seconds')"
    )
    values = {"tenant": "'t' || n % 3", "id": "'job-' || (n * 7919 % 99991) || '-' || n"}
    values |= dict.fromkeys(("created_at", "finished_at"), made)
    columns = [column.name for column in jobs.columns]
    chosen = ", ".join(values.get(name, f't."{name}"') for name in columns)
    names = ", ".join(f'"{name}"' for name in columns)
    connection.execute(
        text(
            f"INSERT INTO keepstream_jobs ({names})"
            f" SELECT {chosen} FROM keepstream_jobs t, ({numbers}) AS numbers WHERE t.tenant = 'z'"
        )
    )
    connection.execute(
        text(
            "INSERT INTO keepstream_rejected_messages (id, rejected_at, reason, size)"
            f" SELECT 'm-' || n, {made}, 'not JSON', 3 FROM ({numbers}) AS numbers"
        )
    )


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)
