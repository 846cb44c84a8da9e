"""Shapes: the forms in which providers write errors, texts, reasoning and tool calls.

In: decoded JSON, of any type.  Out: one form for each.  Exists so that a provider's peculiarity is one
line here and nothing anywhere else.
"""

import json
from typing import Any, Final, NamedTuple

import orjson

from keepstream_worker.providers.accumulator.values import DEEPEST, number, safe

REASONING_FIELDS: Final = frozenset({"reasoning_content", "reasoning", "reasoning_details"})
REASONING_PARTS: Final = ("thinking", "reasoning", "reasoning_text", "summary_text")  #: Types of parts of content.
FUNCTION_CALL: Final = "function_call"  #: The key of the one call that the legacy field makes.
_BARE_CALL: Final = frozenset({"index", "id", "type", "function", "custom"})
_LONGEST_TYPE: Final = 32  #: Characters of a call's type.


class Fragment(NamedTuple):
    """A piece of a tool call, in one shape for all the shapes there are."""

    key: int | str | None  #: What the provider tells calls apart by, if it does.
    id: str
    type: str
    name: str
    arguments: str
    extra: dict[str, Any]


def read_fragment(value: dict[str, Any], key: str | None = None) -> Fragment:
    """Return a fragment of a function call or a custom call; ``key`` stands for an index that it has not."""
    body = value.get("function")
    kind = value.get("type")
    arguments = "arguments"
    if type(value.get("custom")) is dict:
        body, kind, arguments = value["custom"], kind or "custom", "input"
    if type(body) is not dict:
        body = {}
    name = body.get("name")
    return Fragment(
        key=read_index(value.get("index")) if key is None else key,
        id=_given_id(value.get("id")),
        type=safe(kind)[:_LONGEST_TYPE] if type(kind) is str else "",
        name=name if type(name) is str else "",
        arguments=_arguments_text(body.get(arguments)),
        extra={name: part for name, part in value.items() if part and name not in _BARE_CALL},
    )


def _given_id(value: object) -> str:
    """Return a call's id, empty if it has none; some providers write the word null."""
    if type(value) is int:
        return str(value)
    return safe(value) if type(value) is str and value != "null" else ""


def _arguments_text(value: object) -> str:
    if type(value) is str:
        return value
    if not value:
        return ""  # no arguments, or an empty object, which the end of the stream fills in
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # halves of surrogate pairs, or numbers beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def joined_name(known: str, piece: str) -> str:
    """Return a call's name after another piece: providers repeat it, extend it, or send it in parts."""
    if not piece or piece == known:
        return known
    return piece if piece.startswith(known) else known + piece


def error_in(chunk: dict[str, Any]) -> object:
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


def reasoning_in(delta: dict[str, Any]) -> str:
    """Return a delta's reasoning. It may be there twice, and the details are its text only if nothing else is."""
    value = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("reasoning_details")
    return plain_text(value) if value else ""


def plain_text(value: object, depth: int = DEEPEST) -> str:
    """Return the text in a value that may be a text, a part that has one, or a list of such parts."""
    if type(value) is str:
        return value
    if not depth:
        return ""
    if type(value) is list:
        return "".join(plain_text(part, depth - 1) for part in value)
    if type(value) is dict:
        for name in ("text", "thinking", "summary", "reasoning", "refusal", "content"):
            if value.get(name):
                return plain_text(value[name], depth - 1)
    return ""


def read_index(value: object) -> int | None:
    """Return the index that ``value`` spells, or None."""
    if type(value) is int:
        return value
    index = number(value)
    return int(index) if index is not None and index.is_integer() else None
