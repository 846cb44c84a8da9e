"""Periodic work: one action again and again, in the background, whatever goes wrong in it.

In: an action, from the heartbeat and the sweeper.  Out: its failures, to the log; outages of the database,
to the callback.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from keepstream.errors import StoreUnavailableError
from keepstream_worker.telemetry.logs import get_logger

log = get_logger()


class PeriodicTask:
    """Awaits ``action`` every ``interval`` seconds or so, until it is stopped. Made on the event loop."""

    def __init__(
        self, name: str, action: Callable[[], Awaitable[None]], interval: float, on_outage: Callable[[], None]
    ) -> None:
        self._name = name
        self._action = action
        self._interval = interval
        self._on_outage = on_outage
        self._task = asyncio.get_running_loop().create_task(self._repeat(), name=name)

    async def stop(self) -> None:
        """Stop, in the middle of the action if need be."""
        self._task.cancel()
        # Bounded: before Python 3.12 a cancellation may get lost in redis-py's time-outs.
        await asyncio.wait((self._task,), timeout=2.0)

    async def _repeat(self) -> None:
        while True:
            # Jitter keeps the workers apart.
            await asyncio.sleep(self._interval * random.uniform(0.8, 1.2))  # noqa: S311  # no secret
            try:
                try:
                    await self._action()
                except StoreUnavailableError:
                    self._on_outage()
            except Exception:  # one failure must not end the repetition
                log.exception("upkeep_defect", task=self._name)
