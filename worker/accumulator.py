"""The accumulator: a provider's chunks in, one output and the deltas that lead to it out.

In: decoded chunks, from the stream reader.  Out: normalised deltas, ready to publish, and at any time
the whole output; to the reader.  Exists so that one place knows how providers deviate from the
documented chunk, and so that the rest of Millrace never sees it.

Two promises hold at every moment: joining the deltas given out so far gives the output, byte for
byte; and every text is fit to be stored, without NUL and without halves of surrogate pairs.

``apply`` runs once for every token of every stream.  Its short path, one choice with one piece of
text, looks at nothing it does not need; what is rare is told apart by comparing sets of keys.
"""

import json
import math
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, NamedTuple

import orjson

from api_contracts.results import Choice, ToolCall

#: Finish reasons with which a provider says that it failed.
FAILURE_REASONS: Final = frozenset({"error", "network_error", "insufficient_system_resource", "abort"})

# What a chunk, a choice and a tool call usually consist of; anything else is looked at one by one.
_BARE_CHUNK: Final = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier", "obfuscation"}
)
_BARE_CHOICE: Final = frozenset({"index", "delta", "finish_reason", "logprobs"})
_BARE_CALL: Final = frozenset({"index", "id", "type", "function", "custom"})
_NAMING: Final = frozenset({"id", "model", "created", "service_tier", "system_fingerprint"})
_NOT_DETAILS: Final = frozenset({"choices", "usage", "object", "obfuscation", "error"})
_REASONING: Final = frozenset({"reasoning_content", "reasoning", "reasoning_details"})
_UNREAD: Final = frozenset({"role", "index"})  #: Fields of a delta.
_REASONING_PARTS: Final = ("thinking", "reasoning", "reasoning_text", "summary_text")
_TOKEN_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
_FUNCTION_CALL: Final = "function_call"  #: The key of the one call that the legacy field makes.

# Bounds for what is kept besides the output; each is far above what providers send.
_LARGEST_DETAIL: Final = 256 * 1024  #: Bytes of a chunk whose unknown fields, or changes of usage, are kept.
_MOST_FIELDS: Final = 64  #: Unknown fields of the stream, and fields of one level of usage.
_LONGEST_LABEL: Final = 32  #: Characters of a call's type.
_LONGEST_REASON: Final = 256  #: Characters of a finish reason.
_BLOCK: Final = 64  #: Pieces of a text that are joined at a time.
_DEEPEST: Final = 32  #: Levels of nested extras.
_LARGEST_INDEX: Final = 2**31 - 1
_LARGEST_COUNT: Final = 2**63 - 1


class Delta(NamedTuple):
    """What one chunk adds to one choice, in the shape of ``api_contracts.events.Delta``."""

    choice: int
    fields: dict[str, Any]  #: Any of content, reasoning, refusal (texts to append) and tool_calls (fragments).


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
        self._choices: dict[int, _Choice] = {}
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
            self._usage = _merged_usage(self._usage, usage)
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
            usage = usage | {name: _whole_number(usage.get(name)) for name in _TOKEN_COUNTS}
        return Output(
            choices=[self._choices[index].value() for index in sorted(self._choices)],
            usage=usage,
            provider_details=_storable(self._details) if self._details else None,
        )

    # -- the parts of a chunk ---------------------------------------------------------------------------

    def _read_envelope(self, chunk: dict[str, Any]) -> object:
        """Keep what the provider says about itself; return the error the chunk reports, if any."""
        error = _error_in(chunk)
        if error and self.succeeded:
            error = None
        groq = chunk.get("x_groq")
        if type(groq) is dict and not chunk.get("usage"):
            self._usage = _merged_usage(self._usage, groq.get("usage"))
        details = self._details
        small = self._chunk_size <= _LARGEST_DETAIL
        for name, value in chunk.items():
            if value is None or value == "" or name in _NOT_DETAILS:
                continue
            # An unknown field is replaced, never collected, and there are so many: this bounds what can pile up.
            if name in _NAMING or (small and (name in details or len(details) < _MOST_FIELDS)):
                details[name] = value
        self._named = "id" in details and "model" in details
        return error

    def _open_choice(self, index: object) -> "_Choice | None":
        """Return the choice that ``index`` stands for, which may be new, or None if it cannot be one."""
        number = 0 if index is None else _index(index)
        if number is None or not 0 <= number <= _LARGEST_INDEX:
            return None
        choice = self._choices.get(number)
        if choice is None:
            if len(self._choices) >= self._limits.max_choices:
                self._overflow()
                return None
            choice = self._choices[number] = _Choice(number)
            self._unfinished += 1
        return choice

    def _read_delta(self, choice: "_Choice", delta: dict[str, Any], deltas: list[Delta]) -> None:
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
                elif name in _REASONING:
                    reasoning = reasoning or _reasoning(delta)
                    if name == "reasoning_details":
                        self._keep(choice, name, value)  # the next request needs them as they came
                elif name == "tool_calls":
                    self._read_calls(choice, value, fields)
                elif name not in _UNREAD:
                    self._read_rare_delta(choice, name, value, fields)
            if reasoning:
                if choice.reasoning is None:
                    choice.reasoning = _Text()
                if piece := self._append(choice.reasoning, reasoning):
                    fields["reasoning"] = piece
        finally:  # what was appended is given out even if the rest cannot be read
            if fields:
                deltas.append(Delta(choice.index, fields))

    def _read_rare_delta(self, choice: "_Choice", name: str, value: Any, fields: dict[str, Any]) -> None:
        if name == "refusal":
            self._refuse(choice, value, fields)
        elif name == "function_call":
            if type(value) is dict:
                self._read_call(choice, _fragment({"function": value}, key=_FUNCTION_CALL), fields)
        elif name == "audio":
            choice.has_audio = True
            self._keep(choice, name, [value])
            if type(value) is dict and value.get("expires_at"):
                self._end(choice)  # the last update of an audio answer; no finish reason need follow
        else:
            self._keep(choice, name, value)

    def _read_parts(self, choice: "_Choice", value: object, fields: dict[str, Any]) -> str:
        """Read content that is a list of parts; return the reasoning among them."""
        content: list[str] = []
        reasoning: list[str] = []
        for part in value if type(value) is list else [value]:
            if type(part) is str:
                content.append(part)
            elif type(part) is dict:
                kind = part.get("type")
                if kind in _REASONING_PARTS:
                    reasoning.append(_plain_text(part))
                elif kind == "refusal":
                    self._refuse(choice, part, fields)
                elif type(part.get("text")) is str:
                    content.append(part["text"])
                else:
                    self._keep(choice, "content_parts", [part])
        if piece := self._append(choice.content, "".join(content)):
            fields["content"] = piece
        return "".join(reasoning)

    def _refuse(self, choice: "_Choice", value: object, fields: dict[str, Any]) -> None:
        if choice.refusal is None:
            choice.refusal = _Text()
        if piece := self._append(choice.refusal, _plain_text(value)):
            fields["refusal"] = fields.get("refusal", "") + piece

    def _read_rare_fields(self, choice: "_Choice", item: dict[str, Any], *, usage_known: bool) -> object:
        """Read what else a choice has; return the error in it, if any."""
        error: object = None
        for name, value in item.items():
            if not value or name in {"index", "delta", "finish_reason"}:
                continue
            if name == "error":
                error = None if self.succeeded else value
            elif name == "usage":
                if not usage_known:
                    self._usage = _merged_usage(self._usage, value)
            elif name == "message":
                # Some providers repeat the whole text beside the deltas: it is used at the end, if nothing else came.
                if type(value) is dict and not choice.has_output:
                    choice.message = (value, self._chunk_size, self._torn)
            else:
                self._keep(choice, name, value)
        return error

    def _finish(self, choice: "_Choice", reason: str) -> None:
        # The last reason counts, but a failure reported after the end takes nothing back.
        if choice.finish_reason is None or reason not in FAILURE_REASONS:
            choice.finish_reason = _safe(reason)[:_LONGEST_REASON]
        self._end(choice)

    def _end(self, choice: "_Choice") -> None:
        if not choice.ended:
            choice.ended = True
            self._unfinished -= 1

    def _keep(self, choice: "_Choice", name: str, value: object) -> None:
        """Keep a field that is no output beside its choice, if there is room for such."""
        if choice.extra is None:
            choice.extra = {}
        if self._take_extra_room():
            choice.extra[name] = _merged(choice.extra.get(name), value)
        else:
            choice.extra["truncated"] = True

    # -- tool calls -------------------------------------------------------------------------------------

    def _read_calls(self, choice: "_Choice", value: object, fields: dict[str, Any]) -> None:
        for fragment in value if type(value) is list else [value]:
            if type(fragment) is dict:
                self._read_call(choice, _fragment(fragment), fields)

    def _read_call(self, choice: "_Choice", part: "_Fragment", fields: dict[str, Any]) -> None:
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

        name = _joined_name(call.name, _safe(part.name))
        if name != call.name and self._take_room(len(name.encode())):
            event["name"] = call.name = name
        if part.arguments:
            call.size += len(part.arguments)
            if call.size > self._limits.max_argument_bytes:
                self._overflow()
            if piece := self._append(call.arguments, part.arguments):
                event["arguments"] = piece
        if part.extra and self._take_extra_room():
            call.extra = _merged(call.extra, part.extra)
        if event:
            fields.setdefault("tool_calls", []).append({"index": call.position, **event})

    def _open_call(self, choice: "_Choice", part: "_Fragment") -> "_Call | None":
        if not self._calls_left:
            self._overflow()
        if not self._take_room(len(part.id.encode())):
            return None
        self._calls_left -= 1
        position = len(choice.calls)
        call_id = part.id
        if not call_id:
            seed = f"{self._call_seed}:{choice.index}:{position}"
            call_id = "call_" + sha256(seed.encode()).hexdigest()[:24]
        call = _Call(position, call_id, part.type or "function", made_up_id=not part.id)
        if part.key == _FUNCTION_CALL:
            call.extra = {"legacy_function_call": True}  # it is answered with the role "function"
        choice.calls.append(call)
        return call

    # -- room -------------------------------------------------------------------------------------------

    def _append(self, text: "_Text", piece: str) -> str:
        """Append ``piece``, made safe, if there is room; return what was appended."""
        if self._torn or text.half:
            piece = text.rejoin(piece)
        elif "\x00" in piece:
            piece = piece.replace("\x00", "")
        if not piece or not self._take_room(len(piece) if piece.isascii() else len(piece.encode())):
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


# -- what is being built --------------------------------------------------------------------------------


class _Text:
    """A text under construction, kept in pieces: joining it with each piece would cost its square."""

    __slots__ = ("blocks", "half", "pieces")

    def __init__(self) -> None:
        self.half = ""  # the first half of a surrogate pair whose second half has not come
        self.pieces: list[str] = []
        self.blocks: list[str] = []  # pieces joined, _BLOCK at a time: a short string costs ten times its length

    def append(self, piece: str) -> None:
        self.pieces.append(piece)
        if len(self.pieces) == _BLOCK:
            self.blocks.append("".join(self.pieces))
            self.pieces.clear()

    def rejoin(self, piece: str) -> str:
        """Return ``piece`` with its surrogate pairs joined over deltas, and hold back half a pair at its end."""
        piece = self.half + piece
        self.half = ""
        if piece and "\ud800" <= piece[-1] <= "\udbff":
            self.half = piece[-1]
            piece = piece[:-1]
        return _safe(piece)

    def end(self) -> str:
        """Append what is held back, which stays without its second half, and return it."""
        if not self.half:
            return ""
        self.half = ""
        self.append("\N{REPLACEMENT CHARACTER}")
        return "\N{REPLACEMENT CHARACTER}"

    def value(self) -> str:
        whole = "".join(self.blocks) + "".join(self.pieces)
        self.blocks = [whole] if whole else []
        self.pieces.clear()
        return whole

    def __bool__(self) -> bool:
        return bool(self.half or self.pieces or self.blocks)


class _Call:
    """A tool call under construction."""

    __slots__ = ("arguments", "extra", "id", "made_up_id", "name", "position", "size", "type")

    def __init__(self, position: int, call_id: str, kind: str, *, made_up_id: bool) -> None:
        self.position = position
        self.id = call_id
        self.made_up_id = made_up_id
        self.type = kind
        self.name = ""
        self.arguments = _Text()
        self.size = 0  # of the arguments
        self.extra: dict[str, Any] | None = None

    def value(self) -> ToolCall:
        arguments = self.arguments.value()
        return ToolCall(
            id=self.id,
            type=self.type,
            name=self.name,
            arguments=arguments,
            arguments_valid=_is_json(arguments),
            extra=_storable(self.extra) if self.extra else None,
        )


class _Choice:
    """A choice under construction."""

    __slots__ = (
        "calls",
        "calls_by_key",
        "content",
        "ended",
        "extra",
        "finish_reason",
        "has_audio",
        "index",
        "last_call",
        "message",
        "reasoning",
        "refusal",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.content = _Text()
        self.reasoning: _Text | None = None
        self.refusal: _Text | None = None
        self.finish_reason: str | None = None
        self.ended = False
        self.has_audio = False
        self.message: tuple[dict[str, Any], int, bool] | None = None  # held back, with its chunk's size and torn
        self.extra: dict[str, Any] | None = None
        self.calls: list[_Call] = []
        self.calls_by_key: dict[int | str, _Call] = {}
        self.last_call: _Call | None = None

    @property
    def has_output(self) -> bool:
        texts = (self.content, self.reasoning, self.refusal)
        return bool(self.calls) or self.has_audio or any(texts)

    def call_for(self, part: "_Fragment") -> _Call | None:
        """Return the call that a fragment continues; None: it begins a new one."""
        if part.key is not None:
            call = self.calls_by_key.get(part.key)
            if call is None or not part.id or call.made_up_id or part.id == call.id:
                return call
            # Another id at the same index: some providers number every call 0.
            return self._call_with(part.id) or (None if part.name else call)
        if part.id:
            return self._call_with(part.id)
        return None if part.name else self.last_call

    def _call_with(self, call_id: str) -> _Call | None:
        return next((call for call in self.calls if call.id == call_id), None)

    def value(self) -> Choice:
        return Choice(
            index=self.index,
            content=self.content.value(),
            reasoning=self.reasoning.value() if self.reasoning else "",
            refusal=self.refusal.value() if self.refusal else "",
            finish_reason=self.finish_reason,
            tool_calls=[call.value() for call in self.calls],
            extra=_storable(self.extra) if self.extra else None,
        )


class _Fragment(NamedTuple):
    """A piece of a tool call, in one shape for all the shapes there are."""

    key: int | str | None  #: What the provider tells calls apart by, if it does.
    id: str
    type: str
    name: str
    arguments: str
    extra: dict[str, Any]


def _fragment(value: dict[str, Any], key: str | None = None) -> _Fragment:
    body = value.get("function")
    kind = value.get("type")
    arguments = "arguments"
    if type(value.get("custom")) is dict:
        body, kind, arguments = value["custom"], kind or "custom", "input"
    if type(body) is not dict:
        body = {}
    name = body.get("name")
    return _Fragment(
        key=_index(value.get("index")) if key is None else key,
        id=_given_id(value.get("id")),
        type=_safe(kind)[:_LONGEST_LABEL] if type(kind) is str else "",
        name=name if type(name) is str else "",
        arguments=_arguments_text(body.get(arguments)),
        extra={name: part for name, part in value.items() if part and name not in _BARE_CALL},
    )


def _given_id(value: object) -> str:
    """Return a call's id, empty if it has none; some providers write the word null."""
    if type(value) is int:
        return str(value)
    return _safe(value) if type(value) is str and value != "null" else ""


def _arguments_text(value: object) -> str:
    if type(value) is str:
        return value
    if not value:
        return ""  # no arguments, or an empty object, which the end of the stream fills in
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # halves of surrogate pairs, or numbers beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _joined_name(known: str, piece: str) -> str:
    """Return a call's name after another piece: providers repeat it, extend it, or send it in parts."""
    if not piece or piece == known:
        return known
    return piece if piece.startswith(known) else known + piece


# -- the parts' meaning -----------------------------------------------------------------------------------


def _error_in(chunk: dict[str, Any]) -> object:
    """Return the error that a chunk is or has, in any of the shapes providers give it."""
    if chunk.get("error"):
        return chunk
    verdict = chunk.get("base_resp")
    if type(verdict) is dict and verdict.get("status_code"):
        return chunk
    if type(chunk.get("choices")) is list:
        return None
    if chunk.get("object") == "error" or chunk.get("type") == "error" or chunk.get("errors") or chunk.get("detail"):
        return chunk
    if chunk.get("code") in (0, "0", 200, "200"):  # a tuple: the code may be unhashable
        return None
    return chunk if chunk.get("code") or chunk.get("message") else None


def _reasoning(delta: dict[str, Any]) -> str:
    """Return a delta's reasoning. It may be there twice, and the details are its text only if nothing else is."""
    value = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("reasoning_details")
    return _plain_text(value) if value else ""


def _plain_text(value: object, depth: int = _DEEPEST) -> str:
    """Return the text in a value that may be a text, a part that has one, or a list of such parts."""
    if type(value) is str:
        return value
    if not depth:
        return ""
    if type(value) is list:
        return "".join(_plain_text(part, depth - 1) for part in value)
    if type(value) is dict:
        for name in ("text", "thinking", "summary", "reasoning", "refusal", "content"):
            if value.get(name):
                return _plain_text(value[name], depth - 1)
    return ""


def _merged(known: Any, new: Any, depth: int = _DEEPEST) -> Any:
    """Return two values of one field as one: lists are joined, objects merged, anything else is replaced."""
    if type(known) is list and type(new) is list:
        known.extend(new)
        return known
    if type(known) is dict and type(new) is dict and depth:
        for name, value in new.items():
            known[name] = _merged(known.get(name), value, depth - 1)
        return known
    return known if new is None else new


def _merged_usage(known: dict[str, Any] | None, new: object, depth: int = 2) -> dict[str, Any] | None:
    """Return usage as reported so far, field by field: the newest counts, but null and 0 never beat a figure."""
    if type(new) is not dict:
        return known
    merged = {} if known is None else known
    for given_name, value in new.items():
        name = _safe(given_name)
        before = merged.get(name)
        if value is None or (before is None and len(merged) >= _MOST_FIELDS):
            continue
        if type(value) is dict and depth:
            merged[name] = _merged_usage(before if type(before) is dict else None, value, depth - 1)
        elif _number(value) != 0 or not _number(before):
            merged[name] = _storable(value)
    return merged


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole_number(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number < _LARGEST_COUNT else None


def _index(value: object) -> int | None:
    if type(value) is int:
        return value
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


# -- texts and values fit to be stored ------------------------------------------------------------------


def _safe(text: str) -> str:
    """Return ``text`` with its surrogate pairs joined, single halves replaced and NUL removed."""
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\x00", "")


def _storable(value: Any, depth: int = _DEEPEST) -> Any:
    """Return a JSON value as every database takes it: safe texts, no NaN, nothing nested without end."""
    if isinstance(value, str):
        return _safe(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST_COUNT else None
    if not depth:
        return None
    if isinstance(value, list):
        return [_storable(item, depth - 1) for item in value]
    return {_safe(name): _storable(item, depth - 1) for name, item in value.items()}


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
    return True
