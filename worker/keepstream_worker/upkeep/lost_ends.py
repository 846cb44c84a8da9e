"""Lost ends: terminal events that Redis had taken, and lost when another server took over or it came back without them.

In: the ends that went out lately; the moments at which Redis may be another one.  Out: those that their logs lack,
published again from the stored rows.

A replica that takes over has not got the newest events, and they are lost although Redis had acknowledged them.  For a
job that runs, the publisher heals that with its next event; one that has ended has no next event, and a follower
without a database would wait in vain.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import redis.asyncio

from keepstream.names import job_keys
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.values import JobKey

#: Seconds for which an end is remembered: more than a replica, or a server that takes over, is ever behind.
_KEPT: Final = 60.0
_MOST_KEPT: Final = 10_000
_AT_ONCE: Final = 100  #: Logs that are looked at in one round trip.


class _End(NamedTuple):
    at: float
    key: JobKey
    event_id: str


class LostEnds:
    """Finds and publishes ends that Redis has lost. Used on the event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        prefix: str,
        announcer: Announcer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._announcer = announcer
        self._clock = clock
        self._ends: deque[_End] = deque(maxlen=_MOST_KEPT)

    def note(self, key: JobKey, event_id: str) -> None:
        """Remember that a job has ended; its terminal event, of this id, is out or on its way."""
        self._ends.append(_End(self._clock(), key, event_id))

    async def publish_again(self) -> None:
        """Publish the ends of the last minute that their logs lack.

        Raises:
            RedisError, OSError: Redis is away; whoever calls does so again when it is back.
            StoreUnavailableError: the database is away.
        """
        while self._ends and self._ends[0].at < self._clock() - _KEPT:
            self._ends.popleft()
        remembered = list(self._ends)
        for first in range(0, len(remembered), _AT_ONCE):
            ends = remembered[first : first + _AT_ONCE]
            async with self._client.pipeline(transaction=False) as pipe:
                for end in ends:
                    log = job_keys(end.key.tenant, end.key.id, self._prefix).log
                    pipe.xrevrange(log, count=1)  # type: ignore[unused-awaitable]
                newest: list[Any] = await pipe.execute()
            for end, entries in zip(ends, newest, strict=True):
                if not entries or entries[0][0].decode() != end.event_id:
                    await self._announcer.announce(end.key)
