"""The results: stored jobs, as queries return them.

In: rows of the database, from ``keepstream.client.queries``.
Out: frozen, typed results, to users of the client and to the command line.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from keepstream import next_turn
from keepstream.errors import ErrorInfo
from keepstream.extras import LEFT_OUT


class JobStatus(StrEnum):
    """The state of a job. The last four are terminal: a job reaches exactly one of them."""

    QUEUED = "queued"  #: Waiting for a worker.
    RUNNING = "running"  #: An attempt is under way.
    RETRYING = "retrying"  #: Waiting for its next attempt.
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether this state is final."""
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})


class UsageSource(StrEnum):
    """The source of a usage figure."""

    PROVIDER = "provider"  #: Reported by the provider.
    ESTIMATED = "estimated"  #: Estimated from the text that arrived; the provider reported nothing.
    UNKNOWN = "unknown"  #: Nothing is known; the figures are null.


class _Value(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        validate_by_name=True,  # "class", as the JSON has it, is no name in Python
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class Usage(_Value):
    """Tokens paid for. An unknown figure is null, never 0.

    An attempt's ``details`` are the provider's report, complete; a job's are the other figures of all its reports,
    summed: cached and reasoning tokens, audio, cost.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    source: UsageSource = UsageSource.UNKNOWN
    details: dict[str, Any] | None = None

    @property
    def cost(self) -> float | None:
        """What it cost, in the provider's own unit, if its report says that; None: it does not."""
        cost = (self.details or {}).get("cost")
        if not isinstance(cost, int | float) or isinstance(cost, bool) or not math.isfinite(cost):
            return None
        return float(cost)


class ToolCall(_Value):
    """A tool call, with its streamed arguments joined."""

    id: str
    type: str = "function"
    name: str
    arguments: str = Field(description="As the model wrote them; a function call without arguments has {}.")
    arguments_valid: bool = Field(description="Whether the arguments are valid JSON.")
    extra: dict[str, Any] | None = Field(default=None, description="Provider extras, a thought signature for instance.")


class Choice(_Value):
    """One answer of the model."""

    index: int
    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    finish_reason: str | None = Field(default=None, description="As the provider sent it.")
    tool_calls: list[ToolCall] = Field(default_factory=list)
    extra: dict[str, Any] | None = Field(
        default=None,
        description=(
            "What else came, under the provider's names: images, audio, annotations, logprobs, signatures."
            " reasoning_fields: the names under which it sent the reasoning; left_out: what is not whole, and why."
        ),
    )

    @property
    def left_out(self) -> dict[str, str]:
        """Fields of ``extra`` that are not whole, and why; a call's are named ``tool_calls[0]``."""
        known = (self.extra or {}).get(LEFT_OUT)
        return {name: str(reason) for name, reason in known.items()} if isinstance(known, dict) else {}

    def parsed_arguments(self, position: int = 0) -> Any:
        """Return the decoded arguments of the tool call at ``position``.

        Raises:
            IndexError: there is no such tool call.
            ValueError: the arguments are not valid JSON.
        """
        return json.loads(self.tool_calls[position].arguments)


class ProviderError(_Value):
    """What the provider itself said of a refusal: cut, and without anything that looks like a key."""

    message: str | None = None
    type: str | None = None
    code: str | None = None
    param: str | None = Field(default=None, description="The part of the request that it refers to.")


class AttemptResult(_Value):
    """One provider stream made for the job."""

    number: int
    reason: str
    outcome: str | None = Field(
        description="finished, recovered, failed, cancelled, interrupted or lost; null while it runs."
    )
    worker: str | None = None
    provider: str = Field(description="Which it asked; with fallbacks that may be another one than the job's.")
    model: str
    started_at: datetime
    finished_at: datetime | None = None
    first_token_ms: float | None = Field(default=None, description="Milliseconds from the request to the first output.")
    error: ErrorInfo | None = None
    http_status: int | None = None
    retryable: bool | None = None
    provider_request_id: str | None = None
    provider_error: ProviderError | None = None
    usage: Usage | None = None


_PASSING = frozenset(
    {
        "concurrency",
        "cooling",
        "pickup",
        "place",
        "provider",
        "requests_per_minute",
        "retry",
        "tenant",
        "tokens_per_minute",
    }
)


class WaitingFor(_Value):
    """What a job waits for."""

    cause: str = Field(
        description=(
            "worker: none is alive for the queue, or the job's own died. place: every worker is busy. pickup: a worker"
            " is to take it. retry: its next attempt is not due yet. concurrency, requests_per_minute,"
            " tokens_per_minute: of the provider or model, a limit is reached. cooling: it asked for a pause. broken:"
            " it failed again and again. tenant: it runs as many jobs as it may. provider: an attempt runs. redis,"
            " database: it does not answer. job: no such job is known yet. New causes may be added."
        )
    )
    text: str = Field(description="The same for people; it may change.")

    @property
    def passes(self) -> bool:
        """Whether it passes by itself; otherwise somebody should do something."""
        return self.cause in _PASSING

    def __str__(self) -> str:
        return self.text


class Target(_Value):
    """A provider and a model of it."""

    provider: str
    model: str


class CompletionResult(_Value):
    """A job with everything that is stored about it."""

    id: str
    tenant: str
    status: JobStatus
    model: str
    provider: str
    fallbacks: list[Target] = Field(
        default_factory=list,
        description=(
            "Further targets, as the job was enqueued; each attempt says which one it asked. Empty where only the"
            " answer was read."
        ),
    )
    job_class: str = Field(
        default="interactive",
        validation_alias="class",
        serialization_alias="class",
        description="interactive or bulk.",
    )
    request: dict[str, Any] | None = Field(
        default=None, description="The chat-completions body as it was enqueued; null where only the answer was read."
    )
    metadata: dict[str, Any] = Field(default_factory=dict)
    retry_of: str | None = Field(default=None, description="Id of the job that this one repeats.")
    waiting_for: WaitingFor | None = Field(default=None, description="Null: the job runs, or has ended.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = Field(description="The newest attempt's number; 0 before the first.")
    partial: bool = Field(default=False, description="True if the output is of an attempt that did not finish.")
    choices: list[Choice] = Field(default_factory=list)
    usage: Usage | None = Field(default=None, description="Summed over all attempts.")
    error: ErrorInfo | None = None
    output_sha256: str | None = None
    terminal_event_id: str | None = None
    provider_details: dict[str, Any] | None = Field(
        default=None, description="The provider's own id, model, service tier and fingerprint."
    )
    attempts: list[AttemptResult] = Field(default_factory=list)

    @property
    def text(self) -> str:
        """The first choice's content."""
        return self.choices[0].content if self.choices else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The first choice's tool calls."""
        return self.choices[0].tool_calls if self.choices else []

    def assistant_message(self, choice: int = 0) -> dict[str, Any]:
        """Return the message that stands for an answer in the next request, to be appended to its ``messages``.

        It has the text, the refusal, the tool calls with their ids, and everything else that the provider wants back,
        where it wants it: reasoning under the name by which it came, signatures, the items of the Responses API.

        Args:
            choice: The answer's index.

        Raises:
            IndexError: there is no answer with this index.
        """
        for answer in self.choices:
            if answer.index == choice:
                provider = self.attempts[-1].provider if self.attempts else self.provider
                return next_turn.assistant_message(answer, provider)
        raise IndexError(f"job {self.id} has no choice {choice}")


class JobSummary(_Value):
    """A job as a listing shows it: without its output and attempts."""

    id: str
    tenant: str
    status: JobStatus
    model: str
    provider: str
    job_class: str = Field(
        default="interactive",
        validation_alias="class",
        serialization_alias="class",
        description="interactive or bulk.",
    )
    prompt_start: str = Field(default="", description="Beginning of the last user message, on one line.")
    metadata: dict[str, Any] = Field(default_factory=dict)
    retry_of: str | None = Field(default=None, description="Id of the job that this one repeats.")
    waiting_for: WaitingFor | None = Field(default=None, description="Null: the job runs, or has ended.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int
    usage: Usage | None = None
    error: ErrorInfo | None = None


class JobPage(list[JobSummary]):
    """Jobs of a listing, newest first, and where it goes on.

    A listing looks at a limited number of jobs, so a page may be short, or empty, although older jobs would fit.
    """

    def __init__(
        self, jobs: Iterable[JobSummary] = (), *, next_before: str | None = None, looked_back_to: datetime | None = None
    ) -> None:
        super().__init__(jobs)
        #: What to give as ``before`` for the next page; None: there are no more.
        self.next_before = next_before
        #: When the last job was created that was looked at; None: all were.
        self.looked_back_to = looked_back_to


def output_sha256(contents: Iterable[str]) -> str:
    """Return the SHA-256 (hex) over the UTF-8 bytes of the choices' contents, given in index order."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content.encode())
    return digest.hexdigest()
