"""The bytes of events: read once, however many followers they go to.

In: bytes from Redis, and events that are made from stored results.  Out: what a follower needs of each, and the form in
which its reader gets it: typed, or raw.

Where an event belongs is told by its head alone; only who wants it typed has the rest parsed.
"""

import re
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

from keepstream.events import Event, RawEvent, parse_event, parse_head
from keepstream.names import EventId, parse_event_id

E = TypeVar("E")

#: How a worker begins an event. Anything else that is an event is read as JSON.
_HEAD: Final = re.compile(
    rb'\{"v":1,"job_id":"[A-Za-z0-9._\-]+","attempt":[0-9]+,"type":"([a-z_.]+)",'
    rb'"id":"(([1-9][0-9]{0,8})-([1-9][0-9]{0,9}))",'
)


class Payload:
    """One event, as its bytes.

    Args:
        data: A JSON text, or something that is none: then ``raw``, ``event_id`` and ``event`` raise ``ValueError``.
    """

    __slots__ = ("_event", "_event_id", "_raw", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._raw: RawEvent | None = None
        self._event_id: EventId | None = None
        self._event: Event | None = None

    @property
    def raw(self) -> RawEvent:
        """The event with its bytes."""
        return self._raw or self._read_head()

    @property
    def event_id(self) -> EventId:
        """Its place among the job's events."""
        if self._event_id is None:
            self._read_head()
        assert self._event_id is not None
        return self._event_id

    @property
    def event(self) -> Event:
        """The typed event."""
        if self._event is None:
            self._event = parse_event(self.data)
        return self._event

    def _read_head(self) -> RawEvent:
        head = _HEAD.match(self.data)
        if head is not None:
            kind, text, attempt, n = head.groups()
            self._event_id = EventId(int(attempt), int(n))
            self._raw = RawEvent(text.decode(), kind.decode(), self.data)
        else:
            event_id, event_type = parse_head(self.data)
            self._event_id = parse_event_id(event_id)
            self._raw = RawEvent(event_id, event_type, self.data)
        return self._raw


class Form(NamedTuple, Generic[E]):
    """The form in which a reader gets events."""

    of_payload: Callable[[Payload], E]  #: Raises ``ValueError`` for what is no event.
    of_event: Callable[[Event], E]


def _raw_of_event(event: Event) -> RawEvent:
    return RawEvent(event.id, event.type, event.model_dump_json().encode())


TYPED: Final = Form[Event](lambda payload: payload.event, lambda event: event)
RAW: Final = Form[RawEvent](lambda payload: payload.raw, _raw_of_event)
