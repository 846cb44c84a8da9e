"""Many followers in one process: all connect at the first try, and while nothing happens they cost next to nothing."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import pytest
import redis
import redis.asyncio
from sqlalchemy import create_engine, event

from keepstream import AsyncClient, Client, tables
from keepstream.client.summaries import SummaryReader
from keepstream.errors import FollowTimeoutError, StoreUnavailableError
from keepstream.names import job_keys
from keepstream.results import JobStatus
from tests.cluster import wait_until
from tests.event_texts import delta, ended, started
from tests.live_join import append

CROWD = 300
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def database(postgres_url: str) -> str:
    engine = create_engine(postgres_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return postgres_url


async def until_subscribed(log: redis.asyncio.Redis, followers: int) -> None:
    while (await log.info("clients"))["pubsub_clients"] != followers:  # noqa: ASYNC110  # the server tells nobody
        await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_a_crowd_of_threads_connects_at_the_first_try(redis_url: str) -> None:
    """A connection that the client itself had given up would be made again."""
    keys = job_keys("default", "job-1")

    def follow(client: Client) -> list[str]:
        return [event.id for event in client.follow("job-1")]

    async def connections_made(log: redis.asyncio.Redis) -> int:
        return int((await log.info("stats"))["total_connections_received"])

    async with redis.asyncio.Redis.from_url(redis_url, single_connection_client=True) as log:
        await append(log, keys, started("1-1"))
        await until_subscribed(log, 0)  # the followers of the test before have left
        before = await connections_made(log)
        with Client(redis_url) as client, ThreadPoolExecutor(CROWD) as threads:
            loop = asyncio.get_running_loop()
            followers = [loop.run_in_executor(threads, follow, client) for _ in range(CROWD)]
            await until_subscribed(log, CROWD)
            made = await connections_made(log) - before
            await append(log, keys, delta("1-2", "a"))
            await append(log, keys, ended("1-3", "completed", "a"))
            assert await asyncio.gather(*followers) == [["1-1", "1-2", "1-3"]] * CROWD
    # For commands; and on a machine that stands still for seconds a few are given up for good reasons.
    others = 20 + CROWD // 4
    assert CROWD <= made <= CROWD + others


@pytest.mark.slow
async def test_a_crowd_is_told_together_of_a_server_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Its members connect in turn, and each turn takes seconds; but who waits learns what happened to the others."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as silent:
        client = AsyncClient(f"redis://127.0.0.1:{silent.getsockname()[1]}")

        async def follow(n: int) -> None:
            with pytest.raises(FollowTimeoutError, match="Redis"):
                await anext(client.follow(f"job-{n}", timeout=0.1))

        await asyncio.gather(*(follow(n) for n in range(CROWD)))
        await client.close()
        silent.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
    assert 0 < asked < CROWD / 2, "in turns each would ask for itself"


@pytest.mark.slow
def test_fifty_threads_use_one_client(redis_url: str, database: str) -> None:
    def use(client: Client, n: int) -> None:
        job_id = client.enqueue(REQUEST, metadata={"n": n})
        found = client.get(job_id)
        assert found is not None
        assert found.metadata == {"n": n}
        assert client.cancel(job_id) is JobStatus.CANCELLED
        assert [event.type for event in client.follow(job_id)] == ["job.cancelled"]

    with Client(redis_url, database_url=database) as client, ThreadPoolExecutor(50) as threads:
        for done in [threads.submit(use, client, n) for n in range(200)]:
            done.result()


@contextlib.contextmanager
def commits(client: Client | AsyncClient) -> Iterator[Callable[[], int]]:
    assert client._database is not None
    count = 0

    def note(_: object) -> None:
        nonlocal count
        count += 1

    engine = client._database._engine.get()
    event.listen(engine, "commit", note)
    yield lambda: count
    event.remove(engine, "commit", note)


@pytest.mark.slow
async def test_a_silent_crowd_reads_the_database_once_a_second(redis_url: str, database: str) -> None:
    async with AsyncClient(redis_url, database_url=database) as client:
        ids = [await client.enqueue(REQUEST) for _ in range(10)]
        began = time.monotonic()
        with commits(client) as counted:

            async def follow(job_id: str) -> None:
                with pytest.raises(FollowTimeoutError):
                    await anext(client.follow(job_id, timeout=5))

            await asyncio.gather(*(follow(ids[n % len(ids)]) for n in range(CROWD)))
            assert 1 <= counted() <= time.monotonic() - began + 2


def test_questions_are_asked_together_and_each_is_answered() -> None:
    asked: list[list[str]] = []

    def read(job_ids: list[str]) -> Any:
        asked.append(job_ids)
        return {job_id: f"summary of {job_id}" for job_id in job_ids if job_id != "unknown"}

    reader = SummaryReader(read)
    questions = [reader.join(f"job-{n}") for n in range(1200)] + [reader.join("unknown")]
    began = time.monotonic()
    with ThreadPoolExecutor(20) as threads:
        for _ in range(2):
            futures = list(threads.map(lambda question: question.ask(), questions))
            answers = [future.result() for future in futures]
            assert answers == [f"summary of job-{n}" for n in range(1200)] + [None]
    assert len(asked) <= time.monotonic() - began + 2
    assert max(map(len, asked)) <= 500


def test_a_lone_follower_is_answered_at_once_and_leaves_no_thread() -> None:
    reader = SummaryReader[str](lambda _: {})
    question = reader.join("job-1")
    took = []
    for _ in range(20):
        began = time.monotonic()
        assert question.ask().result() is None
        took.append(time.monotonic() - began)
    assert median(took) < 0.9, "it waits for no second to be over"
    wait_until(
        lambda: "keepstream-summaries" not in {thread.name for thread in threading.enumerate()}, "the thread to end"
    )


def test_an_error_reaches_all_who_asked() -> None:
    def read(_: list[str]) -> Any:
        raise StoreUnavailableError("away")

    reader = SummaryReader(read)
    questions = [reader.join(f"job-{n}") for n in range(5)]
    for future in [question.ask() for question in questions]:
        with pytest.raises(StoreUnavailableError, match="away"):
            future.result()


def test_who_has_gone_keeps_nobody_waiting() -> None:
    reader = SummaryReader[str](lambda _: {})
    question = reader.join("job-1")
    gone = [question.ask() for _ in range(5)]
    for future in gone:
        future.cancel()
    assert question.ask().result() is None
