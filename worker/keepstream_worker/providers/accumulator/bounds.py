"""The bounds of one stream, and what they leave to it.

In: sizes of pieces, from the accumulator of either dialect.
Out: whether a piece still fits.

Output that does not fit ends the attempt, since a text with a gap is worthless. Extras that do not fit are left out,
and the choice says so: what was asked for is still there.
"""

from dataclasses import dataclass
from typing import Any

from keepstream.extras import LIVE_BYTES, abridged, joined_pieces
from keepstream_worker.providers.accumulator.builders import ChoiceBuilder, TextBuilder
from keepstream_worker.providers.accumulator.extras import ExtrasBuilder
from keepstream_worker.providers.accumulator.json_values import byte_length, json_size, safe


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one stream: far above what models produce, far below what harms a worker."""

    max_event_bytes: int = 64 * 1024 * 1024  #: One event, or an entire answer that is not streamed.
    max_output_bytes: int = 16 * 1024 * 1024  #: All texts, call ids, names and arguments of all choices.
    max_argument_bytes: int = 4 * 1024 * 1024  #: One tool call's arguments.
    max_extra_bytes: int = 64 * 1024 * 1024  #: Images, audio, logprobs and whatever else is kept beside the output.
    live_extra_bytes: int = LIVE_BYTES  #: One of those that goes into an event; a larger one is only in the row.
    max_choices: int = 128
    max_tool_calls: int = 256  #: Across all choices.


class Bounded:
    """What the accumulators of all dialects share: how much may still come."""

    __slots__ = ("_bytes_left", "_extra_bytes_left", "_lenient", "_limits", "too_large")

    def __init__(self, limits: Limits) -> None:
        self.too_large = False  #: Whether the answer exceeded a limit before it was complete.
        self._limits = limits
        self._bytes_left = limits.max_output_bytes  # negative once the limit was exceeded
        self._extra_bytes_left = limits.max_extra_bytes
        self._lenient = False  # whether the current chunk was parsed leniently and may hold lone surrogates

    @property
    def succeeded(self) -> bool:
        """Whether the answer is complete: what comes too much after it spoils nothing."""
        raise NotImplementedError

    def _append(self, text: TextBuilder, piece: str) -> str:
        """Append ``piece``, sanitised, if the limit allows; return what was appended."""
        if self._lenient or text.pending_surrogate:
            piece = text.rejoin(piece)
        elif "\x00" in piece:
            piece = piece.replace("\x00", "")
        size = len(piece) if piece.isascii() else len(piece.encode())  # byte_length, inlined
        if not piece:
            return ""
        if size > self._bytes_left:  # _reserve, inlined
            self._mark_too_large()
            return ""
        self._bytes_left -= size
        text.append(piece)
        return piece

    def _reserve(self, size: int) -> bool:
        """Count ``size`` bytes against the output limit; return whether they fit."""
        if size > self._bytes_left:
            self._mark_too_large()
            return False
        self._bytes_left -= size
        return True

    def _mark_too_large(self) -> None:
        """Refuse all further output, so that no text has a gap."""
        self._bytes_left = -1
        self.too_large = self.too_large or not self.succeeded

    def _reserve_extra(self, extras: ExtrasBuilder, name: str, value: Any) -> int | None:
        """Count a field's own bytes against what is kept beside the output; return them, or None if they are too many.

        Of a field that has lost a piece no more is kept, so that what is kept of it has no gap.
        """
        size = byte_length(value) if type(value) is str else json_size(value)
        if size > self._extra_bytes_left or name in extras.left_out:
            extras.leave_out(name, size, self._limits.max_extra_bytes)
            return None
        self._extra_bytes_left -= size
        return size

    def _keep(self, choice: ChoiceBuilder, name: str, value: Any, fields: dict[str, Any]) -> None:
        """Keep a field that is not output with its choice, if the limit allows, and tell followers of it."""
        name = safe(name)
        extras = choice.extras = choice.extras or ExtrasBuilder()
        new = extras.new_in(name, value)
        if new is None:
            return
        size = self._reserve_extra(extras, name, new)
        if size is None:
            return
        extras.add(name, new)
        told = fields.setdefault("extra", {})
        new = new if size <= self._limits.live_extra_bytes else self._abridged(new, name)
        told[name] = joined_pieces(told[name], new, name) if name in told else new

    def _abridged(self, value: Any, name: str) -> Any:
        return abridged(value, self._limits.live_extra_bytes, name)
