"""Server-sent events: bytes in, events out, however the bytes were split.

In: the response body, in pieces of any size, from the stream reader.
Out: the events that carry data, in order, to the stream reader.

This implements the WHATWG rules, with two additions: an event that is still open when the stream ends is returned,
because some providers omit the last blank line; and the ``error`` field of older llama.cpp servers is kept, because
nothing else reports that their answer is broken.
"""

from typing import Final, TypeAlias

#: An event's data, never empty, and its name, usually empty. A plain pair: creating a named tuple costs more.
ServerSentEvent: TypeAlias = tuple[bytes, str]
ERROR_FIELD: Final = "\n"  #: The name used for an ``error:`` line; no real event can have it.

_BOM: Final = b"\xef\xbb\xbf"
_EVENT_END: Final = b"\n\n"
_LF: Final = 0x0A  # as numbers: searching for one is five times as fast as searching for bytes
_CR: Final = 0x0D
_USUAL_START: Final = b"data: "
_NAMED_START: Final = b"event: "
_DATA_LINE: Final = b"\ndata: "


class SSEDecoder:
    """Decodes one response body. Comments and events without data are dropped.

    Args:
        max_event_bytes: The largest event that is accepted. A larger one ends the decoding: ``oversized`` is set,
            the events before it are returned, and everything after it is ignored.
    """

    __slots__ = ("_after_cr", "_begun", "_max_event_bytes", "_tail", "has_unknown_fields", "oversized")

    def __init__(self, max_event_bytes: int = 16 * 1024 * 1024) -> None:
        self.oversized = False
        self.has_unknown_fields = False  #: Whether a line had a field that event streams do not have.
        self._max_event_bytes = max_event_bytes
        self._tail = bytearray()  # the incomplete event at the end
        self._begun = False  # whether the position of a byte order mark has been passed
        self._after_cr = False  # whether a line feed that follows belongs to a carriage return already read

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Read the next bytes and return the events they complete."""
        if self.oversized:
            return []
        if not self._begun:
            data = self._without_bom(data)
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if _CR in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._tail:
            # Looked for from where the last search ended: a large event in small pieces must not cost its square.
            searched = len(self._tail) - 1
            self._tail += data
            if self._tail.find(_EVENT_END, searched) < 0:
                self._keep(b"")
                return []
            data = bytes(self._tail)
            self._tail.clear()

        blocks = data.split(_EVENT_END)
        tail = blocks.pop()
        events: list[ServerSentEvent] = []
        for block in blocks:
            if len(block) > self._max_event_bytes:
                self.oversized = True
                return events
            if block.startswith(_USUAL_START) and _LF not in block:  # nearly every event
                if text := block[len(_USUAL_START) :]:
                    events.append((text, ""))
            elif block.startswith(_NAMED_START) and block.count(_LF) == 1 and (end := block.find(_DATA_LINE)) > 0:
                if text := block[end + len(_DATA_LINE) :]:  # nearly every event of the Responses API
                    events.append((text, block[len(_NAMED_START) : end].decode(errors="replace")))
            elif event := self._parse(block):
                events.append(event)
        if tail:
            self._keep(tail)
        return events

    def finish(self) -> list[ServerSentEvent]:
        """Return the event that was still open when the stream ended, if any."""
        event = None if self.oversized else self._parse(bytes(self._tail).removesuffix(b"\n"))
        self._tail.clear()
        return [event] if event else []

    def _keep(self, data: bytes) -> None:
        """Keep an incomplete event for the next call."""
        self._tail += data
        self.oversized = len(self._tail) - self._tail.endswith(b"\n") > self._max_event_bytes

    def _without_bom(self, data: bytes) -> bytes:
        data = bytes(self._tail) + data
        self._tail.clear()
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._tail += data
            return b""
        self._begun = True
        return data.removeprefix(_BOM)

    def _parse(self, block: bytes) -> ServerSentEvent | None:
        """Return the event in ``block``, or None if it has no data."""
        name = error = b""
        data: list[bytes] = []
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            match field:
                case b"data":
                    data.append(value)
                case b"event":
                    name = value
                case b"error":
                    error = value
                case b"" | b"id" | b"retry":  # a comment, or only of use to browsers
                    pass
                case _:
                    self.has_unknown_fields = True
        text = b"\n".join(data)
        if text:
            return (text, name.decode(errors="replace"))
        return (error, ERROR_FIELD) if error else None
