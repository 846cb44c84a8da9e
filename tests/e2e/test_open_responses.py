"""What the Open Responses specification asks of every server, asked of a gateway.

Its compliance tool is written for Bun and brings schemas of its own; here its seven questions are asked in its words,
and answers are checked for the fields that those schemas require, and by the types of OpenAI's library.  Background,
retrieval and resumption are no part of that specification.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import httpx2
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.cluster import Cluster
from tests.gateways import caller, make_key, start_gateway

pytestmark = pytest.mark.slow

_EVENTS: Final[TypeAdapter[Any]] = TypeAdapter(ResponseStreamEvent)
_NUMBER: Final = (int, float)
_OR_NULL: Final = type(None)
#: The fields that a response has in any case, and what may be in them.
FIELDS: Final[dict[str, Any]] = {
    "id": str,
    "object": str,
    "created_at": int,
    "completed_at": (int, _OR_NULL),
    "status": str,
    "incomplete_details": (dict, _OR_NULL),
    "model": str,
    "previous_response_id": (str, _OR_NULL),
    "instructions": (str, _OR_NULL),
    "output": list,
    "error": (dict, _OR_NULL),
    "tools": list,
    "tool_choice": (str, dict),
    "truncation": str,
    "parallel_tool_calls": bool,
    "text": dict,
    "top_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "top_logprobs": int,
    "temperature": _NUMBER,
    "reasoning": (dict, _OR_NULL),
    "user": (str, _OR_NULL),
    "usage": (dict, _OR_NULL),
    "max_output_tokens": (int, _OR_NULL),
    "max_tool_calls": (int, _OR_NULL),
    "store": bool,
    "background": bool,
    "service_tier": str,
    "metadata": dict,
    "safety_identifier": (str, _OR_NULL),
    "prompt_cache_key": (str, _OR_NULL),
}
#: The same for what is in a response: by the type of an item, a part or a tool.
PARTS: Final[dict[str, dict[str, Any]]] = {
    "message": {"id": str, "status": str, "role": str, "content": list},
    "function_call": {"id": str, "call_id": str, "name": str, "arguments": str, "status": str},
    "reasoning": {"id": str, "summary": list},
    "output_text": {"text": str, "annotations": list, "logprobs": list},
    "function": {
        "name": str,
        "description": (str, _OR_NULL),
        "parameters": (dict, _OR_NULL),
        "strict": (bool, _OR_NULL),
    },
}
WEATHER: Final = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
PICTURE: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


QUESTIONS: Final[dict[str, dict[str, Any]]] = {
    "basic": {"input": [message("user", "Say hello in exactly 3 words.")]},
    "system prompt": {
        "input": [message("system", "You are a pirate."), message("user", "Say hello.")],
    },
    "tools": {"input": [message("user", "What's the weather like in San Francisco?")], "tools": [WEATHER]},
    "image": {
        "input": [
            message(
                "user",
                [
                    {"type": "input_text", "text": "What do you see in this image?"},
                    {"type": "input_image", "image_url": PICTURE},
                ],
            )
        ]
    },
    "several turns": {
        "input": [
            message("user", "My name is Alice."),
            message("assistant", "Hello Alice! Nice to meet you."),
            message("user", "What is my name?"),
        ]
    },
}


@pytest.fixture(scope="module")
def http(shared_cluster: Cluster) -> Iterator[httpx2.Client]:
    with caller(start_gateway(shared_cluster), make_key(shared_cluster)) as client:
        yield client


def check(values: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    wrong = {
        name: values.get(name, "is missing")
        for name, kind in fields.items()
        if name not in values or not isinstance(values[name], kind)
    }
    assert wrong == {}, where


def check_response(response: dict[str, Any], question: str) -> None:
    """Check that everything is there that has to be, and that what is asked for has come."""
    check(response, FIELDS, "the response")
    Response.model_validate(response)
    for item in response["output"]:
        check(item, PARTS[item["type"]], item["type"])
        for part in item.get("content") or []:
            check(part, PARTS.get(part["type"], {}), part["type"])
    for tool in response["tools"]:
        check(tool, PARTS[tool["type"]], "a tool")
    assert response["status"] == "completed"
    wanted = "function_call" if question == "tools" else "message"
    assert wanted in [item["type"] for item in response["output"]]
    assert response["usage"]["total_tokens"] > 0


def events_of(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    named = None
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            named = value
        elif field == "data" and value != "[DONE]":
            event = json.loads(value)
            assert named in {None, event["type"]}
            yield event


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_a_response(http: httpx2.Client, question: str) -> None:
    answer = http.post("/v1/responses", json={"model": "scripted-1", **QUESTIONS[question], "stream": False})
    assert answer.status_code == 200, answer.text
    check_response(answer.json(), question)


@pytest.mark.parametrize("question", ["basic", "tools"])
def test_a_stream_is_made_of_events_of_the_specification(http: httpx2.Client, question: str) -> None:
    body = {"model": "scripted-1", **QUESTIONS[question], "stream": True}
    with http.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.status_code == 200
        events = list(events_of(answer))
    for event in events:
        _EVENTS.validate_python(event)
        if "response" in event:
            check(event["response"], FIELDS, event["type"])
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    types = [event["type"] for event in events]
    assert (types[0], types[-1]) == ("response.created", "response.completed")
    check_response(events[-1]["response"], question)
    if question == "tools":
        added, done = (
            [event["item"]["type"] for event in events if event["type"] == f"response.output_item.{kind}"]
            for kind in ("added", "done")
        )
        assert "function_call" in added
        assert added == done
        assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(types)
    else:
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        assert text == events[-1]["response"]["output"][-1]["content"][0]["text"]
        assert [event["logprobs"] for event in events if event["type"] == "response.output_text.done"] == [[]]
