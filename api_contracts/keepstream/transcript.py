"""The transcript: the output of a job, built from its events.

In: events, in the order of their arrival; repeated ones do no harm.
Out: the output so far, to whoever shows it, and its SHA-256, to be compared with the terminal event's.

These are the reader's rules as code. The follower keeps the same ones, and a reader in another language can be
modelled on this module.
"""

import json
from enum import Enum, auto
from typing import Any

from keepstream.events import (
    AttemptFailed,
    AttemptFinished,
    ChoiceSnapshot,
    Delta,
    DeltaEvent,
    Event,
    JobCancelled,
    JobCompleted,
    JobExpired,
    JobFailed,
    Snapshot,
    TerminalEvent,
    ToolCallDelta,
)
from keepstream.extras import Extras, merged_extra
from keepstream.names import EventId
from keepstream.results import ToolCall, output_sha256


class Place(Enum):
    """The place of an event relative to the last one applied."""

    SEEN = auto()  #: Applied before, or older: ignore it.
    NEXT = auto()  #: Apply it.
    AHEAD = auto()  #: Events before it are missing: read the log first.


def place_of(event: Event, last: EventId | None) -> Place:
    """Return the place of ``event`` for a reader who has applied all events up to ``last``."""
    return place_of_id(event.event_id, event.type, last)


def place_of_id(here: EventId, event_type: str, last: EventId | None) -> Place:
    """Return the same for an event of which no more is known than its head."""
    if last is not None and here <= last:
        return Place.SEEN
    if event_type == "snapshot":  # it replaces everything before it
        return Place.NEXT
    expected = last.n + 1 if last is not None and last.attempt == here.attempt else 1
    return Place.NEXT if here.n == expected else Place.AHEAD


class Transcript:
    """The output of one job, built from its events. Not thread-safe."""

    def __init__(self) -> None:
        self.last: EventId | None = None  #: The last event applied.
        self.behind = False  #: Whether the latest event was held back because others before it are missing.
        self.finished = False  #: Whether the provider's stream is complete.
        self.terminal: TerminalEvent | None = None  #: The event that ended the job.
        self.provider_details: dict[str, Any] | None = None  #: As ``attempt.finished`` gave them.
        self._choices: dict[int, _Choice] = {}

    def apply(self, event: Event) -> bool:
        """Apply ``event`` if it comes next, and return whether it did."""
        place = place_of(event, self.last)
        if place is not Place.NEXT:
            self.behind = self.behind or place is Place.AHEAD
            return False
        if self.last is None or event.attempt > self.last.attempt:
            self._start_over()
        self.last = event.event_id
        self.behind = False
        match event:
            case DeltaEvent():
                self._choices.setdefault(event.choice, _Choice()).append(event.delta)
            case Snapshot():
                self._start_over()
                self._choices = {choice.index: _Choice.of(choice) for choice in event.choices}
                self.finished = event.finished
                self.provider_details = event.provider_details
            case AttemptFailed():
                self._start_over()
            case AttemptFinished():
                self.finished = True
                self.provider_details = event.provider_details
                self._note_finish_reasons(event.finish_reasons)
            case JobCompleted() | JobFailed() | JobCancelled() | JobExpired():
                self.terminal = event
                self._note_finish_reasons(event.finish_reasons)
            case _:  # attempt.started adds no output; unknown types are ignored
                pass
        return True

    @property
    def attempt(self) -> int:
        """The attempt whose output this is; 0 before the first event."""
        return self.last.attempt if self.last is not None else 0

    @property
    def choices(self) -> list[ChoiceSnapshot]:
        """The output so far, by index."""
        return [self._choices[index].snapshot(index) for index in sorted(self._choices)]

    @property
    def text(self) -> str:
        """The first choice's content so far."""
        return "".join(self._choices[min(self._choices)].content) if self._choices else ""

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the content so far; at the end it equals the event's ``output_sha256``."""
        return output_sha256("".join(self._choices[index].content) for index in sorted(self._choices))

    def _start_over(self) -> None:
        self._choices = {}
        self.finished = False
        self.provider_details = None

    def _note_finish_reasons(self, reasons: dict[int, str | None]) -> None:
        for index, reason in reasons.items():
            self._choices.setdefault(index, _Choice()).finish_reason = reason


class _Choice:
    """One choice under construction. Texts are kept in pieces: joining them at each delta would take quadratic time."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.finish_reason: str | None = None
        self.tool_calls: dict[int, _Call] = {}
        self.extras = Extras()

    @classmethod
    def of(cls, snapshot: ChoiceSnapshot) -> "_Choice":
        choice = cls()
        choice.content.append(snapshot.content)
        choice.reasoning.append(snapshot.reasoning)
        choice.refusal.append(snapshot.refusal)
        choice.finish_reason = snapshot.finish_reason
        choice.tool_calls = {position: _Call(call) for position, call in enumerate(snapshot.tool_calls)}
        choice.extras = Extras(snapshot.extra)
        return choice

    def append(self, delta: Delta) -> None:
        self.content.append(delta.content or "")
        self.reasoning.append(delta.reasoning or "")
        self.refusal.append(delta.refusal or "")
        for fragment in delta.tool_calls or ():
            self.tool_calls.setdefault(fragment.index, _Call()).append(fragment)
        if delta.extra:
            for name, piece in delta.extra.items():
                self.extras.add(name, piece)

    def snapshot(self, index: int) -> ChoiceSnapshot:
        return ChoiceSnapshot(
            index=index,
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            refusal="".join(self.refusal),
            finish_reason=self.finish_reason,
            tool_calls=[self.tool_calls[position].value() for position in sorted(self.tool_calls)],
            extra=self.extras.value(),
        )


class _Call:
    """One tool call under construction."""

    def __init__(self, given: ToolCall | None = None) -> None:
        self.given = given or ToolCall(id="", name="", arguments="", arguments_valid=False)
        self.id = self.given.id
        self.name = self.given.name
        self.arguments = [self.given.arguments]
        self.type = self.given.type
        self.extra = self.given.extra

    def append(self, fragment: ToolCallDelta) -> None:
        self.id = fragment.id or self.id
        self.name = fragment.name or self.name
        self.arguments.append(fragment.arguments or "")
        self.type = fragment.type or self.type
        if fragment.extra:
            self.extra = merged_extra(self.extra, fragment.extra)

    def value(self) -> ToolCall:
        arguments = "".join(self.arguments)
        return self.given.model_copy(
            update={
                "id": self.id,
                "type": self.type,
                "name": self.name,
                "arguments": arguments,
                "arguments_valid": _is_json(arguments),
                "extra": self.extra,
            }
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
