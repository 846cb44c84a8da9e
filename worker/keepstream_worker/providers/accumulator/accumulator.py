"""The accumulator proper: applies chunks to drafts of the choices and tells what each chunk adds.

In: decoded chunks, from the stream reader.  Out: deltas while the stream lasts, the output at any time.
Exists so that the order in which a chunk's parts count is written down once.

``apply`` runs once for every token of every stream.  Its short path, one choice with one piece of
text, looks at nothing it does not need; what is rare is told apart by comparing sets of keys.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from keepstream.results import Choice
from keepstream_worker.providers.accumulator.drafts import CallDraft, ChoiceDraft, Text
from keepstream_worker.providers.accumulator.shapes import (
    FUNCTION_CALL,
    REASONING_FIELDS,
    REASONING_PARTS,
    Fragment,
    error_in,
    joined_name,
    plain_text,
    read_fragment,
    read_index,
    reasoning_in,
)
from keepstream_worker.providers.accumulator.values import (
    MOST_FIELDS,
    byte_length,
    has_list,
    merged,
    merged_usage,
    safe,
    storable,
    whole_number,
)
from keepstream_worker.values import Delta

#: Finish reasons with which a provider says that it failed.
FAILURE_REASONS: Final = frozenset({"error", "network_error", "insufficient_system_resource", "abort"})

# What a chunk and a choice usually consist of; anything else is looked at one by one.
_BARE_CHUNK: Final = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier", "obfuscation"}
)
_BARE_CHOICE: Final = frozenset({"index", "delta", "finish_reason", "logprobs"})
_NAMING: Final = frozenset({"id", "model", "created", "service_tier", "system_fingerprint"})
_NOT_DETAILS: Final = frozenset({"choices", "usage", "object", "obfuscation", "error"})
_UNREAD: Final = frozenset({"role", "index"})  #: Fields of a delta.
_TOKEN_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")

# Bounds for what is kept besides the output; each is far above what providers send.
_LARGEST_DETAIL: Final = 256 * 1024  #: Bytes of a chunk whose unknown fields, or changes of usage, are kept.
_LONGEST_REASON: Final = 256  #: Characters of a finish reason.
_LARGEST_INDEX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stream may use: far above what models produce, far below what hurts a worker."""

    max_event_bytes: int = 16 * 1024 * 1024  #: One event, or a whole answer that is not streamed.
    max_output_bytes: int = 16 * 1024 * 1024  #: All texts, call ids, names and arguments of all choices.
    max_argument_bytes: int = 4 * 1024 * 1024  #: One tool call's arguments.
    max_extra_bytes: int = 4 * 1024 * 1024  #: Chunks whose logprobs, annotations … are kept; later ones go without.
    max_choices: int = 128
    max_tool_calls: int = 256  #: Of all choices.


@dataclass(frozen=True, slots=True)
class Output:
    """What an attempt has brought so far."""

    choices: list[Choice]  #: By index.
    usage: dict[str, Any] | None  #: As reported; prompt_, completion_ and total_tokens are int or None.
    provider_details: dict[str, Any] | None  #: The provider's own id, model, service tier, fingerprint …


class Accumulator:
    """Collects one stream.

    Args:
        limits: What the stream may use. Once it asks for more, ``too_large`` is set and no text is added.
        call_seed: What made-up tool-call ids are derived from, so that they stay the same and differ
            between jobs: the job's id.
    """

    __slots__ = (
        "_call_seed",
        "_calls_left",
        "_choices",
        "_chunk_size",
        "_details",
        "_extra_room",
        "_limits",
        "_named",
        "_room",
        "_torn",
        "_unfinished",
        "_usage",
        "too_large",
    )

    def __init__(self, limits: Limits, call_seed: str = "") -> None:
        self.too_large = False  #: Whether the answer passed a limit before it was whole.
        self._limits = limits
        self._call_seed = call_seed
        self._choices: dict[int, ChoiceDraft] = {}
        self._unfinished = 0  # choices that have not ended
        self._room = limits.max_output_bytes  # bytes the output may still take; negative: it asked for more
        self._extra_room = limits.max_extra_bytes
        self._calls_left = limits.max_tool_calls
        self._usage: dict[str, Any] | None = None
        self._details: dict[str, Any] = {}
        self._named = False  # whether the details hold the provider's id and model
        # Of the chunk at hand: the bytes it had as JSON, and whether its texts may hold halves of surrogate pairs.
        self._chunk_size = 0
        self._torn = False

    # -- what the reader asks -------------------------------------------------------------------------

    @property
    def choice_count(self) -> int:
        """How many choices have been seen."""
        return len(self._choices)

    @property
    def complete(self) -> bool:
        """Whether there are choices and each has ended."""
        return self._unfinished == 0 and bool(self._choices)

    @property
    def failed(self) -> bool:
        """Whether a finish reason says that the provider failed."""
        return any(choice.finish_reason in FAILURE_REASONS for choice in self._choices.values())

    @property
    def succeeded(self) -> bool:
        """Whether the answer is whole: complete, and no choice ended in a failure."""
        return self.complete and not self.failed

    @property
    def has_output(self) -> bool:
        """Whether any choice holds something a reader could use."""
        return any(choice.has_output for choice in self._choices.values())

    # -- a stream's life --------------------------------------------------------------------------------

    def apply(self, chunk: dict[str, Any], deltas: list[Delta], size: int, torn: bool) -> object:  # noqa: FBT001 -- a keyword costs time here
        """Take a chunk, append what it adds to ``deltas``, and return the error it reports, or None.

        An error that comes after the whole answer is none.

        Args:
            chunk: The decoded JSON object.
            deltas: Where to append.
            size: Bytes the chunk had as JSON; what is kept besides the output is limited by it.
            torn: Whether texts may hold halves of surrogate pairs; a strict JSON parser rules that out.
        """
        self._chunk_size = size
        self._torn = torn
        error: object = None
        if not (self._named and _BARE_CHUNK.issuperset(chunk)):
            error = self._read_envelope(chunk)
        usage = chunk.get("usage")
        if usage and (size <= _LARGEST_DETAIL or self._usage is None):
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
            if delta and type(delta) is dict:
                self._read_delta(choice, delta, deltas)
            if not _BARE_CHOICE.issuperset(item) or item.get("logprobs"):
                error = self._read_rare_fields(choice, item, usage_known=bool(usage)) or error
            reason = item.get("finish_reason")
            if reason and type(reason) is str and reason != "null":
                self._finish(choice, reason)
        return error

    def flush(self, deltas: list[Delta]) -> None:
        """Give out what was held back: messages where nothing was streamed, halves of surrogate pairs."""
        for choice in self._choices.values():
            if choice.message is not None and not choice.has_output:
                message, self._chunk_size, self._torn = choice.message
                self._read_delta(choice, message, deltas)
            choice.message = None
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
            if fields:
                deltas.append(Delta(choice.index, fields))

    def fill_empty_arguments(self, deltas: list[Delta]) -> None:
        """Give ``{}`` to function calls without arguments. For whole answers only: else they may just be missing."""
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

    # -- the parts of a chunk ---------------------------------------------------------------------------

    def _read_envelope(self, chunk: dict[str, Any]) -> object:
        """Keep what the provider says about itself; return the error the chunk reports, if any."""
        error = error_in(chunk)
        if error and self.succeeded:
            error = None
        groq = chunk.get("x_groq")
        if type(groq) is dict and not chunk.get("usage"):
            self._usage = merged_usage(self._usage, groq.get("usage"))
        details = self._details
        small = self._chunk_size <= _LARGEST_DETAIL
        for name, value in chunk.items():
            if value is None or value == "" or name in _NOT_DETAILS:
                continue
            # An unknown field is replaced, never collected, and there are so many: this bounds what can pile up.
            if name in _NAMING or (small and (name in details or len(details) < MOST_FIELDS)):
                details[name] = value
        self._named = "id" in details and "model" in details
        return error

    def _open_choice(self, index: object) -> ChoiceDraft | None:
        """Return the choice that ``index`` stands for, which may be new, or None if it cannot be one."""
        number = 0 if index is None else read_index(index)
        if number is None or not 0 <= number <= _LARGEST_INDEX:
            return None
        choice = self._choices.get(number)
        if choice is None:
            if len(self._choices) >= self._limits.max_choices:
                self._overflow()
                return None
            choice = self._choices[number] = ChoiceDraft(number)
            self._unfinished += 1
        return choice

    def _read_delta(self, choice: ChoiceDraft, delta: dict[str, Any], deltas: list[Delta]) -> None:
        fields: dict[str, Any] = {}
        reasoning = ""
        try:
            for name, value in delta.items():
                if not value:
                    continue
                if name == "content":
                    if type(value) is str:
                        if piece := self._append(choice.content, value):
                            fields["content"] = piece
                    else:
                        reasoning = self._read_parts(choice, value, fields) or reasoning
                elif name in REASONING_FIELDS:
                    reasoning = reasoning or reasoning_in(delta)
                    if name == "reasoning_details":
                        self._keep(choice, name, value)  # the next request needs them as they came
                elif name == "tool_calls":
                    self._read_calls(choice, value, fields)
                elif name not in _UNREAD:
                    self._read_rare_delta(choice, name, value, fields)
            if reasoning:
                if choice.reasoning is None:
                    choice.reasoning = Text()
                if piece := self._append(choice.reasoning, reasoning):
                    fields["reasoning"] = piece
        finally:  # what was appended is given out even if the rest cannot be read
            if fields:
                deltas.append(Delta(choice.index, fields))

    def _read_rare_delta(self, choice: ChoiceDraft, name: str, value: Any, fields: dict[str, Any]) -> None:
        if name == "refusal":
            self._refuse(choice, value, fields)
        elif name == "function_call":
            if type(value) is dict:
                self._read_call(choice, read_fragment({"function": value}, key=FUNCTION_CALL), fields)
        elif name == "audio":
            choice.has_audio = True
            self._keep(choice, name, [value])
            if type(value) is dict and value.get("expires_at"):
                self._end(choice)  # the last update of an audio answer; no finish reason need follow
        else:
            self._keep(choice, name, value)

    def _read_parts(self, choice: ChoiceDraft, value: object, fields: dict[str, Any]) -> str:
        """Read content that is a list of parts; return the reasoning among them."""
        content: list[str] = []
        reasoning: list[str] = []
        for part in value if type(value) is list else [value]:
            if type(part) is str:
                content.append(part)
            elif type(part) is dict:
                kind = part.get("type")
                if kind in REASONING_PARTS:
                    reasoning.append(plain_text(part))
                elif kind == "refusal":
                    self._refuse(choice, part, fields)
                elif type(part.get("text")) is str:
                    content.append(part["text"])
                else:
                    self._keep(choice, "content_parts", [part])
        if piece := self._append(choice.content, "".join(content)):
            fields["content"] = piece
        return "".join(reasoning)

    def _refuse(self, choice: ChoiceDraft, value: object, fields: dict[str, Any]) -> None:
        if choice.refusal is None:
            choice.refusal = Text()
        if piece := self._append(choice.refusal, plain_text(value)):
            fields["refusal"] = fields.get("refusal", "") + piece

    def _read_rare_fields(self, choice: ChoiceDraft, item: dict[str, Any], *, usage_known: bool) -> object:
        """Read what else a choice has; return the error in it, if any."""
        error: object = None
        for name, value in item.items():
            if not value or name in {"index", "delta", "finish_reason"}:
                continue
            if name == "error":
                error = None if self.succeeded else value
            elif name == "usage":
                if not usage_known:
                    self._usage = merged_usage(self._usage, value)
            elif name == "message":
                # Some providers repeat the whole text beside the deltas: it is used at the end, if nothing else came.
                if type(value) is dict and not choice.has_output:
                    choice.message = (value, self._chunk_size, self._torn)
            else:
                self._keep(choice, name, value)
        return error

    def _finish(self, choice: ChoiceDraft, reason: str) -> None:
        # The last reason counts, but a failure reported after the end takes nothing back.
        if choice.finish_reason is None or reason not in FAILURE_REASONS:
            choice.finish_reason = safe(reason)[:_LONGEST_REASON]
        self._end(choice)

    def _end(self, choice: ChoiceDraft) -> None:
        if not choice.ended:
            choice.ended = True
            self._unfinished -= 1

    def _keep(self, choice: ChoiceDraft, name: str, value: object) -> None:
        """Keep a field that is no output beside its choice, if there is room for such."""
        if choice.extra is None:
            choice.extra = {}
        known = choice.extra.get(name)
        if value == known and not has_list(value):
            return  # some providers say it with every token
        if self._take_extra_room():
            choice.extra[name] = merged(known, value)
        else:
            choice.extra["truncated"] = True

    # -- tool calls -------------------------------------------------------------------------------------

    def _read_calls(self, choice: ChoiceDraft, value: object, fields: dict[str, Any]) -> None:
        for fragment in value if type(value) is list else [value]:
            if type(fragment) is dict:
                self._read_call(choice, read_fragment(fragment), fields)

    def _read_call(self, choice: ChoiceDraft, part: Fragment, fields: dict[str, Any]) -> None:
        """Add a fragment to the call it belongs to, and what it adds to ``fields``."""
        if not (part.id or part.name or part.arguments or part.extra):
            return
        event: dict[str, Any] = {}
        call = choice.call_for(part)
        if call is None:
            call = self._open_call(choice, part)
            if call is None:
                return
            event["id"] = call.id
        elif part.id and call.made_up_id:
            call.id, call.made_up_id = part.id, False
            event["id"] = call.id
        choice.last_call = call
        if part.key is not None:
            choice.calls_by_key[part.key] = call

        name = joined_name(call.name, safe(part.name))
        if name != call.name and self._take_room(byte_length(name)):
            event["name"] = call.name = name
        if part.arguments:
            call.size += byte_length(part.arguments)
            if call.size > self._limits.max_argument_bytes:
                self._overflow()
            if piece := self._append(call.arguments, part.arguments):
                event["arguments"] = piece
        if part.extra and self._take_extra_room():
            call.extra = merged(call.extra, part.extra)
        if event:
            fields.setdefault("tool_calls", []).append({"index": call.position, **event})

    def _open_call(self, choice: ChoiceDraft, part: Fragment) -> CallDraft | None:
        if not self._calls_left:
            self._overflow()
        if not self._take_room(byte_length(part.id)):
            return None
        self._calls_left -= 1
        position = len(choice.calls)
        call_id = part.id
        if not call_id:
            seed = f"{self._call_seed}:{choice.index}:{position}"
            call_id = "call_" + sha256(seed.encode()).hexdigest()[:24]
        call = CallDraft(position, call_id, part.type or "function", made_up_id=not part.id)
        if part.key == FUNCTION_CALL:
            call.extra = {"legacy_function_call": True}  # it is answered with the role "function"
        choice.calls.append(call)
        return call

    # -- room -------------------------------------------------------------------------------------------

    def _append(self, text: Text, piece: str) -> str:
        """Append ``piece``, made safe, if there is room; return what was appended."""
        if self._torn or text.half:
            piece = text.rejoin(piece)
        elif "\x00" in piece:
            piece = piece.replace("\x00", "")
        size = len(piece) if piece.isascii() else len(piece.encode())  # byte_length, without the call
        if not piece or not self._take_room(size):
            return ""
        text.append(piece)
        return piece

    def _take_room(self, size: int) -> bool:
        """Take room for output, and tell whether there was enough."""
        if size > self._room:
            self._overflow()
            return False
        self._room -= size
        return True

    def _overflow(self) -> None:
        """Refuse all output from now on, so that no text has a gap."""
        self._room = -1
        self.too_large = self.too_large or not self.succeeded

    def _take_extra_room(self) -> bool:
        if self._chunk_size > self._extra_room:
            return False
        self._extra_room -= self._chunk_size
        return True
