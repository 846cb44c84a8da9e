"""Everything that the store does, by many workers and clients at the same time: no job is lost, none runs twice."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, func, select, update

from keepstream.client import queries
from keepstream.errors import ErrorCode
from keepstream.results import TERMINAL_STATUSES, Choice, JobStatus, Usage, UsageSource
from keepstream.tables import announcements, arrivals, attempts, jobs, running, seconds_from_now, waiting, workers
from keepstream_worker import store
from keepstream_worker.store import Claim
from keepstream_worker.values import AttemptReason, Ended, Ending, Failure, JobKey, Outcome, Target
from tests.first_come import FirstComeDecider
from tests.jobs import make_job

QUEUE = "completions"
JOBS = 120
WORKERS = 8
STEPS = 60
TARGET = Target("default", "m")
USAGE = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2, source=UsageSource.PROVIDER)


@dataclass
class World:
    """What all of them share, and what they have seen."""

    engine: Engine
    seen: Counter[tuple[JobKey, int]] = field(default_factory=Counter)  #: Claims.
    ended: Counter[JobKey] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, operation: Any, *arguments: Any) -> list[Any]:
        """Run an operation as the worker does; a turn that was lost is repeated."""
        while True:
            try:
                with self.engine.begin() as connection:
                    return list(operation(connection, list(arguments)))
            except store.TurnLostError:
                continue


class Worker:
    """One worker process that now and then dies and comes back as another one, and whose old self may still write."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.random = random.Random(number)  # no secret
        self.number = number
        self.lives = 0
        self.claims: list[Claim] = []
        self.stale: list[tuple[Claim, str]] = []
        self.bound = 0
        self.sign()

    @property
    def id(self) -> str:
        """The worker's id in this life."""
        return f"w{self.number}-{self.lives}"

    def act(self) -> None:
        """Do one thing or another."""
        actions = [self.take_in, self.name, self.cancel, self.choose, self.choose, self.end, self.end, self.end]
        self.random.choice([*actions, self.sign, self.sweep, self.die, self.end_late, self.release, self.announce])()

    def some_job(self) -> str:
        return f"job-{self.random.randrange(JOBS)}"

    def note(self, claims: list[Any]) -> None:
        for claim in claims:
            if isinstance(claim, Claim):
                self.claims.append(claim)
                with self.world.lock:
                    self.world.seen[claim.key, claim.attempt] += 1

    def runs(self, job_id: str) -> bool:
        return any(claim.key.id == job_id for claim in self.claims)

    def take_in(self) -> None:
        ids = {self.some_job() for _ in range(3)}
        direct = store.Direct(self.id, 60.0, TARGET, 1)
        items = [
            store.incoming(make_job(id=job_id), QUEUE)._replace(
                direct=direct if self.random.random() < 0.5 and not self.runs(job_id) else None
            )
            for job_id in ids
        ]
        self.note(self.world.run(store.take_in, *items))

    def name(self) -> None:
        admits = store.Admits(self.id, 60.0, lambda *_: (TARGET, 1))
        ids = {self.some_job() for _ in range(3)}
        items = [store.Named(JobKey("default", job_id), None if self.runs(job_id) else admits) for job_id in ids]
        self.note(self.world.run(store.take_named, *items))

    def cancel(self) -> None:
        if self.random.random() < 0.3:
            with self.world.engine.begin() as connection:
                queries.cancel(connection, "default", self.some_job())

    def choose(self) -> None:
        (turned,) = self.world.run(store.take_turn, store.Turn(self.id, FirstComeDecider(3)))
        if turned.picks:
            self.note(self.world.run(store.begin, *(store.Picked(pick, self.id, 60.0) for pick in turned.picks)))

    def end(self) -> None:
        count = self.random.randint(1, 3)
        claims, self.claims = self.claims[:count], self.claims[count:]
        if claims:
            self.finish([(claim, self.id) for claim in claims])

    def end_late(self) -> None:
        stale, self.stale = self.stale[:2], self.stale[2:]
        if stale:
            self.finish(stale)

    def finish(self, claims: list[tuple[Claim, str]]) -> None:
        endings = [self.ending(claim, worker) for claim, worker in claims]
        answers = self.world.run(store.end, *endings)
        cancelled = []
        for (claim, worker), ending, answer in zip(claims, endings, answers, strict=True):
            if answer is store.NotEnded.CANCEL_REQUESTED:
                cancelled.append(self.ending(claim, worker, JobStatus.CANCELLED))
            elif isinstance(answer, Ended) and ending.status.terminal:
                with self.world.lock:
                    self.world.ended[claim.key] += 1
        if cancelled:
            for ending, answer in zip(cancelled, self.world.run(store.end, *cancelled), strict=True):
                if isinstance(answer, Ended):
                    with self.world.lock:
                        self.world.ended[ending.key] += 1

    def ending(self, claim: Claim, worker: str, status: JobStatus | None = None) -> Ending:
        status = status or self.random.choice([JobStatus.COMPLETED, JobStatus.COMPLETED, JobStatus.RETRYING])
        retries = status is JobStatus.RETRYING
        return Ending(
            claim.key,
            claim.attempt,
            worker,
            Outcome.FAILED if retries else Outcome.FINISHED,
            status,
            choices=[Choice(index=0, content=worker, finish_reason="stop")],
            usage=USAGE,
            failure=Failure(ErrorCode.CONNECTION, "cut") if retries else None,
            next_reason=AttemptReason.RETRY,
            terminal_event_id=None if retries else f"{claim.attempt}-9-{worker}",
        )

    def sign(self) -> None:
        sign = store.Heartbeat(self.id, 600.0, QUEUE, 10, len(self.claims))
        self.world.run(store.record_heartbeat, sign)

    def die(self) -> None:
        """Be silent for long: others take the jobs; the old self may still write."""
        if self.random.random() < 0.5:
            return
        with self.world.engine.begin() as connection:
            silent = update(workers).where(workers.c.id == self.id).values(heartbeat_at=seconds_from_now(-9000.0))
            connection.execute(silent)
        self.stale += [(claim, self.id) for claim in self.claims]
        self.claims = []
        self.lives += 1
        self.sign()

    def sweep(self) -> None:
        request = store.Sweep(600.0, True, float("inf"), 50, 20)
        self.world.run(store.release_lost, request)
        (unannounced,) = self.world.run(store.find_unannounced, request)
        (expired,) = self.world.run(store.end_expired, request)
        ended = unannounced + expired
        self.world.run(store.mark_announced, *ended) if ended else None
        tidying = store.Tidying(20, turns_from=self.bound)
        self.world.run(store.find_late_arrivals, tidying)
        self.world.run(store.delete_idle_standings, tidying)
        (self.bound,) = self.world.run(store.delete_old_turns, tidying)

    def release(self) -> None:
        """Give jobs up that are ours, but that we do not run."""
        result = self.world.run(store.record_heartbeat, store.Heartbeat(self.id, 600.0, QUEUE, 10, len(self.claims)))[0]
        mine = {(claim.key, claim.attempt) for claim in self.claims}
        unknown = [store.OwnedJob(key, attempt, self.id) for key, attempt in result.owned - mine]
        if unknown:
            self.world.run(store.release, *unknown)

    def announce(self) -> None:
        with self.world.engine.begin() as connection:
            rows = connection.execute(select(announcements.c.tenant, announcements.c.job_id).limit(5)).all()
        if rows:
            self.world.run(store.mark_announced, *(JobKey(*row) for row in self.random.sample(rows, len(rows))))


def test_nothing_is_lost_and_nothing_runs_twice_whatever_happens_at_the_same_time(engine: Engine) -> None:
    world = World(engine)
    crowd = [Worker(world, number) for number in range(WORKERS)]
    start = threading.Barrier(WORKERS)

    def live(worker: Worker) -> None:
        start.wait()
        for _ in range(STEPS):
            worker.act()

    with ThreadPoolExecutor(WORKERS) as threads:
        for done in [threads.submit(live, worker) for worker in crowd]:
            done.result()  # a deadlock would be raised here
    with engine.begin() as connection:  # all die; another one comes, and ends what is left
        connection.execute(update(workers).values(heartbeat_at=seconds_from_now(-9000.0)))
    last = Worker(world, WORKERS)
    for _ in range(200):
        last.sweep()
        with engine.begin() as connection:
            connection.execute(
                update(waiting).where(waiting.c.restarted_due.is_not(None)).values(restarted_due=seconds_from_now(0.0))
            )
        last.choose()
        while last.claims:
            last.end()
        with engine.begin() as connection:
            left = connection.scalar(select(func.count()).where(jobs.c.status.not_in(TERMINAL_STATUSES)))
        if not left:
            break
    with engine.begin() as connection:
        rows = connection.execute(select(jobs.c.id, jobs.c.status, jobs.c.attempt)).all()
        assert rows
        assert [row for row in rows if row.status not in TERMINAL_STATUSES] == []
        for table in (waiting, running, arrivals):
            assert connection.execute(select(table)).all() == [], table.name
        outcomes = Counter(connection.scalars(select(attempts.c.job_id).where(attempts.c.outcome == Outcome.FINISHED)))
    assert max(world.seen.values()) == 1, "an attempt belongs to one worker"
    assert max(world.ended.values()) == 1, "a job has one ending"
    assert all(count == 1 for count in outcomes.values())
