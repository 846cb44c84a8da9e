"""Gateways that are killed, stopped and started again, and a Redis that dies, while many readers follow and resume.

Whatever happens on the way, each reader ends with the row's text, having seen each event once and in order.
"""

import itertools
import random
import threading
from http.client import HTTPException
from typing import Any

import pytest

from keepstream.results import CompletionResult
from tests.cluster import PATIENCE, Cluster, wait_until
from tests.gateways import GatewayProcess, Reader, make_key, start_gateway

pytestmark = pytest.mark.slow

JOBS = 8
READERS = 64
STEP = 10  #: Deltas that each job brings between two faults, and after the last one.
HELD: dict[str, Any] = {"deltas": 8 * STEP, "rate": 20, "hold": STEP}


class Crowd:
    """Readers in threads, each at one gateway after the other until it has the end of its job."""

    def __init__(self, job_ids: list[str], key: str, gateways: list[GatewayProcess], readers: int) -> None:
        self.readers = [Reader(job_ids[number % len(job_ids)], key) for number in range(readers)]
        self.broken_off = 0  #: Streams that ended before their job, in whatever way.
        self._gateways = gateways
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._follow, args=(reader,), daemon=True) for reader in self.readers]
        for thread in self._threads:
            thread.start()

    def _follow(self, reader: Reader) -> None:
        while not reader.has_the_end:
            with self._lock:
                gateway = self._random.choice(self._gateways)
            try:
                with reader.open(gateway) as stream:
                    # A gateway that stops refuses with 503; with Redis away one may not know of a job.
                    if stream.response.status == 200:
                        reader.take(stream)
            except (OSError, HTTPException):
                pass
            if not reader.has_the_end:
                with self._lock:
                    self.broken_off += 1
                threading.Event().wait(0.2)  # as an EventSource does before it comes back

    def wait_for_words(self, number: int) -> None:
        """Wait until each reader holds so many words."""
        wait_until(
            lambda: all(reader.transcript.text.count(" ") >= number for reader in self.readers),
            f"{number} words for each reader",
        )

    def to_the_end(self) -> None:
        """Wait until each has its job's terminal event."""
        for thread in self._threads:
            thread.join(PATIENCE)
        assert [reader.last_id for reader in self.readers if not reader.has_the_end] == []


def check(reader: Reader, result: CompletionResult) -> None:
    assert reader.transcript.choices[0].content == result.text
    ids = [event.event_id for event in reader.events]
    assert ids == sorted(set(ids))


def test_readers_lose_nothing_while_gateways_and_redis_die(cluster: Cluster) -> None:
    cluster.start_worker()
    gateways, key = [start_gateway(cluster) for _ in range(3)], make_key(cluster)
    job_ids = [cluster.enqueue(**HELD) for _ in range(JOBS)]
    crowd = Crowd(job_ids, key, gateways, READERS)
    steps = itertools.count(STEP, STEP)

    def let_them_read_on() -> None:
        """Wait until each reader has got something new, and more is to come."""
        further = next(steps)
        cluster.release(*job_ids, until=further)
        crowd.wait_for_words(further - STEP + 3)

    let_them_read_on()
    gateways[0].kill()
    let_them_read_on()
    gateways[0].start()
    gateways[1].terminate()
    assert gateways[1].wait() == 0
    let_them_read_on()
    gateways[1].restart()
    cluster.valkey.kill()  # it comes back empty
    cluster.valkey.start()
    let_them_read_on()
    gateways[2].freeze()  # its readers hang; those that come meanwhile go elsewhere
    gateways[2].kill()
    gateways[2].start()
    cluster.release(*job_ids)
    crowd.to_the_end()
    assert crowd.broken_off > READERS / 2
    for reader in crowd.readers:
        check(reader, cluster.wait_for(reader.job_id))
