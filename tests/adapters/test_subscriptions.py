"""All followers of an event loop share one subscription connection, and none of them notices the others."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from keepstream import AsyncClient
from keepstream.client import subscriptions
from keepstream.client.follower import FollowerRun, Listen, Operation, Subscribe
from keepstream.client.mailbox import MOST_EVENTS, Mailbox
from keepstream.client.payloads import TYPED, Payload
from keepstream.client.redis_aio import AsyncRedisConnections
from keepstream.client.redis_connections import make_async_pool
from keepstream.client.redis_url import parse_redis_url
from keepstream.client.subscriptions import Subscriptions
from keepstream.errors import ClientClosedError, InvalidSettingError
from keepstream.events import RawEvent
from keepstream.names import JobKeys, job_keys
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from tests.event_texts import delta, ended, started
from tests.live_join import append
from tests.tcp_proxy import TcpProxy

CROWD = 600
LONG = 60.0  #: Seconds, more than anything takes.


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
async def shared(redis_url: str) -> AsyncIterator[Subscriptions]:
    """The subscriptions of this event loop, without followers."""
    pool = make_async_pool(parse_redis_url(redis_url), protocol=2, answer_timeout=LONG)
    shared = Subscriptions(pool)
    yield shared
    await shared.close()
    await pool.aclose()


def keys_of(job_id: str) -> JobKeys:
    return job_keys("default", job_id)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LONG):
        while not await holds():  # noqa: ASYNC110  # the server tells nobody
            await asyncio.sleep(0.01)


async def subscribers(connection: redis.asyncio.Redis, channel: str) -> int:
    return int((await connection.pubsub_numsub(channel))[0][1])


async def subscription_connections(connection: redis.asyncio.Redis) -> list[str]:
    return [str(entry["id"]) for entry in await connection.client_list(_type="pubsub")]


async def ids(client: AsyncClient, job_id: str, seen: asyncio.Semaphore | None = None) -> list[str]:
    found = []
    async for event in client.follow(job_id, timeout=LONG):
        found.append(event.id)
        if seen is not None:
            seen.release()
    return found


async def all_of(count: int, seen: asyncio.Semaphore) -> None:
    for _ in range(count):
        await seen.acquire()


# -- one connection --


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 60, CROWD])
async def test_a_crowd_of_followers_has_one_subscription_connection(
    client: AsyncClient, log: redis.asyncio.Redis, jobs: int
) -> None:
    names = [f"job-{n % jobs}" for n in range(CROWD)]
    for name in set(names):
        await append(log, keys_of(name), started("1-1"))
    before = (await log.info("stats"))["total_connections_received"]
    seen = asyncio.Semaphore(0)
    followers = [asyncio.create_task(ids(client, name, seen)) for name in names]
    await all_of(CROWD, seen)
    assert len(await subscription_connections(log)) == 1
    assert [await subscribers(log, keys_of(name).channel) for name in set(names)] == [1] * jobs
    assert (await log.info("stats"))["total_connections_received"] - before <= 5, "one, and four for the logs"
    for name in set(names):
        await append(log, keys_of(name), delta("1-2", "a"))
        await append(log, keys_of(name), ended("1-3", "completed", "a"))
    assert await asyncio.gather(*followers) == [["1-1", "1-2", "1-3"]] * CROWD
    await until(lambda: nobody_subscribes(log))


async def nobody_subscribes(connection: redis.asyncio.Redis) -> bool:
    return not await subscription_connections(connection)


async def test_an_event_is_read_once_for_all_who_get_it_live(client: AsyncClient, log: redis.asyncio.Redis) -> None:
    await append(log, keys_of("job-1"), started("1-1"))
    streams: list[Any] = [form("job-1") for _ in range(3) for form in (client.follow, client.follow_raw)]
    for stream in streams:
        await anext(stream)
    await append(log, keys_of("job-1"), delta("1-2", "a"))
    live = [await anext(stream) for stream in streams]
    typed, raw = live[::2], live[1::2]
    assert all(event is typed[0] for event in typed)
    assert all(event is raw[0] for event in raw)
    assert isinstance(raw[0], RawEvent)
    for stream in streams:
        await stream.aclose()


async def test_followers_of_all_tenants_and_of_views_share_it(client: AsyncClient, log: redis.asyncio.Redis) -> None:
    seen = asyncio.Semaphore(0)
    followers = []
    for n in range(10):
        tenant = f"shop-{n}"
        await append(log, job_keys(tenant, "job-1"), started("1-1"))
        followers.append(asyncio.create_task(ids(client.for_tenant(tenant), "job-1", seen)))
    await all_of(10, seen)
    assert len(await subscription_connections(log)) == 1
    for n in range(10):
        await append(log, job_keys(f"shop-{n}", "job-1"), ended("1-2", "completed", ""))
    assert await asyncio.gather(*followers) == [["1-1", "1-2"]] * 10


async def test_a_connection_without_followers_is_closed_after_a_while(
    client: AsyncClient, log: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_IDLE_AFTER", 1)
    others = {entry["id"] for entry in await log.client_list()}
    for _ in range(2):  # it is made anew when it is needed
        await append(log, keys_of("job-1"), started("1-1"))
        stream = client.follow("job-1", timeout=LONG)
        await anext(stream)
        (used,) = await subscription_connections(log)
        assert used not in others
        await stream.aclose()

        async def is_closed(used: str = used) -> bool:
            return used not in {entry["id"] for entry in await log.client_list()}

        await until(is_closed)
        await log.delete(keys_of("job-1").log)


# -- who leaves, and who is refused --


@pytest.mark.parametrize("how", ["closed", "cancelled", "broken off"])
async def test_who_leaves_leaves_the_others_their_channel(
    client: AsyncClient, log: redis.asyncio.Redis, how: str
) -> None:
    keys = keys_of("job-1")
    await append(log, keys, started("1-1"))
    seen = asyncio.Semaphore(0)
    stays, leaves = (asyncio.create_task(ids(client, "job-1", seen)) for _ in range(2))
    stream = client.follow("job-1")
    await anext(stream)
    await all_of(2, seen)
    if how == "closed":
        await stream.aclose()
    elif how == "cancelled":
        leaves.cancel()
        await asyncio.wait([leaves])
    else:
        async for _ in client.follow("job-1"):
            break
    assert await subscribers(log, keys.channel) == 1
    await append(log, keys, ended("1-2", "completed", ""))
    assert await stays == ["1-1", "1-2"]
    await stream.aclose()
    leaves.cancel()

    async def is_left() -> bool:
        return await subscribers(log, keys.channel) == 0

    await until(is_left)


async def test_who_comes_while_the_last_one_leaves_is_subscribed(shared: Subscriptions, log: Any) -> None:
    for n in range(50):
        first = await shared.subscribe("c")
        first.leave()
        second = await shared.subscribe("c")
        assert await log.publish("c", str(n)) == 1
        assert [payload.data for payload in await second.take(LONG) or []] == [str(n).encode()]
        second.leave()


async def test_who_is_cancelled_while_it_subscribes_is_subscribed_to_nothing(shared: Subscriptions, log: Any) -> None:
    await shared.subscribe("other")
    tasks = [asyncio.create_task(shared.subscribe(f"c-{n}")) for n in range(100)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)

    async def is_left() -> bool:
        return bool(await log.pubsub_channels() == [b"other"])

    await until(is_left)


async def test_a_channel_that_redis_refuses_is_an_error_for_its_followers_alone() -> None:
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as admin:
        rules = ["on", ">word", "resetkeys", "~keepstream:*", "resetchannels", "&keepstream:shop:*", "+@all"]
        admin.execute_command("ACL", "SETUSER", "shop", *rules)
        url = server.url.replace("redis://", "redis://shop:word@")
        async with AsyncClient(url, tenant="shop") as client, redis.asyncio.Redis.from_url(server.url) as log:
            await append(log, job_keys("shop", "job-1"), started("1-1"))
            seen = asyncio.Semaphore(0)
            follower = asyncio.create_task(ids(client, "job-1", seen))
            await seen.acquire()
            used = await subscription_connections(log)
            refused = [anext(client.for_tenant("other").follow("job-1")) for _ in range(3)]
            for outcome in await asyncio.gather(*refused, return_exceptions=True):
                assert isinstance(outcome, InvalidSettingError)
                assert "NoPermissionError" in str(outcome)
            assert await subscription_connections(log) == used
            await append(log, job_keys("shop", "job-1"), ended("1-2", "completed", ""))
            assert await follower == ["1-1", "1-2"]


# -- a slow reader --


@pytest.mark.parametrize("size", [10, 100_000], ids=["many events", "many bytes"])
async def test_a_slow_reader_harms_nobody_and_misses_nothing(
    client: AsyncClient, log: redis.asyncio.Redis, size: int
) -> None:
    keys = keys_of("job-1")
    await append(log, keys, started("1-1"))
    seen = asyncio.Semaphore(0)
    slow = client.follow("job-1", timeout=LONG)
    assert (await anext(slow)).id == "1-1"
    quick = asyncio.create_task(ids(client, "job-1", seen))
    await seen.acquire()
    used = await subscription_connections(log)
    count = 2 * MOST_EVENTS if size < 1_000 else 200
    for n in range(2, count):
        await append(log, keys, delta(f"1-{n}", "x" * size))
        await seen.acquire()  # the quick one keeps pace
    assert await subscription_connections(log) == used, "nobody was cut off"
    await append(log, keys, ended(f"1-{count}", "completed", "x"))
    expected = [f"1-{n}" for n in range(1, count + 1)]
    assert await quick == expected
    assert ["1-1"] + [event.id async for event in slow] == expected


async def test_a_full_mailbox_is_emptied_and_says_so(shared: Subscriptions, log: Any) -> None:
    slow, quick = await shared.subscribe("c"), await shared.subscribe("c")
    for n in range(MOST_EVENTS + 50):
        await log.publish("c", str(n))
        assert await quick.take(LONG)
    assert await slow.take(LONG) is None
    await log.publish("c", "next")
    assert [payload.data for payload in await slow.take(LONG) or []] == [b"next"]


async def test_a_wait_begins_anew_with_what_is_passed_on() -> None:
    mailbox, passed_on_at = Mailbox(), [0.0]

    def pass_on(_payload: Payload) -> bool:
        passed_on_at[0] = time.monotonic()
        return True

    wait = asyncio.create_task(mailbox.take(0.2, pass_on))
    for _ in range(10):
        await asyncio.sleep(0.05)
        mailbox.put(Payload(b""))
    assert await wait == []
    assert time.monotonic() - passed_on_at[0] >= 0.19


# -- connections that are lost --


async def test_a_connection_that_is_killed_again_and_again_loses_no_event(
    client: AsyncClient, log: redis.asyncio.Redis
) -> None:
    names = [f"job-{n}" for n in range(20)]
    followers = [asyncio.create_task(ids(client, name)) for name in names * 5]
    for place in range(1, 31):
        for name in names:
            text = started("1-1") if place == 1 else delta(f"1-{place}", "x")
            await append(log, keys_of(name), text if place < 30 else ended("1-30", "completed", ""))
        if place % 7 == 0:
            await log.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert await asyncio.gather(*followers) == [[f"1-{n}" for n in range(1, 31)]] * 100


async def test_after_a_cut_a_crowd_comes_back_by_few_connections() -> None:
    with EmbeddedValkey() as server, TcpProxy(server.port) as proxy:
        async with (
            AsyncClient(f"redis://127.0.0.1:{proxy.port}") as client,
            redis.asyncio.Redis.from_url(server.url) as log,
        ):
            names = [f"job-{n}" for n in range(CROWD)]
            for name in names:
                await append(log, keys_of(name), started("1-1"))
            seen = asyncio.Semaphore(0)
            followers = [asyncio.create_task(ids(client, name, seen)) for name in names]
            await all_of(CROWD, seen)
            proxy.cut()
            before, began = proxy.asked, time.monotonic()
            await asyncio.sleep(1.0)
            asked, outage = proxy.asked - before, time.monotonic() - began
            # A pause after each attempt to subscribe that failed; logs are only read when that has succeeded.
            assert asked <= outage / 0.1 + 5
            proxy.mend()
            for name in names:
                await append(log, keys_of(name), ended("1-2", "completed", ""))
            assert await asyncio.gather(*followers) == [["1-1", "1-2"]] * CROWD


async def test_a_connection_that_leads_to_the_wrong_server_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """It answers pings and confirms subscriptions, but what is published goes elsewhere by now."""
    with EmbeddedValkey() as old, EmbeddedValkey() as new, TcpProxy(old.port) as proxy:
        async with (
            AsyncClient(f"redis://127.0.0.1:{proxy.port}") as client,
            redis.asyncio.Redis.from_url(old.url) as old_log,
            redis.asyncio.Redis.from_url(new.url) as new_log,
        ):
            for log in (old_log, new_log):
                await append(log, keys_of("job-1"), started("1-1"))
            seen = asyncio.Semaphore(0)
            followers = [asyncio.create_task(ids(client, "job-1", seen)) for _ in range(3)]
            await all_of(3, seen)
            proxy.divert(new.port)
            await old_log.execute_command("CLIENT", "KILL", "TYPE", "normal")  # those for logs come anew
            await append(new_log, keys_of("job-1"), delta("1-2", "found in the log"))

            async def is_subscribed() -> bool:
                return await subscribers(new_log, keys_of("job-1").channel) == 1

            await until(is_subscribed)
            await all_of(3, seen)
            await append(new_log, keys_of("job-1"), ended("1-3", "completed", ""))
            assert await asyncio.gather(*followers) == [["1-1", "1-2", "1-3"]] * 3
            assert await subscription_connections(old_log) == []


async def test_only_a_subscription_that_seems_deaf_is_doubted(redis_url: str, log: redis.asyncio.Redis) -> None:
    """A follower also subscribes anew when its log could not be read, by another connection."""
    used = []

    def run() -> FollowerRun[Any]:
        for operation in (Subscribe(), Subscribe(), Subscribe(seems_deaf=True)):
            yield operation
            with redis.Redis.from_url(redis_url) as connection:
                used.append({entry["id"] for entry in connection.client_list(_type="pubsub")})
            yield Listen(0.01)

    async def nothing(_: Operation) -> None:
        return None

    connections = AsyncRedisConnections(redis_url)
    async for _ in connections.follow(run(), keys_of("job-1"), nothing):
        pass
    await connections.close()
    first, second, third = used
    assert first == second
    assert third - first, "a new one"


async def test_a_message_that_is_only_late_is_no_reason_to_leave(shared: Subscriptions, log: Any) -> None:
    subscription = await shared.subscribe("c")
    assert not await subscription.is_late()
    await log.publish("c", "late")
    assert await subscription.is_late()


async def test_a_server_that_falls_silent_is_noticed_though_nobody_asks_it_anything() -> None:
    with EmbeddedValkey() as server:
        pool = make_async_pool(parse_redis_url(server.url), protocol=2, answer_timeout=2.0)
        shared = Subscriptions(pool)
        subscription = await shared.subscribe("c")
        server.freeze()
        with pytest.raises(redis.exceptions.TimeoutError):
            await subscription.take(LONG)
        server.thaw()
        again = await shared.subscribe("c")
        assert not again.is_lost
        await shared.close()
        await pool.aclose()


async def test_a_loop_that_stands_still_does_not_blame_the_server(
    shared: Subscriptions, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_TICK", 0.05)  # so it would be dead after a quarter of a second
    subscription = await shared.subscribe("c")
    loop = asyncio.get_running_loop()
    end = loop.time() + 1.0
    while loop.time() < end:
        pass  # the loop stands still
    await log.publish("c", "x")
    assert [payload.data for payload in await subscription.take(LONG) or []] == [b"x"]


async def test_closing_ends_those_who_wait_for_anything(redis_url: str, log: redis.asyncio.Redis) -> None:
    client = AsyncClient(redis_url)
    await append(log, keys_of("job-1"), started("1-1"))
    seen = asyncio.Semaphore(0)
    followers = [asyncio.create_task(ids(client, "job-1", seen)) for _ in range(20)]
    await all_of(20, seen)
    more = [asyncio.create_task(ids(client, f"job-{n}")) for n in range(20)]
    await asyncio.sleep(0)
    await client.close()
    for outcome in await asyncio.gather(*followers, *more, return_exceptions=True):
        assert isinstance(outcome, ClientClosedError)
    await until(lambda: nobody_subscribes(log))


# -- the database --


async def test_a_database_that_does_not_answer_keeps_no_event_from_its_reader(
    redis_url: str, log: redis.asyncio.Redis, tmp_path: Path
) -> None:
    """A silent job is looked up; what arrives meanwhile is delivered."""
    asked = asyncio.Event()
    connections = AsyncRedisConnections(redis_url)
    client = AsyncClient(redis_url, database_url=f"sqlite:///{tmp_path}/x.db")
    keys = keys_of("job-1")

    async def never(_: Operation) -> Any:
        asked.set()
        await asyncio.Event().wait()

    run = client._run_follower("job-1", None, LONG, LONG, TYPED)
    events = connections.follow(run, keys, never)
    first = asyncio.ensure_future(anext(events))
    await asked.wait()
    await append(log, keys, started("1-1"))
    assert (await first).id == "1-1"
    await events.aclose()
    await connections.close()
    await client.close()
