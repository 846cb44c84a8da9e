"""Builds the output from the events of the Responses API, and the normalised deltas that lead to it.

In: decoded events, from the stream reader.
Out: deltas while the stream lasts, and the output at any time, in the shape of chat completions.

Every text may come five times: in deltas, with the end of its part and of its item, and in the final response; and
servers leave out any four of the five. What was published counts; whole texts only fill in what is missing at its
end. Ids and indexes are no better: some servers change the id with every event, others send no index, or always 0.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from keepstream.extras import abridged, joined_pieces
from keepstream.next_turn import ITEMS_FIELD
from keepstream_worker.providers.accumulator import Limits, Output
from keepstream_worker.providers.accumulator.bounds import Bounded
from keepstream_worker.providers.accumulator.builders import ChoiceBuilder, TextBuilder, ToolCallBuilder
from keepstream_worker.providers.accumulator.json_values import (
    byte_length,
    is_json,
    merged_usage,
    safe,
    storable,
    whole_number,
)
from keepstream_worker.providers.accumulator.normalization import arguments_text, error_in, is_error, read_index
from keepstream_worker.values import Delta

_MESSAGE: Final = "message"
_REASONING: Final = "reasoning"
_FUNCTION_CALL: Final = "function_call"
_CUSTOM_CALL: Final = "custom_tool_call"
#: Kinds of items, and where an item of this kind has the arguments of its call.
_ARGUMENTS: Final = {_FUNCTION_CALL: "arguments", _CUSTOM_CALL: "input"}
_CALL_TYPES: Final = {_FUNCTION_CALL: "function", _CUSTOM_CALL: "custom"}

#: They come at once and prove nothing: a model that hangs sends them too.
_LIFECYCLE: Final = frozenset({"response.created", "response.queued", "response.in_progress"})
_KEEP_ALIVE: Final = frozenset({"keepalive", "ping", "heartbeat"})
_NO_PROGRESS: Final = _LIFECYCLE | _KEEP_ALIVE
_COMPLETED: Final = "response.completed"
_INCOMPLETE: Final = "response.incomplete"
_FAILURES: Final = frozenset({"response.failed", "response.cancelled"})
_TERMINAL: Final = frozenset({_COMPLETED, _INCOMPLETE, "response.done", *_FAILURES})
_FAILED: Final = frozenset({"failed", "cancelled"})
_UNFINISHED: Final = frozenset({"queued", "in_progress"})
#: Events of which nothing is read. A type that is none of all these is unknown, and the SSE event line counts.
_SILENT: Final = (
    "response.content_part.",
    "response.reasoning_",
    "response.output_text.",
    "response.web_search_call.",
    "response.file_search_call.",
    "response.code_interpreter_call",
    "response.image_generation_call.",
    "response.mcp_",
    "response.shell_call",
    "response.compaction.",
    "response.audio.",
)

_REASONS: Final = {"max_output_tokens": "length", "content_filter": "content_filter"}
_MAX_REASON: Final = 256  #: Characters of a finish reason.
_BETWEEN_PARTS: Final = "\n\n"  #: Between two parts of reasoning.
_DETAILS: Final = (
    "id",
    "model",
    "provider",
    "service_tier",
    "system_fingerprint",
    "tool_usage",
    "input_transformations",
    "content_filters",
    "moderation",
    "citations",
    "search_results",
)
#: Kinds of items that a reader can use although they have no text.
_MEDIA_ITEMS: Final = frozenset({"image_generation_call"})
_MAX_DETAIL: Final = 256 * 1024  #: Bytes of one detail; of a larger one only the size is kept.
_TOKEN_COUNTS: Final[Mapping[str, str]] = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}
_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")


class _Item:
    """One item of the answer while it is built."""

    __slots__ = (
        "call",
        "call_id",
        "closed",
        "commentary",
        "echo",
        "held",
        "indexed",
        "item_id",
        "kept",
        "kind",
        "logprobs",
        "name",
        "named",
        "opened",
        "part",
        "part_ended",
        "parts",
        "pending",
        "raw",
        "refusal",
        "source",
        "target",
    )

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.closed = False
        self.named: object = None  # the id that the newest event gave it
        self.opened = ""  # the id with which it was announced
        self.indexed = False  # whether an event has given its index
        self.raw: dict[str, Any] | None = None  # as the provider wants it back in the next turn, until it is kept
        self.kept = False
        self.logprobs: set[int] = set()  # the parts of a message whose logprobs have come
        # Of a message or of reasoning: what was published of each part, in the order of the parts.
        self.parts: dict[int, TextBuilder] = {}
        self.part = 0  # the newest, for events that do not say theirs
        self.part_ended = False  # whether the next delta without an index begins another
        self.target: tuple[TextBuilder, str] | None = None  # to which text of the choice they belong, and its name
        self.refusal = TextBuilder()
        self.commentary = False  # a message that tells what the model is about to do
        self.source = ""  # of reasoning: whether summaries or the text itself spoke first; the other one repeats it
        # Of a call.
        self.call: ToolCallBuilder | None = None
        self.call_id = ""
        self.item_id = ""  # stands in for the call's id until there is one
        self.name = ""
        self.held = ""  # arguments in the item's first event: some servers repeat them in the first delta
        self.echo = ""  # what has come since and may be the beginning of the same
        self.pending: list[str] = []  # arguments that came before the call's id and name

    @property
    def is_known_call(self) -> bool:
        """Whether anything of a call has come."""
        return bool(self.call_id or self.item_id or self.name or self.pending or self.held)

    def take_held(self) -> str:
        """Return the arguments that are held back, now that no others follow."""
        held = self.held if is_json(self.held) else self.held + self.echo
        self.held = self.echo = ""
        return held

    def part_of(self, event: Mapping[str, Any]) -> int:
        """Return the number of the part that an event is about; some servers do not say it."""
        number = _part_number(event)
        if number is not None:
            self.part, self.part_ended = number, False
        return self.part

    def next_part(self) -> int:
        """Return the number of the part that a delta without an index adds to."""
        if self.part_ended and self.part in self.parts:
            self.part = max(self.parts) + 1
        self.part_ended = False
        return self.part

    def published(self) -> str:
        """Return the texts published so far, as they stand in the output."""
        between = _BETWEEN_PARTS if self.kind == _REASONING else ""
        return between.join(part.value() for part in self.parts.values())

    def contradicts(self, call_id: str) -> bool:
        """Whether this is a call with another id."""
        return bool(call_id and self.call_id and call_id != self.call_id)

    def takes(self, item_id: str, call_id: str, *, adding: bool) -> bool:
        """Whether an event with these ids can be about this item; with ``adding`` it announces an item."""
        if self.contradicts(call_id):
            return False
        if not adding or (call_id and call_id == self.call_id):
            return True
        return not self.closed and not (item_id and self.opened and item_id != self.opened)


class ResponsesAccumulator(Bounded):
    """Accumulates one stream of the Responses API.

    Args:
        limits: Bounds of the stream. Once one is exceeded, ``too_large`` is set and no more text is added.
        call_seed: The job's id, from which tool-call ids are generated for providers that send none.
    """

    def __init__(self, limits: Limits, call_seed: str = "") -> None:
        super().__init__(limits)
        self.ended = False  #: Whether the terminal event has come: nothing after it matters.
        self.begun = False  #: Whether the provider has said at least that it will answer.
        self.foreign = False  #: Whether the provider answers with chunks of chat completions.
        self._call_seed = call_seed
        self._choice: ChoiceBuilder | None = None
        self._items: list[_Item] = []
        self._kept = 0  # how many of them are kept for the next turn, or are nothing to keep
        self._by_index: dict[tuple[str, int], _Item] = {}
        self._by_id: dict[tuple[str, str], _Item] = {}
        self._shared: set[tuple[str, int]] = set()  # indexes of two items that were open at once
        self._failed = False
        self._usage: dict[str, Any] | None = None
        self._details: dict[str, Any] = {}
        self._fields: dict[str, Any] = {}  # what the current event adds
        self._handlers: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "response.output_item.added": self._open_item,
            "response.output_item.done": self._close_item,
            "response.output_text.delta": self._add_text,
            "response.output_text.done": self._fill_text,
            "response.output_text.annotation.added": self._annotate,
            "response.refusal.delta": self._add_refusal,
            "response.refusal.done": self._fill_refusal,
            "response.function_call_arguments.delta": self._add_arguments,
            "response.function_call_arguments.done": self._fill_arguments,
            "response.custom_tool_call_input.delta": self._add_arguments,
            "response.custom_tool_call_input.done": self._fill_arguments,
            "response.reasoning_summary_part.added": self._begin_part,
            "response.reasoning_summary_text.delta": self._add_reasoning,
            "response.reasoning_summary_text.done": self._fill_reasoning,
            "response.reasoning_text.delta": self._add_reasoning,
            "response.reasoning_text.done": self._fill_reasoning,
        }

    # -- state ----------------------------------------------------------------------------------------

    @property
    def choice_count(self) -> int:
        """How many choices have been seen: this API gives one."""
        return 0 if self._choice is None else 1

    @property
    def complete(self) -> bool:
        """Whether the provider has said that this is the whole answer."""
        return self.ended and not self._failed

    @property
    def failed(self) -> bool:
        """Whether the provider has said that it failed, without saying why."""
        return self._failed

    @property
    def succeeded(self) -> bool:
        """Whether the answer is complete."""
        return self.complete

    @property
    def has_output(self) -> bool:
        """Whether there is anything a reader could use."""
        return self._choice is not None and self._choice.has_output

    @property
    def closed(self) -> bool:
        """Whether there is at least one item, and none is still open."""
        return bool(self._items) and all(item.closed for item in self._items)

    @staticmethod
    def is_progress(event: Mapping[str, Any]) -> bool:
        """Whether an event shows that the model has begun to answer."""
        return _text(event.get("type")) not in _NO_PROGRESS

    def name(self, event: dict[str, Any], line: str) -> dict[str, Any]:
        """Return ``event`` with its type; ``line``, the SSE event's name, counts only if the data's own is unknown."""
        kind = event.get("type")
        if type(kind) is str and kind and (kind in self._handlers or not line or self._knows(kind)):
            return event
        if not self._knows(line):
            return event if kind is not None else {**event, "type": line}
        # A flat error may have its own type where the event has none.
        return {"type": line, "error": event} if line == "error" and kind else {**event, "type": line}

    def _knows(self, kind: str) -> bool:
        return kind in self._handlers or kind in _TERMINAL | _NO_PROGRESS or kind == "error" or kind.startswith(_SILENT)

    # -- input and output -------------------------------------------------------------------------------

    def apply(self, event: dict[str, Any], deltas: list[Delta], size: int, lenient: bool) -> object:  # noqa: FBT001 -- as in the other dialect
        """Apply an event, append what it adds to ``deltas``, and return the error it reports, or None.

        Args:
            event: The decoded JSON object, with its type.
            deltas: The list to append to.
            size: The event's size as JSON, in bytes; the fields of a small one need not be measured.
            lenient: Whether it was parsed leniently, so that texts may contain lone surrogates.
        """
        if self.ended:
            return None
        kind = _text(event.get("type"))
        self._lenient = lenient
        self._fields = {}
        error: object = None
        try:
            handler = self._handlers.get(kind)
            if handler is not None:
                handler(event)
            elif kind in _TERMINAL:
                error = self._end(event, size)
            elif kind in _LIFECYCLE:
                self.begun = True
                self._read_response(event.get("response"), size)
            elif kind == "error":
                error = _error_in(event, flat=True) or _error_in(_object(event.get("response"))) or event
            elif kind not in _KEEP_ALIVE and is_error(event.get("error")):
                error = _error_in(event) or event
            elif not kind and is_response(event):
                error = self._end({"response": event}, size)  # a whole response instead of a stream
            elif type(event.get("choices")) is list:
                self.foreign = True
            elif not kind or event.get("object") == "error":
                error = error_in(event)  # as a gateway has it, whatever it was asked
        finally:  # what was appended is released even if the rest cannot be read
            if self._fields:
                deltas.append(Delta(0, self._fields))
        return error

    def flush(self, deltas: list[Delta]) -> None:
        """Release what was held back: arguments of calls that were never named, lone surrogates, and whole items."""
        self._fields = {}
        for item in self._items:
            if item.kind in _ARGUMENTS:
                self._settle(item)
        self._keep_items(last=True)
        choice = self._choice
        if choice is not None:
            for name, text in (
                ("content", choice.content),
                ("reasoning", choice.reasoning),
                ("refusal", choice.refusal),
            ):
                if text is not None and (rest := text.end()):
                    self._fields[name] = self._fields.get(name, "") + rest
            for call in choice.calls:
                if rest := call.arguments.end():
                    self._tell(call, arguments=rest)
            if choice.extras is not None and (ends := choice.extras.end()):
                told = self._fields.setdefault("extra", {})
                for name, value in ends.items():
                    told[name] = joined_pieces(told.get(name), value, name)
        if self._fields:
            deltas.append(Delta(0, self._fields))

    def fill_empty_arguments(self, deltas: list[Delta]) -> None:
        """Set empty arguments of function calls to ``{}``. Only for complete answers: otherwise they may be missing."""
        self._fields = {}
        for call in self._choice.calls if self._choice else ():
            if call.type == "function" and not call.arguments.value().strip():
                call.arguments.append("{}")
                self._tell(call, arguments="{}")
        if self._fields:
            deltas.append(Delta(0, self._fields))

    def output(self) -> Output:
        """Return the output so far."""
        choices = [] if self._choice is None else [self._choice.value()]
        usage = self._usage
        if usage is not None:
            usage = usage | {name: whole_number(usage.get(name)) for name in _COUNTS}
        return Output(
            choices=choices,
            usage=usage,
            provider_details=storable(self._details) if self._details else None,
        )

    # -- items ----------------------------------------------------------------------------------------

    def _open_item(self, event: dict[str, Any]) -> None:
        item = event.get("item")
        if type(item) is not dict:
            return
        slot = self._find(_kind(item), event, item, adding=True)
        self._read_head(slot, item)
        held = _arguments_in(slot.kind, item)
        if held and slot.call is not None and not slot.call.arguments:
            slot.held = held

    def _close_item(self, event: dict[str, Any]) -> None:
        item = event.get("item")
        if type(item) is not dict:
            return
        slot = self._find(_kind(item), event, item)
        self._fill_item(slot, item)
        slot.closed = True
        self._keep_items()

    def _fill_item(self, slot: _Item, item: dict[str, Any]) -> None:
        """Fill in what is missing of an item, given whole, and keep it for the next turn."""
        self._read_head(slot, item)
        if slot.kind == _MESSAGE:
            self._fill_message(slot, item.get("content"))
        elif slot.kind == _REASONING:
            self._fill_item_reasoning(slot, item)
        elif slot.kind in _ARGUMENTS:
            self._fill_call(slot, _arguments_in(slot.kind, item))
        if slot.raw is None and not slot.kept:
            slot.raw = item

    def _read_head(self, slot: _Item, item: dict[str, Any]) -> None:
        """Read what an item says of itself besides its texts."""
        if slot.kind == _MESSAGE and item.get("phase") == "commentary" and not slot.parts:
            slot.commentary = True
        if slot.kind not in _ARGUMENTS:
            return
        slot.call_id = slot.call_id or safe(_text(item.get("call_id")))
        slot.item_id = slot.item_id or safe(_text(item.get("id")))
        slot.name = slot.name or safe(_text(item.get("name")))
        if slot.call is not None:
            self._correct_call(slot, slot.call)
        elif slot.name and (slot.call_id or slot.item_id):
            self._open_call(slot)

    def _find(
        self, kind: str, event: dict[str, Any], item: dict[str, Any] | None = None, *, adding: bool = False
    ) -> _Item:
        """Return the item of this kind that an event belongs to, a new one if it is none of those known."""
        number = event.get("output_index")
        if type(number) is int and item is None and not self._shared and "call_id" not in event:  # nearly every event
            slot = self._by_index.get((kind, number))
            if slot is not None and slot.named == event.get("item_id"):
                return slot
        index = read_index(number)
        inner = item or {}
        item_id = _text(inner.get("id"))
        call_id = _text(inner.get("call_id")) or _text(event.get("call_id"))
        ids = [name for name in (item_id, call_id, _text(event.get("item_id"))) if name]
        known = self._indexed(kind, index, ids)
        slot = next((slot for slot in known if slot.takes(item_id, call_id, adding=adding)), None)
        if slot is None and not adding:
            slot = self._newest_open(kind, call_id, indexed=index is not None)
        if slot is None:
            slot = _Item(kind)
            self._items.append(slot)
            if self._choice is None and kind in {_MESSAGE, _REASONING, *_ARGUMENTS}:
                self._choice = ChoiceBuilder(0)
        if adding:
            slot.opened = slot.opened or item_id
        if index is not None:
            before = self._by_index.get((kind, index))
            if before is not None and before is not slot and not before.closed:
                self._shared.add((kind, index))
            self._by_index[kind, index] = slot
            slot.indexed = True
        for name in ids:
            self._by_id[kind, name] = slot
        slot.named = event.get("item_id")
        return slot

    def _indexed(self, kind: str, index: int | None, ids: list[str]) -> list[_Item]:
        """Return the items of this kind that an event may belong to by its index and ids, the likeliest first."""
        by_index = self._by_index.get((kind, index)) if index is not None else None
        slots = [by_index, *(self._by_id.get((kind, name)) for name in ids)]
        if index is not None and (kind, index) in self._shared:
            slots.append(slots.pop(0))  # an index that several have at once says less than an id
        return [slot for slot in slots if slot is not None]

    def _newest_open(self, kind: str, call_id: str, *, indexed: bool) -> _Item | None:
        """Return the newest open item of a kind; for an event with an index, one that has none so far."""
        return next(
            (
                slot
                for slot in reversed(self._items)
                if slot.kind == kind
                and not slot.closed
                and not (indexed and slot.indexed)
                and not slot.contradicts(call_id)
            ),
            None,
        )

    # -- texts ----------------------------------------------------------------------------------------

    def _add_text(self, event: dict[str, Any]) -> None:
        slot = self._find(_MESSAGE, event)
        self._add_delta(slot, event)
        if logprobs := event.get("logprobs"):
            slot.logprobs.add(slot.part)
            self._keep_logprobs(logprobs)

    def _fill_text(self, event: dict[str, Any]) -> None:
        slot = self._find(_MESSAGE, event)
        self._fill_part(slot, event)
        self._fill_logprobs(slot, slot.part, event.get("logprobs"))

    def _fill_logprobs(self, slot: _Item, part: int, logprobs: object) -> None:
        """Keep the logprobs of a part that did not come with its deltas."""
        if logprobs and part not in slot.logprobs:
            slot.logprobs.add(part)
            self._keep_logprobs(logprobs)

    def _keep_logprobs(self, logprobs: object) -> None:
        if type(logprobs) is list:
            self._keep_extra("logprobs", {"content": logprobs})

    def _begin_part(self, event: dict[str, Any]) -> None:
        slot = self._find(_REASONING, event)
        if slot.part_of(event) in slot.parts and _part_number(event) is None:
            slot.part_ended = True

    def _add_reasoning(self, event: dict[str, Any]) -> None:
        slot = self._find(_REASONING, event)
        if self._speaks(slot, event, "delta"):
            self._add_delta(slot, event)

    def _fill_reasoning(self, event: dict[str, Any]) -> None:
        slot = self._find(_REASONING, event)
        if self._speaks(slot, event, "text"):
            self._fill_part(slot, event)

    @staticmethod
    def _speaks(slot: _Item, event: dict[str, Any], field: str) -> bool:
        """Whether an event has a text, and is of the source of reasoning that spoke first in its item."""
        source = "summary" if "summary" in event["type"] else "content"
        slot.source = slot.source or (source if event.get(field) else "")
        return slot.source == source

    def _add_refusal(self, event: dict[str, Any]) -> None:
        self._refuse(self._find(_MESSAGE, event), event.get("delta"))

    def _fill_refusal(self, event: dict[str, Any]) -> None:
        slot = self._find(_MESSAGE, event)
        self._refuse(slot, _rest(event.get("refusal"), slot.refusal.value()))

    def _refuse(self, slot: _Item, piece: object) -> None:
        if type(piece) is not str or not piece:
            return
        choice = self._open_choice()
        choice.refusal = choice.refusal or TextBuilder()
        if added := self._append_to(choice.refusal, "refusal", piece):
            slot.refusal.append(added)

    def _add_delta(self, slot: _Item, event: dict[str, Any]) -> None:
        """Add a delta to a part of a message or of reasoning."""
        piece = event.get("delta")
        if type(piece) is str and piece:
            number = _part_number(event)
            if number is None:
                number = slot.next_part()
            elif number != slot.part:
                slot.part, slot.part_ended = number, False
            self._publish(slot, number, piece)

    def _publish(self, slot: _Item, number: int, piece: str) -> None:
        """Add a piece of a message or of reasoning to the output."""
        target, field = slot.target or self._target(slot)
        part = slot.parts.get(number)
        if part is None:
            part = slot.parts[number] = TextBuilder()
            if field == "reasoning" and target:
                self._append_to(target, field, _BETWEEN_PARTS)
        if added := self._append_to(target, field, piece):
            part.append(added)

    def _target(self, slot: _Item) -> tuple[TextBuilder, str]:
        """Return the text of the choice to which an item's texts belong, and its name."""
        choice = self._open_choice()
        if slot.kind != _REASONING and not slot.commentary:
            slot.target = choice.content, "content"
        else:
            choice.reasoning = choice.reasoning or TextBuilder()
            slot.target = choice.reasoning, "reasoning"
        return slot.target

    def _append_to(self, target: TextBuilder, field: str, piece: str) -> str:
        added = self._append(target, piece)
        if added:
            self._fields[field] = self._fields.get(field, "") + added
        return added

    def _fill_part(self, slot: _Item, event: dict[str, Any]) -> None:
        """Fill in what is missing of a part, given whole."""
        whole = event.get("text")
        if type(whole) is not str or not whole:
            return
        number = slot.part_of(event)
        known = slot.parts[number].value() if number in slot.parts else ""
        if slot.part_ended and not safe(whole).startswith(known):
            number, known = slot.next_part(), ""
        self._publish_rest(slot, number, _rest(whole, known))
        slot.part_ended = _part_number(event) is None

    def _publish_rest(self, slot: _Item, number: int, rest: str) -> None:
        """Publish what a whole text has beyond what was published."""
        if rest:
            self._target(slot)[0].pending_surrogate = ""  # the whole text repeats the half of a pair that is held back
            self._publish(slot, number, rest)

    def _fill_message(self, slot: _Item, content: object) -> None:
        parts = _objects(content if type(content) is list else [{"text": content}])
        for number, part in enumerate(parts):
            annotations = part.get("annotations")
            if type(annotations) is list and annotations:
                self._keep_extra("annotations", annotations)
            self._fill_logprobs(slot, number, part.get("logprobs"))
        self._fill_text_of_item(slot, "".join(_text(part.get("text")) for part in parts))
        self._refuse(slot, _rest("".join(_text(part.get("refusal")) for part in parts), slot.refusal.value()))

    def _fill_item_reasoning(self, slot: _Item, item: dict[str, Any]) -> None:
        for source in (slot.source,) if slot.source else ("content", "summary"):
            texts = [text for part in _objects(item.get(source)) if (text := _text(part.get("text")))]
            if texts:
                slot.source = source
                self._fill_text_of_item(slot, _BETWEEN_PARTS.join(texts))
                return

    def _fill_text_of_item(self, slot: _Item, whole: str) -> None:
        """Publish what a whole text of an item has beyond what was published of it."""
        self._publish_rest(slot, next(reversed(slot.parts), slot.part), _rest(whole, slot.published()))

    def _annotate(self, event: dict[str, Any]) -> None:
        annotation = event.get("annotation")
        if type(annotation) is dict:
            self._keep_extra("annotations", [annotation])

    # -- calls ----------------------------------------------------------------------------------------

    def _add_arguments(self, event: dict[str, Any]) -> None:
        slot = self._find(_call_kind(event), event)
        piece = _arguments_in(slot.kind, event, "delta")
        if not piece:
            return
        if slot.held:
            slot.echo += piece
            if len(slot.echo) < len(slot.held) and slot.held.startswith(slot.echo):
                return  # perhaps they come again, in pieces
            piece = slot.echo
            self._lenient = True  # as it may have been when the first of it came
            if not _is_repeated(slot.held, piece, slot.kind):
                self._append_held(slot, slot.held)
            slot.held = slot.echo = ""
        self._append_arguments(slot, piece)

    def _fill_arguments(self, event: dict[str, Any]) -> None:
        slot = self._find(_call_kind(event), event)
        self._read_head(slot, {"name": event.get("name"), "call_id": event.get("call_id")})
        self._fill_call(slot, _arguments_in(slot.kind, event))

    def _fill_call(self, slot: _Item, whole: str) -> None:
        known = "".join(slot.pending) if slot.call is None else slot.call.arguments.value()
        if not whole and not known:
            whole = slot.take_held()
        slot.held = slot.echo = ""
        if rest := _rest(whole, known):
            if slot.call is not None:  # the whole repeats the half of a pair that is held back
                slot.call.arguments.pending_surrogate = ""
            self._append_arguments(slot, rest)

    def _append_arguments(self, slot: _Item, piece: str) -> None:
        call = slot.call
        if call is None:
            if self._reserve(byte_length(piece)):
                slot.pending.append(piece)
            return
        piece = call.take_arguments(piece)
        if not piece:
            return
        call.size += byte_length(piece)
        if call.size > self._limits.max_argument_bytes:
            self._mark_too_large()
        if added := self._append(call.arguments, piece):
            self._tell(call, arguments=added)

    def _append_held(self, slot: _Item, piece: str) -> None:
        """Add arguments that were held back, perhaps since an event that was parsed leniently."""
        self._lenient = True
        self._append_arguments(slot, piece)

    def _open_call(self, slot: _Item) -> None:
        """Begin a call, now that it has a name and an id, or must not come after the next, or the stream is over."""
        for item in self._items:
            if item is slot:
                break
            if item.kind in _ARGUMENTS and item.call is None and item.is_known_call:
                self._begin_call(item)  # calls are numbered in the order in which they appeared
        self._begin_call(slot)

    def _begin_call(self, slot: _Item) -> None:
        choice = self._open_choice()
        call_id = slot.call_id or slot.item_id
        if len(choice.calls) >= self._limits.max_tool_calls or not self._reserve(
            byte_length(call_id) + byte_length(slot.name)
        ):
            self._mark_too_large()
            return
        position = len(choice.calls)
        generated = f"call_{self._call_seed}_{position}"
        call = ToolCallBuilder(position, call_id or generated, _CALL_TYPES[slot.kind], generated_id=not slot.call_id)
        call.name = slot.name
        slot.call = call
        choice.calls.append(call)
        begun = {"id": call.id, "name": call.name, "type": "" if call.type == "function" else call.type}
        self._tell(call, **{name: text for name, text in begun.items() if text})
        pending, slot.pending = slot.pending, []
        for piece in pending:
            self._bytes_left += byte_length(piece)  # it was reserved when it came
            self._append_held(slot, piece)

    def _correct_call(self, slot: _Item, call: ToolCallBuilder) -> None:
        """Give a call that was begun without them its id and its name."""
        if call.generated_id and slot.call_id and self._reserve(byte_length(slot.call_id)):
            call.id, call.generated_id = slot.call_id, False
            self._tell(call, id=call.id)
        if not call.name and slot.name and self._reserve(byte_length(slot.name)):
            call.name = slot.name
            self._tell(call, name=call.name)

    def _settle(self, slot: _Item) -> None:
        """Give a call what was held back for it, since nothing more will come."""
        if slot.call is None and slot.is_known_call:
            self._open_call(slot)
        if slot.call is not None and slot.held and not slot.call.arguments:
            self._append_held(slot, slot.take_held())

    def _tell(self, call: ToolCallBuilder, **added: str) -> None:
        """Put what a call gained into the current delta."""
        events: list[dict[str, Any]] = self._fields.setdefault("tool_calls", [])
        event = next((event for event in events if event["index"] == call.position), None)
        if event is None:
            events.append(event := {"index": call.position})
        for name, text in added.items():
            event[name] = event.get(name, "") + text if name == "arguments" else text

    # -- the end --------------------------------------------------------------------------------------

    def _end(self, event: dict[str, Any], size: int) -> object:
        """Read the terminal event; return the error it reports, or None."""
        kind = _text(event.get("type"))
        response = _object(event.get("response")) or event  # some servers leave out the level between
        self._read_response({"usage": event.get("usage")}, size)
        self._read_response(response, size)
        status = _text(response.get("status"))
        incomplete = response.get("incomplete_details")
        reason = _text(incomplete.get("reason")) if type(incomplete) is dict else ""
        if error := _error_in(response) or _error_in(event, flat=kind in _FAILURES):
            return error
        # Some copy the status of the beginning into the last event.
        failed = kind in _FAILURES or status in _FAILED or (not kind and status in _UNFINISHED)
        if failed and not reason:
            self.ended = self._failed = True
            return None
        for slot, item in self._paired(response.get("output")):
            self._fill_item(slot, item)
        for slot in self._items:
            if slot.kind in _ARGUMENTS:
                self._settle(slot)
        choice = self._open_choice()
        if reason:
            choice.finish_reason = _REASONS.get(reason, safe(reason)[:_MAX_REASON])
        elif kind == _INCOMPLETE or status == "incomplete":
            choice.finish_reason = "length"
        else:
            choice.finish_reason = "tool_calls" if choice.calls else "stop"
        choice.ended = self.ended = True
        return None

    def _paired(self, output: object) -> Iterator[tuple[_Item, dict[str, Any]]]:
        """Pair the items of the final response with those that were streamed: by id, then by kind and order."""
        free = list(self._items)
        unpaired = []
        for item in _objects(output):
            kind = _kind(item)
            known = [self._by_id.get((kind, _text(item.get(name)))) for name in ("call_id", "id")]
            slot = next((slot for slot in known if slot is not None and slot in free), None)
            if slot is None:
                unpaired.append(item)
            else:
                free.remove(slot)
                yield slot, item
        for item in unpaired:
            kind = _kind(item)
            slot = next((slot for slot in free if slot.kind == kind), None)
            if slot is not None:
                free.remove(slot)
                yield slot, item
            else:
                slot = _Item(kind)
                self._items.append(slot)
                yield slot, item

    def _read_response(self, response: object, size: int) -> None:
        if type(response) is not dict:
            return
        self._usage = merged_usage(self._usage, _chat_usage(response.get("usage")))
        for name in _DETAILS:
            value = response.get(name)
            if value not in (None, "", []):
                self._details[name] = value if size <= _MAX_DETAIL else abridged(storable(value), _MAX_DETAIL, name)
        created = response.get("created_at")
        if created is not None:
            self._details["created"] = created

    # -- bounds ---------------------------------------------------------------------------------------

    def _open_choice(self) -> ChoiceBuilder:
        if self._choice is None:
            self._choice = ChoiceBuilder(0)
        return self._choice

    def _keep_extra(self, name: str, value: Any) -> None:
        self._keep(self._open_choice(), name, value, self._fields)

    def _keep_items(self, *, last: bool = False) -> None:
        """Keep whole items in the order in which they began; with ``last`` also those after one that never ended."""
        for item in self._items[self._kept :]:
            if item.raw is None and not last:
                return
            self._kept += 1
            if item.raw is not None:
                item.kept = True
                self._open_choice().has_media |= item.kind in _MEDIA_ITEMS
                self._keep_extra(ITEMS_FIELD, [_without_logprobs(item.raw)])
                item.raw = None


def _text(value: object) -> str:
    """Return a text as it is, and an empty one for anything else."""
    return value if type(value) is str else ""


def _without_logprobs(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without the logprobs of its texts, which are kept elsewhere and do not go back."""
    content = item.get("content")
    if type(content) is not list or not any("logprobs" in part for part in _objects(content)):
        return item
    parts = [
        {name: value for name, value in part.items() if name != "logprobs"} if type(part) is dict else part
        for part in content
    ]
    return {**item, "content": parts}


def _object(value: object) -> dict[str, Any]:
    """Return an object as it is, and an empty one for anything else."""
    return value if type(value) is dict else {}


def _objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list, and none for anything else."""
    return [part for part in value if type(part) is dict] if type(value) is list else []


def _kind(item: Mapping[str, Any]) -> str:
    return _text(item.get("type"))


def _call_kind(event: Mapping[str, Any]) -> str:
    return _CUSTOM_CALL if "custom_tool_call" in event["type"] else _FUNCTION_CALL


def _part_number(event: Mapping[str, Any]) -> int | None:
    """Return what tells the parts of an item apart, or None if the server does not."""
    number = event.get("content_index")
    if type(number) is int and "summary_index" not in event:  # nearly always
        return number
    for name in ("summary_index", "content_index"):
        if (number := read_index(event.get(name))) is not None:
            return number
    return None


def _arguments_in(kind: str, value: Mapping[str, Any], field: str = "") -> str:
    """Return the arguments of a call in an item or an event; some servers send those of a function as an object."""
    given = value.get(field or _ARGUMENTS.get(kind, ""))
    return arguments_text(given) if kind == _FUNCTION_CALL else _text(given)


def _is_repeated(held: str, piece: str, kind: str) -> bool:
    """Return whether the first delta begins the arguments anew, of which ``held`` came with the item."""
    if piece.startswith(held):
        return True
    return kind == _FUNCTION_CALL and piece.lstrip().startswith("{") and is_json(held)


def _rest(whole: object, known: str) -> str:
    """Return what ``whole`` has beyond ``known``; nothing if it does not continue it, for that was published."""
    if type(whole) is not str:
        return ""
    text = safe(whole)
    return text[len(known) :] if text.startswith(known) else ""


def is_response(value: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a whole response."""
    return type(value.get("output")) is list or value.get("object") == "response"


def _error_in(value: Mapping[str, Any], *, flat: bool = False) -> dict[str, Any] | None:
    """Return the error that an event or a response holds as ``{"error": {…}}``; nested fields come first.

    With ``flat`` its own fields may be those of an error.
    """
    nested = value.get("error")
    own = {name: value[name] for name in ("code", "message", "param") if value.get(name) is not None}
    if not is_error(nested):
        error = own if flat else {}
    elif type(nested) is dict:
        error = own | {name: part for name, part in nested.items() if part is not None}
    else:
        error = own | {"message": nested} if type(nested) is str else {"error": nested}
    outer = {name: value[name] for name in ("error_type", "headers") if value.get(name) is not None}
    return {"error": error, **outer} if error else None


def _chat_usage(usage: object) -> dict[str, Any] | None:
    """Return a usage with the names of chat completions; what has no other name keeps its own."""
    if not isinstance(usage, dict):
        return None
    renamed: dict[str, Any] | None = None
    for name, value in usage.items():  # some send both names, and fill in one of them
        renamed = merged_usage(renamed, {_TOKEN_COUNTS.get(name, name): value})
    return renamed
