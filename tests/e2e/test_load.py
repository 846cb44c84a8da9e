"""Two hundred streams at once on one worker process: everything is stored, and every follower sees all of it."""

import asyncio
from itertools import pairwise
from typing import Any, Final

from keepstream import AsyncClient
from keepstream.events import Event
from keepstream.names import EventId, job_keys, parse_event_id
from keepstream.results import JobStatus
from keepstream.transcript import Transcript
from tests.cluster import PATIENCE, Cluster, wait_until

STREAMS: Final = 200
RATE: Final = 30.0  #: Deltas a second of each stream.
DELTAS: Final = 150
PATIENT: Final = 4 * PATIENCE


def text_of(number: int) -> str:
    """Return a text of this many words, unique to the stream."""
    return " ".join(f"{number}→{word}" for word in range(DELTAS))


async def watch(client: AsyncClient, job_id: str) -> tuple[Transcript, list[Event]]:
    """Follow one job to its end."""
    transcript = Transcript()
    events = []
    async for event in client.follow(job_id, timeout=PATIENT):
        transcript.apply(event)
        events.append(event)
    return transcript, events


async def watch_all(cluster: Cluster, job_ids: list[str]) -> list[tuple[Transcript, list[Event]]]:
    """Follow all jobs at once; the worker starts once every follower is subscribed."""
    channels = [job_keys("default", job_id).channel for job_id in job_ids]

    def everybody_listens() -> bool:
        with cluster.redis() as client:
            listeners: Any = client.pubsub_numsub(*channels)
        return all(count for _, count in listeners)

    async with AsyncClient(cluster.valkey.url, database_url=cluster.database_url) as client:
        watching = asyncio.gather(*(watch(client, job_id) for job_id in job_ids))
        await asyncio.to_thread(wait_until, everybody_listens, "all followers to listen", PATIENT)
        await asyncio.to_thread(cluster.start_worker)
        return await watching


def test_200_streams_of_30_deltas_a_second_are_stored_and_followed_word_for_word(any_cluster: Cluster) -> None:
    cluster = any_cluster
    limits = {"first_token_timeout": PATIENT}
    job_ids = [
        cluster.enqueue(limits=limits, text=text_of(number), rate=RATE, at_once=STREAMS) for number in range(STREAMS)
    ]
    watched = asyncio.run(watch_all(cluster, job_ids))

    for number, (job_id, (transcript, events)) in enumerate(zip(job_ids, watched, strict=True)):
        result = cluster.result(job_id)
        assert (result.status, len(result.attempts)) == (JobStatus.COMPLETED, 1)
        assert transcript.text == result.text == text_of(number)
        assert transcript.terminal is not None
        assert transcript.sha256() == transcript.terminal.output_sha256 == result.output_sha256
        assert events[0].id == "1-1"
        for before, after in pairwise(events):  # a worker that does not keep up merges what waits into a snapshot
            last, here = parse_event_id(before.id), parse_event_id(after.id)
            assert here == EventId(1, last.n + 1) or (after.type == "snapshot" and here > last), (last, here)
        assert result.usage is not None
        assert result.usage.completion_tokens == DELTAS
    attempts = [attempt for of_one_job in cluster.provider.history().values() for attempt in of_one_job]
    assert len(attempts) == STREAMS
    # At some moment all of them were running.
    assert max(attempt.started for attempt in attempts) < min(attempt.ended or 0.0 for attempt in attempts)
