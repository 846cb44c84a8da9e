"""Chunks for the AI SDK: whatever happens to a job, the message that is built from them is the answer."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.events import ChoiceSnapshot, parse_event
from keepstream.results import Choice, ToolCall
from keepstream.transcript import Transcript
from keepstream_gateway.ai_sdk import chunks
from keepstream_gateway.ai_sdk.chunks import Step
from tests import event_texts
from tests.ui_message import UiMessage

JOB = event_texts.JOB_ID


def play(texts: Iterable[str], *, resets: bool = True, first_attempt: int = 1) -> UiMessage:
    """The message that the page has after these events."""
    message, step = UiMessage(), Step(JOB, resets=resets, first_attempt=first_attempt)
    message.apply([chunks.start("m", JOB), *step.begin()])
    for text in texts:
        if not step.ended:
            message.apply(step.apply(parse_event(text)))
    return message


def fragment(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, **fields}


class Story:
    """A job's events, as hypothesis invents them; each attempt's are numbered without gaps."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.attempt = 0
        self.n = 0
        self.transcript = Transcript()
        self.begin()

    def add(self, make: Any, *arguments: Any, **fields: Any) -> None:
        self.n += 1
        text = make(f"{self.attempt}-{self.n}", *arguments, **fields)
        self.events.append(text)
        assert self.transcript.apply(parse_event(text))

    def begin(self, **fields: Any) -> None:
        self.attempt += 1
        self.n = 0
        self.add(lambda id_: event_texts.event(id_, "attempt.started", model="m", provider="p", reason="r", **fields))

    def more(self, fields: dict[str, Any]) -> None:
        fields = self.in_order(fields)
        self.add(lambda id_: event_texts.event(id_, "delta", choice=0, delta=fields))

    def fail(self) -> None:
        self.add(event_texts.attempt_failed)
        self.begin()

    def lose_the_worker(self) -> None:
        self.begin()

    def go_on_elsewhere(self) -> None:
        whole = self.whole()
        self.begin(continues=True)
        self.snapshot(whole)

    def gap(self, fields: dict[str, Any]) -> None:
        """The reader misses what came, and is told everything so far."""
        fields = self.in_order(fields)
        missed = Transcript()
        for text in self.events:
            missed.apply(parse_event(text))
        here = f"{self.attempt}-{self.n + 1}"
        missed.apply(parse_event(event_texts.event(here, "delta", choice=0, delta=fields)))
        self.n += 1
        self.snapshot(self.whole(missed))

    def in_order(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The same, with the place of an invented call among those that there are: places have no gaps."""
        if "look" not in fields:
            return fields
        number, arguments = fields["look"]
        place = min(number, len(self.whole().get("tool_calls", [])))
        given = {"arguments": arguments} if arguments else {}
        return {"tool_calls": [fragment(place, id=f"call-{place}", name=f"look-{place}", **given)]}

    def other(self) -> None:
        """What the reader has is not what there is."""
        self.snapshot({"content": "anew", "tool_calls": [], "reasoning": "", "refusal": ""})

    def snapshot(self, whole: dict[str, Any]) -> None:
        content = whole.pop("content", "")
        self.add(event_texts.snapshot, content, **{key: value for key, value in whole.items() if key != "index"})

    def whole(self, transcript: Transcript | None = None) -> dict[str, Any]:
        choices = (transcript or self.transcript).choices
        return (choices[0] if choices else ChoiceSnapshot(index=0)).model_dump(mode="json", exclude_none=True)

    def end(self) -> None:
        self.add(event_texts.attempt_finished)
        self.add(event_texts.ended, "completed", self.transcript.text)


pieces = st.text(min_size=1, max_size=5)
deltas = st.one_of(
    st.builds(lambda text: {"content": text}, pieces),
    st.builds(lambda text: {"reasoning": text}, pieces),
    st.builds(lambda text: {"refusal": text}, pieces),
    st.builds(
        lambda number, text: {"look": (number, text and f'"{text}",')}, st.integers(0, 3), st.text("abc", max_size=3)
    ),
)
steps = st.one_of(
    st.tuples(st.just("more"), deltas),
    st.tuples(st.just("more"), deltas),
    st.tuples(st.just("more"), deltas),
    st.tuples(st.just("gap"), deltas),
    st.just(("fail",)),
    st.just(("lose_the_worker",)),
    st.just(("go_on_elsewhere",)),
    st.just(("other",)),
)


def tell(given_steps: list[tuple[Any, ...]]) -> Story:
    story = Story()
    for name, *arguments in given_steps:
        getattr(story, name)(*arguments)
    story.end()
    return story


def assert_is_the_answer(message: UiMessage, transcript: Transcript) -> None:
    choice = transcript.choices[0]
    assert message.texts("text") == choice.content
    assert message.texts("reasoning") == choice.reasoning
    assert message.texts("text", refusal=True) == choice.refusal
    assert sorted((call[0], call[1]) for call in message.calls) == sorted(
        (call.id, call.name) for call in choice.tool_calls
    )
    for call in choice.tool_calls:
        (shown,) = [given for id_, _, given in message.calls if id_ == call.id]
        assert shown == (json.loads(call.arguments or "{}") if call.arguments_valid else call.arguments or {})
    assert message.is_whole


@given(st.lists(steps, max_size=20))
def test_the_message_is_the_answer_whatever_happens(given_steps: list[tuple[Any, ...]]) -> None:
    story = tell(given_steps)
    message = play(story.events)
    assert message.finish_reason == "stop"
    assert_is_the_answer(message, story.transcript)


@given(st.lists(steps, max_size=20), st.data())
def test_a_page_that_comes_late_gets_the_same(given_steps: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """It is not shown what has failed before it came."""
    story = tell(given_steps)
    first = data.draw(st.integers(1, story.attempt))
    message = play(story.events, first_attempt=first)
    assert_is_the_answer(message, story.transcript)


@given(st.lists(steps, max_size=20))
def test_an_older_page_ends_with_an_error_or_with_the_answer(given_steps: list[tuple[Any, ...]]) -> None:
    """And resuming brings it to the answer, for each time it is told of one attempt more."""
    story = tell(given_steps)
    for first in range(1, story.attempt + 1):
        message = play(story.events, resets=False, first_attempt=first)
        assert (message.error is None) == (message.finish_reason is not None)
        if message.error is None:
            assert_is_the_answer(message, story.transcript)


def test_nothing_is_reset_if_nothing_was_shown() -> None:
    story = Story()
    story.fail()
    story.lose_the_worker()
    step = Step(JOB)
    assert [chunk for text in story.events for chunk in step.apply(parse_event(text))] == []


def sent_by(story: Story, **step: Any) -> list[dict[str, Any]]:
    made = Step(JOB, **step)
    return [chunk for text in story.events for chunk in made.apply(parse_event(text))]


def test_an_attempt_that_goes_on_with_the_one_before_takes_nothing_back() -> None:
    story = Story()
    story.more({"content": "one "})
    story.go_on_elsewhere()
    story.more({"content": "two"})
    story.end()
    assert "reset-step" not in [chunk["type"] for chunk in sent_by(story)]
    assert play(story.events, resets=False).finish_reason == "stop"


def test_what_had_failed_before_is_not_even_shown() -> None:
    story = Story()
    story.more({"content": "dead"})
    story.fail()
    story.more({"content": "alive"})
    story.end()
    deltas = [chunk["delta"] for chunk in sent_by(story, first_attempt=2) if chunk["type"] == "text-delta"]
    assert deltas == ["alive"]
    assert play(story.events, resets=False, first_attempt=2).texts("text") == "alive"


@pytest.mark.parametrize("changed", [{"id": "d"}, {"name": "other"}, {"arguments": '{"b"'}])
def test_a_call_that_turns_out_another_takes_its_place(changed: dict[str, str]) -> None:
    story = Story()
    call: dict[str, Any] = {"id": "c", "name": "look", "arguments": '{"a"'}
    story.more({"tool_calls": [fragment(**call)]})
    now = {**call, **changed}
    story.snapshot({"tool_calls": [{**now, "arguments_valid": False}]})
    story.more({"tool_calls": [fragment(arguments=": 1}")]})
    story.end()
    message = play(story.events)
    assert message.calls == [(now["id"], now["name"], json.loads(now["arguments"] + ": 1}"))]


def test_a_snapshot_that_goes_on_is_only_what_is_new() -> None:
    story = Story()
    story.more({"content": "one "})
    story.gap({"content": "two"})
    step = Step(JOB)
    sent = [step.apply(parse_event(text)) for text in story.events]
    assert sent[-1] == [{"type": "text-delta", "id": "t1", "delta": "two"}]


def test_the_partial_answer_of_a_failed_job_stays() -> None:
    """As its row has it."""
    story = Story()
    story.more({"content": "half"})
    failure = {"code": "connection", "message": "it broke"}
    story.add(lambda id_: event_texts.event(id_, "attempt.failed", error=failure, retryable=True, retry_in=None))
    end = event_texts.event("1-4", "job.failed", status="failed", attempts=1, error=failure, output_sha256="0" * 64)
    message = play([*story.events, end])
    assert (message.texts("text"), message.error, message.is_whole) == ("half", "it broke", True)


@pytest.mark.parametrize(
    ("status", "error"), [("cancelled", None), ("expired", "the job is expired"), ("failed", "the job is failed")]
)
def test_each_end_is_told(status: str, error: str | None) -> None:
    story = Story()
    story.more({"content": "half"})
    message = play([*story.events, event_texts.ended("1-3", status, "half")])
    assert (message.aborted, message.error) == (status == "cancelled", error)
    assert message.is_whole


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content-filter"),
        ("tool_calls", "tool-calls"),
        ("function_call", "tool-calls"),
        ("eos", "other"),
        (None, "other"),
    ],
)
def test_why_it_ended_is_said_in_the_sdks_words(reason: str | None, said: str) -> None:
    end = event_texts.event(
        "1-2",
        "job.completed",
        status="completed",
        finish_reasons={"0": reason},
        attempts=1,
        usage={"total_tokens": 7, "source": "provider"},
        output_sha256="0" * 64,
    )
    *_, finish = Step(JOB).apply(parse_event(end))
    assert finish["finishReason"] == said
    assert finish["messageMetadata"]["keepstream"]["usage"]["total_tokens"] == 7


def test_calls_are_complete_when_the_job_is_stored() -> None:
    story = Story()
    story.more({"tool_calls": [fragment(id="c", name="loo")]})
    story.more({"tool_calls": [fragment(name="look", arguments='{"a"')]})
    story.more({"tool_calls": [fragment(arguments=": 1}"), fragment(1, name="nameless", arguments="{")]})
    story.more({"tool_calls": [fragment(2, id="t", name="write", type="custom", arguments="any text")]})
    step = Step(JOB)
    sent = [chunk for text in story.events for chunk in step.apply(parse_event(text))]
    assert [chunk["type"] for chunk in sent if "toolName" in chunk] == ["tool-input-start"] * 3
    assert sent[0] == {"type": "tool-input-start", "toolCallId": "c", "toolName": "look"}
    assert step.apply(parse_event(event_texts.attempt_finished(f"1-{story.n + 1}"))) == []
    *done, _, _ = step.apply(parse_event(event_texts.ended(f"1-{story.n + 2}", "completed", "")))
    assert [(chunk["type"], chunk["toolCallId"], chunk["input"]) for chunk in done] == [
        ("tool-input-available", "c", {"a": 1}),
        ("tool-input-error", f"{JOB}-1", "{"),
        ("tool-input-available", "t", "any text"),
    ]


def test_images_and_sources_are_shown_once() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    cited = {"type": "url_citation", "url_citation": {"url": "https://example.org/a", "title": "A"}}
    story = Story()
    story.more({"content": "See: ", "extra": {"images": [image, {"omitted": "image", "bytes": 9}]}})
    story.more({"extra": {"annotations": [cited], "logprobs": {"content": []}}})
    story.gap({"extra": {"images": [image]}})
    message = play(story.events)
    assert [part["type"] for part in message.parts] == ["step-start", "text", "file", "source-url", "file"]
    assert message.parts[2]["mediaType"] == "image/png"
    assert message.parts[3]["title"] == "A"


def test_a_second_choice_is_not_shown() -> None:
    message = play([event_texts.started("1-1"), event_texts.delta("1-2", "other", choice=1)])
    assert message.parts == [{"type": "step-start"}]


def test_a_stored_step_is_shown_with_what_its_tools_gave() -> None:
    call = ToolCall(id="c", name="look", arguments='{"a": 1}', arguments_valid=True)
    message = UiMessage()
    choice = Choice(index=0, content="Hm.", reasoning="So.", tool_calls=[call], finish_reason="tool_calls")
    message.apply(chunks.stored_step(JOB, choice, {"c": {"b": 2}, "other": 3}))
    assert [part["type"] for part in message.parts] == ["step-start", "reasoning", "text", "tool"]
    assert message.parts[-1] == {"type": "tool", "id": "c", "name": "look", "input": {"a": 1}, "output": {"b": 2}}


def test_chunks_are_server_sent_events() -> None:
    sent = chunks.encode([{"type": "text-delta", "delta": "a\n\nb ü"}, {"type": "finish"}])
    assert sent.decode() == 'data: {"type": "text-delta", "delta": "a\\n\\nb ü"}\n\ndata: {"type": "finish"}\n\n'
