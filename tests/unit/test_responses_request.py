"""A chat-completions request, written for the Responses API: nothing that changes the answer is lost in silence."""

from typing import Any

import pytest

from keepstream.next_turn import ITEMS_FIELD
from keepstream_worker.providers.dialects.responses_request import (
    NotExpressibleError,
    ResponsesOptions,
    encode,
)

ASK = [{"role": "user", "content": "What day is it?"}]


def body_of(options: ResponsesOptions | None = None, **request: Any) -> dict[str, Any]:
    return encode({"model": "m-1", "messages": ASK} | request, "openai", options)


def input_of(*messages: Any, options: ResponsesOptions | None = None, **request: Any) -> list[Any]:
    return list(body_of(options, messages=list(messages), **request)["input"])


def test_nothing_is_stored_at_the_provider_unless_the_caller_asks() -> None:
    assert body_of() == {
        "model": "m-1",
        "input": [{"type": "message", "role": "user", "content": "What day is it?"}],
        "store": False,
        "stream": True,
    }
    assert body_of(store=True)["store"] is True
    assert body_of(store=None)["store"] is False, "where null would mean yes"


def test_neither_the_callers_stream_nor_its_options_are_sent() -> None:
    body = body_of(stream=False, stream_options={"include_usage": True})
    assert body["stream"] is True
    assert "stream_options" not in body


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"max_tokens": 5}, {"max_output_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_output_tokens": 6}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_output_tokens": 6}),
        ({"temperature": 0.2, "top_p": 1, "user": "u", "service_tier": "flex"}, None),
        ({"metadata": {"a": "b"}, "prompt_cache_key": "k", "parallel_tool_calls": False}, None),
        ({"truncation": "auto", "max_tool_calls": 3, "something_new": [1]}, None),
        ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
        ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
        (
            {"reasoning_effort": "high", "reasoning": {"summary": "auto"}},
            {"reasoning": {"effort": "high", "summary": "auto"}},
        ),
        ({"reasoning_effort": "high", "reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
        ({"logprobs": True, "top_logprobs": 2}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        ({"logprobs": True, "include": ["x"]}, {"include": ["message.output_text.logprobs", "x"]}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}},
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}}},
        ),
        (
            {"response_format": {"type": "json_object"}, "verbosity": "low"},
            {"text": {"format": {"type": "json_object"}, "verbosity": "low"}},
        ),
        ({"n": 1, "stop": None, "seed": None, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0}, {}),
        ({"modalities": ["text"], "functions": [], "audio": None}, {}),
    ],
)
def test_parameters(given: dict[str, Any], sent: dict[str, Any] | None) -> None:
    plain = body_of()
    assert {name: value for name, value in body_of(**given).items() if name not in plain} == (
        given if sent is None else sent
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("stop", "\n"),
        ("stop", ["a"]),
        ("seed", 0),
        ("logit_bias", {"1": 5}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "v"}),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("background", True),
        ("conversation", "conv_1"),
    ],
)
def test_what_has_no_equivalent_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(NotExpressibleError, match=f"'{name}'") as caught:
        body_of(**{name: value})
    assert caught.value.parameter == name


def test_an_answer_that_is_not_stored_continues_none_at_the_provider() -> None:
    assert body_of(previous_response_id="resp_1", store=True)["previous_response_id"] == "resp_1"
    assert body_of(previous_response_id=None)["store"] is False
    with pytest.raises(NotExpressibleError, match="store"):
        body_of(previous_response_id="resp_1")


def test_a_call_of_the_old_form_is_not_left_out_of_a_conversation() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(NotExpressibleError, match=r"messages\[1\]\.function_call"):
        input_of(*ASK, called)


def test_a_provider_may_take_what_openai_has_not() -> None:
    body = body_of(ResponsesOptions(pass_through=frozenset({"stop", "seed"})), stop=["a"], seed=0)
    assert (body["stop"], body["seed"]) == (["a"], 0)


def test_tools_are_flat_and_not_strict_unless_they_say_so() -> None:
    hosted = {"type": "web_search", "user_location": {"type": "approximate"}}
    body = body_of(
        tools=[
            {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}, "strict": True}},
            {"type": "function", "function": {"name": "b", "description": "d"}},
            {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}}},
            hosted,
        ]
    )
    assert body["tools"] == [
        {"type": "function", "name": "a", "parameters": {"type": "object"}, "strict": True},
        {
            "type": "function",
            "name": "b",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
            "strict": False,
        },
        {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark"}},
        hosted,
    ]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("required", "required"),
        ({"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}),
        ({"type": "function", "name": "f"}, {"type": "function", "name": "f"}),
        ({"type": "custom", "custom": {"name": "f"}}, {"type": "custom", "name": "f"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        ),
    ],
)
def test_tool_choice(given: Any, sent: Any) -> None:
    assert body_of(tool_choice=given)["tool_choice"] == sent


# -- messages -------------------------------------------------------------------------------------


def test_parts_of_a_users_message() -> None:
    (item,) = input_of(
        {
            "role": "user",
            "name": "Ann",
            "content": [
                {"type": "text", "text": "Look:", "prompt_cache_breakpoint": True},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
                {"type": "file", "file": {"file_id": "file_1", "filename": "a.pdf"}},
            ],
        }
    )
    assert item == {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "Look:", "prompt_cache_breakpoint": True},
            {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"},
            {"type": "input_image", "image_url": "https://example.org/a.png", "detail": "low"},
            {"type": "input_file", "file_id": "file_1", "filename": "a.pdf"},
        ],
    }


def test_a_tool_loop() -> None:
    items = input_of(
        {"role": "developer", "content": "Be brief."},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "call_2", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_2", "content": None},
    )
    assert items == [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"type": "message", "role": "assistant", "content": "Let me look."},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "sql", "input": "SELECT 1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "one"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": ""},
    ]


def test_an_assistants_message_is_one_plain_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert input_of({"role": "assistant", "content": parts})[0]["content"] == "ab"
    assert input_of({"role": "assistant", "content": None, "refusal": "No."})[0]["content"] == "No."
    assert input_of({"role": "assistant", "content": None, "tool_calls": []}) == []


def test_long_ids_are_shortened_alike_in_call_and_result() -> None:
    long = "call_" + "x" * 100
    call, result = input_of(
        {"role": "assistant", "tool_calls": [{"id": long, "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": long, "content": "1"},
    )
    assert call["call_id"] == result["call_id"]
    assert len(call["call_id"]) <= 64


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA=="}}]},
        {"role": "assistant", "audio": {"id": "audio_1"}},
        {"role": "function", "name": "f", "content": "1"},
    ],
)
def test_messages_without_an_equivalent_are_refused_with_their_number(message: dict[str, Any]) -> None:
    with pytest.raises(NotExpressibleError, match=r"messages\[1\]"):
        input_of(*ASK, message)


def test_leading_system_texts_become_instructions_where_a_provider_wants_that() -> None:
    body = body_of(
        ResponsesOptions(instructions=True),
        messages=[{"role": "system", "content": "A."}, {"role": "developer", "content": "B."}, *ASK],
    )
    assert body["instructions"] == "A.\n\nB."
    assert [item["role"] for item in body["input"]] == ["user"]


# -- the items of an earlier answer ---------------------------------------------------------------

REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA", "status": "completed"}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}
MESSAGE = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "phase": "commentary",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hm.", "annotations": []}],
}
ANSWER = {
    "role": "assistant",
    "content": "Hm.",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    ITEMS_FIELD: {"provider": "openai", "items": [REASONING, MESSAGE, CALL]},
}


def test_the_provider_that_gave_an_answer_gets_its_items_back_in_their_order() -> None:
    assert input_of(ANSWER) == [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "message", "role": "assistant", "phase": "commentary", "content": MESSAGE["content"]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
    ]


def test_ids_go_back_only_to_a_provider_that_has_stored_them() -> None:
    assert [item.get("id") for item in input_of(ANSWER, store=True)] == ["rs_1", "msg_1", "fc_1"]
    without = input_of(ANSWER, options=ResponsesOptions(item_ids=False))
    assert [item.get("id") for item in without] == [None, None, None]


def test_reasoning_that_nobody_can_read_stays_at_home() -> None:
    plain = {name: value for name, value in REASONING.items() if name != "encrypted_content"}
    answer = ANSWER | {ITEMS_FIELD: {"provider": "openai", "items": [plain, CALL]}}
    assert [item["type"] for item in input_of(answer)] == ["function_call"]


def test_another_provider_gets_the_plain_message() -> None:
    items = encode({"model": "m", "messages": [ANSWER]}, "other")["input"]
    assert items == [
        {"type": "message", "role": "assistant", "content": "Hm."},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
    ]


def test_encrypted_reasoning_is_asked_for_where_the_model_has_any() -> None:
    options = ResponsesOptions(encrypted_reasoning=True, reasoning_summary="auto")
    assert body_of(options)["include"] == ["reasoning.encrypted_content"]
    assert body_of(options)["reasoning"] == {"summary": "auto"}
    assert "include" not in body_of(options, store=True)


def test_the_request_itself_is_not_changed() -> None:
    request = {"model": "m", "messages": [ANSWER, *ASK], "response_format": {"type": "json_object"}, "text": {"a": 1}}
    before = repr(request)
    encode(request, "openai", ResponsesOptions(instructions=True, encrypted_reasoning=True, reasoning_summary="auto"))
    assert repr(request) == before
