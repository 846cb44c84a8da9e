"""A transcript holds what the events say, whatever is repeated, missing or void."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.events import Event, parse_event
from keepstream.names import EventId
from keepstream.results import output_sha256
from keepstream.transcript import Place, Transcript, place_of
from tests.event_texts import attempt_failed, attempt_finished, delta, ended, snapshot, started


def transcript(*texts: str) -> Transcript:
    held = Transcript()
    for text in texts:
        held.apply(parse_event(text))
    return held


def event(event_id: str, kind: str = "delta") -> Event:
    return parse_event(delta(event_id, "x") if kind == "delta" else snapshot(event_id, "x"))


@pytest.mark.parametrize(
    ("last", "event_id", "kind", "place"),
    [
        (None, "1-1", "delta", Place.NEXT),
        (None, "3-1", "delta", Place.NEXT),
        (None, "1-2", "delta", Place.AHEAD),
        (None, "1-2", "snapshot", Place.NEXT),
        ("1-5", "1-5", "delta", Place.SEEN),
        ("1-5", "1-4", "snapshot", Place.SEEN),
        ("1-5", "1-6", "delta", Place.NEXT),
        ("1-5", "1-7", "delta", Place.AHEAD),
        ("1-5", "1-7", "snapshot", Place.NEXT),
        ("1-9", "1-10", "delta", Place.NEXT),
        ("1-5", "2-1", "delta", Place.NEXT),
        ("1-5", "2-2", "delta", Place.AHEAD),
        ("1-5", "2-2", "snapshot", Place.NEXT),
        ("2-1", "1-6", "delta", Place.SEEN),
    ],
)
def test_the_place_of_an_event(last: str | None, event_id: str, kind: str, place: Place) -> None:
    attempt, _, n = (last or "").partition("-")
    assert place_of(event(event_id, kind), EventId(int(attempt), int(n)) if last else None) is place


def test_deltas_add_up() -> None:
    held = transcript(
        started("1-1"),
        delta("1-2", "Hel", reasoning="Hm"),
        delta("1-3", "lo", reasoning="m"),
        delta("1-4", None, refusal="No"),
    )
    assert held.text == "Hello"
    assert (held.choices[0].reasoning, held.choices[0].refusal) == ("Hmm", "No")
    assert held.sha256() == output_sha256(["Hello"])


def test_choices_stand_in_index_order() -> None:
    held = transcript(started("1-1"), delta("1-2", "b", choice=1), delta("1-3", "a", choice=0))
    assert [choice.content for choice in held.choices] == ["a", "b"]
    assert held.text == "a"
    assert held.sha256() == output_sha256(["a", "b"])


def test_tool_call_fragments_are_joined_by_index() -> None:
    def fragment(index: int, **fields: Any) -> dict[str, Any]:
        return {"index": index, **fields}

    held = transcript(
        started("1-1"),
        delta("1-2", None, tool_calls=[fragment(0, id="a", name="f"), fragment(1, id="b", name="g", arguments="[")]),
        delta("1-3", None, tool_calls=[fragment(1, arguments="1]"), fragment(0, arguments='{"x"')]),
    )
    first, second = held.choices[0].tool_calls
    assert (first.id, first.name, first.arguments, first.arguments_valid) == ("a", "f", '{"x"', False)
    assert (second.id, second.name, second.arguments, second.arguments_valid) == ("b", "g", "[1]", True)


def test_a_new_attempt_starts_over() -> None:
    held = transcript(started("1-1"), delta("1-2", "old"), started("2-1"), delta("2-2", "new"))
    assert (held.text, held.attempt) == ("new", 2)


def test_a_failed_attempt_is_void() -> None:
    held = transcript(started("1-1"), delta("1-2", "old"), attempt_failed("1-3"))
    assert (held.text, held.choices) == ("", [])


def test_a_snapshot_replaces_what_is_held_and_is_gone_on_from() -> None:
    call = {"id": "a", "name": "f", "arguments": "[1", "arguments_valid": False}
    held = transcript(
        started("1-1"),
        delta("1-2", "lost"),
        snapshot("1-7", "Hel", tool_calls=[call]),
        delta("1-8", "lo", tool_calls=[{"index": 0, "arguments": "]"}]),
    )
    assert held.text == "Hello"
    assert held.choices[0].tool_calls[0].arguments == "[1]"


def test_the_end_is_known() -> None:
    held = transcript(started("1-1"), delta("1-2", "x"), attempt_finished("1-3"))
    assert held.finished
    held.apply(parse_event(ended("1-4", "completed", "x")))
    assert held.terminal is not None
    assert held.sha256() == held.terminal.output_sha256
    assert held.choices[0].finish_reason == "stop"


def test_an_event_out_of_turn_is_not_applied() -> None:
    held = transcript(started("1-1"), delta("1-2", "a"), delta("1-4", "c"))
    assert (held.text, held.behind) == ("a", True)
    assert held.apply(parse_event(delta("1-3", "b")))
    assert not held.behind
    assert held.apply(parse_event(delta("1-4", "c")))
    assert held.text == "abc"


def test_an_unknown_type_takes_its_place_in_the_order() -> None:
    unknown = delta("1-2", "?").replace('"delta"', '"hologram"', 1)
    assert transcript(started("1-1"), unknown, delta("1-3", "x")).text == "x"


HISTORY = [
    started("1-1"),
    *(delta(f"1-{n}", f"{n} ") for n in range(2, 6)),
    attempt_failed("1-6"),
    started("2-1"),
    *(delta(f"2-{n}", f"{n} ") for n in range(2, 6)),
    attempt_finished("2-6"),
    ended("2-7", "completed", "2 3 4 5 "),
]


@given(st.lists(st.integers(0, len(HISTORY) - 1)))
def test_repetition_and_disorder_never_garble_the_text(noise: list[int]) -> None:
    held, position = Transcript(), 0
    for index in [*noise, *range(len(HISTORY))]:
        if held.apply(parse_event(HISTORY[index])):
            # Applied events are in order; only a newer attempt's beginning may come early.
            assert index >= position
            position = index
    assert held.text == "2 3 4 5 "
    assert held.terminal is not None
    assert held.sha256() == held.terminal.output_sha256
