"""The bookkeeper: tells now and then what this worker has done.

In: the figures.  Out: sums, to the table of minutes.  What cannot be written is dropped: it is for people, and nothing
depends on it; kept back, hours of an outage would stand in one minute.
"""

import asyncio
from contextlib import suppress
from typing import Final

from keepstream.errors import StoreUnavailableError
from keepstream_worker import store
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.figures import Figures
from keepstream_worker.upkeep.periodic import PeriodicTask

_INTERVAL: Final = 10.0  #: Seconds between two tellings.
_LAST: Final = 2.0  #: Seconds for the last one.


class Bookkeeper:
    """Tells what one worker process does. Made and used on the event loop."""

    def __init__(self, figures: Figures, database: WorkerDatabase) -> None:
        self._figures = figures
        self._database = database
        self._task: PeriodicTask | None = None

    def start(self) -> None:
        """Tell in the background."""
        self._task = PeriodicTask("add up", self._tell, _INTERVAL, on_outage=lambda: None)

    async def stop(self) -> None:
        """Tell once more, and stop."""
        if self._task is not None:
            await self._task.stop()
        with suppress(StoreUnavailableError, TimeoutError):
            async with asyncio.timeout(_LAST):
                await self._tell()

    async def _tell(self) -> None:
        done = self._figures.take()
        if done:
            await self._database.run(store.add_up, done)
