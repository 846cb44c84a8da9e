"""Encoding: builds the bytes of a scripted answer in advance, so that sending a delta is a mere write.

In: a request body and its script, from the server.
Out: an ``EncodedStream`` of ready HTTP chunks, or a plain completion, to the server.
"""

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keepstream_worker.dev_stack.scripted_provider.script import DEFAULT_TEXT, Script, ScriptedToolCall

DEFAULT_MODEL: Final = "scripted-1"
MAX_CHOICES: Final = 128
ARGUMENT_PIECE: Final = 8  #: Characters of tool arguments in one delta.
STAMP_LENGTH: Final = 21  #: 20 digits and a space.
_DEFAULT_RATE: Final = 40.0  #: Deltas per second without a script, slow enough to read along.
_MAX_SCHEMA_DEPTH: Final = 8  #: Where recursive schemas are cut off.
_EXAMPLES: Final[dict[str, Any]] = {"string": "Zürich 🌊", "integer": 1, "number": 1.5, "boolean": True, "array": []}

_encode_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_WORD: Final = re.compile(r"\s*\S+|\s+")

#: An HTTP chunk; a time stamp goes between its segments.
Write = tuple[bytes, ...]


def to_json(value: object) -> bytes:
    """Return compact JSON as UTF-8, with escapes if a text contains lone surrogates."""
    try:
        return _encode_json(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def http_chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse_event(value: object) -> bytes:
    """Return ``value`` as one SSE data event."""
    return b"data: %b\n\n" % to_json(value)


def error_body(message: str, type_: str, code: str | None = None) -> dict[str, Any]:
    """Return an error object in OpenAI's format."""
    return {"error": {"message": message, "type": type_, "code": code}}


@dataclass(frozen=True, slots=True)
class EncodedStream:
    """A streamed answer, encoded. All parts but ``deltas`` are ready to send; they may be empty."""

    opening: bytes  #: The role of each choice, sent with the first delta.
    deltas: Sequence[Write]  #: One SSE event each, without HTTP framing.
    finish: bytes
    usage: bytes
    done: bytes

    def writes(self, start: int, stop: int, chunk_size: int) -> list[Write]:
        """Return the deltas from ``start`` to ``stop`` as HTTP chunks of ``chunk_size`` deltas each."""
        deltas = self.deltas[start:stop]
        if chunk_size > 1:
            deltas = [_joined(deltas[i : i + chunk_size]) for i in range(0, len(deltas), chunk_size)]
        framed: dict[Write, Write] = {}  # equal deltas, and there may be thousands, are framed once
        writes = [framed.get(delta) or framed.setdefault(delta, _framed(delta)) for delta in deltas]
        if start == 0 and writes:
            writes[0] = _joined([(self.opening,), writes[0]])
        return writes


def _joined(deltas: Sequence[Write]) -> Write:
    segments = [b""]
    for first, *rest in deltas:
        segments[-1] += first
        segments += rest
    return tuple(segments)


def _framed(write: Write) -> Write:
    length = sum(map(len, write)) + STAMP_LENGTH * (len(write) - 1)
    return _joined([(b"%x\r\n" % length,), write, (b"\r\n",)])


def default_script(body: dict[str, Any]) -> Script:
    """Return the script for a request that brings none: a text, and a tool call if tools are offered."""
    turns = body.get("messages") or body.get("input")
    last = turns[-1] if isinstance(turns, list) and turns else None
    # Another call could go on for ever.
    answered = isinstance(last, dict) and (last.get("role") == "tool" or last.get("type") == "function_call_output")
    calls = []
    if body.get("tools") and body.get("tool_choice") != "none" and not answered:
        tool = body["tools"][0]
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        calls = [ScriptedToolCall(name=function["name"], arguments=_example(schema, schema) or {})]
    return Script(text=DEFAULT_TEXT, rate=_DEFAULT_RATE, tool_calls=calls)


def _example(schema: object, root: dict[str, Any], depth: int = _MAX_SCHEMA_DEPTH) -> Any:
    """Return a plausible value for a JSON schema."""
    match schema:
        case _ if depth == 0:
            return None
        case {"$ref": str(reference)}:
            return _example(_resolve(reference, root), root, depth - 1)
        case {"const": value} | {"default": value} | {"enum": [value, *_]} | {"examples": [value, *_]}:
            return value
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]} | {"allOf": [first, *_]}:
            return _example(first, root, depth - 1)
        case {"properties": dict(properties)}:
            return {name: _example(value, root, depth - 1) for name, value in properties.items()}
        case {"type": "array", "items": items}:
            return [_example(items, root, depth - 1)]
        case {"type": str(kind) | [str(kind), *_]}:
            return _EXAMPLES.get(kind)
    return None


def _resolve(reference: str, root: object) -> object:
    for part in reference.removeprefix("#").strip("/").split("/"):
        root = root.get(part) if isinstance(root, dict) else None
    return root


def choice_count(body: dict[str, Any]) -> int:
    """Return how many choices a request asks for; raise ``ValueError`` if the number is invalid."""
    n = body.get("n") or 1
    if not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise ValueError(f"n must be a number from 1 to {MAX_CHOICES}")
    return n


def pieces(script: Script) -> list[str]:
    """Return the content of one choice, one text per delta; joined, they equal the whole text."""
    if script.deltas is not None:
        return [script.delta_text] * script.deltas
    text = script.text
    if text is None:
        text = "" if script.tool_calls or script.reasoning else DEFAULT_TEXT
    if script.delta_chars is not None:
        return [text[i : i + script.delta_chars] for i in range(0, len(text), script.delta_chars)]
    return words(text, script.words)


def words(text: str, count: int) -> list[str]:
    """Cut a text into pieces of so many words, which joined are the text."""
    found: list[str] = _WORD.findall(text)
    return found if count == 1 else ["".join(found[i : i + count]) for i in range(0, len(found), count)]


def encode_stream(body: dict[str, Any], script: Script, prompt_tokens: int) -> EncodedStream:
    """Encode the answer to a streaming request.

    ``prompt_tokens`` is used for the usage report if the script does not give one.
    """
    choices = range(choice_count(body))
    include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    head = to_json({**_head(body), "object": "chat.completion.chunk"})[:-1]
    tail = b',"usage":null' if include_usage else b""  # as OpenAI does with every chunk but the last
    padding = tail + (b',"obfuscation":"%b"' % (b"x" * script.pad) if script.pad else b"")

    def event(choice: int, delta: bytes, finish_reason: bytes = b"null", ending: bytes = padding) -> bytes:
        choices = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b}' % (choice, delta, finish_reason)
        return b'data: %b,"choices":[%b]%b}\n\n' % (head, choices, ending)

    deltas: list[Write] = []
    for text in words(script.reasoning, 1):
        deltas += [(event(choice, to_json({"reasoning_content": text})),) for choice in choices]
    if script.stamp:
        cut = [event(choice, b'{"content":"\0"}').split(b"\0") for choice in choices]
        deltas += [tuple(segments) for segments in cut] * len(pieces(script))
    elif script.deltas is not None:
        deltas += [(event(choice, to_json({"content": script.delta_text})),) for choice in choices] * script.deltas
    else:
        for text in pieces(script):
            deltas += [(event(choice, to_json({"content": text})),) for choice in choices]
    for tool_delta in _tool_deltas(script.tool_calls):
        deltas += [(event(choice, to_json({"tool_calls": [tool_delta]})),) for choice in choices]

    finish_reason = _finish_reason(script)
    finish = b""
    if finish_reason:
        finish = b"".join([event(choice, b"{}", to_json(finish_reason), tail) for choice in choices])
    usage = usage_of(script, prompt_tokens, len(deltas)) if include_usage else None
    opening = b"".join([event(choice, b'{"role":"assistant","content":""}', ending=tail) for choice in choices])
    if not deltas:
        finish = opening + finish
    return EncodedStream(
        opening=http_chunk(opening),
        deltas=deltas,
        finish=http_chunk(finish) if finish else b"",
        usage=http_chunk(b'data: %b,"choices":[],"usage":%b}\n\n' % (head, to_json(usage))) if usage else b"",
        done=http_chunk(b"data: [DONE]\n\n") if script.done else b"",
    )


def plain_completion(body: dict[str, Any], script: Script, prompt_tokens: int) -> dict[str, Any]:
    """Return the answer to a request without ``stream``."""
    texts = pieces(script)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None, "refusal": None}
    if script.reasoning:
        message["reasoning_content"] = script.reasoning
    if script.tool_calls:
        message["tool_calls"] = [
            {
                "id": call_id_of(call, i),
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_of(call)},
            }
            for i, call in enumerate(script.tool_calls)
        ]
    choices = [
        {"index": i, "message": message, "logprobs": None, "finish_reason": _finish_reason(script)}
        for i in range(choice_count(body))
    ]
    usage = usage_of(script, prompt_tokens, len(texts) * len(choices))
    return {**_head(body), "object": "chat.completion", "choices": choices} | ({"usage": usage} if usage else {})


def _head(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "",
        "created": int(time.time()),
        "model": body.get("model") or DEFAULT_MODEL,
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }


def _finish_reason(script: Script) -> str | None:
    if script.finish_reason == "auto":
        return "tool_calls" if script.tool_calls else "stop"
    return script.finish_reason


def usage_of(script: Script, prompt_tokens: int, completion_tokens: int) -> dict[str, Any] | None:
    """Return the usage that the script reports, with the names of chat completions, or None."""
    if script.usage == "auto":
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return script.usage


def call_id_of(call: ScriptedToolCall, index: int) -> str:
    """Return the id of a call."""
    return call.id if call.id is not None else f"call_scripted_{index}"


def arguments_of(call: ScriptedToolCall) -> str:
    """Return the arguments of a call as a text."""
    return call.arguments if isinstance(call.arguments, str) else to_json(call.arguments).decode()


def _tool_deltas(calls: Sequence[ScriptedToolCall]) -> Iterator[dict[str, Any]]:
    for index, call in enumerate(calls):
        function = {"name": call.name, "arguments": ""}
        yield {"index": index, "id": call_id_of(call, index), "type": "function", "function": function}
        arguments = arguments_of(call)
        for i in range(0, len(arguments), ARGUMENT_PIECE):
            yield {"index": index, "function": {"arguments": arguments[i : i + ARGUMENT_PIECE]}}
