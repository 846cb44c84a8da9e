"""The store's rules of ownership, on each database."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from api_contracts import queries
from api_contracts.database import make_engine
from api_contracts.errors import ErrorCode
from api_contracts.jobs import Job
from api_contracts.results import Choice, CompletionResult, JobStatus, Usage, UsageSource
from api_contracts.tables import jobs, now, rejected_messages, seconds_from_now, workers
from worker import schema, store
from worker.failures import Failure
from worker.store import (
    Beat,
    Claim,
    ClaimRequest,
    Ended,
    Ending,
    JobKey,
    NotEnded,
    Outcome,
    Reason,
    Refusal,
    Rejection,
    Sweep,
)

SWEEP = Sweep(lease=5.0, bury=True, resend_after=30.0, queue="completions", queue_length=0, max_attempts=3, limit=100)
SPENT = Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5, source=UsageSource.PROVIDER)
TIMEOUT = Failure(code=ErrorCode.TIMEOUT, message="no data")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, writer=True)
    schema.migrate(engine)
    yield engine
    engine.dispose()


def make_job(**fields: Any) -> Job:
    return Job(**{"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def run(engine: Engine, operation: Any, *arguments: Any) -> list[Any]:
    with engine.begin() as connection:
        answers: list[Any] = operation(connection, list(arguments))
        return answers


def claim(engine: Engine, job: Job, worker: str = "w1") -> Claim | Refusal:
    (answer,) = run(engine, store.claim, ClaimRequest(job, worker, "completions", 100.0))
    assert isinstance(answer, Claim | Refusal)
    return answer


def ending(job: Job, attempt: int = 1, worker: str = "w1", **changes: Any) -> Ending:
    whole = Ending(
        key=JobKey(job.tenant, job.id),
        attempt=attempt,
        worker_id=worker,
        outcome=Outcome.FINISHED,
        status=JobStatus.COMPLETED,
        choices=[Choice(index=0, content="ok", finish_reason="stop")],
        usage=SPENT,
        terminal_event_id=f"{attempt}-4",
    )
    return replace(whole, **changes)


def pause(job: Job, attempt: int = 1, worker: str = "w1", **changes: Any) -> Ending:
    failed = ending(job, attempt, worker, outcome=Outcome.FAILED, status=JobStatus.RETRYING, failure=TIMEOUT)
    return replace(failed, terminal_event_id=None, retryable=True, **changes)


def stored(engine: Engine, job: Job) -> CompletionResult:
    with engine.begin() as connection:
        result = queries.get(connection, job.tenant, job.id)
    assert result is not None
    return result


def bury(engine: Engine, worker: str) -> store.Swept:
    run(engine, store.beat, Beat(worker, 5.0))
    run(engine, store.retire, worker)
    (swept,) = run(engine, store.sweep, SWEEP)
    assert isinstance(swept, store.Swept)
    return swept


def test_a_job_without_a_row_is_claimed_with_its_first_attempt(engine: Engine) -> None:
    job = make_job()
    granted = claim(engine, job)
    assert isinstance(granted, Claim)
    assert (granted.attempt, granted.tries, granted.reason) == (1, 1, Reason.FIRST)
    assert 90 < granted.remaining_seconds <= 100
    assert stored(engine, job).status is JobStatus.RUNNING


def test_claims_of_one_group_are_one_statement_and_each_job_goes_to_one(engine: Engine) -> None:
    made = [make_job() for _ in range(30)]
    requests = [ClaimRequest(job, "w1", "completions", 100.0) for job in (*made, made[0])]
    answers = run(engine, store.claim, *requests)
    assert all(isinstance(answer, Claim) for answer in answers[:-1])
    # The same worker asks for a job that it holds by then: it is given what it has, not a second attempt.
    assert {answer.attempt for answer in answers if isinstance(answer, Claim)} == {1}


def test_a_held_job_is_refused_to_others_and_given_again_to_its_own_worker(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    assert claim(engine, job, "w2") is Refusal.TAKEN
    again = claim(engine, job)  # as after a commit whose answer was lost
    assert isinstance(again, Claim)
    assert again.attempt == 1


def test_an_id_of_another_request_is_refused(engine: Engine) -> None:
    job = make_job(id="one")
    claim(engine, job)
    assert claim(engine, make_job(id="one", temperature=1), "w2") is Refusal.OTHER_REQUEST
    assert isinstance(claim(engine, make_job(id="one", tenant="other", temperature=1), "w2"), Claim)


def test_of_many_workers_that_claim_at_once_one_gets_each_job(engine: Engine) -> None:
    made = [make_job() for _ in range(10)]
    barrier = threading.Barrier(8)

    def take(worker: str) -> list[Claim | Refusal]:
        barrier.wait()
        return [claim(engine, job, worker) for job in made]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(take, [f"w{number}" for number in range(8)]))
    for of_job in zip(*answers, strict=True):
        assert sum(isinstance(answer, Claim) for answer in of_job) == 1


def test_an_ending_writes_everything_and_repeated_it_changes_nothing(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    first = run(engine, store.end, ending(job))
    assert run(engine, store.end, ending(job)) == first == [Ended(SPENT, 1)]
    result = stored(engine, job)
    assert (result.status, result.text, result.usage) == (JobStatus.COMPLETED, "ok", SPENT)
    assert result.attempts[0].outcome == Outcome.FINISHED
    assert claim(engine, job, "w2") is Refusal.ENDED


def test_a_superseded_worker_changes_nothing(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    bury(engine, "w1")
    assert run(engine, store.end, ending(job)) == [NotEnded.SUPERSEDED]
    second = claim(engine, job, "w2")
    assert isinstance(second, Claim)
    assert (second.attempt, second.reason) == (2, Reason.WORKER_LOST)
    assert run(engine, store.end, ending(job)) == [NotEnded.SUPERSEDED]
    assert run(engine, store.end, ending(job, 2, "w2"))[0].attempts == 2
    assert stored(engine, job).attempts[0].outcome == Outcome.LOST


def test_an_accepted_cancel_wins_over_a_completion_that_comes_later(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    with engine.begin() as connection:
        assert queries.cancel(connection, job.tenant, job.id) is JobStatus.RUNNING
    assert run(engine, store.end, ending(job)) == [NotEnded.CANCEL_REQUESTED]
    assert run(engine, store.end, pause(job)) == [NotEnded.CANCEL_REQUESTED]
    (ended,) = run(engine, store.end, ending(job, status=JobStatus.CANCELLED, outcome=Outcome.CANCELLED))
    assert isinstance(ended, Ended)
    assert stored(engine, job).partial


def test_usage_of_failed_attempts_is_summed_and_refused_requests_cost_nothing(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    refused = Failure(code=ErrorCode.RATE_LIMITED, message="slow down", http_status=429)
    run(engine, store.end, pause(job, usage=Usage(), choices=(), failure=refused))
    claim(engine, job)
    run(engine, store.end, pause(job, 2))
    claim(engine, job)
    (ended,) = run(engine, store.end, ending(job, 3))
    assert ended.usage == Usage(prompt_tokens=4, completion_tokens=6, total_tokens=10, source=UsageSource.PROVIDER)
    assert ended.attempts == 3


def test_a_waiting_job_is_not_claimed_before_it_is_due(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    run(engine, store.end, pause(job, retry_in=60.0))
    assert claim(engine, job, "w2") is Refusal.TAKEN
    assert stored(engine, job).text == "ok"  # what a failed attempt brought is kept until the next one ends


def test_an_interrupted_attempt_does_not_count(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    run(engine, store.end, pause(job, outcome=Outcome.INTERRUPTED, next_reason=Reason.INTERRUPTED))
    second = claim(engine, job, "w2")
    assert isinstance(second, Claim)
    assert (second.attempt, second.tries, second.reason) == (2, 1, Reason.INTERRUPTED)


def test_a_worker_that_was_silent_learns_it_and_what_it_still_holds(engine: Engine) -> None:
    job = make_job()
    assert run(engine, store.beat, Beat("w1", 5.0))[0].lapsed  # its first sign of life
    claim(engine, job)
    (pulse,) = run(engine, store.beat, Beat("w1", 5.0))
    assert (pulse.lapsed, pulse.held) == (False, {(JobKey(job.tenant, job.id), 1)})
    with engine.begin() as connection:
        connection.execute(update(workers).values(heartbeat_at=seconds_from_now(-6.0)))
    assert run(engine, store.beat, Beat("w1", 5.0))[0].lapsed


def test_a_sweep_without_burying_leaves_silent_workers_alone(engine: Engine) -> None:
    job = make_job()
    claim(engine, job)
    run(engine, store.beat, Beat("w1", 5.0))
    run(engine, store.retire, "w1")
    (swept,) = run(engine, store.sweep, SWEEP._replace(bury=False))
    assert swept.lost == []
    assert stored(engine, job).status is JobStatus.RUNNING


def test_a_dead_workers_job_is_released_sent_again_and_cancelled_if_that_was_asked(engine: Engine) -> None:
    lost, cancelled = make_job(), make_job()
    for job in (lost, cancelled):
        claim(engine, job)
    with engine.begin() as connection:
        queries.cancel(connection, cancelled.tenant, cancelled.id)
    swept = bury(engine, "w1")
    assert sorted(swept.lost) == sorted(JobKey(job.tenant, job.id) for job in (lost, cancelled))
    assert [Job.model_validate_json(request).id for request in swept.to_send] == [lost.id]
    assert stored(engine, cancelled).status is JobStatus.CANCELLED


def test_a_job_that_kills_every_worker_ends_as_failed(engine: Engine) -> None:
    job = make_job(max_attempts=1)
    for number in range(10):
        if isinstance(claim(engine, job, f"w{number}"), Refusal):
            break
        bury(engine, f"w{number}")
    result = stored(engine, job)
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.WORKER_LOST


def overdue(engine: Engine, count: int) -> None:
    with engine.begin() as connection:
        for _ in range(count):
            queries.enqueue(connection, make_job())
        connection.execute(update(jobs).values(resend_at=now()))


def test_lost_messages_are_sent_again_and_a_backlog_is_not(engine: Engine) -> None:
    overdue(engine, 5)
    (backlog,) = run(engine, store.sweep, SWEEP._replace(queue_length=5))
    assert backlog.to_send == []
    with engine.begin() as connection:
        connection.execute(update(jobs).values(resend_at=now()))
    (two_lost,) = run(engine, store.sweep, SWEEP._replace(queue_length=3))
    assert len(two_lost.to_send) == 2


def test_nothing_is_taken_for_sending_while_the_broker_is_away(engine: Engine) -> None:
    overdue(engine, 1)
    (away,) = run(engine, store.sweep, SWEEP._replace(queue_length=None))
    (back,) = run(engine, store.sweep, SWEEP)
    assert (len(away.to_send), len(back.to_send)) == (0, 1)


def test_a_job_of_another_queue_is_left_to_its_own_workers(engine: Engine) -> None:
    with engine.begin() as connection:
        queries.enqueue(connection, make_job(), "slow")
        connection.execute(update(jobs).values(resend_at=now()))
    (ours,) = run(engine, store.sweep, SWEEP)
    (theirs,) = run(engine, store.sweep, SWEEP._replace(queue="slow"))
    assert (len(ours.to_send), len(theirs.to_send)) == (0, 1)


def test_jobs_that_waited_too_long_expire_and_are_to_be_announced(engine: Engine) -> None:
    job = make_job()
    with engine.begin() as connection:
        queries.enqueue(connection, job)
        connection.execute(update(jobs).values(expires_at=seconds_from_now(-1.0)))
    (swept,) = run(engine, store.sweep, SWEEP)
    assert swept.unannounced == [JobKey(job.tenant, job.id)]
    result = stored(engine, job)
    assert (result.status, result.terminal_event_id, result.attempts) == (JobStatus.EXPIRED, "1-1", [])


def test_an_ended_job_is_announced_until_that_is_noted(engine: Engine) -> None:
    job = make_job()
    key = JobKey(job.tenant, job.id)
    claim(engine, job)
    run(engine, store.end, ending(job))
    with engine.begin() as connection:
        connection.execute(update(jobs).values(finished_at=seconds_from_now(-10.0)))
    assert run(engine, store.sweep, SWEEP)[0].unannounced == [key]
    run(engine, store.mark_announced, key)
    assert run(engine, store.sweep, SWEEP)[0].unannounced == []


def test_a_rejection_recorded_twice_is_one_row(engine: Engine) -> None:
    rejection = Rejection(id="x", reason="no JSON", size=3)
    run(engine, store.reject, rejection)
    run(engine, store.reject, rejection)
    with engine.begin() as connection:
        assert connection.scalars(select(rejected_messages.c.reason)).all() == ["no JSON"]
