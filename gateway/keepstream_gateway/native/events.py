"""Events as server-sent ones.

In: a job's raw events.  Out: frames, as bytes; the events pass through as they are.

The frames carry no ``event:`` field. A browser's EventSource hands a named event only to a listener for this name, so
types that a later version adds would vanish; without a name all come to ``onmessage``, and the JSON says the type.
"""

from collections.abc import AsyncGenerator
from functools import lru_cache
from typing import Final

from keepstream.events import RawEvent
from keepstream.results import WaitingFor

#: Milliseconds after which an EventSource comes back, at first contact and at the end of a gateway.
_RETRY: Final = b"retry: 1000\n"
_SHARED: Final = 4096  #: Bytes of an event up to which its frame is kept for a moment.
FAREWELL: Final = b"retry: 500\n: this gateway ends the stream; resume with the last id\n\n"


async def frames(events: AsyncGenerator[RawEvent]) -> AsyncGenerator[bytes]:
    """Yield a frame for each event, and close ``events`` in the end."""
    opening = _RETRY
    try:
        async for event in events:
            yield opening + frame(event)
            opening = b""
    finally:
        await events.aclose()


def frame(event: RawEvent) -> bytes:
    """Return an event as a server-sent one; it is made once for all who follow the job at the time."""
    return _shared_frame(event) if len(event.payload) <= _SHARED else _frame(event)


def _frame(event: RawEvent) -> bytes:
    payload = event.payload
    if b"\n" in payload or b"\r" in payload:  # JSON may have them between its parts
        payload = b"\ndata: ".join(payload.splitlines())
    return b"id: %b\ndata: %b\n\n" % (event.id.encode(), payload)


_shared_frame = lru_cache(maxsize=1024)(_frame)


class Silence:
    """Says in comments what a job waits for."""

    def __init__(self) -> None:
        self._reason: WaitingFor | None = None

    def note(self, reason: WaitingFor) -> None:
        """Remember what the job waits for."""
        self._reason = reason

    def comment(self) -> bytes:
        """Return the comment that breaks a silence."""
        if self._reason is None:
            return b": ping\n\n"
        return f": waits for {' '.join(self._reason.text.split())}\n\n".encode()
