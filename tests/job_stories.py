"""Whole lives of jobs, made up: the events that followers get, and the row that remains.

In: choices of Hypothesis.  Out: events as a worker sends them, with retries, snapshots and lost workers, and the job as
it is stored at the end; also what is left of the events when Redis has lost some of them.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from keepstream.errors import ErrorInfo
from keepstream.events import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    ChoiceSnapshot,
    Delta,
    DeltaEvent,
    Event,
    Snapshot,
    ToolCallDelta,
    snapshot_event,
    terminal_event,
)
from keepstream.names import EventId
from keepstream.results import Choice, CompletionResult, JobStatus, Usage, output_sha256
from keepstream.transcript import Transcript

CREATED = datetime(2026, 11, 28, 12, tzinfo=UTC)
USAGE = Usage(prompt_tokens=7, completion_tokens=11, total_tokens=18)
SIGNED = {"reasoning_fields": ["reasoning_content"]}


@dataclass
class Story:
    """A job's life. ``events`` are all that were sent; ``row`` is the job at its end."""

    job_id: str = "job1"
    events: list[Event] = field(default_factory=list)
    row: CompletionResult | None = None

    @property
    def stored(self) -> CompletionResult:
        """The row."""
        assert self.row is not None
        return self.row

    def of_the_row(self) -> list[Event]:
        """Return what a follower gets once the log is gone."""
        end = terminal_event(self.stored)
        before = EventId(end.event_id.attempt, end.event_id.n - 1)
        return [*([snapshot_event(self.stored, str(before))] if before.n else []), end]

    def with_hole(self, first: int, last: int) -> list[Event]:
        """Return the events with a snapshot in the place of those from ``first`` to ``last``, as a worker heals a log.

        The hole is cut so that it lies within one attempt and ends where a snapshot may stand.
        """
        until = self.events[last].event_id
        if isinstance(self.events[last], AttemptFailed) or last == len(self.events) - 1:
            return self.events
        held = Transcript()
        for event in self.events[: last + 1]:
            held.apply(event)
        kept = [event for event in self.events[:first] if event.event_id.attempt <= until.attempt]
        heal = Snapshot(
            **self._head(until),
            choices=held.choices,
            finished=held.finished,
            provider_details=held.provider_details,
        )
        return [*kept, heal, *self.events[last + 1 :]]

    def _head(self, event_id: EventId) -> dict[str, Any]:
        return {"id": str(event_id), "job_id": self.job_id, "attempt": event_id.attempt, "ts": 1_800_000_000_000}


def new_job(job_id: str = "job1", **changed: Any) -> CompletionResult:
    """Return a job that has just been stored."""
    fields: dict[str, Any] = {
        "id": job_id,
        "tenant": "default",
        "status": JobStatus.QUEUED,
        "model": "m",
        "provider": "default",
        "request": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
        "created_at": CREATED,
        "attempt": 0,
    }
    return CompletionResult.model_validate(fields | changed)


_text = st.text("abé🙂\n ", min_size=1, max_size=4)
_fragment = st.fixed_dictionaries({"index": st.integers(0, 2), "arguments": st.text('{}":1', max_size=3)})
_delta = st.one_of(
    st.fixed_dictionaries({"content": _text}),
    st.fixed_dictionaries({"content": _text}),
    st.fixed_dictionaries({"reasoning": _text}),
    st.fixed_dictionaries({"content": _text, "reasoning": _text}),
    st.fixed_dictionaries({"refusal": _text}),
    st.fixed_dictionaries({"call": _fragment}),
    st.fixed_dictionaries({"extra": st.just({"annotations": [{"type": "url_citation", "url": "https://a.example"}]})}),
)
_ways = st.sampled_from(["retry", "lost", "carried", "finished and lost"])
_ends = st.sampled_from(["completed", "completed", "length", "failed", "cancelled", "expired", "given up", "recovered"])


class _Writer:
    """Writes a story, event by event."""

    def __init__(self, story: Story, *, counts_from_0: bool) -> None:
        self.story = story
        self.counts_from_0 = counts_from_0  # whether the provider gives calls the same ids in each attempt
        self.held = Transcript()
        self.attempt = 0
        self.n = 0
        self.calls: dict[tuple[int, int], int] = {}

    def head(self) -> dict[str, Any]:
        self.n += 1
        return self.story._head(EventId(self.attempt, self.n))

    def send(self, event: Event) -> None:
        assert self.held.apply(event)
        self.story.events.append(event)

    def start(self, *, continues: bool = False) -> None:
        output = self.held.choices
        self.attempt, self.n = self.attempt + 1, 0
        self.calls = {} if not continues else self.calls
        self.send(AttemptStarted(**self.head(), model="m", provider="default", reason="retry", continues=continues))
        if continues:
            self.send(Snapshot(**self.head(), choices=output, finished=True))

    def say(self, choice: int, pieces: dict[str, Any]) -> None:
        fields = dict(pieces)
        if (call := fields.pop("call", None)) is not None:
            known = self.calls.setdefault((choice, -1), 0)
            index = min(call["index"], known)  # calls are numbered in the order in which they begin
            begun: dict[str, Any] = {}
            if index == known:
                self.calls[choice, -1] = known + 1
                attempt = 0 if self.counts_from_0 else self.attempt
                begun = {"id": f"call_{attempt}_{choice}_{index}", "name": f"f{index}"}
            fields["tool_calls"] = [ToolCallDelta(index=index, arguments=call["arguments"], **begun)]
        self.send(DeltaEvent(**self.head(), choice=choice, delta=Delta(**fields)))

    def finish(self, reason: str) -> None:
        reasons: dict[int, str | None] = {choice.index: reason for choice in self.held.choices} or {0: reason}
        self.send(
            AttemptFinished(**self.head(), finish_reasons=reasons, usage=USAGE, provider_details={"model": "m-1"})
        )

    def fail(self, *, retry_in: float | None) -> None:
        error = ErrorInfo(code="overloaded", message="busy")
        self.send(AttemptFailed(**self.head(), error=error, retryable=True, retry_in=retry_in))

    def end(self, status: JobStatus, choices: list[Choice], error: ErrorInfo | None = None) -> None:
        self.n += 1
        row = new_job(self.story.job_id).model_copy(
            update={
                "status": status,
                "attempt": self.attempt,
                "choices": choices,
                "usage": USAGE if choices else None,
                "error": error,
                "provider_details": self.held.provider_details,
                "output_sha256": output_sha256(choice.content for choice in choices),
                "terminal_event_id": f"{self.attempt}-{self.n}",
                "started_at": CREATED,
                "finished_at": datetime.fromtimestamp(1_800_000_000, UTC),
            }
        )
        self.story.row = row
        self.send(terminal_event(row))


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Return lives of jobs with one to three attempts."""
    story = Story()
    writer = _Writer(story, counts_from_0=draw(st.booleans()))
    end = draw(_ends)
    for _ in range(draw(st.integers(0, 2))):
        _attempt(draw, writer)
        way = draw(_ways)
        if way == "retry":
            writer.fail(retry_in=0.5)
        elif way == "finished and lost":  # with its log, or it would be recovered
            writer.finish(draw(st.sampled_from(["stop", "length"])))
        elif way == "carried":  # handed over with what came so far
            writer.start(continues=True)
    if end == "expired" and not story.events:
        writer.attempt = 1
        writer.end(JobStatus.EXPIRED, [], ErrorInfo(code="expired", message="too late"))
        return story
    _attempt(draw, writer)
    if draw(st.booleans()):
        writer.send(_signed(writer))
    if end in {"completed", "length", "expired", "recovered"}:
        writer.finish("length" if end == "length" else "stop")
        if end == "recovered":
            writer.start(continues=True)
        writer.end(JobStatus.COMPLETED, _choices(writer.held))
    elif end == "cancelled":
        writer.end(JobStatus.CANCELLED, _choices(writer.held), ErrorInfo(code="cancelled", message="cancelled"))
    elif end == "failed":
        choices = _choices(writer.held)
        writer.fail(retry_in=None)
        if choices:
            snapshots = [ChoiceSnapshot.of(choice) for choice in choices]
            writer.send(Snapshot(**writer.head(), choices=snapshots))
        writer.end(JobStatus.FAILED, choices, ErrorInfo(code="timeout", message="slow"))
    else:  # cancelled while it waits for the attempt after
        writer.fail(retry_in=9.0)
        writer.attempt, writer.n = writer.attempt + 1, 0
        writer.end(JobStatus.CANCELLED, [], ErrorInfo(code="cancelled", message="cancelled"))
    return story


def cancelled_while_it_waits() -> Story:
    """Return the life of a job that is cancelled between a first attempt, which sent a call, and a second one."""
    story = Story()
    writer = _Writer(story, counts_from_0=False)
    writer.start()
    writer.say(0, {"call": {"index": 0, "arguments": "{"}})
    writer.fail(retry_in=9.0)
    writer.attempt, writer.n = 2, 0
    writer.end(JobStatus.CANCELLED, [], ErrorInfo(code="cancelled", message="cancelled"))
    return story


def carried_over() -> Story:
    """Return the life of a job whose worker was lost after its answer was whole: the next attempt carries it over."""
    story = Story()
    writer = _Writer(story, counts_from_0=False)
    writer.start()
    for pieces in ({"reasoning": "Hm."}, {"content": "Hello"}, {"call": {"index": 0, "arguments": "{}"}}):
        writer.say(0, pieces)
    writer.finish("stop")
    writer.start(continues=True)
    writer.finish("stop")
    writer.end(JobStatus.COMPLETED, _choices(writer.held))
    return story


def _attempt(draw: st.DrawFn, writer: _Writer) -> None:
    writer.start()
    choices = draw(st.sampled_from([1, 1, 1, 2]))
    for pieces in draw(st.lists(_delta, max_size=8)):
        writer.say(draw(st.integers(0, choices - 1)), pieces)


def _signed(writer: _Writer) -> Event:
    return DeltaEvent(**writer.head(), choice=0, delta=Delta(extra=SIGNED))


def _choices(held: Transcript) -> list[Choice]:
    return [choice.to_choice() for choice in held.choices]
