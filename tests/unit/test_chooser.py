"""The chooser: when a job may start at once, though others wait."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keepstream.client.database import make_engine
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.store import Looked
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.values import JobKey

NOW = 1_000.0  #: By the database's clock.
KEY = JobKey("tenant", "job")


@contextmanager
def chooser(directory: Path) -> Iterator[Chooser]:
    database = WorkerDatabase(make_engine(f"sqlite:///{directory / 'unused.db'}"))
    try:
        yield Chooser(
            Policy(), "worker", "ours", 2, 60.0, database, database, set(), {}, lambda _: None, lambda _: None
        )
    finally:
        database.close()


def reserves(directory: Path, hear: Callable[[Chooser], None]) -> bool:
    """Return whether the chooser keeps a place for a job after what it has heard."""

    async def ask() -> bool:
        with chooser(directory) as ours:
            hear(ours)
            return ours.reserve(KEY)

    return asyncio.run(ask())


def looked(*, arrivals: bool = False, **ready: float) -> Callable[[Chooser], None]:
    return lambda ours: ours.hear(Looked(NOW, 0, None, ready, arrivals))


def test_a_job_may_start_at_once_when_nothing_waits(tmp_path: Path) -> None:
    assert reserves(tmp_path, looked())


def test_what_waits_for_others_keeps_no_job_from_starting_at_once(tmp_path: Path) -> None:
    # In another queue; or in ours, but for a place at a provider, a retry's moment, the end of a cool-down.
    assert reserves(tmp_path, looked(theirs=0.0))
    assert reserves(tmp_path, looked(ours=NOW + 60.0))


def test_a_job_waits_its_turn_when_another_one_could_go(tmp_path: Path) -> None:
    assert not reserves(tmp_path, looked(ours=0.0))
    assert not reserves(tmp_path, looked(ours=NOW - 1.0))
    assert not reserves(tmp_path, looked(arrivals=True))


def test_a_job_waits_its_turn_when_another_one_has_just_been_stored(tmp_path: Path) -> None:
    def hear(ours: Chooser) -> None:
        looked()(ours)
        ours.wake()

    assert not reserves(tmp_path, hear)


def test_a_job_waits_its_turn_before_anything_is_known(tmp_path: Path) -> None:
    assert not reserves(tmp_path, lambda _: None)
