"""The verdict: what becomes of a job after an attempt.

In: what the attempt brought, why it broke off and who asked it to stop, from the engine.  Out: an
``Ending``, which the engine stores and publishes.  Pure: no clock, no database, no publisher, and no
randomness but what is handed in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keepstream.client.endings import EXPIRED_MESSAGE, WORKERS_LOST_MESSAGE
from keepstream.errors import ErrorCode
from keepstream.results import Choice, JobStatus, Usage
from keepstream_worker.jobs import retry
from keepstream_worker.jobs.active_job import STOP_FAILURES, Stop
from keepstream_worker.limits import RateLimits
from keepstream_worker.store import Claim
from keepstream_worker.values import AttemptReason, Ending, Failure, JobKey, Outcome, Target

#: Seconds for which a job that this version cannot read is left to others.
_UNREADABLE_PAUSE: Final = 5.0


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
    rate_limits: RateLimits | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a job is attempted, and by whom."""

    max_attempts: int
    backoff: retry.BackoffPolicy
    chain: tuple[Target, ...] = ()  #: The attempt's target, then those that may be asked instead.
    max_cooldown: float = math.inf  #: Seconds that the target may ask to wait before another one is asked instead.


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
        rate_limits=report.rate_limits,
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
    if retry.is_final_for_target(failure) and len(policy.chain) > 1 and report.remaining_seconds > 0:
        return replace(
            ending,
            outcome=Outcome.FAILED,
            status=JobStatus.RETRYING,
            counted=False,
            chain=policy.chain[1:],
            next_reason=AttemptReason.FALLBACK,
        )
    if len(policy.chain) > 1 and (failure.retry_after or 0.0) > policy.max_cooldown:
        failure = replace(failure, retry_after=None)  # the next target need not wait for this one
    decision = retry.decide(
        failure,
        attempt=report.attempt,
        tries=report.tries,
        max_attempts=policy.max_attempts,
        remaining_seconds=report.remaining_seconds,
        policy=policy.backoff,
        random=random,
    )
    if report.remaining_seconds > 0 and _next_target_is_due(report, policy, failure, decision):
        return replace(
            ending,
            outcome=Outcome.FAILED,
            status=JobStatus.RETRYING,
            counted=retry.is_counted(failure),
            chain=policy.chain[1:],
            next_reason=AttemptReason.FALLBACK,
            least_tokens=report.usage.total_tokens,
        )
    if not decision.retry:
        outcome = Outcome.FAILED if report.announced else Outcome.UNSTARTED
        return replace(ending, outcome=outcome, status=JobStatus.FAILED)
    interrupted = failure.code is ErrorCode.INTERRUPTED
    return replace(
        ending,
        outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
        status=JobStatus.RETRYING,
        retry_in=decision.delay,
        counted=retry.is_counted(failure),
        next_reason=AttemptReason.INTERRUPTED if interrupted else AttemptReason.RETRY,
        least_tokens=report.usage.total_tokens,
    )


def _next_target_is_due(
    report: AttemptReport, policy: RetryPolicy, failure: Failure, decision: retry.RetryDecision
) -> bool:
    """Tell whether the job's target has had its attempts: the last ones are its fallbacks', one each."""
    others = len(policy.chain) - 1
    if others <= 0 or not retry.is_retryable(failure):
        return False
    left = policy.max_attempts - report.tries if retry.is_counted(failure) else math.inf
    return left > 0 and (left <= others or not decision.retry)


def superseded(key: JobKey, attempt: int, worker_id: str, spent: Usage, failure: Failure | None) -> Ending:
    """Another worker has the job; this is not stored, but what was spent is counted."""
    return Ending(
        key=key,
        attempt=attempt,
        worker_id=worker_id,
        outcome=Outcome.LOST,
        status=JobStatus.RETRYING,
        usage=spent,
        failure=failure,
    )


def unreadable(claim: Claim, worker_id: str) -> Ending:
    """The job is of a version that this worker cannot read: it waits for one that can, as long as it may."""
    failure = Failure(code=ErrorCode.INVALID_JOB, message="no worker could read the job: it is of a newer version")
    ending = Ending(
        key=claim.key,
        attempt=claim.attempt,
        worker_id=worker_id,
        outcome=Outcome.UNSTARTED,
        status=JobStatus.FAILED,
        failure=failure,
        retryable=False,
    )
    if claim.remaining_seconds <= _UNREADABLE_PAUSE:
        return ending
    return replace(ending, status=JobStatus.RETRYING, counted=False, retry_in=_UNREADABLE_PAUSE, failure=None)


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
