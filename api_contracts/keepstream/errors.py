"""Error codes and exceptions: how every failure is named, on the wire, in the database and in code.

In: nothing.  Out: ``ErrorCode`` to everyone (it is stored in rows and sent in events), ``ErrorInfo``
to events and results, and the exception tree to users of the client.  Exists so that a failure has
one name wherever it is met.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class ErrorCode(StrEnum):
    """Why an attempt, a job or a message failed. New codes may be added; readers keep unknown ones."""

    # -- the provider refused the request --
    BAD_REQUEST = "bad_request"  #: The provider says that the request is wrong.
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"  #: The prompt is longer than the model's context.
    CONTENT_FILTER = "content_filter"  #: The provider's filter refused the prompt.
    AUTH = "auth"  #: The provider did not accept the key.
    PERMISSION = "permission"  #: The key may not use this model or endpoint.
    NOT_FOUND = "not_found"  #: No such model or endpoint; often a wrong base URL.
    INSUFFICIENT_QUOTA = "insufficient_quota"  #: No credit or spending limit left.
    PAYLOAD_TOO_LARGE = "payload_too_large"  #: The provider says that the request body is too large.
    UNPROCESSABLE = "unprocessable"  #: The provider understood the request and cannot run it (422).
    CONFLICT = "conflict"  #: The provider answered 409.
    # -- the provider is busy or broken --
    RATE_LIMITED = "rate_limited"  #: Too many requests or tokens for now.
    OVERLOADED = "overloaded"  #: The provider has no capacity for now.
    SERVER_ERROR = "server_error"  #: The provider failed (5xx).
    PROVIDER_ERROR = "provider_error"  #: The provider reported a failure in the stream.
    TOOL_USE_FAILED = "tool_use_failed"  #: The model produced a tool call the provider could not read.
    # -- the way to the provider, and the stream itself --
    CONNECTION = "connection"  #: Refused, reset or cut before the answer was whole.
    TIMEOUT = "timeout"  #: No connection, first token or further data within the limit.
    EMPTY_STREAM = "empty_stream"  #: The stream ended without any output.
    TRUNCATED_STREAM = "truncated_stream"  #: The stream ended before the answer was whole.
    INVALID_STREAM = "invalid_stream"  #: The stream is not readable as chat-completion events.
    INVALID_RESPONSE = "invalid_response"  #: The answer is no event stream at all, an HTML page for instance.
    OUTPUT_TOO_LARGE = "output_too_large"  #: The output passed a configured limit.
    # -- Keepstream itself --
    TOTAL_TIMEOUT = "total_timeout"  #: The job's total time is used up.
    EXPIRED = "expired"  #: The job waited past its ``expires_at``.
    CANCELLED = "cancelled"  #: Someone cancelled the job.
    INTERRUPTED = "interrupted"  #: The worker was shut down; another one goes on.
    WORKER_LOST = "worker_lost"  #: The worker died; another one goes on, or the attempts are used up.
    SUPERSEDED = "superseded"  #: A newer attempt has taken the job over.
    INVALID_JOB = "invalid_job"  #: The message or request is no valid job.
    UNKNOWN_PROVIDER = "unknown_provider"  #: No provider of that name is configured.
    INTERNAL = "internal"  #: A defect in Keepstream; the log has the details.


class ErrorInfo(BaseModel):
    """A failure as events and results carry it. ``message`` never holds a prompt, an output or a key."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str  #: An ``ErrorCode``, or a code newer than this library.
    message: str


class KeepstreamError(Exception):
    """Base of every exception the client raises on purpose."""


class InvalidJobError(KeepstreamError, ValueError):
    """The job is not valid; the message names the field and says what to change."""


class IdempotencyConflictError(KeepstreamError):
    """The idempotency key or job id is already used for a different request. Use a new key."""


class JobNotFoundError(KeepstreamError, LookupError):
    """No such job for this tenant, neither in the log nor in the database."""


class InvalidCursorError(KeepstreamError, ValueError):
    """``after`` is no event id of this job; event ids look like ``2-17``."""


class BrokerUnavailableError(KeepstreamError, ConnectionError):
    """Redis did not take the job, or its cancellation, in time, and the database does not keep it either."""


class StoreUnavailableError(KeepstreamError, ConnectionError):
    """The database did not answer."""


class NotConfiguredError(KeepstreamError):
    """The call needs a service that this client was made without, the database for instance."""


class FollowTimeoutError(KeepstreamError, TimeoutError):
    """Nothing was heard of the job for the time the caller allowed."""


class EventsLostError(KeepstreamError):
    """The job has ended, but events before its end are gone, and no database is configured to answer instead."""


class InvalidSettingError(KeepstreamError, ValueError):
    """A URL or setting cannot be used; the message says why and what to use instead."""
