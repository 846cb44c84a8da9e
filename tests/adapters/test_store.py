"""The store on real databases: who owns a job, what an ending writes, and what a sweep finds."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, Engine, func, select, update

from keepstream.client import queries
from keepstream.client.endings import JobEnd, end_jobs, end_unclaimed
from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import (
    TERMINAL_STATUSES,
    Choice,
    CompletionResult,
    JobStatus,
    ToolCall,
    Usage,
    UsageSource,
    output_sha256,
)
from keepstream.tables import attempts, choices, jobs, now, rejected_messages, seconds_from_now, workers
from keepstream_worker import store
from keepstream_worker.store import (
    Claim,
    ClaimRequest,
    Heartbeat,
    LateUsage,
    NotEnded,
    OwnedJob,
    Refusal,
    Refused,
    Rejection,
    Sweep,
    SweepResult,
)
from keepstream_worker.store.retention import PurgeCounts, purge, purgeable
from keepstream_worker.values import AttemptReason, Ended, Ending, Failure, JobKey, Outcome
from tests import jobs as test_jobs

A = TypeVar("A")
R = TypeVar("R")

QUEUE = "completions"
REPORTED = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, source=UsageSource.PROVIDER, details={"x": 1})
HELLO = Choice(
    index=0,
    content="Hello",
    finish_reason="stop",
    tool_calls=[ToolCall(id="c1", name="look", arguments="{}", arguments_valid=True)],
)


class Store:
    """The store's functions, each call in a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, operation: Callable[[Connection, list[A]], list[R]], *arguments: A) -> list[R]:
        with self.engine.begin() as connection:
            return operation(connection, list(arguments))

    def claim(self, job_id: str = "a", worker: str = "w1", **job: Any) -> Claim | Refusal:
        (answer,) = self(store.claim, request(job_id, worker, **job))
        return answer

    def claimed(self, job_id: str = "a", worker: str = "w1", **job: Any) -> Claim:
        claim = self.claim(job_id, worker, **job)
        assert isinstance(claim, Claim)
        return claim

    def end(self, ending: Ending) -> Ended | NotEnded:
        (answer,) = self(store.end, ending)
        return answer

    def sweep(self, *, lease: float = 6.0, reap: bool = True, queue_length: int | None = 0, **kw: Any) -> SweepResult:
        swept: dict[str, Any] = {"resend_after": 30.0, "queue": QUEUE, "max_attempts": 5, "limit": 200}
        swept |= {"asked_at": time.monotonic()} | kw
        (found,) = self(store.sweep, Sweep(lease=lease, reap=reap, queue_length=queue_length, **swept))
        return found

    def enqueue(self, job_id: str = "a", **fields: Any) -> None:
        with self.engine.begin() as connection:
            assert queries.enqueue(connection, make_job(job_id, **fields))

    def cancel(self, job_id: str = "a") -> JobStatus | None:
        with self.engine.begin() as connection:
            return queries.cancel(connection, "default", job_id)

    def get(self, job_id: str = "a") -> CompletionResult:
        with self.engine.begin() as connection:
            result = queries.get(connection, "default", job_id)
        assert result is not None
        return result

    def change(self, job_id: str = "a", **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))

    def purge(self, older_than: float, **kw: Any) -> PurgeCounts:
        with self.engine.begin() as connection:
            return purge(connection, older_than, **kw)

    def alive(self, worker: str = "w1", lease: float = 6.0) -> store.HeartbeatResult:
        (result,) = self(store.record_heartbeat, Heartbeat(worker, lease, QUEUE, places=10, running=1))
        return result

    def dead(self, worker: str = "w1") -> None:
        """Make a worker's last heartbeat old."""
        self.alive(worker)
        with self.engine.begin() as connection:
            connection.execute(
                update(workers).where(workers.c.id == worker).values(heartbeat_at=seconds_from_now(-60.0))
            )


@pytest.fixture
def db(engine: Engine) -> Store:
    return Store(engine)


def make_job(job_id: str = "a", **given: Any) -> Job:
    return test_jobs.make_job(id=job_id, **given)


def request(job_id: str = "a", worker: str = "w1", **fields: Any) -> ClaimRequest:
    return ClaimRequest(make_job(job_id, **fields), worker, QUEUE, total_timeout=60.0)


def finished(claim: Claim, job_id: str = "a", worker: str = "w1", **changes: Any) -> Ending:
    fields: dict[str, Any] = {
        "outcome": Outcome.FINISHED,
        "status": JobStatus.COMPLETED,
        "choices": [HELLO],
        "usage": REPORTED,
        "terminal_event_id": f"{claim.attempt}-9",
    }
    return Ending(JobKey("default", job_id), claim.attempt, worker, **(fields | changes))


def failed(claim: Claim, job_id: str = "a", worker: str = "w1", **changes: Any) -> Ending:
    fields: dict[str, Any] = {
        "outcome": Outcome.FAILED,
        "status": JobStatus.RETRYING,
        "choices": [HELLO.model_copy(update={"finish_reason": None})],
        "usage": Usage(),
        "failure": Failure(ErrorCode.CONNECTION, "the connection was cut"),
        "retryable": True,
    }
    return Ending(JobKey("default", job_id), claim.attempt, worker, **(fields | changes))


# -- claims --


def test_claim_of_an_unknown_job_creates_it(db: Store) -> None:
    claim = db.claimed()
    assert (claim.attempt, claim.tries, claim.reason, claim.expired) == (1, 1, AttemptReason.FIRST, False)
    assert 55 < claim.remaining_seconds < 60.1  # SQLite's clock counts days, in steps of 40 µs
    result = db.get()
    assert (result.status, result.attempt) == (JobStatus.RUNNING, 1)
    assert [(attempt.number, attempt.worker, attempt.outcome) for attempt in result.attempts] == [(1, "w1", None)]


def test_queued_job_is_claimed_once(db: Store) -> None:
    db.enqueue()
    assert isinstance(db.claim(worker="w1"), Claim)
    assert db.claim(worker="w2") is Refusal.TAKEN


def test_job_that_waits_is_not_claimed_before_it_is_due(db: Store) -> None:
    claim = db.claimed()
    db.end(failed(claim, retry_in=60.0))
    assert db.claim() is Refusal.TAKEN
    db.change(due_at=now())
    again = db.claimed()
    assert (again.attempt, again.tries, again.reason) == (2, 2, AttemptReason.RETRY)


def test_ended_job_is_not_claimed(db: Store) -> None:
    db.end(finished(db.claimed()))
    assert db.claim() is Refusal.ENDED


def test_other_request_under_the_same_id_is_refused_and_changes_nothing(db: Store) -> None:
    db.claimed()
    before = db.get()
    assert db.claim(model="other") is Refusal.OTHER_REQUEST
    assert db.get() == before


def test_claim_repeated_by_the_same_worker_is_adopted(db: Store) -> None:
    """The commit may have succeeded although its answer was lost."""
    first = db.claimed()
    again = db.claimed()
    assert (again.attempt, again.tries) == (first.attempt, first.tries)
    assert len(db.get().attempts) == 1


def test_claims_in_one_group_are_answered_in_their_order(db: Store) -> None:
    db.enqueue("queued")
    db.claimed("taken", worker="w2")
    db.end(finished(db.claimed("ended"), "ended"))
    answers = db(
        store.claim,
        *(request(job_id) for job_id in ("z", "ended", "queued", "taken", "a")),
        request("queued", model="other"),
    )
    kinds = [answer if isinstance(answer, Refusal) else "granted" for answer in answers]
    assert kinds == ["granted", Refusal.ENDED, "granted", Refusal.TAKEN, "granted", Refusal.OTHER_REQUEST]


def test_second_request_in_a_group_is_given_what_its_worker_owns_by_then(db: Store) -> None:
    first, second = db(store.claim, request(), request())
    assert isinstance(first, Claim)
    assert isinstance(second, Claim)
    assert first.attempt == second.attempt == 1


def test_tenants_do_not_meet(db: Store) -> None:
    assert isinstance(db.claim(tenant="one"), Claim)
    assert isinstance(db.claim(tenant="two"), Claim)


def test_total_time_counts_from_the_first_claim(db: Store) -> None:
    db.end(failed(db.claimed()))
    db.change(deadline_at=seconds_from_now(-1.0))
    assert db.claimed().remaining_seconds < 0


def test_many_workers_that_claim_the_same_jobs_get_each_of_them_once(engine: Engine) -> None:
    names = [f"job-{number}" for number in range(40)]
    start = threading.Barrier(8)

    def claim_all(worker: str) -> list[str]:
        won = []
        start.wait()
        for position in range(0, len(names), 5):
            group = names[position : position + 5]
            if int(worker) % 2:
                group.reverse()  # no two workers use the same order
            answers = Store(engine)(store.claim, *(request(job_id, worker) for job_id in group))
            won += [job_id for job_id, answer in zip(group, answers, strict=True) if isinstance(answer, Claim)]
        return won

    with ThreadPoolExecutor(8) as threads:
        won = Counter(job_id for wins in threads.map(claim_all, map(str, range(8))) for job_id in wins)
    assert won == dict.fromkeys(names, 1)
    with engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(attempts)) == len(names)


# -- endings --


def test_ending_writes_the_whole_result(db: Store) -> None:
    answer = db.end(finished(db.claimed(), first_token_ms=12.5, provider_details={"id": "x"}))
    assert isinstance(answer, Ended)
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.attempts) == (7, 1)
    result = db.get()
    assert result.status is JobStatus.COMPLETED
    assert result.choices == [HELLO]
    assert result.terminal_event_id == "1-9"
    assert result.finished_at is not None
    assert not result.partial
    (attempt,) = result.attempts
    assert (attempt.outcome, attempt.first_token_ms, attempt.usage) == ("finished", 12.5, REPORTED)


def test_ending_repeated_answers_the_same_and_changes_nothing(db: Store) -> None:
    ending = finished(db.claimed())
    answer = db.end(ending)
    before = db.get()
    assert db.end(ending) == answer
    assert db.get() == before


def test_pause_repeated_answers_the_same_and_changes_nothing(db: Store) -> None:
    pause = failed(db.claimed(), retry_in=60.0)
    answer = db.end(pause)
    before = db.get()
    assert db.end(pause) == answer
    assert db.get() == before


@pytest.mark.parametrize("make", [finished, failed], ids=["finished", "failed"])
def test_superseded_worker_changes_nothing(db: Store, make: Callable[..., Ending]) -> None:
    old = db.claimed(worker="w1")
    db.dead("w1")
    db.sweep()
    assert db.end(make(old)) is NotEnded.SUPERSEDED, "released, and not claimed yet"
    new = db.claimed(worker="w2")
    before = db.get()
    assert db.end(make(old)) is NotEnded.SUPERSEDED, "claimed by another worker"
    assert db.get() == before
    db.end(finished(new, worker="w2"))
    before = db.get()
    assert db.end(make(old)) is NotEnded.SUPERSEDED, "ended by another worker"
    assert db.get() == before


def test_cancel_that_came_first_wins_over_completion_and_retry(db: Store) -> None:
    claim = db.claimed()
    assert db.cancel() is JobStatus.RUNNING
    assert db.end(finished(claim)) is NotEnded.CANCEL_REQUESTED
    assert db.end(failed(claim)) is NotEnded.CANCEL_REQUESTED
    ended = db.end(finished(claim, status=JobStatus.CANCELLED))
    assert isinstance(ended, Ended)
    assert db.get().status is JobStatus.CANCELLED
    assert db.get().partial


def test_output_of_a_job_is_that_of_its_last_attempt(db: Store) -> None:
    db.end(failed(db.claimed()))
    kept = db.get()
    assert (kept.text, kept.partial, kept.status) == ("Hello", True, JobStatus.RETRYING)
    other = Choice(index=0, content="Bye", finish_reason="stop")
    db.end(finished(db.claimed(), choices=[other]))
    assert db.get().choices == [other]


def test_usage_is_summed_with_failed_attempts_and_unknown_is_null(db: Store) -> None:
    db.end(failed(db.claimed(), usage=REPORTED))
    db.end(failed(db.claimed(), usage=Usage()))
    answer = db.end(finished(db.claimed()))
    assert isinstance(answer, Ended)
    assert answer.attempts == 3
    usage = db.get().usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 8, 14)
    assert usage.source is UsageSource.UNKNOWN


def test_what_else_providers_report_is_summed_for_the_job(db: Store) -> None:
    def reported(cached: int, cost: float) -> Usage:
        details = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": cached}, "cost": cost}
        return REPORTED.model_copy(update={"details": details})

    summed = {"prompt_tokens_details": {"cached_tokens": 3}, "cost": 0.3}
    db.end(failed(db.claimed(), usage=reported(1, 0.1)))
    answer = db.end(finished(db.claimed(), usage=reported(2, 0.2)))
    assert isinstance(answer, Ended)
    assert answer.usage is not None
    assert answer.usage.details == summed
    result = db.get()
    assert result.usage is not None
    assert result.usage.details == summed
    assert result.attempts[1].usage == reported(2, 0.2)

    db.end(finished(db.claimed("b"), "b", usage=reported(1, 0.1)))
    only = db.get("b").usage
    assert only is not None
    assert only.details == {"prompt_tokens_details": {"cached_tokens": 1}, "cost": 0.1}


ESTIMATED = Usage(prompt_tokens=40, completion_tokens=2, total_tokens=42, source=UsageSource.ESTIMATED)


@pytest.mark.parametrize("reported_first", [True, False])
def test_an_estimated_prompt_is_replaced_by_the_count_of_another_attempt(db: Store, *, reported_first: bool) -> None:
    usages = [REPORTED, ESTIMATED] if reported_first else [ESTIMATED, REPORTED]
    db.end(failed(db.claimed(), usage=usages[0]))
    db.end(finished(db.claimed(), usage=usages[1]))
    result = db.get()
    by_source = {attempt.usage.source: attempt.usage for attempt in result.attempts if attempt.usage}
    assert by_source[UsageSource.PROVIDER] == REPORTED
    assert by_source[UsageSource.ESTIMATED] == ESTIMATED.model_copy(update={"prompt_tokens": 3, "total_tokens": 5})
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.total_tokens) == (6, 12)
    assert result.usage.source is UsageSource.ESTIMATED


def test_a_late_estimate_takes_the_prompt_of_the_attempt_that_was_reported(db: Store) -> None:
    db.claimed()
    db.dead()
    db.sweep()
    db.end(finished(db.claimed(worker="w2"), worker="w2"))
    db(store.record_usage, LateUsage(JobKey("default", "a"), 1, ESTIMATED))
    result = db.get()
    assert result.attempts[0].usage == ESTIMATED.model_copy(update={"prompt_tokens": 3, "total_tokens": 5})
    assert result.usage is not None
    assert result.usage.total_tokens == 12


def test_refused_attempt_costs_nothing(db: Store) -> None:
    refusal = Failure(ErrorCode.RATE_LIMITED, "HTTP 429", http_status=429)
    db.end(failed(db.claimed(), failure=refusal, choices=[]))
    db.end(finished(db.claimed()))
    usage = db.get().usage
    assert usage is not None
    assert (usage.total_tokens, usage.source) == (7, UsageSource.PROVIDER)


def test_interruption_counts_against_no_limit(db: Store) -> None:
    claim = db.claimed()
    db.end(failed(claim, outcome=Outcome.INTERRUPTED, next_reason=AttemptReason.INTERRUPTED))
    again = db.claimed()
    assert (again.attempt, again.tries, again.reason) == (2, 1, AttemptReason.INTERRUPTED)


def test_endings_of_one_group_are_judged_each_on_its_own(db: Store) -> None:
    fine, superseded, cancelled = (db.claimed(job_id) for job_id in "abc")
    db.change("b", attempt=2)
    db.cancel("c")
    answers = db(store.end, finished(superseded, "b"), finished(cancelled, "c"), finished(fine, "a"))
    assert answers[:2] == [NotEnded.SUPERSEDED, NotEnded.CANCEL_REQUESTED]
    assert isinstance(answers[2], Ended)
    assert [db.get(job_id).status.value for job_id in "abc"] == ["completed", "running", "running"]


def test_late_usage_of_a_lost_attempt_is_written_once_and_summed(db: Store) -> None:
    db.claimed()
    db.dead()
    db.sweep()
    db.end(finished(db.claimed(worker="w2"), worker="w2"))
    estimate = REPORTED.model_copy(update={"source": UsageSource.ESTIMATED})
    for _ in range(2):
        db(store.record_usage, LateUsage(JobKey("default", "a"), 1, estimate))
    db(store.record_usage, LateUsage(JobKey("default", "a"), 2, Usage(total_tokens=99)))
    result = db.get()
    assert [attempt.usage and attempt.usage.total_tokens for attempt in result.attempts] == [7, 7]
    assert result.usage is not None
    assert (result.usage.total_tokens, result.usage.source) == (14, UsageSource.ESTIMATED)


# -- signs of life, and sweeps --


def test_worker_learns_what_it_owns_and_what_is_to_be_cancelled(db: Store) -> None:
    assert db.alive().lapsed, "its first sign of life"
    db.claimed("a")
    db.claimed("b")
    db.cancel("b")
    result = db.alive()
    assert not result.lapsed
    assert result.owned == {(JobKey("default", "a"), 1), (JobKey("default", "b"), 1)}
    assert result.cancels == {JobKey("default", "b")}


def test_worker_that_was_silent_beyond_its_lease_is_told_so(db: Store) -> None:
    db.dead()
    assert db.alive().lapsed
    assert not db.alive().lapsed


def test_dead_workers_jobs_are_released_once(db: Store) -> None:
    db.dead("w1")
    db.alive("w2")
    db.claimed("a", "w1")
    db.claimed("b", "w2")
    found = db.sweep()
    assert found.lost == [JobKey("default", "a")]
    assert [Job.model_validate_json(text).id for text in found.to_send] == ["a"]
    assert db.sweep().lost == []
    assert db.get("a").attempts[0].outcome == "lost"
    again = db.claimed("a", "w2")
    assert (again.attempt, again.tries, again.reason) == (2, 2, AttemptReason.WORKER_LOST)
    assert db.get("b").status is JobStatus.RUNNING


def test_nobody_is_reaped_by_a_sweeper_that_may_not_judge(db: Store) -> None:
    db.dead()
    db.claimed()
    assert db.sweep(reap=False).lost == []


def test_nobody_is_reaped_by_a_question_that_the_database_kept_waiting(db: Store) -> None:
    db.dead()
    db.claimed()
    assert db.sweep(asked_at=time.monotonic() - 4.0).lost == []
    assert db.sweep(asked_at=time.monotonic() - 2.0).lost == [JobKey("default", "a")]


def test_retired_workers_jobs_need_not_wait_for_the_lease(db: Store) -> None:
    db.alive()
    db.claimed()
    db(store.retire, "w1")
    assert db.sweep().lost == [JobKey("default", "a")]


def test_job_that_killed_too_many_workers_ends_as_failed(db: Store) -> None:
    for number in range(20):
        worker = f"w{number}"
        db.dead(worker)
        if not isinstance(db.claim(worker=worker, max_attempts=2), Claim):
            break
        db.sweep()
    result = db.get()
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.WORKER_LOST
    assert len(result.attempts) <= 6


def test_cancelled_job_of_a_dead_worker_ends_as_cancelled(db: Store) -> None:
    db.dead()
    db.claimed()
    db.cancel()
    db.sweep()
    result = db.get()
    assert (result.status, result.attempt) == (JobStatus.CANCELLED, 2)
    assert result.terminal_event_id == "2-1"


def test_queued_job_without_a_message_is_sent_again_after_its_time(db: Store) -> None:
    db.enqueue()
    assert db.sweep().to_send == []
    db.change(resend_at=now())
    (text,) = db.sweep().to_send
    assert Job.model_validate_json(text).id == "a"
    assert db.sweep().to_send == [], "its new message is given time"


def test_retry_that_is_due_is_sent(db: Store) -> None:
    db.end(failed(db.claimed(), retry_in=60.0, resend_in=60.0))
    assert db.sweep().to_send == []
    db.change(due_at=now(), resend_at=now())
    assert len(db.sweep().to_send) == 1


def test_nothing_is_sent_while_the_broker_is_away(db: Store) -> None:
    db.enqueue()
    db.change(resend_at=now())
    assert db.sweep(queue_length=None).to_send == []
    assert len(db.sweep().to_send) == 1


def test_job_of_another_queue_is_left_to_its_own_workers(db: Store) -> None:
    with db.engine.begin() as connection:
        queries.enqueue(connection, make_job(), "slow")
    db.change(resend_at=now())
    assert db.sweep().to_send == []
    assert len(db.sweep(queue="slow").to_send) == 1


def test_backlog_is_not_sent_again(db: Store) -> None:
    for number in range(10):
        db.enqueue(f"job-{number}")
    with db.engine.begin() as connection:
        connection.execute(update(jobs).values(resend_at=now()))
    assert db.sweep(queue_length=10).to_send == []
    with db.engine.begin() as connection:
        connection.execute(update(jobs).values(resend_at=now()))
    assert len(db.sweep(queue_length=7).to_send) == 3, "as many as there are messages missing"


def test_sweepers_at_the_same_time_send_each_job_once(engine: Engine) -> None:
    db = Store(engine)
    for number in range(60):
        db.enqueue(f"job-{number}")
    with engine.begin() as connection:
        connection.execute(update(jobs).values(resend_at=now(), sends=0))
    start = threading.Barrier(6)

    def sweep(_: int) -> list[str]:
        start.wait()
        return [text for _ in range(4) for text in Store(engine).sweep(limit=10).to_send]

    with ThreadPoolExecutor(6) as threads:
        sent = Counter(Job.model_validate_json(text).id for texts in threads.map(sweep, range(6)) for text in texts)
    assert set(sent.values()) == {1}
    assert len(sent) + sum(len(db.sweep(limit=100).to_send) for _ in range(2)) == 60


def test_job_that_waited_too_long_expires_unless_it_has_begun(db: Store) -> None:
    past = "2020-01-01T00:00:00Z"
    db.enqueue("waiting", expires_at=past)
    db.enqueue("begun", expires_at=past)
    claim = db.claimed("begun", expires_at=past)
    assert claim.expired
    db.end(failed(claim, "begun", retry_in=60.0))
    db.sweep()
    assert db.get("waiting").status is JobStatus.EXPIRED
    assert db.get("begun").status is JobStatus.RETRYING


def test_end_whose_event_may_be_missing_is_found_until_it_is_announced(db: Store) -> None:
    db.end(finished(db.claimed()))
    assert db.sweep().unannounced == [], "its worker is given a moment"
    db.change(finished_at=seconds_from_now(-5.0))
    assert db.sweep().unannounced == [JobKey("default", "a")]
    db(store.mark_announced, JobKey("default", "a"))
    assert db.sweep().unannounced == []


def test_orphan_is_released_by_its_own_worker_only(db: Store) -> None:
    db.claimed()
    key = JobKey("default", "a")
    db(store.release, OwnedJob(key, 1, "w2"), OwnedJob(key, 2, "w1"))
    assert db.get().status is JobStatus.RUNNING
    db(store.release, OwnedJob(key, 1, "w1"))
    assert db.get().status is JobStatus.RETRYING
    assert db.claimed(worker="w2").reason is AttemptReason.WORKER_LOST


def test_rejection_recorded_twice_is_one_row(db: Store) -> None:
    rejection = Rejection(id="r1", reason="not JSON", size=3)
    db(store.reject, rejection, rejection)
    db(store.reject, rejection)
    with db.engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(rejected_messages)) == 1


def test_refused_job_is_a_failed_one_and_changes_no_job_that_is_there(db: Store) -> None:
    refused = Refused(make_job(), "special", ErrorCode.INVALID_JOB, "model: missing")
    db(store.refuse, refused, refused)
    result = db.get()
    assert (result.status, result.attempt, result.terminal_event_id) == (JobStatus.FAILED, 1, "1-1")
    assert result.error is not None
    assert (result.error.code, result.error.message) == ("invalid_job", "model: missing")
    assert (result.partial, result.usage, result.output_sha256) == (False, None, output_sha256([]))
    assert result.finished_at is not None
    with db.engine.begin() as connection:
        again = queries.get_for_retry(connection, "default", "a")
    assert again is not None
    assert (again.job, again.queue) == (make_job(), "special")
    db.change(finished_at=seconds_from_now(-5.0))
    assert db.sweep().unannounced == [JobKey("default", "a")]
    db.claimed("b")
    before = db.get("b")
    db(store.refuse, Refused(make_job("b"), "special", ErrorCode.INVALID_JOB, "model: missing"))
    assert db.get("b") == before


# -- one function ends a job --


def completed(db: Store) -> None:
    db.end(finished(db.claimed()))


def failed_for_good(db: Store) -> None:
    db.end(failed(db.claimed(), status=JobStatus.FAILED, terminal_event_id="1-9"))


def cancelled(db: Store) -> None:
    db.enqueue()
    db.cancel()


def expired(db: Store) -> None:
    db.enqueue(expires_at="2020-01-01T00:00:00Z")
    db.sweep()


def without_a_worker_left(db: Store) -> None:
    db.dead()
    db.claimed()
    db.change(tries=99)
    db.sweep()


def refused(db: Store) -> None:
    db(store.refuse, Refused(make_job(), "special", ErrorCode.INVALID_JOB, "model: missing"))


@pytest.mark.parametrize("end", [completed, failed_for_good, cancelled, expired, without_a_worker_left, refused])
def test_whoever_ends_a_job_leaves_the_same_kind_of_row(db: Store, end: Callable[[Store], None]) -> None:
    end(db)
    with db.engine.begin() as connection:
        row = connection.execute(select(jobs)).one()
    assert row.status in TERMINAL_STATUSES
    assert row.finished_at is not None
    assert (row.worker_id, row.announced) == (None, False)
    assert row.terminal_event_id.startswith(f"{row.attempt}-")
    result = db.get()
    assert row.output_sha256 == output_sha256(choice.content for choice in result.choices)
    assert row.partial == (bool(result.choices) and row.status != JobStatus.COMPLETED)
    assert (row.error_code is None) == (row.status == JobStatus.COMPLETED)


def test_end_of_a_job_that_has_gone_on_writes_nothing(db: Store) -> None:
    db.claimed()
    before = db.get()
    stale = JobEnd(
        "default",
        "a",
        held_attempt=0,
        attempt=1,
        status=JobStatus.FAILED,
        contents=[],
        usage=None,
        terminal_event_id="1-1",
    )
    with db.engine.begin() as connection:
        end_jobs(connection, [stale])
    assert db.get() == before


def test_job_that_has_ended_does_not_end_again(db: Store) -> None:
    db.end(finished(db.claimed()))
    before = db.get()
    with db.engine.begin() as connection:
        end_unclaimed(connection, "default", "a", 1, JobStatus.FAILED, ErrorCode.INTERNAL, "again")
    assert db.get() == before


# -- retention --


def test_old_ended_jobs_are_purged_with_all_that_is_theirs(db: Store) -> None:
    for job_id in ("old", "fresh", "unannounced", "open"):
        db.claimed(job_id, tenant="a")
    db.claimed("other", tenant="b")
    ended = {"status": "completed", "announced": True, "finished_at": seconds_from_now(-100)}
    for job_id in ("old", "other"):
        db.change(job_id, **ended)
    db.change("unannounced", **ended | {"announced": False})
    db.change("fresh", **ended | {"finished_at": now()})
    with db.engine.begin() as connection:
        output = {"content": "x", "reasoning": "", "refusal": ""}
        connection.execute(choices.insert().values(tenant="a", job_id="old", index=0, **output))
    assert db.purge(50, tenant="a") == (1, 0)
    with db.engine.begin() as connection:
        left = set(connection.scalars(select(jobs.c.id)))
        assert left == {"fresh", "unannounced", "other", "open"}
        assert set(connection.scalars(select(attempts.c.job_id))) == left
        assert connection.execute(select(choices)).all() == []
    assert db.purge(50) == (1, 0)
    assert db.purge(50) == (0, 0)


def test_purge_takes_no_more_than_its_limit_of_jobs_and_of_messages_the_oldest_first(db: Store) -> None:
    for number in range(5):
        db.claimed(f"job-{number}")
        db.change(f"job-{number}", status="failed", announced=True, finished_at=seconds_from_now(-100))
    for number in range(7):
        db(store.reject, Rejection(id=f"message-{number}", reason="not JSON", size=3))
        with db.engine.begin() as connection:
            this_message = rejected_messages.c.id == f"message-{number}"
            connection.execute(
                update(rejected_messages).where(this_message).values(rejected_at=seconds_from_now(-200 + number))
            )
    with db.engine.begin() as connection:
        assert purgeable(connection, 50) == (5, 7)
    assert db.purge(50, limit=2) == (2, 2)
    with db.engine.begin() as connection:
        left = set(connection.scalars(select(rejected_messages.c.id)))
    assert left == {f"message-{number}" for number in range(2, 7)}
    assert [db.purge(50, limit=2) for _ in range(4)] == [(2, 2), (1, 2), (0, 1), (0, 0)]


def test_purge_deletes_rejected_messages_of_that_age(db: Store) -> None:
    db(store.reject, Rejection(id="r1", reason="not JSON", size=3))
    db(store.reject, Rejection(id="r2", reason="no job", size=3, tenant="a"))
    with db.engine.begin() as connection:
        connection.execute(update(rejected_messages).values(rejected_at=seconds_from_now(-100)))
    db(store.reject, Rejection(id="r3", reason="not JSON", size=3))
    left = []
    for tenant in ("a", None):
        assert db.purge(50, tenant=tenant) == (0, 1)
        with db.engine.begin() as connection:
            left.append(set(connection.scalars(select(rejected_messages.c.id))))
    assert left == [{"r1", "r3"}, {"r3"}]
