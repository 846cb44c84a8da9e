"""Cancellation, where redis-py is awaited: a task that is cancelled ends.

In: awaitables of redis-py's.  Out: their results.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def cancellable(work: Awaitable[T]) -> T:
    """Await ``work``, and raise ``CancelledError`` if a cancellation was swallowed in it.

    redis-py uses ``asyncio.wait_for``, which before Python 3.12 swallows a cancellation that comes at the
    very moment at which its own wait ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await work
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
