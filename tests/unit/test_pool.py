"""The pool ends in order, whenever Celery and the signals call it."""

import asyncio
import gc
import queue
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from celery.signals import worker_shutting_down
from kombu.asynchronous.hub import Hub

from keepstream_worker.intake.pool import Delivery, LoopPool
from tests.late_signal import late_signal

PATIENCE = 60.0


class RecordingService:
    """A ``LoopService`` that runs nothing and notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.called = threading.Condition()
        self.stops_when: asyncio.Event | None = None  #: None: at once.

    async def start(self) -> None:
        self._note("start")

    async def deliver(self, delivery: Delivery) -> None:
        delivery.acknowledge()
        delivery.acknowledge()
        self._note(f"deliver {delivery.task_id}")
        if delivery.task_id == "defect":
            raise ZeroDivisionError

    def drain(self) -> None:
        self._note("drain")

    def force_stop(self) -> None:
        self._note("force_stop")
        if self.stops_when is not None:
            self.stops_when.set()

    async def stop(self) -> None:
        if self.stops_when is not None:
            async with asyncio.timeout(PATIENCE):
                await self.stops_when.wait()
        self._note("stop")

    def wait_for(self, call: str) -> None:
        """Wait until ``call`` was made."""
        with self.called:
            assert self.called.wait_for(lambda: call in self.calls, PATIENCE)

    def _note(self, call: str) -> None:
        with self.called:
            self.calls.append(call)
            self.called.notify_all()


class RecordingHub:
    """Celery's hub, as far as the pool uses it; notes which functions it is to call under guard."""

    def __init__(self) -> None:
        self.called: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call_soon(self, _guard: Any, function: Any, *_args: Any) -> None:
        self.called.put(function)


@pytest.fixture
def service() -> RecordingService:
    return RecordingService()


@pytest.fixture
def pool(service: RecordingService) -> Iterator[LoopPool]:
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    pool = LoopPool(limit=1, app=SimpleNamespace(loop_service=service, pulse=None))
    pool.on_start()
    yield pool
    pool.on_stop()
    worker_shutting_down.disconnect(pool._on_signal)
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)


def shutdown_signal() -> list[Any]:
    """Do what Celery does on SIGTERM; return what its receivers raised."""
    answers: Any = worker_shutting_down.send(sender=None, sig="SIGTERM", how="Warm", exitcode=0)
    return [answer for _receiver, answer in answers if isinstance(answer, BaseException)]


def apply(pool: LoopPool, task_id: str, accepted: Any = None, finished: Any = lambda *_: None) -> None:
    """Hand over a message as Celery does."""
    pool.on_apply(None, ("task", task_id, {"args": [{}]}), {}, callback=finished, accept_callback=accepted)


def test_first_signal_drains_and_each_further_one_forces_the_stop(pool: LoopPool, service: RecordingService) -> None:
    assert shutdown_signal() == []
    service.wait_for("drain")
    assert shutdown_signal() == []
    service.wait_for("force_stop")
    pool.on_stop()
    assert service.calls == ["start", "drain", "force_stop", "stop"]


def test_signal_that_meets_the_hub_with_its_lock_held_is_handled(pool: LoopPool, service: RecordingService) -> None:
    hub = Hub()
    pool.register_with_event_loop(hub)

    def receive_signal() -> None:  # as the system does, between two steps of what this thread is doing
        with hub._ready_lock:
            shutdown_signal()

    celery = threading.Thread(target=receive_signal, daemon=True)
    celery.start()
    celery.join(PATIENCE)
    assert not celery.is_alive()
    service.wait_for("drain")


def test_signal_that_does_not_wake_the_thread_that_waits_for_the_end_is_heeded(
    pool: LoopPool, service: RecordingService
) -> None:
    service.stops_when = asyncio.Event()
    shutdown_signal()
    with late_signal(shutdown_signal):
        pool.on_stop()
    assert service.calls == ["start", "drain", "force_stop", "stop"]


def test_signals_after_the_loop_has_closed_are_harmless(pool: LoopPool, service: RecordingService) -> None:
    assert shutdown_signal() == []
    pool.on_stop()
    assert pool._loop.is_closed()
    assert shutdown_signal() == []
    assert shutdown_signal() == []
    assert service.calls == ["start", "drain", "stop"]


def test_cold_shutdown_after_the_loop_has_closed_is_harmless(pool: LoopPool, service: RecordingService) -> None:
    pool.on_stop()
    pool.on_terminate()
    assert service.calls == ["start", "stop"]


def test_message_after_the_loop_has_closed_is_left_unacknowledged(pool: LoopPool, service: RecordingService) -> None:
    apply(pool, "in time")
    service.wait_for("deliver in time")
    pool.on_stop()
    apply(pool, "too late")
    assert service.calls == ["start", "deliver in time", "stop"]


def test_cold_shutdown_interrupts_what_runs(pool: LoopPool, service: RecordingService) -> None:
    pool.on_terminate()
    assert service.calls == ["start", "force_stop", "stop"]


def test_message_is_acknowledged_once_however_often_the_service_does(pool: LoopPool) -> None:
    hub = RecordingHub()
    pool.register_with_event_loop(hub)
    apply(pool, "job", "accepted", "finished")
    assert [hub.called.get(timeout=PATIENCE) for _ in range(2)] == ["accepted", "finished"]
    assert hub.called.empty()


def test_defect_of_a_delivery_is_logged_and_gives_its_place_back(pool: LoopPool) -> None:
    hub = RecordingHub()
    pool.register_with_event_loop(hub)
    with structlog.testing.capture_logs() as logged:
        apply(pool, "defect", "accepted", "finished")
        assert [hub.called.get(timeout=PATIENCE) for _ in range(2)] == ["accepted", "finished"]
    assert logged == [{"event": "delivery_failed", "task_id": "defect", "exc_info": True, "log_level": "error"}]
