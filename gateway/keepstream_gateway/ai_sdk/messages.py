"""Messages: the AI SDK's UI messages as those of a chat completion.

In: the messages in a request of ``useChat``, and stored answers of the chat.  Out: messages for a job's request; what a
page's tools gave, back from such messages.  Pure.

Text, files and tool results go to the model; what only a page shows (data parts, sources, reasoning) does not.  A step
of the message that is being continued is replaced by its stored answer's ``assistant_message()``, because providers
want back what a page never had: their reasoning, signatures.  Tool calls without a result are left out, for providers
refuse them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NoReturn

from keepstream.results import CompletionResult
from keepstream_gateway.ai_sdk.chunks import NAMESPACE
from keepstream_gateway.errors import invalid

Message = dict[str, Any]

_ROLES: Final = ("system", "user", "assistant")
_AUDIO: Final = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/mpeg": "mp3", "audio/mp3": "mp3"}


def to_chat(messages: Any, answers: Sequence[CompletionResult] = ()) -> list[Message]:
    """Return the messages of a chat completion.

    Args:
        messages: ``messages`` of the request.
        answers: Stored answers that the last message shows, if it is to be continued.

    Raises:
        ApiError: something is not as the AI SDK has it, or cannot be expressed; the error names it.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid("messages: must be a list of UI messages, with one at least", "messages")
    found: list[Message] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise invalid(f"{where}: must be an object with a role of {', '.join(_ROLES)}", f"{where}.role")
        parts = message.get("parts")
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise invalid(f"{where}.parts: must be a list of objects", f"{where}.parts")
        match message["role"]:
            case "system":
                found.append({"role": "system", "content": "".join(_texts(parts, where))})
            case "user":
                found.append({"role": "user", "content": _user_content(parts, where)})
            case _:
                stored = answers if number == len(messages) - 1 else ()
                for step in _steps(parts):
                    found += _assistant(step, where, stored)
    return found


def continued(messages: Any) -> str | None:
    """Return the id of the message that the answer goes on with: the last one, if it is the assistant's."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return None
    message_id = last.get("id")
    if not isinstance(message_id, str) or not message_id:
        raise invalid("the last message is to be continued, and has no id", f"messages[{len(messages) - 1}].id")
    return message_id


def tool_outputs(messages: Iterable[Message]) -> dict[str, Any]:
    """Return what came of tool calls, by their ids, from the messages of a chat completion."""
    return {
        message["tool_call_id"]: _output_value(message.get("content"))
        for message in messages
        if message.get("role") == "tool" and isinstance(message.get("tool_call_id"), str)
    }


# -- users --


def _user_content(parts: list[dict[str, Any]], where: str) -> str | list[Message]:
    """Return a text where there is nothing else, as most providers want it."""
    content: list[Message] = []
    for number, part in enumerate(parts):
        match part.get("type"):
            case "text":
                content.append({"type": "text", "text": _text(part, f"{where}.parts[{number}]")})
            case "file":
                content.append(_file(part, f"{where}.parts[{number}]"))
            case _:
                pass  # only a page shows it
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    return content


def _file(part: dict[str, Any], where: str) -> Message:
    url, kind = part.get("url"), part.get("mediaType")
    if not isinstance(url, str) or not isinstance(kind, str):
        raise invalid(f"{where}: a file has a url and a mediaType", where)
    if kind.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    if not url.startswith("data:"):
        raise invalid(f"{where}.url: must be a data: URL; a model fetches only images itself", f"{where}.url")
    if kind in _AUDIO:
        data = url.partition(",")[2]
        return {"type": "input_audio", "input_audio": {"data": data, "format": _AUDIO[kind]}}
    name = part.get("filename")
    return {"type": "file", "file": {"filename": name if isinstance(name, str) else "file", "file_data": url}}


# -- the assistant --


def _steps(parts: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the parts of each step; each was an answer of its own."""
    step: list[dict[str, Any]] = []
    for part in parts:
        if part.get("type") == "step-start":
            yield step
            step = []
        else:
            step.append(part)
    yield step


def _assistant(parts: list[dict[str, Any]], where: str, answers: Sequence[CompletionResult]) -> list[Message]:
    """Return an answer, and the results of its tool calls."""
    text = "".join(_texts([part for part in parts if not _is_refusal(part)], where))
    refusal = "".join(_texts([part for part in parts if _is_refusal(part)], where))
    calls = [part for part in parts if _tool_name(part) is not None]
    results = [_result(part, where) for part in calls if _has_result(part)]
    for answer in answers:
        if answer.text == text and [call.id for call in answer.tool_calls] == [
            result["tool_call_id"] for result in results
        ]:
            return [answer.assistant_message(), *results]
    message: Message = {"role": "assistant", "content": text or None}
    if refusal:
        message["refusal"] = refusal
    if results:
        message["tool_calls"] = [_call(part) for part in calls if _has_result(part)]
    return [message, *results] if text or refusal or results else []


def _is_refusal(part: dict[str, Any]) -> bool:
    metadata = part.get("providerMetadata")
    ours = metadata.get(NAMESPACE) if isinstance(metadata, dict) else None
    return isinstance(ours, dict) and ours.get("refusal") is True


def _tool_name(part: dict[str, Any]) -> str | None:
    kind, name = part.get("type"), part.get("toolName")
    if kind == "dynamic-tool":
        return name if isinstance(name, str) else None
    return kind[len("tool-") :] if isinstance(kind, str) and kind.startswith("tool-") else None


def _has_result(part: dict[str, Any]) -> bool:
    return part.get("state") in ("output-available", "output-error", "output-denied")


def _call(part: dict[str, Any]) -> Message:
    given = part.get("input")
    raw = part.get("rawInput") if given is None else given
    arguments = raw if isinstance(raw, str) else json.dumps({} if raw is None else raw, ensure_ascii=False)
    return {
        "id": part["toolCallId"],
        "type": "function",
        "function": {"name": _tool_name(part), "arguments": arguments},
    }


def _result(part: dict[str, Any], where: str) -> Message:
    call_id = part.get("toolCallId")
    if not isinstance(call_id, str):
        raise invalid(f"{where}: a tool part has a toolCallId", f"{where}.parts")
    match part["state"]:
        case "output-available":
            output = part.get("output")
            content = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
        case "output-error":
            content = str(part.get("errorText") or "the tool failed")
        case _:
            content = "The user did not allow this call."
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _output_value(content: Any) -> Any:
    """Return what a page gave: objects and lists were written as JSON, a text is itself."""
    if not isinstance(content, str) or content[:1] not in {"{", "["}:
        return content
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


# -- both --


def _texts(parts: list[dict[str, Any]], where: str) -> Iterator[str]:
    for part in parts:
        if part.get("type") == "text":
            yield _text(part, where)


def _text(part: dict[str, Any], where: str) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        _refuse_text(where)
    return text


def _refuse_text(where: str) -> NoReturn:
    raise invalid(f"{where}: a part of type text has a text", where)
