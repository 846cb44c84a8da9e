"""The verdict: what becomes of a job after an attempt.

In: what the attempt brought, why it broke off and who asked it to stop, from the engine.  Out: an
``Ending``, which the engine stores and publishes.  Pure: no clock, no database, no publisher, and no
randomness but what is handed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keepstream.client.endings import EXPIRED_MESSAGE, WORKERS_LOST_MESSAGE
from keepstream.errors import ErrorCode
from keepstream.results import Choice, JobStatus, Usage
from keepstream_worker.jobs import retry
from keepstream_worker.jobs.active_job import STOP_FAILURES, Stop
from keepstream_worker.values import AttemptReason, Ending, Failure, JobKey, Outcome

#: Seconds that a sweeper leaves a short retry to the worker that sleeps through it.
SWEEPER_COURTESY: Final = 5.0


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """An attempt that is over: what it brought, and why it broke off."""

    key: JobKey
    attempt: int
    worker_id: str
    tries: int  #: Attempts that count against the job's limit, this one included.
    announced: bool  #: Whether followers have heard of it.
    remaining_seconds: float  #: Until the job's total time is used up.
    failure: Failure | None = None  #: Why it broke off; None: the answer is whole.
    stop: Stop | None = None  #: What it was asked to stop for, in time or too late.
    choices: Sequence[Choice] = ()
    usage: Usage = Usage()
    first_token_ms: float | None = None
    provider_request_id: str | None = None
    provider_details: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a job is attempted, and where it waits between two attempts."""

    max_attempts: int
    backoff: retry.BackoffPolicy
    sleep_limit: float  #: Seconds; the worker sleeps through a shorter wait, the database keeps a longer one.


def failure_before_start(*, expired: bool, remaining_seconds: float) -> Failure | None:
    """Return why an attempt that was just claimed must not begin, or None if it may."""
    if expired:
        return Failure(code=ErrorCode.EXPIRED, message=EXPIRED_MESSAGE)
    if remaining_seconds <= 0:
        return STOP_FAILURES[Stop.TOTAL_TIMEOUT]
    return None


def decide(report: AttemptReport, policy: RetryPolicy, random: Callable[[], float]) -> Ending:
    """Return what becomes of the job; ``random`` gives a number in [0, 1).

    An attempt that was superseded is not the job's business any more: the engine does not ask.
    """
    failure = report.failure
    ending = Ending(
        key=report.key,
        attempt=report.attempt,
        worker_id=report.worker_id,
        outcome=Outcome.FINISHED,
        status=JobStatus.COMPLETED,
        choices=report.choices,
        usage=report.usage,
        first_token_ms=report.first_token_ms,
        provider_request_id=report.provider_request_id,
        provider_details=report.provider_details,
    )
    if failure is None:
        return replace(ending, status=JobStatus.CANCELLED) if report.stop is Stop.CANCELLED else ending
    ending = replace(
        ending,
        failure=failure,
        retryable=retry.is_retryable(failure),
        provider_request_id=failure.provider_request_id or report.provider_request_id,
    )
    if report.stop is Stop.CANCELLED or failure.code is ErrorCode.CANCELLED:
        return cancelled(ending)
    if failure.code is ErrorCode.EXPIRED:
        return replace(ending, outcome=Outcome.UNSTARTED, status=JobStatus.EXPIRED)
    decision = retry.decide(
        failure,
        tries=report.tries,
        max_attempts=policy.max_attempts,
        remaining_seconds=report.remaining_seconds,
        policy=policy.backoff,
        random=random,
    )
    if not decision.retry:
        outcome = Outcome.FAILED if report.announced else Outcome.UNSTARTED
        return replace(ending, outcome=outcome, status=JobStatus.FAILED)
    interrupted = failure.code is ErrorCode.INTERRUPTED
    sleeps_here = not interrupted and decision.delay <= policy.sleep_limit
    return replace(
        ending,
        outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
        status=JobStatus.RETRYING,
        retry_in=decision.delay,
        resend_in=decision.delay + (SWEEPER_COURTESY if sleeps_here else 0.0),
        next_reason=AttemptReason.INTERRUPTED if interrupted else AttemptReason.RETRY,
    )


def recovered(
    key: JobKey, attempt: int, worker_id: str, choices: Sequence[Choice], details: dict[str, Any] | None
) -> Ending:
    """The attempt before had finished when its worker died; its output is this one's."""
    return Ending(
        key=key,
        attempt=attempt,
        worker_id=worker_id,
        outcome=Outcome.RECOVERED,
        status=JobStatus.COMPLETED,
        choices=choices,
        provider_details=details,
    )


def attempts_exhausted(key: JobKey, attempt: int, worker_id: str, choices: Sequence[Choice]) -> Ending:
    """The job has lost as many workers as it may have attempts; what the last one produced is kept."""
    return Ending(
        key=key,
        attempt=attempt,
        worker_id=worker_id,
        outcome=Outcome.UNSTARTED,
        status=JobStatus.FAILED,
        choices=choices,
        failure=Failure(code=ErrorCode.WORKER_LOST, message=WORKERS_LOST_MESSAGE),
        retryable=False,
    )


def cancelled(ending: Ending) -> Ending:
    """The database holds a cancel request, which wins over whatever else would become of the job."""
    return replace(
        ending,
        outcome=ending.outcome if ending.failure is None else Outcome.CANCELLED,
        status=JobStatus.CANCELLED,
        failure=STOP_FAILURES[Stop.CANCELLED],
        retryable=False,
    )


def defective(key: JobKey, attempt: int, worker_id: str, error: str) -> Ending:
    """A defect of ours was met outside the stream; what the attempt has brought is not to be trusted."""
    return Ending(
        key=key,
        attempt=attempt,
        worker_id=worker_id,
        outcome=Outcome.FAILED,
        status=JobStatus.FAILED,
        failure=Failure(code=ErrorCode.INTERNAL, message=f"internal error ({error})"),
        retryable=False,
    )


def unstorable(ending: Ending, reason: str) -> Ending:
    """The database refuses a value of the output: the job fails without it, and what it cost is kept."""
    return replace(
        ending,
        outcome=Outcome.FAILED,
        status=JobStatus.FAILED,
        choices=(),
        provider_details=None,
        failure=Failure(code=ErrorCode.INTERNAL, message=f"the output could not be stored: {reason}"),
        retryable=False,
    )
