"""Sanitises and merges JSON values, so that any database accepts them.

In: decoded JSON, from the accumulator.
Out: the same values, bounded, without NUL, lone surrogates, NaN or oversized integers.
"""

import json
import math
from typing import Any, Final

import orjson

MAX_DEPTH: Final = 32  #: Levels of nesting that are kept.
MAX_FIELDS: Final = 64  #: Unknown fields of a stream, and fields of one level of usage.
_MAX_COUNT: Final = 2**63 - 1


def byte_length(text: str) -> int:
    """Return the length of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def json_size(value: object) -> int:
    """Return the bytes of a decoded value as JSON; more than any limit if it is nested too deeply to be written."""
    try:
        return len(orjson.dumps(value))
    except TypeError:  # lone surrogates, integers beyond 64 bits or deep nesting
        try:
            return len(json.dumps(value, separators=(",", ":")))
        except RecursionError:
            return _MAX_COUNT


def merged_usage(known: dict[str, Any] | None, new: object, depth: int = 2) -> dict[str, Any] | None:
    """Merge usage field by field: the newest value counts, but null and 0 never replace a number."""
    if type(new) is not dict:
        return known
    merged = {} if known is None else known
    for given_name, value in new.items():
        name = safe(given_name)
        before = merged.get(name)
        if value is None or (before is None and len(merged) >= MAX_FIELDS):
            continue
        if type(value) is dict and depth:
            merged[name] = merged_usage(before if type(before) is dict else None, value, depth - 1)
        elif number(value) != 0 or not number(before):
            merged[name] = storable(value)
    return merged


def tells(usage: object) -> bool:
    """Return whether ``usage`` reports anything: some providers fill it with null or 0, and report elsewhere."""
    return type(usage) is dict and any(
        tells(value) if type(value) is dict else number(value) for value in usage.values()
    )


def number(value: object) -> float | None:
    """Return ``value``, a number or its text, as a float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def whole_number(value: object) -> int | None:
    """Return ``value`` as a count, or None; some providers send counts as texts or fractions."""
    count = number(value)
    return int(count) if count is not None and 0 <= count < _MAX_COUNT else None


def safe(text: str) -> str:
    """Return ``text`` with surrogate pairs joined, lone surrogates replaced and NUL removed."""
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\x00", "")


def storable(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a JSON value in a form that every database accepts: safe texts, no NaN, bounded nesting."""
    if isinstance(value, str):
        return safe(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= _MAX_COUNT else None
    if not depth:
        return None
    if isinstance(value, list):
        return [storable(item, depth - 1) for item in value]
    return {safe(name): storable(item, depth - 1) for name, item in value.items()}


def is_json(text: str) -> bool:
    """Return whether ``text`` is valid JSON."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
    return True


def same_json(text: str, other: str) -> bool:
    """Return whether two texts are valid JSON and mean the same."""
    try:
        return bool(orjson.loads(text) == orjson.loads(other))
    except (orjson.JSONDecodeError, RecursionError):
        return text == other
