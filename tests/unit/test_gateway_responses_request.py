"""A request to the Responses API becomes the job that asks the same, or is refused by the parameter's name."""

import json
from typing import Any

import pytest

from keepstream.jobs import make_job
from keepstream.results import Choice, CompletionResult, JobStatus, ToolCall
from keepstream_gateway.errors import ApiError
from keepstream_gateway.openai import carried
from keepstream_gateway.openai.origin import ENTRY
from keepstream_gateway.openai.responses_input import items_of, messages_of
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_request import job_fields
from tests.job_stories import new_job


def request_of(**body: Any) -> dict[str, Any]:
    fields = job_fields({"model": "m", "input": "Hi", **body})
    make_job(fields)
    request: dict[str, Any] = fields["request"]
    return request


def ended(**changed: Any) -> CompletionResult:
    status = {"status": JobStatus.COMPLETED, "terminal_event_id": "1-9", "attempt": 1}
    return new_job("job0").model_copy(update=status | changed)


def said(part: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": "does"}
CHAT_TOOL = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_output_tokens": 64}, {"max_completion_tokens": 64}),
        ({"temperature": 0.2, "top_p": 0.9, "user": "u"}, {"temperature": 0.2, "top_p": 0.9, "user": "u"}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"tools": [TOOL], "parallel_tool_calls": False}, {"tools": [CHAT_TOOL], "parallel_tool_calls": False}),
        ({"tools": []}, {}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        (
            {"tool_choice": {"type": "function", "name": "f"}},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
                }
            },
        ),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"include": ["reasoning.encrypted_content"], "truncation": "disabled", "store": False}, {}),
        ({"conversation": None, "prompt": None, "metadata": None, "stream": True}, {}),
    ],
)
def test_parameters(body: dict[str, Any], expected: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert request_of(**body) == {"model": "m", "messages": messages} | expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "mcp", "server_label": "x"}]}, "tools[1].type"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["everything"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"text": {"style": "x"}}, "text.style"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"background": True, "store": False}, "store"),
        ({"background": "yes"}, "background"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {ENTRY: "x"}}, "metadata"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"tempreature": 1}, "tempreature"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input[0].name"),
        ({"instructions": ["x"]}, "instructions"),
        ({"keepstream": {"tenant": "other"}}, "keepstream.tenant"),
        ({"keepstream": 1}, "keepstream"),
        ({"keepstream": {"request": []}}, "keepstream.request"),
    ],
)
def test_what_a_job_cannot_express_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        job_fields({"model": "m", "input": "Hi", **body})
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert refusal.value.code


def test_a_typo_is_told_the_nearest_name() -> None:
    with pytest.raises(ApiError, match="did you mean 'temperature'"):
        job_fields({"model": "m", "input": "Hi", "tempreature": 1})


def test_a_model_must_be_named() -> None:
    with pytest.raises(ApiError) as refusal:
        job_fields({"input": "Hi"})
    assert refusal.value.param == "model"


def test_the_envelope_goes_under_our_own_name() -> None:
    job = make_job(job_fields({"model": "m", "input": "Hi", "keepstream": {"provider": "p", "class": "bulk"}}))
    assert (job.provider, job.job_class) == ("p", "bulk")


def test_what_only_chat_completions_have_goes_below_the_envelope() -> None:
    request = request_of(keepstream={"request": {"seed": 7, "model": "another"}}, temperature=1)
    assert (request["seed"], request["model"], request["temperature"]) == (7, "m", 1)


ITEMS = [
    {"role": "developer", "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "brief"}]},
    {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"},
            {"type": "input_file", "file_data": "data:…", "filename": "a.pdf"},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        ],
    },
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "somebody else's"},
    {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
    },
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "1+1"},
    {"type": "function_call_output", "call_id": "c1", "output": "ok"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "user", "content": "Why?"},
]
MESSAGES = [
    {"role": "developer", "content": "Be brief"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            {"type": "file", "file": {"file_data": "data:…", "filename": "a.pdf"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        ],
    },
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "c2", "type": "custom", "custom": {"name": "g", "input": "1+1"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    {"role": "tool", "tool_call_id": "c2", "content": "2"},
    {"role": "assistant", "content": None, "refusal": "No."},
    {"role": "user", "content": "Why?"},
]


def test_items_become_messages() -> None:
    assert messages_of(ITEMS) == MESSAGES


def test_the_items_of_stored_messages_mean_the_same_messages() -> None:
    items = items_of(MESSAGES, "job1")
    assert messages_of(items) == MESSAGES
    assert len({item["id"] for item in items}) == len(items)


SIGNATURE = {"extra_content": {"s": "sig"}}
ITEM = {"type": "reasoning", "id": "rs", "encrypted_content": "e"}
SIGNED_CALL = ToolCall(id="c1", name="f", arguments='{"a":1}', arguments_valid=True, extra=SIGNATURE)
ANSWERS = [
    Choice(index=0, content="4", reasoning="2+2", extra={"reasoning_fields": ["reasoning_content"]}),
    Choice(index=0, tool_calls=[SIGNED_CALL]),
    Choice(index=0, content="Hm", tool_calls=[SIGNED_CALL], extra={"reasoning_details": [{"type": "x", "data": "y"}]}),
    Choice(index=0, content="4", extra={"responses_output": [ITEM]}),
    Choice(index=0, refusal="No."),
    Choice(index=0, content="plain"),
    Choice(index=0),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_a_client_gives_back_is_the_message_that_the_provider_wants(answer: Choice) -> None:
    job = ended(choices=[answer])
    output = response_object(job)["output"]
    question = {"role": "user", "content": "Hi"}
    back = messages_of([question, *output, {"role": "user", "content": "Go on"}])
    assert back[1:-1] == ([job.assistant_message()] if output else [])


def test_an_answer_that_a_client_has_changed_goes_back_as_the_client_has_it() -> None:
    output = response_object(ended(choices=[ANSWERS[0]]))["output"]
    output[1]["content"][0]["text"] = "5"
    assert messages_of(output) == [{"role": "assistant", "content": "5"}]


def test_what_does_not_unpack_is_left_alone() -> None:
    packed = carried.pack({"role": "assistant", "content": "x", "signature": "s"})
    assert packed is not None
    message = {"role": "assistant", "content": "x", "signature": "s"}
    assert carried.unpack(packed) == (message, len(json.dumps(message, separators=(",", ":"))))
    for text in (None, 1, "", "ks1.", "ks1.!!", packed[:-8], "gAAAA" + packed):
        assert carried.unpack(text) is None


def test_items_of_a_request_carry_no_more_than_one_of_them_may() -> None:
    """A few kilobytes can stand for many megabytes, and a body has room for hundreds of them."""
    carries = carried.pack({"role": "assistant", "content": "", "x": "A" * (carried.MAX_BYTES // 2)})
    item = {"type": "reasoning", "encrypted_content": carries}
    assert len(str(carries)) < 50_000
    assert messages_of([item])[0]["x"]
    with pytest.raises(ApiError, match="larger than") as refused:
        messages_of([item, {"role": "user", "content": "Hi"}, item])
    assert refused.value.param == "input[2].encrypted_content"


def test_a_conversation_goes_on_without_the_earlier_instructions() -> None:
    first = job_fields({"model": "m", "input": "Hi", "instructions": "Be kind"})
    previous = ended(request=first["request"], metadata=first["metadata"], choices=[Choice(index=0, content="Hello")])
    fields = job_fields({"model": "m2", "input": "And now?", "instructions": "Be rude"}, previous)
    assert fields["request"] == {
        "model": "m2",
        "messages": [
            {"role": "system", "content": "Be rude"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And now?"},
        ],
    }
    job = new_job("job2", request=fields["request"], metadata=fields["metadata"])
    told = response_object(job)
    assert told["previous_response_id"] == "resp_job0"
    assert told["instructions"] == "Be rude"


@pytest.mark.parametrize("changed", [{"status": JobStatus.RUNNING}, {"choices": []}])
def test_a_conversation_cannot_go_on_from_what_has_no_answer(changed: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refusal:
        job_fields({"model": "m", "input": "x"}, ended(**{"choices": [Choice(index=0, content="a")], **changed}))
    assert refusal.value.param == "previous_response_id"
