"""What a choice has besides its texts and calls: images, audio, logprobs, annotations, signatures and the like.

In: fields as the provider sent them, from the accumulators.
Out: pieces for followers, and what they add up to by the rules of ``keepstream.extras``, for the row: the same.

A field of a delta adds to the one before, also where we do not know it, so unknown texts are joined; but some providers
repeat a label, an image or a verdict with every chunk, and these count once.
"""

from hashlib import blake2b
from typing import Any, Final

import orjson

from keepstream.extras import BLOCK_LISTS, LABELS, LEFT_OUT, Extras, joined_pieces
from keepstream_worker.providers.accumulator.json_values import MAX_DEPTH, json_size, safe, storable

#: Lists in which the same entry twice is a repetition.
_DISTINCT: Final = frozenset(
    {"images", "image", "videos", "video", "annotations", "citations", "sources", "search_results"}
)
_NEVER_LABELS: Final = frozenset({"audio", *BLOCK_LISTS})  #: Fields of which two equal pieces are two pieces.
_BLOCK_TEXTS: Final = ("text", "thinking", "summary")
_ABSENT: Final = object()

_Path = tuple[str, ...]


class _Pieces:
    """What was told of one text, and what is held back of it."""

    __slots__ = ("_first", "_repeats", "_surrogate", "_varies")

    def __init__(self, *, varies: bool) -> None:
        self._first: str | None = None
        self._repeats = 0
        self._surrogate = ""  # the first half of a pair whose second half has not come
        self._varies = varies  # whether it is known to be a text, and not a label that comes with every chunk

    def take(self, piece: str) -> str:
        """Return what is to be told now that ``piece`` has come."""
        piece = self._surrogate + piece
        self._surrogate = ""
        if piece and "\ud800" <= piece[-1] <= "\udbff":
            self._surrogate, piece = piece[-1], piece[:-1]
        piece = safe(piece)
        if not piece:
            return ""
        if self._first is None:
            self._first = piece
            return piece
        if not self._varies:
            if piece == self._first:
                self._repeats += 1
                return ""
            self._varies = True
            return self._first * self._repeats + piece
        return piece

    def end(self) -> str:
        """Return what replaces the half of a pair that is still held back."""
        surrogate, self._surrogate = self._surrogate, ""
        return self.take("\N{REPLACEMENT CHARACTER}") if surrogate else ""


class ExtrasBuilder:
    """Builds the extras of one choice."""

    __slots__ = ("_extras", "_last", "_seen", "_state", "_texts", "left_out")

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}  #: Fields that are not whole, with the reason.
        self._extras = Extras()
        self._texts: dict[_Path, _Pieces] = {}
        self._seen: dict[str, set[bytes]] = {}  # hashes of entries that count once
        self._last: dict[_Path, Any] = {}  # the newest label, number or the like
        self._state: dict[str, Any] = {}  # what replaces what came before; it is told at the end

    def has(self, name: str) -> bool:
        """Whether anything of a field has come."""
        return self._extras.has(name) or name in self._state

    def new_in(self, name: str, value: Any) -> Any:
        """Return what is new in a field of a delta, storable, or None if nothing is."""
        if type(value) is list:
            if name in BLOCK_LISTS:
                return [self._block(name, part) for part in value] or None
            parts = storable(value)
            if name in _DISTINCT:
                parts = self._not_seen(name, parts)
            return parts or None
        return self._new_part((name,), name, value, MAX_DEPTH)

    def _new_part(self, path: _Path, name: str, value: Any, depth: int) -> Any:
        if type(value) is str and name not in LABELS:
            pieces = self._texts.get(path)
            if pieces is None:
                pieces = self._texts[path] = _Pieces(varies=path[0] in _NEVER_LABELS)
            return pieces.take(value) or None
        if type(value) is dict and depth:
            parts: dict[str, Any] = {}
            for given, part in value.items():
                field = safe(given)
                inner = (*path, field)
                new = self._new_part(inner, field, part, depth - 1)
                if new is not None or (inner not in self._last and type(part) not in (str, dict, list)):
                    parts[field] = joined_pieces(parts.get(field), new, field)
                    self._last.setdefault(inner, None)
            return parts or None
        if type(value) is list:
            return storable(value) or None
        value = storable(value, depth)
        if value is None or self._last.get(path, _ABSENT) == value:
            return None
        self._last[path] = value
        return value

    def _block(self, name: str, value: Any) -> Any:
        """Return a piece of a block; the texts in it are put right across pieces."""
        if type(value) is not dict:
            return storable(value)
        block = storable(value)
        for field in _BLOCK_TEXTS:
            text = value.get(field)
            path = (name, field)
            if type(text) is str and text and (path in self._texts or not text.isascii()):
                pieces = self._texts.setdefault(path, _Pieces(varies=True))
                block[field] = pieces.take(text)
        return block

    def _not_seen(self, name: str, parts: list[Any]) -> list[Any]:
        """Return the entries that have not come before. Only their hashes are kept: an image has megabytes."""
        seen = self._seen.setdefault(name, set())
        new = []
        for part in parts:
            digest = blake2b(orjson.dumps(part, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(part)
        return new

    def add(self, name: str, new: Any) -> None:
        """Add what ``new_in`` returned."""
        self._extras.add(name, new)

    def changes(self, name: str, value: Any) -> bool:
        """Whether ``value`` differs from what is known of a field that is replaced as a whole."""
        return bool(self._state.get(name, _ABSENT) != value)

    def replace(self, name: str, value: Any) -> None:
        """Set a field that is replaced as a whole; in an object, each of its fields."""
        known = self._state.get(name)
        new = storable(value)
        self._state[name] = {**known, **new} if type(known) is dict and type(new) is dict else new

    def state_size(self, name: str) -> int:
        """Return the bytes of what ``replace`` has set."""
        return json_size(self._state[name]) if name in self._state else 0

    def leave_out(self, name: str, size: int, limit: int) -> None:
        """Note that a piece of a field is not kept."""
        self.left_out.setdefault(
            name, f"not whole: {size} bytes more would pass KEEPSTREAM_MAX_EXTRA_BYTES, the limit of {limit} bytes"
        )

    def end(self) -> dict[str, Any]:
        """Return what is still to be told, now that nothing more comes."""
        rest: dict[str, Any] = self._state
        self._state = {}
        for path, pieces in self._texts.items():
            if path[0] not in BLOCK_LISTS and path[0] not in self.left_out and (text := pieces.end()):
                rest[path[0]] = joined_pieces(rest.get(path[0]), _nested(path[1:], text), path[0])
        if self.left_out:
            rest = {**rest, LEFT_OUT: dict(self.left_out)}
        for name, value in rest.items():
            self._extras.add(name, value)
        return rest

    def value(self) -> dict[str, Any] | None:
        """Return the extras so far, as followers know them."""
        return self._extras.value()


def _nested(path: _Path, value: Any) -> Any:
    for field in reversed(path):
        value = {field: value}
    return value
