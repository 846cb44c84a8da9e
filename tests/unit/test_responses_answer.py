"""The events of the Responses API, from servers that agree on nothing: one output, equal to the deltas joined."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstream.next_turn import ITEMS_FIELD
from keepstream.results import Choice
from keepstream_worker.providers.accumulator import Limits
from keepstream_worker.providers.dialects.responses_answer import ResponsesAccumulator
from keepstream_worker.values import Delta
from tests import streams
from tests.streams import check


def play(*events: dict[str, Any], limits: Limits | None = None) -> tuple[ResponsesAccumulator, list[Delta], object]:
    """Apply events as the stream reader does, and return the error that stopped it, if any."""
    answer = ResponsesAccumulator(limits or Limits(), "job")
    deltas: list[Delta] = []
    error: object = None
    for event in events:
        error = answer.apply(event, deltas, len(json.dumps(event)), lenient=True)
        if error is not None or answer.ended:
            break
    answer.flush(deltas)
    if answer.complete:
        answer.fill_empty_arguments(deltas)
    check(deltas, answer.output())
    return answer, deltas, error


def choice_of(*events: dict[str, Any]) -> Choice:
    answer, deltas, error = play(*events)
    assert error is None
    (choice,) = answer.output().choices
    assert joined(deltas) == texts_of(choice)
    return choice


def joined(deltas: list[Delta]) -> dict[str, Any]:
    """Put deltas together as a follower does."""
    held: dict[str, Any] = {"content": "", "reasoning": "", "refusal": "", "tool_calls": {}}
    for delta in deltas:
        for name, value in delta.fields.items():
            if name == "extra":
                continue
            if name != "tool_calls":
                held[name] += value
                continue
            for part in value:
                call = held["tool_calls"].setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                for key in call:
                    call[key] += part.get(key, "")
    return held


def texts_of(choice: Choice) -> dict[str, Any]:
    return {
        "content": choice.content,
        "reasoning": choice.reasoning,
        "refusal": choice.refusal,
        "tool_calls": {
            position: {"id": call.id, "name": call.name, "arguments": call.arguments}
            for position, call in enumerate(choice.tool_calls)
        },
    }


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


def completed(*items: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return event("completed", response={"status": "completed", "output": list(items), **fields})


def message(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "output_text", "text": text} for text in texts], **fields}


def call(call_id: str = "call_1", arguments: str = "", name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **fields}


def text(delta: str, **fields: Any) -> dict[str, Any]:
    return event("output_text.delta", delta=delta, **fields)


def arguments(delta: str, **fields: Any) -> dict[str, Any]:
    return event("function_call_arguments.delta", delta=delta, **fields)


# -- whole texts only fill ------------------------------------------------------------------------


def test_a_text_that_comes_five_times_is_there_once() -> None:
    assert (
        choice_of(
            event("output_item.added", output_index=0, item=message("Hello")),
            event("content_part.added", output_index=0, content_index=0, part={"type": "output_text", "text": "Hello"}),
            text("Hel", output_index=0, content_index=0),
            text("lo", output_index=0, content_index=0),
            event("output_text.done", output_index=0, content_index=0, text="Hello"),
            event("content_part.done", output_index=0, content_index=0, part={"type": "output_text", "text": "Hello"}),
            event("output_item.done", output_index=0, item=message("Hello")),
            completed(message("Hello")),
        ).content
        == "Hello"
    )


def test_a_part_that_is_streamed_without_its_index_is_not_repeated_by_the_whole_item() -> None:
    assert (
        choice_of(text("A"), text("B"), event("output_item.done", item=message("A", "B")), completed()).content == "AB"
    )


def test_what_was_published_counts_when_a_whole_text_contradicts_it() -> None:
    assert (
        choice_of(text("Hullo"), event("output_text.done", text="Hello"), completed(message("Hello"))).content
        == "Hullo"
    )


def test_a_whole_text_fills_in_what_the_deltas_lack() -> None:
    assert choice_of(text("Hel"), completed(message("Hello"))).content == "Hello"
    assert choice_of(completed(message("Hello"), call(arguments='{"a":1}'))).content == "Hello"


def test_two_messages_are_joined_without_anything_between() -> None:
    assert (
        choice_of(
            event("output_item.done", output_index=0, item=message("One.")),
            event("output_item.done", output_index=1, item=message("Two.")),
            completed(),
        ).content
        == "One.Two."
    )


def test_halves_of_a_surrogate_pair_meet_across_deltas_and_nul_is_dropped() -> None:
    assert choice_of(text("a\ud83c"), text("\udf0ab\x00"), completed(message("a\N{WATER WAVE}b\x00"))).content == (
        "a\N{WATER WAVE}b"
    )


# -- reasoning ------------------------------------------------------------------------------------


def test_parts_and_items_of_reasoning_are_parted_by_a_blank_line() -> None:
    def summary(item: int, part: int, delta: str) -> dict[str, Any]:
        return event("reasoning_summary_text.delta", output_index=item, summary_index=part, delta=delta)

    reasoned = choice_of(
        summary(0, 0, "One"),
        summary(0, 0, "."),
        summary(0, 1, "Two."),
        event(
            "output_item.done",
            output_index=0,
            item={"type": "reasoning", "summary": [{"text": "One."}, {"text": "Two."}]},
        ),
        summary(1, 0, "Three."),
        completed(),
    )
    assert reasoned.reasoning == "One.\n\nTwo.\n\nThree."


def test_of_summary_and_text_of_one_item_the_first_to_speak_is_taken() -> None:
    reasoned = choice_of(
        event("reasoning_text.delta", output_index=0, delta="In full."),
        event("reasoning_summary_text.delta", output_index=0, delta="In short."),
        event(
            "output_item.done",
            output_index=0,
            item={"type": "reasoning", "summary": [{"text": "In short."}], "content": [{"text": "In full. Yes."}]},
        ),
        completed(),
    )
    assert reasoned.reasoning == "In full. Yes."


def test_commentary_is_reasoning_so_that_the_content_is_the_answer() -> None:
    spoken = choice_of(
        event("reasoning_text.delta", output_index=0, delta="Hm."),
        event("output_item.added", output_index=1, item=message(phase="commentary")),
        text("I will look.", output_index=1),
        event("output_item.done", output_index=1, item=message("I will look.", phase="commentary")),
        event("output_item.added", output_index=2, item=message(phase="final_answer")),
        text("{}", output_index=2),
        completed(),
    )
    assert (spoken.reasoning, spoken.content) == ("Hm.\n\nI will look.", "{}")


def test_a_refusal_may_come_in_pieces_or_whole() -> None:
    refused = {"type": "message", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    assert choice_of(event("refusal.delta", delta="I can"), completed(refused)).refusal == "I cannot."
    assert choice_of(event("output_item.done", item=refused), completed(refused)).refusal == "I cannot."


# -- which item an event belongs to ---------------------------------------------------------------


def calls_of(*events: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(made.id, made.name, made.arguments) for made in choice_of(*events).tool_calls]


def test_ids_that_change_with_every_event() -> None:
    assert calls_of(
        event("output_item.added", output_index=0, item=call(id="x1")),
        arguments('{"a"', output_index=0, item_id="x2"),
        arguments(":1}", output_index=0, item_id="x3"),
        event("output_item.done", output_index=0, item=call(arguments='{"a":1}', id="x4")),
        completed(call(arguments='{"a":1}', id="x5")),
    ) == [("call_1", "f", '{"a":1}')]


def test_an_index_that_is_always_0() -> None:
    assert calls_of(
        event("output_item.added", output_index=0, item=call("call_1", id="a")),
        arguments("[1]", output_index=0, item_id="a"),
        event("output_item.added", output_index=0, item=call("call_2", id="b")),
        arguments("[2]", output_index=0, item_id="b"),
        event("output_item.done", output_index=0, item=call("call_1", "[1]", id="a")),
        event("output_item.done", output_index=0, item=call("call_2", "[2]", id="b")),
        completed(),
    ) == [("call_1", "f", "[1]"), ("call_2", "f", "[2]")]


def test_no_index_and_no_id() -> None:
    assert calls_of(
        event("output_item.added", item=call("call_1")),
        arguments("[1]"),
        event("output_item.done", item=call("call_1", "[1]")),
        event("output_item.added", item=call("call_2")),
        arguments("[2]"),
        completed(),
    ) == [("call_1", "f", "[1]"), ("call_2", "f", "[2]")]


def test_arguments_that_come_before_the_call_has_a_name() -> None:
    assert calls_of(
        arguments("[1", output_index=3),
        arguments("]", output_index=3),
        event("output_item.done", output_index=3, item=call("call_1", "[1]")),
        completed(),
    ) == [("call_1", "f", "[1]")]


def test_a_call_that_is_never_named_gets_an_id_that_is_stable() -> None:
    assert calls_of(arguments("[1]"), completed()) == [("call_job_0", "", "[1]")]


def test_arguments_in_the_first_event_are_used_once() -> None:
    for repeated in ([arguments('{"a":', output_index=0)], []):
        assert calls_of(
            event("output_item.added", output_index=0, item=call(arguments='{"a":')),
            *repeated,
            arguments("1}", output_index=0),
            completed(),
        ) == [("call_1", "f", '{"a":1}')]
    assert calls_of(event("output_item.added", item=call(arguments="[1]")), completed()) == [("call_1", "f", "[1]")]


def test_arguments_only_at_the_end() -> None:
    late = event("function_call_arguments.done", output_index=0, arguments="[1]", name="f")
    assert calls_of(event("output_item.added", output_index=0, item=call()), late, completed()) == [
        ("call_1", "f", "[1]")
    ]
    assert calls_of(completed(call(arguments="[1]"))) == [("call_1", "f", "[1]")]


def test_a_call_without_arguments_has_an_empty_object_and_a_custom_one_nothing() -> None:
    custom = {"type": "custom_tool_call", "call_id": "call_2", "name": "sql", "input": ""}
    assert calls_of(completed(call(), custom)) == [("call_1", "f", "{}"), ("call_2", "sql", "")]


# -- the end --------------------------------------------------------------------------------------


def reason_of(kind: str, *events: dict[str, Any], **response: Any) -> str | None:
    return choice_of(*events, event(kind, response=response)).finish_reason


def test_finish_reasons() -> None:
    cut = {"reason": "max_output_tokens"}
    assert reason_of("completed", text("a"), status="completed") == "stop"
    assert reason_of("done", text("a"), status="completed") == "stop"
    assert reason_of("completed", event("output_item.added", item=call()), status="completed") == "tool_calls"
    assert reason_of("incomplete", status="incomplete", incomplete_details=cut) == "length"
    assert reason_of("completed", event("output_item.added", item=call()), incomplete_details=cut) == "length"
    assert reason_of("failed", status="failed", incomplete_details=cut) == "length"
    assert reason_of("incomplete", incomplete_details={"reason": "content_filter"}) == "content_filter"
    assert reason_of("incomplete", incomplete_details={"reason": "steered"}) == "steered"
    assert reason_of("incomplete") == "length"


def test_errors_in_each_shape() -> None:
    known = {"code": "server_error", "message": "Oh."}
    for failing in (
        {"type": "error", "error": known},
        {"type": "error", **known},
        {"type": "error", "message": "Oh.", "error": {"code": "server_error"}},
        event("failed", response={"status": "failed", "error": known}),
        event("failed", error=known),
    ):
        answer, _, error = play(text("a"), failing)
        assert error == {"error": known}
        assert not answer.complete


def test_a_failure_without_a_reason_fails() -> None:
    answer, _, error = play(text("a"), event("failed", response={"status": "failed"}))
    assert (answer.failed, answer.complete, error) == (True, False, None)


def test_nothing_counts_after_the_end() -> None:
    assert choice_of(text("a"), completed(), {"type": "error", "message": "Oh."}, text("b")).content == "a"


def test_what_proves_nothing_is_no_progress() -> None:
    for kind in ("response.created", "response.queued", "response.in_progress", "keepalive", "ping"):
        assert not ResponsesAccumulator.is_progress({"type": kind})
    assert ResponsesAccumulator.is_progress({"type": "response.output_item.added"})


def test_an_answer_in_the_other_dialect_is_recognised() -> None:
    answer, _, error = play({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "a"}}]})
    assert (answer.foreign, error) == (True, None)


def test_usage_has_the_names_of_chat_completions_and_keeps_what_has_none() -> None:
    usage = {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 5},
        "output_tokens": 90,
        "output_tokens_details": {"reasoning_tokens": 80},
        "total_tokens": 110,
        "cost": 0.5,
    }
    answer, _, _ = play(completed(usage=usage))
    assert answer.output().usage == {
        "prompt_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens": 90,
        "completion_tokens_details": {"reasoning_tokens": 80},
        "total_tokens": 110,
        "cost": 0.5,
    }


# -- what is kept for the next turn ---------------------------------------------------------------


def test_whole_items_are_kept_in_their_order_and_annotations_once() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    citation = {"type": "url_citation", "url": "https://example.org"}
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    said = {"type": "message", "content": [{"type": "output_text", "text": "Hi", "annotations": [citation]}]}
    kept = choice_of(
        event("output_item.added", output_index=0, item={**reasoning, "encrypted_content": "g"}),
        event("output_item.done", output_index=0, item=reasoning),
        event("output_item.done", output_index=1, item=search),
        text("Hi", output_index=2),
        event("output_text.annotation.added", output_index=2, annotation=citation),
        event("output_item.done", output_index=2, item=said),
        completed(reasoning, search, said),
    )
    assert kept.extra == {ITEMS_FIELD: [reasoning, search, said], "annotations": [citation]}
    assert kept.finish_reason == "stop"


def test_limits() -> None:
    answer, deltas, _ = play(text("12345"), text("678901"), text("x"), limits=Limits(max_output_bytes=10))
    assert answer.too_large
    assert joined(deltas)["content"] == "12345"
    answer, _, _ = play(
        event("output_item.done", item=message("Hi", padding="x" * 200)),
        completed(),
        limits=Limits(max_extra_bytes=100),
    )
    extra = answer.output().choices[0].extra
    assert extra is not None
    assert list(extra) == ["left_out"]
    assert "KEEPSTREAM_MAX_EXTRA_BYTES" in extra["left_out"][ITEMS_FIELD]


# -- everything is kept ---------------------------------------------------------------------------


def test_logprobs_are_kept_once_wherever_they_come() -> None:
    tokens = [{"token": "Hi", "logprob": -0.1}]
    part = {"type": "output_text", "text": "Hi", "logprobs": tokens}
    whole = {"type": "message", "id": "m", "content": [part]}
    done = event("output_item.done", output_index=0, item=whole)
    streamed = text("Hi", output_index=0, content_index=0, logprobs=tokens)
    ended = event("output_text.done", output_index=0, content_index=0, text="Hi", logprobs=tokens)
    kept = {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "Hi"}]}
    for events in ([streamed, ended, done], [ended, done], [done], []):
        extra = choice_of(*events, completed(whole)).extra
        assert extra == {"logprobs": {"content": tokens}, ITEMS_FIELD: [kept]}


def test_items_are_kept_in_the_order_in_which_they_began() -> None:
    first, second = call("call_1"), call("call_2")
    kept = choice_of(
        event("output_item.added", output_index=0, item=first),
        event("output_item.added", output_index=1, item=second),
        event("output_item.done", output_index=1, item=second),
        event("output_item.done", output_index=0, item=first),
        completed(),
    )
    assert kept.extra == {ITEMS_FIELD: [first, second]}


def test_an_image_is_kept_once_and_is_output() -> None:
    image = {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "A" * 1000}
    size = len(json.dumps([image], separators=(",", ":")))
    for events in ([event("output_item.done", output_index=0, item=image)], []):
        answer, deltas, error = play(*events, completed(image), limits=Limits(max_extra_bytes=size + 10))
        assert error is None
        assert answer.has_output
        (choice,) = answer.output().choices
        assert choice.extra == {ITEMS_FIELD: [image]}
        assert [delta.fields for delta in deltas] == [{"extra": {ITEMS_FIELD: [image]}}]
    _, deltas, _ = play(*events, completed(image), limits=Limits(live_extra_bytes=100))
    assert deltas[0].fields == {"extra": {ITEMS_FIELD: [{"omitted": "image", "bytes": size - 2}]}}


def test_what_the_response_says_of_itself_is_kept_beside_a_large_output() -> None:
    image = {"type": "image_generation_call", "id": "ig_1", "result": "A" * 300_000}
    answer, _, _ = play(completed(image, service_tier="flex", tool_usage={"web_search": 1}, content_filters=[{"n": 1}]))
    assert answer.output().provider_details == {
        "service_tier": "flex",
        "tool_usage": {"web_search": 1},
        "content_filters": [{"n": 1}],
    }


# -- everything at random -------------------------------------------------------------------------

ANY = st.one_of(st.none(), st.integers(-1, 3), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.booleans())
TEXTS = st.text(alphabet=["a", "{", "}", '"', "\ud83c", "\udf0a", "\x00", "é"], max_size=4)
ITEMS = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "reasoning", "function_call", "custom_tool_call", "web_search_call"]) | ANY},
    optional={
        "id": st.sampled_from(["a", "b"]) | ANY,
        "call_id": st.sampled_from(["a", "b"]) | ANY,
        "name": TEXTS | ANY,
        "arguments": TEXTS | ANY,
        "input": TEXTS | ANY,
        "phase": st.just("commentary") | ANY,
        "content": st.lists(
            st.fixed_dictionaries({}, optional={"text": TEXTS | ANY, "refusal": TEXTS | ANY}), max_size=2
        )
        | ANY,
        "summary": st.lists(st.fixed_dictionaries({}, optional={"text": TEXTS | ANY}), max_size=2) | ANY,
    },
)
KINDS = (
    "output_item.added",
    "output_item.done",
    "output_text.delta",
    "output_text.done",
    "output_text.annotation.added",
    "refusal.delta",
    "refusal.done",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "custom_tool_call_input.delta",
    "custom_tool_call_input.done",
    "reasoning_summary_text.delta",
    "reasoning_summary_text.done",
    "reasoning_text.delta",
    "reasoning_text.done",
    "created",
    "completed",
    "incomplete",
    "failed",
    "unheard_of",
)
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from([f"response.{kind}" for kind in KINDS]) | st.sampled_from(["error", "keepalive"]) | ANY},
    optional={
        "output_index": st.integers(0, 2) | ANY,
        "item_id": st.sampled_from(["a", "b"]) | ANY,
        "content_index": st.integers(0, 1) | ANY,
        "summary_index": st.integers(0, 1) | ANY,
        "delta": TEXTS | ANY,
        "text": TEXTS | ANY,
        "refusal": TEXTS | ANY,
        "arguments": TEXTS | ANY,
        "input": TEXTS | ANY,
        "call_id": ANY,
        "name": ANY,
        "error": ANY,
        "annotation": st.dictionaries(TEXTS, ANY, max_size=1) | ANY,
        "logprobs": st.lists(ANY, max_size=2) | ANY,
        "item": ITEMS | ANY,
        "response": st.fixed_dictionaries(
            {},
            optional={
                "output": st.lists(ITEMS | ANY, max_size=3) | ANY,
                "status": st.sampled_from(["completed", "failed", "incomplete"]) | ANY,
                "usage": st.dictionaries(TEXTS, ANY, max_size=2) | ANY,
                "incomplete_details": st.fixed_dictionaries({"reason": ANY}) | ANY,
                "id": ANY,
            },
        )
        | ANY,
    },
)


@pytest.mark.parametrize("held", ["in the item", "before the name", "for ever"])
def test_arguments_that_were_held_back_may_hold_half_a_surrogate_pair(held: str) -> None:
    place: dict[str, Any] = {"output_index": 0}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}
    added = place | {"type": "response.output_item.added", "item": call | {"arguments": '"\ud83d'}}
    first = place | {"type": "response.function_call_arguments.delta", "delta": '"\ud83d'}
    rest = first | {"delta": '\ude00"'}
    done = place | {"type": "response.output_item.done", "item": call}
    events = {"in the item": [added, rest], "before the name": [first, rest, done], "for ever": [first, rest]}[held]
    body = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    played = streams.play([body], responses=True)
    assert [call.arguments for call in played.output.choices[0].tool_calls] == ['"😀"']


def test_a_call_that_is_never_named_is_told_without_a_name() -> None:
    piece = {"type": "response.function_call_arguments.delta", "output_index": 0, "item_id": "fc_1", "delta": "{"}
    _, deltas, error = play(piece)
    assert error is None
    ((call,),) = [delta.fields["tool_calls"] for delta in deltas]
    assert call.keys() == {"index", "id", "arguments"}, "an empty name says nothing"


@settings(max_examples=400, deadline=None)
@given(st.lists(EVENTS, max_size=12))
def test_whatever_comes_the_deltas_joined_equal_the_output_and_can_be_stored(events: list[dict[str, Any]]) -> None:
    answer, deltas, _ = play(*events)
    output = answer.output()
    held = texts_of(output.choices[0]) if output.choices else joined([])
    assert joined(deltas) == held
    stored = json.dumps(
        [choice.model_dump() for choice in output.choices] + [output.provider_details], ensure_ascii=False
    )
    assert "\x00" not in stored
    stored.encode()
