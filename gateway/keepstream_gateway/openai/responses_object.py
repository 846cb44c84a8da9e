"""Writes a job as a response object of OpenAI's Responses API.

In: a stored job, or what is known of one that runs.
Out: JSON-ready objects: the response with its items, the same for one job from everywhere.

An answer's items stand in this order: its reasoning, its message, its tool calls, and what else a provider of the
Responses API gave. What no field of the API can hold travels in ``encrypted_content`` of the reasoning item (see
``carried``), so that a client gives it back in the next turn.  Pure.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from keepstream import next_turn
from keepstream.errors import ErrorCode, ErrorInfo
from keepstream.events import ChoiceSnapshot
from keepstream.names import parse_event_id
from keepstream.results import Choice, CompletionResult, JobStatus, ToolCall, Usage
from keepstream_gateway.openai import carried
from keepstream_gateway.openai.ids import ItemIds, response_id
from keepstream_gateway.openai.origin import read_origin, response_metadata

#: Our words for finish reasons that leave an answer incomplete, in the words of the Responses API.
_INCOMPLETE: Final = {
    "length": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "content_filter": "content_filter",
}
#: Our error codes in the words of the API, which has a closed list of them; all others are server_error.
_ERROR_CODES: Final[Mapping[str, str]] = {
    ErrorCode.BAD_REQUEST: "invalid_prompt",
    ErrorCode.CONTENT_FILTER: "invalid_prompt",
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "invalid_prompt",
    ErrorCode.INSUFFICIENT_QUOTA: "rate_limit_exceeded",
    ErrorCode.INVALID_JOB: "invalid_prompt",
    ErrorCode.PAYLOAD_TOO_LARGE: "invalid_prompt",
    ErrorCode.RATE_LIMITED: "rate_limit_exceeded",
    ErrorCode.UNPROCESSABLE: "invalid_prompt",
}
#: Items that are made from our own fields; others are passed on as the provider gave them.
_OWN_ITEMS: Final = frozenset({"message", "reasoning", "function_call", "custom_tool_call"})
#: Parameters that have the same name and meaning in both APIs, with OpenAI's defaults.
_ECHOED: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "user": None,
}


# -- the response ---------------------------------------------------------------------------------


def response_object(result: CompletionResult) -> dict[str, Any]:
    """Return the response object of a stored job, in whatever state it is."""
    status = response_status(result)
    return {
        **response_head(result),
        "status": status,
        "completed_at": int(result.finished_at.timestamp()) if result.finished_at and status == "completed" else None,
        "model": _model_used(result) if status == "completed" else result.model,
        "service_tier": _service_tier(result),
        "error": response_error(result),
        "incomplete_details": incomplete_details(result),
        "output": output_items(result),
        "usage": response_usage(result.usage),
    }


def response_head(result: CompletionResult) -> dict[str, Any]:
    """Return what is said of a response from its beginning: its id, and the request as it was understood."""
    request = result.request or {}
    origin = read_origin(result.metadata)
    return {
        "id": response_id(result.id),
        "object": "response",
        "created_at": int(result.created_at.timestamp()),
        "status": "queued",
        "background": origin.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": _instructions(request) if origin.instructions else None,
        "max_output_tokens": request.get("max_completion_tokens", request.get("max_tokens")),
        "max_tool_calls": None,
        "model": result.model,
        "output": [],
        "previous_response_id": origin.previous_response_id,
        "reasoning": {"effort": request.get("reasoning_effort"), "summary": origin.summary},
        "service_tier": request.get("service_tier") or "auto",
        "store": True,
        "text": _text(request),
        "tool_choice": _tool_choice(request.get("tool_choice")),
        "tools": [_tool(tool) for tool in _objects(request.get("tools"))],
        "top_logprobs": request.get("top_logprobs") or 0,
        "truncation": "disabled",
        "usage": None,
        "metadata": response_metadata(result.metadata),
        **{name: default if (value := request.get(name)) is None else value for name, default in _ECHOED.items()},
    }


def response_status(result: CompletionResult) -> str:
    """Return the response's status in the words of the API."""
    match result.status:
        case JobStatus.QUEUED:
            return "queued"
        case JobStatus.RUNNING | JobStatus.RETRYING:
            return "in_progress"
        case JobStatus.COMPLETED:
            return "incomplete" if incomplete_details(result) else "completed"
        case JobStatus.CANCELLED:
            return "cancelled"
        case _:
            return "failed"


def incomplete_details(result: CompletionResult) -> dict[str, str] | None:
    """Return why a complete stream is an incomplete answer, or None if it is not."""
    if result.status is not JobStatus.COMPLETED:
        return None
    reasons = (_INCOMPLETE.get(choice.finish_reason or "") for choice in result.choices)
    reason = next(filter(None, reasons), None)
    return {"reason": reason} if reason else None


def response_error(result: CompletionResult) -> dict[str, str] | None:
    """Return the error of a response that failed, or None; its ``type`` is our own code."""
    if response_status(result) != "failed":
        return None
    error = result.error or ErrorInfo(code=ErrorCode.INTERNAL, message="the job failed")
    return {"code": _ERROR_CODES.get(error.code, "server_error"), "message": error.message, "type": error.code}


def response_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Return a usage in the words of the API, or None if it is not known: the API has no unknown figures."""
    if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    details = usage.details or {}
    read = _details(details.get("prompt_tokens_details"))
    written = _details(details.get("completion_tokens_details"))
    total = usage.total_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, **read},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0, **written},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens if total is None else total,
    }


def _details(value: object) -> dict[str, Any]:
    return {name: count for name, count in value.items() if count is not None} if isinstance(value, dict) else {}


def _model_used(result: CompletionResult) -> str:
    used = (result.provider_details or {}).get("model")
    return used if isinstance(used, str) and used else result.model


def _service_tier(result: CompletionResult) -> str:
    used = (result.provider_details or {}).get("service_tier")
    asked = (result.request or {}).get("service_tier")
    return str(used or asked or ("default" if result.status.terminal else "auto"))


# -- the request, as it is told back --------------------------------------------------------------


def _instructions(request: Mapping[str, Any]) -> Any:
    messages = request.get("messages")
    return messages[0].get("content") if isinstance(messages, list) and messages else None


def _text(request: Mapping[str, Any]) -> dict[str, Any]:
    form = request.get("response_format")
    text: dict[str, Any] = {"format": {"type": "text"}}
    if isinstance(form, dict):
        schema = form.get("json_schema")
        text["format"] = {"type": form.get("type"), **(schema if isinstance(schema, dict) else {})}
        if form.get("type") == "json_schema":
            text["format"] = {"description": None, "strict": False} | text["format"]
    if request.get("verbosity") is not None:
        text["verbosity"] = request["verbosity"]
    return text


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as the Responses API has it: flat."""
    kind = str(tool.get("type", "function"))
    inner = tool.get(kind)
    flat = {"type": kind, **inner} if isinstance(inner, dict) else dict(tool)
    if kind == "function":
        return {"description": None, "parameters": None, "strict": False} | flat
    form = flat.get("format")
    if kind == "custom" and isinstance(form, dict) and isinstance(form.get("grammar"), dict):
        flat["format"] = {"type": "grammar", **form["grammar"]}
    return flat


def _tool_choice(value: Any) -> Any:
    if value is None:
        return "auto"
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    inner = value.get(str(kind))
    if not isinstance(inner, dict):
        return value
    if kind == "allowed_tools":
        return {"type": kind, **inner, "tools": [_tool_choice(tool) for tool in _objects(inner.get("tools"))]}
    return {"type": kind, **inner}


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


# -- the output -----------------------------------------------------------------------------------


def output_items(result: CompletionResult) -> list[dict[str, Any]]:
    """Return the items of a job's output, whole or partial; none while it runs."""
    attempt = parse_event_id(result.terminal_event_id).attempt if result.terminal_event_id else result.attempt
    ids = ItemIds(result.id, attempt)
    provider = provider_of(result)
    complete = result.status is JobStatus.COMPLETED
    items: list[dict[str, Any]] = []
    for choice in result.choices:
        items += _items(choice, ids, provider, item_status(choice.finish_reason, complete=complete))
    return items


def provider_of(result: CompletionResult) -> str:
    """Return the name of the provider that gave the answer."""
    return result.attempts[-1].provider if result.attempts else result.provider


def item_status(finish_reason: str | None, *, complete: bool) -> str:
    """Return the status of the items of a choice that has ended."""
    return "completed" if complete and finish_reason not in _INCOMPLETE else "incomplete"


def _items(choice: Choice, ids: ItemIds, provider: str, status: str) -> Iterable[dict[str, Any]]:
    carries = carried_by(choice, provider)
    if choice.reasoning or carries:
        texts = [choice.reasoning] if choice.reasoning else []
        yield reasoning_item(ids.reasoning(choice.index), texts, status, carries)
    parts = message_parts(choice)
    if parts:
        yield message_item(ids.message(choice.index), parts, status)
    for call in choice.tool_calls:
        yield call_item(ids.call(call.id, call.type), call, status)
    extra = choice.extra or {}
    for number, item in enumerate(_objects(extra.get(next_turn.ITEMS_FIELD))):
        kind = item.get("type")
        if isinstance(kind, str) and kind not in _OWN_ITEMS:
            yield {"id": ids.other(choice.index, number, kind), **item}
    for number, picture in enumerate(_pictures(extra)):
        yield {
            "id": ids.other(choice.index, number, "ig"),
            "type": "image_generation_call",
            "status": "completed",
            "result": picture,
        }


def carried_by(choice: Choice | ChoiceSnapshot, provider: str) -> str | None:
    """Return what an answer carries besides text and calls, for ``encrypted_content``; None: nothing."""
    whole = choice.to_choice() if isinstance(choice, ChoiceSnapshot) else choice
    return carried.pack(next_turn.assistant_message(whole, provider))


def message_parts(choice: Choice | ChoiceSnapshot) -> list[dict[str, Any]]:
    """Return the parts of a choice's message: its text and its refusal."""
    parts = []
    if choice.content:
        parts.append(text_part(choice.content, choice.extra))
    if choice.refusal:
        parts.append(refusal_part(choice.refusal))
    return parts


def text_part(text: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a part with a text, its annotations and its logprobs."""
    known = extra or {}
    logprobs = known.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return {
        "type": "output_text",
        "text": text,
        "annotations": [annotation(entry) for entry in _objects(known.get("annotations"))],
        "logprobs": _objects(tokens),
    }


def refusal_part(text: str) -> dict[str, Any]:
    """Return a part with a refusal."""
    return {"type": "refusal", "refusal": text}


def annotation(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an annotation as the Responses API has it: flat."""
    kind = value.get("type")
    inner = value.get(str(kind))
    return {"type": kind, **inner} if isinstance(inner, dict) else dict(value)


def reasoning_item(item_id: str, texts: Sequence[str], status: str, carries: str | None = None) -> dict[str, Any]:
    """Return an item with reasoning."""
    item: dict[str, Any] = {
        "id": item_id,
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text} for text in texts],
    }
    return item | {"encrypted_content": carries} if carries else item


def message_item(item_id: str, parts: Sequence[dict[str, Any]], status: str) -> dict[str, Any]:
    """Return an item with a message."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": list(parts)}


def call_item(item_id: str, call: ToolCall, status: str) -> dict[str, Any]:
    """Return an item with a tool call."""
    custom = call.type == "custom"
    return {
        "id": item_id,
        "type": "custom_tool_call" if custom else "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "input" if custom else "arguments": call.arguments,
    }


def _pictures(extra: Mapping[str, Any]) -> Iterable[str]:
    """Yield the data of the images that came with an answer of chat completions, in base64."""
    for entry in _objects(extra.get("images")):
        image = entry.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str) and url.startswith("data:image/") and ";base64," in url:
            yield url.partition(";base64,")[2]
