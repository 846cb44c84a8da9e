"""Many followers in one process, as a gateway has them: the client's two ways to follow, or redis-py alone.

In: ``--kind``, ``--redis-url``, and how many ``--followers`` of how many ``--jobs``, whose logs have begun.
Out: the JSON lines ``ready`` (each has the first event, with the process's memory before and after) and ``ended``, with
the number of deltas that all have got; with ``--idle`` nothing more is expected, and it ends with its input.

What redis-py does alone is the least that reading from a connection of one's own costs: messages are not even parsed.
"""

import argparse
import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import psutil
import redis.asyncio

from benchmarks.followers import say
from keepstream import AsyncClient
from keepstream.names import DEFAULT_TENANT, job_keys

_CONNECTS_AT_ONCE: Final = 50


class Crowd:
    """What all followers of the process have seen."""

    def __init__(self, size: int) -> None:
        """Expect ``size`` followers."""
        self.deltas = 0
        self.everybody_is_there = asyncio.Event()
        self._missing = size

    def arrived(self) -> None:
        """Note that a follower has its first event, or its subscription."""
        self._missing -= 1
        if not self._missing:
            self.everybody_is_there.set()


async def _follow(stream: AsyncIterator[Any], crowd: Crowd) -> None:
    await anext(stream)
    crowd.arrived()
    async for event in stream:
        crowd.deltas += event.type == "delta"


async def _read(connection: redis.asyncio.Redis, channel: str, crowd: Crowd, turns: asyncio.Semaphore) -> None:
    async with connection.pubsub() as subscription:
        async with turns:
            await subscription.subscribe(channel)
            await subscription.get_message(timeout=None)
        crowd.arrived()
        while True:
            message = await subscription.get_message(timeout=None)
            if message is not None:
                if b'"type":"job.' in message["data"]:
                    return
                crowd.deltas += 1


async def _main(kind: str, redis_url: str, followers: int, jobs: int, *, idle: bool) -> None:
    crowd = Crowd(followers)
    process = psutil.Process()
    names = [f"job-{n % jobs}" for n in range(followers)]
    async with (
        AsyncClient(redis_url) as client,
        redis.asyncio.Redis.from_url(redis_url, max_connections=100_000) as connection,
    ):
        turns = asyncio.Semaphore(_CONNECTS_AT_ONCE)

        def by_hand(name: str) -> Any:
            return _read(connection, job_keys(DEFAULT_TENANT, name).channel, crowd, turns)

        forms: dict[str, Callable[[str], Any]] = {
            "raw": lambda name: _follow(client.follow_raw(name, timeout=3600), crowd),
            "typed": lambda name: _follow(client.follow(name, timeout=3600), crowd),
            "hand": by_hand,
        }
        gc.collect()
        before = process.memory_info().rss
        tasks = [asyncio.create_task(forms[kind](name)) for name in names]
        await crowd.everybody_is_there.wait()
        gc.collect()
        say("ready", bytes_each=(process.memory_info().rss - before) / followers)
        if idle:
            await asyncio.to_thread(sys.stdin.read)
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        say("ended", deltas=crowd.deltas)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_followers")
    parser.add_argument("--kind", choices=("raw", "typed", "hand"), required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--followers", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--idle", action="store_true")
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.kind, arguments.redis_url, arguments.followers, arguments.jobs, idle=arguments.idle))
