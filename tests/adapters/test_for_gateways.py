"""What a gateway needs of a client: all tenants by one, events as bytes, an answer before the first event, deletion."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, func, insert, select

from keepstream import AsyncClient, Client, RawEvent, parse_event, tables
from keepstream.errors import (
    BrokerUnavailableError,
    ClientClosedError,
    FollowTimeoutError,
    InvalidCursorError,
    InvalidSettingError,
    JobNotFoundError,
    JobStateError,
    NotConfiguredError,
    StoreUnavailableError,
)
from keepstream.events import parse_head
from keepstream.names import job_keys
from keepstream.results import JobStatus, WaitingFor
from tests import live_join
from tests.event_texts import JOB_ID, delta, ended, event, snapshot, started
from tests.jobs import make_job
from tests.stored_jobs import change, finish, pause, start

REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
KEYS = job_keys("default", JOB_ID)
HISTORY = [started("1-1"), delta("1-2", "Grüße "), event("1-3", "something.new", more="x"), delta("1-4", "ö")]
END = ended("1-5", "completed", "Grüße ö")
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def database(database_url: str) -> str:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return database_url


@pytest.fixture
def client(redis_url: str, database: str) -> Iterator[Client]:
    with Client(redis_url, database_url=database) as client:
        yield client


@pytest.fixture
async def async_client(redis_url: str, database: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url, database_url=database) as client:
        yield client


def publish(redis_url: str, *events: str) -> None:
    with redis.Redis.from_url(redis_url) as log:
        for text in events:
            log.eval(live_join.APPEND, 2, KEYS.log, KEYS.channel, parse_head(text)[0], text)


def end(client: Client | AsyncClient, job_id: str, **values: Any) -> None:
    assert client._database is not None
    with client._database.transaction() as connection:
        start(connection, job_id, client.tenant)
        finish(connection, job_id, tenant=client.tenant, **values)


# -- tenants --


async def test_one_client_serves_all_tenants_by_the_same_connections(async_client: AsyncClient, redis_url: str) -> None:
    shops = [async_client.for_tenant(f"shop-{n}") for n in range(20)]
    ids = [await shop.enqueue(REQUEST, idempotency_key="first") for shop in shops]
    for shop, job_id in zip(shops, ids, strict=True):
        found = await shop.get(job_id)
        assert found is not None
        assert found.tenant == shop.tenant
        assert await async_client.get(job_id) is None
        assert await shop.cancel(job_id) is JobStatus.CANCELLED
        assert [event.type async for event in shop.follow(job_id)] == ["job.cancelled"]
    assert [len(await shop.list()) for shop in shops] == [1] * 20
    with redis.Redis.from_url(redis_url) as connection:
        assert len(connection.client_list()) <= 12, "of the first client, not of each"


async def test_closing_a_view_closes_nothing_and_closing_the_first_closes_all(redis_url: str, database: str) -> None:
    first = AsyncClient(redis_url, database_url=database)
    async with first.for_tenant("shop") as shop:
        job_id = await shop.enqueue(REQUEST)
        views_view = shop.for_tenant("other")
    assert await first.get(job_id) is None
    assert await shop.get(job_id) is not None
    await first.close()
    for view in (shop, views_view):
        with pytest.raises(ClientClosedError):
            await view.get(job_id)
        with pytest.raises(ClientClosedError):
            await anext(view.follow(job_id))


def test_the_sync_client_serves_all_tenants_too(redis_url: str, database: str) -> None:
    first = Client(redis_url, database_url=database)
    with first.for_tenant("shop") as shop:
        job_id = shop.enqueue(REQUEST)
    shop.cancel(job_id)
    assert [event.type for event in shop.follow(job_id)] == ["job.cancelled"]
    assert first.get(job_id) is None
    first.close()
    with pytest.raises(ClientClosedError):
        shop.list()


def test_a_view_keeps_the_first_client_alive_which_is_told_of_forks(redis_url: str, database: str) -> None:
    shop = Client(redis_url, database_url=database).for_tenant("shop")
    gc.collect()
    assert shop._origin is not None
    shop._origin.before_fork()
    shop._origin.after_fork_in_parent()
    assert shop.get("x") is None
    shop._origin.close()


@pytest.mark.parametrize("tenant", ["", "a b", "x:y", "ü"])
def test_a_tenant_that_nobody_can_be_is_refused(client: Client, tenant: str) -> None:
    with pytest.raises(InvalidSettingError, match="a tenant consists of"):
        client.for_tenant(tenant)


async def test_silent_jobs_of_many_tenants_are_looked_at_together(async_client: AsyncClient) -> None:
    told: dict[str, list[WaitingFor]] = {}
    for n in range(3):
        shop = async_client.for_tenant(f"shop-{n}")
        job_id = await shop.enqueue(REQUEST, idempotency_key="same")
        told[shop.tenant] = []
        with pytest.raises(FollowTimeoutError, match="a worker: none is alive"):
            await anext(shop.follow_raw(job_id, timeout=0.1, on_waiting=told[shop.tenant].append))
    assert [[reason.cause for reason in reasons] for reasons in told.values()] == [["worker"]] * 3


# -- events as bytes --


async def test_raw_events_are_the_bytes_of_the_log(async_client: AsyncClient, redis_url: str) -> None:
    publish(redis_url, *HISTORY)
    stream = async_client.follow_raw(JOB_ID)
    before = [await anext(stream) for _ in HISTORY]
    publish(redis_url, END)  # live
    events = [*before, *[event async for event in stream]]
    assert events == [RawEvent(parse_event(text).id, parse_event(text).type, text.encode()) for text in [*HISTORY, END]]
    assert [parse_event(raw.payload) for raw in events] == [event async for event in async_client.follow(JOB_ID)]
    assert [raw.id async for raw in async_client.follow_raw(JOB_ID, "1-3")] == ["1-4", "1-5"]


def test_the_sync_client_passes_bytes_on_too(client: Client, redis_url: str) -> None:
    publish(redis_url, *HISTORY, END)
    assert [raw.payload.decode() for raw in client.follow_raw(JOB_ID)] == [*HISTORY, END]


async def test_what_comes_from_the_row_is_the_same_in_both_forms(async_client: AsyncClient) -> None:
    job_id = await async_client.enqueue(REQUEST)
    assert async_client._database is not None
    with async_client._database.transaction() as connection:
        start(connection, job_id)
        output = {"tenant": "default", "job_id": job_id, "index": 0, "content": "Grüße", "reasoning": "", "refusal": ""}
        connection.execute(insert(tables.choices).values(output))
        finish(connection, job_id)
        change(connection, job_id, terminal_event_id="1-7")
    raw = [event async for event in async_client.follow_raw(job_id)]
    assert [(event.id, event.type) for event in raw] == [("1-6", "snapshot"), ("1-7", "job.completed")]
    assert [parse_event(event.payload) for event in raw] == [event async for event in async_client.follow(job_id)]
    assert "Grüße".encode() in raw[0].payload


async def test_events_are_taken_the_moment_they_come(async_client: AsyncClient, redis_url: str) -> None:
    taken: list[RawEvent] = []

    def take(raw: RawEvent) -> bool:
        taken.append(raw)
        return raw.id != "1-4"

    publish(redis_url, *HISTORY[:2])
    stream = async_client.follow_raw(JOB_ID, offer=take)
    assert [(await anext(stream)).id for _ in range(2)] == ["1-1", "1-2"]
    waiting = asyncio.ensure_future(anext(stream))
    publish(redis_url, *HISTORY[2:], END)
    assert (await waiting).id == "1-4"  # which was not taken, and waits for the reader
    assert [raw.id async for raw in stream] == ["1-5"]  # the last one is not offered
    assert [raw.id for raw in taken] == ["1-3", "1-4"]
    assert taken[0] == RawEvent("1-3", "something.new", HISTORY[2].encode())


def test_the_sync_client_offers_events_too(client: Client, redis_url: str) -> None:
    taken: list[str] = []

    def take(raw: RawEvent) -> bool:
        taken.append(raw.id)
        return raw.id != "1-4"

    publish(redis_url, *HISTORY[:2])
    stream = client.follow_raw(JOB_ID, offer=take)
    assert [next(stream).id for _ in range(2)] == ["1-1", "1-2"]
    publish(redis_url, *HISTORY[2:], END)
    assert [raw.id for raw in stream] == ["1-4", "1-5"]
    assert taken == ["1-3", "1-4"]


async def test_who_cannot_take_an_event_fails_alone(async_client: AsyncClient, redis_url: str) -> None:
    def fail(_raw: RawEvent) -> bool:
        raise ZeroDivisionError

    publish(redis_url, HISTORY[0])
    others = async_client.follow_raw(JOB_ID)
    broken = async_client.follow_raw(JOB_ID, offer=fail)
    for stream in (others, broken):
        assert (await anext(stream)).id == "1-1"
    waiting = asyncio.ensure_future(anext(broken)), asyncio.ensure_future(anext(others))
    with redis.Redis.from_url(redis_url) as connection:
        used = connection.client_list(_type="pubsub")[0]["id"]
        publish(redis_url, *HISTORY[1:], END)
        with pytest.raises(ZeroDivisionError):
            await waiting[0]
        assert [(await waiting[1]).id, *[raw.id async for raw in others]] == ["1-2", "1-3", "1-4", "1-5"]
        assert connection.client_list(_type="pubsub")[0]["id"] == used


async def test_an_event_whose_body_cannot_be_read_is_passed_on_raw_and_no_obstacle_else(
    async_client: AsyncClient, redis_url: str
) -> None:
    odd = event("1-2", "delta", choice="no number")
    publish(redis_url, started("1-1"), odd, snapshot("1-3", "x"), ended("1-4", "completed", "x"))
    assert [raw.id async for raw in async_client.follow_raw(JOB_ID)] == ["1-1", "1-2", "1-3", "1-4"]
    assert [event.id async for event in async_client.follow(JOB_ID)] == ["1-1", "1-3", "1-4"]


async def test_who_is_told_what_a_job_waits_for_finds_nothing_in_the_log(
    async_client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "keepstream")
    job_id = await async_client.enqueue(REQUEST)
    told: list[WaitingFor] = []
    with pytest.raises(FollowTimeoutError):
        await anext(async_client.follow_raw(job_id, timeout=0.1, on_waiting=told.append))
    assert [reason.cause for reason in told] == ["worker"]
    assert caplog.records == []
    with pytest.raises(FollowTimeoutError):
        await anext(async_client.follow_raw(job_id, timeout=0.1))
    assert [record.getMessage() for record in caplog.records] == [f"job {job_id} waits for {told[0].text}"]


# -- before the first event --


@pytest.fixture(params=["sync", "async"])
def check(request: pytest.FixtureRequest) -> Any:
    """``check_follow`` of either client."""

    async def check(client: Client | AsyncClient, *arguments: Any) -> bool:
        result = client.check_follow(*arguments)
        return result if isinstance(result, bool) else await result

    return check


async def test_a_job_that_waits_silently_can_be_followed(client: Client, async_client: AsyncClient, check: Any) -> None:
    job_id = client.enqueue(REQUEST)
    for form in (client, async_client):
        assert await check(form, job_id)
        with pytest.raises(InvalidCursorError):
            await check(form, job_id, "1-1")
    assert client._database is not None
    with client._database.transaction() as connection:
        start(connection, job_id)
    assert client.check_follow(job_id, "1-1")
    with client._database.transaction() as connection:
        pause(connection, job_id)
    assert client.check_follow(job_id, "1-7"), "the log may have lost it for the moment"
    with pytest.raises(InvalidCursorError, match="not come that far"):
        client.check_follow(job_id, "3-1")


async def test_who_has_the_end_has_nothing_to_expect(client: Client, redis_url: str) -> None:
    job_id = client.enqueue(make_job(id=JOB_ID))
    publish(redis_url, *HISTORY)
    end(client, job_id)
    assert client.check_follow(job_id)
    with redis.Redis.from_url(redis_url) as log:
        log.delete(KEYS.log)
    assert client.check_follow(job_id)  # the row has a terminal event to give
    assert not client.check_follow(job_id, "1-1")
    with pytest.raises(InvalidCursorError, match="not come that far"):
        client.check_follow(job_id, "1-2")


@pytest.mark.parametrize("has_database", [True, False])
async def test_the_log_alone_tells_it_too(redis_url: str, database: str, *, has_database: bool) -> None:
    publish(redis_url, *HISTORY)
    with Client(redis_url, database_url=database if has_database else None) as client:
        assert client.check_follow(JOB_ID)
        assert client.check_follow(JOB_ID, "1-2")
        publish(redis_url, END)
        assert client.check_follow(JOB_ID, "1-4")
        assert not client.check_follow(JOB_ID, "1-5")
        with pytest.raises(InvalidCursorError):
            client.check_follow(JOB_ID, "1-6")
        with pytest.raises(InvalidCursorError, match="event ids look like"):
            client.check_follow(JOB_ID, "x")


def test_a_job_that_is_not_there_is_not_found(client: Client, redis_url: str) -> None:
    client.for_tenant("other").enqueue(make_job(id="theirs", tenant="other"))
    for job_id in ("nobody", "theirs", "no id"):
        with pytest.raises(JobNotFoundError):
            client.check_follow(job_id)
    with Client(redis_url) as bare:
        assert bare.check_follow("nobody"), "without a database nobody can know"


def test_either_server_may_be_away_but_not_both(client: Client, redis_url: str, database: str) -> None:
    nowhere = "postgresql://u:hunter2@127.0.0.1:1/x"
    client.enqueue(make_job(id=JOB_ID))
    with Client(NOWHERE, database_url=database) as row_alone:
        assert row_alone.check_follow(JOB_ID)
        with pytest.raises(BrokerUnavailableError):
            row_alone.check_follow("nobody")
    publish(redis_url, *HISTORY)
    with Client(redis_url, database_url=nowhere) as log_alone:
        assert log_alone.check_follow(JOB_ID, "1-2")
        with pytest.raises(InvalidCursorError):
            log_alone.check_follow(JOB_ID, "2-1")
        with pytest.raises(StoreUnavailableError):
            log_alone.check_follow("nobody")
    with Client(NOWHERE) as blind, pytest.raises(BrokerUnavailableError):
        blind.check_follow(JOB_ID)


def test_a_log_that_is_no_log_says_what_to_check(client: Client, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(KEYS.log, "somebody else's")
    with pytest.raises(InvalidSettingError, match="WRONGTYPE"):
        client.check_follow(JOB_ID)


# -- deletion --


def rows_of(client: Client, job_id: str) -> int:
    assert client._database is not None
    count = 0
    with client._database.transaction() as connection:
        for table in tables.metadata.tables.values():
            column = table.c.id if table is tables.jobs else table.c.get("job_id")
            if column is not None:
                count += connection.scalar(select(func.count()).select_from(table).where(column == job_id)) or 0
    return count


def test_an_ended_job_is_deleted_with_all_that_is_stored_about_it(client: Client, redis_url: str) -> None:
    job_id, kept = client.enqueue(make_job(id=JOB_ID)), client.enqueue(REQUEST)
    before = rows_of(client, kept)
    publish(redis_url, *HISTORY, END)
    end(client, job_id, announced=False)
    assert client._database is not None
    of_job = {"tenant": "default", "job_id": job_id}
    output = of_job | {"index": 0, "content": "x", "reasoning": "", "refusal": ""}
    call = of_job | {"choice_index": 0, "position": 0, "call_id": "c", "type": "function", "name": "n"}
    tried = of_job | {"number": 1, "reason": "first", "worker_id": "w", "provider": "p", "model": "m"}
    with client._database.transaction() as connection:
        connection.execute(insert(tables.choices).values(output))
        connection.execute(insert(tables.tool_calls).values(call | {"arguments": "{}", "arguments_valid": True}))
        connection.execute(insert(tables.attempts).values(tried | {"started_at": tables.now()}))
    assert client.delete(job_id)
    assert rows_of(client, job_id) == 0
    assert rows_of(client, kept) == before
    with redis.Redis.from_url(redis_url) as connection:
        assert not connection.exists(KEYS.log)
    assert client.get(job_id) is None
    assert not client.delete(job_id)
    assert client.enqueue(make_job(id=JOB_ID)) == job_id, "its name is free again"


async def test_the_async_client_deletes_too(async_client: AsyncClient) -> None:
    job_id = await async_client.enqueue(REQUEST)
    await async_client.cancel(job_id)
    assert not await async_client.for_tenant("other").delete(job_id)
    assert await async_client.delete(job_id)
    assert await async_client.get(job_id) is None


def test_a_job_that_has_not_ended_is_not_deleted(client: Client, redis_url: str) -> None:
    job_id = client.enqueue(make_job(id=JOB_ID))
    publish(redis_url, *HISTORY)
    assert client._database is not None
    for status, go_on in (("queued", start), ("running", pause), ("retrying", None)):
        with pytest.raises(JobStateError, match=f"is {status}; cancel it first"):
            client.delete(job_id)
        if go_on is not None:
            with client._database.transaction() as connection:
                go_on(connection, job_id)
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.exists(KEYS.log)


def test_a_job_whose_log_cannot_be_deleted_stays(client: Client, redis_url: str, database: str) -> None:
    job_id = client.enqueue(REQUEST)
    client.cancel(job_id)
    with Client(NOWHERE, broker_url=redis_url, database_url=database) as cut_off:
        with pytest.raises(BrokerUnavailableError, match="log"):
            cut_off.delete(job_id)
        assert cut_off.get(job_id) is not None
    assert client.delete(job_id)


def test_deleting_needs_a_database_and_a_name(client: Client, redis_url: str) -> None:
    with Client(redis_url) as bare, pytest.raises(NotConfiguredError):
        bare.delete("x")
    with pytest.raises(JobNotFoundError):
        client.delete("no id")
    assert not client.delete("nobody")
