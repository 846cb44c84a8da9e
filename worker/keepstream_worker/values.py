"""Values that the rooms of the worker share: which job, which attempt, how it ended, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from keepstream.errors import ErrorCode
from keepstream.results import Choice, JobStatus, ProviderError, Usage
from keepstream_worker.limits import RateLimits

#: Characters of a host's name in the id of its workers.
_HOST_LENGTH: Final = 64


class JobKey(NamedTuple):
    """What identifies a job."""

    tenant: str
    id: str


class Target(NamedTuple):
    """Who is asked: a model of a provider."""

    provider: str
    model: str


def worker_id(host: str, pid: int, start: str) -> str:
    """Return the id of a worker process; ``start``, without a hyphen, tells it from the one before it."""
    return f"{host[:_HOST_LENGTH]}-{pid}-{start}"


def is_on_host(worker: str, host: str) -> bool:
    """Whether a worker, by its id, is one of this host, and not of one whose name begins in the same way."""
    return worker.rsplit("-", 2)[0] == host[:_HOST_LENGTH]


class AttemptReason(StrEnum):
    """Why an attempt is made."""

    FIRST = "first"
    RETRY = "retry"  #: The attempt before failed.
    WORKER_LOST = "worker_lost"  #: The worker of the attempt before died.
    INTERRUPTED = "interrupted"  #: The worker of the attempt before was shut down.
    FALLBACK = "fallback"  #: The target before will not answer this job, or has had its attempts; the next is asked.


class Outcome(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    RECOVERED = "recovered"  #: Made no stream: it took over the whole answer of the attempt before.
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    UNSTARTED = "unstarted"  #: No time or no attempt was left; such an attempt leaves no row.


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed. Whether another attempt can help is for the retry table to say."""

    code: ErrorCode
    message: str  #: Safe to store, log and show: never a prompt, an output or a key.
    http_status: int | None = None  #: Of the response; None if the failure came without one, or within a 200.
    retry_after: float | None = None  #: Seconds the provider asks to wait, at least.
    should_retry: bool | None = None  #: The provider's advice (``x-should-retry``), which counts; None: none given.
    provider_request_id: str | None = None
    #: The provider's own words, for the attempt's row: they may quote the prompt, so they go to no event and no log.
    provider_error: ProviderError | None = field(default=None, repr=False)
    provider_code: str | None = None  #: The provider's own name for it, if that is a plain identifier.
    rate_limits: RateLimits | None = None  #: What the refusal said about the provider's limits, beside the wait.


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, what it produced, and what becomes of its job."""

    key: JobKey
    attempt: int
    worker_id: str
    outcome: Outcome
    status: JobStatus  #: A terminal status, or RETRYING.
    choices: Sequence[Choice] = ()
    usage: Usage = Usage()
    failure: Failure | None = None
    retryable: bool | None = None
    retry_in: float = 0.0  #: Seconds until the job is due again; only with RETRYING.
    counted: bool = True  #: Whether the attempt counts against ``max_attempts``; only with RETRYING.
    #: The targets that are left to the job, if it is not to ask those before them again; only with RETRYING.
    chain: tuple[Target, ...] | None = None
    least_tokens: int | None = None  #: What the attempt took; the next is not estimated at less.
    next_reason: AttemptReason = AttemptReason.RETRY  #: Why the next attempt is made; only with RETRYING.
    first_token_ms: float | None = None
    provider_request_id: str | None = None
    provider_details: dict[str, Any] | None = None
    terminal_event_id: str | None = None
    rate_limits: RateLimits | None = None  #: As the provider's answer says; not stored.


class Ended(NamedTuple):
    """What a job has cost in all, known once its ending is stored."""

    usage: Usage | None  #: Summed over the job's attempts; None if none of them cost anything.
    attempts: int


class Delta(NamedTuple):
    """What one chunk adds to one choice, in the fields of ``keepstream.events.Delta``."""

    choice: int
    fields: dict[str, Any]  #: Any of content, reasoning, refusal (texts to append), tool_calls (fragments), extra.
