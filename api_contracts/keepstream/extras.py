"""The extras of an answer: what it has besides texts and tool calls, added up from pieces.

In: pieces, as ``delta`` events carry them in ``extra``, each under the name that the provider gave it.
Out: the extras so far, to the transcript and to the worker, which stores the same; abridged ones, to events.

The rules for a reader. A text is appended, unless its name is a label's (``LABELS``). Objects are joined field by
field. A list is appended; in lists of blocks (``BLOCK_LISTS``) a piece goes on with the block of its type and index,
or without an index with the last block if that is of its type and not signed yet: ``text``, ``thinking`` and
``summary`` are appended, the other fields set. Everything else replaces what was there. ``audio.data`` is base64.
What is too large for events stands there as ``{"omitted": "image", "bytes": 12000000}``; the row holds the whole.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

#: Names of fields whose text names something: the newest counts.
LABELS: Final = frozenset(
    {"id", "type", "object", "role", "name", "index", "channel", "recipient", "format", "status", "phase", "model"}
)
#: Lists whose entries come in pieces.
BLOCK_LISTS: Final = frozenset({"reasoning_details", "thinking_blocks", "reasoning_parts"})
#: Names under which the provider sent ``reasoning``; it wants it back under the same.
REASONING_FIELDS: Final = "reasoning_fields"
#: What is not stored, by field, in words.
LEFT_OUT: Final = "left_out"
#: Bytes of one extra that events carry, unless the worker has another limit.
LIVE_BYTES: Final = 262_144

_BLOCK_TEXTS: Final = ("text", "thinking", "summary")
_BLOCKS_SEARCHED: Final = 64  #: Newest blocks among which the one with a piece's index is looked for.
_OMITTED: Final = "omitted"
_OMITTED_FIELDS: Final = {_OMITTED, "bytes"}
_MEDIA: Final = ("image", "audio", "video")
_MAX_DEPTH: Final = 32
_SEGMENT: Final = re.compile(r"[^=]+={0,2}")  #: Base64 up to its padding.


class Extras:
    """The extras of one choice while they are built. Not thread-safe.

    Args:
        given: What is known already; it is not changed.
    """

    __slots__ = ("_fields",)

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._fields: dict[str, Any] = {}
        for name, value in (given or {}).items():
            self.add(name, value)

    def add(self, name: str, piece: Any) -> None:
        """Add a piece, a JSON value, to the field ``name``."""
        self._fields[name] = _joined(self._fields.get(name), piece, name, _MAX_DEPTH)

    def has(self, name: str) -> bool:
        """Whether anything of a field has come."""
        return name in self._fields

    def value(self) -> dict[str, Any] | None:
        """Return the extras so far, or None if there are none."""
        if not self._fields:
            return None
        whole = {name: _plain(value, blocks=name in BLOCK_LISTS) for name, value in self._fields.items()}
        audio = whole.get("audio")
        if type(audio) is dict and type(audio.get("data")) is str:
            audio["data"] = joined_base64(audio["data"])
        return whole


class _Text:
    """A text in pieces: joining it with every piece would take quadratic time."""

    __slots__ = ("pieces",)

    def __init__(self, first: str) -> None:
        self.pieces = [first]


def _joined(known: Any, piece: Any, name: str, depth: int) -> Any:
    if piece is None:
        return known
    if is_omitted(piece) or is_omitted(known):
        return _omission(known, piece, name)
    kind = type(piece)
    if kind is str and name not in LABELS:
        if type(known) is not _Text:
            return _Text(piece)
        known.pieces.append(piece)
        return known
    if kind is dict and depth:
        fields = known if type(known) is dict else {}
        for field, value in piece.items():
            fields[field] = _joined(fields.get(field), value, field, depth - 1)
        return fields
    if kind is list:
        entries = known if type(known) is list else []
        if name in BLOCK_LISTS and depth:
            _join_blocks(entries, piece, depth)
        else:
            entries.extend(piece)
        return entries
    return piece


def _join_blocks(blocks: list[Any], pieces: list[Any], depth: int) -> None:
    for piece in pieces:
        if type(piece) is not dict or is_omitted(piece):
            blocks.append(piece)
            continue
        block = _continued(blocks, piece)
        if block is None:
            block = {}
            blocks.append(block)
        for field, value in piece.items():
            known = block.get(field)
            if field in _BLOCK_TEXTS and type(value) is str:
                block[field] = _joined(known, value, field, depth - 1)
            elif field in _BLOCK_TEXTS and type(value) is list and depth:
                block[field] = known if type(known) is list else []
                _join_blocks(block[field], value, depth - 1)
            elif value or field not in block:
                block[field] = value


def _continued(blocks: list[Any], piece: dict[str, Any]) -> dict[str, Any] | None:
    """Return the block that a piece goes on with, or None if it begins one."""
    kind, index = piece.get("type"), piece.get("index")
    recent = blocks[-_BLOCKS_SEARCHED:] if index is not None else blocks[-1:]
    block = next(
        (
            block
            for block in reversed(recent)
            if type(block) is dict and kind in (None, block.get("type")) and index == block.get("index")
        ),
        None,
    )
    if block is None:
        return None
    if piece.get("data"):  # what is encrypted comes whole
        return block if block.get("data") == piece["data"] else None
    if index is None:
        ids = {block.get("id"), piece.get("id")} - {None, ""}
        signature = block.get("signature")
        signed = bool(signature) and signature != piece.get("signature")
        if len(ids) > 1 or (signed and any(piece.get(field) for field in _BLOCK_TEXTS)):
            return None
    return block


def _plain(value: Any, *, blocks: bool = False) -> Any:
    if type(value) is _Text:
        if len(value.pieces) > 1:
            value.pieces = ["".join(value.pieces)]
        return value.pieces[0]
    if type(value) is dict:
        return {name: _plain(part, blocks=blocks or name in BLOCK_LISTS) for name, part in value.items()}
    if type(value) is list:  # entries of other lists are whole
        return [_plain(part, blocks=True) for part in value] if blocks else list(value)
    return value


def joined_pieces(known: Any, piece: Any, name: str) -> Any:
    """Return two pieces of the field ``name``, which come one after the other, as one that adds up to the same."""
    both = _joined(_joined(None, known, name, _MAX_DEPTH), piece, name, _MAX_DEPTH)
    return _plain(both, blocks=name in BLOCK_LISTS)


def merged_extra(known: dict[str, Any] | None, piece: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call's extras with those of another piece: they come whole, so the newest value counts."""
    merged = dict(known or {})
    for name, value in piece.items():
        before = merged.get(name)
        if type(before) is dict and type(value) is dict:
            merged[name] = merged_extra(before, value)
        elif value is not None or name not in merged:
            merged[name] = value
    return merged


def joined_base64(text: str) -> str:
    """Return base64 that was encoded piece by piece as if it had been encoded at once.

    It is decoded only if there is padding within; what is not base64 is returned as it is.
    """
    if "=" not in text.rstrip("="):
        return text
    try:
        whole = b"".join(base64.b64decode(segment, validate=True) for segment in _SEGMENT.findall(text))
    except (binascii.Error, ValueError):
        return text
    return base64.b64encode(whole).decode()


# -- what is too large for events -----------------------------------------------------------------


def is_omitted(value: object) -> bool:
    """Whether a value stands for one that was too large for events."""
    return type(value) is dict and value.keys() == _OMITTED_FIELDS


def abridged(value: Any, limit: int = LIVE_BYTES, name: str = "") -> Any:
    """Return a JSON value with what is larger than ``limit`` bytes replaced by ``{"omitted": kind, "bytes": n}``."""
    size = json_bytes(value)
    if size <= limit:
        return value
    short: Any
    if type(value) is dict and not is_omitted(value):
        short = {field: abridged(part, limit, _kind(field, part, name)) for field, part in value.items()}
    elif type(value) is list:
        short = [
            _as_omitted(_kind(name, entry, name), entry_size) if (entry_size := json_bytes(entry)) > limit else entry
            for entry in value
        ]
    else:
        return _as_omitted(name, size)
    return short if json_bytes(short) <= limit else _as_omitted(name, size)


def abridged_fields(extra: Mapping[str, Any] | None, limit: int = LIVE_BYTES) -> dict[str, Any] | None:
    """Return extras with what is larger than ``limit`` bytes replaced, field by field."""
    return {name: abridged(value, limit, name) for name, value in extra.items()} if extra else None


def omissions(extra: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the fields that are not whole, and how many bytes are missing of each."""
    missing = {}
    for name, value in (extra or {}).items():
        if count := sum(_omitted_bytes(value, _MAX_DEPTH)):
            missing[name] = count
    return missing


def _omitted_bytes(value: Any, depth: int) -> Iterator[int]:
    if is_omitted(value):
        yield value["bytes"] if type(value["bytes"]) is int else 0
    elif type(value) in (dict, list) and depth:
        for part in value.values() if type(value) is dict else value:
            yield from _omitted_bytes(part, depth - 1)


def json_bytes(value: Any) -> int:
    """Return the bytes of a value as JSON; of a text, its own."""
    if type(value) is str:
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if type(value) is int:
        return len(str(value))
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass"))


def _as_omitted(kind: str, size: int) -> dict[str, Any]:
    return {_OMITTED: kind, "bytes": size}


def _omission(known: Any, piece: Any, name: str) -> dict[str, Any]:
    """Return what stands for a value of which a part was omitted: all of it."""
    parts = [_plain(part) for part in (known, piece) if part is not None]
    kind = next(part[_OMITTED] for part in parts if is_omitted(part))
    return _as_omitted(
        kind if isinstance(kind, str) else name,
        sum(part["bytes"] if is_omitted(part) else json_bytes(part) for part in parts),
    )


def _kind(name: str, value: Any, default: str) -> str:
    """Return the word for what is omitted: a medium, else the name of the field."""
    given = value.get("type") if type(value) is dict else None
    for medium in _MEDIA:
        if medium in name or (type(given) is str and medium in given):
            return medium
    return default or name
