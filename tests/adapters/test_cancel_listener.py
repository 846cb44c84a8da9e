"""The control channel on a real Redis: lost notices, notices that all workers hear, nudges."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import redis
import redis.asyncio

from keepstream.client.redis_url import parse_redis_url
from keepstream.names import control_channel, job_keys
from keepstream_worker import store
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.service import _redis_client
from keepstream_worker.upkeep.cancel_listener import CancelListener
from keepstream_worker.values import JobKey
from tests.cluster import wait_until

KEY: Final = JobKey("default", "running-job")
PREFIX: Final = "cancels"  #: Nobody else listens here.
REQUEST: Final = job_keys(KEY.tenant, KEY.id, PREFIX).cancel


class Database:
    """One that notes which cancels it is told, and has nothing to say to them."""

    def __init__(self) -> None:
        self.cancelled: list[JobKey] = []

    async def run(self, operation: object, key: JobKey) -> None:
        assert operation is store.cancel
        self.cancelled.append(key)


class Ends:
    """Of no job."""

    async def publish_again(self) -> None:
        """There is nothing to publish."""


class Worker:
    """What a cancel listener sees of its worker."""

    def __init__(self, client: redis.asyncio.Redis, database: Database, queue: str = "completions") -> None:
        self.active: dict[JobKey, object] = {}
        self.asked: list[tuple[JobKey, Stop]] = []
        self.nudges = 0
        parts: tuple[Any, ...] = (client, PREFIX, queue, database, self, None, Ends(), self._note_nudge)
        self.listener = CancelListener(*parts)

    def request_stop(self, key: JobKey, stop: Stop) -> bool:
        """Note the request, as every worker that hears of it does."""
        self.asked.append((key, stop))
        return key in self.active

    def _note_nudge(self) -> None:
        self.nudges += 1


@asynccontextmanager
async def listening(url: str, *queues: str) -> AsyncIterator[tuple[list[Worker], Database]]:
    """Workers of these queues, all of which hear the control channel."""
    database = Database()
    async with _redis_client(parse_redis_url(url)) as client:
        workers = [Worker(client, database, queue) for queue in queues]
        for worker in workers:
            worker.listener.start()
        with redis.Redis.from_url(url) as other:
            channel = control_channel(PREFIX)

            def all_listen() -> bool:
                ((_, number),) = other.pubsub_numsub(channel)
                return bool(number == len(workers))

            await asyncio.to_thread(wait_until, all_listen, "the workers listen")
        try:
            yield workers, database
        finally:
            for worker in workers:
                await worker.listener.stop()


async def say(url: str, notice: dict[str, Any] | bytes) -> None:
    """Publish something on the control channel."""
    data = notice if isinstance(notice, bytes) else json.dumps(notice).encode()
    async with redis.asyncio.Redis.from_url(url) as client:
        await client.publish(control_channel(PREFIX), data)


async def test_request_made_while_the_connection_was_broken_is_found(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as other:
        before = {entry["id"] for entry in other.client_list(_type="pubsub")}
        async with listening(redis_url, "completions") as ((worker,), _):
            worker.active[KEY] = object()
            (connection,) = {entry["id"] for entry in other.client_list(_type="pubsub")} - before
            # The request alone: its notice went out while nobody listened.
            other.set(REQUEST, "1")
            other.client_kill_filter(_id=connection)
            await asyncio.to_thread(wait_until, lambda: worker.asked, "the job is stopped")
    assert worker.asked == [(KEY, Stop.CANCELLED)]


async def test_one_cancel_is_one_workers_work(redis_url: str) -> None:
    async with listening(redis_url, *["completions"] * 5) as (workers, database):
        with redis.Redis.from_url(redis_url) as other:
            other.set(REQUEST, "1", ex=60)
            await say(redis_url, {"tenant": KEY.tenant, "job_id": KEY.id})
            await asyncio.to_thread(wait_until, lambda: all(one.asked for one in workers), "all have heard")
            await asyncio.to_thread(wait_until, lambda: database.cancelled, "one has said so")
            assert other.ttl(REQUEST) > 0, "it still goes by itself"
        # A second one about another job, so that whatever was still to be done for the first is done.
        await say(redis_url, {"wake": ["completions"]})
        await asyncio.to_thread(wait_until, lambda: all(one.nudges for one in workers), "all have heard")
    assert [one.asked for one in workers] == [[(KEY, Stop.CANCELLED)]] * 5, "the one that runs it stops it at once"
    assert database.cancelled == [KEY]


async def test_notice_without_a_request_cancels_nothing(redis_url: str) -> None:
    async with listening(redis_url, "completions") as ((worker,), database):
        await say(redis_url, {"tenant": KEY.tenant, "job_id": KEY.id})
        await say(redis_url, {"wake": ["completions"]})
        await asyncio.to_thread(wait_until, lambda: worker.nudges, "both were heard")
    assert worker.asked == []
    assert database.cancelled == []


async def test_nudge_is_for_the_workers_of_its_queues(redis_url: str) -> None:
    async with listening(redis_url, "completions", "completions", "others") as (workers, database):
        await say(redis_url, {"wake": ["completions"]})
        await say(redis_url, {"wake": ["others", "third"]})
        await asyncio.to_thread(wait_until, lambda: all(one.nudges for one in workers), "each was told")
    assert [one.nudges for one in workers] == [1, 1, 1]
    assert database.cancelled == []


@pytest.mark.parametrize(
    "notice", [b"", b"no JSON", b"[]", b"7", b"{}", b'{"wake": 7}', b'{"wake": "completions"}', b'{"tenant": "a"}']
)
async def test_notice_that_makes_no_sense_is_passed_over(redis_url: str, notice: bytes) -> None:
    async with listening(redis_url, "completions") as ((worker,), database):
        await say(redis_url, notice)
        await say(redis_url, {"wake": ["completions"]})
        await asyncio.to_thread(wait_until, lambda: worker.nudges, "the next one is heard")
    assert worker.nudges == 1
    assert worker.asked == []
    assert database.cancelled == []
