import pytest

from keepstream.errors import ErrorCode
from keepstream_worker.jobs.retry import (
    RULES,
    BackoffPolicy,
    RetryDecision,
    RetryReason,
    decide,
    is_counted,
    is_retryable,
)
from keepstream_worker.values import Failure

RETRIED = {
    ErrorCode.CONFLICT,
    ErrorCode.RATE_LIMITED,
    ErrorCode.OVERLOADED,
    ErrorCode.SERVER_ERROR,
    ErrorCode.PROVIDER_ERROR,
    ErrorCode.TOOL_USE_FAILED,
    ErrorCode.CONNECTION,
    ErrorCode.TIMEOUT,
    ErrorCode.EMPTY_STREAM,
    ErrorCode.TRUNCATED_STREAM,
    ErrorCode.INVALID_STREAM,
    ErrorCode.INVALID_RESPONSE,
    ErrorCode.INTERRUPTED,
    ErrorCode.WORKER_LOST,
    ErrorCode.INTERNAL,
}


def decide_on(
    code: ErrorCode,
    *,
    attempt: int = 1,
    tries: int = 1,
    max_attempts: int = 5,
    remaining: float | None = 1000.0,
    retry_after: float | None = None,
    status: int | None = None,
    should_retry: bool | None = None,
    random: float = 0.5,
) -> RetryDecision:
    return decide(
        Failure(code=code, message="m", retry_after=retry_after, http_status=status, should_retry=should_retry),
        attempt=attempt,
        tries=tries,
        max_attempts=max_attempts,
        remaining_seconds=remaining,
        policy=BackoffPolicy(base=0.5, cap=30.0),
        random=lambda: random,
    )


def test_every_error_code_has_a_rule() -> None:
    assert set(RULES) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_the_codes_that_are_retried(code: ErrorCode) -> None:
    assert is_retryable(Failure(code=code, message="m")) is (code in RETRIED)
    assert decide_on(code).retry is (code in RETRIED)


@pytest.mark.parametrize("code", sorted(set(ErrorCode) - RETRIED))
def test_what_cannot_succeed_is_not_retried(code: ErrorCode) -> None:
    assert decide_on(code) == RetryDecision(RetryReason.NOT_RETRYABLE)


@pytest.mark.parametrize(
    ("tries", "ceiling"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (50, 30.0), (10_000, 30.0)]
)
def test_the_wait_doubles_up_to_the_cap_and_is_random_from_nothing_to_all_of_it(tries: int, ceiling: float) -> None:
    def wait(random: float) -> float:
        return decide_on(ErrorCode.TIMEOUT, tries=tries, max_attempts=10**6, random=random).delay

    assert wait(0.0) == 0.0
    assert wait(0.5) == pytest.approx(ceiling / 2)
    assert wait(0.999999) == pytest.approx(ceiling, rel=1e-3)


def test_retry_after_is_the_least_wait_and_the_jitter_comes_on_top() -> None:
    assert decide_on(ErrorCode.RATE_LIMITED, retry_after=20.0, random=0.0).delay == 20.0
    assert decide_on(ErrorCode.RATE_LIMITED, retry_after=20.0, random=0.5).delay == 20.25


@pytest.mark.parametrize(
    ("tries", "max_attempts", "reason"),
    [
        (1, 1, RetryReason.ATTEMPTS_USED),
        (4, 5, RetryReason.RETRY),
        (5, 5, RetryReason.ATTEMPTS_USED),
        (6, 5, RetryReason.ATTEMPTS_USED),
    ],
)
def test_attempts_are_bounded(tries: int, max_attempts: int, reason: RetryReason) -> None:
    assert decide_on(ErrorCode.SERVER_ERROR, tries=tries, max_attempts=max_attempts).reason is reason


@pytest.mark.parametrize("code", [ErrorCode.INVALID_RESPONSE, ErrorCode.INTERNAL])
def test_some_codes_get_one_retry_only(code: ErrorCode) -> None:
    assert decide_on(code, tries=1).reason is RetryReason.RETRY
    assert decide_on(code, tries=2).reason is RetryReason.ATTEMPTS_USED


def test_the_providers_advice_counts_both_ways() -> None:
    assert decide_on(ErrorCode.BAD_REQUEST, should_retry=True).reason is RetryReason.RETRY
    assert decide_on(ErrorCode.BAD_REQUEST, should_retry=True, tries=5).reason is RetryReason.ATTEMPTS_USED
    assert decide_on(ErrorCode.SERVER_ERROR, should_retry=False).reason is RetryReason.NOT_RETRYABLE
    assert decide_on(ErrorCode.RATE_LIMITED, should_retry=False, retry_after=1.0).reason is RetryReason.NOT_RETRYABLE
    assert decide_on(ErrorCode.INVALID_RESPONSE, should_retry=True, tries=2).reason is RetryReason.ATTEMPTS_USED
    assert is_retryable(Failure(code=ErrorCode.BAD_REQUEST, message="m", should_retry=True))
    assert not is_retryable(Failure(code=ErrorCode.SERVER_ERROR, message="m", should_retry=False))


def test_a_request_that_a_proxy_says_we_gave_up_is_retried_once() -> None:
    assert decide_on(ErrorCode.CONNECTION, status=499, tries=1).reason is RetryReason.RETRY
    assert decide_on(ErrorCode.CONNECTION, status=499, tries=2).reason is RetryReason.ATTEMPTS_USED
    assert decide_on(ErrorCode.CONNECTION, status=None, tries=2).reason is RetryReason.RETRY


@pytest.mark.parametrize(
    ("remaining", "retry_after", "reason"),
    [
        (20.0, 20.0, RetryReason.TIME_USED),
        (20.1, 20.0, RetryReason.TIME_USED),
        (20.3, 20.0, RetryReason.RETRY),
        (0.2, None, RetryReason.TIME_USED),
        (0.0, None, RetryReason.TIME_USED),
        (-1.0, None, RetryReason.TIME_USED),
        (None, 3600.0, RetryReason.RETRY),
        (None, 90_000.0, RetryReason.TIME_USED),
    ],
)
def test_there_is_no_retry_that_would_begin_after_the_total_time(
    remaining: float | None, retry_after: float | None, reason: RetryReason
) -> None:
    assert decide_on(ErrorCode.OVERLOADED, remaining=remaining, retry_after=retry_after).reason is reason


@pytest.mark.parametrize("code", [ErrorCode.INTERRUPTED, ErrorCode.WORKER_LOST])
def test_a_job_whose_worker_went_away_goes_on_at_once(code: ErrorCode) -> None:
    assert decide_on(code, tries=3, retry_after=60.0) == RetryDecision(RetryReason.RETRY, 0.0)
    assert decide_on(code, remaining=0.0).reason is RetryReason.TIME_USED


def test_an_interruption_uses_up_no_attempt_but_a_lost_worker_does() -> None:
    assert decide_on(ErrorCode.INTERRUPTED, tries=9, max_attempts=1).reason is RetryReason.RETRY
    assert decide_on(ErrorCode.WORKER_LOST, tries=5, max_attempts=5).reason is RetryReason.ATTEMPTS_USED


def test_a_refusal_for_too_many_requests_uses_up_no_attempt_and_waits_longer_each_time() -> None:
    assert decide_on(ErrorCode.RATE_LIMITED, tries=9, max_attempts=1).reason is RetryReason.RETRY
    assert decide_on(ErrorCode.RATE_LIMITED, attempt=3, tries=1).delay == pytest.approx(1.0)
    assert decide_on(ErrorCode.SERVER_ERROR, attempt=3, tries=1).delay == pytest.approx(0.25)
    assert decide_on(ErrorCode.RATE_LIMITED, remaining=0.1).reason is RetryReason.TIME_USED
    assert not is_counted(Failure(code=ErrorCode.RATE_LIMITED, message="m"))
    assert is_counted(Failure(code=ErrorCode.SERVER_ERROR, message="m"))
