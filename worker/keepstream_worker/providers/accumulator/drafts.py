"""Drafts: texts, tool calls and choices while they are being built.

In: pieces, from the accumulator.  Out: their values as the contract has them.  Exists so that a growing
text costs as little memory as its letters, and so that a fragment finds the call it continues.
"""

from typing import Any, Final

from keepstream.results import Choice, ToolCall
from keepstream_worker.providers.accumulator.shapes import Fragment
from keepstream_worker.providers.accumulator.values import is_json, safe, storable

_BLOCK: Final = 64  #: Pieces of a text that are joined at a time.


class Text:
    """A text under construction, kept in pieces: joining it with each piece would cost its square."""

    __slots__ = ("blocks", "half", "pieces")

    def __init__(self) -> None:
        self.half = ""  # the first half of a surrogate pair whose second half has not come
        self.pieces: list[str] = []
        self.blocks: list[str] = []  # pieces joined, _BLOCK at a time: a short string costs ten times its length

    def append(self, piece: str) -> None:
        """Append ``piece``, which holds no halves of pairs."""
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
        return safe(piece)

    def end(self) -> str:
        """Append what is held back, which stays without its second half, and return it."""
        if not self.half:
            return ""
        self.half = ""
        self.append("\N{REPLACEMENT CHARACTER}")
        return "\N{REPLACEMENT CHARACTER}"

    def value(self) -> str:
        """Return the text so far, without what is held back."""
        whole = "".join(self.blocks) + "".join(self.pieces)
        self.blocks = [whole] if whole else []
        self.pieces.clear()
        return whole

    def __bool__(self) -> bool:
        return bool(self.half or self.pieces or self.blocks)


class CallDraft:
    """A tool call under construction."""

    __slots__ = ("arguments", "extra", "id", "made_up_id", "name", "position", "size", "type")

    def __init__(self, position: int, call_id: str, kind: str, *, made_up_id: bool) -> None:
        self.position = position
        self.id = call_id
        self.made_up_id = made_up_id
        self.type = kind
        self.name = ""
        self.arguments = Text()
        self.size = 0  # of the arguments
        self.extra: dict[str, Any] | None = None

    def value(self) -> ToolCall:
        """Return the call so far."""
        arguments = self.arguments.value()
        return ToolCall(
            id=self.id,
            type=self.type,
            name=self.name,
            arguments=arguments,
            arguments_valid=is_json(arguments),
            extra=storable(self.extra) if self.extra else None,
        )


class ChoiceDraft:
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
        self.content = Text()
        self.reasoning: Text | None = None
        self.refusal: Text | None = None
        self.finish_reason: str | None = None
        self.ended = False
        self.has_audio = False
        self.message: tuple[dict[str, Any], int, bool] | None = None  # held back, with its chunk's size and torn
        self.extra: dict[str, Any] | None = None
        self.calls: list[CallDraft] = []
        self.calls_by_key: dict[int | str, CallDraft] = {}
        self.last_call: CallDraft | None = None

    @property
    def has_output(self) -> bool:
        """Whether there is something a reader could use."""
        texts = (self.content, self.reasoning, self.refusal)
        return bool(self.calls) or self.has_audio or any(texts)

    def call_for(self, part: Fragment) -> CallDraft | None:
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

    def _call_with(self, call_id: str) -> CallDraft | None:
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
