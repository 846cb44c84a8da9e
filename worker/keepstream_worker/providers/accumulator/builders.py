"""Builders of texts, tool calls and choices.

In: pieces, from the accumulator.
Out: the contract's ``Choice`` and ``ToolCall``, to the accumulator.
"""

from typing import Any, Final

from keepstream.results import Choice, ToolCall
from keepstream_worker.providers.accumulator.json_values import is_json, safe, storable
from keepstream_worker.providers.accumulator.normalization import Fragment

_BLOCK: Final = 64  #: Pieces of a text that are joined at once.


class TextBuilder:
    """A growing text, kept in pieces: joining it with every piece would take quadratic time."""

    __slots__ = ("blocks", "pending_surrogate", "pieces")

    def __init__(self) -> None:
        self.pending_surrogate = ""  # the first half of a surrogate pair whose second half has not come
        self.pieces: list[str] = []
        self.blocks: list[str] = []  # joined pieces, _BLOCK at a time: short strings waste memory

    def append(self, piece: str) -> None:
        """Append ``piece``, which must not contain lone surrogates."""
        self.pieces.append(piece)
        if len(self.pieces) == _BLOCK:
            self.blocks.append("".join(self.pieces))
            self.pieces.clear()

    def rejoin(self, piece: str) -> str:
        """Return ``piece`` with surrogate pairs joined across deltas; hold back the first half of a pair at its end."""
        piece = self.pending_surrogate + piece
        self.pending_surrogate = ""
        if piece and "\ud800" <= piece[-1] <= "\udbff":
            self.pending_surrogate = piece[-1]
            piece = piece[:-1]
        return safe(piece)

    def end(self) -> str:
        """Replace a surrogate that is still held back, since its second half never came; return what was appended."""
        if not self.pending_surrogate:
            return ""
        self.pending_surrogate = ""
        self.append("\N{REPLACEMENT CHARACTER}")
        return "\N{REPLACEMENT CHARACTER}"

    def value(self) -> str:
        """Return the text so far, without a surrogate that is held back."""
        whole = "".join(self.blocks) + "".join(self.pieces)
        self.blocks = [whole] if whole else []
        self.pieces.clear()
        return whole

    def __bool__(self) -> bool:
        return bool(self.pending_surrogate or self.pieces or self.blocks)


class ToolCallBuilder:
    """Builds a tool call."""

    __slots__ = ("arguments", "extra", "generated_id", "id", "name", "position", "size", "type")

    def __init__(self, position: int, call_id: str, kind: str, *, generated_id: bool) -> None:
        self.position = position
        self.id = call_id
        self.generated_id = generated_id
        self.type = kind
        self.name = ""
        self.arguments = TextBuilder()
        self.size = 0  # bytes of the arguments
        self.extra: dict[str, Any] | None = None

    def value(self) -> ToolCall:
        """Return the tool call so far."""
        arguments = self.arguments.value()
        return ToolCall(
            id=self.id,
            type=self.type,
            name=self.name,
            arguments=arguments,
            arguments_valid=is_json(arguments),
            extra=storable(self.extra) if self.extra else None,
        )


class ChoiceBuilder:
    """Builds a choice."""

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
        self.content = TextBuilder()
        self.reasoning: TextBuilder | None = None
        self.refusal: TextBuilder | None = None
        self.finish_reason: str | None = None
        self.ended = False
        self.has_audio = False
        self.message: tuple[dict[str, Any], int, bool] | None = None  # held back, with its chunk's size and leniency
        self.extra: dict[str, Any] | None = None
        self.calls: list[ToolCallBuilder] = []
        self.calls_by_key: dict[int | str, ToolCallBuilder] = {}
        self.last_call: ToolCallBuilder | None = None

    @property
    def has_output(self) -> bool:
        """Whether there is anything a reader could use."""
        texts = (self.content, self.reasoning, self.refusal)
        return bool(self.calls) or self.has_audio or any(texts)

    def call_for(self, part: Fragment) -> ToolCallBuilder | None:
        """Return the call that a fragment continues, or None if it begins a new one."""
        if part.key is not None:
            call = self.calls_by_key.get(part.key)
            if call is None or not part.id or call.generated_id or part.id == call.id:
                return call
            # A different id at the same index: some providers give every call the index 0.
            return self._call_with(part.id) or (None if part.name else call)
        if part.id:
            return self._call_with(part.id)
        return None if part.name else self.last_call

    def _call_with(self, call_id: str) -> ToolCallBuilder | None:
        return next((call for call in self.calls if call.id == call_id), None)

    def value(self) -> Choice:
        """Return the choice so far."""
        return Choice(
            index=self.index,
            content=self.content.value(),
            reasoning=self.reasoning.value() if self.reasoning else "",
            refusal=self.refusal.value() if self.refusal else "",
            finish_reason=self.finish_reason,
            tool_calls=[call.value() for call in self.calls],
            extra=storable(self.extra) if self.extra else None,
        )
