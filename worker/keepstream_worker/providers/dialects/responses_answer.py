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
    merged_usage,
    safe,
    storable,
    whole_number,
)
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
_TERMINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "response.done"})
_FAILED: Final = frozenset({"failed", "cancelled"})

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
        "held",
        "kept",
        "kind",
        "logprobs",
        "name",
        "parts",
        "pending",
        "raw",
        "source",
    )

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.closed = False
        self.raw: dict[str, Any] | None = None  # as the provider wants it back in the next turn, until it is kept
        self.kept = False
        self.logprobs: set[object] = set()  # the parts of a message whose logprobs have come
        # Of a message or of reasoning: what was published of each part, in the order of the parts.
        self.parts: dict[object, TextBuilder] = {}
        self.commentary = False  # a message that tells what the model is about to do
        self.source = ""  # of reasoning: whether summaries or the text itself spoke first; the other one repeats it
        # Of a call.
        self.call: ToolCallBuilder | None = None
        self.call_id = ""
        self.name = ""
        self.held = ""  # arguments in the item's first event: some servers repeat them in the first delta
        self.pending: list[str] = []  # arguments that came before the call's id and name

    def published(self) -> str:
        """Return the texts published so far, as they stand in the output."""
        between = _BETWEEN_PARTS if self.kind == _REASONING else ""
        return between.join(part.value() for part in self.parts.values())

    def contradicts(self, call_id: str) -> bool:
        """Whether this is a call with another id."""
        return bool(call_id and self.call_id and call_id != self.call_id)


class ResponsesAccumulator(Bounded):
    """Accumulates one stream of the Responses API.

    Args:
        limits: Bounds of the stream. Once one is exceeded, ``too_large`` is set and no more text is added.
        call_seed: The job's id, from which tool-call ids are generated for providers that send none.
    """

    def __init__(self, limits: Limits, call_seed: str = "") -> None:
        super().__init__(limits)
        self.ended = False  #: Whether the terminal event has come: nothing after it matters.
        self.foreign = False  #: Whether the provider answers with chunks of chat completions.
        self._call_seed = call_seed
        self._choice: ChoiceBuilder | None = None
        self._items: list[_Item] = []
        self._kept = 0  # how many of them are kept for the next turn, or are nothing to keep
        self._by_index: dict[tuple[str, int], _Item] = {}
        self._by_id: dict[tuple[str, str], _Item] = {}
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
                self._read_response(event.get("response"), size)
            elif kind == "error" or (kind not in _KEEP_ALIVE and event.get("error")):
                error = _error_in(event) or event
            elif not kind and type(event.get("output")) is list:
                error = self._end({"response": event}, size)  # a whole response instead of a stream
            elif type(event.get("choices")) is list:
                self.foreign = True
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
        held = item.get(_ARGUMENTS.get(slot.kind, ""))
        if type(held) is str and slot.call is not None and not slot.call.arguments:
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
            self._fill_call(slot, item.get(_ARGUMENTS[slot.kind]))
        if slot.raw is None and not slot.kept:
            slot.raw = item

    def _read_head(self, slot: _Item, item: dict[str, Any]) -> None:
        """Read what an item says of itself besides its texts."""
        if slot.kind == _MESSAGE and item.get("phase") == "commentary" and not slot.parts:
            slot.commentary = True
        if slot.kind not in _ARGUMENTS:
            return
        slot.call_id = slot.call_id or safe(_text(item.get("call_id")) or _text(item.get("id")))
        slot.name = slot.name or safe(_text(item.get("name")))
        if slot.call is None and slot.call_id and slot.name:
            self._open_call(slot)

    def _find(
        self, kind: str, event: dict[str, Any], item: dict[str, Any] | None = None, *, adding: bool = False
    ) -> _Item:
        """Return the item of this kind that an event belongs to, a new one if it is none of those known."""
        index = event.get("output_index")
        index = index if type(index) is int else None
        inner = item or {}
        call_id = _text(inner.get("call_id"))
        ids = [name for name in (_text(inner.get("id")), call_id, _text(event.get("item_id"))) if name]
        slot = self._known(kind, index, ids, call_id, adding=adding)
        if slot is None:
            slot = _Item(kind)
            self._items.append(slot)
            if self._choice is None and kind in {_MESSAGE, _REASONING, *_ARGUMENTS}:
                self._choice = ChoiceBuilder(0)
        if index is not None:
            self._by_index[kind, index] = slot
        for name in ids:
            self._by_id[kind, name] = slot
        return slot

    def _known(self, kind: str, index: int | None, ids: list[str], call_id: str, *, adding: bool) -> _Item | None:
        if index is not None:
            slot = self._by_index.get((kind, index))
            if slot is not None and not slot.contradicts(call_id) and not (adding and slot.closed):
                return slot
        for name in ids:
            slot = self._by_id.get((kind, name))
            if slot is not None and not slot.contradicts(call_id) and not (adding and slot.closed):
                return slot
        if index is not None or adding:
            return None
        return next(
            (
                slot
                for slot in reversed(self._items)
                if slot.kind == kind and not slot.closed and not slot.contradicts(call_id)
            ),
            None,
        )

    # -- texts ----------------------------------------------------------------------------------------

    def _add_text(self, event: dict[str, Any]) -> None:
        slot = self._find(_MESSAGE, event)
        key = _part_key(event)
        self._publish(slot, key, event.get("delta"))
        if logprobs := event.get("logprobs"):
            slot.logprobs.add(key)
            self._keep_logprobs(logprobs)

    def _fill_text(self, event: dict[str, Any]) -> None:
        slot = self._find(_MESSAGE, event)
        key = _part_key(event)
        self._fill_part(slot, key, event.get("text"))
        self._fill_logprobs(slot, key, event.get("logprobs"))

    def _fill_logprobs(self, slot: _Item, key: object, logprobs: object) -> None:
        """Keep the logprobs of a part that did not come with its deltas."""
        if logprobs and key not in slot.logprobs and None not in slot.logprobs:
            slot.logprobs.add(key)
            self._keep_logprobs(logprobs)

    def _keep_logprobs(self, logprobs: object) -> None:
        if type(logprobs) is list:
            self._keep_extra("logprobs", {"content": logprobs})

    def _add_reasoning(self, event: dict[str, Any]) -> None:
        slot = self._find(_REASONING, event)
        if self._speaks(slot, event):
            self._publish(slot, _part_key(event), event.get("delta"))

    def _fill_reasoning(self, event: dict[str, Any]) -> None:
        slot = self._find(_REASONING, event)
        if self._speaks(slot, event):
            self._fill_part(slot, _part_key(event), event.get("text"))

    @staticmethod
    def _speaks(slot: _Item, event: dict[str, Any]) -> bool:
        """Whether an event is of the source of reasoning that spoke first in its item."""
        source = "summary" if "summary" in event["type"] else "content"
        slot.source = slot.source or source
        return slot.source == source

    def _add_refusal(self, event: dict[str, Any]) -> None:
        self._refuse(event.get("delta"))

    def _fill_refusal(self, event: dict[str, Any]) -> None:
        self._fill_whole_refusal(event.get("refusal"))

    def _fill_whole_refusal(self, whole: object) -> None:
        known = self._choice.refusal.value() if self._choice and self._choice.refusal else ""
        self._refuse(_rest(whole, known))

    def _refuse(self, piece: object) -> None:
        if type(piece) is not str or not piece:
            return
        choice = self._open_choice()
        choice.refusal = choice.refusal or TextBuilder()
        if added := self._append(choice.refusal, piece):
            self._fields["refusal"] = self._fields.get("refusal", "") + added

    def _publish(self, slot: _Item, key: object, piece: object) -> None:
        """Add a piece of a message or of reasoning to the output."""
        if type(piece) is not str or not piece:
            return
        choice = self._open_choice()
        to_reasoning = slot.kind == _REASONING or slot.commentary
        if to_reasoning:
            choice.reasoning = choice.reasoning or TextBuilder()
        target = choice.reasoning if to_reasoning and choice.reasoning is not None else choice.content
        part = slot.parts.get(key)
        if part is None:
            part = slot.parts[key] = TextBuilder()
            if to_reasoning and target:
                self._append_to(target, "reasoning", _BETWEEN_PARTS)
        if added := self._append_to(target, "reasoning" if to_reasoning else "content", piece):
            part.append(added)

    def _append_to(self, target: TextBuilder, field: str, piece: str) -> str:
        added = self._append(target, piece)
        if added:
            self._fields[field] = self._fields.get(field, "") + added
        return added

    def _fill_part(self, slot: _Item, key: object, whole: object) -> None:
        known = slot.parts[key].value() if key in slot.parts else ""
        if key is None and not known:
            known = slot.published()
        self._publish(slot, key, _rest(whole, known))

    def _fill_message(self, slot: _Item, content: object) -> None:
        parts = _objects(content if type(content) is list else [{"text": content}])
        for number, part in enumerate(parts):
            annotations = part.get("annotations")
            if type(annotations) is list and annotations:
                self._keep_extra("annotations", annotations)
            self._fill_logprobs(slot, number, part.get("logprobs"))
        self._publish_rest(slot, "".join(_text(part.get("text")) for part in parts))
        self._fill_whole_refusal("".join(_text(part.get("refusal")) for part in parts))

    def _fill_item_reasoning(self, slot: _Item, item: dict[str, Any]) -> None:
        for source in (slot.source,) if slot.source else ("content", "summary"):
            texts = [_text(part.get("text")) for part in _objects(item.get(source))]
            if any(texts):
                slot.source = source
                self._publish_rest(slot, _BETWEEN_PARTS.join(texts))
                return

    def _publish_rest(self, slot: _Item, whole: str) -> None:
        """Publish what a whole text of an item has beyond what was published of it."""
        last = next(reversed(slot.parts), None)
        self._publish(slot, last, _rest(whole, slot.published()))

    def _annotate(self, event: dict[str, Any]) -> None:
        annotation = event.get("annotation")
        if type(annotation) is dict:
            self._keep_extra("annotations", [annotation])

    # -- calls ----------------------------------------------------------------------------------------

    def _add_arguments(self, event: dict[str, Any]) -> None:
        slot = self._find(_call_kind(event), event)
        piece = event.get("delta")
        if type(piece) is not str or not piece:
            return
        held, slot.held = slot.held, ""
        if held and not piece.startswith(held):
            self._append_held(slot, held + piece)
        else:
            self._append_arguments(slot, piece)

    def _fill_arguments(self, event: dict[str, Any]) -> None:
        slot = self._find(_call_kind(event), event)
        self._read_head(slot, {"name": event.get("name"), "call_id": event.get("call_id")})
        self._fill_call(slot, event.get(_ARGUMENTS[slot.kind]))

    def _fill_call(self, slot: _Item, whole: object) -> None:
        known = "".join(slot.pending) if slot.call is None else slot.call.arguments.value()
        if not whole and not known:
            whole = slot.held
        slot.held = ""
        if rest := _rest(whole, known):
            self._append_arguments(slot, rest)

    def _append_arguments(self, slot: _Item, piece: str) -> None:
        call = slot.call
        if call is None:
            if self._reserve(byte_length(piece)):
                slot.pending.append(piece)
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
        """Begin a call, now that it has a name and an id, or the stream is over."""
        choice = self._open_choice()
        if len(choice.calls) >= self._limits.max_tool_calls or not self._reserve(
            byte_length(slot.call_id) + byte_length(slot.name)
        ):
            self._mark_too_large()
            return
        position = len(choice.calls)
        generated = f"call_{self._call_seed}_{position}"
        call = ToolCallBuilder(
            position, slot.call_id or generated, _CALL_TYPES[slot.kind], generated_id=not slot.call_id
        )
        call.name = slot.name
        slot.call = call
        choice.calls.append(call)
        begun = {"id": call.id, "name": call.name, "type": "" if call.type == "function" else call.type}
        self._tell(call, **{name: text for name, text in begun.items() if text})
        pending, slot.pending = "".join(slot.pending), []
        if pending:
            self._bytes_left += byte_length(pending)  # it was reserved when it came
            self._append_held(slot, pending)

    def _settle(self, slot: _Item) -> None:
        """Give a call what was held back for it, since nothing more will come."""
        if slot.call is None and (slot.call_id or slot.name or slot.pending or slot.held):
            self._open_call(slot)
        if slot.call is not None and slot.held and not slot.call.arguments:
            held, slot.held = slot.held, ""
            self._append_held(slot, held)

    def _tell(self, call: ToolCallBuilder, **added: str) -> None:
        """Put what a call gained into the current delta."""
        events: list[dict[str, Any]] = self._fields.setdefault("tool_calls", [])
        for event in events:
            if event["index"] == call.position:
                for name, text in added.items():
                    event[name] = event.get(name, "") + text
                return
        events.append({"index": call.position, **added})

    # -- the end --------------------------------------------------------------------------------------

    def _end(self, event: dict[str, Any], size: int) -> object:
        """Read the terminal event; return the error it reports, or None."""
        response = event.get("response")
        response = response if type(response) is dict else {}
        self._read_response(response, size)
        status = _text(response.get("status")) or _text(event.get("type")).removeprefix("response.")
        incomplete = response.get("incomplete_details")
        reason = _text(incomplete.get("reason")) if type(incomplete) is dict else ""
        if error := _error_in(response) or _error_in(event):
            return error
        if status in _FAILED and not reason:
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
        elif status == "incomplete":
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


def _objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list, and none for anything else."""
    return [part for part in value if type(part) is dict] if type(value) is list else []


def _kind(item: Mapping[str, Any]) -> str:
    return _text(item.get("type"))


def _call_kind(event: Mapping[str, Any]) -> str:
    return _CUSTOM_CALL if "custom_tool_call" in event["type"] else _FUNCTION_CALL


def _part_key(event: Mapping[str, Any]) -> object:
    """Return what tells the parts of an item apart, or None if the server does not."""
    for name in ("summary_index", "content_index"):
        if type(event.get(name)) is int:
            return event[name]
    return None


def _rest(whole: object, known: str) -> str:
    """Return what ``whole`` has beyond ``known``; nothing if it does not continue it, for that was published."""
    if type(whole) is not str:
        return ""
    text = safe(whole)
    return text[len(known) :] if text.startswith(known) else ""


def _error_in(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the error that an event or a response holds as ``{"error": {…}}``; nested fields come first."""
    nested = value.get("error")
    flat = {name: value[name] for name in ("code", "message", "param") if value.get(name) is not None}
    if type(nested) is dict:
        known = {name: part for name, part in nested.items() if part is not None}
        error = flat | known
    elif type(nested) is str:
        error = flat | {"message": nested}
    elif value.get("type") == "error":
        error = flat
    else:
        return None
    outer = {name: value[name] for name in ("error_type", "headers") if value.get(name) is not None}
    return {"error": error, **outer} if error or value.get("type") == "error" else None


def _chat_usage(usage: object) -> dict[str, Any] | None:
    """Return a usage with the names of chat completions; what has no other name keeps its own."""
    if not isinstance(usage, dict):
        return None
    return {_TOKEN_COUNTS.get(name, name): value for name, value in usage.items()}
