"""Normalises the various forms in which providers write errors, texts, reasoning and tool calls.

In: decoded JSON of any type, from the accumulator.
Out: one form for each.
"""

import json
from typing import Any, Final, NamedTuple

import orjson

from keepstream_worker.providers.accumulator.json_values import MAX_DEPTH, number, safe

#: Where providers put reasoning; if it is present twice, the first counts.
REASONING_NAMES: Final = (
    "reasoning_content",
    "reasoning",
    "reasoning_text",
    "thinking",
    "thinking_content",
    "thought",
    "thoughts",
    "reasoning_details",
)
REASONING_FIELDS: Final = frozenset(REASONING_NAMES)
REASONING_PARTS: Final = ("thinking", "reasoning", "reasoning_text", "summary_text")  #: Types of content parts.
FUNCTION_CALL: Final = "function_call"  #: The key of the single call in the legacy field.
#: What some providers send as a call's arguments before the first fragment, or if there are none.
PLACEHOLDERS: Final = frozenset({"{}", '""', "null", "None"})
_USUAL_CALL_FIELDS: Final = frozenset({"index", "id", "type", "function", "custom"})
_MAX_TYPE: Final = 32  #: Characters of a call's type.


class Fragment(NamedTuple):
    """A piece of a tool call, in normalised form."""

    key: int | str | None  #: What distinguishes the calls of a choice, if the provider sends it.
    id: str
    type: str
    name: str
    arguments: str
    extra: dict[str, Any]


def read_fragment(value: dict[str, Any], key: str | None = None) -> Fragment:
    """Normalise a fragment of a function call or custom call; ``key`` replaces a missing index."""
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
        type=safe(kind)[:_MAX_TYPE] if type(kind) is str else "",
        name=name if type(name) is str else "",
        arguments=arguments_text(body.get(arguments)),
        extra={name: part for name, part in value.items() if part and name not in _USUAL_CALL_FIELDS},
    )


def _given_id(value: object) -> str:
    """Return a call's id, or an empty text; some providers send the word null."""
    if type(value) is int:
        return str(value)
    return safe(value) if type(value) is str and value != "null" else ""


def arguments_text(value: object) -> str:
    """Return a call's arguments as a text; some providers send them decoded."""
    if type(value) is str:
        return value
    if not value:
        return "{}" if type(value) is dict else ""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # lone surrogates, or integers beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def joined_name(known: str, piece: str) -> str:
    """Return a call's name after another piece of it: providers repeat it, extend it or send it in parts."""
    if not piece or piece == known:
        return known
    return piece if piece.startswith(known) else known + piece


def error_in(chunk: dict[str, Any]) -> object:
    """Return the error that a chunk is or contains, in any of the forms providers use, or None."""
    if is_error(chunk.get("error")):
        return chunk
    base_resp = chunk.get("base_resp")
    if type(base_resp) is dict and base_resp.get("status_code") and not _is_success(base_resp["status_code"]):
        return chunk
    for name, value in chunk.items():
        if name.startswith("x_") and type(value) is dict and is_error(value.get("error")):  # Groq: x_groq
            return {"error": value["error"]}
    choices = chunk.get("choices")
    if type(choices) is list and choices:
        return None
    if chunk.get("object") == "error" or chunk.get("type") == "error":
        return chunk
    if chunk.get("errors") or chunk.get("success") is False:
        return chunk
    if _is_success(chunk.get("code")):
        return None
    told, coded = bool(chunk.get("message") or chunk.get("detail")), bool(chunk.get("code"))
    # An empty list of choices may come with other news, a filter's verdict for instance.
    return chunk if (told and coded if type(choices) is list else told or coded) else None


def is_error(value: object) -> bool:
    """Return whether the value of an ``error`` field reports one; some providers send it empty beside normal output."""
    if type(value) is dict:
        message = value.get("message")
        fine = type(message) is str and message.lower() in {"success", "ok"} and _is_success(value.get("code"))
        return not fine and any(value.values())
    return bool(value) and value not in ("null", "none", "None")


def _is_success(code: object) -> bool:
    return type(code) in (int, str) and code in (0, "0", 200, "200")


def reasoning_in(delta: dict[str, Any]) -> str:
    """Return a delta's reasoning. It may be present twice; the details are used only if there is nothing else."""
    value = next((value for name in REASONING_NAMES if (value := delta.get(name))), None)
    return plain_text(value) if value else ""


def plain_text(value: object, depth: int = MAX_DEPTH) -> str:
    """Return the text of a value that is a text, a part with a text, or a list of such parts."""
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
    """Return ``value`` as an index, or None."""
    if type(value) is int:
        return value
    index = number(value)
    return int(index) if index is not None and index.is_integer() else None
