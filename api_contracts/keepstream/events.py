"""The events: what followers of a job receive, one JSON text per pub/sub message and log entry.

In: JSON texts from Redis (``parse_event``), or a stored result (``terminal_event``, ``snapshot_event``).
Out: typed, frozen events, to readers. The published JSON Schema and AsyncAPI document are generated from the models.

The rules for a reader: apply an event only if its id is greater than the last one applied; on an event of a higher
attempt, drop what the older attempt sent; if ``n`` skips within an attempt and the event is not a ``snapshot``, read
the log; ignore unknown types and unknown fields.
"""

from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from keepstream import names
from keepstream.errors import ErrorInfo
from keepstream.extras import abridged_fields
from keepstream.results import Choice, CompletionResult, JobStatus, ToolCall, Usage, output_sha256

VERSION: Final = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ToolCallDelta(_Part):
    """A fragment of a tool call. ``arguments`` fragments of one ``index`` are joined in order."""

    index: int = Field(description="Position of the call within its choice, from 0.")
    id: str | None = Field(
        default=None, description="Sent with the call's first fragment; a later one of the same call replaces it."
    )
    name: str | None = Field(
        default=None, description="Name so far: a later name of the same call replaces the earlier one."
    )
    arguments: str | None = Field(default=None, description="The next piece of the arguments' text.")
    type: str | None = Field(default=None, description="Sent with the first fragment if it is not function.")
    extra: dict[str, Any] | None = Field(
        default=None, description="What else the provider sent with the call, a signature for instance; it replaces."
    )


_EXTRA: Final = (
    "Images, audio, annotations, logprobs, signatures and the like, as the provider sent them, by name: texts and lists"
    ' are appended, objects joined field by field. {"omitted": "image", "bytes": n} stands for what is too large for'
    " events; the row holds it."
)


class Delta(_Part):
    """What one event adds to one choice; each text is appended to what the reader holds."""

    content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    extra: dict[str, Any] | None = Field(default=None, description=_EXTRA)


class ChoiceSnapshot(_Part):
    """One choice, with its whole output so far."""

    index: int
    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    finish_reason: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    extra: dict[str, Any] | None = Field(default=None, description="As in a delta, but all of it.")

    @classmethod
    def of(cls, choice: Choice) -> Self:
        """Return the snapshot of a stored choice; what is too large for events is omitted in it."""
        snapshot = cls.model_validate(choice, from_attributes=True)
        return snapshot.model_copy(update={"extra": abridged_fields(choice.extra)})

    def to_choice(self) -> Choice:
        """Return the choice to be stored."""
        return Choice.model_validate(self, from_attributes=True)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = VERSION
    id: str = Field(
        pattern=names.EVENT_ID_PATTERN, description="<attempt>-<n>; n counts from 1 without gaps within the attempt."
    )
    job_id: str
    attempt: int = Field(ge=1)
    ts: int = Field(description="Milliseconds since 1970-01-01 UTC, by the sender's clock.")

    @property
    def event_id(self) -> names.EventId:
        """The id as an ordered pair."""
        return names.parse_event_id(self.id)


class AttemptStarted(_Event):
    """A provider stream begins. Drop what older attempts sent."""

    type: Literal["attempt.started"] = "attempt.started"
    model: str
    provider: str
    reason: str = Field(description="first, retry, worker_lost or interrupted.")
    continues: bool = Field(
        default=False,
        description="True if the previous attempt's output is kept; a snapshot with it follows.",
    )


class DeltaEvent(_Event):
    """More output for one choice."""

    type: Literal["delta"] = "delta"
    choice: int
    delta: Delta


class Snapshot(_Event):
    """The attempt's whole output up to and including this id; it replaces what the reader holds."""

    type: Literal["snapshot"] = "snapshot"
    choices: list[ChoiceSnapshot]
    finished: bool = Field(default=False, description="True if the provider's stream had completed by then.")
    usage: Usage | None = None
    provider_details: dict[str, Any] | None = Field(default=None, description="As in attempt.finished, if finished.")


class AttemptFailed(_Event):
    """The attempt failed. Drop what it sent."""

    type: Literal["attempt.failed"] = "attempt.failed"
    error: ErrorInfo
    retryable: bool
    retry_in: float | None = Field(default=None, description="Seconds until the next attempt; null: there is none.")
    usage: Usage | None = None


class AttemptFinished(_Event):
    """The provider's stream is complete; the result is about to be stored."""

    type: Literal["attempt.finished"] = "attempt.finished"
    finish_reasons: dict[int, str | None] = Field(description="Choice index to finish reason, as the provider sent it.")
    usage: Usage | None = None
    provider_details: dict[str, Any] | None = Field(
        default=None, description="The provider's own id, the model really used, service tier, filter results."
    )


class _Terminal(_Event):
    status: JobStatus
    finish_reasons: dict[int, str | None] = Field(default_factory=dict)
    tool_call_ids: list[str] = Field(default_factory=list)
    usage: Usage | None = Field(default=None, description="Summed over all attempts.")
    attempts: int = Field(description="Provider streams made for the job.")
    error: ErrorInfo | None = None
    output_sha256: str = Field(
        description="SHA-256 in hex over the UTF-8 bytes of the choices' content, joined in index order."
    )


class JobCompleted(_Terminal):
    """The result is stored."""

    type: Literal["job.completed"] = "job.completed"


class JobFailed(_Terminal):
    """The job failed for good; the partial output of its last attempt is stored."""

    type: Literal["job.failed"] = "job.failed"


class JobCancelled(_Terminal):
    """The job was cancelled; the partial output is stored."""

    type: Literal["job.cancelled"] = "job.cancelled"


class JobExpired(_Terminal):
    """The job had not started by its ``expires_at``."""

    type: Literal["job.expired"] = "job.expired"


class UnknownEvent(_Event):
    """An event of a type this library does not know; readers ignore it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str


class RawEvent(NamedTuple):
    """An event that is passed on as it is: its head, and its bytes."""

    id: str
    type: str
    payload: bytes  #: The whole event, a JSON text in UTF-8.


class _Head(_Event):
    """What every event has."""

    type: str


TerminalEvent = JobCompleted | JobFailed | JobCancelled | JobExpired
KnownEvent = Annotated[
    AttemptStarted
    | DeltaEvent
    | Snapshot
    | AttemptFailed
    | AttemptFinished
    | JobCompleted
    | JobFailed
    | JobCancelled
    | JobExpired,
    Field(discriminator="type"),
]
Event = (
    AttemptStarted
    | DeltaEvent
    | Snapshot
    | AttemptFailed
    | AttemptFinished
    | JobCompleted
    | JobFailed
    | JobCancelled
    | JobExpired
    | UnknownEvent
)

#: The one list of event types; the schemas are generated from it.
KNOWN_EVENTS: Final[dict[str, type[_Event]]] = {
    "attempt.started": AttemptStarted,
    "delta": DeltaEvent,
    "snapshot": Snapshot,
    "attempt.failed": AttemptFailed,
    "attempt.finished": AttemptFinished,
    "job.completed": JobCompleted,
    "job.failed": JobFailed,
    "job.cancelled": JobCancelled,
    "job.expired": JobExpired,
}
TERMINAL_TYPES: Final = frozenset({"job.completed", "job.failed", "job.cancelled", "job.expired"})
KNOWN_EVENT_ADAPTER: Final[TypeAdapter[KnownEvent]] = TypeAdapter(KnownEvent)


def parse_event(text: str | bytes) -> Event:
    """Return the typed event that ``text`` (JSON) holds.

    Raises:
        ValueError: ``text`` is not an event of version 1.
    """
    try:
        return KNOWN_EVENT_ADAPTER.validate_json(text)
    except ValueError:
        pass  # not an event, or of a type that is not known here
    try:
        event = UnknownEvent.model_validate_json(text)
    except ValueError:
        event = None
    if event is None or event.type in KNOWN_EVENTS:
        # Raised outside of the handler, whose exception holds the text.
        raise ValueError("not a Keepstream event of version 1")
    return event


def parse_head(text: str | bytes) -> tuple[str, str]:
    """Return the id and the type of the event that ``text`` (JSON) holds.

    Raises:
        ValueError: ``text`` is not an event of version 1.
    """
    try:
        head = _Head.model_validate_json(text)
    except ValueError:
        head = None
    if head is None:
        # Raised outside of the handler, whose exception holds the text.
        raise ValueError("not a Keepstream event of version 1")
    return head.id, head.type


def is_terminal(event: Event | RawEvent) -> bool:
    """Tell whether ``event`` ends the job."""
    return event.type in TERMINAL_TYPES


_TERMINAL_EVENTS: Final[dict[JobStatus, type[TerminalEvent]]] = {
    JobStatus.COMPLETED: JobCompleted,
    JobStatus.FAILED: JobFailed,
    JobStatus.CANCELLED: JobCancelled,
    JobStatus.EXPIRED: JobExpired,
}


def terminal_event(result: CompletionResult) -> TerminalEvent:
    """Return the terminal event of a stored job, which its row determines.

    Raises:
        ValueError: the job is not terminal.
    """
    model = _TERMINAL_EVENTS.get(result.status)
    if model is None or result.terminal_event_id is None:
        raise ValueError(f"a job that is {result.status} has no terminal event")
    contents = (choice.content for choice in result.choices)
    return model(
        id=result.terminal_event_id,
        job_id=result.id,
        attempt=names.parse_event_id(result.terminal_event_id).attempt,
        ts=_finished_ms(result),
        status=result.status,
        finish_reasons={choice.index: choice.finish_reason for choice in result.choices},
        tool_call_ids=[call.id for choice in result.choices for call in choice.tool_calls],
        usage=result.usage,
        attempts=len(result.attempts),
        error=result.error,
        output_sha256=result.output_sha256 or output_sha256(contents),
    )


def snapshot_event(result: CompletionResult, event_id: str) -> Snapshot:
    """Return the stored output as a snapshot with the id ``event_id``, for followers who missed the deltas."""
    return Snapshot(
        id=event_id,
        job_id=result.id,
        attempt=names.parse_event_id(event_id).attempt,
        ts=_finished_ms(result),
        choices=[ChoiceSnapshot.of(choice) for choice in result.choices],
        finished=result.status is JobStatus.COMPLETED,
        usage=result.attempts[-1].usage if result.attempts else None,
        provider_details=abridged_fields(result.provider_details),
    )


def _finished_ms(result: CompletionResult) -> int:
    return int((result.finished_at or result.created_at).timestamp() * 1000)
