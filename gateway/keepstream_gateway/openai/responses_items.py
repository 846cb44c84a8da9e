"""The items of a response while they are streamed: one per reasoning, message or tool call.

In: pieces of one choice's output.  Out: the API's events without their sequence numbers, and the item so far.

An item is opened by its first piece and closed by what ends it. What was sent of an item stays sent: text is only
appended. Pure.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

from keepstream.results import ToolCall
from keepstream_gateway.openai.responses_object import (
    call_item,
    message_item,
    reasoning_item,
    refusal_part,
    text_part,
)

Fields = dict[str, Any]  #: Of an event: its type and its own fields.

OPEN: Final = "in_progress"
TEXT_DELTA: Final = "response.output_text.delta"


class _Part:
    """A part of a message or of reasoning. Texts are kept in pieces: joining them each time takes quadratic time."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


class StreamedItem:
    """What all kinds of items have in common.

    Args:
        item_id: The item's id.
        index: Its place among all items of the stream, dropped ones included.
    """

    def __init__(self, item_id: str, index: int) -> None:
        self.id = item_id
        self.index = index
        self.status = OPEN

    @property
    def is_open(self) -> bool:
        """Whether it may grow."""
        return self.status == OPEN

    def value(self) -> dict[str, Any]:
        """Return the item so far."""
        raise NotImplementedError

    def texts(self) -> tuple[str, ...]:
        """Return what was sent of its texts: of a message, the text and the refusal."""
        raise NotImplementedError

    def begin(self) -> Iterator[Fields]:
        """Yield the event with which it begins."""
        yield {"type": "response.output_item.added", "output_index": self.index, "item": self.value()}

    def close(self, status: str) -> Iterator[Fields]:
        """Yield the events with which it ends, if it has not ended."""
        if self.is_open:
            yield from self._end_parts()
            self.status = status
            yield {"type": "response.output_item.done", "output_index": self.index, "item": self.value()}

    def void(self) -> None:
        """Note that it does not count any more, also if it had been complete."""
        self.status = "incomplete"

    def _end_parts(self) -> Iterator[Fields]:
        raise NotImplementedError

    def _place(self, content_index: int | None = None) -> Fields:
        place: Fields = {"item_id": self.id, "output_index": self.index}
        return place if content_index is None else place | {"content_index": content_index}


class ReasoningItem(StreamedItem):
    """The reasoning of one choice."""

    def __init__(self, item_id: str, index: int) -> None:
        super().__init__(item_id, index)
        self._part: _Part | None = None
        self.carries: str | None = None  #: What goes into ``encrypted_content``; known at the end only.

    @property
    def text(self) -> str:
        """The text that was sent."""
        return self._part.text if self._part else ""

    def texts(self) -> tuple[str, ...]:
        """Return what was sent."""
        return (self.text,)

    def value(self) -> dict[str, Any]:
        """Return the item so far."""
        return reasoning_item(self.id, [self.text] if self._part else [], self.status, self.carries)

    def append(self, piece: str) -> Iterator[Fields]:
        """Yield the events that add ``piece``."""
        if self._part is None:
            self._part = _Part()
            part = {"type": "reasoning_text", "text": ""}
            yield {"type": "response.content_part.added", **self._place(0), "part": part}
        self._part.pieces.append(piece)
        yield {"type": "response.reasoning_text.delta", **self._place(0), "delta": piece}

    def _end_parts(self) -> Iterator[Fields]:
        if self._part is not None:
            yield {"type": "response.reasoning_text.done", **self._place(0), "text": self.text}
            part = {"type": "reasoning_text", "text": self.text}
            yield {"type": "response.content_part.done", **self._place(0), "part": part}


class MessageItem(StreamedItem):
    """The message of one choice: a text, a refusal, or both."""

    def __init__(self, item_id: str, index: int) -> None:
        super().__init__(item_id, index)
        self._parts: dict[str, _Part] = {}  # by type, in the order of their first pieces
        self._head: str | None = None
        self.extra: dict[str, Any] | None = None  #: The choice's, with annotations and logprobs; known at the end only.

    def texts(self) -> tuple[str, ...]:
        """Return what was sent of the text and of the refusal."""
        return tuple(self._parts[kind].text if kind in self._parts else "" for kind in ("output_text", "refusal"))

    def value(self) -> dict[str, Any]:
        """Return the item so far."""
        return message_item(self.id, [self._value(kind) for kind in self._parts], self.status)

    def _value(self, kind: str) -> dict[str, Any]:
        text = self._parts[kind].text
        return text_part(text, self.extra) if kind == "output_text" else refusal_part(text)

    def append(self, kind: str, piece: str) -> Iterator[Fields]:
        """Yield the events that add ``piece`` to the part ``kind``, output_text or refusal."""
        part = self._parts.get(kind)
        if part is None:
            part = self._parts[kind] = _Part()
            empty = text_part("") if kind == "output_text" else refusal_part("")
            yield {"type": "response.content_part.added", **self._place(len(self._parts) - 1), "part": empty}
        part.pieces.append(piece)
        place = self._place(list(self._parts).index(kind))
        if kind == "output_text":
            yield {"type": TEXT_DELTA, **place, "delta": piece, "logprobs": []}
        else:
            yield {"type": "response.refusal.delta", **place, "delta": piece}

    @property
    def delta_head(self) -> str | None:
        """How the fields of the next text delta begin as JSON; None: it is not the text's next delta that is due."""
        if "output_text" not in self._parts or not self.is_open:
            return None
        if self._head is None:
            place = self._place(list(self._parts).index("output_text"))
            self._head = json.dumps(place, separators=(",", ":"))[1:-1] + ',"delta":'
        return self._head

    def go_on(self, piece: str) -> None:
        """Add ``piece`` to a text that has begun; its event is the caller's to write."""
        self._parts["output_text"].pieces.append(piece)

    def annotate(self, value: dict[str, Any], number: int) -> Iterator[Fields]:
        """Yield the event that adds an annotation to the text, if there is a text."""
        if "output_text" in self._parts:
            place = self._place(list(self._parts).index("output_text"))
            kind = "response.output_text.annotation.added"
            yield {"type": kind, **place, "annotation_index": number, "annotation": value}

    def _end_parts(self) -> Iterator[Fields]:
        for number, kind in enumerate(self._parts):
            whole = self._value(kind)
            place = self._place(number)
            if kind == "output_text":
                done = {"text": whole["text"], "logprobs": whole["logprobs"]}
                yield {"type": "response.output_text.done", **place, **done}
            else:
                yield {"type": "response.refusal.done", **place, "refusal": whole["refusal"]}
            yield {"type": "response.content_part.done", **place, "part": whole}


class CallItem(StreamedItem):
    """One tool call."""

    def __init__(self, item_id: str, index: int, call: ToolCall) -> None:
        super().__init__(item_id, index)
        self._call = call.model_copy(update={"arguments": ""})
        self._arguments = _Part()
        self._custom = call.type == "custom"

    @property
    def arguments(self) -> str:
        """The arguments that were sent."""
        return self._arguments.text

    def texts(self) -> tuple[str, ...]:
        """Return the arguments that were sent."""
        return (self.arguments,)

    def end_void(self) -> Iterator[Fields]:
        """Yield the event that says it."""
        yield {"type": "response.output_item.done", "output_index": self.index, "item": self.value()}

    def revive(self, call: ToolCall) -> None:
        """Make it the item of another call with the same id, all of which is known."""
        self._call = call
        self._arguments = _Part()
        self._arguments.pieces.append(call.arguments)
        self.status = OPEN

    def is_of(self, call: ToolCall) -> bool:
        """Whether this is the item of ``call``: what its first event said still holds."""
        return (self._call.id, self._call.name, self._call.type) == (call.id, call.name, call.type)

    def value(self) -> dict[str, Any]:
        """Return the item so far."""
        return call_item(self.id, self._call.model_copy(update={"arguments": self.arguments}), self.status)

    def append(self, piece: str) -> Iterator[Fields]:
        """Yield the event that adds ``piece`` to the arguments."""
        self._arguments.pieces.append(piece)
        name = "custom_tool_call_input" if self._custom else "function_call_arguments"
        yield {"type": f"response.{name}.delta", **self._place(), "delta": piece}

    def _end_parts(self) -> Iterator[Fields]:
        if self._custom:
            yield {"type": "response.custom_tool_call_input.done", **self._place(), "input": self.arguments}
        else:
            done = {"name": self._call.name, "arguments": self.arguments}
            yield {"type": "response.function_call_arguments.done", **self._place(), **done}
