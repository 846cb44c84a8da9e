"""The live join: followers join a job at random moments while it is being published.

In: a number of joins.
Out: how many of them lost, repeated or reordered an event, to a test and to the command line.

An event that is published after the log was read and before the subscription takes effect is easily lost.

    python -m tests.live_join --joins 10000
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields

import redis.asyncio

from keepstream import AsyncClient
from keepstream.names import JobKeys, job_keys, parse_event_id
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from tests.event_texts import delta, ended, started

JOINS_PER_JOB = 200
EVENTS = 120
_PAUSE = 0.01  # seconds between two events at most
APPEND = """
redis.call('XADD', KEYS[1], ARGV[1], 'event', ARGV[2])
redis.call('PUBLISH', KEYS[2], ARGV[2])
"""


@dataclass
class Counts:
    """The results of the joins."""

    joins: int = 0
    events: int = 0  #: Received by all followers together.
    lost: int = 0  #: Events that a follower should have got and did not.
    doubled: int = 0  #: Events that a follower got more than once.
    swapped: int = 0  #: Followers that got events in another order.

    @property
    def flawless(self) -> bool:
        """Whether every follower got every event once and in order."""
        return not (self.lost or self.doubled or self.swapped)


def history() -> list[str]:
    """Return a job's events: many deltas between a beginning and an end."""
    deltas = [delta(f"1-{n}", "x") for n in range(2, EVENTS)]
    return [started("1-1"), *deltas, ended(f"1-{EVENTS}", "completed", "x" * len(deltas))]


async def append(connection: redis.asyncio.Redis, keys: JobKeys, event: str) -> None:
    """Append one event to the log and publish it, in one atomic step, as the worker does."""
    event_id = event.partition('"id": "')[2].partition('"')[0]
    await connection.eval(APPEND, 2, keys.log, keys.channel, event_id, event)


async def join(client: AsyncClient, job_id: str, delay: float, counts: Counts) -> None:
    """Follow a job after a moment, and count what goes wrong."""
    await asyncio.sleep(delay)
    got = [parse_event_id(event.id).n async for event in client.follow(job_id, timeout=60)]
    counts.joins += 1
    counts.events += len(got)
    counts.lost += EVENTS - len(set(got))
    counts.doubled += len(got) - len(set(got))
    counts.swapped += got != sorted(got)


async def run(url: str, joins: int, seed: int = 1) -> Counts:
    """Let ``joins`` followers join jobs, each at a different event and at a random moment."""
    dice = random.Random(seed)
    counts = Counts()
    async with AsyncClient(url) as client, redis.asyncio.Redis.from_url(url, max_connections=10) as connection:
        for number in range(-(-joins // JOINS_PER_JOB)):
            job_id = f"join-{seed}-{number}"
            keys = job_keys(client.tenant, job_id)
            here = min(JOINS_PER_JOB, joins - number * JOINS_PER_JOB)
            places = Counter(dice.randrange(EVENTS) for _ in range(here))
            followers: list[asyncio.Task[None]] = []
            for place, event in enumerate(history()):
                await append(connection, keys, event)
                followers += [
                    asyncio.create_task(join(client, job_id, dice.uniform(0, _PAUSE), counts))
                    for _ in range(places[place])
                ]
                await asyncio.sleep(dice.choice((0, dice.uniform(0, _PAUSE))))  # bursts and pauses, like a model's
            await asyncio.gather(*followers)
            await connection.delete(keys.log)
    return counts


def main() -> int:
    """Run the joins and print the counts."""
    parser = argparse.ArgumentParser(description="Join jobs at random moments while they are published.")
    parser.add_argument("--joins", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--redis-url", help="default: a Valkey of our own")
    arguments = parser.parse_args()
    began = time.monotonic()
    with EmbeddedValkey() as server:
        counts = asyncio.run(run(arguments.redis_url or server.url, arguments.joins, arguments.seed))
    for field in fields(counts):
        sys.stdout.write(f"{field.name:>9}: {getattr(counts, field.name):,}\n")
    sys.stdout.write(f"{'seconds':>9}: {time.monotonic() - began:.1f}\n")
    return not counts.flawless


if __name__ == "__main__":
    raise SystemExit(main())
