"""The live join: followers join running streams of real workers at random moments.

In: a sandbox, a seed and a number of joins.
Out: a report.

An event that is published after the log was read and before the subscription takes effect is easily lost. Each follower
must get every event after its cursor once and in order. Most followers leave after a few live events beyond the point
where they joined, so that many joins are cheap; some stay to the end.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Final

from keepstream import AsyncClient
from keepstream.events import is_terminal
from keepstream.jobs import parse_job
from keepstream.names import job_keys
from tests.chaos.report import Report
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster

JOINS: Final = 10_000
STREAMS: Final = 6  #: At the same time.
DELTAS: Final = 240
RATE: Final = 20.0
JOINS_PER_STREAM: Final = 250
_WORKERS: Final = 2
_STAYS: Final = 0.05  #: Share of followers that stay to the end.
_AT_ONCE: Final = 300  #: Followers at the same time; more would only wait for each other's CPU.


@dataclass
class _Stream:
    """A running stream, as far as its first follower has seen it."""

    job_id: str
    n: int = 0  #: of the newest event
    ended: bool = False


@dataclass
class _Tally:
    joins: int = 0  #: Of streams that were running.
    late: int = 0  #: Of streams that had just ended.
    with_cursor: int = 0
    to_the_end: int = 0
    cursors: int = 0
    events: int = 0
    offences: list[str] = field(default_factory=list)


def run(sandbox: Sandbox, seed: int, _jobs: int = 0, joins: int = JOINS, deltas: int = DELTAS) -> Report:
    """Run the item and check the results."""
    report = Report(f"live joins (seed {seed}, {joins} joins, {_WORKERS} workers, {sandbox.database})")
    tally = _Tally()
    began = time.monotonic()
    with sandbox.cluster("live-join") as cluster:
        cluster.start_workers(_WORKERS)
        asyncio.run(_play(cluster, random.Random(seed), joins, deltas, tally))
    report.count("joins of running streams", tally.joins)
    report.count("joins of streams that had just ended", tally.late)
    report.count("joins with a cursor", tally.with_cursor)
    report.count("joins that stayed to the end", tally.to_the_end)
    report.count("cursors of finished streams", tally.cursors)
    report.count("events received", tally.events)
    report.count("seconds", round(time.monotonic() - began))
    report.check("every follower gets every event once and in order", tally.offences)
    return report


async def _play(cluster: Cluster, dice: random.Random, joins: int, deltas: int, tally: _Tally) -> None:
    async with AsyncClient(cluster.valkey.url, database_url=cluster.database_url) as client:
        places = asyncio.Semaphore(_AT_ONCE)
        job_id = ""
        while tally.joins < joins:
            wave = []
            for _ in range(min(STREAMS, -(-(joins - tally.joins) // JOINS_PER_STREAM))):
                job_id = await client.enqueue(parse_job(cluster.job(deltas=deltas, rate=RATE)))
                wave.append(
                    _one_stream(client, _Stream(job_id), deltas / RATE, random.Random(dice.random()), places, tally)
                )
            await asyncio.gather(*wave)
        await _every_cursor(client, job_id, tally)
        # Once more with the log expired, so that the row has to answer.
        with cluster.redis() as connection:
            connection.delete(job_keys("default", job_id).log)
        await _every_cursor(client, job_id, tally, from_row=True)


async def _one_stream(
    client: AsyncClient,
    stream: _Stream,
    seconds: float,
    dice: random.Random,
    places: asyncio.Semaphore,
    tally: _Tally,
) -> None:
    first = asyncio.create_task(_watch(client, stream))
    moments = sorted(dice.uniform(0, seconds) for _ in range(JOINS_PER_STREAM))
    began = asyncio.get_running_loop().time()
    followers = []
    for moment in moments:
        await asyncio.sleep(began + moment - asyncio.get_running_loop().time())
        followers.append(asyncio.create_task(_join(client, stream, dice, places, tally)))
    await asyncio.gather(first, *followers)


async def _watch(client: AsyncClient, stream: _Stream) -> None:
    async for event in client.follow(stream.job_id, timeout=120, not_found_after=120):
        stream.n = event.event_id.n
    stream.ended = True


async def _join(
    client: AsyncClient, stream: _Stream, dice: random.Random, places: asyncio.Semaphore, tally: _Tally
) -> None:
    async with places:
        was_running = not stream.ended
        after = dice.randint(1, stream.n) if stream.n and dice.random() < 0.5 else 0
        stays = dice.random() < _STAYS
        enough = stream.n + dice.randint(2, 12)
        got: list[int] = []
        ended = False
        follower = client.follow(stream.job_id, f"1-{after}" if after else None, timeout=120, not_found_after=120)
        try:
            async for event in follower:
                got.append(event.event_id.n)
                ended = is_terminal(event)
                if not stays and got[-1] >= enough:
                    break
        finally:
            await follower.aclose()
    tally.joins += was_running
    tally.late += not was_running
    tally.with_cursor += bool(after)
    tally.to_the_end += ended
    tally.events += len(got)
    whole = got == list(range(after + 1, after + 1 + len(got)))
    reached = after + len(got)  # beyond the end there is nothing
    if not whole or not (ended or reached >= enough or (stream.ended and reached == stream.n)):
        tally.offences.append(f"{stream.job_id} after 1-{after}: {got[:5]} … {got[-5:]}, ended {ended}")


async def _every_cursor(client: AsyncClient, job_id: str, tally: _Tally, *, from_row: bool = False) -> None:
    """Follow a finished job from each of its events."""
    result = await client.get(job_id)
    assert result is not None
    assert result.terminal_event_id is not None
    last = int(result.terminal_event_id.partition("-")[2])
    for after in range(last + 1):
        got = [event.id async for event in client.follow(job_id, f"1-{after}" if after else None, timeout=60)]
        # From the row the output comes as one snapshot, with the id of the last event that it replaces.
        first = max(after, last - 2) if from_row else after
        if got != [f"1-{n}" for n in range(first + 1, last + 1)]:
            tally.offences.append(f"{job_id} after 1-{after}{' from the row' if from_row else ''}: {got[:5]} …")
        tally.cursors += 1
        tally.events += len(got)
