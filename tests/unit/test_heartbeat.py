"""What a worker does with the database's answer to its sign of life; for the statement see ``test_store.py``."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from keepstream_worker import store
from keepstream_worker.jobs.active_job import ActiveJob, Stop
from keepstream_worker.scheduling.observations import End, Observation, Place, Settled
from keepstream_worker.settings import load_settings
from keepstream_worker.store import HeartbeatResult, Looked, OwnedJob
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.values import Failure, JobKey, Target

KEY = JobKey("tenant-1", "job-1")
SETTINGS = load_settings().model_copy(update={"heartbeat_interval": 1.0, "lease": 6.0})


class World:
    """A clock, a database that answers what a test lays down, and the jobs that run here."""

    def __init__(self) -> None:
        self.time = 1000.0
        looked = Looked(now=0.0, turn=7, state=None, ready={}, arrivals=0)
        self.answer = HeartbeatResult(
            lapsed=False, owned=frozenset(), cancels=frozenset(), sweeper_free=False, looked=looked
        )
        self.asked: list[store.Heartbeat] = []
        self.heard: list[Looked] = []
        self.released: list[OwnedJob] = []
        self.active: dict[JobKey, ActiveJob] = {}
        engine = SimpleNamespace(active=self.active, request_stop=self._request_stop)
        self.expected: set[JobKey] = set()
        self.observed: list[Observation] = []
        chooser = SimpleNamespace(
            expected=self.expected,
            known_turn=6,
            hear=self.heard.append,
            observe=self.observed.append,
            wake=lambda: None,
        )
        self.hold = asyncio.Event()  #: What keeps releases waiting while it is not set.
        self.hold.set()
        work = SimpleNamespace(run=self._release)
        parts: tuple[Any, Any, Any, Any] = (self, work, engine, chooser)
        self.heartbeat = WorkerHeartbeat(SETTINGS, "worker-1", *parts, clock=lambda: self.time)

    async def _release(self, operation: Any, argument: OwnedJob) -> store.Released:
        """Answer as the database does, by another connection."""
        assert operation is store.release
        self.released.append(argument)
        await self.hold.wait()
        return store.Released(argument.key, 1, 1, "interactive", Target("default", "m"), 7, 900.0, begun=False)

    async def run(self, operation: Any, argument: Any) -> HeartbeatResult | None:
        """Answer as the database does."""
        assert operation is store.record_heartbeat
        self.asked.append(argument)
        return self.answer

    async def beat(self, after: float = 1.0, **changes: Any) -> None:
        """Let some seconds pass, then give a sign of life."""
        self.time += after
        self.answer = self.answer._replace(**changes)
        await self.heartbeat.beat()
        for _ in range(5):  # what it has begun goes on
            await asyncio.sleep(0)

    def _request_stop(self, key: JobKey, stop: Stop) -> None:
        self.active[key].request_stop(stop)


@pytest.fixture
def world() -> World:
    return World()


async def stream() -> Failure | None:
    """Stream until somebody stops it."""
    await asyncio.Event().wait()
    return None


async def run_job(world: World, attempt: int) -> "asyncio.Task[Failure | None]":
    """Run a job here, as the engine does; return once it streams."""

    async def run() -> Failure | None:
        task = asyncio.current_task()
        assert task is not None
        world.active[KEY] = job = ActiveJob(task)
        job.attempt = attempt
        return await job.interruptibly(stream())

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    assert world.active[KEY].interruptible
    return task


async def stop_of(world: World, task: "asyncio.Task[Failure | None]") -> Stop | None:
    """Why the job was asked to stop; it is ended in any case."""
    stop = world.active[KEY].stop
    task.cancel()
    await asyncio.wait((task,))
    return stop


# -- whether the silence of others proves anything --


async def test_others_may_be_judged_after_a_whole_lease_without_a_gap(world: World) -> None:
    assert not world.heartbeat.unbroken_for_a_lease
    for _ in range(7):
        await world.beat()
        assert not world.heartbeat.unbroken_for_a_lease
    await world.beat()
    assert world.heartbeat.unbroken_for_a_lease


@pytest.mark.parametrize(("pause", "unbroken"), [(3.0, True), (3.1, False)])
async def test_gap_of_half_a_lease_makes_it_begin_anew(world: World, pause: float, unbroken: bool) -> None:  # noqa: FBT001
    for _ in range(8):
        await world.beat()
    await world.beat(after=pause)
    assert world.heartbeat.unbroken_for_a_lease is unbroken


async def test_heartbeat_that_is_not_answered_yet_may_be_the_beginning_of_a_gap(world: World) -> None:
    """Each way to the database has a connection of its own, and a sweep may be answered before the heartbeat is."""
    for _ in range(8):
        await world.beat()
    world.time += 3.0
    assert world.heartbeat.unbroken_for_a_lease
    world.time += 0.1
    assert not world.heartbeat.unbroken_for_a_lease


async def test_lapse_that_the_database_saw_makes_it_begin_anew(world: World) -> None:
    for _ in range(8):
        await world.beat()
    await world.beat(lapsed=True)
    assert not world.heartbeat.unbroken_for_a_lease


async def test_outage_makes_it_begin_anew(world: World) -> None:
    for _ in range(8):
        await world.beat()
    world.heartbeat.note_outage()
    assert not world.heartbeat.unbroken_for_a_lease
    await world.beat()
    assert not world.heartbeat.unbroken_for_a_lease


# -- jobs that run here --


async def test_job_that_the_database_gives_to_nobody_else_goes_on(world: World) -> None:
    task = await run_job(world, attempt=2)
    await world.beat(owned=frozenset({(KEY, 2)}))
    assert await stop_of(world, task) is None


@pytest.mark.parametrize("owned", [frozenset(), frozenset({(KEY, 3)})])
async def test_job_that_was_taken_over_stops(world: World, owned: frozenset[tuple[JobKey, int]]) -> None:
    task = await run_job(world, attempt=2)
    await world.beat(owned=owned)
    assert await stop_of(world, task) is Stop.SUPERSEDED


async def test_job_whose_claim_is_not_granted_yet_goes_on(world: World) -> None:
    task = await run_job(world, attempt=0)
    await world.beat()
    assert await stop_of(world, task) is None


async def test_job_whose_ending_is_being_stored_is_left_alone(world: World) -> None:
    task = await run_job(world, attempt=2)
    world.active[KEY].interruptible = False
    await world.beat()
    assert await stop_of(world, task) is None


async def test_job_with_a_cancel_request_is_cancelled(world: World) -> None:
    task = await run_job(world, attempt=2)
    await world.beat(owned=frozenset({(KEY, 2)}), cancels=frozenset({KEY}))
    assert await stop_of(world, task) is Stop.CANCELLED


# -- claims that nothing runs --


async def test_claim_that_nothing_runs_is_released_at_the_second_heartbeat(world: World) -> None:
    await world.beat(owned=frozenset({(KEY, 2)}))
    assert world.released == [], "its answer may be on its way"
    await world.beat()
    assert world.released == [OwnedJob(KEY, 2, "worker-1")]


async def test_release_holds_up_no_heartbeat_and_gives_back_what_was_charged(world: World) -> None:
    world.hold.clear()
    for number in range(4):
        await world.beat(owned=frozenset({(KEY, 2)}))
        assert len(world.asked) == number + 1
    assert world.released == [OwnedJob(KEY, 2, "worker-1")], "one is under way"
    assert world.observed == []
    world.hold.set()
    await world.beat(owned=frozenset())
    place = Place(1, 1, KEY.tenant, "interactive", Target("default", "m"), 900.0)
    assert world.observed == [Settled(place, 7, 0, None, End.WITHDRAWN)]


async def test_claim_of_another_attempt_begins_anew(world: World) -> None:
    await world.beat(owned=frozenset({(KEY, 2)}))
    await world.beat(owned=frozenset({(KEY, 3)}))
    assert world.released == []


async def test_claim_that_is_on_its_way_is_not_released(world: World) -> None:
    world.expected.add(KEY)
    for _ in range(3):
        await world.beat(owned=frozenset({(KEY, 2)}))
    assert world.released == [], "a turn has brought it, and it begins at once"
    world.expected.clear()
    await world.beat()
    await world.beat()
    assert world.released == [OwnedJob(KEY, 2, "worker-1")]


# -- what the same statement says besides --


async def test_what_waits_and_whether_nobody_sweeps_is_passed_on(world: World) -> None:
    assert not world.heartbeat.sweeper_free
    looked = Looked(now=5.0, turn=8, state="{}", ready={"completions": 0.0}, arrivals=1)
    await world.beat(looked=looked, sweeper_free=True)
    assert world.heard == [looked]
    assert world.heartbeat.sweeper_free
    await world.beat(sweeper_free=False)
    assert not world.heartbeat.sweeper_free


async def test_sign_of_life_says_how_many_jobs_run_and_which_turn_is_known(world: World) -> None:
    await world.beat()
    task = await run_job(world, attempt=2)
    await world.beat(owned=frozenset({(KEY, 2)}))
    await stop_of(world, task)
    assert [(asked.running, asked.places, asked.known_turn) for asked in world.asked] == [
        (running, SETTINGS.concurrency, 6) for running in (0, 1)
    ]
