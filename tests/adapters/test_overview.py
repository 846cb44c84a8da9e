"""What operators look at, of all tenants, on both databases, in empty tables and in full ones."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text

from keepstream import tables
from keepstream.client import overview, queries
from keepstream.client.database import make_engine
from keepstream.client.listing import LOOKED_AT, STRETCH, Place, Wanted, list_all_jobs, list_jobs
from keepstream.errors import JobNotFoundError
from keepstream.results import JobStatus
from keepstream.tables import epoch_seconds, minutes, now, rejected_messages
from tests.explained import BY_THEIR_END, Explained, fill
from tests.jobs import make_job
from tests.stored_jobs import change

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
#: What the console can look for, each by itself and all at once; nothing, or nearly everything, is like that.
EACH: list[dict[str, Any]] = [
    {"statuses": [JobStatus.EXPIRED]},
    {"statuses": [JobStatus.COMPLETED, JobStatus.QUEUED]},
    {"model": "no such model"},
    {"provider": "nobody"},
    {"error_code": "rate_limited"},
    {"containing": "nothing is like this"},
    {"since": LONG_AGO, "provider": "nobody"},
    {"until": LONG_AGO},
    {"until": datetime(2100, 1, 1, tzinfo=UTC), "model": "no such model"},
]
FILTERS = [*EACH, {name: value for filters in EACH for name, value in filters.items()} | {"until": None}]
FIRST_OUTPUTS = {f"first_output_{number}": 0 for number in range(9)}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    maker = create_engine(database_url)
    tables.metadata.create_all(maker)
    maker.dispose()
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        yield connection


def add(connection: Connection, tenant: str, job_id: str, age: float = 0.0, **columns: object) -> None:
    queries.enqueue(connection, make_job(id=job_id, tenant=tenant))
    made_at = datetime(2026, 5, 4, tzinfo=UTC) - timedelta(seconds=age)
    change(connection, job_id, tenant, created_at=made_at, **columns)


def test_jobs_of_all_tenants_are_listed_by_age(connection: Connection) -> None:
    for number in range(12):
        add(connection, f"t{number % 3}", f"job-{number}", age=number)
    seen: list[tuple[str, str]] = []
    before = None
    for _ in range(5):
        page, before = list_all_jobs(connection, before=before, limit=5)
        seen += [(job.tenant, job.id) for job in page]
        if before is None:
            break
    assert seen == [(f"t{number % 3}", f"job-{number}") for number in range(12)]


def test_jobs_of_one_moment_and_one_name_are_told_apart_by_tenant(connection: Connection) -> None:
    for tenant in ("a", "b", "c"):
        add(connection, tenant, "same")
    seen: list[str] = []
    before = None
    for _ in range(3):
        page, before = list_all_jobs(connection, before=before, limit=1)
        seen += [job.tenant for job in page]
    assert seen == ["c", "b", "a"]
    assert [job.tenant for job in list_all_jobs(connection, limit=5)[0]] == seen


def test_each_job_says_what_it_waits_for_whatever_its_tenant(connection: Connection) -> None:
    for tenant in ("a", "b"):
        add(connection, tenant, "same")
    page, _ = list_all_jobs(connection)
    assert [job.waiting_for and job.waiting_for.cause for job in page] == ["worker", "worker"]
    add(connection, "b", "ended", status="failed")
    assert {job.id for job in list_all_jobs(connection, Wanted([JobStatus.FAILED]))[0]} == {"ended"}


def test_jobs_are_found_by_words_of_their_prompt(connection: Connection) -> None:
    add(connection, "a", "rhine", prompt_start="Tell me of the RHINE, 100 %")
    add(connection, "b", "danube", prompt_start="Tell me of the Danube")
    for words, found in (("rhine", ["rhine"]), ("100 %", ["rhine"]), ("tell me", ["rhine", "danube"]), ("_", [])):
        page, _ = list_all_jobs(connection, Wanted(containing=words))
        assert sorted(job.id for job in page) == sorted(found), words
    assert [job.id for job in list_jobs(connection, "b", Wanted(containing="danube"))] == ["danube"]


def test_a_filtered_listing_of_all_tenants_stops_and_goes_on(connection: Connection) -> None:
    add(connection, "a", "needle", age=1e6, status="failed", prompt_start="needle")
    add(connection, "b", "hay")
    rows = connection.execute(select(tables.jobs).where(tables.jobs.c.id == "hay")).mappings().one()
    hay = [
        {**rows, "id": f"hay-{number}", "status": "completed", "created_at": datetime(2026, 5, 4, tzinfo=UTC)}
        for number in range(LOOKED_AT + STRETCH)
    ]
    connection.execute(insert(tables.jobs), hay)
    page, before = list_all_jobs(connection, Wanted(containing="needle"))
    assert not page
    assert page.looked_back_to is not None
    assert before is not None
    page, before = list_all_jobs(connection, Wanted(containing="needle"), before=before)
    assert [job.id for job in page] == ["needle"]
    assert before is None
    with pytest.raises(JobNotFoundError):
        list_all_jobs(connection, before=Place("b", "gone"))


def test_tenants_are_found_by_name(connection: Connection) -> None:
    assert overview.tenants(connection) == []
    assert overview.owners(connection, "job-1") == []
    for tenant in ("c", "a", "b"):
        for number in range(3):
            add(connection, tenant, f"job-{number}" if tenant != "b" else f"other-{number}")
    assert overview.tenants(connection) == ["a", "b", "c"]
    assert overview.tenants(connection, limit=2) == ["a", "b"]
    assert overview.owners(connection, "job-1") == ["a", "c"]


def test_messages_are_read_page_by_page(connection: Connection) -> None:
    for number in range(7):  # those of one group are rejected at one moment
        at = datetime(2026, 5, 4, 12, min(number, 3), tzinfo=UTC)
        connection.execute(rejected_messages.insert().values(id=str(number), rejected_at=at, reason="x", size=1))
    pages: list[str] = []
    before = None
    for _ in range(4):
        page = [message.id for message in overview.rejected(connection, 2, before=before)]
        pages += page
        before = page[-1]
    assert pages == ["6", "5", "4", "3", "2", "1", "0"]
    assert overview.rejected(connection, 2, before="gone") == []


def test_the_past_is_summed_by_step(connection: Connection) -> None:
    current = int(connection.execute(select(epoch_seconds(now()))).scalar_one() // 60)
    for ago, outcome, code, attempts in (
        (0, "finished", "", 2),
        (1, "failed", "timeout", 3),
        (1, "cancelled", "", 1),
        (1, "recovered", "", 1),
        (70, "failed", "timeout", 4),
        (100_000, "failed", "too old", 9),
    ):
        sums = {"deltas": 10, "prompt_tokens": 5, "completion_tokens": 6, **FIRST_OUTPUTS, "first_output_2": 1}
        key = {"provider": "p", "model": "m", "outcome": outcome, "error_code": code}
        connection.execute(minutes.insert().values(minute=current - ago, attempts=attempts, **key, **sums))
    past = overview.history(connection, 120, 1)
    assert [each.minute for each in past.sums] == [current - 70, current - 1, current]
    newest = past.sums[1]
    assert (newest.completed, newest.failed, newest.other, newest.deltas) == (1, 3, 1, 30)
    assert newest.first_outputs == (0, 0, 3, 0, 0, 0, 0, 0, 0)
    assert past.errors == [overview.Errors("timeout", "p", "m", 7)]
    assert sum(each.failed for each in overview.history(connection, 60, 5).sums) == 3
    assert all(each.minute % 5 == 0 for each in overview.history(connection, 60, 5).sums)


def test_of_very_many_errors_only_the_most_frequent_are_read(engine: Engine, connection: Connection) -> None:
    """A tenant may name another model for each job, each of which is refused."""
    current = int(connection.execute(select(epoch_seconds(now()))).scalar_one() // 60)
    figures = {"deltas": 0, "prompt_tokens": 0, "completion_tokens": 0, **FIRST_OUTPUTS}
    key = {"minute": current, "provider": "p", "outcome": "failed", "error_code": "not_found"}
    rows = [{"model": f"m{number}", "attempts": 1 + number, **key, **figures} for number in range(500)]
    connection.execute(insert(minutes), rows)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: statements.append(statement))
    past = overview.history(connection, 60, 1)
    assert past.errors == [
        overview.Errors("not_found", "p", f"m{number}", 1 + number) for number in range(499, 479, -1)
    ]
    assert all(
        "LIMIT" in statement for statement in statements if "GROUP BY keepstream_minutes.error_code" in statement
    )


@pytest.mark.parametrize("is_full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_operators_look_at_costs_the_same_in_full_tables(engine: Engine, is_full: bool) -> None:  # noqa: FBT001
    if is_full:
        with engine.begin() as connection:
            fill(connection)
            connection.execute(text("ANALYZE"))
    explained = Explained(engine)
    with engine.begin() as connection:
        page, before = list_all_jobs(connection)
        assert (before is not None) == is_full
        if before is not None:
            list_all_jobs(connection, before=before)
    assert not is_full or len(page) == 50
    if explained:
        explained.check(600)
    for filters in FILTERS:
        with engine.begin() as connection:
            list_all_jobs(connection, Wanted(**filters))
            list_jobs(connection, "default", Wanted(**filters))
        if engine.dialect.name == "postgresql":
            explained.check(3000)  # the rows of a stretch, each on a page of its own at worst
        for statement, plan in explained:  # SQLite sorts the few that fit once more
            scanned = [step for step in plan if step.startswith("SCAN keepstream_jobs") and "INDEX" not in step]
            assert not scanned, (filters, statement)
        explained.clear()
    with engine.begin() as connection:
        names = overview.tenants(connection)
        assert (len(names) > 1) == is_full
        overview.owners(connection, "ended-77")
    explained.check(200, scanned=BY_THEIR_END | {"known"})
    with engine.begin() as connection:
        overview.rejected(connection, 50)
        overview.rejected(connection, 50, before="ended-777")
    explained.check(200)
    with engine.begin() as connection:
        overview.history(connection, 60, 1)
    explained.check(200, sorts=True)
