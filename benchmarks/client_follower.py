"""One follower, as a service would have it: the client's ``follow()``, or redis-py and ``json.loads`` by hand.

In: ``--kind``, ``--redis-url`` and ``--job``, a Keepstream job.
Out: the JSON lines ``ready`` and ``ended``, the latter with the number of deltas.

It runs in a process of its own, so that the harness can measure the CPU it takes.
"""

import argparse
import asyncio
import json

import redis

from benchmarks.followers import say
from keepstream import AsyncClient, Client
from keepstream.events import DeltaEvent
from keepstream.names import DEFAULT_TENANT, job_keys


def _client(redis_url: str, job: str) -> int:
    with Client(redis_url) as client:
        return sum(isinstance(event, DeltaEvent) for event in client.follow(job))


async def _async_client(redis_url: str, job: str) -> int:
    deltas = 0
    async with AsyncClient(redis_url) as client:
        async for event in client.follow(job):
            deltas += isinstance(event, DeltaEvent)
    return deltas


def _by_hand(redis_url: str, job: str) -> int:
    deltas = 0
    with redis.Redis.from_url(redis_url) as connection, connection.pubsub() as subscription:
        subscription.subscribe(job_keys(DEFAULT_TENANT, job).channel)
        for message in subscription.listen():
            if message["type"] == "message":
                event = json.loads(message["data"])
                deltas += event["type"] == "delta"
                if event["type"].startswith("job."):
                    break
    return deltas


def _main(kind: str, redis_url: str, job: str) -> None:
    say("ready")
    if kind == "async":
        deltas = asyncio.run(_async_client(redis_url, job))
    else:
        deltas = (_client if kind == "sync" else _by_hand)(redis_url, job)
    say("ended", deltas=deltas)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client_follower")
    parser.add_argument("--kind", choices=("sync", "async", "hand"), required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--job", required=True)
    arguments = parser.parse_args()
    _main(arguments.kind, arguments.redis_url, arguments.job)
