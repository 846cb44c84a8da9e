"""Whatever JSON stands where in a body: it is refused by a 400 that can be sent, or becomes a job that can be shown.

A value of another kind than a parameter has must not break what reads it: that would be a 500, and for a job that is
stored by then, one for ever.
"""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from keepstream.client import queries
from keepstream.errors import InvalidJobError
from keepstream.jobs import Job, make_job
from keepstream_gateway.ai_sdk import chats, messages, requests
from keepstream_gateway.console import job_view
from keepstream_gateway.console.pages import Pages
from keepstream_gateway.console.session import Session
from keepstream_gateway.errors import api_error
from keepstream_gateway.json_answers import JsonResponse
from keepstream_gateway.openai import chat_request, responses_request
from keepstream_gateway.openai.chat_object import stored_messages
from keepstream_gateway.openai.responses_input import items_of
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.submission import refusal_of
from tests.job_stories import new_job

HALF: Final = "\ud800"  #: Of a surrogate pair.
PAGES: Final = Pages()
SESSION: Final = Session("key", "somebody", "token")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD: Final[list[Any]] = [
    None, True, 7, -1, 1e308, 10**300, "", "x", HALF, "a\0b", [], [[]], {}, [{}], ["x"],
    {"a": 1}, {HALF: HALF}, {"type": []}, [{"type": {}}], {"type": HALF}, nested(300),
]  # fmt: skip
NAMES: Final = (HALF, "a\0", "x" * 10_000, "type")

ENVELOPE: Final = {
    "provider": "p",
    "fallbacks": [{"provider": "q", "model": "n"}],
    "class": "bulk",
    "max_attempts": 3,
    "expires_at": "2030-01-01T00:00:00Z",
    "idle_timeout": 5.0,
}
RESPONSE: Final = {
    "model": "m",
    "instructions": "Be brief",
    "background": True,
    "store": True,
    "stream": False,
    "metadata": {"a": "b"},
    "input": [
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Hi"},
                {"type": "input_image", "image_url": "data:x", "detail": "auto"},
                {"type": "input_file", "file_data": "x", "filename": "f"},
                {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
            ],
        },
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "ks1.x"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello"}, {"type": "refusal", "refusal": "No"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "x"}]},
    ],
    "tools": [
        {"type": "function", "name": "f", "parameters": {}, "strict": True, "description": "d"},
        {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "truncation": "disabled",
    "max_output_tokens": 5,
    "top_logprobs": 2,
    "service_tier": "auto",
    "background_options": {"completion_window": "soonest"},
    "stream_options": {},
    "keepstream": {**ENVELOPE, "request": {"seed": 1}},
}
REQUEST: Final = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                {"type": "file", "file": {"file_data": "x"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": "No",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "d", "type": "custom", "custom": {"name": "g", "input": "x"}},
            ],
            "signature": {"x": 1},
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]},
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {}}},
        {"type": "custom", "custom": {"name": "g", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}}},
    ],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "n": 2,
    "service_tier": "auto",
    "reasoning_effort": "low",
    "verbosity": "low",
}
COMPLETION: Final = {
    **REQUEST,
    "stream": True,
    "stream_options": {"include_usage": True},
    "store": True,
    "metadata": {"a": "b"},
    "keepstream": ENVELOPE,
}
JOB: Final = {**ENVELOPE, "request": REQUEST, "metadata": {"a": {"b": 1}}, "idempotency_key": "k", "id": "x", "v": 2}
CHAT: Final = {
    "id": "chat",
    "trigger": "submit-message",
    "messages": [
        {"id": "1", "role": "system", "parts": [{"type": "text", "text": "x"}]},
        {
            "id": "2",
            "role": "user",
            "parts": [
                {"type": "text", "text": "x"},
                {"type": "file", "url": "data:x", "mediaType": "image/png", "filename": "f"},
                {"type": "file", "url": "data:x,", "mediaType": "audio/wav"},
            ],
        },
        {
            "id": "3",
            "role": "assistant",
            "parts": [
                {"type": "step-start"},
                {"type": "text", "text": "x", "providerMetadata": {"keepstream": {"refusal": True}}},
                {"type": "tool-f", "toolCallId": "c", "state": "output-available", "input": {"a": 1}, "output": [1]},
                {"type": "dynamic-tool", "toolName": "g", "toolCallId": "d", "state": "output-error", "rawInput": "x"},
            ],
        },
    ],
    "model": "m",
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


def job_of_response(body: dict[str, Any]) -> Job:
    return job_of_fields(responses_request.job_fields(body))


def job_of_completion(body: dict[str, Any]) -> Job:
    return job_of_fields(chat_request.job_fields(body))


def job_of_fields(fields: dict[str, Any]) -> Job:
    try:
        return make_job({**fields, "tenant": "t"})
    except InvalidJobError as error:
        raise refusal_of(str(error)) from None


def job_of_chat(body: dict[str, Any]) -> Job:
    chat = chats.check_id(body.get("id"))
    requests.trigger(body)
    message = messages.continued(body.get("messages"))
    asked = requests.to_request(body, messages.to_chat(body.get("messages")), {}, parameters=True)
    return make_job({"tenant": "t", "request": asked, "metadata": {"chat": chat, "message": message}})


def job_of_native(body: dict[str, Any]) -> Job:
    return make_job({"tenant": "t", **body})


def show(job: Job) -> None:
    """Store a job, and show it in every way."""
    stored = json.loads(job.to_json())  # which is tried before anything is stored
    queries.new_rows(job)
    found = new_job(request=stored["request"], metadata=stored.get("metadata", {}))
    sent = found.request["messages"] if found.request else []
    for value in (
        response_object(found),
        items_of(sent, found.id),
        stored_messages(found.request, found.id),
        found.model_dump(mode="json"),
    ):
        assert json.loads(bytes(JsonResponse(value).body)) is not None
    view = job_view.show(found, datetime.now(UTC))
    assert PAGES.render("job.html", session=SESSION, here="/jobs", view=view, problem="").body


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value within a value."""
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, name)
        yield from places(value[name], (*place, name))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return a value with another one in a place."""
    if not place:
        return new
    changed_value = copy.copy(value)
    changed_value[place[0]] = changed(value[place[0]], place[1:], new)
    return changed_value


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        value = value[name]
    return value


def variants(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place in places(body):
        for odd in ODD:
            yield f"{place}: {odd!r:.40}", changed(body, place, odd)
    for place in ((), *places(body)):
        if isinstance(at(body, place), dict):
            for name in NAMES:
                yield f"{place}: the name {name!r:.40}", changed(body, place, {**at(body, place), name: 1})


@pytest.mark.parametrize(
    ("job_of", "body"),
    [(job_of_response, RESPONSE), (job_of_completion, COMPLETION), (job_of_chat, CHAT), (job_of_native, JOB)],
    ids=["response", "completion", "chat", "native"],
)
def test_a_body_is_refused_or_becomes_a_job_that_can_be_shown(
    job_of: Callable[[dict[str, Any]], Job], body: dict[str, Any]
) -> None:
    show(job_of(body))
    broken: dict[str, str] = {}
    for what, variant in variants(body):
        try:
            show(job_of(variant))
        except Exception as error:  # noqa: BLE001  # all that is no refusal is wrong
            told = api_error(error)
            if told is None or told.status != 400:
                broken[what] = repr(error)
            elif len(told.response().body) > 1000:
                broken[what] = "the answer repeats what may be a text"
    assert broken == {}


def test_half_of_a_surrogate_pair_is_answered_as_it_came() -> None:
    body = bytes(JsonResponse({"text": f"a{HALF}ä\u2028", HALF: [HALF]}).body)
    assert body == '{"text":"a\\ud800ä\u2028","\\ud800":["\\ud800"]}'.encode()
    assert json.loads(body) == {"text": f"a{HALF}ä\u2028", HALF: [HALF]}
