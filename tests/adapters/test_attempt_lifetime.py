"""What is left of an attempt once its job has ended: nothing, so that there is no work for the garbage collector.

What holds itself in a circle stays until the collector looks for it, and that stops all streams of the process.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from keepstream.client.redis_url import parse_redis_url
from keepstream_worker import store
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from keepstream_worker.events.publication import Publication
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.jobs.active_job import ActiveJob
from keepstream_worker.jobs.attempt import Attempt
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.jobs.recovery import Recovery
from keepstream_worker.jobs.usage import PromptSizes
from keepstream_worker.settings import load_settings
from keepstream_worker.store import Claim
from keepstream_worker.telemetry.figures import Figures
from keepstream_worker.values import Delta, Ended, JobKey
from tests.claims import claim_of
from tests.jobs import make_job

OF_AN_ATTEMPT = (Attempt, ActiveJob, Claim, Publication)


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    with EmbeddedValkey() as server:
        publisher = Publisher(
            parse_redis_url(server.url), prefix="keepstream", log_ttl=60, buffer_bytes=4096, merge_above=16
        )
        yield publisher
        await publisher.close(timeout=0)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Stored:
    """A database that has stored whatever it is asked to store."""

    async def persist(self, operation: Any, _argument: Any) -> Any:
        await asyncio.sleep(0)
        return Ended(None, 1) if operation is store.end else None


class Streams:
    """Provider streams of one delta each."""

    def __init__(self) -> None:
        self.prompts = PromptSizes()
        self.figures = Figures()

    async def run(self, _active: object, attempt: Attempt, on_accepted: Any) -> None:
        await asyncio.sleep(0)
        on_accepted()
        attempt.publish_output([Delta(0, {"content": "Hello"})])


@pytest.mark.usefixtures("without_collector")
async def test_an_attempt_that_has_ended_is_gone_without_the_garbage_collector(publisher: Publisher) -> None:
    streams = Streams()
    recovery = cast("Recovery", SimpleNamespace())
    ended: list[store.Claim] = []
    engine = Engine(
        load_settings({}),
        "worker",
        cast("Any", Stored()),
        publisher,
        cast("Any", streams),
        recovery,
        lambda _: 10.0,
        on_end=lambda claim, _: ended.append(claim),
    )
    engine.start(claim_of(JobKey("default", "a"), make_job(id="a")))
    await until(lambda: ended)
    ended.clear()
    await engine.wait_for_announcements(30)
    await until(lambda: not any(type(thing) in OF_AN_ATTEMPT for thing in gc.get_objects()))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)
