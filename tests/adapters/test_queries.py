"""The client's statements on SQLite and PostgreSQL, also while others write."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Table, create_engine, delete, func, select, update
from sqlalchemy.exc import NoResultFound

from keepstream import tables
from keepstream.client import queries
from keepstream.client.database import ClientDatabase
from keepstream.client.listing import Wanted, list_jobs
from keepstream.errors import (
    IdempotencyConflictError,
    InvalidSettingError,
    JobNotFoundError,
    StoreUnavailableError,
)
from keepstream.events import JobCancelled, terminal_event
from keepstream.jobs import Job
from keepstream.results import CompletionResult, JobStatus, Usage, UsageSource, output_sha256
from keepstream.tables import announcements, arrivals, attempts, choices, jobs, pools, running, tool_calls, waiting
from tests.jobs import make_job
from tests.stored_jobs import finish, pause, row, start, stored_job, take


@pytest.fixture
def database(database_url: str) -> Iterator[ClientDatabase]:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    database = ClientDatabase(database_url)
    yield database
    database.close()


@pytest.fixture
def connection(database: ClientDatabase) -> Iterator[Connection]:
    with database.transaction() as connection:
        yield connection


def count(connection: Connection, table: Table, job: Job) -> int:
    """Return how many rows of a narrow table are the job's."""
    mine = table.c.tenant == job.tenant, table.c.job_id == job.id
    return connection.execute(select(func.count()).select_from(table).where(*mine)).scalar_one()


def add_attempt(connection: Connection, job: Job, number: int, **values: Any) -> None:
    head = {"tenant": job.tenant, "job_id": job.id, "number": number, "reason": "first", "worker_id": "w"}
    connection.execute(attempts.insert().values(**head, provider="p", model="m", started_at=tables.now(), **values))


def add_choice(connection: Connection, job: Job, index: int, content: str) -> None:
    values = {"tenant": job.tenant, "job_id": job.id, "index": index, "content": content}
    connection.execute(choices.insert().values(**values, reasoning="", refusal="", finish_reason="stop"))


def started(connection: Connection, **fields: Any) -> Job:
    job = make_job(**fields)
    queries.enqueue(connection, job)
    start(connection, job.id, job.tenant)
    add_attempt(connection, job, 1)
    return job


# -- enqueue --


def test_a_new_job_is_queued_and_waits(connection: Connection) -> None:
    job = make_job(metadata={"user": 7}, max_attempts=3, max_tokens=9, expires_at="2990-01-01T00:00:00Z")
    assert queries.enqueue(connection, job, "elsewhere", retry_of="another")
    stored = row(connection, job.id)
    assert (stored.status, stored.attempt, stored.tries, stored.max_attempts) == ("queued", 0, 0, 3)
    assert (stored.metadata, stored.queue, stored.retry_of) == ({"user": 7}, "elsewhere", "another")
    assert connection.scalar(select(tables.seconds_until(jobs.c.created_at))) == pytest.approx(0, abs=60)
    assert stored_job(connection, job.id) == job
    place = connection.execute(select(waiting)).one()
    assert (place.tenant, place.job_id, place.attempt, place.restarted_due) == ("default", job.id, 0, None)
    assert (place.prompt_tokens, place.max_tokens, place.expires_at) == (2, 9, job.expires_at)
    arrival = connection.execute(select(arrivals)).one()
    assert arrival == (place.seq, place.lane, place.pool, "default", None)
    assert count(connection, tables.running, job) == 0


def test_jobs_of_one_lane_and_pool_are_found_by_their_numbers(connection: Connection) -> None:
    here = {"provider": "p", "model": "m", "fallbacks": [{"provider": "q", "model": "n"}]}
    made = [
        make_job(tenant="a", **here),
        make_job(tenant="a", **here),
        make_job(tenant="b", **here),
        make_job(tenant="a", job_class="bulk", **here),
        make_job(tenant="a", **here | {"fallbacks": []}),
    ]
    for job in made:
        queries.enqueue(connection, job)
    places = connection.execute(select(waiting).order_by(waiting.c.seq)).all()
    assert [place.job_id for place in places] == [job.id for job in made]  # the older, the smaller
    lanes, ids = [place.lane for place in places], [place.pool for place in places]
    assert (lanes[0] == lanes[1], len(set(lanes))) == (True, 3)
    assert lanes[0] == lanes[4]
    assert (ids[0] == ids[1] == ids[2], len(set(ids))) == (True, 3)
    stored = {pool.id: pool for pool in connection.execute(select(pools))}
    assert set(stored) == set(ids)
    assert stored[ids[0]].chain == [["p", "m"], ["q", "n"]]
    assert (stored[ids[3]]._mapping["class"], stored[ids[3]].queue) == ("bulk", "completions")


def test_the_same_request_again_stays_one_job(connection: Connection) -> None:
    job = make_job(idempotency_key="k")
    assert queries.enqueue(connection, job)
    assert not queries.enqueue(connection, make_job(idempotency_key="k", metadata={"try": 2}))
    assert row(connection, job.id).metadata == {}


def test_another_request_under_the_same_key_is_a_conflict(connection: Connection) -> None:
    queries.enqueue(connection, make_job(idempotency_key="k"))
    with pytest.raises(IdempotencyConflictError, match="new key"):
        queries.enqueue(connection, make_job(idempotency_key="k", temperature=1))


def test_tenants_may_use_the_same_id(connection: Connection) -> None:
    assert queries.enqueue(connection, make_job(id="x", tenant="a"))
    assert queries.enqueue(connection, make_job(id="x", tenant="b", temperature=1))


def test_many_producers_of_one_key_make_one_job(database: ClientDatabase) -> None:
    barrier = threading.Barrier(8)

    def produce(_: int) -> bool:
        barrier.wait()
        with database.transaction() as connection:
            return queries.enqueue(connection, make_job(idempotency_key="k"))

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(produce, range(8))) == [False] * 7 + [True]


def test_any_text_that_json_can_hold_is_stored(connection: Connection) -> None:
    odd = "NUL \x00, lone \ud800, emoji 🦙"
    job = make_job(messages=[{"role": "user", "content": odd}], metadata={odd: odd})
    queries.enqueue(connection, job)
    stored = queries.get(connection, job.tenant, job.id)
    assert stored is not None
    assert stored.metadata == {odd: odd}


# -- cancel --


def test_a_queued_job_is_cancelled_at_once(connection: Connection) -> None:
    job = make_job()
    queries.enqueue(connection, job)
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.CANCELLED
    stored = queries.get(connection, job.tenant, job.id)
    assert stored is not None
    assert (stored.status, stored.attempt, stored.terminal_event_id) == (JobStatus.CANCELLED, 1, "1-1")
    assert stored.error is not None
    assert stored.error.code == "cancelled"
    assert (stored.partial, stored.usage, stored.output_sha256) == (False, None, output_sha256([]))
    assert count(connection, announcements, job) == 1
    assert count(connection, waiting, job) == 0
    assert connection.execute(select(arrivals)).all() == []
    assert row(connection, job.id).cancel_requested_at is not None
    event = terminal_event(stored)
    assert isinstance(event, JobCancelled)
    assert event.attempts == 0


def test_a_waiting_job_that_is_cancelled_keeps_its_output_and_its_bill(connection: Connection) -> None:
    job = started(connection)
    add_choice(connection, job, 1, "b")
    add_choice(connection, job, 0, "a")
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "usage_source": "provider"}
    connection.execute(update(attempts).values(outcome="failed", **usage))
    pause(connection, job.id)
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.CANCELLED
    stored = queries.get(connection, job.tenant, job.id)
    assert stored is not None
    assert (stored.attempt, stored.terminal_event_id) == (2, "2-2")  # 2-1 is a snapshot of the partial output
    assert stored.partial
    assert [choice.content for choice in stored.choices] == ["a", "b"]
    assert stored.output_sha256 == output_sha256(["a", "b"])
    assert stored.usage == Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, source=UsageSource.PROVIDER)


def test_a_running_job_is_told_to_stop(connection: Connection) -> None:
    job = started(connection)
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.RUNNING
    first = row(connection, job.id)
    assert (first.status, first.attempt) == ("running", 1)
    assert first.cancel_requested_at is not None
    assert connection.scalars(select(running.c.cancel_requested)).all() == [True]
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.RUNNING
    assert row(connection, job.id).cancel_requested_at == first.cancel_requested_at


@pytest.mark.parametrize("status", [status for status in JobStatus if status.terminal])
def test_a_job_that_has_ended_stays_as_it_is(connection: Connection, status: JobStatus) -> None:
    job = started(connection)
    finish(connection, job.id, status)
    before = row(connection, job.id)
    assert queries.cancel(connection, job.tenant, job.id) is status
    assert row(connection, job.id) == before


def test_cancelling_twice_changes_nothing(connection: Connection) -> None:
    job = make_job()
    queries.enqueue(connection, job)
    queries.cancel(connection, job.tenant, job.id)
    before = row(connection, job.id)
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.CANCELLED
    assert row(connection, job.id) == before


def test_an_unknown_job_and_another_tenants_job_cannot_be_cancelled(connection: Connection) -> None:
    job = make_job(tenant="a")
    queries.enqueue(connection, job)
    assert queries.cancel(connection, "a", "nothing") is None
    assert queries.cancel(connection, "b", job.id) is None
    assert row(connection, job.id, "a").status == "queued"


def test_a_turn_and_a_cancel_at_the_same_moment_never_both_win(database: ClientDatabase) -> None:
    made = [make_job() for _ in range(60)]
    with database.transaction() as connection:
        for job in made:
            queries.enqueue(connection, job)
    barrier = threading.Barrier(2)

    def turn(connection: Connection, job: Job) -> bool:
        try:
            take(connection, job.id)
        except NoResultFound:
            return False
        return True

    def cancel(connection: Connection, job: Job) -> JobStatus | None:
        return queries.cancel(connection, job.tenant, job.id)

    def race(what: Callable[[Connection, Job], Any]) -> list[Any]:
        answers = []
        for job in made:
            barrier.wait()
            with database.transaction() as connection:
                answers.append(what(connection, job))
        return answers

    with ThreadPoolExecutor(2) as pool:
        taken, cancels = pool.map(race, [turn, cancel])
    for was_taken, answer in zip(taken, cancels, strict=True):
        assert answer is (JobStatus.RUNNING if was_taken else JobStatus.CANCELLED)
    with database.transaction() as connection:
        assert all(stored.cancel_requested_at for stored in connection.execute(select(jobs)))
        told = connection.execute(select(running.c.job_id, running.c.cancel_requested)).all()
        assert sorted(told) == sorted((job.id, True) for job, was_taken in zip(made, taken, strict=True) if was_taken)
        assert connection.execute(select(waiting)).all() == []
        assert connection.execute(select(arrivals)).all() == []
        assert connection.scalar(select(func.count()).select_from(announcements)) == cancels.count(JobStatus.CANCELLED)


def test_a_job_that_neither_waits_nor_runs_is_ended_by_a_cancel(connection: Connection) -> None:
    job = started(connection)
    connection.execute(delete(running))
    assert queries.cancel(connection, job.tenant, job.id) is JobStatus.CANCELLED
    assert row(connection, job.id).status == "cancelled"


# -- reading --


def test_a_result_has_everything_in_order(connection: Connection) -> None:
    job = started(connection)
    for index in (2, 0, 1):
        add_choice(connection, job, index, str(index))
    for position in (1, 0):
        connection.execute(
            tool_calls.insert().values(
                tenant=job.tenant,
                job_id=job.id,
                choice_index=1,
                position=position,
                call_id=f"c{position}",
                type="function",
                name="f",
                arguments="{",
                arguments_valid=False,
            )
        )
    add_attempt(connection, job, 2, usage_source="unknown", error_code="timeout", error_message="no data")
    stored = queries.get(connection, job.tenant, job.id)
    assert stored is not None
    assert [choice.index for choice in stored.choices] == [0, 1, 2]
    assert [call.id for call in stored.choices[1].tool_calls] == ["c0", "c1"]
    assert [attempt.number for attempt in stored.attempts] == [1, 2]
    assert stored.attempts[0].usage is None
    assert stored.attempts[1].usage == Usage()
    assert stored.attempts[1].error is not None
    assert (stored.text, stored.usage, stored.created_at.utcoffset() is not None) == ("0", None, True)


def test_a_result_says_of_which_class_the_job_is_and_who_else_may_be_asked(connection: Connection) -> None:
    fallbacks = [{"provider": "other", "model": "a/b"}, {"provider": "default", "model": "c"}]
    for job in (make_job(id="a", job_class="bulk", fallbacks=fallbacks), make_job(id="b")):
        queries.enqueue(connection, job)
    results = [queries.get(connection, "default", name, whole=True) for name in "ab"]
    shown = [result.model_dump(mode="json") for result in results if result is not None]
    assert [(each["class"], each["fallbacks"]) for each in shown] == [("bulk", fallbacks), ("interactive", [])]
    assert [result and CompletionResult(**each) for result, each in zip(results, shown, strict=True)] == results
    answer = queries.get(connection, "default", "a")
    assert answer is not None
    assert (answer.job_class, answer.fallbacks) == ("bulk", [])  # the request was not read
    listed = {job.id: job.job_class for job in list_jobs(connection, "default")}
    assert listed == {"a": "bulk", "b": "interactive"}


def test_a_tenant_does_not_see_anothers_jobs(connection: Connection) -> None:
    job = make_job(tenant="a")
    queries.enqueue(connection, job)
    assert queries.get(connection, "b", job.id) is None
    assert queries.get_summary(connection, "b", job.id) is None
    assert list_jobs(connection, "b") == []


def test_a_listing_goes_through_all_pages_newest_first(connection: Connection) -> None:
    made = []
    for number in range(25):
        made.append(make_job(id=f"job-{number % 7}-{number}"))  # equal times, ids in random order
        queries.enqueue(connection, made[-1])
    seen: list[str] = []
    before = None
    while page := list_jobs(connection, "default", before=before, limit=4):
        seen += [summary.id for summary in page]
        before = seen[-1]
        if len(seen) == 8:  # new jobs do not shift the pages
            queries.enqueue(connection, make_job())
    assert sorted(seen) == sorted(job.id for job in made)
    times = [row(connection, job_id).created_at for job_id in seen]
    assert times == sorted(times, reverse=True)


def test_a_listing_is_filtered(connection: Connection) -> None:
    wanted = started(connection, model="a", provider="x")
    queries.enqueue(connection, make_job(model="a", provider="x"))
    started(connection, model="b", provider="x")
    started(connection, model="a", provider="y")
    found = list_jobs(connection, "default", Wanted([JobStatus.RUNNING], "a", "x"))
    assert [summary.id for summary in found] == [wanted.id]


def test_a_listing_cannot_go_on_after_an_unknown_job(connection: Connection) -> None:
    with pytest.raises(JobNotFoundError):
        list_jobs(connection, "default", before="nothing")


# -- the connection --


def test_a_database_without_our_tables_says_what_to_do(database_url: str) -> None:
    database = ClientDatabase(database_url)
    with pytest.raises(StoreUnavailableError, match="keepstream migrate"), database.transaction() as connection:
        queries.get(connection, "a", "b")
    database.close()


def test_a_database_that_is_away_is_an_error_without_the_password() -> None:
    database = ClientDatabase("postgresql+psycopg://someone:hunter2@127.0.0.1:1/keepstream")
    with pytest.raises(StoreUnavailableError, match="refused") as caught, database.transaction():
        pass
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    database.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "redis://localhost", "nosuch+driver://h", "postgresql://u:hunter2@h:x/d"]
)
def test_a_url_that_is_none_is_an_error_without_its_text(url: str) -> None:
    with pytest.raises(InvalidSettingError, match="sqlite:///") as caught:
        ClientDatabase(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        *(
            (f"postgresql+{driver}", "begin the URL with postgresql://")
            for driver in ("psycopg2", "asyncpg", "pg8000", "psycopg_async", "nodriver")
        ),
        *((f"sqlite+{driver}", "begin the URL with sqlite://") for driver in ("aiosqlite", "pysqlcipher", "nodriver")),
    ],
)
def test_a_driver_that_is_not_ours_is_an_error_that_names_the_right_url(scheme: str, said: str) -> None:
    with pytest.raises(InvalidSettingError, match=said) as caught:
        ClientDatabase(f"{scheme}://u:hunter2@h/d")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "sqlite", "sqlite+pysqlite"])
def test_our_drivers_need_not_be_named(scheme: str) -> None:
    database = ClientDatabase(f"{scheme}:///d")
    assert database._engine.get().driver in ("psycopg", "pysqlite")
    database.close()


def test_a_failed_transaction_leaves_nothing(database: ClientDatabase) -> None:
    job = make_job()

    def fail_half_way() -> None:
        with database.transaction() as connection:
            queries.enqueue(connection, job)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with database.transaction() as connection:
        assert queries.get_summary(connection, job.tenant, job.id) is None


def test_the_engine_is_not_bound_to_a_thread(database: ClientDatabase) -> None:
    def count() -> int:
        with database.transaction() as connection:
            return len(connection.execute(select(jobs)).all())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: count(), range(16))) == [0] * 16
