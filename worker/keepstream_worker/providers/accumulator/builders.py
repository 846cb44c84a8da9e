"""Builders of texts, tool calls and choices.

In: pieces, from the accumulator.
Out: the contract's ``Choice`` and ``ToolCall``, to the accumulator.

Providers tell the calls of a choice apart by index, by id, by both or by neither. ``ChoiceBuilder.call_for`` holds the
rules: an id that differs or a new name begins another call, also at an index that is taken, and so do arguments that
begin anew after complete ones.
"""

from typing import Any, Final

from keepstream.results import Choice, ToolCall
from keepstream_worker.providers.accumulator.extras import ExtrasBuilder
from keepstream_worker.providers.accumulator.json_values import is_json, safe, same_json
from keepstream_worker.providers.accumulator.normalization import PLACEHOLDERS, Fragment

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

    def ends_with(self, end: str) -> bool:
        """Return whether the text, without white space at its end, ends with ``end``, a single character."""
        for pieces in (self.pieces, self.blocks):
            for piece in reversed(pieces):
                if rest := piece.rstrip():
                    return rest.endswith(end)
        return False

    def __bool__(self) -> bool:
        return bool(self.pending_surrogate or self.pieces or self.blocks)


class ToolCallBuilder:
    """Builds a tool call."""

    __slots__ = (
        "arguments",
        "extra",
        "generated_id",
        "id",
        "keyed",
        "name",
        "named_in",
        "next_look",
        "placeholder",
        "position",
        "size",
        "type",
    )

    def __init__(self, position: int, call_id: str, kind: str, *, generated_id: bool) -> None:
        self.position = position
        self.id = call_id
        self.generated_id = generated_id  #: Whether the provider has sent no id for it so far.
        self.keyed = False  #: Whether the provider has sent an index for it.
        self.type = kind
        self.name = ""
        self.named_in = 0  #: The number of the list of fragments that named it.
        self.arguments = TextBuilder()
        self.placeholder = ""  #: What came in place of arguments, held back until it is clear that none follow.
        self.size = 0  #: Bytes of the arguments.
        self.next_look = 0  #: The size from which it is worth looking whether the arguments are complete.
        self.extra: dict[str, Any] | None = None

    def take_arguments(self, piece: str) -> str:
        """Return what of ``piece``, not empty, belongs to the arguments.

        Some providers send ``{}``, ``null`` or the like before the first fragment, or after the last one, and some
        send the whole arguments again at the end.
        """
        if self.type != "function":
            return piece  # a custom call's input is any text
        if not self.arguments:
            if not self.placeholder and piece.strip() in PLACEHOLDERS:
                self.placeholder = piece
                return ""
            if self.placeholder and piece.strip():
                piece = piece if piece.lstrip().startswith("{") else self.placeholder + piece
                self.placeholder = ""
        elif self._repeats(piece):
            return ""
        return piece

    def _repeats(self, piece: str) -> bool:
        """Return whether ``piece`` repeats complete arguments or, after complete ones, stands for none."""
        text = piece.strip()
        if text in PLACEHOLDERS:
            return self._complete()
        return text[:1] == "{" and text[-1:] == "}" and self._complete() and same_json(self.arguments.value(), text)

    def _complete(self) -> bool:
        """Return whether the arguments are a JSON object that has ended."""
        if self.size < self.next_look or not self.arguments.ends_with("}"):
            return False
        complete = is_json(self.arguments.value())
        if not complete:
            self.next_look = self.size + self.size // 16  # each look reads all of them
        return complete

    @property
    def has_whole_arguments(self) -> bool:
        """Whether the arguments are complete, or something came in place of them."""
        return self._complete() if self.arguments else bool(self.placeholder)

    def is_followed_by(self, part: Fragment, list_number: int) -> bool:
        """Return whether ``part``, which by its index or id seems to continue this call, begins another one.

        Args:
            part: The fragment.
            list_number: Which list of fragments it is from.
        """
        if not part.name:
            return False
        repeated = not self.name or part.name == self.name
        together = self.named_in == list_number
        if self.name and self._is_called_again(part, together=together):
            return True
        if repeated:
            # A repeated name goes on with the call, unless its arguments begin anew after complete ones.
            begins = part.arguments.lstrip().startswith("{") and part.arguments.strip() not in PLACEHOLDERS
            return begins and self._complete() and not self._repeats(part.arguments)
        if self.has_whole_arguments or together:
            return True
        if part.key is None:
            return True
        # Providers that send a name in pieces send an id; those that send no ids send whole names.
        return self.generated_id and not part.name.startswith(self.name)

    def _is_called_again(self, part: Fragment, *, together: bool) -> bool:
        """Return whether ``part`` begins a call for having a name, from a provider that sends no ids.

        If it sends no index either, nothing else begins calls; but a name may be repeated with each piece of one.
        """
        if part.id or not self.generated_id:
            return False
        if part.key is None:
            return together or self.has_whole_arguments
        return together and self.has_whole_arguments

    def value(self) -> ToolCall:
        """Return the tool call so far."""
        arguments = self.arguments.value()
        return ToolCall(
            id=self.id,
            type=self.type,
            name=self.name,
            arguments=arguments,
            arguments_valid=is_json(arguments),
            extra=self.extra,
        )


class ChoiceBuilder:
    """Builds a choice."""

    __slots__ = (
        "calls",
        "calls_by_key",
        "content",
        "ended",
        "extras",
        "finish_reason",
        "has_media",
        "index",
        "last_call",
        "message",
        "reasoning",
        "reasoning_names",
        "refusal",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.content = TextBuilder()
        self.reasoning: TextBuilder | None = None
        self.refusal: TextBuilder | None = None
        self.finish_reason: str | None = None
        self.ended = False
        self.has_media = False  #: Whether images, audio or the like have come, which are kept as extras.
        self.message: tuple[dict[str, Any], bool] | None = None  # held back, with its chunk's leniency
        self.extras: ExtrasBuilder | None = None
        self.reasoning_names: tuple[str, ...] = ()  #: Under which the provider has sent reasoning.
        self.calls: list[ToolCallBuilder] = []
        self.calls_by_key: dict[int | str, ToolCallBuilder] = {}
        self.last_call: ToolCallBuilder | None = None

    @property
    def has_output(self) -> bool:
        """Whether there is anything a reader could use."""
        texts = (self.content, self.reasoning, self.refusal)
        return bool(self.calls) or self.has_media or any(texts)

    def call_for(self, part: Fragment, list_number: int) -> ToolCallBuilder | None:
        """Return the call that a fragment from this list continues, or None if it begins a new one."""
        call = self._seeming_call(part)
        return None if call is None or call.is_followed_by(part, list_number) else call

    def _seeming_call(self, part: Fragment) -> ToolCallBuilder | None:
        """Return the call that a fragment belongs to by its index, else by its id, else by its place in the stream."""
        indexed = self.calls_by_key.get(part.key) if part.key is not None else None
        if indexed is not None:
            if not part.id or indexed.generated_id or part.id == indexed.id:
                return indexed
            # A different id at the same index: some providers give every call the index 0.
            return self._call_with(part.id) or (None if part.name else indexed)
        if part.id:
            call = self._call_with(part.id)
            # The same id at another index: some providers count the fragments, others give every call one id.
            if call is not None and (part.key is None or not call.keyed or not part.name):
                return call
        last = self.last_call
        if last is None or (part.id and not last.generated_id) or (part.key is not None and (last.keyed or part.name)):
            return None
        return last

    def _call_with(self, call_id: str) -> ToolCallBuilder | None:
        return next((call for call in reversed(self.calls) if call.id == call_id), None)

    def value(self) -> Choice:
        """Return the choice so far."""
        return Choice(
            index=self.index,
            content=self.content.value(),
            reasoning=self.reasoning.value() if self.reasoning else "",
            refusal=self.refusal.value() if self.refusal else "",
            finish_reason=self.finish_reason,
            tool_calls=[call.value() for call in self.calls],
            extra=self.extras.value() if self.extras else None,
        )
