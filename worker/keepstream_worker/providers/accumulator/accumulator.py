"""Applies chunks to the choices being built and returns what each chunk adds.

In: decoded chunks, from the stream reader.
Out: deltas while the stream lasts, and the output at any time, to the stream reader.

``apply`` runs once for every token of every stream. The usual chunk, one choice with one piece of text, takes a short
path that reads nothing else; unusual chunks are detected by comparing sets of keys.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from keepstream.extras import REASONING_FIELDS as REASONING_NAMES_FIELD
from keepstream.extras import abridged, merged_extra
from keepstream.next_turn import LEGACY_CALL
from keepstream.results import Choice
from keepstream_worker.providers.accumulator.bounds import Bounded, Limits
from keepstream_worker.providers.accumulator.builders import ChoiceBuilder, TextBuilder, ToolCallBuilder
from keepstream_worker.providers.accumulator.extras import ExtrasBuilder
from keepstream_worker.providers.accumulator.json_values import (
    MAX_FIELDS,
    byte_length,
    json_size,
    merged_usage,
    safe,
    storable,
    tells,
    whole_number,
)
from keepstream_worker.providers.accumulator.normalization import (
    FUNCTION_CALL,
    REASONING_FIELDS,
    REASONING_PARTS,
    Fragment,
    error_in,
    is_error,
    joined_name,
    plain_text,
    read_fragment,
    read_index,
    reasoning_in,
)
from keepstream_worker.values import Delta

#: Finish reasons that mean the provider failed.
FAILURE_REASONS: Final = frozenset({"error", "network_error", "insufficient_system_resource", "abort"})

# The usual fields of a chunk and of a choice; any other field takes the long path.
_USUAL_CHUNK_FIELDS: Final = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier", "obfuscation"}
)
_USUAL_CHOICE_FIELDS: Final = frozenset({"index", "delta", "finish_reason", "logprobs"})
_IDENTITY_FIELDS: Final = frozenset({"id", "model", "created", "service_tier", "system_fingerprint"})
_FIELDS_READ_ELSEWHERE: Final = frozenset({"choices", "usage", "object", "obfuscation", "error"})
_IGNORED_DELTA_FIELDS: Final = frozenset({"role", "index", "error"})  #: Fields of a delta.
_MEDIA_FIELDS: Final = frozenset({"audio", "images", "image", "video", "videos"})  #: Output that is no text.
_MEDIA_PARTS: Final = (
    "image_url",
    "image",
    "output_image",
    "audio",
    "input_audio",
    "output_audio",
    "video",
    "video_url",
)
_TOKEN_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")

# Bounds on what is kept besides the output, each far above what providers send.
_MAX_DETAIL: Final = 256 * 1024  #: Bytes; the unknown fields and usage updates of a larger chunk are not kept.
_MAX_REASON: Final = 256  #: Characters of a finish reason.
_MAX_INDEX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Output:
    """The output of an attempt so far."""

    choices: list[Choice]  #: By index.
    usage: dict[str, Any] | None  #: As reported; prompt_tokens, completion_tokens and total_tokens are int or None.
    provider_details: dict[str, Any] | None  #: The provider's id, model, service tier, fingerprint etc.


class Accumulator(Bounded):
    """Accumulates one stream.

    Args:
        limits: Bounds of the stream. Once one is exceeded, ``too_large`` is set and no more text is added.
        call_seed: The job's id, from which tool-call ids are generated for providers that send none, so that they
            are stable and differ between jobs.
    """

    ended = False  #: Whether nothing that follows matters. Here usage may still come.
    closed = True  #: Whether what was begun is whole, as far as can be seen. Here only a finish reason tells.
    begun = False  #: Whether the provider has said no more than that it will answer. Here any chunk is of the answer.
    foreign = False  #: Whether this is an answer in another dialect. Chunks that are none are ignored here.

    __slots__ = (
        "_call_lists",
        "_call_seed",
        "_calls_left",
        "_choices",
        "_chunk_size",
        "_details",
        "_fields",
        "_skipped",
        "_unfinished",
        "_usage",
    )

    def __init__(self, limits: Limits, call_seed: str = "") -> None:
        super().__init__(limits)
        self._call_seed = call_seed
        self._choices: dict[int, ChoiceBuilder] = {}
        self._unfinished = 0  # choices without an end
        self._calls_left = limits.max_tool_calls
        self._call_lists = 0  # lists of call fragments so far
        self._usage: dict[str, Any] | None = None
        self._details: dict[str, Any] = {}
        self._fields = 0  # how many fields the newest chunk had whose envelope was read, once id and model are known
        self._skipped: dict[str, Any] | None = None  # the newest chunk, if its envelope was not read
        self._chunk_size = 0  # of the current chunk, as JSON

    # -- state ----------------------------------------------------------------------------------------

    @property
    def choice_count(self) -> int:
        """How many choices have been seen."""
        return len(self._choices)

    @property
    def complete(self) -> bool:
        """Whether there is at least one choice and all have ended."""
        return self._unfinished == 0 and bool(self._choices)

    @property
    def failed(self) -> bool:
        """Whether a finish reason says that the provider failed."""
        return any(choice.finish_reason in FAILURE_REASONS for choice in self._choices.values())

    @property
    def succeeded(self) -> bool:
        """Whether the answer is complete and no choice ended in a failure."""
        return self.complete and not self.failed

    @property
    def has_output(self) -> bool:
        """Whether any choice holds something a reader could use."""
        return any(choice.has_output for choice in self._choices.values())

    # -- input and output -------------------------------------------------------------------------------

    def apply(self, chunk: dict[str, Any], deltas: list[Delta], size: int, lenient: bool) -> object:  # noqa: FBT001 -- a keyword costs time here
        """Apply a chunk, append what it adds to ``deltas``, and return the error it reports, or None.

        An error after a complete answer is ignored.

        Args:
            chunk: The decoded JSON object.
            deltas: The list to append to.
            size: The chunk's size as JSON, in bytes; the fields of a small one need not be measured.
            lenient: Whether the chunk was parsed leniently, so that texts may contain lone surrogates.
        """
        self._chunk_size = size
        self._lenient = lenient
        error: object = None
        usage = chunk.get("usage")
        if self._fields == len(chunk) and not usage and _USUAL_CHUNK_FIELDS.issuperset(chunk):
            self._skipped = chunk
        else:
            error = self._read_envelope(chunk)
        if usage and self._is_small(usage):
            self._usage = merged_usage(self._usage, usage)
        choices = chunk.get("choices")
        if type(choices) is not list:
            return error

        for item in choices:
            if type(item) is not dict:
                continue
            index = item.get("index", 0)
            choice = self._choices.get(index) if type(index) is int else None
            if choice is None:
                choice = self._open_choice(index)
                if choice is None:
                    continue
            delta = item.get("delta")
            count = len(deltas)
            if delta and type(delta) is dict:
                text = delta.get("content") if len(delta) == 1 else None
                if type(text) is str:  # nearly every chunk
                    if piece := self._append(choice.content, text):
                        deltas.append(Delta(choice.index, {"content": piece}))
                else:
                    self._read_delta(choice, delta, deltas)
                if "error" in delta and is_error(delta["error"]) and not self.succeeded:
                    error = {"error": delta["error"]}
            if not _USUAL_CHOICE_FIELDS.issuperset(item) or item.get("logprobs"):
                fields: dict[str, Any] = {}
                error = self._read_rare_fields(choice, item, fields, usage_known=tells(usage)) or error
                if fields:
                    _tell_extra(choice.index, fields, deltas, count)
            reason = item.get("finish_reason")
            if reason and type(reason) is str and reason != "null":
                self._finish(choice, reason)
        return error

    def flush(self, deltas: list[Delta]) -> None:
        """Release what was held back: messages, lone surrogates, and extras of which only the last state counts."""
        if self._skipped is not None:
            self._read_envelope(self._skipped)
        for choice in self._choices.values():
            if choice.message is not None:
                message, self._lenient = choice.message
                choice.message = None
                self._read_delta(choice, _rest_of(message, choice), deltas)
            fields: dict[str, Any] = {
                name: rest
                for name, text in (
                    ("content", choice.content),
                    ("reasoning", choice.reasoning),
                    ("refusal", choice.refusal),
                )
                if text is not None and (rest := text.end())
            }
            ends = [
                {"index": call.position, "arguments": rest} for call in choice.calls if (rest := call.arguments.end())
            ]
            if ends:
                fields["tool_calls"] = ends
            if choice.extras is not None and (ends_of_extras := choice.extras.end()):
                fields["extra"] = {name: self._abridged(value, name) for name, value in ends_of_extras.items()}
            if fields:
                deltas.append(Delta(choice.index, fields))

    def fill_empty_arguments(self, deltas: list[Delta]) -> None:
        """Set empty arguments of function calls to ``{}``. Only for complete answers: otherwise they may be missing."""
        for choice in self._choices.values():
            ends = []
            for call in choice.calls:
                if call.type == "function" and not call.arguments.value().strip():
                    call.arguments.append("{}")
                    ends.append({"index": call.position, "arguments": "{}"})
            if ends:
                deltas.append(Delta(choice.index, {"tool_calls": ends}))

    def output(self) -> Output:
        """Return the output so far."""
        usage = self._usage
        if usage is not None:
            usage = usage | {name: whole_number(usage.get(name)) for name in _TOKEN_COUNTS}
        return Output(
            choices=[self._choices[index].value() for index in sorted(self._choices)],
            usage=usage,
            provider_details=storable(self._details) if self._details else None,
        )

    # -- parts of a chunk -------------------------------------------------------------------------------

    def _read_envelope(self, chunk: dict[str, Any]) -> object:
        """Keep the chunk's own fields (id, model …); return the error it reports, if any."""
        if self._skipped is not None:
            skipped, self._skipped = self._skipped, None
            self._read_envelope(skipped)
        error = error_in(chunk)
        if error and self.succeeded:
            error = None
        groq = chunk.get("x_groq")
        if type(groq) is dict and not tells(chunk.get("usage")):
            self._usage = merged_usage(self._usage, groq.get("usage"))
        details = self._details
        for name, value in chunk.items():
            if value is None or value == "" or name in _FIELDS_READ_ELSEWHERE:
                continue
            # Unknown fields are replaced, not merged, and limited in number, so that they cannot pile up.
            if name not in _IDENTITY_FIELDS:
                if name not in details and len(details) >= MAX_FIELDS:
                    continue
                if not self._is_small(value):
                    value = abridged(storable(value), _MAX_DETAIL, name)  # noqa: PLW2901
            details[name] = value
        # As long as chunks have no other fields than this one, only the last envelope among them is read.
        self._fields = len(chunk) if "id" in details and "model" in details else 0
        return error

    def _is_small(self, value: object) -> bool:
        """Whether a field of the current chunk is small enough to be kept with the answer's details."""
        return self._chunk_size <= _MAX_DETAIL or json_size(value) <= _MAX_DETAIL

    def _open_choice(self, index: object) -> ChoiceBuilder | None:
        """Return the choice with this index, creating it if needed, or None if the index is invalid."""
        number = 0 if index is None else read_index(index)
        if number is None or not 0 <= number <= _MAX_INDEX:
            return None
        choice = self._choices.get(number)
        if choice is None:
            if len(self._choices) >= self._limits.max_choices:
                self._mark_too_large()
                return None
            choice = self._choices[number] = ChoiceBuilder(number)
            self._unfinished += 1
        return choice

    def _read_delta(self, choice: ChoiceBuilder, delta: dict[str, Any], deltas: list[Delta]) -> None:
        fields: dict[str, Any] = {}
        reasoning = ""
        try:
            for name, value in delta.items():
                if not value:
                    if value == "" and name in REASONING_FIELDS and name not in choice.reasoning_names:
                        self._note_name_of_reasoning(choice, name, fields)
                    continue
                if name == "content":
                    if type(value) is str:
                        if piece := self._append(choice.content, value):
                            fields["content"] = piece
                    else:
                        reasoning = self._read_parts(choice, value, fields) or reasoning
                elif name in REASONING_FIELDS:
                    reasoning = reasoning or reasoning_in(delta)
                    if name not in choice.reasoning_names or value != reasoning:
                        self._read_name_of_reasoning(choice, name, value, reasoning, fields)
                elif name == "tool_calls":
                    self._read_calls(choice, value, fields)
                elif name not in _IGNORED_DELTA_FIELDS:
                    self._read_rare_delta(choice, name, value, delta, fields)
            if reasoning:
                if choice.reasoning is None:
                    choice.reasoning = TextBuilder()
                if piece := self._append(choice.reasoning, reasoning):
                    fields["reasoning"] = piece
        finally:  # what was appended is released even if the rest cannot be read
            if fields:
                deltas.append(Delta(choice.index, fields))

    def _read_name_of_reasoning(
        self, choice: ChoiceBuilder, name: str, value: Any, reasoning: str, fields: dict[str, Any]
    ) -> None:
        """Remember under which name reasoning came; what is more than a text, or another text, is kept as it is."""
        if value == reasoning:
            self._note_name_of_reasoning(choice, name, fields)
        else:
            self._keep(choice, name, value, fields)

    def _note_name_of_reasoning(self, choice: ChoiceBuilder, name: str, fields: dict[str, Any]) -> None:
        choice.reasoning_names += (name,)
        self._keep(choice, REASONING_NAMES_FIELD, [name], fields)

    def _read_rare_delta(
        self, choice: ChoiceBuilder, name: str, value: Any, delta: dict[str, Any], fields: dict[str, Any]
    ) -> None:
        if name == "refusal":
            self._refuse(choice, value, fields)
        elif name == "function_call":
            if type(value) is dict:
                self._call_lists += 1
                self._read_call(choice, read_fragment({"function": value}, key=FUNCTION_CALL), fields)
        elif name == "provider_specific_fields" and type(value) is dict:
            # LiteLLM repeats in it what stands beside it.
            own = {field: part for field, part in value.items() if part is not None and part != delta.get(field)}
            if own:
                self._keep(choice, name, own, fields)
        else:
            choice.has_media = choice.has_media or name in _MEDIA_FIELDS
            self._keep(choice, name, value, fields)
            if name == "audio" and type(value) is dict and value.get("expires_at"):
                self._end(choice)  # marks the end of an audio answer, which may come without a finish reason

    def _read_parts(self, choice: ChoiceBuilder, value: object, fields: dict[str, Any]) -> str:
        """Read content that is a list of parts; return the reasoning among them."""
        content: list[str] = []
        reasoning: list[Any] = []
        others: list[Any] = []
        for part in value if type(value) is list else [value]:
            if type(part) is str:
                content.append(part)
            elif type(part) is dict:
                kind = part.get("type")
                if kind in REASONING_PARTS:
                    reasoning.append(part)
                elif kind == "refusal":
                    self._refuse(choice, part, fields)
                elif type(part.get("text")) is str:
                    content.append(part["text"])
                else:
                    choice.has_media = choice.has_media or kind in _MEDIA_PARTS
                    others.append(part)
        if piece := self._append(choice.content, "".join(content)):
            fields["content"] = piece
        if others:
            self._keep(choice, "content_parts", others, fields)
        if reasoning:
            self._keep(choice, "reasoning_parts", reasoning, fields)
        return "".join(map(plain_text, reasoning))

    def _refuse(self, choice: ChoiceBuilder, value: object, fields: dict[str, Any]) -> None:
        if choice.refusal is None:
            choice.refusal = TextBuilder()
        if piece := self._append(choice.refusal, plain_text(value)):
            fields["refusal"] = fields.get("refusal", "") + piece

    def _read_rare_fields(
        self, choice: ChoiceBuilder, item: dict[str, Any], fields: dict[str, Any], *, usage_known: bool
    ) -> object:
        """Read the unusual fields of a choice; return the error among them, if any."""
        error: object = None
        for name, value in item.items():
            if not value or name in {"index", "delta", "finish_reason"}:
                continue
            if name == "error":
                error = {"error": value} if is_error(value) and not self.succeeded else None
            elif name == "usage":
                if not usage_known:
                    self._usage = merged_usage(self._usage, value)
            elif name == "message":
                # Some providers repeat the whole beside the deltas; at the end it fills in what they did not have.
                if type(value) is dict and is_error(value.get("error")) and not self.succeeded:
                    error = {"error": value["error"]}
                if type(value) is dict:
                    known, lenient = choice.message or ({}, False)
                    told = {field: part for field, part in value.items() if part}
                    choice.message = (known | told, lenient or self._lenient)
            elif name == "logprobs" or type(value) is list:
                self._keep(choice, name, value, fields)
            else:
                self._keep_newest(choice, name, value)
        return error

    def _finish(self, choice: ChoiceBuilder, reason: str) -> None:
        # The last reason counts, but a failure reported after the end is ignored.
        if choice.finish_reason is None or reason not in FAILURE_REASONS:
            choice.finish_reason = safe(reason)[:_MAX_REASON]
        self._end(choice)

    def _end(self, choice: ChoiceBuilder) -> None:
        if not choice.ended:
            choice.ended = True
            self._unfinished -= 1

    def _keep_newest(self, choice: ChoiceBuilder, name: str, value: Any) -> None:
        """Keep a field of a choice of which only the last state counts."""
        name = safe(name)
        extras = choice.extras = choice.extras or ExtrasBuilder()
        if not extras.changes(name, value):
            return
        before, size = extras.state_size(name), self._reserve_extra(extras, name, value)
        if size is not None:
            extras.replace(name, value)
            self._extra_bytes_left += size + before - extras.state_size(name)

    # -- tool calls -------------------------------------------------------------------------------------

    def _read_calls(self, choice: ChoiceBuilder, value: object, fields: dict[str, Any]) -> None:
        self._call_lists += 1
        for fragment in value if type(value) is list else [value]:
            if type(fragment) is dict:
                self._read_call(choice, read_fragment(fragment), fields)

    def _read_call(self, choice: ChoiceBuilder, part: Fragment, fields: dict[str, Any]) -> None:
        """Add a fragment to its call, and what it adds to ``fields``."""
        if not (part.id or part.name or part.arguments or part.extra):
            return
        event: dict[str, Any] = {}
        call = choice.call_for(part, self._call_lists)
        if call is None:
            call = self._open_call(choice, part)
            if call is None:
                return
            event["id"] = call.id
            if call.type != "function":
                event["type"] = call.type
            if call.extra:
                event["extra"] = call.extra
        elif part.id and call.generated_id:
            call.id, call.generated_id = part.id, False
            event["id"] = call.id
        choice.last_call = call
        if part.key is not None:
            choice.calls_by_key[part.key] = call
            call.keyed = True

        name = joined_name(call.name, safe(part.name))
        if name != call.name and self._reserve(byte_length(name)):
            event["name"] = call.name = name
            call.named_in = self._call_lists
        if part.arguments and (arguments := call.take_arguments(part.arguments)):
            call.size += byte_length(arguments)
            if call.size > self._limits.max_argument_bytes:
                self._mark_too_large()
            if piece := self._append(call.arguments, arguments):
                event["arguments"] = piece
        if part.extra:
            self._read_call_extra(choice, call, storable(part.extra), event)
        if event:
            fields.setdefault("tool_calls", []).append({"index": call.position, **event})

    def _read_call_extra(
        self, choice: ChoiceBuilder, call: ToolCallBuilder, extra: dict[str, Any], event: dict[str, Any]
    ) -> None:
        whole = merged_extra(call.extra, extra)
        extras = choice.extras = choice.extras or ExtrasBuilder()
        if whole != call.extra and self._reserve_extra(extras, f"tool_calls[{call.position}]", extra) is not None:
            call.extra = whole
            event["extra"] = merged_extra(event.get("extra"), self._abridged(extra, "extra"))

    def _open_call(self, choice: ChoiceBuilder, part: Fragment) -> ToolCallBuilder | None:
        if not self._calls_left:
            self._mark_too_large()
        if not self._reserve(byte_length(part.id)):
            return None
        self._calls_left -= 1
        position = len(choice.calls)
        call_id = part.id
        if not call_id:
            seed = f"{self._call_seed}:{choice.index}:{position}"
            call_id = "call_" + sha256(seed.encode()).hexdigest()[:24]
        call = ToolCallBuilder(position, call_id, part.type or "function", generated_id=not part.id)
        if part.key == FUNCTION_CALL:
            call.extra = {LEGACY_CALL: True}  # its result is sent with the role "function"
        choice.calls.append(call)
        return call


def _tell_extra(index: int, fields: dict[str, Any], deltas: list[Delta], count: int) -> None:
    """Add extras to the delta of the same chunk, which is the first after ``count`` others, or as one of their own."""
    if len(deltas) > count and "extra" not in deltas[-1].fields:
        deltas[-1].fields.update(fields)
    else:
        deltas.append(Delta(index, fields))


def _rest_of(message: dict[str, Any], choice: ChoiceBuilder) -> dict[str, Any]:
    """Return the fields of a whole message of which the deltas had nothing."""
    streamed: set[str] = set()
    if choice.content:
        streamed.add("content")
    if choice.reasoning:
        streamed |= REASONING_FIELDS
    if choice.refusal:
        streamed.add("refusal")
    if choice.calls:
        streamed |= {"tool_calls", "function_call"}
    known = choice.extras
    if known is None:
        return {name: value for name, value in message.items() if name not in streamed}
    if known.has("content_parts") or known.has("reasoning_parts"):
        streamed.add("content")
    return {name: value for name, value in message.items() if name not in streamed and not known.has(name)}
