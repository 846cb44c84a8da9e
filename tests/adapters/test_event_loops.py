"""One async client serves several event loops, in turn and at once, and each loop ends without its connections."""

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import uvloop
from sqlalchemy import create_engine

from keepstream import AsyncClient, tables
from keepstream.client import aio
from keepstream.errors import ClientClosedError, FollowTimeoutError, KeepstreamError, StoreUnavailableError
from tests.cluster import wait_until

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
LOOPS = pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture
def client(redis_url: str, database_url: str) -> AsyncClient:
    """A client that is made where no loop runs, as at import."""
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return AsyncClient(redis_url, database_url=database_url)


def run(make_loop: MakeLoop, client: AsyncClient) -> None:
    """Use every kind of connection of the client's on a loop of its own."""
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(use(client))


async def use(client: AsyncClient) -> None:
    job_id = await client.enqueue(REQUEST)
    found, _ = await asyncio.gather(client.get(job_id), client.cancel(job_id))
    assert found is not None
    waiting = await client.enqueue(REQUEST)
    with pytest.raises(FollowTimeoutError):
        await anext(client.follow(waiting, timeout=0.1))


def followers(redis_url: str) -> int:
    with redis.Redis.from_url(redis_url) as connection:
        return len(connection.client_list(_type="pubsub"))


async def test_a_call_that_finds_no_thread_in_time_says_so_and_is_not_made(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "_FREE_THREAD", 0.2)
    begun, go_on = threading.Barrier(aio._MAX_THREADS + 1), threading.Event()

    def hang() -> bool:
        begun.wait(60)
        return go_on.wait(60)

    hanging = [asyncio.create_task(client._in_thread(hang)) for _ in range(aio._MAX_THREADS)]
    await asyncio.to_thread(begun.wait, 60)
    try:
        with pytest.raises(StoreUnavailableError, match="no thread was free"):
            await client.enqueue(REQUEST)
    finally:
        go_on.set()
    assert await asyncio.gather(*hanging) == [True] * aio._MAX_THREADS
    monkeypatch.setattr(aio, "_FREE_THREAD", 60.0)
    assert list(await client.list()) == []
    await client.close()


@LOOPS
def test_one_client_serves_one_loop_after_the_other(client: AsyncClient, redis_url: str, make_loop: MakeLoop) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        before = {entry["id"] for entry in connection.client_list()}
        for _ in range(3):
            run(make_loop, client)
            gc.collect()  # what was not closed complains, and that is an error here
        for threads_own in (client._sender._connections.get(), client._redis._links.get().commands):
            threads_own.connection_pool.disconnect()

        def left() -> set[str]:
            return {entry["id"] for entry in connection.client_list()} - before

        wait_until(lambda: not left(), "the loops' connections to be closed")
    asyncio.run(client.close())


@LOOPS
def test_one_client_serves_several_loops_in_threads(client: AsyncClient, make_loop: MakeLoop) -> None:
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(run, make_loop, client) for _ in range(8)]:
            done.result()
    asyncio.run(client.close())
    gc.collect()


def test_a_client_that_is_never_closed_leaves_no_connection_to_its_loop(redis_url: str) -> None:
    async def forget() -> None:
        with pytest.raises(FollowTimeoutError):
            await anext(AsyncClient(redis_url).follow("x", timeout=0.1))

    asyncio.run(forget())
    gc.collect()
    wait_until(lambda: followers(redis_url) == 0, "the connection to be closed")


def test_closing_a_client_ends_its_followers_on_all_loops(client: AsyncClient, redis_url: str) -> None:
    ended: list[str] = []
    following = threading.Barrier(4)

    async def follow() -> None:
        job_id = await client.enqueue(REQUEST)
        events = client.follow(job_id)
        step = asyncio.ensure_future(anext(events))
        while not step.done() and not followers(redis_url):  # noqa: ASYNC110  # the server tells nobody
            await asyncio.sleep(0.01)
        await asyncio.to_thread(following.wait)
        try:
            await step
        except KeepstreamError as error:
            ended.append(type(error).__name__)

    with ThreadPoolExecutor(3) as threads:
        loops = [threads.submit(asyncio.run, follow()) for _ in range(3)]
        following.wait()
        asyncio.run(client.close())
        for loop in loops:
            loop.result()
    assert ended == [ClientClosedError.__name__] * 3
    gc.collect()
