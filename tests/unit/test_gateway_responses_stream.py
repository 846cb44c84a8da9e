"""Whatever becomes of a job, clients of the Responses API end with what its row holds."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from openai.types.responses import Response

from keepstream.events import DeltaEvent, Event, TerminalEvent, is_terminal
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.openai.ids import LAST, parse_cursor, position, sequence_number
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_stream import ResponseEvents
from tests.job_stories import Story, cancelled_while_it_waits, carried_over, new_job, stories


def told(story: Story, events: Sequence[Event] | None = None, after: int = -1, *, with_row: bool = True) -> list[bytes]:
    """Return what a client with the cursor ``after`` is sent."""
    stream = ResponseEvents(new_job(story.job_id), after)
    frames = stream.begin()
    for event in story.events if events is None else events:
        if is_terminal(event):
            frames += stream.end(cast(TerminalEvent, event), story.stored if with_row else None)
        else:
            frames += stream.feed(event)
    return frames


def data(frame: bytes) -> dict[str, Any]:
    lines = frame.decode().split("\n")
    assert [line[:6] for line in lines] == ["event:", "data: ", "", ""]
    fields: dict[str, Any] = json.loads(lines[1].removeprefix("data: "))
    assert fields["type"] == lines[0].removeprefix("event: ")
    return fields


def _held(item: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader holds of an item that it is shown: its texts, under the names of their deltas."""
    parts = item.get("content") or ()
    texts = {f"response.{part['type']}.delta": part.get("text") or part.get("refusal") or "" for part in parts}
    if item["type"] == "function_call":
        texts["response.function_call_arguments.delta"] = item["arguments"]
    return {"type": item["type"], "texts": texts, "head": item}


class Reader:
    """A client without a library: it keeps items by their ids; what ``response.in_progress`` shows replaces them."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.last = -1
        self.response: dict[str, Any] | None = None

    def read(self, frame: bytes) -> None:
        event = data(frame)
        assert event["sequence_number"] > self.last
        self.last = event["sequence_number"]
        kind = event["type"]
        if kind == "response.in_progress":
            items = event["response"]["output"]
            self.items = {item["id"]: _held(item) for item in items if item["status"] != "incomplete"}
        elif kind == "response.output_item.added":
            assert event["item"]["id"] not in self.items
            self.items[event["item"]["id"]] = _held(event["item"])
        elif kind == "response.output_item.done":
            assert event["item"]["id"] in self.items or event["item"]["status"] == "incomplete"
        elif kind.endswith(".delta"):
            texts = self.items[event["item_id"]]["texts"]
            texts[kind] = texts.get(kind, "") + event["delta"]
        elif kind in {"response.completed", "response.incomplete", "response.failed"}:
            self.response = event["response"]

    def texts(self, kind: str) -> list[str]:
        name = f"response.{kind}.delta"
        return [text for item in self.items.values() if (text := item["texts"].get(name))]

    def calls(self) -> list[tuple[str, str, str]]:
        name = "response.function_call_arguments.delta"
        return [
            (item["head"]["call_id"], item["head"]["name"], item["texts"].get(name, ""))
            for item in self.items.values()
            if item["type"] == "function_call"
        ]

    def check(self, row: CompletionResult) -> None:
        assert sorted(self.texts("output_text")) == sorted(c.content for c in row.choices if c.content)
        assert sorted(self.texts("reasoning_text")) == sorted(c.reasoning for c in row.choices if c.reasoning)
        assert sorted(self.texts("refusal")) == sorted(c.refusal for c in row.choices if c.refusal)
        calls = [(call.id, call.name, call.arguments) for choice in row.choices for call in choice.tool_calls]
        assert sorted(self.calls()) == sorted(calls)
        assert self.response == response_object(row)
        assert sorted(self.items) == sorted(item["id"] for item in self.response["output"])


@given(stories(), st.data())
def test_a_reader_that_is_cut_anywhere_holds_what_the_row_holds(story: Story, draw: st.DataObject) -> None:
    reader = Reader()
    frames = told(story)
    for _ in range(draw.draw(st.integers(0, 3))):
        for frame in frames[: draw.draw(st.integers(0, len(frames)))]:
            reader.read(frame)
        if reader.response is not None:
            break
        frames = told(story, after=reader.last)
    else:
        for frame in frames:
            reader.read(frame)
    reader.check(story.stored)


@given(stories(), st.data())
def test_a_reader_whose_log_is_lost_holds_what_the_row_holds(story: Story, draw: st.DataObject) -> None:
    reader = Reader()
    logs = [story.events, story.of_the_row()]
    if len(story.events) > 2:
        last = draw.draw(st.integers(1, len(story.events) - 2))
        logs.insert(1, story.with_hole(draw.draw(st.integers(0, last)), last))
    first = draw.draw(st.integers(0, len(logs) - 1))
    for log in logs[first:]:
        frames = told(story, log, reader.last)
        for frame in frames[: draw.draw(st.integers(0, len(frames)))] if log is not logs[-1] else frames:
            reader.read(frame)
        if reader.response is not None:
            break
    reader.check(story.stored)


@given(stories(), st.data())
def test_every_gateway_gives_an_event_the_same_number(story: Story, draw: st.DataObject) -> None:
    frames = told(story)
    numbers = [data(frame)["sequence_number"] for frame in frames]
    assert numbers == sorted(set(numbers))
    cut = draw.draw(st.integers(0, len(numbers) - 1))
    assert told(story, after=numbers[cut]) == frames[cut + 1 :]
    assert data(told(story, story.of_the_row())[-1]) == data(frames[-1])


class Slow(ResponseEvents):
    """Takes no short cut."""

    def _go_on(self, event: DeltaEvent) -> list[bytes] | None:
        return None


@given(stories(), st.integers(-1, 30))
def test_the_short_cut_for_texts_tells_the_same(story: Story, cut: int) -> None:
    after = -1 if cut < 0 else data(told(story)[min(cut, len(told(story)) - 1)])["sequence_number"]
    quick, slow = ResponseEvents(new_job(story.job_id), after), Slow(new_job(story.job_id), after)
    for event in story.events:
        assert quick.feed(event) == slow.feed(event)


@given(stories())
def test_without_the_database_the_end_is_the_same(story: Story) -> None:
    assert told(story, with_row=False) == told(story)


answers: list[bytes] = []


def answer(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=answers[-1])


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    """Return OpenAI's library, which reads bytes that are given instead of sent."""
    transport = httpx2.MockTransport(answer)
    with OpenAI(api_key="k", base_url="http://gateway.test/v1", http_client=httpx2.Client(transport=transport)) as made:
        yield made


def check_by_the_helper(client: OpenAI, story: Story, frames: Sequence[bytes]) -> None:
    answers[:] = [b"".join(frames)]
    with client.responses.stream(response_id="resp_job1") as stream:
        *_, last = list(stream)
        if story.stored.status is JobStatus.COMPLETED and last.type == "response.completed":
            final = stream.get_final_response()
            assert final.output_text == "".join(choice.content for choice in story.stored.choices)
            calls = [item for item in final.output if item.type == "function_call"]
            expected = [call for choice in story.stored.choices for call in choice.tool_calls]
            assert [(c.call_id, c.name, c.arguments) for c in calls] == [(c.id, c.name, c.arguments) for c in expected]
        else:
            assert last.type in {"response.incomplete", "response.failed"}
            assert isinstance(last.response, Response)
            assert last.response.to_dict()["output"] == response_object(story.stored)["output"]


@given(stories())
@settings(max_examples=60)
def test_openai_s_own_helper_takes_every_stream(client: OpenAI, story: Story) -> None:
    check_by_the_helper(client, story, told(story))
    check_by_the_helper(client, story, told(story, story.of_the_row()))


@given(stories(), st.data())
@settings(max_examples=60)
def test_openai_s_own_helper_takes_what_a_healed_log_tells(client: OpenAI, story: Story, draw: st.DataObject) -> None:
    if len(story.events) > 2:
        last = draw.draw(st.integers(1, len(story.events) - 2))
        check_by_the_helper(client, story, told(story, story.with_hole(draw.draw(st.integers(0, last)), last)))


@given(st.integers(0, 9_006), st.integers(0, 99_999_999), st.integers(0, LAST))
def test_numbers_can_be_read_back_and_are_exact_in_javascript(attempt: int, n: int, sub: int) -> None:
    number = sequence_number(attempt, n, sub)
    assert position(number) == (attempt, n, sub)
    assert number < 2**53
    assert parse_cursor(str(number)) == number


@pytest.mark.parametrize("text", ["", "-1", "1.5", "0x1", "\u0661", "1 ", "9" * 17, str(2**53)])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="sequence number"):
        parse_cursor(text)


def test_a_reader_that_is_cut_within_the_last_event_and_finds_the_log_gone_is_told_anew() -> None:
    story = cancelled_while_it_waits()
    frames = told(story)
    cut = next(
        place for place, frame in enumerate(frames) if data(frame)["sequence_number"] >= sequence_number(2, 1, 0)
    )
    reader = Reader()
    for frame in [*frames[: cut + 1], *told(story, story.of_the_row(), data(frames[cut])["sequence_number"])]:
        reader.read(frame)
    reader.check(story.stored)


@pytest.mark.parametrize("lost", [None, (0, 3), (1, 5), (3, 6)])
def test_what_counts_at_the_end_has_the_ids_of_the_final_response(client: OpenAI, lost: tuple[int, int] | None) -> None:
    story = carried_over()
    frames = told(story, story.with_hole(*lost) if lost else None)
    reader = Reader()
    for frame in frames:
        reader.read(frame)
    reader.check(story.stored)
    kinds = [item_id.partition("_")[0] for item_id in reader.items]
    assert sorted(kinds) == ["fc", "msg", "rs"]
    check_by_the_helper(client, story, frames)
