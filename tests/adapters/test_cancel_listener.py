"""The cancel listener hears of requests that were made while its connection was broken."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import redis

from keepstream.client.redis_url import parse_redis_url
from keepstream.names import job_keys
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.service import _redis_client
from keepstream_worker.upkeep.cancel_listener import CancelListener
from keepstream_worker.values import JobKey
from tests.cluster import wait_until

KEY = JobKey("default", "running-job")


class Database:
    """One that has nothing to say to a cancel."""

    async def run(self, *_: object) -> None:
        return None


async def test_request_made_while_the_connection_was_broken_is_found(redis_url: str) -> None:
    stopped: list[tuple[JobKey, Stop]] = []
    engine = SimpleNamespace(active={KEY: object()}, request_stop=lambda key, stop: stopped.append((key, stop)))
    async with _redis_client(parse_redis_url(redis_url)) as client:
        listener = CancelListener(client, "keepstream", cast("Any", Database()), cast("Any", engine), cast("Any", None))
        with redis.Redis.from_url(redis_url) as other:
            before = {entry["id"] for entry in other.client_list(_type="pubsub")}

            def listening() -> set[str]:
                return {entry["id"] for entry in other.client_list(_type="pubsub")} - before

            listener.start()
            (connection,) = await asyncio.to_thread(wait_until, listening, "the listener listens")
            # The request alone: its notice went out while nobody listened.
            other.set(job_keys(KEY.tenant, KEY.id).cancel, "1")
            other.client_kill_filter(_id=connection)
            await asyncio.to_thread(wait_until, lambda: stopped, "the job is stopped")
        await listener.stop()
    assert stopped == [(KEY, Stop.CANCELLED)]
