"""The mailbox: what has arrived on a job's channel for one follower, and has not been taken yet.

In: payloads, from the connection that all followers of an event loop share.  Out: the same, in order, to the follower.

Who takes too slowly must cost the others nothing: a mailbox that is full forgets what is in it and takes nothing more
until its follower comes, who then reads the log instead.

A follower that waits at an empty mailbox can have it pass on at once what arrives, so that no task is woken for it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from keepstream.client.payloads import Payload

MOST_EVENTS: Final = 1_000  #: Events that a mailbox holds.
MOST_BYTES: Final = 4 * 1024 * 1024  #: Bytes that it holds, of more than one event.


class Mailbox:
    """Belongs to one follower, on its event loop."""

    __slots__ = ("_bytes", "_is_overrun", "_lost", "_pass_on", "_passed_on_at", "_payloads", "_timer", "_waiter")

    def __init__(self) -> None:
        self._payloads: list[Payload] = []
        self._bytes = 0
        self._is_overrun = False
        self._lost: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pass_on: Callable[[Payload], bool] | None = None  # only while the follower waits and nothing is here
        self._passed_on_at = 0.0  # when it did so last

    def put(self, payload: Payload) -> None:
        """Add what has arrived, unless it can be passed on at once."""
        if self._pass_on is not None:
            if self._pass_on(payload):
                self._passed_on_at = time.monotonic()
                return
            self._pass_on = None  # what comes after it has to wait behind it
        if self._is_overrun:
            return
        self._payloads.append(payload)
        self._bytes += len(payload.data)
        count = len(self._payloads)
        if count > MOST_EVENTS or (self._bytes > MOST_BYTES and count > 1):
            self._empty()
            self._is_overrun = True
        self._wake()

    def lose(self, error: Exception) -> None:
        """Let ``take`` raise ``error`` when the rest has been taken, because nothing more will arrive."""
        self._lost = self._lost or error
        self._wake()

    @property
    def has_something(self) -> bool:
        """Whether ``take`` would not have to wait."""
        return bool(self._payloads) or self._is_overrun or self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether nothing more will arrive."""
        return self._lost is not None

    async def take(self, seconds: float, pass_on: Callable[[Payload], bool] | None = None) -> list[Payload] | None:
        """Return what has arrived, or wait for it.

        Args:
            seconds: The longest wait, which begins anew with what is passed on.
            pass_on: Called with what arrives meanwhile; what it returns True for counts as taken.  It must not raise.

        Returns:
            Payloads; none if nothing has come for so long; None if some have come and were forgotten.

        Raises:
            Exception: as given to ``lose``.
        """
        if not self.has_something:
            await self._wait(seconds, pass_on)
        if self._is_overrun:
            self._is_overrun = False
            return None
        if not self._payloads and self._lost is not None:
            raise self._lost.with_traceback(None)  # else it would grow with each follower that raises it
        return self._empty()

    def arrival(self) -> "asyncio.Future[None]":
        """Return a future that is done when there is something."""
        self._waiter = asyncio.get_running_loop().create_future()
        if self.has_something:
            self._waiter.set_result(None)
        return self._waiter

    async def _wait(self, seconds: float, pass_on: Callable[[Payload], bool] | None) -> None:
        arrival = self.arrival()
        self._passed_on_at = time.monotonic()
        self._set_timer(seconds, seconds)
        self._pass_on = pass_on
        try:
            await arrival
        finally:
            self._pass_on = None
            assert self._timer is not None
            self._timer.cancel()

    def _set_timer(self, left: float, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(left, self._time_is_up, seconds)

    def _time_is_up(self, seconds: float) -> None:
        left = self._passed_on_at + seconds - time.monotonic()
        if left > 0:
            self._set_timer(left, seconds)  # one for each that is passed on would cost as much as all the rest
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _empty(self) -> list[Payload]:
        payloads, self._payloads, self._bytes = self._payloads, [], 0
        return payloads
