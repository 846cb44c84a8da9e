"""Retry: which failures are tried again, how often, and after how long.

In: the ``Failure`` of an attempt and what is left of the job's attempts and time, from the verdict.
Out: a ``RetryDecision``.  Pure: the whole policy is one table and one function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from keepstream.errors import ErrorCode
from keepstream_worker.values import Failure


class Rule(NamedTuple):
    """What to do about one error code."""

    retried: bool  #: Whether another attempt can help.
    waits: bool = True  #: Whether the next attempt waits; not if the provider had no part in the failure.
    attempts: int | None = None  #: Attempts of the job above which this code ends it; None: the job's own limit.
    counted: bool = True  #: Whether the job's own limit of attempts applies.


_FAIL: Final = Rule(retried=False)
_RETRY: Final = Rule(retried=True)
_RETRY_ONCE: Final = Rule(retried=True, attempts=2)

RULES: Final[dict[ErrorCode, Rule]] = {
    # The provider refused the request: the same request will be refused again.
    ErrorCode.BAD_REQUEST: _FAIL,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: _FAIL,
    ErrorCode.CONTENT_FILTER: _FAIL,
    ErrorCode.AUTH: _FAIL,
    ErrorCode.PERMISSION: _FAIL,
    ErrorCode.NOT_FOUND: _FAIL,
    ErrorCode.INSUFFICIENT_QUOTA: _FAIL,
    ErrorCode.PAYLOAD_TOO_LARGE: _FAIL,
    ErrorCode.UNPROCESSABLE: _FAIL,
    # The provider is busy or broken: it may recover, and a sampling fault may not come twice.
    ErrorCode.CONFLICT: _RETRY,
    ErrorCode.RATE_LIMITED: Rule(retried=True, counted=False),  # the deployment asked too early; the job did nothing
    ErrorCode.OVERLOADED: _RETRY,
    ErrorCode.SERVER_ERROR: _RETRY,
    ErrorCode.PROVIDER_ERROR: _RETRY,
    ErrorCode.TOOL_USE_FAILED: _RETRY,
    # The way to the provider, and the stream.
    ErrorCode.CONNECTION: _RETRY,
    ErrorCode.TIMEOUT: _RETRY,
    ErrorCode.EMPTY_STREAM: _RETRY,
    ErrorCode.TRUNCATED_STREAM: _RETRY,
    ErrorCode.INVALID_STREAM: _RETRY,
    ErrorCode.INVALID_RESPONSE: _RETRY_ONCE,  # a maintenance page passes, a wrong base URL stays
    ErrorCode.OUTPUT_TOO_LARGE: _FAIL,  # it would be paid for again and stopped again
    # Keepstream itself.
    ErrorCode.TOTAL_TIMEOUT: _FAIL,
    ErrorCode.EXPIRED: _FAIL,
    ErrorCode.CANCELLED: _FAIL,
    ErrorCode.INTERRUPTED: Rule(retried=True, waits=False, counted=False),  # a rolling deploy fails no job
    ErrorCode.WORKER_LOST: Rule(retried=True, waits=False),  # counted: the job may be what kills its workers
    ErrorCode.SUPERSEDED: _FAIL,  # the newer attempt has the job
    ErrorCode.INVALID_JOB: _FAIL,
    ErrorCode.UNKNOWN_PROVIDER: _FAIL,
    ErrorCode.INTERNAL: _RETRY_ONCE,  # a defect may depend on the moment; twice is no coincidence
}

#: What a target says that it will say again, and another may not: the job goes on with its next target.
_FINAL_FOR_TARGET: Final = frozenset(
    {
        ErrorCode.NOT_FOUND,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.AUTH,
        ErrorCode.PERMISSION,
        ErrorCode.INSUFFICIENT_QUOTA,
        ErrorCode.UNKNOWN_PROVIDER,
    }
)

_CLIENT_CLOSED_REQUEST: Final = 499  #: A proxy says that we hung up: one retry is fine, more are not.
_LONGEST_WAIT: Final = 86_400.0  #: Seconds; no job may live longer, so no wait can.
_MOST_DOUBLINGS: Final = 32  #: Keeps the power finite; every cap is reached long before.


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Exponential back-off with full jitter: a random time up to ``base``, doubled up to ``cap``. Seconds."""

    base: float = 0.5
    cap: float = 30.0

    def wait(self, attempt: int, random: Callable[[], float]) -> float:
        """Return the seconds to wait after ``attempt`` (from 1) failed; ``random`` gives a number in [0, 1)."""
        ceiling = self.base * 2.0 ** min(attempt - 1, _MOST_DOUBLINGS)
        return min(self.cap, ceiling) * random()


class RetryReason(StrEnum):
    """Why a decision came out as it did."""

    RETRY = "retry"  #: Another attempt follows.
    NOT_RETRYABLE = "not_retryable"  #: Another attempt would fail like this one.
    ATTEMPTS_USED = "attempts_used"  #: The job, or this kind of failure, has no attempt left.
    TIME_USED = "time_used"  #: The next attempt would begin after the job's total time.


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Whether another attempt follows, and in how many seconds."""

    reason: RetryReason
    delay: float = 0.0

    @property
    def retry(self) -> bool:
        """Whether another attempt follows."""
        return self.reason is RetryReason.RETRY


def is_retryable(failure: Failure) -> bool:
    """Tell whether another attempt can help against ``failure``, whatever the job's limits say."""
    return _rule_of(failure).retried


def is_counted(failure: Failure) -> bool:
    """Tell whether an attempt that ended so counts against the job's limit of attempts."""
    return _rule_of(failure).counted


def is_final_for_target(failure: Failure) -> bool:
    """Tell whether this target will never answer the job, though another one may."""
    return failure.code in _FINAL_FOR_TARGET


def _rule_of(failure: Failure) -> Rule:
    """Return the rule of the failure's code, unless the provider itself says whether to try again."""
    rule = RULES[failure.code]
    if failure.should_retry is None or failure.should_retry == rule.retried:
        return rule
    return _RETRY if failure.should_retry else _FAIL


def decide(
    failure: Failure,
    *,
    attempt: int,
    tries: int,
    max_attempts: int,
    remaining_seconds: float | None,
    policy: BackoffPolicy,
    random: Callable[[], float],
) -> RetryDecision:
    """Decide what follows a failed attempt.

    Args:
        failure: Why the attempt failed; its ``retry_after`` is the least wait.
        attempt: Number of the failed one; the waits grow with it where no limit of attempts applies.
        tries: Attempts that count against the job's limit, the failed one included.
        max_attempts: Attempts the job may have.
        remaining_seconds: What is left of the job's total time; None: no limit.
        policy: How the waits grow.
        random: Gives a number in [0, 1).
    """
    rule = _rule_of(failure)
    if not rule.retried:
        return RetryDecision(RetryReason.NOT_RETRYABLE)
    most = _RETRY_ONCE.attempts if failure.http_status == _CLIENT_CLOSED_REQUEST else rule.attempts
    if (most is not None and tries >= most) or (rule.counted and tries >= max_attempts):
        return RetryDecision(RetryReason.ATTEMPTS_USED)
    # The jitter comes on top of Retry-After: the provider gave many jobs the same number.
    delay = (
        (failure.retry_after or 0.0) + policy.wait(tries if rule.counted else attempt, random) if rule.waits else 0.0
    )
    if delay >= (_LONGEST_WAIT if remaining_seconds is None else remaining_seconds):
        return RetryDecision(RetryReason.TIME_USED)
    return RetryDecision(RetryReason.RETRY, delay)
