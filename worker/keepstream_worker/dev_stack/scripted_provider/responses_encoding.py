"""Encoding for the Responses API: the same scripted answers, as the events and objects of that API.

In: a request body and its script, from the server.
Out: an ``EncodedStream`` of ready HTTP chunks, or a plain response, to the server.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any, Final

from keepstream_worker.dev_stack.scripted_provider.encoding import (
    ARGUMENT_PIECE,
    DEFAULT_MODEL,
    EncodedStream,
    Write,
    arguments_of,
    call_id_of,
    http_chunk,
    pieces,
    to_json,
    usage_of,
    words,
)
from keepstream_worker.dev_stack.scripted_provider.script import Script

#: Finish reasons of chat completions that are no plain completion here.
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}


def encode_response_stream(body: dict[str, Any], script: Script, prompt_tokens: int) -> EncodedStream:
    """Encode the answer to a streaming request.

    ``prompt_tokens`` is used for the usage report if the script does not give one.
    """
    head = _head(body)
    number = 0

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        value = {"type": kind, "sequence_number": number, **fields}
        number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), to_json(value))

    opening = b"".join(
        event(kind, response=head | {"status": "in_progress", "output": [], "usage": None})
        for kind in ("response.created", "response.in_progress")
    )
    deltas: list[Write] = []
    before = b""  # what opens or closes items goes out with the delta after it
    items = list(_items(script))
    for position, item in enumerate(items):
        place = {"item_id": item["id"], "output_index": position}
        before += event("response.output_item.added", output_index=position, item=_opened(item))
        if part := _part(item, ""):
            before += event(f"response.{part.pop('kind')}.added", **place, **part)
        for kind, text in _deltas(item, script):
            fields: dict[str, Any] = place | {"delta": text}
            if item["type"] == "message":
                fields |= {"content_index": 0, "logprobs": []}
                if script.pad:
                    fields["obfuscation"] = "x" * script.pad
            elif item["type"] == "reasoning":
                fields["summary_index"] = 0
            if script.stamp and item["type"] == "message":
                first, second = event(kind, **fields | {"delta": "\0"}).split(to_json("\0")[1:-1])
                deltas.append((before + first, second))
            else:
                deltas.append((before + event(kind, **fields),))
            before = b""
        for kind, ended in _ends(item):
            before += event(kind, **place, **ended)
        before += event("response.output_item.done", output_index=position, item=item)
    if script.finish_reason is not None:
        whole = _ended(head, script, items, usage_of(script, prompt_tokens, len(deltas)))
        before += event(f"response.{whole['status']}", response=whole)
    if not deltas:
        before = opening + before
    return EncodedStream(
        opening=http_chunk(opening),
        deltas=deltas,
        finish=http_chunk(before) if before else b"",
        usage=b"",  # it stands in the last event
        done=b"",  # this API knows no [DONE]
    )


def plain_response(body: dict[str, Any], script: Script, prompt_tokens: int) -> dict[str, Any]:
    """Return the answer to a request without ``stream``."""
    return _ended(_head(body), script, list(_items(script)), usage_of(script, prompt_tokens, len(pieces(script))))


def _head(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.get("model") or DEFAULT_MODEL,
        "service_tier": "default",
        "store": bool(body.get("store", True)),
        "error": None,
        "incomplete_details": None,
    }


def _ended(head: dict[str, Any], script: Script, items: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
    reason = _INCOMPLETE.get(script.finish_reason or "")
    return head | {
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "output": items,
        "usage": None if usage is None else _usage(usage),
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
    return {names.get(name, name): value for name, value in usage.items()}


def _items(script: Script) -> Iterator[dict[str, Any]]:
    """Return the items of the whole answer: reasoning, a message, calls."""
    if script.reasoning:
        yield {
            "type": "reasoning",
            "id": f"rs_{uuid.uuid4().hex}",
            "summary": [{"type": "summary_text", "text": script.reasoning}],
            "encrypted_content": f"scripted-{uuid.uuid4().hex}",
        }
    if text := "".join(pieces(script)):
        yield {
            "type": "message",
            "id": f"msg_{uuid.uuid4().hex}",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
        }
    for position, call in enumerate(script.tool_calls):
        yield {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "status": "completed",
            "call_id": call_id_of(call, position),
            "name": call.name,
            "arguments": arguments_of(call),
        }


def _opened(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it is at its beginning."""
    emptied: dict[str, dict[str, Any]] = {
        "reasoning": {"summary": [], "encrypted_content": None},
        "message": {"content": [], "status": "in_progress"},
        "function_call": {"arguments": "", "status": "in_progress"},
    }
    return item | emptied[item["type"]]


def _part(item: dict[str, Any], text: str) -> dict[str, Any]:
    """Return what the events that begin and end the only part of an item say; nothing if it has no parts."""
    match item["type"]:
        case "message":
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            return {"kind": "content_part", "content_index": 0, "part": part}
        case "reasoning":
            part = {"type": "summary_text", "text": text}
            return {"kind": "reasoning_summary_part", "summary_index": 0, "part": part}
    return {}


def _ends(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the events between the last delta of an item and its end, each with its type."""
    match item["type"]:
        case "message":
            text = item["content"][0]["text"]
            yield "response.output_text.done", {"content_index": 0, "text": text, "logprobs": []}
        case "reasoning":
            text = item["summary"][0]["text"]
            yield "response.reasoning_summary_text.done", {"summary_index": 0, "text": text}
        case _:
            yield "response.function_call_arguments.done", {"arguments": item["arguments"], "name": item["name"]}
            return
    part = _part(item, text)
    yield f"response.{part.pop('kind')}.done", part


def _deltas(item: dict[str, Any], script: Script) -> Iterator[tuple[str, str]]:
    """Return the deltas of an item, each with its type."""
    match item["type"]:
        case "reasoning":
            for text in words(script.reasoning, 1):
                yield "response.reasoning_summary_text.delta", text
        case "message":
            for text in pieces(script):
                yield "response.output_text.delta", text
        case _:
            arguments = item["arguments"]
            for start in range(0, len(arguments), ARGUMENT_PIECE):
                yield "response.function_call_arguments.delta", arguments[start : start + ARGUMENT_PIECE]
