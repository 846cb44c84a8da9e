"""The message for the next turn: all that the provider wants back, where it wants it, and nothing else."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from keepstream.results import AttemptResult, Choice, CompletionResult, JobStatus, ToolCall
from keepstream_worker.providers.stream import StreamReader

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def result_of(*choices: Choice) -> CompletionResult:
    attempt = AttemptResult(number=1, reason="first", outcome="finished", provider="p", model="m", started_at=NOW)
    return CompletionResult(
        id="job",
        tenant="t",
        status=JobStatus.COMPLETED,
        model="m",
        provider="p",
        created_at=NOW,
        attempt=1,
        choices=list(choices),
        attempts=[attempt],
    )


def next_turn(*deltas: dict[str, Any], responses: bool = False, **fields: Any) -> dict[str, Any]:
    """Return the message that follows from what a provider streams."""
    reader = StreamReader(call_seed="job", responses=responses)
    for delta in deltas:
        event = delta if responses else {"choices": [{"index": 0, "delta": delta}]}
        reader.feed(b"data: %b\n\n" % json.dumps(event).encode())
    if not responses:
        event = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **fields}]}
        reader.feed(b"data: %b\n\n" % json.dumps(event).encode())
    assert reader.finish() is None
    return result_of(*reader.output().choices).assistant_message()


def calls(*arguments: str, **extra: Any) -> list[dict[str, Any]]:
    first, *rest = arguments
    begin = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": first}, **extra}
    return [{"tool_calls": [part]} for part in (begin, *({"index": 0, "function": {"arguments": a}} for a in rest))]


def test_a_text_alone() -> None:
    assert next_turn({"role": "assistant", "content": "Hel"}, {"content": "lo"}) == {
        "role": "assistant",
        "content": "Hello",
    }


def test_the_content_is_null_where_there_is_something_else() -> None:
    assert next_turn(*calls('{"a"', ":1}")) == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert next_turn({"refusal": "No."}) == {"role": "assistant", "content": None, "refusal": "No."}
    assert result_of(Choice(index=0)).assistant_message() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "reasoning_text", "thinking"])
def test_reasoning_goes_back_under_the_name_it_came_by(name: str) -> None:
    assert next_turn({name: "Let "}, {name: "me see."}, *calls('{"a":1}')) == {
        "role": "assistant",
        "content": None,
        name: "Let me see.",
        "tool_calls": [CALL],
    }


def test_details_of_reasoning_are_joined_as_their_kind_demands() -> None:
    def detail(words: str, **fields: Any) -> dict[str, Any]:
        piece = {"type": "reasoning.text", "text": words, "format": "anthropic-claude-v1", "index": 0, **fields}
        return {"reasoning": words, "reasoning_details": [piece]}

    signature = {"type": "reasoning.text", "signature": "c2ln", "format": "anthropic-claude-v1", "index": 0}
    encrypted = {"type": "reasoning.encrypted", "data": "ZW5j", "id": "r1", "format": "openai-responses-v1", "index": 1}
    message = next_turn(
        detail("Let "),
        detail("me."),
        {"content": "", "reasoning_details": [signature]},
        {"reasoning_details": [encrypted]},
    )
    assert message["reasoning"] == "Let me."
    assert message["reasoning_details"] == [
        {"type": "reasoning.text", "text": "Let me.", "format": "anthropic-claude-v1", "index": 0, "signature": "c2ln"},
        encrypted,
    ]


def test_thinking_blocks_go_back_whole_and_once() -> None:
    def delta(words: str, signature: str = "") -> dict[str, Any]:
        blocks = [{"type": "thinking", "thinking": words, "signature": signature}]
        return {
            "reasoning_content": words,
            "thinking_blocks": blocks,
            "provider_specific_fields": {"thinking_blocks": blocks, "citation": None},
        }

    assert next_turn(delta("Let "), delta("me."), delta("", "c2ln"), {"content": "Hi"}) == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "Let me.",
        "thinking_blocks": [{"type": "thinking", "thinking": "Let me.", "signature": "c2ln"}],
    }


def test_signatures_stand_where_they_stood() -> None:
    signature = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
    assert next_turn(*calls('{"a":1}', **signature))["tool_calls"] == [{**CALL, **signature}]
    assert next_turn({"content": "Hi"}, {"content": "", **signature}) == {
        "role": "assistant",
        "content": "Hi",
        **signature,
    }
    own = {"provider_specific_fields": {"thought_signature": "c2ln"}}
    assert next_turn(*calls('{"a":1}', **own))["tool_calls"] == [{**CALL, **own}]


def test_reasoning_that_came_among_the_parts_of_the_content_goes_back_there() -> None:
    def part(words: str) -> dict[str, Any]:
        return {"type": "thinking", "thinking": [{"type": "text", "text": words}]}

    message = next_turn({"content": [part("Let ")]}, {"content": [part("me.")]}, {"content": "Hi"})
    assert message == {"role": "assistant", "content": [part("Let me."), {"type": "text", "text": "Hi"}]}


def test_audio_goes_back_by_its_id() -> None:
    message = next_turn({"audio": {"id": "au_1", "data": "QUJD"}}, {"audio": {"transcript": "Hi"}})
    assert message == {"role": "assistant", "content": None, "audio": {"id": "au_1"}}


def test_what_is_output_only_does_not_go_back() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = next_turn(
        {"content": "Hi", "images": [image], "annotations": [{"type": "url_citation"}]},
        logprobs={"content": [{"token": "Hi"}]},
        native_finish_reason="end_turn",
        stop_reason=7,
        content_filter_results={"hate": {"filtered": False}},
    )
    assert message == {"role": "assistant", "content": "Hi"}


def test_custom_and_legacy_calls() -> None:
    custom = {"index": 0, "id": "call_1", "type": "custom", "custom": {"name": "f", "input": "any text"}}
    assert next_turn({"tool_calls": [custom]})["tool_calls"] == [
        {"id": "call_1", "type": "custom", "custom": {"name": "f", "input": "any text"}}
    ]
    message = next_turn({"function_call": {"name": "f", "arguments": '{"a"'}}, {"function_call": {"arguments": ":1}"}})
    assert message == {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"a":1}'},
    }


def test_the_items_of_a_response_go_back_to_the_provider_that_gave_them() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "ZW5j"}
    asked = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": '{"a":1}'}
    message = next_turn(
        {"type": "response.output_item.done", "output_index": 0, "item": reasoning},
        {"type": "response.output_item.done", "output_index": 1, "item": asked},
        {"type": "response.completed", "response": {"status": "completed", "output": []}},
        responses=True,
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
        "responses_output": {"provider": "p", "items": [reasoning, asked]},
    }


def test_what_is_not_whole_does_not_go_back() -> None:
    block = {"type": "thinking", "thinking": "a", "signature": "s"}
    torn = Choice(index=0, content="Hi", extra={"thinking_blocks": [block], "left_out": {"thinking_blocks": "why"}})
    assert result_of(torn).assistant_message() == {"role": "assistant", "content": "Hi"}
    omitted = Choice(index=0, content="Hi", extra={"responses_output": [{"omitted": "image", "bytes": 9}]})
    assert result_of(omitted).assistant_message() == {"role": "assistant", "content": "Hi"}


def test_each_choice_has_a_message() -> None:
    result = result_of(Choice(index=0, content="a"), Choice(index=2, content="b", tool_calls=[]))
    assert result.assistant_message(2)["content"] == "b"
    with pytest.raises(IndexError, match="no choice 1"):
        result.assistant_message(1)


def test_strange_extras_do_no_harm() -> None:
    call = ToolCall(id="c", name="f", arguments="{}", arguments_valid=True)
    choice = Choice(
        index=0,
        tool_calls=[call],
        extra={"reasoning_fields": "x", "left_out": 1, "audio": [], "reasoning_parts": {}, "responses_output": {}},
    )
    assert choice.left_out == {}
    assert result_of(choice).assistant_message()["tool_calls"][0]["id"] == "c"
