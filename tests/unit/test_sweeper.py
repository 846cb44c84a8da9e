"""The sweeper's own logic, on a database that answers what a test lays down; what a step does is another matter."""

from types import SimpleNamespace
from typing import Any

import pytest

from keepstream_worker import store
from keepstream_worker.settings import load_settings
from keepstream_worker.turn import FoundPool, Pool
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.sweeper import Sweeper
from keepstream_worker.values import JobKey, Target

POOL = FoundPool(Pool(7, "completions", "interactive", (Target("p", "m"),)), 1.0, None)


#: They say where they are to go on.
PLACES = (store.find_late_arrivals, store.delete_old_turns, store.delete_idle_standings, store.delete_idle_pools)


class World:
    """A database, and a worker around one sweeper that leads."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []
        self.answers: dict[Any, list[Any]] = {}  #: Of each operation, one after the other; then the usual one.
        self.found: list[FoundPool] = []
        self.parked: list[str] = []
        self.parks_beyond = False
        heartbeat: Any = SimpleNamespace(unbroken_for_a_lease=True, sweeper_free=True)
        self.sweeper = Sweeper(load_settings({}), "worker", self, heartbeat, *[self] * 4)  # type: ignore[arg-type]

    async def sweep(self) -> dict[Any, Any]:
        """Sweep; return what was asked."""
        self.asked.clear()
        await self.sweeper._sweep()
        return dict(self.asked)

    async def run(self, operation: Any, argument: Any) -> Any:
        self.asked.append((operation, argument))
        answers = self.answers.get(operation)
        if answers:
            return answers.pop(0)
        return True if operation is store.lead else 0 if operation in PLACES else []

    def idle_times(self) -> dict[tuple[str, str], float]:
        return {}

    def find(self, pools: list[FoundPool]) -> None:
        self.found += pools

    def look_at(self, tenants: list[str]) -> None:
        self.parked += tenants

    async def record(self, limit: int) -> None:
        pass

    async def tell(self) -> None:
        pass


@pytest.fixture
def world() -> World:
    return World()


async def test_the_walk_through_the_pools_goes_to_its_end_without_a_pause(world: World) -> None:
    """One step a minute would never be done with pools that are made quicker than that."""
    world.answers = {store.delete_idle_pools: [300, 600, 0]}
    walked = [(await world.sweep()).get(store.delete_idle_pools) for _ in range(5)]
    assert [step and step.pools_from for step in walked] == [0, 300, 600, None, None]


async def test_lanes_are_looked_at_pool_by_pool_in_each_sweep(world: World) -> None:
    world.answers = {store.delete_idle_standings: [300, 300, 0]}
    places = [(await world.sweep())[store.delete_idle_standings].standings_from for _ in range(4)]
    assert places == [0, 300, 300, 0]


async def test_turns_are_told_where_jobs_wait_at_once_if_they_have_lost_it(world: World) -> None:
    world.answers = {store.find_waiting_pools: [[POOL], [POOL]]}
    await world.sweep()
    assert world.found == [POOL]
    assert store.find_waiting_pools not in await world.sweep()
    world.parks_beyond = True
    await world.sweep()
    assert world.found == [POOL, POOL]


async def test_a_note_of_a_job_that_is_not_there_keeps_no_other_end_from_being_announced() -> None:
    marked = []

    async def run(operation: Any, argument: Any) -> Any:
        if operation is store.mark_announced:
            marked.append(argument)

    database: Any = SimpleNamespace(run=run)
    publisher: Any = None
    key = JobKey("default", "deleted")
    assert await Announcer(database, publisher).announce(key), "there is nothing to wait for"
    assert marked == [key]
