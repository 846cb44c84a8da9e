"""A defect in the handling of one job holds up no other job."""

import asyncio
from typing import Any, cast

from keepstream.results import JobStatus
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.settings import load_settings
from keepstream_worker.upkeep.cancel_listener import CancelListener
from keepstream_worker.upkeep.sweeper import Sweeper
from keepstream_worker.values import JobKey

BAD, GOOD = JobKey("default", "bad"), JobKey("default", "good")


class Announcer:
    """Fails for one job."""

    def __init__(self) -> None:
        self.announced: list[JobKey] = []

    async def announce(self, key: JobKey) -> bool:
        await asyncio.sleep(0)
        if key == BAD:
            raise LookupError("a defect")
        self.announced.append(key)
        return True


async def test_a_job_that_cannot_be_announced_holds_up_no_other() -> None:
    announcer, other = Announcer(), cast("Any", None)
    sweeper = Sweeper(load_settings({}), other, other, cast("Any", announcer), other, other, other)
    await sweeper._announce([BAD, GOOD])
    assert announcer.announced == [GOOD]


async def test_a_stream_is_stopped_though_its_cancel_meets_a_defect() -> None:
    class Redis:
        async def exists(self, _key: str) -> int:
            return 1

    class Database:
        async def run(self, _operation: object, _key: JobKey) -> JobStatus:
            return JobStatus.CANCELLED

    class Engine:
        def __init__(self) -> None:
            self.stopped: list[tuple[JobKey, Stop]] = []

        def request_stop(self, key: JobKey, stop: Stop) -> None:
            self.stopped.append((key, stop))

    engine = Engine()
    parts: tuple[Any, ...] = (Redis(), "keepstream", Database(), engine, Announcer())
    await CancelListener(*parts)._cancel(BAD)
    assert engine.stopped == [(BAD, Stop.CANCELLED)]
