"""The accumulator: whatever providers send becomes one output, and its deltas add up to the same."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.results import Choice, ToolCall
from keepstream_worker.providers.accumulator import Accumulator, Limits, Output
from keepstream_worker.values import Delta
from tests.streams import check, joined


def chunk(delta: object = None, finish: object = None, **choice: object) -> dict[str, Any]:
    return {"id": "cc-1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


def call(index: object = 0, **fields: object) -> dict[str, Any]:
    """A chunk with one fragment of a tool call; name and arguments go where providers put them."""
    function = {key: fields.pop(key) for key in ("name", "arguments") if key in fields}
    fragment = {"index": index, **fields, "function": function}
    return chunk({"tool_calls": [fragment if index != "missing" else {**fields, "function": function}]})


class Stream:
    """An accumulator and the deltas it gave."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.accumulator = Accumulator(limits or Limits(), "job-1")
        self.deltas: list[Delta] = []

    def apply(self, *chunks: dict[str, Any]) -> "Stream":
        for data in chunks:
            self.accumulator.apply(json.loads(json.dumps(data)), self.deltas, len(json.dumps(data)), lenient=True)
            check(self.deltas, self.accumulator.output())
        return self

    def end(self) -> Output:
        self.accumulator.flush(self.deltas)
        check(self.deltas, self.accumulator.output())
        self.accumulator.fill_empty_arguments(self.deltas)
        output = self.accumulator.output()
        check(self.deltas, output)
        return output


def accumulate(*chunks: dict[str, Any]) -> Output:
    return Stream().apply(*chunks).end()


def choice_of(*chunks: dict[str, Any]) -> Choice:
    (choice,) = accumulate(*chunks).choices
    return choice


def calls_of(*chunks: dict[str, Any]) -> list[ToolCall]:
    return choice_of(*chunks).tool_calls


def brief(calls: list[ToolCall]) -> list[tuple[str, str, str]]:
    return [(call.id, call.name, call.arguments) for call in calls]


# -- texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "texts"),
    [
        ([{"content": "a"}, {"content": "b"}], ("ab", "", "")),
        ([{"role": "assistant", "content": None}, {"content": ""}, {}, {"content": "a"}], ("a", "", "")),
        ([{"reasoning_content": "r", "content": None}, {"content": "a"}], ("a", "r", "")),
        ([{"reasoning": "r", "channel": "analysis"}], ("", "r", "")),
        ([{"reasoning_content": "r", "reasoning": "r"}], ("", "r", "")),
        ([{"reasoning": "r", "reasoning_content": "r"}], ("", "r", "")),
        ([{"reasoning": "r", "reasoning_content": ""}], ("", "r", "")),
        ([{"reasoning": "r", "reasoning_details": [{"type": "reasoning.text", "text": "r"}]}], ("", "r", "")),
        ([{"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "r"}]}], ("", "r", "")),
        ([{"reasoning_details": [{"type": "reasoning.summary", "summary": "r"}]}], ("", "r", "")),
        ([{"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}], ("", "", "")),
        ([{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], ("ab", "", "")),
        ([{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}]}], ("", "r", "")),
        ([{"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]}], ("a", "r", "")),
        ([{"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]}]}], ("", "r", "")),
        ([{"content": ["a", {"type": "refusal", "refusal": "no"}, 7, None]}], ("a", "", "no")),
        ([{"content": {"type": "text", "text": "a"}}], ("a", "", "")),
        ([{"refusal": ""}, {"refusal": "no", "content": None}, {"refusal": "!"}], ("", "", "no!")),
        ([{"content": "<think>x</think>a"}], ("<think>x</think>a", "", "")),
        ([{"content": "a\x00b"}], ("ab", "", "")),
        ([{"content": "\x00"}], ("", "", "")),
        ([{"content": "hi \ud83d"}, {"content": "\ude00!"}], ("hi \U0001f600!", "", "")),
        ([{"content": "\ud83d"}, {"content": "x"}], ("\ufffdx", "", "")),
        ([{"content": "\ud83d"}, {"content": None}, {"content": "\ude00"}], ("\U0001f600", "", "")),
        ([{"content": "\ud83d"}, {"reasoning": "\ude00"}, {"content": "\ude00"}], ("\U0001f600", "\ufffd", "")),
        ([{"content": "\ud83d"}, {"content": "\ud83d"}, {"content": "\ude00"}], ("\ufffd\U0001f600", "", "")),
        ([{"content": "\ude00\ud83d"}], ("\ufffd\ufffd", "", "")),
        ([{"content": "\ufeffa"}], ("\ufeffa", "", "")),
        (["odd", 7, None, {"content": 7}, {"content": {"a": 1}}, {"content": [[["deep"]]]}], ("", "", "")),
    ],
)
def test_texts_come_from_wherever_providers_put_them(deltas: list[object], texts: tuple[str, str, str]):
    choice = choice_of(*(chunk(delta) for delta in deltas))
    assert (choice.content, choice.reasoning, choice.refusal) == texts


def test_a_half_surrogate_pair_is_held_back_until_its_other_half_comes():
    stream = Stream().apply(chunk({"content": "a\ud83d"}))
    assert stream.deltas == [Delta(0, {"content": "a"})]
    assert stream.accumulator.output().choices[0].content == "a"
    stream.apply(chunk({"content": "\ude00"}))
    assert stream.deltas[1:] == [Delta(0, {"content": "\U0001f600"})]


def test_a_message_is_used_where_nothing_was_streamed():
    message = {"role": "assistant", "content": "full", "reasoning_content": "r", "tool_calls": None}
    choice = choice_of(chunk(finish="stop", message=message))
    assert (choice.content, choice.reasoning) == ("full", "r")
    assert choice_of(chunk({"content": "x"}), chunk({}, "stop", message=message)).content == "x"
    assert choice_of(chunk({}, message=message), chunk({"content": "x"}, "stop")).content == "x"


def test_choices_are_kept_apart():
    def part(index: object, text: str) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"content": text}}]}

    output = accumulate(part(2, "c"), part(0, "a"), part(2, "c"), part("1", "b"), part(None, "a"), part(0.0, "a"))
    assert [(choice.index, choice.content) for choice in output.choices] == [(0, "aaa"), (1, "b"), (2, "cc")]


@pytest.mark.parametrize("index", [-1, "x", [], {}, 1.5, 2**40, "9" * 400, True])
def test_a_choice_that_cannot_be_one_is_passed_over(index: object):
    assert accumulate({"choices": [{"index": index, "delta": {"content": "x"}}, "odd", None, 7]}).choices == []


# -- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasons", "kept"),
    [
        (["stop"], "stop"),
        ([None, "stop", None], "stop"),
        (["", "stop", ""], "stop"),
        (["null", "stop"], "stop"),
        (["length", "length"], "length"),
        (["stop", "tool_calls"], "tool_calls"),
        (["", ""], None),
        (["null"], None),
        ([{}, 0, 7], None),
        (["stop", "error"], "stop"),
        (["error"], "error"),
        (["error", "stop"], "stop"),
        (["eos_token"], "eos_token"),
        (["SAFETY"], "SAFETY"),
    ],
)
def test_the_last_finish_reason_counts_and_nothing_takes_it_back(reasons: list[object], kept: str | None):
    stream = Stream().apply(*(chunk({}, reason) for reason in reasons))
    assert stream.end().choices[0].finish_reason == kept
    assert stream.accumulator.complete == (kept is not None)
    assert stream.accumulator.succeeded == (kept not in {None, "error"})


def completeness(*chunks: dict[str, Any]) -> list[bool]:
    """Whether the answer is complete after each chunk."""
    stream = Stream()
    return [stream.apply(data).accumulator.complete for data in chunks]


def test_a_stream_is_complete_only_when_every_choice_has_ended():
    second = {"choices": [{"index": 1, "delta": {"content": "x"}}]}
    end = {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}
    assert completeness({"choices": []}, chunk({"content": "x"}), chunk({}, "stop"), second, end, end) == [
        False,
        False,
        True,
        False,
        True,
        True,
    ]


def test_an_audio_answer_ends_with_its_expiry():
    chunks = [chunk({"audio": {"id": "au", "data": "AAA="}}), chunk({"audio": {"expires_at": 1_700_003_600}})]
    assert completeness(*chunks) == [False, True]
    assert choice_of(*chunks).extra == {"audio": {"id": "au", "data": "AAA=", "expires_at": 1_700_003_600}}


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "x"}},
        {"error": "x", "choices": []},
        {"choices": [{"index": 0, "delta": {}, "error": {"code": 503}}]},
        {"object": "error", "message": "x", "code": 400},
        {"type": "error", "error": {"type": "overloaded_error"}},
        {"message": "x", "code": 500, "choices": None},
        {"code": 500},
        {"success": False, "errors": [{"code": 7009}]},
        {"detail": "Not Found"},
        {"base_resp": {"status_code": 1002}, "choices": []},
        {"x_groq": {"id": "r", "error": "over_capacity"}, "choices": [{"index": 0, "delta": {}}]},
        {"x_other": {"error": {"code": 500}}, "choices": []},
        {"choices": [{"index": 0, "delta": {"content": "", "error": {"message": "x"}}}]},
        {"choices": [{"index": 0, "message": {"error": "x"}}]},
        {"choices": [], "object": "error", "message": "x"},
        {"choices": [], "type": "error", "message": "x"},
        {"choices": [], "errors": [{"message": "x"}]},
        {"choices": [], "message": "x", "code": "internal_error"},
        {"error": ["x"], "choices": []},
        {"error": True, "choices": []},
        {"error": {"code": 0, "message": "boom"}},
    ],
)
def test_an_error_is_reported_unless_the_answer_was_whole_before(error: dict[str, Any]):
    def report_after(*chunks: dict[str, Any]) -> object:
        return Stream().apply(*chunks).accumulator.apply(error, [], 1, lenient=False)

    assert report_after()
    assert report_after(chunk({"content": "x"}))
    assert report_after(chunk({"content": "x"}, "error"))
    assert report_after(chunk({"content": "x"}, "stop")) is None


@pytest.mark.parametrize(
    "data",
    [
        {"error": None, "choices": []},
        {"error": {}, "choices": [{"index": 0, "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "error": None}]},
        {"choices": []},
        {"choices": None, "usage": {"total_tokens": 1}},
        {"type": "ping"},
        {"code": 0, "message": "success"},
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"message": "", "code": None},
        {"success": True, "errors": []},
        {"error": {"message": "", "code": None, "type": ""}, "choices": [{"index": 0, "delta": {"content": "x"}}]},
        {"error": {"message": "success", "code": 0}, "choices": []},
        {"error": "null", "choices": []},
        {"error": False, "choices": []},
        {"x_groq": {"id": "r", "error": None}, "choices": []},
        {"x_groq": "odd", "choices": []},
        {"choices": [{"index": 0, "delta": {"content": "x", "error": None}}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "error": {"message": ""}}]},
        {"choices": [], "message": "filtered", "moderation": {"flagged": False}},
    ],
)
def test_what_is_no_error_is_not_reported_as_one(data: dict[str, Any]):
    assert Stream().accumulator.apply(data, [], 1, lenient=False) is None


def test_the_content_of_a_chunk_with_an_error_is_kept():
    stream = Stream()
    data = {**chunk({"content": "half"}, "error"), "error": {"code": 502}, "usage": {"total_tokens": 3}}
    assert stream.accumulator.apply(data, stream.deltas, 1, lenient=False)
    output = stream.end()
    assert output.choices[0].content == "half"
    assert output.usage == {"prompt_tokens": None, "completion_tokens": None, "total_tokens": 3}


# -- usage --------------------------------------------------------------------------------------------------


def usage_of(*reports: object) -> dict[str, Any] | None:
    usage = accumulate(*({"choices": [], "usage": report} for report in reports)).usage
    return None if usage is None else {name: value for name, value in usage.items() if value is not None}


@pytest.mark.parametrize(
    ("reports", "usage"),
    [
        ([None], None),
        (["odd", 7, [], {}], None),
        ([{"total_tokens": 5}, None], {"total_tokens": 5}),
        ([{"total_tokens": 5}, {"total_tokens": 7}], {"total_tokens": 7}),
        ([{"total_tokens": 5}, {"total_tokens": None}], {"total_tokens": 5}),
        ([{"total_tokens": 5}, {"total_tokens": 0}], {"total_tokens": 5}),
        ([{"total_tokens": 5}, {"total_tokens": "0"}], {"total_tokens": 5}),
        ([{"total_tokens": 0}], {"total_tokens": 0}),
        ([{"total_tokens": 0}, {"total_tokens": 5}], {"total_tokens": 5}),
        ([{"prompt_tokens": 5}, {"completion_tokens": 2}], {"prompt_tokens": 5, "completion_tokens": 2}),
        ([{"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 303}] * 2, "as reported"),
        ([{"prompt_tokens": "12", "completion_tokens": 3.0}], {"prompt_tokens": 12, "completion_tokens": 3}),
        ([{"prompt_tokens": "many", "total_tokens": True}], {}),
        ([{"prompt_tokens": -1, "total_tokens": 1e30}], {}),
        ([{"d": {"cached": 3}}, {"d": {"cached": 0, "audio": 0}}], {"d": {"cached": 3, "audio": 0}}),
        ([{"d": {"cached": 3}}, {"d": None}], {"d": {"cached": 3}}),
        ([{"cost": 0.25}, {"cost": 0.0}, {"is_byok": False}], {"cost": 0.25, "is_byok": False}),
    ],
)
def test_usage_is_the_newest_figure_of_each_field(reports: list[Any], usage: object):
    assert usage_of(*reports) == (reports[0] if usage == "as reported" else usage)


def test_usage_is_found_where_providers_put_it():
    def total(data: dict[str, Any]) -> object:
        return (accumulate(data).usage or {}).get("total_tokens")

    assert total({"x_groq": {"id": "r", "usage": {"total_tokens": 1}}}) == 1
    assert total({"x_groq": {"usage": {"total_tokens": 1}}, "usage": {"total_tokens": 2}}) == 2
    assert total(chunk({}, "stop", usage={"total_tokens": 3})) == 3
    assert total({**chunk({}, "stop", usage={"total_tokens": 3}), "usage": {"total_tokens": 2}}) == 2
    assert total({"x_groq": None, "choices": []}) is None


# -- tool calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "calls"),
    [
        (
            [call(id="c", name="f", arguments=""), call(arguments='{"a"'), call(arguments=":1}")],
            [("c", "f", '{"a":1}')],
        ),
        ([call(id="c", name="f", arguments="{"), call(id="c", name="f", arguments="}")], [("c", "f", "{}")]),
        ([call(id="c", name="f"), call(id="", name="", arguments="{}")], [("c", "f", "{}")]),
        ([call(id="c", name="f"), call(id="null", name=None, arguments="{}")], [("c", "f", "{}")]),
        ([call(id="a", name="f", arguments="{}"), call(id="b", name="f", arguments="{}")], "two: a b"),
        ([call(id="a", name="f"), call(id="b", arguments="{}")], [("a", "f", "{}")]),
        (
            [
                call(id="a", name="f", arguments="1"),
                call(id="b", name="g", arguments="2"),
                call(id="a", name="f", arguments="3"),
            ],
            [("a", "f", "13"), ("b", "g", "2")],
        ),
        ([call("missing", id="a", name="f", arguments="{"), call("missing", arguments="}")], [("a", "f", "{}")]),
        ([call("missing", id="a", name="f"), call("missing", id="b", name="f")], "two: a b"),
        (
            [
                call("missing", id="a", name="f"),
                call("missing", id="b", name="g"),
                call("missing", id="a", arguments="1"),
            ],
            [("a", "f", "1"), ("b", "g", "{}")],
        ),
        ([call(None, id="a", name="f", arguments="{}")], [("a", "f", "{}")]),
        ([call("0", id="a", name="f", arguments="{"), call(0, arguments="}")], [("a", "f", "{}")]),
        (
            [call(7, id="a", name="f"), call(3, id="b", name="g"), call(7, arguments="1")],
            [("a", "f", "1"), ("b", "g", "{}")],
        ),
        ([call(id="a", arguments="{"), call(name="f", arguments="}")], [("a", "f", "{}")]),
        ([call(id="a", name="get_"), call(name="weather")], [("a", "get_weather", "{}")]),
        ([call(id="a", name="get"), call(name="get_weather")], [("a", "get_weather", "{}")]),
        ([call(id="a", name="f", arguments=None)], [("a", "f", "{}")]),
        ([call(id="a", name="f", arguments=" ")], [("a", "f", " {}")]),
        ([call(id="a", name="f", arguments={})], [("a", "f", "{}")]),
        ([call(id="a", name="f", arguments={"x": 1, "s": "é"})], [("a", "f", '{"x":1,"s":"é"}')]),
        ([call(id="a", name="f", arguments={"s": "\ud83d"})], [("a", "f", '{"s":"\ufffd"}')]),
        ([call(id="a", name="f", arguments={"n": 2**70})], [("a", "f", '{"n":1180591620717411303424}')]),
        ([call(id="a", name="f", arguments='{"s":"a\\u0000b"}')], [("a", "f", '{"s":"a\\u0000b"}')]),
        ([call(id="a", name="f", arguments='"\ud83d'), call(arguments='\ude00\x00"')], [("a", "f", '"\U0001f600"')]),
        ([call(id="a", name="f", arguments='{"a": oops')], [("a", "f", '{"a": oops')]),
        ([call(id="a", name="f", arguments="{}"), call(arguments="")], [("a", "f", "{}")]),
        ([call(id=17, name="f")], [("17", "f", "{}")]),
        ([chunk({"tool_calls": {"index": 0, "id": "a", "function": {"name": "f"}}})], [("a", "f", "{}")]),
        ([chunk({"tool_calls": [None, 7, {}, {"index": 0}, {"index": 0, "function": None}]})], []),
        ([chunk({"tool_calls": "odd"}), chunk({"tool_calls": [[]]})], []),
        (
            [chunk({"tool_calls": [{"index": 0, "id": "a", "function": None}]}), call(name="f", arguments="{}")],
            [("a", "f", "{}")],
        ),
    ],
)
def test_fragments_find_their_call(chunks: list[dict[str, Any]], calls: object):
    expected = [("a", "f", "{}"), ("b", "f", "{}")] if calls == "two: a b" else calls
    assert brief(calls_of(*chunks)) == expected


W1, W2 = '{"city":"Oslo"}', '{"city":"Rome"}'


@pytest.mark.parametrize(
    ("chunks", "calls"),
    [
        # One index and no ids: a new name, or arguments that begin anew, tell the calls apart.
        ([call(name="w", arguments=W1), call(name="t", arguments="{}")], [("w", W1), ("t", "{}")]),
        ([call(name="w", arguments=W1), call(name="w", arguments=W2)], [("w", W1), ("w", W2)]),
        ([call(id="", name="w", arguments=W1), call(id="null", name="t")], [("w", W1), ("t", "{}")]),
        ([call(name="w", arguments="{}"), call(name="t", arguments="{}")], [("w", "{}"), ("t", "{}")]),
        ([call(name="w", arguments={}), call(name="t", arguments={})], [("w", "{}"), ("t", "{}")]),
        ([call(name="w"), call(name="t")], [("w", "{}"), ("t", "{}")]),
        ([call(name="get", arguments=W1), call(name="get_all", arguments=W2)], [("get", W1), ("get_all", W2)]),
        ([call(name="w", arguments='{"city":'), call(arguments='"Oslo"}'), call(name="t")], [("w", W1), ("t", "{}")]),
        (
            [call(name="w", arguments='{"city":'), call(arguments='"Oslo"}\n'), call(name="w", arguments=W2)],
            [("w", W1 + "\n"), ("w", W2)],
        ),
        ([call(None, name="w", arguments=W1), call(None, name="t", arguments=W2)], [("w", W1), ("t", W2)]),
        ([call("missing", name="w", arguments=W1), call("missing", name="w", arguments=W2)], [("w", W1), ("w", W2)]),
        (
            [
                chunk(
                    {
                        "tool_calls": [
                            {"index": 0, "function": {"name": "w", "arguments": W1}},
                            {"index": 0, "function": {"name": "t", "arguments": ""}},
                            {"index": 0, "function": {"name": "u"}},
                        ]
                    }
                )
            ],
            [("w", W1), ("t", "{}"), ("u", "{}")],
        ),
        # An id only in the first piece, in some calls, or the same for all.
        ([call(id="a", name="w", arguments=W1), call(name="t", arguments=W2)], [("w", W1), ("t", W2)]),
        ([call(id="a", name="w", arguments=W1), call(name="w", arguments=W2)], [("w", W1), ("w", W2)]),
        ([call(id="a", name="w", arguments=W1), call(id="a", name="t", arguments=W2)], [("w", W1), ("t", W2)]),
        ([call(0, id="a", name="w", arguments=W1), call(1, id="a", name="w", arguments=W2)], [("w", W1), ("w", W2)]),
        # Indexes that restart, or that count the fragments.
        (
            [call(0, name="w", arguments=W1), call(1, name="t"), call(0, name="u"), call(1, name="v")],
            [("w", W1), ("t", "{}"), ("u", "{}"), ("v", "{}")],
        ),
        ([call(0, id="a", name="w", arguments='{"city"'), call(1, id="a", arguments=':"Oslo"}')], [("w", W1)]),
        # An index that comes only later, or only at first.
        ([call("missing", id="a", name="w", arguments='{"city"'), call(0, arguments=':"Oslo"}')], [("w", W1)]),
        ([call(0, name="w", arguments='{"city"'), call("missing", arguments=':"Oslo"}')], [("w", W1)]),
        ([call("missing", name="w", arguments='{"city"'), call("missing", id="a", arguments=':"Oslo"}')], [("w", W1)]),
        # A name that is repeated with every piece is no new call.
        ([call(name="w", arguments='{"city"'), call(name="w", arguments=':"Oslo"}')], [("w", W1)]),
        (
            [call("missing", name="w", arguments='{"city"'), call("missing", name="w", arguments=':"Oslo"}')],
            [("w", W1)],
        ),
        ([call(name="w", arguments=W1), call(name="w", arguments="")], [("w", W1)]),
        ([call(name="w", arguments=W1), call(name="w", arguments=W1)], [("w", W1)]),
        # Placeholders before the first fragment, and what is sent again after the last one.
        *(
            (
                [call(id="a", name="w", arguments=held), call(arguments='{"city"'), call(arguments=':"Oslo"}')],
                [("w", W1)],
            )
            for held in ("{}", '""', "null", "None", " {} ")
        ),
        *(([call(id="a", name="w", arguments=held)], [("w", "{}")]) for held in ("{}", '""', "null", "None")),
        *(([call(id="a", name="w", arguments=W1), call(arguments=end)], [("w", W1)]) for end in ("{}", "null", '""')),
        ([call(id="a", name="w", arguments="{}"), call(name="w", arguments=W1)], [("w", W1)]),
        ([call(id="a", name="w", arguments="{}"), call(arguments="{}")], [("w", "{}")]),
        ([call(id="a", name="w", arguments=W1), call(arguments='{ "city": "Oslo" }')], [("w", W1)]),
        ([call(id="a", name="w", arguments="null"), call(arguments=",1")], [("w", "null,1")]),
        (
            [call(id="a", name="w", arguments='{"a":'), call(arguments="null"), call(arguments="}")],
            [("w", '{"a":null}')],
        ),
        (
            [call(id="a", name="w", arguments='{"a":'), call(arguments="{}"), call(arguments="}")],
            [("w", '{"a":{}}')],
        ),
        (
            [call(id="a", name="w", arguments='{"a":"}'), call(arguments="{}"), call(arguments='"}')],
            [("w", '{"a":"}{}"}')],
        ),
    ],
)
def test_calls_are_told_apart_by_whatever_differs(chunks: list[dict[str, Any]], calls: list[tuple[str, str]]):
    assert [(call.name, call.arguments) for call in calls_of(*chunks)] == calls


def test_calls_without_ids_get_different_ones():
    first, second = calls_of(call(name="w", arguments=W1), call(name="w", arguments=W2))
    assert first.id != second.id


@pytest.mark.parametrize("placeholder", ["{}", "null", "None", '""'])
def test_the_input_of_a_custom_call_is_no_placeholder(placeholder: str):
    (custom,) = calls_of(
        chunk({"tool_calls": [{"index": 0, "id": "c", "custom": {"name": "sh", "input": placeholder}}]}),
        chunk({"tool_calls": [{"index": 0, "custom": {"input": "{}"}}]}),
    )
    assert custom.arguments == placeholder + "{}"


def test_a_name_repeated_with_every_piece_costs_no_square():
    def seconds(count: int) -> float:
        accumulator = Accumulator(Limits())
        data = [call(name="w", arguments=piece) for piece in ('{"a":"', "} ", "{x")]
        start = time.process_time()
        for number in range(count):
            accumulator.apply(data[0] if not number else data[1 + number % 2], [], 100, lenient=False)
        return time.process_time() - start

    base = min(seconds(1_000) for _ in range(3))
    assert min(seconds(16_000) for _ in range(3)) < 80 * base  # 16 times the pieces; the square would be 256


def test_an_id_that_is_missing_is_made_up_once_and_for_good():
    stream = Stream().apply(call(0, id="", name="f", arguments="{"), call(1, name="g"), call(0, arguments="}"))
    first, second = (
        fragment["id"] for _, fields in stream.deltas for fragment in fields["tool_calls"] if "id" in fragment
    )
    assert first != second
    assert [call.id for call in stream.end().choices[0].tool_calls] == [first, second]
    again = accumulate(call(0, name="x"), call(1, name="y")).choices[0].tool_calls
    assert [call.id for call in again] == [first, second]


def test_an_id_that_comes_late_replaces_the_one_made_up():
    stream = Stream().apply(call(name="f", arguments="{"), call(id="c", arguments="}"))
    assert brief(stream.end().choices[0].tool_calls) == [("c", "f", "{}")]
    assert stream.deltas[-1] == Delta(0, {"tool_calls": [{"index": 0, "id": "c", "arguments": "}"}]})


def test_a_custom_call_keeps_its_input_as_it_is():
    (custom,) = calls_of(
        chunk({"tool_calls": [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "sh", "input": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "custom": {"input": "ls "}}]}),
        chunk({"tool_calls": [{"index": 0, "custom": {"input": "-l"}}]}),
    )
    assert (custom.type, custom.name, custom.arguments, custom.arguments_valid) == ("custom", "sh", "ls -l", False)


def test_a_custom_call_without_input_gets_none():
    (custom,) = calls_of(chunk({"tool_calls": [{"index": 0, "id": "c", "custom": {"name": "sh"}}]}))
    assert (custom.type, custom.arguments) == ("custom", "")


def test_the_legacy_function_call_is_a_call_of_its_own():
    calls = calls_of(
        chunk({"function_call": {"name": "f", "arguments": '{"a"'}}),
        call(0, id="c", name="g"),
        chunk({"function_call": {"arguments": ":1}"}}),
        chunk({"function_call": "odd"}),
    )
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"a":1}'), ("g", "{}")]
    assert calls[0].id
    assert calls[0].extra == {"legacy_function_call": True}


def test_what_a_provider_adds_to_a_call_is_kept():
    signature = {"google": {"thought_signature": "AAA"}}
    (first,) = calls_of(call(id="c", name="f"), call("missing", extra_content=signature))
    assert first.extra == {"extra_content": signature}


def test_calls_are_given_out_as_the_contract_says():
    stream = Stream().apply(
        call(4, id="a", name="get_", arguments=""),
        call(4, name="weather"),
        call(9, id="b", name="f", arguments="{"),
        call(4, id="a", name="get_weather", arguments="{ }"),
        call(9, arguments="}"),
    )
    assert [fields["tool_calls"] for _, fields in stream.deltas] == [
        [{"index": 0, "id": "a", "name": "get_"}],
        [{"index": 0, "name": "get_weather"}],
        [{"index": 1, "id": "b", "name": "f", "arguments": "{"}],
        [{"index": 0, "arguments": "{ }"}],
        [{"index": 1, "arguments": "}"}],
    ]


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [("{}", True), ('{"a":"\\ud83d"}', True), ("[1]", True), ("{", False), ("", True), ("oops", False)],
)
def test_arguments_are_tried_as_json(arguments: str, *, valid: bool):
    assert calls_of(call(id="c", name="f", arguments=arguments))[0].arguments_valid is valid


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    first_index=st.integers(0, 3),
)
def test_calls_sent_in_any_order_of_fragments_come_out_whole(sizes: list[int], order: Any, first_index: int):
    texts = ["".join(order.choice('{}":a1\u00e9\U0001f600') for _ in range(size)) for size in sizes]
    waiting = [
        [call(first_index + n, id=f"c{n}", name=f"f{n}"), *(call(first_index + n, arguments=part) for part in text)]
        for n, text in enumerate(texts)
    ]
    chunks: list[dict[str, Any]] = []
    appeared: list[int] = []
    while any(waiting):
        n = order.choice([n for n, left in enumerate(waiting) if left])
        if n not in appeared:
            appeared.append(n)
        chunks.append(waiting[n].pop(0))
    assert brief(calls_of(*chunks)) == [(f"c{n}", f"f{n}", texts[n] or "{}") for n in appeared]


# -- what is kept besides -----------------------------------------------------------------------------------


def test_extras_are_kept_beside_their_choice():
    citation = {"type": "url_citation", "url_citation": {"url": "https://x.test"}}
    token = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}
    choice = choice_of(
        chunk({"content": "a", "annotations": [citation]}, logprobs={"content": [token], "refusal": None}),
        chunk({"content": "a", "annotations": [citation]}, logprobs={"content": [token]}, native_finish_reason="x"),
        chunk({"reasoning_details": [{"type": "reasoning.encrypted", "data": "g"}], "channel": "final"}),
        chunk({"content": [{"type": "reference", "reference_ids": [1]}]}, logprobs=None),
    )
    assert choice.content == "aa"
    assert choice.extra == {
        "annotations": [citation],  # repeated, as some providers do
        "logprobs": {"content": [token, token], "refusal": None},
        "native_finish_reason": "x",
        "reasoning_details": [{"type": "reasoning.encrypted", "data": "g"}],
        "channel": "final",
        "content_parts": [{"type": "reference", "reference_ids": [1]}],
    }


@pytest.mark.parametrize("name", ["reasoning_text", "thinking", "thinking_content", "thought", "thoughts"])
def test_reasoning_under_another_name_is_reasoning_and_keeps_its_name(name: str):
    choice = choice_of(chunk({name: "First "}), chunk({name: "think"}), chunk({name: "."}), chunk({"content": "a"}))
    assert (choice.content, choice.reasoning) == ("a", "First think.")
    assert choice.extra == {"reasoning_fields": [name]}


def test_reasoning_under_two_names_comes_once():
    choice = choice_of(chunk({"reasoning_content": "r", "thinking": "r"}), chunk({"thinking": "s", "reasoning": "s"}))
    assert choice.reasoning == "rs"
    assert choice.extra == {"reasoning_fields": ["reasoning_content", "thinking", "reasoning"]}


def test_another_text_beside_the_reasoning_is_kept_under_its_own_name():
    choice = choice_of(chunk({"reasoning_content": "r", "thoughts": "other"}))
    assert choice.reasoning == "r"
    assert choice.extra == {"reasoning_fields": ["reasoning_content"], "thoughts": "other"}


def test_reasoning_that_is_empty_leaves_its_name():
    """A model that may think, and did not: its provider wants the empty field back."""
    choice = choice_of(chunk({"role": "assistant", "content": None, "reasoning_content": ""}), chunk({"content": "a"}))
    assert choice.extra == {"reasoning_fields": ["reasoning_content"]}
    assert choice_of(chunk({"content": "a", "reasoning_content": None})).extra is None


def test_an_unknown_text_of_a_delta_is_joined_whatever_its_name():
    choice = choice_of(
        chunk({"reasoning_opaque": "b3Bh", "x": {"sig": "AA", "type": "t", "n": 1, "deep": {"sig": "x"}}}),
        chunk({"reasoning_opaque": "cXVl", "x": {"sig": "BB", "type": "t", "n": 2, "deep": {"sig": "y"}}}),
        chunk({"reasoning_opaque": "cXVl", "plan": "ha"}),
        chunk({"reasoning_opaque": "", "plan": "\ud83d"}),
        chunk({"reasoning_opaque": None, "plan": "\ude00"}),
    )
    assert choice.extra == {
        "reasoning_opaque": "b3BhcXVlcXVl",
        "x": {"sig": "AABB", "type": "t", "n": 2, "deep": {"sig": "xy"}},
        "plan": "ha\U0001f600",
    }


def test_a_label_that_comes_with_every_delta_is_no_text():
    parts = [chunk({"content": "a", "channel": "analysis", "mode": "m", "style": {"tone": "dry"}})] * 3
    assert choice_of(*parts, chunk({"channel": "final"})).extra == {
        "channel": "final",
        "mode": "m",
        "style": {"tone": "dry"},
    }


def test_a_text_that_begins_with_repeated_pieces_keeps_them():
    assert choice_of(*(chunk({"plan": piece}) for piece in ("ha", "ha", "!", "ha"))).extra == {"plan": "haha!ha"}


@pytest.mark.parametrize(
    "delta",
    [
        {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"audio": {"data": "AA=="}},
        {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
    ],
)
def test_an_answer_without_text_is_output_as_well(delta: dict[str, Any]):
    assert Stream().apply(chunk(delta)).accumulator.has_output
    assert (
        not Stream()
        .apply(chunk({"role": "assistant", "annotations": [{"type": "url_citation"}]}))
        .accumulator.has_output
    )


def test_fields_that_are_one_once_they_can_be_stored_are_told_as_one():
    """Two names differ by a NUL, or by their place: ``check`` compares what is told with what is stored."""
    choice = choice_of(
        chunk({"plan\0": "ha", "plan": "hi", "deep": {"a\0": "x", "a": "y", "b": 1, "b\0": None}}),
        {"choices": [{"index": 0, "delta": {"logprobs": {"a": "x"}}, "logprobs": {"b": "y"}}]},
        chunk({"ends": {"a": "p\ud83d", "b": "q\ud83d"}}),
    )
    assert choice.extra == {
        "plan": "hahi",
        "deep": {"a": "xy", "b": 1},
        "logprobs": {"a": "x", "b": "y"},
        "ends": {"a": "p\N{REPLACEMENT CHARACTER}", "b": "q\N{REPLACEMENT CHARACTER}"},
    }


def test_extras_can_be_stored():
    odd = {"a\x00": "\ud83d\x00", "b": float("nan"), "c": 2**80, "d": [float("inf"), None, True]}
    assert choice_of(chunk({"odd": odd})).extra == {
        "odd": {"a": "\ufffd", "b": None, "c": None, "d": [None, None, True]}
    }


def test_the_provider_is_described_by_what_it_last_said():
    output = accumulate(
        {"id": "", "object": "", "model": "", "choices": [], "prompt_filter_results": [{"i": 1}]},
        {**chunk({"content": "a"}), "service_tier": "auto", "obfuscation": "xyz", "created": 17},
        {**chunk({}, "stop"), "service_tier": "default", "system_fingerprint": "fp", "citations": ["https://x.test"]},
    )
    assert output.provider_details == {
        "id": "cc-1",
        "model": "m",
        "created": 17,
        "service_tier": "default",
        "system_fingerprint": "fp",
        "prompt_filter_results": [{"i": 1}],
        "citations": ["https://x.test"],
    }


def test_what_later_chunks_say_of_the_provider_counts():
    usual = {"id": "cc", "object": "chat.completion.chunk", "created": 1, "model": "router"}
    text = [{"index": 0, "delta": {"content": "a"}}]

    def details(*chunks: dict[str, Any]) -> dict[str, Any] | None:
        return accumulate(*({"choices": text, **usual, **fields} for fields in chunks)).provider_details

    assert details({}, {"model": "gpt-5-real"}) == {"id": "cc", "created": 1, "model": "gpt-5-real"}
    assert details({"model": "gpt-5"}, {"model": ""}, {"model": None}) == {"id": "cc", "created": 1, "model": "gpt-5"}
    assert details({}, {"service_tier": "flex"}, {}, {}) == {**_known(usual), "service_tier": "flex"}
    assert details({}, {"system_fingerprint": "fp"}, {}) == {**_known(usual), "system_fingerprint": "fp"}
    assert details({"service_tier": "auto"}, {"service_tier": "flex"}) == {**_known(usual), "service_tier": "flex"}
    end = {"choices": [], "usage": {"total_tokens": 1}}
    assert details({"service_tier": "auto"}, {"service_tier": "flex"}, end) == {**_known(usual), "service_tier": "flex"}


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "object"}


# -- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "chunks"),
    [
        (
            Limits(max_output_bytes=5),
            [chunk({"content": "abc"}), chunk({"content": "\u20ac"}), chunk({"content": "x"})],
        ),
        (Limits(max_output_bytes=5), [chunk({"reasoning": "abc"}), chunk({"refusal": "def"})]),
        (Limits(max_output_bytes=5), [call(id="c", name="abc"), call(arguments="def")]),
        (Limits(max_output_bytes=5), [call(id="c", name="abcdef")]),
        (Limits(max_output_bytes=5), [call(id="abcdef", name="a")]),
        (Limits(max_argument_bytes=5), [call(id="c", name="f", arguments="abc"), call(arguments="def")]),
        (Limits(max_tool_calls=1), [call(0, id="a", name="f"), call(1, id="b", name="g")]),
        (Limits(max_choices=1), [chunk({}), {"choices": [{"index": 1, "delta": {"content": "x"}}]}]),
    ],
)
def test_nothing_is_added_once_a_limit_was_passed(limits: Limits, chunks: list[dict[str, Any]]):
    stream = Stream(limits).apply(*chunks[:-1])
    before = stream.accumulator.output()
    stream.apply(chunks[-1])
    assert stream.accumulator.too_large
    stream.apply(chunk({"content": "x"}), call(0, arguments="x"))
    after = stream.accumulator.output()
    assert sum(len(choice.content) for choice in after.choices) == sum(len(choice.content) for choice in before.choices)
    assert sum(len(call.arguments) for choice in after.choices for call in choice.tool_calls) <= 5


def test_output_of_just_the_limit_fits():
    stream = Stream(Limits(max_output_bytes=6)).apply(chunk({"content": "abc"}), chunk({"content": "\u20ac"}))
    assert not stream.accumulator.too_large
    assert stream.end().choices[0].content == "abc\u20ac"


def test_what_comes_too_much_after_the_answer_spoils_nothing():
    stream = Stream(Limits(max_output_bytes=3)).apply(chunk({"content": "abc"}, "stop"), chunk({"content": "d"}))
    assert not stream.accumulator.too_large
    assert stream.end().choices[0].content == "abc"


def test_extras_beyond_the_limit_are_left_out_and_their_absence_is_marked():
    data = chunk({"content": "a"}, logprobs={"content": [{"token": "a"}]})
    size = len('{"content":[{"token":"a"}]}')
    stream = Stream(Limits(max_extra_bytes=2 * size)).apply(data, data, data)
    choice = stream.end().choices[0]
    assert choice.content == "aaa"
    assert choice.extra is not None
    assert choice.extra["logprobs"] == {"content": [{"token": "a"}] * 2}
    assert list(choice.extra["left_out"]) == ["logprobs"]
    assert f"the limit of {2 * size} bytes" in choice.extra["left_out"]["logprobs"]


def test_what_is_repeated_with_every_chunk_takes_no_room():
    data = chunk({"content": "a"}, content_filter_results={"hate": {"filtered": False}})
    stream = Stream(Limits(max_extra_bytes=30)).apply(*[data] * 9)
    assert stream.end().choices[0].extra == {"content_filter_results": {"hate": {"filtered": False}}}


# -- what is kept besides, whole and once -------------------------------------------------------------------


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}


def test_an_image_that_is_repeated_counts_once():
    """In a delta, again with another one, and in the whole message at the end."""
    size = len(json.dumps([IMAGE], separators=(",", ":")))
    stream = Stream(Limits(max_extra_bytes=size + 500)).apply(
        chunk({"content": "See: ", "images": [IMAGE]}),
        chunk({"images": [IMAGE]}),
        chunk({}, "stop", message={"content": "See: ", "images": [IMAGE], "annotations": [{"n": 1}]}),
    )
    (choice,) = stream.end().choices
    assert choice.extra == {"images": [IMAGE], "annotations": [{"n": 1}]}
    parts = Stream().apply(chunk({"content": [IMAGE]}), chunk({}, "stop", message={"content": [IMAGE]}))
    assert parts.end().choices[0].extra == {"content_parts": [IMAGE]}


def test_a_bound_counts_a_fields_own_bytes():
    """What comes in the same chunk as an image of almost the limit is kept all the same."""
    large = "A" * 3_000_000
    output = accumulate(
        {
            **chunk({"content": "a", "images": [{"image_url": {"url": large}}], "annotations": [{"n": 1}]}, "stop"),
            "usage": {"prompt_tokens": 3},
            "citations": ["x"],
        },
        {**chunk({"audio": {"data": "AA=="}}), "usage": {"completion_tokens": 4}, "padding": large},
    )
    (choice,) = output.choices
    assert choice.extra == {
        "images": [{"image_url": {"url": large}}],
        "annotations": [{"n": 1}],
        "audio": {"data": "AA=="},
    }
    assert output.usage is not None
    assert (output.usage["prompt_tokens"], output.usage["completion_tokens"]) == (3, 4)
    assert output.provider_details == {
        "id": "cc-1",
        "model": "m",
        "citations": ["x"],
        "padding": {"omitted": "padding", "bytes": len(large)},
    }


def test_a_field_that_has_lost_a_piece_gets_no_more_so_that_it_has_no_gap():
    pieces = ["a" * 30, "b" * 80, "c" * 10]
    (choice,) = Stream(Limits(max_extra_bytes=60)).apply(*(chunk({"plan": p}) for p in pieces)).end().choices
    assert choice.extra is not None
    assert choice.extra["plan"] == "a" * 30
    assert choice.left_out == {
        "plan": "not whole: 80 bytes more would pass KEEPSTREAM_MAX_EXTRA_BYTES, the limit of 60 bytes"
    }


def test_a_calls_extras_are_bounded_as_well():
    signature = {"google": {"thought_signature": "x" * 100}}
    stream = Stream(Limits(max_extra_bytes=60)).apply(call(id="c", name="f", arguments="{}", extra_content=signature))
    (choice,) = stream.end().choices
    assert choice.tool_calls[0].extra is None
    assert list(choice.left_out) == ["tool_calls[0]"]


def test_sounds_of_silence_are_no_label():
    pieces = [chunk({"audio": {"data": "AAAA"}})] * 3
    assert choice_of(*pieces).extra == {"audio": {"data": "AAAAAAAAAAAA"}}


def test_a_verdict_that_changes_counts_as_it_is_last_and_is_told_once():
    def verdict(severity: str) -> dict[str, Any]:
        return chunk({"content": "a"}, content_filter_results={"hate": {"filtered": False, "severity": severity}})

    stream = Stream().apply(verdict("safe"), verdict("safe"), verdict("low"))
    assert not [delta for delta in stream.deltas if "extra" in delta.fields]
    (choice,) = stream.end().choices
    assert choice.extra == {"content_filter_results": {"hate": {"filtered": False, "severity": "low"}}}
    assert [delta.fields["extra"] for delta in stream.deltas if "extra" in delta.fields] == [choice.extra]


def test_a_verdict_that_comes_in_parts_takes_the_room_of_the_whole():
    parts = [{"hate": {"filtered": False}}, {"violence": {"filtered": False}}] * 50
    stream = Stream(Limits(max_extra_bytes=120))
    stream.apply(*(chunk({"content": "a"}, content_filter_results=part) for part in parts))
    stream.apply(chunk({"plan": "x" * 100}))
    (choice,) = stream.end().choices
    assert choice.extra is not None
    assert choice.extra["content_filter_results"] == parts[0] | parts[1]
    assert list(choice.left_out) == ["plan"]


def test_a_list_that_is_sent_from_its_beginning_with_every_chunk_counts_once():
    annotations = [{"type": "url_citation", "n": n} for n in range(30)]
    choice = choice_of(*(chunk({"annotations": annotations[: n + 1]}) for n in range(30)))
    assert choice.extra == {"annotations": annotations}


def test_extras_travel_with_the_text_of_their_chunk():
    token = {"token": "a", "logprob": -0.1}
    stream = Stream().apply(chunk({"content": "a"}, logprobs={"content": [token]}))
    assert stream.deltas == [Delta(0, {"content": "a", "extra": {"logprobs": {"content": [token]}}})]


def test_followers_are_told_the_size_of_what_is_too_large_for_them():
    stream = Stream(Limits(live_extra_bytes=100)).apply(chunk({"images": [IMAGE, {"n": 1}]}))
    size = len(json.dumps(IMAGE, separators=(",", ":")))
    assert stream.deltas == [Delta(0, {"extra": {"images": [{"omitted": "image", "bytes": size}, {"n": 1}]}})]
    assert stream.end().choices[0].extra == {"images": [IMAGE, {"n": 1}]}


def test_a_whole_message_fills_in_what_the_deltas_did_not_have():
    whole: dict[str, Any] = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm", "audio": {"id": "au_1"}}
    whole["tool_calls"] = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    choice = choice_of(chunk({"content": "Hi"}), chunk({}, "stop", message=whole))
    assert (choice.content, choice.reasoning) == ("Hi", "Hm")
    assert [made.id for made in choice.tool_calls] == ["c"]
    assert choice.extra == {"audio": {"id": "au_1"}, "reasoning_fields": ["reasoning_content"]}


def test_the_type_and_the_extras_of_a_call_reach_followers():
    stream = Stream().apply(
        chunk({"tool_calls": [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]}),
        chunk({"tool_calls": [{"index": 0, "extra_content": {"google": {"thought_signature": "s"}}}]}),
    )
    (made,) = stream.end().choices[0].tool_calls  # that the deltas say the same is checked with each chunk
    assert (made.type, made.extra) == ("custom", {"extra_content": {"google": {"thought_signature": "s"}}})


def test_arguments_nested_without_end_leave_the_deltas_true():
    arguments: Any = {}
    for _ in range(5_000):
        arguments = {"a": arguments}
    stream = Stream()
    data = chunk({"content": "x", "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": arguments}}]})
    with pytest.raises(RecursionError):
        stream.accumulator.apply(data, stream.deltas, 1, lenient=False)
    assert joined(stream.deltas)[0]["content"] == stream.end().choices[0].content == "x"


def test_the_thousandth_delta_costs_no_more_than_the_first():
    def seconds(count: int) -> float:
        accumulator = Accumulator(Limits())
        deltas: list[Delta] = []
        data = chunk({"content": "word "})
        start = time.process_time()
        for _ in range(count):
            accumulator.apply(data, deltas, 100, lenient=False)
        assert len(accumulator.output().choices[0].content) == 5 * count
        return time.process_time() - start

    base = min(seconds(2_000) for _ in range(3))
    assert min(seconds(32_000) for _ in range(3)) < 80 * base  # 16 times the deltas; the square would be 256
