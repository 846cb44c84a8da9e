"""What becomes of a job after an attempt: each stop, failure and limit, and the ending that follows."""

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from keepstream.errors import ErrorCode
from keepstream.results import Choice, JobStatus, Usage
from keepstream_worker.jobs import verdict
from keepstream_worker.jobs.active_job import STOP_FAILURES, Stop
from keepstream_worker.jobs.retry import RULES, BackoffPolicy
from keepstream_worker.jobs.verdict import AttemptReport, RetryPolicy, failure_before_start
from keepstream_worker.values import AttemptReason, Ending, Failure, JobKey, Outcome, Target

KEY = JobKey("tenant-1", "job-1")
CHOICES = [Choice(index=0, content="text")]
USAGE = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
#: At ``random`` 0.5 the wait after the first attempt is 0.25 s, after the third 1 s.
POLICY = RetryPolicy(max_attempts=5, backoff=BackoffPolicy(base=0.5, cap=30.0))
REPORT = AttemptReport(
    key=KEY,
    attempt=4,
    worker_id="worker-1",
    tries=1,
    announced=True,
    remaining_seconds=1000.0,
    choices=CHOICES,
    usage=USAGE,
    first_token_ms=12.5,
    provider_request_id="req-of-the-stream",
    provider_details={"model": "m"},
)
#: What every ending of ``REPORT`` says, whatever becomes of the job.
BROUGHT = {
    "key": KEY,
    "attempt": 4,
    "worker_id": "worker-1",
    "choices": CHOICES,
    "usage": USAGE,
    "first_token_ms": 12.5,
    "provider_details": {"model": "m"},
    "terminal_event_id": None,
}


def fail(code: ErrorCode, **details: Any) -> Failure:
    return Failure(code=code, message="m", **details)


def decide(policy: RetryPolicy = POLICY, **changes: Any) -> Ending:
    return verdict.decide(replace(REPORT, **changes), policy, lambda: 0.5)


def values(ending: Ending) -> dict[str, Any]:
    return {field.name: getattr(ending, field.name) for field in fields(ending)}


# -- a whole answer --


@pytest.mark.parametrize("stop", [None, *Stop])
@pytest.mark.parametrize("tries", [1, 5, 99])
def test_whole_answer_completes_the_job_unless_it_was_cancelled(stop: Stop | None, tries: int) -> None:
    ending = decide(stop=stop, tries=tries, remaining_seconds=-1.0)
    assert values(ending) == BROUGHT | {
        "outcome": Outcome.FINISHED,
        "status": JobStatus.CANCELLED if stop is Stop.CANCELLED else JobStatus.COMPLETED,
        "failure": None,
        "retryable": None,
        "retry_in": 0.0,
        "counted": True,
        "chain": None,
        "least_tokens": None,
        "rate_limits": None,
        "next_reason": AttemptReason.RETRY,
        "provider_request_id": "req-of-the-stream",
    }


# -- a failure --

COMPLETED, FAILED, CANCELLED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED
EXPIRED, RETRYING = JobStatus.EXPIRED, JobStatus.RETRYING
#: (failure, tries) -> (outcome, status): without a stop, and with every stop but a cancel.
FAILURES = [
    (ErrorCode.BAD_REQUEST, 1, Outcome.FAILED, FAILED),
    (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 1, Outcome.FAILED, FAILED),
    (ErrorCode.OUTPUT_TOO_LARGE, 1, Outcome.FAILED, FAILED),
    (ErrorCode.UNKNOWN_PROVIDER, 1, Outcome.FAILED, FAILED),
    (ErrorCode.TOTAL_TIMEOUT, 1, Outcome.FAILED, FAILED),
    (ErrorCode.SUPERSEDED, 1, Outcome.FAILED, FAILED),
    (ErrorCode.RATE_LIMITED, 1, Outcome.FAILED, RETRYING),
    (ErrorCode.RATE_LIMITED, 4, Outcome.FAILED, RETRYING),
    (ErrorCode.RATE_LIMITED, 5, Outcome.FAILED, RETRYING),
    (ErrorCode.SERVER_ERROR, 4, Outcome.FAILED, RETRYING),
    (ErrorCode.SERVER_ERROR, 5, Outcome.FAILED, FAILED),
    (ErrorCode.SERVER_ERROR, 6, Outcome.FAILED, FAILED),
    (ErrorCode.TRUNCATED_STREAM, 1, Outcome.FAILED, RETRYING),
    (ErrorCode.INTERNAL, 1, Outcome.FAILED, RETRYING),
    (ErrorCode.INTERNAL, 2, Outcome.FAILED, FAILED),
    (ErrorCode.INTERRUPTED, 1, Outcome.INTERRUPTED, RETRYING),
    (ErrorCode.INTERRUPTED, 99, Outcome.INTERRUPTED, RETRYING),
    (ErrorCode.EXPIRED, 1, Outcome.UNSTARTED, EXPIRED),
    (ErrorCode.CANCELLED, 1, Outcome.CANCELLED, CANCELLED),
]


@pytest.mark.parametrize("stop", [None, *sorted(set(Stop) - {Stop.CANCELLED})])
@pytest.mark.parametrize(("code", "tries", "outcome", "status"), FAILURES)
def test_failure_decides_unless_the_job_was_cancelled(
    stop: Stop | None, code: ErrorCode, tries: int, outcome: Outcome, status: JobStatus
) -> None:
    ending = decide(stop=stop, failure=fail(code), tries=tries)
    assert (ending.outcome, ending.status) == (outcome, status)
    assert ending.failure is not None
    assert ending.failure.code is code
    assert ending.retryable is RULES[code].retried
    assert {name: value for name, value in values(ending).items() if name in BROUGHT} == BROUGHT


@pytest.mark.parametrize("code", ErrorCode)
@pytest.mark.parametrize("tries", [1, 5])
def test_cancel_wins_over_every_failure(code: ErrorCode, tries: int) -> None:
    ending = decide(stop=Stop.CANCELLED, failure=fail(code), tries=tries)
    assert (ending.outcome, ending.status) == (Outcome.CANCELLED, CANCELLED)
    assert ending.failure == STOP_FAILURES[Stop.CANCELLED]
    assert ending.retryable is False
    assert {name: value for name, value in values(ending).items() if name in BROUGHT} == BROUGHT


@pytest.mark.parametrize("stop", sorted(set(Stop) - {Stop.USAGE_LATE}))
def test_each_stop_ends_the_attempt_that_it_interrupted(stop: Stop) -> None:
    ending = decide(stop=stop, failure=STOP_FAILURES[stop])
    assert (ending.outcome, ending.status) == {
        Stop.CANCELLED: (Outcome.CANCELLED, CANCELLED),
        Stop.INTERRUPTED: (Outcome.INTERRUPTED, RETRYING),
        Stop.SUPERSEDED: (Outcome.FAILED, FAILED),
        Stop.TOTAL_TIMEOUT: (Outcome.FAILED, FAILED),
    }[stop]


@pytest.mark.parametrize("code", ErrorCode)
def test_every_failure_ends_consistently(code: ErrorCode) -> None:
    for stop, tries, remaining in product([None, *Stop], [1, 2, 5], [1000.0, 0.1, 0.0]):
        ending = decide(stop=stop, failure=fail(code), tries=tries, remaining_seconds=remaining)
        assert ending.status is not COMPLETED
        if ending.status is RETRYING:
            assert ending.retryable
            assert ending.retry_in < remaining, "no attempt begins after the total time"
        else:
            assert ending.status.terminal
            assert ending.retry_in == 0.0


@pytest.mark.parametrize("code", [ErrorCode.TOTAL_TIMEOUT, ErrorCode.SERVER_ERROR])
def test_attempt_of_which_nobody_has_heard_leaves_no_trace(code: ErrorCode) -> None:
    ending = decide(failure=fail(code), announced=False, tries=5)
    assert (ending.outcome, ending.status) == (Outcome.UNSTARTED, FAILED)


def test_request_id_of_the_failure_goes_before_that_of_the_stream() -> None:
    failure = fail(ErrorCode.SERVER_ERROR, provider_request_id="req-of-the-error")
    assert decide(failure=failure).provider_request_id == "req-of-the-error"
    assert decide(failure=fail(ErrorCode.SERVER_ERROR)).provider_request_id == "req-of-the-stream"


# -- the wait --


@pytest.mark.parametrize(
    ("code", "tries", "retry_after", "retry_in", "counted", "next_reason"),
    [
        (ErrorCode.SERVER_ERROR, 1, None, 0.25, True, AttemptReason.RETRY),
        (ErrorCode.SERVER_ERROR, 3, None, 1.0, True, AttemptReason.RETRY),
        # The provider accepts fewer requests than were made: that is not this job's fault.
        (ErrorCode.RATE_LIMITED, 1, 60.0, 62.0, False, AttemptReason.RETRY),
        # This worker is shutting down: somebody else goes on, at once.
        (ErrorCode.INTERRUPTED, 1, None, 0.0, False, AttemptReason.INTERRUPTED),
    ],
)
def test_job_waits_in_the_table_for_its_next_attempt(
    code: ErrorCode,
    tries: int,
    retry_after: float | None,
    retry_in: float,
    counted: bool,  # noqa: FBT001  # a parameter of the test
    next_reason: AttemptReason,
) -> None:
    ending = decide(failure=fail(code, retry_after=retry_after), tries=tries)
    assert ending.status is RETRYING
    assert ending.retry_in == pytest.approx(retry_in)
    assert ending.counted is counted
    assert ending.next_reason is next_reason
    assert ending.least_tokens == USAGE.total_tokens


TARGETS = (Target("first", "m"), Target("second", "n"), Target("third", "o"))


@pytest.mark.parametrize("code", [ErrorCode.NOT_FOUND, ErrorCode.CONTEXT_LENGTH_EXCEEDED, ErrorCode.AUTH])
def test_job_that_its_target_refuses_for_good_goes_on_with_the_next(code: ErrorCode) -> None:
    ending = decide(replace(POLICY, chain=TARGETS), failure=fail(code), tries=5)
    assert (ending.outcome, ending.status, ending.retry_in) == (Outcome.FAILED, RETRYING, 0.0)
    assert ending.chain == TARGETS[1:]
    assert not ending.counted, "each target is struck out once, so this ends by itself"
    assert ending.next_reason is AttemptReason.FALLBACK


@pytest.mark.parametrize("code", [ErrorCode.BAD_REQUEST, ErrorCode.CONTENT_FILTER, ErrorCode.TOTAL_TIMEOUT])
def test_what_every_target_would_refuse_goes_to_no_other(code: ErrorCode) -> None:
    assert decide(replace(POLICY, chain=TARGETS), failure=fail(code)).status is FAILED


def test_job_that_is_asked_to_wait_for_long_goes_on_with_the_next_target() -> None:
    busy = fail(ErrorCode.RATE_LIMITED, retry_after=60.0)
    policy = replace(POLICY, chain=TARGETS, max_cooldown=10.0)
    ending = decide(policy, failure=busy)
    assert (ending.status, ending.chain) == (RETRYING, None)
    assert ending.retry_in == pytest.approx(2.0)
    assert ending.failure == busy
    assert decide(replace(policy, max_cooldown=90.0), failure=busy).retry_in == pytest.approx(62.0)
    assert decide(replace(policy, chain=TARGETS[2:]), failure=busy).retry_in == pytest.approx(62.0)


@pytest.mark.parametrize(("tries", "chain"), [(1, None), (2, None), (3, TARGETS[1:]), (4, TARGETS[1:]), (5, None)])
def test_the_last_attempts_are_the_fallbacks(tries: int, chain: tuple[Target, ...] | None) -> None:
    ending = decide(replace(POLICY, max_attempts=5, chain=TARGETS), failure=fail(ErrorCode.SERVER_ERROR), tries=tries)
    assert (ending.status, ending.chain) == (FAILED if tries == 5 else RETRYING, chain)
    if chain is not None:
        assert (ending.outcome, ending.counted, ending.retry_in) == (Outcome.FAILED, True, 0.0)
        assert ending.next_reason is AttemptReason.FALLBACK
        assert ending.least_tokens == USAGE.total_tokens


def test_a_target_that_is_asked_twice_at_most_leaves_the_others_to_the_job() -> None:
    page = fail(ErrorCode.INVALID_RESPONSE)
    assert decide(replace(POLICY, max_attempts=9), failure=page, tries=2).status is FAILED
    assert decide(replace(POLICY, max_attempts=9, chain=TARGETS), failure=page, tries=2).chain == TARGETS[1:]


@pytest.mark.parametrize("code", [ErrorCode.SERVER_ERROR, ErrorCode.RATE_LIMITED])
def test_a_job_without_time_for_its_targets_wait_asks_the_next(code: ErrorCode) -> None:
    busy = fail(code, retry_after=8.0)
    ending = decide(replace(POLICY, chain=TARGETS), failure=busy, remaining_seconds=5.0)
    assert (ending.status, ending.chain, ending.retry_in) == (RETRYING, TARGETS[1:], 0.0)
    assert decide(failure=busy, remaining_seconds=5.0).status is FAILED


def test_last_target_has_the_last_word() -> None:
    assert decide(replace(POLICY, chain=TARGETS[2:]), failure=fail(ErrorCode.NOT_FOUND)).status is FAILED
    late = decide(replace(POLICY, chain=TARGETS), failure=fail(ErrorCode.NOT_FOUND), remaining_seconds=0.0)
    assert late.status is FAILED


@pytest.mark.parametrize(("remaining", "status"), [(0.26, RETRYING), (0.25, FAILED), (0.0, FAILED), (-1.0, FAILED)])
def test_no_attempt_begins_after_the_total_time(remaining: float, status: JobStatus) -> None:
    ending = decide(failure=fail(ErrorCode.SERVER_ERROR), remaining_seconds=remaining)
    assert ending.status is status
    assert ending.retryable is True, "it is the job's time that is used up"


def test_attempts_are_counted_by_tries_and_not_by_number() -> None:
    policy = replace(POLICY, max_attempts=2)
    assert decide(policy, failure=fail(ErrorCode.TIMEOUT), attempt=9, tries=1).status is RETRYING
    assert decide(policy, failure=fail(ErrorCode.TIMEOUT), attempt=9, tries=2).status is FAILED


# -- without a stream --


@pytest.mark.parametrize(
    ("expired", "remaining", "code"),
    [
        (False, 1.0, None),
        (True, 1.0, ErrorCode.EXPIRED),
        (True, 0.0, ErrorCode.EXPIRED),
        (False, 0.0, ErrorCode.TOTAL_TIMEOUT),
        (False, -1.0, ErrorCode.TOTAL_TIMEOUT),
    ],
)
def test_attempt_begins_only_in_time(*, expired: bool, remaining: float, code: ErrorCode | None) -> None:
    failure = failure_before_start(expired=expired, remaining_seconds=remaining)
    assert (failure and failure.code) is code


def test_recovered_answer_completes_the_job_and_costs_nothing_again() -> None:
    ending = verdict.recovered(KEY, 2, "worker-1", CHOICES, {"model": "m"})
    assert (ending.outcome, ending.status, ending.failure) == (Outcome.RECOVERED, COMPLETED, None)
    assert (ending.attempt, ending.choices, ending.usage) == (2, CHOICES, Usage())


def test_job_that_has_lost_too_many_workers_fails_and_keeps_what_it_has() -> None:
    ending = verdict.attempts_exhausted(KEY, 6, "worker-1", CHOICES)
    assert (ending.outcome, ending.status, ending.retryable) == (Outcome.UNSTARTED, FAILED, False)
    assert ending.failure is not None
    assert ending.failure.code is ErrorCode.WORKER_LOST
    assert (ending.attempt, ending.choices, ending.usage) == (6, CHOICES, Usage())


# -- what the database objects to --


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (None, Outcome.FINISHED),  # the answer is whole, the job is cancelled all the same
        (ErrorCode.SERVER_ERROR, Outcome.CANCELLED),
        (ErrorCode.INTERRUPTED, Outcome.CANCELLED),
    ],
)
def test_cancel_that_the_database_knows_of_wins(code: ErrorCode | None, outcome: Outcome) -> None:
    ending = verdict.cancelled(decide(failure=code and fail(code)))
    assert (ending.outcome, ending.status, ending.retryable) == (outcome, CANCELLED, False)
    assert ending.failure == STOP_FAILURES[Stop.CANCELLED]
    assert (ending.choices, ending.usage) == (CHOICES, USAGE)


def test_output_that_cannot_be_stored_fails_the_job_and_keeps_its_cost() -> None:
    ending = verdict.unstorable(decide(), "the database refused it")
    assert (ending.outcome, ending.status, ending.retryable) == (Outcome.FAILED, FAILED, False)
    assert ending.failure == Failure(
        code=ErrorCode.INTERNAL, message="the output could not be stored: the database refused it"
    )
    assert (ending.choices, ending.provider_details, ending.usage) == ((), None, USAGE)
