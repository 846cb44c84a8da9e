"""The pulse: what counts as alive, and that each thread of a worker has to run for it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from celery.signals import worker_shutting_down
from kombu.asynchronous import Hub

from keepstream_worker.commands.doctor import Severity, _own_worker
from keepstream_worker.intake import pool as pool_module
from keepstream_worker.intake.pool import LoopPool
from keepstream_worker.store.inspection import Backlog, Overview
from keepstream_worker.telemetry import pulse
from keepstream_worker.telemetry.pulse import Pulse, PulseError
from keepstream_worker.values import is_on_host, worker_id
from tests.cluster import wait_until

IDLE = Backlog(queued=0, running=0, retrying=0, oldest_wait=None)


def stop_the_clock(monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    monkeypatch.setattr(pulse.time, "monotonic", lambda: at)  # type: ignore[attr-defined]


# -- what counts as alive --


def test_a_process_is_alive_for_a_while_after_each_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch, 1000.0)
    Pulse(str(tmp_path)).beat()
    stop_the_clock(monkeypatch, 1059.0)
    assert pulse.complaint(str(tmp_path), 60.0) is None
    stop_the_clock(monkeypatch, 1061.0)
    assert pulse.complaint(str(tmp_path), 60.0) == "worker process 1 of 1 has given no sign of life for 61 s"
    Pulse(str(tmp_path)).beat()
    assert pulse.complaint(str(tmp_path), 60.0) is None


def test_all_expected_processes_have_to_be_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch, 1000.0)
    directory = str(tmp_path / "new" / "run")
    pulse.expect(directory, 2)
    Pulse(directory, 1).beat()
    assert pulse.complaint(directory) == "worker process 2 of 2 has not started yet"
    Pulse(directory, 2).beat()
    assert pulse.complaint(directory) is None
    stop_the_clock(monkeypatch, 1100.0)
    Pulse(directory, 1).beat()
    assert pulse.complaint(directory) == "worker process 2 of 2 has given no sign of life for 100 s"
    Pulse(directory, 2).end()
    assert pulse.complaint(directory) is None, "who has ended in order is not waited for"


def test_a_new_start_expects_nothing_of_those_before_it(tmp_path: Path) -> None:
    pulse.expect(str(tmp_path), 4)
    (tmp_path / "other").touch()
    pulse.expect(str(tmp_path), 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.pulse", "other"]


def test_without_a_worker_nothing_is_alive(tmp_path: Path) -> None:
    assert "no worker runs here" in str(pulse.complaint(str(tmp_path)))
    assert "No such file" in str(pulse.complaint(str(tmp_path / "nowhere")))


def test_a_file_that_was_tidied_away_comes_back(tmp_path: Path) -> None:
    own = Pulse(str(tmp_path))
    own.beat()
    own.end()
    own.end()
    own.beat()
    assert pulse.complaint(str(tmp_path)) is None


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(PulseError, match=r"file cannot be written \("):
        pulse.expect(str(file), 1)


# -- both threads --


class IdleService:
    """A ``LoopService`` that has nothing to do."""

    async def start(self) -> None: ...

    def drain(self) -> None: ...

    def force_stop(self) -> None: ...

    async def stop(self) -> None: ...


class CountingPulse(Pulse):
    """Counts the beats, and fails when it is told to."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.beats = 0
        self.failure: OSError | None = None

    def beat(self) -> None:
        self.beats += 1
        if self.failure is not None:
            raise self.failure
        super().beat()

    def wait_for_beats(self, count: int = 3) -> None:
        """Wait for so many beats from now on."""
        before = self.beats
        wait_until(lambda: self.beats >= before + count, f"{count} beats")


class CeleryThread:
    """A thread that turns a hub as Celery's does, until it is told to stop."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.hub.timer.call_repeatedly(0.05, lambda: None)  # or it would wait for a second
        self._stopping = False
        self._thread = threading.Thread(target=self._turn)

    def start(self) -> None:
        self._thread.start()

    def _turn(self) -> None:
        while not self._stopping:
            self.hub.run_once()

    def hang(self) -> threading.Event:
        """Hold it up, and return what ends that."""
        held, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            go_on.wait()

        self.hub.call_soon(hold)
        held.wait()
        return go_on

    def stop(self) -> None:
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join()
        self.hub.close()


@pytest.fixture
def own(tmp_path: Path) -> CountingPulse:
    return CountingPulse(str(tmp_path))


@pytest.fixture
def celery() -> Iterator[CeleryThread]:
    thread = CeleryThread()
    yield thread
    thread.stop()


@pytest.fixture
def pool(own: CountingPulse, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopPool]:
    monkeypatch.setattr(pool_module, "INTERVAL", 0.02)
    monkeypatch.setattr(pool_module, "_LONGEST_TURN", 2.0)
    monkeypatch.setattr(pool_module, "_keep_pauses_short", lambda: None)
    pool = LoopPool(limit=1, app=SimpleNamespace(loop_service=IdleService(), pulse=own))
    pool.on_start()
    yield pool
    pool.on_stop()
    worker_shutting_down.disconnect(pool._on_signal)


def no_beat_from_now_on(own: CountingPulse) -> bool:
    """Whether none comes in the time of twenty."""
    before = own.beats
    time.sleep(0.4)
    return own.beats == before


def test_a_worker_whose_threads_both_run_gives_signs_of_life(
    pool: LoopPool, own: CountingPulse, celery: CeleryThread
) -> None:
    own.wait_for_beats()
    pool.register_with_event_loop(celery.hub)
    celery.start()
    own.wait_for_beats()


def test_a_loop_that_hangs_gives_none(pool: LoopPool, own: CountingPulse) -> None:
    own.wait_for_beats()
    held, go_on = threading.Event(), threading.Event()
    pool._call_on_loop(held.set)
    pool._call_on_loop(go_on.wait)
    held.wait()
    try:
        wait_until(lambda: no_beat_from_now_on(own), "the beats to stop")
    finally:
        go_on.set()
    own.wait_for_beats()


def test_a_celery_thread_that_hangs_ends_them(pool: LoopPool, own: CountingPulse, celery: CeleryThread) -> None:
    pool.register_with_event_loop(celery.hub)
    celery.start()
    go_on = celery.hang()
    try:
        wait_until(lambda: no_beat_from_now_on(own), "the beats to stop")
    finally:
        go_on.set()
    own.wait_for_beats()


def test_a_celery_thread_that_connects_anew_is_not_taken_for_hung(
    pool: LoopPool, own: CountingPulse, celery: CeleryThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take as long as the broker is away; Celery resets the hub first."""
    monkeypatch.setattr(pool_module, "_LONGEST_TURN", 0.0)  # no turn is short enough
    pool.register_with_event_loop(celery.hub)
    wait_until(lambda: no_beat_from_now_on(own), "the beats to stop")
    celery.hub.reset()
    own.wait_for_beats()


def test_a_celery_thread_that_waits_for_the_streams_to_finish_is_not_taken_for_hung(
    pool: LoopPool, own: CountingPulse, celery: CeleryThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_LONGEST_TURN", 0.0)
    pool.register_with_event_loop(celery.hub)
    wait_until(lambda: no_beat_from_now_on(own), "the beats to stop")
    worker_shutting_down.send(sender=None, sig="SIGTERM", how="Warm", exitcode=0)
    own.wait_for_beats()


def test_a_pulse_that_cannot_be_written_stops_nothing_and_is_logged_once(pool: LoopPool, own: CountingPulse) -> None:
    with structlog.testing.capture_logs() as logged:
        own.failure = OSError(28, "No space left on device")
        own.wait_for_beats(5)
        own.failure = None
        own.wait_for_beats()
    assert logged == [{"event": "pulse_not_written", "reason": "No space left on device", "log_level": "warning"}]


# -- whose worker it is --


@pytest.mark.parametrize(
    ("host", "own_host", "same"),
    [
        ("web", "web", True),
        ("web-2", "web", False),
        ("web", "web-2", False),
        ("web-2-7", "web-2", False),
        ("x" * 70, "x" * 70, True),
    ],
)
def test_a_host_is_not_taken_for_one_whose_name_begins_in_the_same_way(host: str, own_host: str, *, same: bool) -> None:
    assert is_on_host(worker_id(host, 17, "0a1b2c3d"), own_host) is same


def test_the_doctor_asks_for_this_hosts_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "web")
    others = [worker_id("web-2", 1, "0a1b2c3d"), worker_id("web2", 1, "0a1b2c3d")]
    own: list[Any] = [worker_id("web", 1, "0a1b2c3d")]
    assert (
        _own_worker(Overview(workers=others, backlog=IDLE, rejected=0, long_transactions=None)).severity
        is Severity.FAIL
    )
    assert (
        _own_worker(Overview(workers=others + own, backlog=IDLE, rejected=0, long_transactions=None)).found
        == "1 process on web alive"
    )
