"""The store on real databases: who owns a job, what an ending writes, and what a sweep finds."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar
from unittest.mock import ANY

import pytest
from psycopg.errors import IdleInTransactionSessionTimeout
from sqlalchemy import Connection, Engine, Table, delete, func, select, text, update
from sqlalchemy.exc import OperationalError

from keepstream.client import queries
from keepstream.client.database import make_engine
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
from keepstream.tables import (
    announcements,
    arrivals,
    attempts,
    jobs,
    leases,
    now,
    pools,
    rejected_messages,
    requests,
    running,
    seconds_from_now,
    seconds_until,
    standings,
    turns,
    waiting,
    workers,
)
from keepstream_worker import store
from keepstream_worker.limits import Policy, TenantPolicy
from keepstream_worker.scheduling import choice as rules
from keepstream_worker.store import (
    Claim,
    Heartbeat,
    LateUsage,
    NotEnded,
    OwnedJob,
    Refused,
    Rejection,
    Stored,
    Sweep,
    schema,
)
from keepstream_worker.store import pools as store_pools
from keepstream_worker.store import turns as store_turns
from keepstream_worker.turn import Decision, Move, Pick, Reading
from keepstream_worker.values import AttemptReason, Ended, Ending, Failure, JobKey, Outcome, Target
from tests import jobs as test_jobs
from tests.first_come import FirstComeDecider

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


class Swept(NamedTuple):
    """What a sweep has found."""

    lost: list[JobKey]
    unannounced: list[JobKey]  #: Of some of them nobody knew that they have ended.


class Store:
    """The store's functions, each call in a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, operation: Callable[[Connection, list[A]], list[R]], *arguments: A) -> list[R]:
        with self.engine.begin() as connection:
            return operation(connection, list(arguments))

    def take_in(self, job_id: str = "a", *, direct: store.Direct | None = None, **job: Any) -> Claim | Stored:
        (answer,) = self(store.take_in, incoming(job_id, direct, **job))
        return answer

    def turn(self, worker: str = "w1", places: int = 1, queue: str = QUEUE) -> store.Turned:
        while True:
            try:
                (turned,) = self(store.take_turn, store.Turn(worker, FirstComeDecider(places, queue)))
            except OperationalError as error:
                if not isinstance(error.orig, IdleInTransactionSessionTimeout):
                    raise
                continue  # this process stood still for two seconds: whoever chooses asks again
            return turned

    def begin(self, pick: Pick, worker: str = "w1") -> Claim | None:
        (claim,) = self(store.begin, picked(pick, worker))
        return claim

    def claims(self, worker: str = "w1", places: int = 1) -> list[Claim]:
        """Take up to that many jobs by a turn, and begin them."""
        picks = self.turn(worker, places).picks
        claims = self(store.begin, *(picked(pick, worker) for pick in picks)) if picks else []
        return [claim for claim in claims if claim is not None]

    def claimed(self, job_id: str = "a", worker: str = "w1", **job: Any) -> Claim:
        """Store a job, if it is not there, and take it; no other one must wait."""
        self.take_in(job_id, **job)
        (claim,) = self.claims(worker)
        assert claim.key.id == job_id
        return claim

    def end(self, ending: Ending) -> Ended | NotEnded:
        (answer,) = self(store.end, ending)
        return answer

    def sweep(self, *, lease: float = 6.0, reap: bool = True, **kw: Any) -> Swept:
        swept: dict[str, Any] = {"max_attempts": 5, "limit": 200, "asked_at": time.monotonic()} | kw
        request = Sweep(lease=lease, reap=reap, **swept)
        (lost,) = self(store.release_lost, request)
        (unannounced,) = self(store.find_unannounced, request)
        (expired,) = self(store.end_expired, request)
        return Swept([released.key for released in lost], unannounced + expired)

    def tidy(self, **given: Any) -> int:
        request = store.Tidying(**{"limit": 200} | given)
        self(store.find_late_arrivals, request)
        self(store.delete_idle_standings, request)
        (bound,) = self(store.delete_old_turns, request)
        return bound

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

    def rows(self, table: Table, job_id: str = "a") -> list[Any]:
        """Return a table's rows of a job."""
        name = table.c.id if table is jobs else table.c.job_id
        with self.engine.begin() as connection:
            return list(connection.execute(select(table).where(name == job_id)))

    def rows_of_arrivals(self) -> list[Any]:
        with self.engine.begin() as connection:
            return list(connection.execute(select(arrivals).order_by(arrivals.c.seq)))

    def seconds_left(self, job_id: str) -> float:
        """Return the seconds until a job's total time is used up, as the row has it."""
        with self.engine.begin() as connection:
            left = connection.scalar(select(seconds_until(jobs.c.deadline_at)).where(jobs.c.id == job_id))
        assert left is not None
        return left

    def rows_of_standings(self) -> list[Any]:
        with self.engine.begin() as connection:
            return list(connection.execute(select(standings)))

    def retire(self, worker: str = "w1") -> None:
        self(store.retire, worker)

    def age_announcement(self, job_id: str = "a") -> None:
        """Let a job have ended a while ago."""
        with self.engine.begin() as connection:
            this = announcements.c.job_id == job_id
            connection.execute(update(announcements).where(this).values(ended_at=seconds_from_now(-5.0)))

    def change(self, job_id: str = "a", **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))

    def make_due(self, job_id: str = "a") -> None:
        """Let a job that waits for its next attempt wait no longer."""
        with self.engine.begin() as connection:
            connection.execute(update(waiting).where(waiting.c.job_id == job_id).values(restarted_due=now()))

    def alive(self, worker: str = "w1", lease: float = 6.0, known_turn: int = -1) -> store.HeartbeatResult:
        sign = Heartbeat(worker, lease, QUEUE, places=10, running=1, known_turn=known_turn)
        (result,) = self(store.record_heartbeat, sign)
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


def incoming(job_id: str = "a", direct: store.Direct | None = None, **fields: Any) -> store.Incoming:
    return store.incoming(make_job(job_id, **fields), QUEUE)._replace(direct=direct)


def picked(pick: Pick, worker: str = "w1") -> store.Picked:
    return store.Picked(pick, worker, total_timeout=60.0)


TARGET = Target("default", "m")


def direct(worker: str = "w1") -> store.Direct:
    """A job may start at once."""
    return store.Direct(worker, 60.0, TARGET, tokens=7)


def admits(worker: str = "w1", *, if_: bool = True) -> store.Admits:
    """A named job may start at once, or not."""
    return store.Admits(worker, 60.0, lambda *_: (TARGET, 7) if if_ else None)


def named(job_id: str = "a", direct: store.Admits | None = None) -> store.Named:
    return store.Named(JobKey("default", job_id), direct)


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


# -- intake --


def test_a_new_job_is_stored_and_waits(db: Store) -> None:
    assert db.take_in(metadata={"user": "x"}) is Stored.NEW
    result = db.get()
    assert (result.status, result.attempt, result.metadata) == (JobStatus.QUEUED, 0, {"user": "x"})
    (row,) = db.rows(waiting)
    (arrival,) = db.rows_of_arrivals()
    assert (row.seq, row.lane, row.pool) == (arrival.seq, arrival.lane, arrival.pool)
    assert (row.restarted_due, row.attempt) == (None, 0)
    assert db.take_in() is Stored.KNOWN
    assert len(db.rows(waiting)) == len(db.rows_of_arrivals()) == 1


def test_a_stored_job_is_what_a_client_would_have_stored(db: Store) -> None:
    fields: dict[str, Any] = {"expires_at": "2099-01-01T00:00:00Z", "max_tokens": 5, "max_attempts": 2}
    db.take_in("a", **fields)
    db.enqueue("b", **fields)

    def stored(job_id: str) -> list[dict[str, Any]]:
        changing = {"id", "job_id", "seq", "created_at", "job"}
        return [
            {name: value for name, value in row._asdict().items() if name not in changing}
            for table in (jobs, requests, waiting)
            for row in db.rows(table, job_id)
        ]

    assert stored("a") == stored("b")


def test_a_job_that_nothing_is_to_be_chosen_for_starts_when_it_is_stored(db: Store) -> None:
    claim = db.take_in(direct=direct(), expires_at="2099-01-01T00:00:00Z", max_tokens=5)
    assert isinstance(claim, Claim)
    assert (claim.attempt, claim.tries, claim.reason, claim.expired) == (1, 1, AttemptReason.FIRST, False)
    assert (claim.target, claim.chain, claim.tokens, claim.max_tokens) == (TARGET, (TARGET,), 7, 5)
    assert claim.job == make_job(expires_at="2099-01-01T00:00:00Z", max_tokens=5)
    assert 55 < claim.remaining_seconds < 60.1  # SQLite's clock counts days, in steps of 40 µs
    result = db.get()
    assert (result.status, result.attempt) == (JobStatus.RUNNING, 1)
    assert [(attempt.number, attempt.worker, attempt.outcome) for attempt in result.attempts] == [(1, "w1", None)]
    assert db.rows(waiting) == []
    assert db.rows_of_arrivals() == []
    assert db.turn().picks == ()
    assert isinstance(db.end(finished(claim)), Ended)


def test_a_start_repeated_by_the_same_worker_is_the_same(db: Store) -> None:
    """The commit may have succeeded although its answer was lost."""
    first = db.take_in(direct=direct())
    again = db.take_in(direct=direct())
    assert isinstance(first, Claim)
    assert isinstance(again, Claim)
    again = replace(again, remaining_seconds=first.remaining_seconds, chosen_at=first.chosen_at)
    assert again == first
    assert len(db.get().attempts) == 1
    assert db.take_in(direct=direct("w2")) is Stored.KNOWN
    assert db.take_in() is Stored.KNOWN


def test_a_job_that_starts_past_its_time_is_said_to_have_expired(db: Store) -> None:
    claim = db.take_in(direct=direct(), expires_at="2020-01-01T00:00:00Z")
    assert isinstance(claim, Claim)
    assert claim.expired


def test_other_request_under_the_same_id_is_refused_and_changes_nothing(db: Store) -> None:
    db.take_in()
    before = db.get()
    assert db.take_in(model="other") is Stored.OTHER_REQUEST
    assert db.take_in(direct=direct(), model="other") is Stored.OTHER_REQUEST
    assert db.get() == before


def test_jobs_of_one_group_are_answered_in_their_order(db: Store) -> None:
    db.end(finished(db.claimed("ended"), "ended"))
    db.enqueue("waits")
    answers = db(
        store.take_in,
        incoming("z"),
        incoming("ended"),
        incoming("waits"),
        incoming("b", direct()),
        incoming("z", direct()),
        incoming("a"),
        incoming("waits", model="other"),
        incoming("a", model="other"),
    )
    kinds = [answer if isinstance(answer, Stored) else answer.key.id for answer in answers]
    known, other = Stored.KNOWN, Stored.OTHER_REQUEST
    assert kinds == [Stored.NEW, known, known, "b", known, Stored.NEW, other, other]


def test_tenants_do_not_meet(db: Store) -> None:
    assert db.take_in(tenant="one") is Stored.NEW
    assert db.take_in(tenant="two", model="other") is Stored.NEW


def test_many_workers_that_store_the_same_jobs_start_each_of_them_once(engine: Engine) -> None:
    names = [f"job-{number}" for number in range(40)]
    start = threading.Barrier(8)

    def store_all(worker: str) -> list[str]:
        won = []
        start.wait()
        for position in range(0, len(names), 5):
            group = names[position : position + 5]
            if int(worker) % 2:
                group.reverse()  # no two workers use the same order
            answers = Store(engine)(store.take_in, *(incoming(job_id, direct(worker)) for job_id in group))
            won += [job_id for job_id, answer in zip(group, answers, strict=True) if isinstance(answer, Claim)]
        return won

    with ThreadPoolExecutor(8) as threads:
        won = Counter(job_id for wins in threads.map(store_all, map(str, range(8))) for job_id in wins)
    assert won == dict.fromkeys(names, 1)
    with engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(attempts)) == len(names)
        assert connection.scalar(select(func.count()).select_from(running)) == len(names)


def test_a_named_job_is_started_if_it_waits_and_was_never_started(db: Store) -> None:
    db.enqueue("a", max_tokens=5)
    claim, other = db(store.take_named, named("a", admits()), named("a", admits()))
    assert isinstance(claim, Claim)
    assert other is Stored.KNOWN
    assert (claim.attempt, claim.tries, claim.reason, claim.max_tokens) == (1, 1, AttemptReason.FIRST, 5)
    assert (claim.job, claim.target, claim.tokens) == (make_job(max_tokens=5).to_json(), TARGET, 7)
    assert (db.rows(waiting), db.rows_of_arrivals()) == ([], [])
    assert db.get().status is JobStatus.RUNNING
    (again,) = db(store.take_named, named("a", admits()))
    assert isinstance(again, Claim), "the commit may have been cut"
    assert (again.attempt, again.tries) == (1, 1)
    assert db(store.take_named, named("a", admits("w2")), named("a")) == [Stored.KNOWN, Stored.KNOWN]
    assert len(db.get().attempts) == 1
    assert isinstance(db.end(finished(claim)), Ended)
    assert db(store.take_named, named("a", admits())) == [Stored.KNOWN]


def test_a_named_job_waits_if_it_may_not_start_now(db: Store) -> None:
    db.enqueue("a")
    assert db(store.take_named, named("a"), named("b", admits())) == [Stored.NEW, None]
    assert db(store.take_named, named("a", admits(if_=False))) == [Stored.NEW]
    db.end(failed(db.claimed("a"), retry_in=60.0))
    assert db(store.take_named, named("a", admits())) == [Stored.NEW], "it goes on at its own time"
    assert db.get().status is JobStatus.RETRYING


# -- turns, and claims --


def test_a_turn_gives_each_job_to_one_worker(db: Store) -> None:
    for job_id in "abc":
        db.enqueue(job_id)
    first = db.turn("w1", places=2)
    second = db.turn("w2", places=2)
    assert [pick.job.key.id for pick in (*first.picks, *second.picks)] == ["a", "b", "c"]
    assert (first.turn, second.turn) == (1, 2)
    assert db.turn("w3").picks == ()
    assert db.get("a").status is JobStatus.QUEUED, "the wide rows are written outside of the turn"
    claim = db.begin(first.picks[0])
    assert claim is not None
    assert (claim.attempt, claim.tries, claim.reason, claim.expired) == (1, 1, AttemptReason.FIRST, False)
    assert (claim.target, claim.chain, claim.queue, claim.job_class) == (TARGET, (TARGET,), QUEUE, "interactive")
    assert claim.job == make_job("a").to_json()
    assert 55 < claim.remaining_seconds < 60.1
    assert db.get("a").status is JobStatus.RUNNING
    assert [(attempt.number, attempt.worker) for attempt in db.get("a").attempts] == [(1, "w1")]
    assert db.begin(first.picks[1], "w2") is None, "it is the first worker's"


def test_the_state_of_a_turn_is_what_the_next_one_goes_on_with(db: Store) -> None:
    assert db(store.look, store.Look()) == [store.Looked(ANY, 0, "{}", {}, arrivals=0)]
    db.enqueue("a")
    db.enqueue("b")
    assert db(store.look, store.Look(0)) == [store.Looked(ANY, 0, None, {}, arrivals=2)]
    turned = db.turn()
    looked = store.Looked(ANY, 1, turned.state, {QUEUE: 0.0}, arrivals=0)
    assert db(store.look, store.Look(0), store.Look(1)) == [looked, looked._replace(state=None)]
    assert db.alive().looked == looked
    assert db.alive(known_turn=1).looked == looked._replace(state=None)
    assert turned.now == pytest.approx(time.time(), abs=30)


def test_a_claim_repeated_by_the_same_worker_is_the_same(db: Store) -> None:
    db.enqueue()
    (pick,) = db.turn().picks
    first, again = db.begin(pick), db.begin(pick)
    assert first is not None
    assert again is not None
    assert replace(again, remaining_seconds=60.0) == replace(first, remaining_seconds=60.0)
    assert len(db.get().attempts) == 1


def test_a_job_that_was_ended_before_its_claim_is_not_begun(db: Store) -> None:
    db.enqueue()
    (pick,) = db.turn().picks
    db.change(status=JobStatus.FAILED)
    assert db.begin(pick) is None
    assert db.rows(running) == []


def test_a_job_that_was_cancelled_before_its_claim_is_said_to_be(db: Store) -> None:
    db.enqueue()
    (pick,) = db.turn().picks
    assert db.cancel() is JobStatus.RUNNING
    claim = db.begin(pick)
    assert claim is not None
    assert claim.cancel_requested
    assert db.end(finished(claim)) is NotEnded.CANCEL_REQUESTED


def test_a_job_that_goes_on_does_so_at_its_moment_and_before_new_ones(db: Store) -> None:
    db.end(failed(db.claimed("a"), retry_in=60.0))
    db.enqueue("b")
    assert [claim.key.id for claim in db.claims(places=5)] == ["b"]
    db.enqueue("c")
    db.make_due("a")
    (again,) = db.claims()
    assert again.key.id == "a"
    assert (again.attempt, again.tries, again.reason) == (2, 2, AttemptReason.RETRY)


@pytest.mark.parametrize(("given", "seconds"), [(None, 60), (7.5, 7.5)])
def test_total_time_is_the_jobs_own_or_the_workers(db: Store, given: float | None, seconds: float) -> None:
    db.take_in("waiting", total_timeout=given)
    chosen = db.claims()
    started = db.take_in("b", direct=direct(), total_timeout=given)
    again = db.take_in("b", direct=direct(), total_timeout=given)
    db.enqueue("c", total_timeout=given)
    answers = db(store.take_named, named("c", admits()))
    for claim in (*chosen, started, again, *answers):
        assert isinstance(claim, Claim)
        assert seconds * 0.5 < claim.remaining_seconds < seconds + 0.1  # SQLite's clock counts days, in steps of 40 µs
        assert db.rows(jobs, claim.key.id)[0].total_timeout == given
        left = db.seconds_left(claim.key.id)
        assert seconds * 0.5 < left < seconds + 0.1


def test_total_time_counts_from_the_first_start(db: Store) -> None:
    db.end(failed(db.claimed()))
    db.change(deadline_at=seconds_from_now(-1.0))
    (claim,) = db.claims()
    assert claim.remaining_seconds < 0


def test_pools_are_found_in_which_jobs_wait_that_were_started_before(db: Store) -> None:
    claim = db.claimed("a")
    db.enqueue("new", request={"model": "other", "messages": [{}]})
    (new,) = db.rows(waiting, "new")
    for expected in (frozenset[int](), frozenset({claim.pool})):
        with db.engine.begin() as connection:
            statements = store_turns._STATEMENTS[connection.dialect.name]
            assert statements.find_restarted_pools(connection, [new.pool, claim.pool]) == expected
        if not expected:
            db.end(failed(claim, "a", retry_in=60.0))


def test_jobs_of_another_queue_are_left_to_its_workers(db: Store) -> None:
    with db.engine.begin() as connection:
        queries.enqueue(connection, make_job(), "slow")
    assert db.turn(places=5).picks == ()
    assert db.turn(places=5).picks == ()
    assert len(db.turn(places=5, queue="slow").picks) == 1


def test_a_chain_of_targets_is_stored_and_what_is_left_of_it_is_told(db: Store) -> None:
    first, second, third = Target("default", "m"), Target("p2", "m2"), Target("p3", "m3")
    fallbacks = [{"provider": target.provider, "model": target.model} for target in (second, third)]
    claim = db.claimed(fallbacks=fallbacks)
    assert claim.chain == (first, second, third)
    db.end(failed(claim, chain=(second, third)))
    (again,) = db.claims()
    assert (again.target, again.chain) == (second, (second, third))
    assert (again.queue, again.job_class, again.lane) == (claim.queue, claim.job_class, claim.lane)
    assert again.pool != claim.pool


def test_an_estimate_grows_to_what_an_attempt_took(db: Store) -> None:
    claim = db.claimed()
    db.end(failed(claim, least_tokens=claim.tokens + 100))
    (again,) = db.claims()
    assert again.prompt_tokens == claim.prompt_tokens + 100
    db.end(failed(again, least_tokens=None))
    (again,) = db.claims()
    assert again.prompt_tokens == claim.prompt_tokens + 100


@pytest.mark.parametrize("cancels", [True, False])
def test_a_job_that_somebody_is_about_to_end_is_left_out_and_found_again(postgres_url: str, *, cancels: bool) -> None:
    """On SQLite nobody writes while a turn lasts."""
    engine = make_engine(postgres_url)
    schema.migrate(engine)
    db = Store(engine)
    for job_id in "abc":
        db.enqueue(job_id)
    with engine.connect() as other:
        transaction = other.begin()
        assert queries.cancel(other, "default", "a") is JobStatus.CANCELLED
        turned = db.turn(places=2)
        assert [pick.job.key.id for pick in turned.picks] == ["b"]
        assert [pick.job.key.id for pick in turned.left_out] == ["a"], "it was charged, and is to be settled"
        transaction.commit() if cancels else transaction.rollback()
    assert [pick.job.key.id for pick in db.turn(places=3).picks] == (["c"] if cancels else ["a", "c"])
    assert db.turn(places=3).picks == ()
    assert db.rows_of_arrivals() == []
    engine.dispose()


def test_a_turn_whose_standings_somebody_has_changed_is_taken_back(db: Store) -> None:
    db.enqueue("a")
    db.turn(places=0)

    class Meddled(FirstComeDecider):
        """Decides about a standing that is not there any more."""

        def decide(self, reading: Reading) -> Decision:
            decision = super().decide(reading)
            (move,) = decision.moves
            return replace(decision, moves=(Move(move.old._replace(time=99.0), move.new),))

    with pytest.raises(store.TurnLostError):
        db(store.take_turn, store.Turn("w1", Meddled(1)))
    assert [pick.job.key.id for pick in db.turn().picks] == ["a"]


def chosen(db: Store, places: int = 5, worker: str = "w1") -> store.Turned:
    """Take a turn by the rules of choice."""
    (turned,) = db(store.take_turn, store.Turn(worker, rules.Choice(Policy(), QUEUE, places)))
    return turned


def names(turned: store.Turned) -> list[str]:
    return [pick.job.key.id for pick in turned.picks]


@pytest.mark.parametrize("chain", ['[["default"]]', "[]", '"x"', '[["default", 5]]', None], ids=str)
def test_a_pool_that_cannot_be_read_concerns_its_own_jobs_and_is_made_anew(
    db: Store, chain: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_pools, "_KNOWN", {})
    model = "odd"
    fallback = {"provider": "other", "model": model}
    db.enqueue("odd", request={"model": model, "messages": [{}]}, fallbacks=[fallback])
    db.enqueue("good")
    (row,) = db.rows(waiting, "odd")
    with db.engine.begin() as connection:
        if chain is None:
            connection.execute(delete(pools).where(pools.c.id == row.pool))
        else:
            connection.execute(update(pools).where(pools.c.id == row.pool).values(chain=json.loads(chain)))
    turned = chosen(db)
    assert names(turned) == ["good"]
    assert turned.misplaced == (row.seq,)
    assert db(store.put_right, row.seq) == [store.PutRight(JobKey("default", "odd"), ended=False)]
    turned = chosen(db)
    assert (names(turned), turned.misplaced) == (["odd"], ())
    claim = db.begin(turned.picks[0])
    assert claim is not None
    assert claim.chain == (Target("default", model), Target("other", model))
    assert db.rows_of_arrivals() == []


def test_a_full_tenant_whose_lane_was_forgotten_is_found_to_be_full(db: Store) -> None:
    """Its job may run for so long that its standing means nothing any more."""

    def turn() -> store.Turned:
        policy = Policy(tenants={"default": TenantPolicy(concurrency=1)})
        (turned,) = db(store.take_turn, store.Turn("w1", rules.Choice(policy, QUEUE, 5)))
        return turned

    db.enqueue("first")
    assert names(turn()) == ["first"]
    with db.engine.begin() as connection:
        connection.execute(delete(standings))
    db.enqueue("second")
    assert names(turn()) == []


def test_a_job_that_waits_where_it_cannot_ends_as_failed(db: Store) -> None:
    db.enqueue("odd")
    db.enqueue("good")
    seq = db.rows(waiting, "odd")[0].seq
    with db.engine.begin() as connection:
        connection.execute(update(waiting).where(waiting.c.job_id == "odd").values(pool=12_345))
        connection.execute(update(arrivals).where(arrivals.c.seq == seq).values(pool=12_345))
    turned = chosen(db)
    assert names(turned) == ["good"]
    assert db(store.put_right, *turned.misplaced) == [store.PutRight(JobKey("default", "odd"), ended=True)]
    result = db.get("odd")
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.INTERNAL
    assert db.rows_of_arrivals() == []
    assert db(store.put_right, *turned.misplaced) == [None]


def test_a_note_without_a_job_is_deleted(db: Store) -> None:
    note = {"seq": 1000, "lane": 1, "pool": 12_345, "tenant": "default", "restarted_due": None}
    with db.engine.begin() as connection:
        connection.execute(arrivals.insert(), [note, note | {"seq": 1001, "restarted_due": datetime.now(UTC)}])
    db.enqueue("good")
    turned = chosen(db)
    assert names(turned) == ["good"]
    assert sorted(turned.misplaced) == [1000, 1001]
    assert db(store.put_right, *turned.misplaced) == [None, None]
    assert db.rows_of_arrivals() == []


def test_many_workers_take_each_job_once(engine: Engine) -> None:
    names = [f"job-{number}" for number in range(60)]
    for name in names:
        Store(engine).enqueue(name)
    start = threading.Barrier(8)

    def take(worker: str) -> list[str]:
        won: list[str] = []
        start.wait()
        while claims := Store(engine).claims(worker, places=3):
            won += [claim.key.id for claim in claims]
        return won

    with ThreadPoolExecutor(8) as threads:
        won = Counter(job_id for wins in threads.map(take, map(str, range(8))) for job_id in wins)
    assert won == dict.fromkeys(names, 1)
    with engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(attempts)) == len(names)
        assert connection.scalar(select(func.count()).select_from(waiting)) == 0


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


def test_what_the_provider_reported_to_a_superseded_worker_replaces_an_estimate(db: Store) -> None:
    """Its answer was whole when it learned that another worker had its job."""
    db.claimed()
    db.dead()
    db.sweep()
    (again,) = db.claims("w2")
    db(store.record_usage, LateUsage(JobKey("default", "a"), 1, ESTIMATED))
    db.end(finished(again, worker="w2"))
    for usage in (REPORTED, ESTIMATED, REPORTED):
        db(store.record_usage, LateUsage(JobKey("default", "a"), 1, usage))
    result = db.get()
    assert result.attempts[0].usage == REPORTED
    assert result.usage is not None
    assert (result.usage.total_tokens, result.usage.source) == (14, UsageSource.PROVIDER)


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
    db.take_in("b", direct=direct("w2"))
    db.take_in("a", direct=direct("w1"))
    found = db.sweep()
    assert found.lost == [JobKey("default", "a")]
    assert db.sweep().lost == []
    result = db.get("a")
    assert (result.status, result.attempts[0].outcome) == (JobStatus.RETRYING, "lost")
    (again,) = db.claims("w2", places=5)
    assert (again.key.id, again.attempt, again.tries) == ("a", 2, 2)
    assert again.reason is AttemptReason.WORKER_LOST
    assert db.get("b").status is JobStatus.RUNNING


def test_a_job_that_its_dead_worker_had_not_begun_costs_no_try_and_goes_first(db: Store) -> None:
    db.enqueue("a")
    db.enqueue("b")
    (pick,) = db.turn("w1").picks
    db.dead("w1")
    assert db.sweep().lost == [JobKey("default", "a")]
    assert db.get("a").status is JobStatus.QUEUED
    (again,) = db.claims("w2")
    assert again.key.id == "a"
    assert (again.attempt, again.tries, again.reason) == (1, 1, AttemptReason.FIRST)
    assert db.begin(pick, "w1") is None, "its first worker comes too late"
    assert [attempt.worker for attempt in db.get("a").attempts] == ["w2"]


def test_nobody_is_reaped_by_a_sweeper_that_may_not_judge(db: Store) -> None:
    db.dead()
    db.claimed()
    assert db.sweep(reap=False).lost == []


def test_nobody_is_reaped_by_a_question_that_the_database_kept_waiting(db: Store) -> None:
    db.dead()
    db.claimed()
    assert db.sweep(asked_at=time.monotonic() - 4.0).lost == []
    assert db.sweep(lease=600.0, asked_at=time.monotonic() - 200.0).lost == []
    db.retire()
    assert db.sweep(lease=600.0, asked_at=time.monotonic() - 200.0).lost == [JobKey("default", "a")]


def test_a_worker_is_not_dead_before_its_own_lease_ends(db: Store) -> None:
    """Its heartbeats may be farther apart than the sweeper's lease, while the settings of a deployment change."""
    db.claimed("a")
    db.dead("w1")
    with db.engine.begin() as connection:
        connection.execute(update(workers).values(lease=90.0))
    assert db.sweep(lease=6.0).lost == []
    with db.engine.begin() as connection:
        connection.execute(update(workers).values(lease=30.0))
    assert db.sweep(lease=90.0).lost == []
    assert db.sweep(lease=6.0).lost == [JobKey("default", "a")]


def test_retired_workers_jobs_need_not_wait_for_the_lease(db: Store) -> None:
    db.alive()
    db.claimed()
    db.retire()
    assert db.sweep().lost == [JobKey("default", "a")]


def test_job_that_killed_too_many_workers_ends_as_failed(db: Store) -> None:
    db.take_in(max_attempts=2)
    for number in range(20):
        worker = f"w{number}"
        db.dead(worker)
        if not db.claims(worker):
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
    assert [attempt.outcome for attempt in result.attempts] == ["lost"]
    assert (db.rows(waiting), db.rows(running), db.rows_of_arrivals()) == ([], [], [])


def test_sweepers_at_the_same_time_release_each_job_once(engine: Engine) -> None:
    db = Store(engine)
    db.dead()
    for number in range(60):
        db.take_in(f"job-{number}", direct=direct())
    start = threading.Barrier(6)

    def sweep(_: int) -> list[str]:
        start.wait()
        return [key.id for _ in range(4) for key in Store(engine).sweep(limit=10, lease=30.0).lost]

    with ThreadPoolExecutor(6) as threads:
        released = Counter(job_id for ids in threads.map(sweep, range(6)) for job_id in ids)
    while keys := db.sweep(limit=100).lost:
        released.update(key.id for key in keys)
    assert released == {f"job-{number}": 1 for number in range(60)}
    with engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(waiting)) == 60


def test_job_that_waited_too_long_expires_unless_it_has_begun(db: Store) -> None:
    past = "2020-01-01T00:00:00Z"
    claim = db.claimed("begun", expires_at=past)
    assert claim.expired
    db.end(failed(claim, "begun", retry_in=60.0))
    db.enqueue("waiting", expires_at=past)
    assert db.sweep().unannounced == [JobKey("default", "waiting")]
    assert db.get("waiting").status is JobStatus.EXPIRED
    assert db.get("begun").status is JobStatus.RETRYING
    assert db.rows(waiting, "waiting") == []


def test_job_whose_total_time_is_used_up_ends_while_it_waits(db: Store) -> None:
    """Whatever keeps its next attempt waiting: a cool-down of hours, a tenant at its limit, no worker."""
    claim = db.claimed()
    db.change(deadline_at=seconds_from_now(-1.0))
    db.end(failed(claim, retry_in=60.0))
    assert db.sweep().unannounced == [JobKey("default", "a")]
    result = db.get()
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error.code == ErrorCode.TOTAL_TIMEOUT
    assert db.rows(waiting) == []
    assert db.claims() == []


def test_end_whose_event_may_be_missing_is_found_until_it_is_announced(db: Store) -> None:
    db.end(finished(db.claimed()))
    assert db.sweep().unannounced == [], "its worker is given a moment"
    db.age_announcement()
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
    (again,) = db.claims("w2")
    assert again.reason is AttemptReason.WORKER_LOST


def test_a_provider_is_unknown_if_no_worker_of_the_queue_has_or_had_it(db: Store) -> None:
    def say(worker: str, *names: str, queue: str = QUEUE) -> None:
        db(store.record_heartbeat, Heartbeat(worker, 6.0, queue, 10, 0, providers=names))

    def unknown(*names: str) -> frozenset[str]:
        (found,) = db(store.find_unknown, store.Wanted(QUEUE, frozenset(names)))
        return found

    assert unknown("a") == {"a"}
    say("w1", "a", "b")
    say("w2", "b", "c", queue="other")
    assert unknown("a", "b", "c") == {"c"}
    db.retire("w1")
    assert unknown("a", "c") == {"c"}, "it may be about to be replaced"
    say("w3", "b")
    with db.engine.begin() as connection:
        connection.execute(
            update(workers).where(workers.c.id == "w1").values(heartbeat_at=seconds_from_now(-86_400.0 - 400.0))
        )
    assert unknown("a", "b", "c") == {"a", "c"}
    db.dead("w4")  # of a version that does not say what it has
    assert unknown("a", "b", "c") == frozenset()


def test_orphan_whose_cancel_came_meanwhile_ends_when_it_is_released(db: Store) -> None:
    db.claimed()
    assert db.cancel() is JobStatus.RUNNING
    (released,) = db(store.release, OwnedJob(JobKey("default", "a"), 1, "w1"))
    assert released is not None
    assert (released.key, released.target, released.tokens, released.begun) == (JobKey("default", "a"), TARGET, 1, True)
    assert db.get().status is JobStatus.CANCELLED
    assert db.rows(waiting) == db.rows(running) == []
    assert db.rows(announcements)


def test_orphan_that_had_not_begun_and_is_cancelled_ends_when_it_is_released(db: Store) -> None:
    db.enqueue()
    db.turn("w1")
    db.cancel()
    (released,) = db(store.release, OwnedJob(JobKey("default", "a"), 1, "w1"))
    assert released is not None
    assert not released.begun
    assert db.get().status is JobStatus.CANCELLED


def test_sweep_of_what_is_recent_leaves_what_is_old_to_one_of_everything(db: Store) -> None:
    """Before what is recent there may be thousands of deleted rows that nobody has cleaned up yet."""
    for job_id in "ab":
        db.end(finished(db.claimed(job_id), job_id))
    db.age_announcement("a")
    with db.engine.begin() as connection:
        this = announcements.c.job_id == "b"
        connection.execute(update(announcements).where(this).values(ended_at=seconds_from_now(-300.0)))
    db.take_in("c")
    with db.engine.begin() as connection:
        connection.execute(update(waiting).values(expires_at=seconds_from_now(-300.0)))
    assert db.sweep(whole=False).unannounced == [JobKey("default", "a")]
    assert db.sweep().unannounced == [JobKey("default", name) for name in "bac"]


def test_one_worker_sweeps_until_its_lease_ends_or_it_gives_it_up(db: Store) -> None:
    assert db.alive("w1").sweeper_free
    first, second = store.Candidacy("w1", 60.0), store.Candidacy("w2", 60.0)
    assert db(store.lead, first, second) == [True, False]
    assert db(store.lead, first) == [True], "it goes on"
    assert not db.alive("w2").sweeper_free
    assert db(store.lead, second._replace(seconds=0.0)) == [False], "what it has not, it cannot give up"
    assert db(store.lead, second) == [False]
    assert db(store.lead, first._replace(seconds=0.0), second) == [False, True]
    with db.engine.begin() as connection:
        connection.execute(update(leases).values(until=seconds_from_now(-1.0)))
    assert db.alive("w1").sweeper_free
    assert db(store.lead, first) == [True]


def test_what_is_left_of_jobs_that_somebody_deleted_by_hand_is_in_nobodys_way(db: Store) -> None:
    """By SQL, with all that a tenant had, for instance. Else they keep places, and are looked at first, for ever."""
    for job_id in ("runs", "runs elsewhere", "waits", "odd"):
        past = {"expires_at": "2020-01-01T00:00:00Z"} if job_id == "waits" else {}
        db.enqueue(job_id.replace(" ", "-"), request={"model": job_id, "messages": [{}]}, **past)
        if job_id.startswith("runs"):
            (pick,) = chosen(db, 1, "w2" if "elsewhere" in job_id else "w1").picks
            assert db.begin(pick, "w2" if "elsewhere" in job_id else "w1")
    (odd,) = db.rows(waiting, "odd")
    with db.engine.begin() as connection:
        connection.execute(delete(pools).where(pools.c.id == odd.pool))
        connection.execute(delete(jobs))
    db.dead("w2")
    assert db(store.release, OwnedJob(JobKey("default", "runs"), 1, "w1")) == [None]
    found = db.sweep()
    assert (found.lost, found.unannounced) == ([], [])
    assert db(store.put_right, odd.seq) == [None]
    with db.engine.begin() as connection:
        left = [connection.scalar(select(func.count()).select_from(table)) for table in (running, waiting)]
    assert left == [0, 0]
    db.enqueue("runs")  # as a new job
    assert names(chosen(db)) == ["runs"]


def test_an_arrival_that_turns_have_passed_by_is_found_again(db: Store) -> None:
    """A transaction that took its number early and committed late."""
    db.enqueue("a")
    with db.engine.begin() as connection:
        row = {"n": 7, "arrivals_low": 5000, "ready": "{}", "closed": "{}", "state": "{}"}
        connection.execute(turns.insert().values(row))
    assert db.turn().picks == ()
    assert not db.alive().looked.arrivals
    db.tidy()
    assert db.alive().looked.arrivals
    assert [pick.job.key.id for pick in db.turn().picks] == ["a"]


def test_a_turn_says_whether_more_jobs_have_arrived_than_it_takes_note_of(
    db: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_turns, "_MOST_ARRIVALS", 2)
    for number in range(4):
        db.enqueue(f"job-{number}")
    assert [chosen(db, places=0).more_arrivals for _ in range(3)] == [True, False, False]
    assert len(names(chosen(db))) == 4


def test_a_look_says_how_many_jobs_have_arrived(db: Store) -> None:
    assert db(store.look, store.Look())[0].arrivals == 0
    for number in range(3):
        db.enqueue(f"job-{number}")
    assert db(store.look, store.Look())[0].arrivals == 3
    (second,) = db.rows(waiting, "job-1")
    with db.engine.begin() as connection:
        row = {"n": 7, "arrivals_low": second.seq, "ready": "{}", "closed": "{}", "state": "{}"}
        connection.execute(turns.insert().values(row))
    assert db.alive().looked.arrivals == 2


def test_an_arrival_far_below_what_turns_look_at_is_found_by_a_sweep_of_everything(db: Store) -> None:
    db.enqueue("a")
    with db.engine.begin() as connection:
        row = {"n": 7, "arrivals_low": 200_000, "ready": "{}", "closed": "{}", "state": "{}"}
        connection.execute(turns.insert().values(row))
    db.tidy(whole=False)
    assert not db.alive().looked.arrivals
    db.tidy()
    assert db.alive().looked.arrivals


def test_a_lane_waits_in_few_pools_at_a_time_and_sweeps_tell_of_the_others(
    db: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever names another model for each job must not make the turns of all workers long."""
    monkeypatch.setattr(rules, "_MOST_PLACES", 3)
    monkeypatch.setattr(store_turns, "_MOST_ARRIVALS", 4)
    monkeypatch.setattr(rules, "LATE_ARRIVALS", 2)
    for number in range(20):
        db.enqueue(f"flood-{number}", request={"model": f"m{number}", "messages": [{}]})
    for number in range(3):
        db.enqueue(f"other-{number}", tenant="other")
    served: list[str] = []
    place = 0
    for step in range(100):
        turned = chosen(db, 2)
        served += names(turned)
        for pick in turned.picks:
            claim = db.begin(pick)
            assert claim is not None
            db.end(replace(finished(claim), key=claim.key))
        assert len([row for row in db.rows_of_standings() if row.active and row.tenant == "default"]) <= 3
        if step % 4 == 3:
            (place,) = db(store.find_late_arrivals, store.Tidying(limit=10, arrivals_from=place))
    assert sorted(served) == sorted([*(f"flood-{n}" for n in range(20)), *(f"other-{n}" for n in range(3))])
    assert max(served.index(f"other-{n}") for n in range(3)) < 19, served


def test_old_turns_are_deleted_but_not_the_newest_ones(db: Store) -> None:
    row = {"arrivals_low": 0, "ready": "{}", "closed": "{}", "state": "{}"}
    with db.engine.begin() as connection:
        connection.execute(turns.insert(), [row | {"n": n} for n in range(1, 401)])
    bound = 0
    for _ in range(5):
        bound = db.tidy(limit=10, turns_from=bound)
    with db.engine.begin() as connection:
        assert list(connection.scalars(select(turns.c.n).order_by(turns.c.n))) == list(range(300, 401))
    assert bound == 300
    assert db.tidy(limit=10, turns_from=5_000) == 0  # a database from before: its turns are deleted from the first on


def test_a_lane_that_means_nothing_any_more_is_deleted(db: Store) -> None:
    db.claimed("a")
    db.take_in("b", tenant="other")
    rows = db.rows_of_standings()
    assert [row.active for row in rows] == [None]
    lane = {"lane": 5, "pool": rows[0].pool, "tenant": "x", "head": 0}
    with db.engine.begin() as connection:
        values = [
            lane | {"time": 10.0, "active": None, "parked": None},
            lane | {"time": 10.0, "active": 1, "parked": None},
            lane | {"time": 10.0, "active": None, "parked": 1},
            lane | {"time": 90.0, "active": None, "parked": None},
        ]
        connection.execute(standings.insert(), values)
    db.tidy(limit=10, idle_times={(QUEUE, "bulk"): 50.0, ("other", "interactive"): 50.0})
    assert len(db.rows_of_standings()) == 5
    db.tidy(limit=10, idle_times={(QUEUE, "interactive"): 50.0})
    left = [(row.time, row.active, row.parked) for row in db.rows_of_standings() if row.lane == 5]
    assert sorted(left, key=str) == [(10.0, 1, None), (10.0, None, 1), (90.0, None, None)]


def test_idle_lanes_are_deleted_pool_by_pool_and_all_of_them(db: Store) -> None:
    """Each step looks at some pools only, and stays with them as long as there may be more."""
    chain = [["default", "m"]]
    idle = {"tenant": "x", "head": 0, "time": 10.0, "active": None, "parked": None}
    with db.engine.begin() as connection:
        for number in range(5):
            connection.execute(pools.insert().values(id=number, queue=QUEUE, chain=chain, **{"class": "bulk"}))
            lanes = [idle | {"pool": number, "lane": 10 * number + lane} for lane in range(3)]
            connection.execute(standings.insert(), lanes)
    place, places = 0, []
    for _ in range(20):
        tidying = store.Tidying(limit=2, standings_from=place, idle_times={(QUEUE, "bulk"): 50.0})
        (place,) = db(store.delete_idle_standings, tidying)
        places.append(place)
    assert not db.rows_of_standings()
    assert places[:2] == [0, 0]  # of the first two pools more than two rows
    assert {2, 4} <= set(places)


def test_a_state_that_cannot_be_read_is_begun_anew_and_a_sweep_tells_where_jobs_wait(db: Store) -> None:
    """Else no worker would ever choose again."""
    for job_id, model in (("a", "m"), ("b", "m"), ("restarted", "other")):
        db.enqueue(job_id, request={"model": model, "messages": [{}]})
    claims = {claim.key.id: claim for pick in chosen(db).picks if (claim := db.begin(pick))}
    db.end(failed(claims["restarted"], "restarted", retry_in=0.0))
    for job_id in ("c", "d"):
        db.enqueue(job_id)
    chosen(db, 0)
    with db.engine.begin() as connection:
        connection.execute(update(turns).values(state="?", ready="{}"))
    assert not chosen(db).picks
    (found,) = db(store.find_waiting_pools, store.Tidying(limit=10))
    assert [(pool.time is None, pool.due is None) for pool in found].count((True, True)) == 0
    (turned,) = db(store.take_turn, store.Turn("w1", rules.Choice(Policy(), QUEUE, 5, found=found)))
    assert sorted(names(turned)) == ["c", "d", "restarted"]


def test_a_pool_is_deleted_when_nothing_waits_there_or_runs_from_there(db: Store) -> None:
    states: dict[str, Callable[[], object]] = {
        "arrived": lambda: None,
        "waits": lambda: chosen(db, 0),
        "runs": lambda: db.begin(chosen(db, 1).picks[0]),
        "restarted": lambda: db.end(failed(claims[-1], "restarted", retry_in=60.0)),
        "ended": lambda: db.end(finished(claims[-1], "ended")),
    }
    claims: list[Claim] = []
    pool_of: dict[str, int] = {}
    for name in ("runs", "restarted", "ended", "waits", "arrived"):
        db.enqueue(name, request={"model": f"model of one that {name}", "messages": [{}]})
        pool_of[name] = db.rows(waiting, name)[0].pool
        if name in ("restarted", "ended"):
            claim = db.begin(chosen(db, 1).picks[0])
            assert claim is not None
            claims.append(claim)
        states[name]()
    with db.engine.begin() as connection:
        connection.execute(delete(standings).where(standings.c.active.is_(None)))
    bound, steps = 0, 0
    while bound or not steps:
        (bound,) = db(store.delete_idle_pools, store.Tidying(limit=2, pools_from=bound))
        steps += 1
    with db.engine.begin() as connection:
        left = set(connection.scalars(select(pools.c.id)))
    assert left == {pool_of[name] for name in ("arrived", "waits", "runs", "restarted")}
    assert steps == 3


def test_what_is_kept_from_plans_is_not_compiled_for_want_of_them(postgres_url: str) -> None:
    """Compiling took longer than a sweep or a turn may; the tests' own server cannot compile, Debian's can."""
    engine = make_engine(postgres_url, writer=True)
    with engine.begin() as connection:
        assert connection.scalar(text("SHOW jit")) == "off"
        assert connection.scalar(text("SHOW enable_seqscan")) == "off"
    engine.dispose()


def test_a_job_whose_pool_is_swept_while_it_is_stored_gets_it_back(postgres_url: str) -> None:
    """On SQLite nobody sweeps while somebody stores."""
    engine = make_engine(postgres_url)
    schema.migrate(engine)
    db = Store(engine)
    request = {"model": "model of a slow transaction", "messages": [{}]}
    db.enqueue("first", request=request)
    db.cancel("first")
    with engine.connect() as slow:
        transaction = slow.begin()
        queries.enqueue(slow, make_job("second", request=request))
        db(store.delete_idle_pools, store.Tidying(limit=10))
        transaction.commit()
    turned = chosen(db)
    assert (names(turned), len(turned.misplaced)) == ([], 1)
    db(store.put_right, *turned.misplaced)
    assert names(chosen(db)) == ["second"]
    engine.dispose()


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
    db.age_announcement()
    assert db.sweep().unannounced == [JobKey("default", "a")]
    db.claimed("b")
    before = db.get("b")
    db(store.refuse, Refused(make_job("b"), "special", ErrorCode.INVALID_JOB, "model: missing"))
    assert db.get("b") == before


def test_refused_job_that_waits_is_ended_if_it_is_the_very_one(db: Store) -> None:
    db.enqueue()
    hash_ = make_job().request_hash()
    db(store.refuse, Refused(make_job(), QUEUE, ErrorCode.INTERNAL, "a defect", "another"))
    assert db.get().status is JobStatus.QUEUED
    db(store.refuse, Refused(make_job(), QUEUE, ErrorCode.INTERNAL, "a defect", hash_))
    assert db.get().status is JobStatus.FAILED
    assert (db.rows(waiting), db.rows_of_arrivals()) == ([], [])
    db.enqueue("b")
    db.turn()
    db(store.refuse, Refused(make_job("b"), QUEUE, ErrorCode.INTERNAL, "a defect", make_job("b").request_hash()))
    assert db.get("b").status is JobStatus.QUEUED, "a turn has given it to a worker"


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
    assert (db.rows(waiting), db.rows(running), db.rows_of_arrivals()) == ([], [], [])
    assert [(end.job_id, end.ended_at) for end in db.rows(announcements)] == [("a", row.finished_at)]
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
