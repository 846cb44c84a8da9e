"""The chooser's own logic, on a database that answers what a test lays down; what a turn decides is another matter."""

import asyncio
import json
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, Final

import pytest

from keepstream.errors import StoreUnavailableError
from keepstream.jobs import Job
from keepstream_worker import store
from keepstream_worker.limits import Limits, Policy, ProviderPolicy
from keepstream_worker.scheduling import chooser as chooser_module
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.scheduling.observations import Charged, End, Observation, Place, Settled
from keepstream_worker.turn import FoundPool, Pick, Pool, WaitingJob
from keepstream_worker.values import JobKey, Target

QUEUE: Final = "completions"
TARGET: Final = Target("default", "m")
KEY, OTHER = JobKey("default", "job-1"), JobKey("default", "job-2")
PATIENCE: Final = 60.0


def told(number: int) -> Observation:
    """Return an observation that can be told from others."""
    return Charged(Place(1, 1, "default", "interactive", TARGET), number)


def pick(*names: str) -> tuple[Pick, ...]:
    return tuple(Pick(WaitingJob(1, JobKey("default", name), 1, 1, 0, 10, None), TARGET, 500) for name in names)


class World:
    """A database, an engine and other workers, around one chooser of two places."""

    def __init__(self, policy: Policy | None = None, places: int = 2, providers: Collection[str] | None = None) -> None:
        self.time = 1000.0  #: By the monotonic clock.
        self.answers: list[store.Turned | Exception] = []  #: Of the next turns; then nothing waits.
        self.looks: list[store.Looked] = []  #: The same, of looks.
        self.turns: list[tuple[int, list[Observation]]] = []  #: Taken so far: places and what was told.
        self.looked = 0
        self.begun: list[JobKey] = []
        self.gone: set[JobKey] = set()  #: Jobs that turn out to have ended.
        self.started: list[Any] = []
        self.nudges: list[list[str]] = []
        self.lacking: set[str] = set()  #: Of the providers for which jobs wait, those that the chooser has not got.
        self.unknown: set[str] = set()  #: Those that no worker has.
        self.put_right: list[int] = []
        self.asked_for: list[frozenset[str]] = []
        self.running: set[JobKey] = set()
        self.streams: dict[Target, int] = {}
        self.hold = asyncio.Event()  #: What keeps turns and looks waiting while it is not set.
        self.hold.set()
        self.turn = 0
        self.chooser = Chooser(
            policy or Policy(), "worker", QUEUE, places, 60.0, self, self, self.running, self.streams,  # type: ignore[arg-type]
            self._start, self.nudges.append, providers,
        )  # fmt: skip

    def turned(self, *picks: Pick, ready: dict[str, float] | None = None, now: float = 100.0) -> store.Turned:
        self.turn += 1
        return store.Turned(picks, ready or {}, {}, now, self.turn, "{}")

    def hear(self, **changes: Any) -> None:
        """Let the heartbeat bring something; nothing waits, unless it is said."""
        self.chooser.hear(store.Looked(100.0, self.turn, "{}", {}, arrivals=0)._replace(**changes))

    async def run(self, operation: Any, argument: Any) -> Any:
        await self.hold.wait()
        if operation is store.take_turn:
            self.turns.append((argument.decider._places, list(argument.decider._observations)))
            argument.decider.lacking = {name for name in self.lacking if name not in argument.decider._providers}
            answer = self.answers.pop(0) if self.answers else self.turned()
            if isinstance(answer, Exception):
                raise answer
            return answer
        if operation is store.look:
            self.looked += 1
            return self.looks.pop(0) if self.looks else store.Looked(100.0, self.turn, None, {}, arrivals=0)
        if operation is store.find_unknown:
            self.asked_for.append(argument.providers)
            return argument.providers & self.unknown
        if operation is store.put_right:
            self.put_right.append(argument)
            if argument == 13:
                raise ZeroDivisionError
            return None
        assert operation is store.begin
        self.begun.append(argument.pick.job.key)
        return None if argument.pick.job.key in self.gone else argument.pick.job.key

    persist = run

    def _start(self, claim: Any) -> bool:
        if claim in self.running:
            return False
        self.started.append(claim)
        self.running.add(claim)
        return True

    async def turns_taken(self, number: int) -> None:
        await until(lambda: len(self.turns) >= number)

    async def rests(self) -> None:
        """Let everything run that can run now."""
        for _ in range(50):
            await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # what is waited for sets no event
            await asyncio.sleep(0.002)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    world = World()
    monkeypatch.setattr(chooser_module, "time", SimpleNamespace(monotonic=lambda: world.time))
    world.chooser.start()
    yield world
    world.hold.set()
    await world.chooser.stop()


# -- providers that this worker lacks --


@pytest.fixture
async def lacking(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A world whose chooser can ask one provider, and in which jobs wait for another one."""
    world = World(providers=["default"])
    world.lacking = {"other"}
    monkeypatch.setattr(chooser_module, "time", SimpleNamespace(monotonic=lambda: world.time))
    world.chooser.start()
    yield world
    world.hold.set()
    await world.chooser.stop()


async def test_jobs_of_a_provider_that_another_worker_has_are_left_to_it(lacking: World) -> None:
    world = lacking
    world.hear()
    world.answers = [world.turned(ready={QUEUE: 0.0}) for _ in range(3)]
    for number in range(1, 4):
        world.chooser.wake()
        await world.turns_taken(number)
        await world.rests()
    assert world.asked_for == [frozenset({"other"})], "once in a second"
    assert world.nudges == [[QUEUE]]
    world.lacking.clear()
    world.chooser.wake()
    await world.turns_taken(4)
    await world.rests()
    assert len(world.asked_for) == 1


async def test_jobs_of_a_provider_that_nobody_has_are_taken_at_once(lacking: World) -> None:
    world = lacking
    taken: list[set[str]] = []
    run = world.run

    async def note(operation: Any, argument: Any) -> Any:
        if operation is store.take_turn:
            taken.append(set(argument.decider._providers))
        return await run(operation, argument)

    world.chooser._turns = SimpleNamespace(run=note)  # type: ignore[assignment]
    world.unknown = {"other"}
    world.chooser.wake()
    await until(lambda: len(taken) >= 2)
    await world.rests()
    assert taken == [{"default"}, {"default", "other"}]
    world.chooser.wake()
    await until(lambda: len(taken) >= 3)
    assert taken[2] == {"default"}, "what others have may have changed"


async def test_job_of_a_provider_that_is_lacking_does_not_start_directly(lacking: World) -> None:
    job = Job(provider="other", request={"model": "m", "messages": [{}]})
    assert lacking.chooser.direct(job, 10, None) is None
    assert lacking.chooser.direct(job.model_copy(update={"provider": "default"}), 10, None) is not None


# -- direct starts --


async def test_place_is_kept_only_while_nothing_waits_and_that_is_news(world: World) -> None:
    assert not world.chooser.reserve(KEY), "nothing is known yet"
    world.hear()
    assert world.chooser.reserve(KEY)
    assert not world.chooser.reserve(KEY), "the same job comes twice"
    assert world.chooser.free == 1
    world.chooser.forget(KEY)
    assert world.chooser.free == 2
    world.time += 60
    assert not world.chooser.reserve(KEY), "it may have changed meanwhile"
    world.hear()
    assert world.chooser.reserve(KEY)


@pytest.mark.parametrize("waits", [{"arrivals": True}, {"ready": {QUEUE: 0.0}}])
async def test_no_place_is_kept_while_jobs_of_the_queue_wait(world: World, waits: dict[str, Any]) -> None:
    world.hold.clear()
    world.hear(**waits)
    assert not world.chooser.reserve(KEY)


async def test_jobs_of_other_queues_keep_nobody_waiting(world: World) -> None:
    world.hear(ready={"others": 0.0})
    assert world.chooser.reserve(KEY)


async def test_jobs_that_cannot_go_yet_keep_nobody_waiting(world: World) -> None:
    world.hear(ready={QUEUE: 900.0})
    assert world.chooser.reserve(KEY), "they wait for a limit that this one does not have"


async def test_no_more_places_are_kept_than_there_are(world: World) -> None:
    world.hear()
    world.running.add(OTHER)
    assert world.chooser.reserve(KEY)
    assert not world.chooser.reserve(JobKey("default", "job-3"))


async def test_job_that_runs_here_is_not_started_again(world: World) -> None:
    world.hear()
    world.running.add(KEY)
    assert not world.chooser.reserve(KEY)


async def test_job_that_a_turn_and_a_message_bring_is_expected_until_it_runs(world: World) -> None:
    """Or the heartbeat would take it for a claim that nobody runs, and give it back."""
    world.hear()
    assert world.chooser.reserve(JobKey("default", "a"))
    world.answers = [world.turned(*pick("a"))]
    persist = asyncio.Event()

    async def begin_later(operation: Any, argument: Any) -> Any:
        await persist.wait()
        return await world.run(operation, argument)

    world.persist = begin_later  # type: ignore[method-assign]
    world.chooser.wake()
    await world.turns_taken(1)
    await world.rests()
    world.chooser.forget(JobKey("default", "a"))
    assert JobKey("default", "a") in world.chooser.expected
    persist.set()
    await until(lambda: world.started)
    assert not world.chooser.expected


async def test_no_place_is_kept_by_a_worker_that_stops(world: World) -> None:
    world.hear()
    world.chooser.pause()
    assert not world.chooser.reserve(KEY)


async def test_job_that_came_whole_starts_at_its_own_target_unless_that_is_limited(world: World) -> None:
    job = Job(id="job-1", total_timeout=9.0, request={"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    direct = world.chooser.direct(job, 10, 100)
    assert direct is not None
    assert (direct.worker_id, direct.total_timeout, direct.target) == ("worker", 9.0, TARGET)
    limited = World(Policy(providers={"default": ProviderPolicy(limits=Limits(concurrency=5))}))
    assert limited.chooser.direct(job, 10, 100) is None


async def test_stored_job_of_another_queue_is_not_started(world: World) -> None:
    admits = world.chooser.admits(KEY).admits
    assert admits(Pool(1, QUEUE, "interactive", (TARGET,)), "default", 10, 100) is not None
    assert admits(Pool(1, "others", "interactive", (TARGET,)), "default", 10, 100) is None


async def test_of_very_many_that_come_at_once_the_first_start_at_once() -> None:
    """The others would start as if there were no streams but those that run already."""
    world = World(places=100)
    world.hear()
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    pool = Pool(1, QUEUE, "interactive", (TARGET,))

    def starts(number: int) -> bool:
        key = JobKey("default", f"job-{number}")
        assert world.chooser.reserve(key)
        if number % 2:
            return world.chooser.direct(Job(id=key.id, request=request), 10, None) is not None
        return world.chooser.admits(key).admits(pool, "default", 10, None) is not None

    assert [starts(number) for number in range(40)] == [True] * 16 + [False] * 24
    for number in (3, 4, 30):  # two that were let start have ended, and one that was not has been stored
        world.chooser.forget(JobKey("default", f"job-{number}"))
    assert [starts(number) for number in range(40, 44)] == [True, True, False, False]
    world.streams[TARGET] = 1
    world.chooser.forget(JobKey("default", "job-5"))
    assert not starts(44)


# -- wake-ups --


async def test_turn_asks_for_the_free_places_and_what_it_brings_begins(world: World) -> None:
    world.answers = [world.turned(*pick("a", "b"))]
    world.chooser.wake()
    await until(lambda: len(world.started) == 2)
    assert world.turns == [(2, [])]
    assert world.chooser.free == 0
    assert not world.chooser.expected


async def test_job_that_has_ended_meanwhile_gives_its_place_back(world: World) -> None:
    world.gone.add(JobKey("default", "a"))
    world.answers = [world.turned(*pick("a"))]
    world.chooser.wake()
    await until(lambda: world.begun)
    await until(lambda: not world.chooser.expected)
    assert world.started == []
    assert world.chooser.free == 2


def withdrawn() -> Observation:
    """Return what is told of a job that ``pick`` has picked and that does not begin."""
    return Settled(Place(1, 1, "default", "interactive", TARGET), 500, 0, None, End.WITHDRAWN)


async def test_job_that_has_ended_meanwhile_takes_nothing(world: World) -> None:
    """What it was charged goes back, and its target may be tried by another one."""
    world.hear()
    world.gone.add(JobKey("default", "a"))
    world.answers = [world.turned(*pick("a"), ready={QUEUE: 0.0}), world.turned(ready={QUEUE: 200.0})]
    world.chooser.wake()
    await until(lambda: any(withdrawn() in told for _, told in world.turns))


async def test_job_that_a_message_has_started_meanwhile_is_charged_once(world: World) -> None:
    world.running.add(JobKey("default", "a"))
    world.answers = [world.turned(*pick("a"), ready={QUEUE: 0.0}), world.turned(ready={QUEUE: 200.0})]
    world.chooser.wake()
    await until(lambda: any(withdrawn() in told for _, told in world.turns))


async def test_job_whose_start_meets_a_defect_takes_nothing(world: World) -> None:
    async def defect(operation: Any, argument: Any) -> Any:
        raise ZeroDivisionError

    world.persist = defect  # type: ignore[method-assign]
    world.answers = [world.turned(*pick("a"), ready={QUEUE: 0.0}), world.turned(ready={QUEUE: 200.0})]
    world.chooser.wake()
    await until(lambda: any(withdrawn() in told for _, told in world.turns))


async def test_job_that_is_left_out_of_its_turn_takes_nothing_and_is_no_reason_for_turns_without_end(
    world: World,
) -> None:
    world.hear()
    left_out = pick("a")
    world.answers = [world.turned(ready={QUEUE: 0.0})._replace(left_out=left_out) for _ in range(3)]
    world.chooser.wake()
    await world.turns_taken(1)
    await world.rests()
    assert len(world.turns) == 1, "somebody has locked it: the next turn would find it so"
    world.chooser.observe(told(7), urgent=True)
    await world.turns_taken(2)
    assert world.turns[1][1] == [withdrawn(), told(7)]


async def test_worker_that_is_full_wakes_others_instead_of_taking_turns(world: World) -> None:
    world.running |= {KEY, OTHER}
    world.chooser.wake()
    assert world.nudges == [[QUEUE]]
    for _ in range(3):
        world.chooser.wake()
    assert world.nudges == [[QUEUE]], "not for each job"
    await until(lambda: len(world.nudges) > 1)
    assert world.nudges == [[QUEUE]] * 2, "but of the last: the others may have looked before it came"
    world.time += 1
    world.chooser.wake()
    assert world.nudges == [[QUEUE]] * 3
    await world.rests()
    assert world.turns == []


async def test_turn_that_leaves_more_than_there_are_places_wakes_others(world: World) -> None:
    world.answers = [world.turned(*pick("a", "b"), ready={QUEUE: 0.0, "others": 0.0, "later": 900.0})]
    world.chooser.wake()
    await until(lambda: world.nudges)
    assert sorted(world.nudges[0]) == [QUEUE, "others"]
    assert len(world.turns) == 1


async def test_turns_go_on_while_places_are_free_and_jobs_wait(world: World) -> None:
    world.answers = [world.turned(*pick("a"), ready={QUEUE: 0.0}), world.turned(*pick("b"))]
    world.chooser.wake()
    await until(lambda: len(world.started) == 2)
    assert [places for places, _ in world.turns] == [2, 1]
    assert world.nudges == [], "this worker takes them itself"


async def test_heartbeat_that_finds_work_wakes_whoever_has_a_place(world: World) -> None:
    world.hear(arrivals=1)
    await world.turns_taken(1)
    world.running |= {KEY, OTHER}
    world.hear(arrivals=1)
    await world.rests()
    assert len(world.turns) == 1


async def test_very_many_arrivals_are_taken_note_of_though_no_place_is_free(world: World) -> None:
    """Or whoever came after a flood of another tenant's jobs would wait for as many ends as it has hundreds."""
    world.running |= {KEY, OTHER}
    world.hear(arrivals=150)
    await world.rests()
    assert world.turns == []
    world.answers = [world.turned()._replace(more_arrivals=True) for _ in range(3)]
    world.hear(arrivals=1002)
    await world.turns_taken(4)
    await world.rests()
    assert world.turns == [(0, [])] * 4
    world.answers = [world.turned()._replace(more_arrivals=True, misplaced=(13,))]
    world.hear(arrivals=1002)
    await world.turns_taken(5)
    await world.rests()
    assert len(world.turns) == 5, "what waits where no turn can look stays"


async def test_jobs_that_turns_have_left_wake_nobody(world: World) -> None:
    """Two hundred idle workers would take two hundred turns a second for them, and no job would start without one."""
    left = '{"x":[[5,6],100.0]}'
    world.turn = 1
    world.hear(state=left, arrivals=2)
    await world.rests()
    assert world.turns == []
    assert world.chooser.reserve(KEY)
    world.chooser.forget(KEY)
    world.hear(state=None, arrivals=3)
    await world.turns_taken(1)


async def test_job_that_is_due_later_is_looked_for_then(world: World) -> None:
    world.looks = [store.Looked(100.2, 0, None, {QUEUE: 100.1}, arrivals=0)]
    world.hear(ready={QUEUE: 100.1})
    assert world.turns == []
    await world.turns_taken(1)
    assert world.looked == 1, "whoever looked first may have taken everything"


async def test_moment_that_a_turn_names_is_known(world: World) -> None:
    world.answers = [world.turned(ready={QUEUE: 100.05})]
    world.looks = [store.Looked(100.1, 1, None, {QUEUE: 100.05}, arrivals=0)]
    world.chooser.wake()
    await world.turns_taken(2)
    assert world.looked == 1


async def test_nudge_makes_one_look_and_takes_a_turn_only_for_work(world: World) -> None:
    for _ in range(5):
        world.chooser.nudged()
    await until(lambda: world.looked)
    await world.rests()
    assert world.looked == 1
    assert world.turns == []
    world.looks = [store.Looked(100.0, 0, None, {}, arrivals=1)]
    world.chooser.nudged()
    await world.turns_taken(1)


async def test_nudge_means_nothing_to_a_worker_that_is_full_or_stops(world: World) -> None:
    world.running |= {KEY, OTHER}
    world.chooser.nudged()
    world.running.clear()
    world.chooser.pause()
    world.chooser.nudged()
    assert world.chooser._timer is None


# -- what is told --


async def test_what_was_learned_is_told_within_a_bounded_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "_TELL_IDLE", 0.01)
    world.hear()
    world.chooser.observe(told(1))
    world.chooser.observe(told(2))
    await world.rests()
    await world.turns_taken(1)
    assert world.turns == [(2, [told(1), told(2)])], "by one turn"


async def test_it_is_told_sooner_where_something_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "_TELL_IDLE", 600.0)
    monkeypatch.setattr(chooser_module, "_TELL_WITHIN", 0.01)
    world = World(Policy(providers={"default": ProviderPolicy(limits=Limits(concurrency=5))}))
    world.chooser.start()
    world.hear()
    world.chooser.observe(told(1))
    await world.turns_taken(1)
    await world.chooser.stop()


async def test_refusal_is_told_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "_TELL_IDLE", 600.0)
    world.hear()
    world.chooser.observe(told(1))
    await world.rests()
    assert world.turns == []
    world.chooser.observe(told(2), urgent=True)
    await world.turns_taken(1)
    assert world.turns == [(2, [told(1), told(2)])]


async def test_full_worker_tells_and_asks_for_nothing(world: World) -> None:
    world.hear()
    world.running |= {KEY, OTHER}
    world.chooser.observe(told(1), urgent=True)
    await world.turns_taken(1)
    assert world.turns == [(0, [told(1)])]


async def test_worker_that_stops_still_tells_what_its_last_jobs_take(world: World) -> None:
    world.hear()
    world.chooser.pause()
    world.answers = [world.turned(ready={QUEUE: 0.0})]
    world.chooser.observe(told(1), urgent=True)
    await until(lambda: world.nudges)
    assert world.turns == [(0, [told(1)])]
    assert world.nudges == [[QUEUE]], "others take what may go now"


async def test_more_than_one_turn_takes_is_told_by_several(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "_TELL_IDLE", 0.01)
    monkeypatch.setattr(chooser_module, "_MOST_TOLD", 3)
    world.hear()
    world.hold.clear()
    for number in range(8):
        world.chooser.observe(told(number))
    world.hold.set()
    await until(lambda: sum(len(observations) for _, observations in world.turns) == 8)
    assert [observation for _, observations in world.turns for observation in observations] == [
        told(number) for number in range(8)
    ]


async def test_what_could_not_be_told_is_told_again_in_order(world: World) -> None:
    world.hold.clear()
    world.hear()
    world.answers = [StoreUnavailableError("away"), StoreUnavailableError("away")]
    world.chooser.observe(told(1), urgent=True)
    await world.rests()
    world.chooser.observe(told(2))  # while the first turn is under way
    world.hold.set()
    await world.turns_taken(3)
    assert [observations for _, observations in world.turns] == [[told(1)], [told(1), told(2)], [told(1), told(2)]]


async def test_jobs_that_wait_where_no_turn_can_look_are_seen_to_one_by_one(world: World) -> None:
    world.answers = [world.turned(*pick("a"))._replace(misplaced=(12, 13, 14))]
    world.chooser.wake()
    await until(lambda: len(world.put_right) == 3 and world.started)
    await world.rests()
    assert world.put_right == [12, 13, 14]
    assert len(world.turns) == 1, "what could not be mended is no reason for turns without end"


async def test_tenants_whose_lanes_are_parked_are_looked_at_by_the_next_turn_alone(world: World) -> None:
    world.running.update({KEY, OTHER})
    parked = []
    run = world.run

    async def note(operation: Any, argument: Any) -> Any:
        parked.append(tuple(argument.decider._parked))
        return await run(operation, argument)

    world.chooser._turns = SimpleNamespace(run=note)  # type: ignore[assignment]
    world.chooser.look_at(["a", "b"])
    await world.turns_taken(1)
    world.chooser.observe(told(1), urgent=True)
    await world.turns_taken(2)
    assert parked == [("a", "b"), ()]


async def test_the_next_turn_is_told_of_pools_that_turns_do_not_know(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.running.update({KEY, OTHER})
    said = []
    monkeypatch.setattr(chooser_module.log, "error", lambda event, **_: said.append(event))
    told_of: list[Any] = []
    run = world.run

    async def note(operation: Any, argument: Any) -> Any:
        told_of.append(argument.decider._found)
        argument.decider.lost_state = True
        return await run(operation, argument)

    world.chooser._turns = SimpleNamespace(run=note)  # type: ignore[assignment]
    here, elsewhere = (Pool(number, QUEUE, "interactive", (TARGET,)) for number in (1, 2))
    world.hear(turn=5, state=json.dumps({"p": {"1": [QUEUE, "interactive", ["default/m"], 3.0]}}))
    world.chooser.find([FoundPool(here, 3.0, None)])
    await world.rests()
    assert not told_of, "it is known"
    world.chooser.find([FoundPool(here, 3.0, 50.0), FoundPool(elsewhere, 3.0, None)])
    await world.turns_taken(1)
    await world.rests()
    assert told_of == [(FoundPool(here, 3.0, 50.0), FoundPool(elsewhere, 3.0, None))]
    assert said == ["turn_state_lost"]


async def test_what_cannot_be_told_for_long_is_bounded_and_nothing_of_it_is_lost(world: World) -> None:
    world.hold.clear()
    for _ in range(10 * chooser_module._MOST_KEPT):
        world.chooser.observe(told(1))
    assert len(world.chooser._observations) <= chooser_module._MOST_KEPT
    world.hold.set()
    await until(lambda: not world.chooser._observations)
    tokens = [each.tokens for _, found in world.turns for each in found if isinstance(each, Charged)]
    assert sum(tokens) == 10 * chooser_module._MOST_KEPT


async def test_turns_that_are_lost_again_and_again_are_said_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleep = asyncio.sleep
    pauses: list[float] = []

    async def no_sleep(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    world.answers = [store.TurnLostError("changed") for _ in range(12)]
    world.chooser.wake()
    async with asyncio.timeout(PATIENCE):
        while len(world.turns) < 13:
            await sleep(0.001)
    assert capsys.readouterr().out.count("turns_lost") == 1
    lost = [seconds for seconds in pauses if seconds]
    assert lost[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]


async def test_what_is_left_is_told_at_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser_module, "_TELL_IDLE", 600.0)
    world.hear()
    world.chooser.observe(told(1))
    world.chooser.pause()
    await world.chooser.stop()
    assert world.turns == [(0, [told(1)])]


# -- the end --


async def test_worker_that_stops_takes_no_turn(world: World) -> None:
    world.chooser.pause()
    world.chooser.wake()
    await world.rests()
    assert world.turns == []


async def test_jobs_of_a_turn_under_way_are_known_before_the_end_goes_on(world: World) -> None:
    world.hold.clear()
    world.answers = [world.turned(*pick("a"))]
    world.chooser.wake()
    await world.rests()
    world.chooser.pause()
    settling = asyncio.create_task(world.chooser.settle())
    await world.rests()
    assert not settling.done()
    world.hold.set()
    await settling
    assert set(world.chooser.expected) | set(world.started) == {JobKey("default", "a")}


# -- what is known --


async def test_newest_state_is_kept(world: World) -> None:
    world.hear(turn=5, state=json.dumps({}))
    assert world.chooser.known_turn == 5
    world.hear(turn=4, state=json.dumps({}))
    assert world.chooser.known_turn == 5
    world.hear(turn=6, state=None)
    assert world.chooser.known_turn == 5, "its state is not known"
    world.hear(turn=6, state="no state", ready={QUEUE: 100.0})
    assert world.chooser.known_turn == 5
    await world.turns_taken(1)  # which begins a new one


async def test_what_a_database_knows_that_lost_its_newest_turns_counts_soon(world: World) -> None:
    world.hear(turn=500, state=json.dumps({}))
    world.hear(turn=499, state=None)  # an answer that was late
    world.hear(turn=500, state=None)
    world.hear(turn=499, state=None)
    assert world.chooser.known_turn == 500
    for _ in range(3):
        world.hear(turn=7, state=None)
    assert world.chooser.known_turn == -1, "its state is asked for"
    world.hear(turn=7, state=json.dumps({}))
    assert world.chooser.known_turn == 7
