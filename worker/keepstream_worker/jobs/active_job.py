"""Active jobs: the jobs of this process, and how they are asked to stop.

In: requests to stop, from cancels, shutdown and the fences.  Out: a failure in place of the work that was
interrupted, to the engine.  A job is only ever interrupted while it streams or waits; storing and
publishing its ending always run to their end.
"""

import asyncio
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any, Final

from keepstream.client.endings import CANCELLED_MESSAGE, TOTAL_TIMEOUT_MESSAGE
from keepstream.errors import ErrorCode
from keepstream_worker.values import Failure


class Stop(StrEnum):
    """Why a running job is asked to stop."""

    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  #: This worker is shutting down.
    SUPERSEDED = "superseded"  #: Another worker has taken the job over.
    TOTAL_TIMEOUT = "total_timeout"
    USAGE_LATE = "usage_late"  #: The answer is whole, but its usage did not come in time.


STOP_FAILURES: Final = {
    Stop.CANCELLED: Failure(code=ErrorCode.CANCELLED, message=CANCELLED_MESSAGE),
    Stop.INTERRUPTED: Failure(code=ErrorCode.INTERRUPTED, message="the worker was shut down"),
    Stop.SUPERSEDED: Failure(code=ErrorCode.SUPERSEDED, message="another worker has taken the job over"),
    Stop.TOTAL_TIMEOUT: Failure(code=ErrorCode.TOTAL_TIMEOUT, message=TOTAL_TIMEOUT_MESSAGE),
}


class ActiveJob:
    """A job in this process."""

    __slots__ = ("_task", "attempt", "interruptible", "stop")

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self.attempt = 0  #: 0 until the claim is granted.
        self.stop: Stop | None = None
        self.interruptible = False
        self._task = task

    def request_stop(self, stop: Stop) -> None:
        """Stop streaming or waiting as soon as possible.

        The first reason given counts; only a cancel and a takeover replace an earlier one.
        """
        if self.stop is None or stop in (Stop.CANCELLED, Stop.SUPERSEDED):
            self.stop = stop
        if self.interruptible:
            self.interruptible = False
            self._task.cancel()

    async def interruptibly(self, work: Coroutine[Any, Any, Failure | None]) -> Failure | None:
        """Await ``work``; if a stop is requested meanwhile, end it and return the stop as a failure."""
        if self.stopping:
            work.close()
            return self._stop_failure()
        self.interruptible = True
        try:
            return await work
        except asyncio.CancelledError:
            if self.stop is None:
                raise  # the event loop itself is ending
            self._task.uncancel()
            return self._stop_failure()
        finally:
            self.interruptible = False

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self.stop is not None

    def _stop_failure(self) -> Failure | None:
        return None if self.stop is None else STOP_FAILURES.get(self.stop)
