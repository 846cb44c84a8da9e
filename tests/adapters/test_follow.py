"""Followers on a real Valkey: they join, are cut off, lose their log and their server, and miss nothing."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
import redis.asyncio
from sqlalchemy import create_engine

from keepstream import AsyncClient, Client, tables
from keepstream.client.follower import (
    DisconnectedError,
    FollowerRun,
    Listen,
    LogEntry,
    Operation,
    ReadLog,
    ReadNewest,
    Sleep,
    Subscribe,
)
from keepstream.client.payloads import Payload
from keepstream.client.queries import new_rows
from keepstream.client.redis import RedisConnections
from keepstream.client.redis_aio import AsyncRedisConnections
from keepstream.client.redis_url import parse_redis_url
from keepstream.errors import FollowTimeoutError, InvalidCursorError, InvalidSettingError, JobNotFoundError
from keepstream.events import Event, parse_event
from keepstream.names import job_keys
from keepstream.results import JobStatus, output_sha256
from keepstream.tables import attempts, choices, jobs
from keepstream.transcript import Transcript
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.values import Delta
from tests import live_join
from tests.event_texts import JOB_ID, attempt_failed, attempt_finished, delta, ended, started
from tests.jobs import make_job
from tests.live_join import append

KEYS = job_keys("default", JOB_ID)
HISTORY = [
    started("1-1"),
    *(delta(f"1-{n}", f"void{n} ") for n in range(2, 8)),
    attempt_failed("1-8"),
    started("2-1", "retry"),
    *(delta(f"2-{n}", f"Wörter{n} ") for n in range(2, 12)),
    attempt_finished("2-12"),
    ended("2-13", "completed", "".join(f"Wörter{n} " for n in range(2, 12))),
]
TEXT = "".join(f"Wörter{n} " for n in range(2, 12))
IDS = [*(f"1-{n}" for n in range(1, 9)), *(f"2-{n}" for n in range(1, 14))]


async def collect(client: AsyncClient, after: str | None = None, **options: Any) -> list[Event]:
    return [event async for event in client.follow(JOB_ID, after, **options)]


def ids(events: list[Event]) -> list[str]:
    return [event.id for event in events]


def subscribers(url: str) -> int:
    with redis.Redis.from_url(url) as connection:
        return len(connection.client_list(_type="pubsub"))


async def until_nobody_is_subscribed(url: str) -> None:
    async with asyncio.timeout(60):
        while subscribers(url):  # noqa: ASYNC110  # the server tells no one when a client leaves
            await asyncio.sleep(0.01)


@pytest.fixture
async def log(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A connection for publishing."""
    async with redis.asyncio.Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url) as client:
        yield client


@pytest.fixture
def stored(database_url: str) -> str:
    """The URL of a database with the finished job of ``HISTORY``."""
    job = make_job(id=JOB_ID)
    key = {"tenant": job.tenant, "job_id": job.id}
    outcome = {
        "status": "completed",
        "attempt": 2,
        "tries": 2,
        "finished_at": tables.now(),
        "output_sha256": output_sha256([TEXT]),
        "terminal_event_id": "2-13",
    }
    output = {"index": 0, "content": TEXT, "reasoning": "", "refusal": "", "finish_reason": "stop"}
    tried = {"reason": "first", "worker_id": "w", "provider": "p", "model": "m", "started_at": tables.now()}
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(jobs.insert().values(new_rows(job)[jobs] | {"created_at": tables.now()} | outcome))
        connection.execute(choices.insert().values(key | output))
        for number in (1, 2):
            connection.execute(attempts.insert().values(key | tried | {"number": number}))
    engine.dispose()
    return database_url


# -- the live join --


async def test_followers_that_join_at_random_moments_miss_nothing(redis_url: str) -> None:
    counts = await live_join.run(redis_url, joins=200)
    assert counts.joins == 200
    assert counts.events == 200 * live_join.EVENTS
    assert counts.flawless


async def test_a_follower_joins_at_every_place_of_a_job(log: redis.asyncio.Redis, client: AsyncClient) -> None:
    followers = []
    for event in HISTORY:
        followers.append(asyncio.create_task(collect(client)))
        await append(log, KEYS, event)
    for events in await asyncio.gather(*followers):
        assert ids(events) == IDS


async def test_every_cursor_of_a_finished_log_gives_the_rest(log: redis.asyncio.Redis, client: AsyncClient) -> None:
    for event in HISTORY:
        await append(log, KEYS, event)
    for place, cursor in enumerate(IDS):
        assert ids(await collect(client, cursor)) == IDS[place + 1 :]


async def test_what_a_follower_holds_at_the_end_is_proved_by_the_hash(
    log: redis.asyncio.Redis, client: AsyncClient
) -> None:
    for text in HISTORY:
        await append(log, KEYS, text)
    held = Transcript()
    async for event in client.follow(JOB_ID):
        assert held.apply(event)
    assert held.text == TEXT
    assert held.terminal is not None
    assert held.sha256() == held.terminal.output_sha256


def test_the_sync_client_follows_just_as_well(redis_url: str) -> None:
    results: list[list[str]] = []

    def follow(client: Client) -> None:
        results.append([event.id for event in client.follow(JOB_ID)])

    with Client(redis_url) as client, redis.Redis.from_url(redis_url) as log:
        threads = []
        for event in HISTORY:
            threads.append(threading.Thread(target=follow, args=(client,)))
            threads[-1].start()
            event_id = event.partition('"id": "')[2].partition('"')[0]
            log.eval(live_join.APPEND, 2, KEYS.log, KEYS.channel, event_id, event)
        for thread in threads:
            thread.join(60)
    assert results == [IDS] * len(HISTORY)


def plain(result: Any) -> Any:
    """Return an operation's result with the bytes of its events."""
    match result:
        case Payload():
            return result.data
        case LogEntry(event_id, payload):
            return event_id, payload.data
        case [*entries]:
            return [plain(entry) for entry in entries]
    return result


@pytest.mark.parametrize("published", [0, 1, len(HISTORY)], ids=["nothing", "one", "all"])
async def test_both_clients_get_the_same_results_for_every_operation(
    log: redis.asyncio.Redis, redis_url: str, published: int
) -> None:
    for event in HISTORY[:published]:
        await append(log, KEYS, event)
    results: dict[str, list[Any]] = {"sync": [], "async": []}

    def run(name: str) -> FollowerRun[Any]:
        for operation in (ReadNewest(), ReadLog(None), ReadLog("1-3"), Subscribe(), Listen(0.01), Sleep(0.01)):
            results[name].append(plain((yield operation)))
        with redis.Redis.from_url(redis_url) as connection:
            assert connection.publish(KEYS.channel, "live") == 1
            results[name].append(plain((yield Listen(60))))
            connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        with pytest.raises(DisconnectedError):
            yield Listen(60)
        yield Subscribe()
        yield parse_event(HISTORY[0])
        assert subscribers(redis_url) == 1

    def follow(connections: RedisConnections) -> list[Event]:
        return list(connections.follow(run("sync"), KEYS, read=lambda _: None))

    async def nothing(_: Operation) -> None:
        return None

    connections, async_connections = RedisConnections(redis_url), AsyncRedisConnections(redis_url)
    assert ids(await asyncio.to_thread(follow, connections)) == ["1-1"]
    assert ids([event async for event in async_connections.follow(run("async"), KEYS, read=nothing)]) == ["1-1"]
    await until_nobody_is_subscribed(redis_url)
    connections.close()
    await async_connections.close()
    assert results["sync"] == results["async"]
    newest, first_page, second_page, *others = results["sync"]
    stored = [(event_id, text.encode()) for event_id, text in zip(IDS, HISTORY, strict=True)][:published]
    assert (newest, first_page, second_page) == (stored[-1] if stored else None, stored, stored[3:])
    assert others == [None, [], None, [b"live"]]


# -- Redis in trouble --


async def test_followers_whose_connection_is_cut_go_on(
    log: redis.asyncio.Redis, client: AsyncClient, redis_url: str
) -> None:
    followers = [asyncio.create_task(collect(client)) for _ in range(20)]
    for event in HISTORY:
        await append(log, KEYS, event)
        if event in (HISTORY[3], HISTORY[10], HISTORY[15]):
            await log.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    for events in await asyncio.gather(*followers):
        assert ids(events) == IDS


async def test_a_restart_of_redis_that_loses_the_log_is_healed_by_the_worker() -> None:
    with EmbeddedValkey() as server:
        text = ""
        publisher = Publisher(
            parse_redis_url(server.url), prefix="keepstream", log_ttl=60, buffer_bytes=1_000_000, merge_above=1000
        )
        publication = publisher.open(
            "default", JOB_ID, 1, lambda: {"choices": [{"index": 0, "content": text}], "finished": False}
        )

        def send(piece: str) -> None:
            nonlocal text
            text += piece
            publication.send_deltas([Delta(0, {"content": piece})])

        async with AsyncClient(server.url) as client:
            joined = asyncio.Event()

            async def hold() -> Transcript:
                held = Transcript()
                async for event in client.follow(JOB_ID, timeout=60):
                    assert held.apply(event)
                    joined.set()
                return held

            publication.send("attempt.started", {"model": "m", "provider": "p", "reason": "first"})
            early = [asyncio.create_task(hold()) for _ in range(10)]
            send("before ")
            await joined.wait()
            await asyncio.to_thread(server.kill)
            for n in range(50):
                send(f"during{n} ")
            await asyncio.to_thread(server.start)
            send("after ")
            late = [asyncio.create_task(hold()) for _ in range(10)]
            await publication.wait_flushed(60)
            publication.send(
                "job.completed",
                {"status": "completed", "attempts": 1, "output_sha256": output_sha256([text])},
            )
            for held in await asyncio.gather(*early, *late):
                assert held.text == text
                assert held.terminal is not None
                assert held.sha256() == held.terminal.output_sha256
        await publisher.close(1)


@pytest.mark.slow
async def test_a_frozen_redis_is_waited_for() -> None:
    with EmbeddedValkey() as server:
        async with AsyncClient(server.url) as client, redis.asyncio.Redis.from_url(server.url) as log:
            follower = asyncio.create_task(collect(client, timeout=60))
            for event in HISTORY[:5]:
                await append(log, KEYS, event)
            server.freeze()
            await asyncio.sleep(7)  # longer than all time-outs of the client, so its connections are gone
            server.thaw()
            for event in HISTORY[5:]:
                await append(log, KEYS, event)
            assert ids(await follower) == IDS


def test_a_slow_reader_is_cut_off_by_redis_and_still_misses_nothing() -> None:
    """In the sync form, in which each reader has a connection of its own."""
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as log, Client(server.url) as client:
        log.config_set("client-output-buffer-limit", "pubsub 200kb 100kb 1")

        def publish(event_id: str, event: str) -> None:
            log.eval(live_join.APPEND, 2, KEYS.log, KEYS.channel, event_id, event)

        publish("1-1", started("1-1"))
        events = client.follow(JOB_ID)
        assert next(events).id == "1-1"
        publish("1-2", delta("1-2", "x"))
        assert next(events).id == "1-2"  # live by now
        filling = "x" * 10_000
        n = 2
        while log.client_list(_type="pubsub"):
            n += 1
            publish(f"1-{n}", delta(f"1-{n}", filling))
            assert n < 10_000
        publish(f"1-{n + 1}", ended(f"1-{n + 1}", "completed", "x" + (n - 2) * filling))
        assert [event.id for event in events] == [f"1-{i}" for i in range(3, n + 2)]


async def test_large_events_arrive_whole(log: redis.asyncio.Redis, client: AsyncClient) -> None:
    big = "ü" * 3_000_000
    follower = asyncio.create_task(collect(client))
    for text in (started("1-1"), delta("1-2", big), delta("1-3", big), ended("1-4", "completed", big + big)):
        await append(log, KEYS, text)
    held = Transcript()
    for event in await follower:
        held.apply(event)
    assert held.text == big + big


# -- the database answers --


@pytest.mark.parametrize("after", [None, "1-3", "2-4"])
async def test_an_expired_log_is_answered_from_the_database_at_once(
    redis_url: str, stored: str, after: str | None
) -> None:
    took: list[float] = []
    events: list[Event] = []
    async with AsyncClient(redis_url, database_url=stored) as client:
        for _ in range(3):
            began = time.monotonic()
            events = await collect(client, after)
            took.append(time.monotonic() - began)
    assert min(took) < 1, "it does not wait until the job counts as silent"
    assert [(event.id, event.type) for event in events] == [("2-12", "snapshot"), ("2-13", "job.completed")]
    held = Transcript()
    for event in events:
        assert held.apply(event)
    assert held.text == TEXT
    assert held.terminal is not None
    assert held.sha256() == held.terminal.output_sha256


def test_the_sync_client_answers_from_the_database_too(redis_url: str, stored: str) -> None:
    with Client(redis_url, database_url=stored) as client:
        assert [event.id for event in client.follow(JOB_ID)] == ["2-12", "2-13"]
        assert list(client.follow(JOB_ID, "2-13")) == []


@pytest.mark.slow
async def test_a_terminal_event_that_never_came_is_told_from_the_row(
    log: redis.asyncio.Redis, redis_url: str, stored: str
) -> None:
    for event in HISTORY[:-1]:
        await append(log, KEYS, event)
    async with AsyncClient(redis_url, database_url=stored) as client:
        assert ids(await collect(client)) == IDS


async def test_a_dead_redis_does_not_keep_a_result_from_its_reader(stored: str) -> None:
    async with AsyncClient("redis://127.0.0.1:1", database_url=stored) as client:
        assert ids(await collect(client)) == ["2-12", "2-13"]


async def test_a_dead_database_does_not_keep_the_events_from_their_reader(
    log: redis.asyncio.Redis, redis_url: str
) -> None:
    async with AsyncClient(redis_url, database_url="postgresql+psycopg://u:p@127.0.0.1:1/x") as client:
        follower = asyncio.create_task(collect(client))
        for event in HISTORY:
            await append(log, KEYS, event)
        assert ids(await follower) == IDS


async def test_a_queued_job_that_is_cancelled_ends_its_followers_without_any_worker(
    redis_url: str, database_url: str
) -> None:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    async with AsyncClient(redis_url, database_url=database_url) as client:
        job_id = await client.enqueue(model="m", messages=[{"role": "user", "content": "x"}])

        async def follow() -> list[str]:
            return [event.type async for event in client.follow(job_id)]

        follower = asyncio.create_task(follow())
        assert await client.cancel(job_id) is JobStatus.CANCELLED
        assert await follower == ["job.cancelled"]


async def test_an_unknown_job_is_not_found(redis_url: str, stored: str) -> None:
    async with AsyncClient(redis_url, database_url=stored) as client:
        with pytest.raises(JobNotFoundError):
            await anext(client.follow("nobody", not_found_after=0))


# -- what the reader may do --


@pytest.mark.parametrize("after", ["", "-1", "1", "0-0", "$", "1-1 "])
async def test_a_malformed_cursor_is_an_error_before_anything_is_asked(after: str) -> None:
    async with AsyncClient("redis://127.0.0.1:1") as client:
        with pytest.raises(InvalidCursorError):
            client.follow(JOB_ID, after)


async def test_a_cursor_from_another_job_is_an_error(log: redis.asyncio.Redis, client: AsyncClient) -> None:
    for event in HISTORY[:5]:
        await append(log, KEYS, event)
    with pytest.raises(InvalidCursorError):
        await anext(client.follow(JOB_ID, "3-7"))


async def test_a_silent_job_is_a_timeout(client: AsyncClient) -> None:
    began = time.monotonic()
    with pytest.raises(FollowTimeoutError):
        await anext(client.follow(JOB_ID, timeout=0.5))
    assert time.monotonic() - began < 60


async def test_breaking_off_gives_the_connection_back(
    log: redis.asyncio.Redis, client: AsyncClient, redis_url: str
) -> None:
    await append(log, KEYS, HISTORY[0])
    async for _ in client.follow(JOB_ID):
        assert subscribers(redis_url) == 1
        break
    await until_nobody_is_subscribed(redis_url)
    async with contextlib.aclosing(client.follow(JOB_ID)) as events:
        await anext(events)
    await until_nobody_is_subscribed(redis_url)


def test_breaking_off_gives_the_sync_connection_back(redis_url: str) -> None:
    with Client(redis_url) as client, redis.Redis.from_url(redis_url) as log:
        log.xadd(KEYS.log, {"event": HISTORY[0]}, id="1-1")
        for _ in client.follow(JOB_ID):
            assert subscribers(redis_url) == 1
            break
        asyncio.run(until_nobody_is_subscribed(redis_url))


async def test_a_reader_that_is_cancelled_gives_its_connection_back(client: AsyncClient, redis_url: str) -> None:
    reader = asyncio.create_task(collect(client))
    async with asyncio.timeout(60):
        while not subscribers(redis_url):  # noqa: ASYNC110  # the server tells no one
            await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until_nobody_is_subscribed(redis_url)


async def test_a_wrong_password_is_an_error_at_once() -> None:
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as admin:
        admin.config_set("requirepass", "right")
        async with AsyncClient(server.url.replace("redis://", "redis://:wrong@")) as client:
            with pytest.raises(InvalidSettingError, match="user and password"):
                await anext(client.follow(JOB_ID))


async def test_a_log_that_is_no_log_is_an_error_at_once(
    log: redis.asyncio.Redis, client: AsyncClient, redis_url: str
) -> None:
    await log.set(KEYS.log, "somebody else's")
    with pytest.raises(InvalidSettingError, match=r"WRONGTYPE.*prefix"):
        await anext(client.follow(JOB_ID))
    with Client(redis_url) as sync_client, pytest.raises(InvalidSettingError, match=r"WRONGTYPE.*prefix"):
        next(sync_client.follow(JOB_ID))
