"""The stream reader: how it reads each known stream, the same however its bytes are split."""

import json
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from keepstream.errors import ErrorCode
from keepstream_worker.jobs.retry import is_retryable
from keepstream_worker.providers.failures import failure_from_response
from keepstream_worker.providers.sse import SSEDecoder
from keepstream_worker.providers.stream import Limits, StreamReader
from keepstream_worker.values import Failure
from tests.fuzz import fuzz_stream
from tests.streams import CAUSES, FILES, Case, load_cases, play

CASES = [case for dialect in FILES for case in load_cases(dialect)]
STREAMS = [case for case in CASES if case.http_status == 200]
REFUSALS = [case for case in CASES if case.http_status not in {0, 200}]
CONNECTION = CAUSES["reset"]
TIMEOUT = CAUSES["stall"]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def outcome(failure: Failure | None) -> str:
    if failure is None:
        return "completed"
    return "retry" if is_retryable(failure) else "fail"


def data(*chunks: object) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def text(content: str, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": content}, "finish_reason": finish}]}


DONE = b"data: [DONE]\n\n"
USAGE = {"choices": [], "usage": {"total_tokens": 5}}


# -- all cases ----------------------------------------------------------------------------------------------


@named(STREAMS)
def test_a_known_stream_comes_out_as_expected(case: Case):
    played = play(case.chunks, case.cause, responses=case.responses)
    expect = case.expect
    assert outcome(played.failure) == expect["outcome"]
    if "error_code" in expect:
        assert played.failure is not None
        assert played.failure.code == expect["error_code"]
    choice = played.output.choices[0] if played.output.choices else None
    for name in ("content", "reasoning", "refusal", "finish_reason"):
        if name in expect:
            assert getattr(choice, name) == expect[name]
    if "usage" in expect:
        assert played.output.usage is not None
        assert {name: played.output.usage[name] for name in expect["usage"]} == expect["usage"]
    if "tool_calls" in expect:
        assert choice is not None
        got = [
            {"index": index, "id": call.id, "name": call.name, "arguments": call.arguments}
            for index, call in enumerate(choice.tool_calls)
        ]
        assert [
            {key: given.get(key, was[key]) for key in was} for given, was in zip(expect["tool_calls"], got, strict=True)
        ] == got
        assert all(call["id"] for call in got)


@named(REFUSALS)
def test_a_known_refusal_comes_out_as_expected(case: Case):
    failure = failure_from_response(case.http_status, case.headers, case.body)
    assert outcome(failure) == case.expect["outcome"]
    assert failure.code == case.expect.get("error_code", failure.code)


def cuts(body: bytes, step: int = 1) -> Iterator[tuple[bytes, bytes]]:
    """Every cut of a usual body, or each ``step``-th; of a very large one those near its ends and some between."""
    places: Sequence[int] = range(0, len(body), step)
    if len(body) > 10_000:
        places = sorted({*range(300), *range(300, len(body) - 600, 30_011), *range(len(body) - 600, len(body))})
    for place in places:
        yield body[:place], body[place:]


def step_of(case: Case) -> int:
    return 17 if case.responses else 1  # events of that API are long, and the same code finds them in the bytes


@named(STREAMS)
def test_cuts_change_nothing(case: Case):
    responses = case.responses
    expected = play(case.chunks, case.cause, responses=responses).seen()
    assert play([case.body], case.cause, responses=responses).seen() == expected
    one_by_one = (case.body[i : i + 1] for i in range(len(case.body)))
    assert play(one_by_one, case.cause, responses=responses).seen() == expected
    for pieces in cuts(case.body, step_of(case)):
        assert play(pieces, case.cause, responses=responses).seen() == expected


@given(number=st.integers(0, len(STREAMS) - 1), seed=st.integers(0, 2**32))
def test_random_cuts_change_nothing(number: int, seed: int):
    case = STREAMS[number]
    expected = play(case.chunks, case.cause, responses=case.responses).seen()
    pieces = fuzz_stream.pieces(case.body, random.Random(seed))
    assert play(pieces, case.cause, responses=case.responses).seen() == expected


@named([case for case in STREAMS if case.expect["outcome"] == "completed"])
def test_a_whole_answer_cut_short_is_never_wrong_and_complete(case: Case):
    """Whatever is missing at the end: either the attempt fails, or nothing of the output is missing."""
    whole = play(case.chunks, case.cause, responses=case.responses).output
    for beginning, _ in cuts(case.body, step_of(case)):
        played = play([beginning], CONNECTION, responses=case.responses)
        if played.failure is None:
            texts = [(c.content, c.reasoning, c.refusal, c.tool_calls) for c in played.output.choices]
            known = [(c.content, c.reasoning, c.refusal, c.tool_calls) for c in whole.choices]
            assert texts == known[: len(texts)]


# -- the failure --------------------------------------------------------------------------------------------

WHOLE = data(text("a"), text("", "stop"))


@pytest.mark.parametrize(
    ("body", "cause", "code"),
    [
        (WHOLE, None, None),
        (WHOLE, CONNECTION, None),
        (WHOLE, TIMEOUT, None),
        (WHOLE + b'data: {"cho', CONNECTION, None),
        (WHOLE + b"data: {oops\n\n" + data(USAGE), None, None),
        (WHOLE + b"data: \xff\n\n", None, None),
        (WHOLE + data({"error": {"code": 500}}) + DONE, None, None),
        (WHOLE + b"event: error\ndata: down\n\n", None, None),
        (WHOLE + data(text("", "error")), None, None),
        (WHOLE + b'data: "[DONE]"\n\ndata: [done]\n\n', None, None),
        (WHOLE + DONE + DONE + data(text("more")), None, None),
        (data(text("a")) + b"data: [DONE]", None, None),
        (data(text("a")) + b"data:  [DONE] \n\n", None, None),
        (data(text("a")) + DONE, CONNECTION, None),
        (data(text("a", "stop"), text("b", "stop", 1)), None, None),
        (data(text("a", "stop"), text("b", None, 1)), None, ErrorCode.TRUNCATED_STREAM),
        (data(text("a", "stop"), text("b", None, 1)), CONNECTION, ErrorCode.CONNECTION),
        (data(text("a", "stop"), text("b", None, 1)) + b"data: {oops\n\n", None, ErrorCode.INVALID_STREAM),
        (data(text("a", "stop"), text("b", "abort", 1)) + DONE, None, ErrorCode.PROVIDER_ERROR),
        (data(text("a", "stop"), text("b", None, 1)) + DONE, None, None),
        (data(text("", "stop")), None, None),
        (data(text("a", "content_filter")), None, None),
        (data(text("a")), None, ErrorCode.TRUNCATED_STREAM),
        (data(text("a")), CONNECTION, ErrorCode.CONNECTION),
        (data(text("a")), TIMEOUT, ErrorCode.TIMEOUT),
        (data(text("a"), text("b"))[:-9], None, ErrorCode.TRUNCATED_STREAM),
        (data(text("a", "stop"))[:-2], None, None),
        (data(text("a")) + b"data: upstream timeout\n\n" + data(text("", "stop")), None, ErrorCode.INVALID_STREAM),
        (data(text("a")) + b'data: {"choices":[]}{"choices":[]}\n\n', None, ErrorCode.INVALID_STREAM),
        (data(text("a")) + b"data: " + data(text("b", "stop")), None, ErrorCode.INVALID_STREAM),
        (data(text("a")) + b"data: {}\n" + data(text("b", "stop")), None, ErrorCode.INVALID_STREAM),
        (data(text("a")) + b"data: [done]\n\n", None, ErrorCode.INVALID_STREAM),
        (data(text("a")) + b'data: "[DONE]"\n\n', None, ErrorCode.TRUNCATED_STREAM),
        (b"data: " + b"[" * 100_000 + b"]" * 100_000 + b"\n\n" + WHOLE, None, ErrorCode.INVALID_STREAM),
        (b'data: {"choices":[],"n":' + b"9" * 5000 + b"}\n\n" + WHOLE, None, ErrorCode.INVALID_STREAM),
        (data(text("", "error")), None, ErrorCode.PROVIDER_ERROR),
        (data(text("", "error")), CONNECTION, ErrorCode.PROVIDER_ERROR),
        (data(text("a", "network_error")) + DONE, None, ErrorCode.PROVIDER_ERROR),
        (data(text("a", "error"), {"error": {"code": 503}}), None, ErrorCode.OVERLOADED),
        (data({**text("a", "error"), "error": {"code": 502, "message": "x"}}), None, ErrorCode.SERVER_ERROR),
        (data({**text("a", "stop"), "error": {"code": 502, "message": "x"}}), None, ErrorCode.SERVER_ERROR),
        (data(text("a"), {"error": {"type": "invalid_request_error"}}), None, ErrorCode.BAD_REQUEST),
        (data(text("a"), [{"error": {"code": 429}}]), None, ErrorCode.RATE_LIMITED),
        (data([text("a"), text("b", "stop")]), None, None),
        (data(text("a")) + b"event: error\ndata: upstream failed\n\n", None, ErrorCode.PROVIDER_ERROR),
        (data(text("a")) + b'event: error\ndata: {"message":"x","code":500}\n\n', None, ErrorCode.SERVER_ERROR),
        (b"event: ping\ndata: 12:00:00 pm\n\n" + WHOLE, None, None),
        (data({"type": "ping"}, None, [], 17, "x") + WHOLE, None, None),
        (b"data: \n\ndata\n\nretry: 3\n\n" + WHOLE, None, None),
        (b"", None, ErrorCode.EMPTY_STREAM),
        (b"", CONNECTION, ErrorCode.CONNECTION),
        (b"\n\n", None, ErrorCode.EMPTY_STREAM),
        (b": comment\n\n", None, ErrorCode.EMPTY_STREAM),
        (data({}, None), None, ErrorCode.EMPTY_STREAM),
        (DONE, None, ErrorCode.EMPTY_STREAM),
        (data(text("")) + DONE, None, ErrorCode.EMPTY_STREAM),
        (data(USAGE) + DONE, None, ErrorCode.EMPTY_STREAM),
        (data(text("")), None, ErrorCode.TRUNCATED_STREAM),
        (data({"choices": [{"delta": {"reasoning": "r"}}]}) + DONE, None, None),
        (data({"choices": [{"delta": {"audio": {"data": "AA"}}}]}) + DONE, None, None),
        (data({"choices": [{"delta": {"images": [{"type": "image_url"}]}}]}) + DONE, None, None),
        (data(text("a"), {"x_groq": {"error": "over_capacity"}, "choices": []}) + DONE, None, ErrorCode.OVERLOADED),
        (data(text("a"), {"x_groq": {"error": {"code": 503}}, "choices": []}) + DONE, None, ErrorCode.OVERLOADED),
        (data(text("a", "stop"), {"x_groq": {"error": "over_capacity"}, "choices": []}), None, None),
        (data(text("a"), {"error": "insufficient_quota"}) + DONE, None, ErrorCode.INSUFFICIENT_QUOTA),
        (b'error: {"code":500}\n\n' + DONE, None, ErrorCode.EMPTY_STREAM),
        (data(text("a")) + b'error: {"code":500}\n\n' + DONE, None, ErrorCode.SERVER_ERROR),
        (WHOLE + b'error: {"code":500}\n\n' + DONE, None, None),
        (data(text("a")) + DONE + b'error: {"code":500}\n\n', None, None),
        (b"<!DOCTYPE html><p>Hello", None, ErrorCode.INVALID_RESPONSE),
        (b" \r\n<html>", TIMEOUT, ErrorCode.INVALID_RESPONSE),
        (b"upstream connect error", None, ErrorCode.INVALID_RESPONSE),
        (b"upstream connect error", CONNECTION, ErrorCode.CONNECTION),
        (b"\x1f\x8b\x08\x00junk", None, ErrorCode.INVALID_RESPONSE),
    ],
)
def test_the_failure(body: bytes, cause: Failure | None, code: ErrorCode | None):
    played = play([body], cause)
    assert (played.failure and played.failure.code) == code
    assert play((body[i : i + 1] for i in range(len(body))), cause).seen() == played.seen()


def test_an_answer_with_deeply_nested_arguments_is_read_or_refused_but_never_shortened():
    arguments = b'{"a":' * 900 + b"1" + b"}" * 900
    call = b'{"index":0,"id":"c","function":{"name":"f","arguments":' + arguments + b"}}"
    answer = b'{"choices":[{"message":{"content":"x","tool_calls":[' + call + b']},"finish_reason":"stop"}]}'
    for body in (answer, b"data: " + answer.replace(b"message", b"delta") + b"\n\n"):
        played = play([body])
        if played.failure is None:
            assert played.output.choices[0].tool_calls[0].arguments == arguments.decode()
        else:
            assert played.failure.code == ErrorCode.INVALID_STREAM


MESSAGE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "full"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("answer", "cause", "code", "content"),
    [
        (json.dumps(MESSAGE), None, None, "full"),
        (json.dumps(MESSAGE, indent=2), None, None, "full"),
        ("\ufeff\r\n " + json.dumps(MESSAGE) + "\n", None, None, "full"),
        (json.dumps(MESSAGE), TIMEOUT, None, "full"),
        (json.dumps(MESSAGE).replace('"stop"', "null"), None, None, "full"),
        (json.dumps(MESSAGE).replace("full", "fu\\ud83dll"), None, None, "fu\ufffdll"),
        (json.dumps(MESSAGE)[:-4], None, ErrorCode.INVALID_STREAM, None),
        (json.dumps(MESSAGE)[:-4], CONNECTION, ErrorCode.CONNECTION, None),
        ('{"choices":[]}', None, ErrorCode.EMPTY_STREAM, None),
        ('{"error":{"code":429,"message":"slow down"}}', None, ErrorCode.RATE_LIMITED, None),
        ('[{"error":{"code":503}}]', None, ErrorCode.OVERLOADED, None),
        ('{"detail":"Not Found"}', None, ErrorCode.PROVIDER_ERROR, None),
        ('{"status":"ok"}', None, ErrorCode.INVALID_RESPONSE, None),
        ("[1, 2]", None, ErrorCode.INVALID_RESPONSE, None),
        ("[" * 100_000, None, ErrorCode.INVALID_STREAM, None),
    ],
)
def test_a_json_body_is_read_as_one_answer(
    answer: str, cause: Failure | None, code: ErrorCode | None, content: str | None
):
    for done_completes in (True, False):
        played = play([answer.encode()], cause, done_completes=done_completes)
        assert (played.failure and played.failure.code) == code
        assert [choice.content for choice in played.output.choices] == ([content] if content else [])


def test_done_without_a_finish_reason_completes_only_where_that_is_the_custom():
    body = data(text("a")) + DONE
    assert play([body]).failure is None
    failure = play([body], done_completes=False).failure
    assert failure is not None
    assert failure.code == ErrorCode.TRUNCATED_STREAM
    assert play([WHOLE + DONE], done_completes=False).failure is None


def test_calls_of_a_failed_attempt_get_no_arguments_made_up():
    call = {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]}}]}
    assert play([data(call)]).output.choices[0].tool_calls[0].arguments == ""
    assert play([data(call, text("", "tool_calls"))]).output.choices[0].tool_calls[0].arguments == "{}"


def test_the_reader_tells_what_it_has_seen():
    reader = StreamReader(expected_choices=2)
    reader.feed(b": comment\n\nevent: ping\ndata: {}\n\n")
    assert not reader.saw_data
    reader.feed(data(text("a", "stop")))
    assert reader.data_events == 1
    assert not reader.complete
    reader.feed(data(text("b", "stop", 1)))
    assert reader.complete
    assert not reader.done
    reader.feed(DONE)
    assert reader.done
    assert reader.finish() is None


@pytest.mark.parametrize("body", [b"data: {oops\n\n", data({"error": "x"}), b"<html>", data(text("x" * 500))])
def test_reading_stops_when_nothing_can_help(body: bytes):
    reader = StreamReader(Limits(max_output_bytes=100))
    assert not reader.done
    reader.feed(body)
    assert reader.done
    assert reader.feed(WHOLE) == []
    assert reader.finish() is not None


@pytest.mark.parametrize(
    "body",
    [data(text("a"), text("x" * 600), text("", "stop")), data(text("x" * 600, "stop")), b"{" + b" " * 2000 + b"}"],
)
@pytest.mark.parametrize("limits", [Limits(max_output_bytes=500, max_event_bytes=1000), Limits(max_event_bytes=500)])
def test_an_answer_above_a_limit_fails_at_every_cut(body: bytes, limits: Limits):
    for pieces in ([body], *cuts(body)):
        failure = play(pieces, limits=limits).failure
        assert failure is not None
        assert failure.code == ErrorCode.OUTPUT_TOO_LARGE


def test_what_is_no_stream_is_named_by_its_media_type():
    reader = StreamReader(content_type="text/html; charset=utf-8")
    reader.feed(b"<html>")
    failure = reader.finish()
    assert failure is not None
    assert "text/html" in failure.message


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_exception(body: bytes):
    play([body])
    play([b"data: " + body + b"\n\n", DONE])


# -- the SDK's own accumulator --------------------------------------------------------------------------------

#: Where the SDK's accumulator comes to another result than ours, and why ours is kept.
SDK_DIFFERS = {
    "delta_null": "it fails on a null delta",
    "choices_key_missing_usage_only": "it fails on a chunk without choices",
    "event_ping_empty_object": "it fails on a chunk without choices",
    "data_null_event": "it fails on null",
    "emoji_split_over_two_deltas": "it leaves the halves of a surrogate pair apart: the text cannot be encoded",
    "finish_reason_empty_string_throughout": "it takes an empty finish reason for one",
    "invalid_json_after_finish_reason": "it gives up a whole answer for what follows it",
    "json_completion_despite_stream": "it reads event streams only",
    "usage_inside_choice_moonshot": "it looks for usage in one place only",
    "usage_x_groq_only": "it looks for usage in one place only",
    "content_list_thinking_mistral": "it fails on content in parts",
    "tool_id_and_name_repeated": "it joins repeated ids and names",
    "tool_id_literal_null_string": "it joins ids",
    "tool_id_missing_everywhere": "it leaves a call without an id",
    "tool_ids_empty_parallel": "it leaves calls without ids",
    "tool_index_missing_argument_fragments": "it fails without an index",
    "tool_index_missing_two_calls_in_two_chunks": "it fails without an index",
    "tool_index_null": "it fails without an index",
    "tool_index_starts_at_one": "it takes the index for a position",
    "tool_arguments_object": "it gives arguments that are no text",
    "tool_arguments_null_no_args": "it gives no arguments instead of an empty object",
    "tool_function_null_then_filled": "it fails on a call whose function comes later",
    "custom_tool_call": "it fails on custom calls",
    "choice_index_missing": "it fails without an index",
    "gemini_same_index_no_id_two_tools": "it takes two calls with one index for one",
    "anthropic_bridge_empty_object_before_fragments": "it takes a placeholder for arguments",
    "opencodex_full_arguments_sent_twice": "it joins arguments that are sent twice",
}


def sdk_result(case: Case) -> object:
    state: Any = ChatCompletionStreamState()
    decoder = SSEDecoder()
    for payload, _ in decoder.feed(case.body) + decoder.finish():
        if payload.strip() == b"[DONE]":
            break
        state.handle_chunk(construct_type(type_=ChatCompletionChunk, value=json.loads(payload)))
    completion = state.current_completion_snapshot
    return [
        (
            choice.index,
            choice.message.content or "",
            choice.message.refusal or "",
            choice.finish_reason,
            [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
        )
        for choice in sorted(completion.choices, key=lambda choice: choice.index)
    ], completion.usage.model_dump(exclude_unset=True) if completion.usage else None


def our_result(case: Case) -> object:
    output = play(case.chunks, case.cause).output
    return [
        (
            choice.index,
            choice.content,
            choice.refusal,
            choice.finish_reason,
            [(call.id, call.name, call.arguments) for call in choice.tool_calls],
        )
        for choice in output.choices
    ], output.usage


@named([case for case in STREAMS if case.expect["outcome"] == "completed" and not case.responses and not case.hard])
def test_the_sdk_comes_to_the_same_result_where_it_is_right(case: Case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDK warns of what its models were not made for
        try:
            theirs = sdk_result(case)
        except Exception as error:  # noqa: BLE001 -- it fails in many ways, and each counts as another result
            theirs = error
    if case.name in SDK_DIFFERS:
        assert theirs != our_result(case)
    else:
        assert theirs == our_result(case)


# -- fuzzing --------------------------------------------------------------------------------------------------


def test_a_short_run_of_the_fuzzer_finds_nothing(capsys: pytest.CaptureFixture[str]):
    assert fuzz_stream.main(["--inputs", "1000", "--seed", "1"]) == 0
    told = capsys.readouterr().out
    assert [f"{dialect}: 1000 inputs" in told for dialect in FILES] == [True, True]
