"""A job's response object says what the row says, in the words of the Responses API, and the library can read it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from openai.types.responses import Response
from pydantic import TypeAdapter

from keepstream.errors import ErrorInfo
from keepstream.results import Choice, JobStatus, ToolCall, Usage
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_request import job_fields
from tests.job_stories import new_job

ENDED = datetime(2026, 11, 28, 13, tzinfo=UTC)


def told(**changed: Any) -> dict[str, Any]:
    given = {"terminal_event_id": "2-9", "attempt": 2, "finished_at": ENDED} if changed.get("choices") else {}
    response = response_object(new_job().model_copy(update=given | changed))
    TypeAdapter(Response).validate_python(response)
    return response


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (JobStatus.QUEUED, None, "queued"),
        (JobStatus.RUNNING, None, "in_progress"),
        (JobStatus.RETRYING, None, "in_progress"),
        (JobStatus.COMPLETED, "stop", "completed"),
        (JobStatus.COMPLETED, "tool_calls", "completed"),
        (JobStatus.COMPLETED, None, "completed"),
        (JobStatus.COMPLETED, "length", "incomplete"),
        (JobStatus.COMPLETED, "content_filter", "incomplete"),
        (JobStatus.FAILED, None, "failed"),
        (JobStatus.EXPIRED, None, "failed"),
        (JobStatus.CANCELLED, None, "cancelled"),
    ],
)
def test_statuses(status: JobStatus, reason: str | None, expected: str) -> None:
    choices = [Choice(index=0, content="a", finish_reason=reason)] if status.terminal else []
    response = told(status=status, choices=choices)
    assert response["status"] == expected
    assert (response["error"] is not None) == (expected == "failed")
    assert (response["incomplete_details"] is not None) == (expected == "incomplete")
    assert (response["completed_at"] is not None) == (expected == "completed")


def test_an_answer_with_everything() -> None:
    choice = Choice(
        index=0,
        content="See [1]",
        reasoning="Hm",
        refusal="but",
        finish_reason="stop",
        tool_calls=[
            ToolCall(id="c1", name="f", arguments="{}", arguments_valid=True),
            ToolCall(id="c 2/ß", type="custom", name="g", arguments="1+1", arguments_valid=False),
        ],
        extra={
            "annotations": [
                {"type": "url_citation", "url_citation": {"url": "u", "title": "t", "start_index": 0, "end_index": 1}}
            ],
            "logprobs": {"content": [{"token": "See", "bytes": [83], "logprob": -0.1, "top_logprobs": []}]},
            "images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        },
    )
    output = told(status=JobStatus.COMPLETED, choices=[choice])["output"]
    assert [item["type"] for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
        "image_generation_call",
    ]
    reasoning, message, call, custom, image = output
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    text, refusal = message["content"]
    assert (text["text"], refusal["refusal"]) == ("See [1]", "but")
    assert text["annotations"] == [{"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}]
    assert text["logprobs"][0]["token"] == "See"
    assert (call["call_id"], call["arguments"]) == ("c1", "{}")
    assert (custom["call_id"], custom["input"]) == ("c 2/ß", "1+1")
    assert image["result"] == "AAAA"
    ids = [item["id"] for item in output]
    assert len(set(ids)) == len(ids)
    assert all(item_id.isascii() and " " not in item_id for item_id in ids)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        (Usage(prompt_tokens=3), None),
        (Usage(prompt_tokens=3, completion_tokens=0), (3, 0, 3, 0, 0)),
        (
            Usage(
                prompt_tokens=3,
                completion_tokens=4,
                total_tokens=9,
                details={
                    "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": None},
                    "completion_tokens_details": {"reasoning_tokens": 1},
                },
            ),
            (3, 4, 9, 2, 1),
        ),
    ],
)
def test_usage_is_told_if_it_is_known(usage: Usage | None, expected: tuple[int, ...] | None) -> None:
    found = told(usage=usage)["usage"]
    if expected is None:
        assert found is None
    else:
        assert (
            found["input_tokens"],
            found["output_tokens"],
            found["total_tokens"],
            found["input_tokens_details"]["cached_tokens"],
            found["output_tokens_details"]["reasoning_tokens"],
        ) == expected


def test_errors_have_the_words_of_the_api_and_ours() -> None:
    error = told(status=JobStatus.FAILED, error=ErrorInfo(code="rate_limited", message="slow down"))["error"]
    assert error == {"code": "rate_limit_exceeded", "message": "slow down", "type": "rate_limited"}
    error = told(status=JobStatus.FAILED, error=ErrorInfo(code="newer", message="?"))["error"]
    assert error == {"code": "server_error", "message": "?", "type": "newer"}


def test_the_request_is_told_back() -> None:
    tool = {"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True, "description": None}
    body = {
        "model": "m",
        "input": "Hi",
        "instructions": "Be kind",
        "background": True,
        "temperature": 0.5,
        "max_output_tokens": 100,
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": schema, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b", "idempotency_key": "k"},
        "parallel_tool_calls": False,
        "user": "u",
    }
    fields = job_fields(body)
    response = told(request=fields["request"], metadata=fields["metadata"])
    assert {name: response[name] for name in body if name != "input"} == {n: v for n, v in body.items() if n != "input"}


def test_a_job_that_came_another_way_has_a_response_too() -> None:
    response = told(metadata={"number": 1, "text": "t"}, request=None)
    assert response["metadata"] == {"text": "t"}
    assert (response["background"], response["store"]) == (False, True)
