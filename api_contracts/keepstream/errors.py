"""Error codes and exceptions: the names of failures, on the wire, in the database and in code.

In: nothing.
Out: ``ErrorCode``, which rows store and events carry; ``ErrorInfo``, to events and results; the exceptions that the
client raises.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class ErrorCode(StrEnum):
    """Why an attempt, a job or a message failed. New codes may be added; readers must accept codes they do not know."""

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
    # -- the connection to the provider, and the stream --
    CONNECTION = "connection"  #: Refused, reset or cut before the answer was complete.
    TIMEOUT = "timeout"  #: No connection, first token or further data within the limit.
    EMPTY_STREAM = "empty_stream"  #: The stream ended without any output.
    TRUNCATED_STREAM = "truncated_stream"  #: The stream ended before the answer was complete.
    INVALID_STREAM = "invalid_stream"  #: The stream cannot be read as chat-completion events.
    INVALID_RESPONSE = "invalid_response"  #: The answer is not an event stream, but an HTML page for instance.
    OUTPUT_TOO_LARGE = "output_too_large"  #: The output exceeded a configured limit.
    # -- Keepstream itself --
    TOTAL_TIMEOUT = "total_timeout"  #: The job's total time is used up.
    EXPIRED = "expired"  #: The job had not started by its ``expires_at``.
    CANCELLED = "cancelled"  #: Someone cancelled the job.
    INTERRUPTED = "interrupted"  #: The worker was shut down; another one takes over.
    WORKER_LOST = "worker_lost"  #: The worker died; another one takes over, unless the attempts are used up.
    SUPERSEDED = "superseded"  #: A newer attempt has taken the job over.
    INVALID_JOB = "invalid_job"  #: The message does not hold a valid job.
    UNKNOWN_PROVIDER = "unknown_provider"  #: No provider of that name is configured.
    INTERNAL = "internal"  #: A defect in Keepstream; the worker's log has the details.


class ErrorInfo(BaseModel):
    """A failure, in events and results. ``message`` never holds a prompt, an output or a key."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str  #: An ``ErrorCode``, or a code newer than this library.
    message: str


class KeepstreamError(Exception):
    """Base of all exceptions of the client."""


class InvalidJobError(KeepstreamError, ValueError):
    """The job is not valid; the message names the field and what to change."""


class IdempotencyConflictError(KeepstreamError):
    """The idempotency key or job id belongs to a different request. Use a new one."""


class InvalidArgumentError(KeepstreamError, ValueError):
    """An argument of a call cannot be used; the message names it and says what it may be."""


class ClientClosedError(KeepstreamError):
    """The client has been closed. Make a new one."""


class JobNotFoundError(KeepstreamError, LookupError):
    """No such job for this tenant, neither in the log nor in the database."""


class JobStateError(KeepstreamError):
    """The job is in a state in which this cannot be done; the message says what can."""


class InvalidCursorError(KeepstreamError, ValueError):
    """``after`` is not the id of an event of this job; event ids look like ``2-17``."""


class BrokerUnavailableError(KeepstreamError, ConnectionError):
    """Redis did not take the job, or its cancellation, in time, and no database keeps it instead."""


class StoreUnavailableError(KeepstreamError, ConnectionError):
    """The database did not answer."""


class NotConfiguredError(KeepstreamError):
    """The call needs a service that this client was not given, the database for instance."""


class FollowTimeoutError(KeepstreamError, TimeoutError):
    """The job did not go on, or did not end, for as long as the caller allowed; the message says what it waits for."""


class EventsLostError(KeepstreamError):
    """The job has ended, but events before its end are gone, and no database is configured to answer instead."""


class InvalidSettingError(KeepstreamError, ValueError):
    """A URL or setting cannot be used; the message says why and what to use instead."""


class UnexpectedError(KeepstreamError):
    """Something failed that Keepstream did not foresee: a defect, or a system without memory. The cause is attached."""
