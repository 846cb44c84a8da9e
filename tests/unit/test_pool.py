"""The pool ends in order, whenever Celery and the signals call it."""

import gc
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.signals import worker_shutting_down

from keepstream_worker.intake.pool import Delivery, LoopPool

PATIENCE = 30.0


class RecordingService:
    """A ``LoopService`` that runs nothing and notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.called = threading.Condition()

    async def start(self) -> None:
        self._note("start")

    async def deliver(self, delivery: Delivery) -> None:
        delivery.acknowledge()
        self._note(f"deliver {delivery.task_id}")

    def drain(self) -> None:
        self._note("drain")

    def force_stop(self) -> None:
        self._note("force_stop")

    async def stop(self) -> None:
        self._note("stop")

    def wait_for(self, call: str) -> None:
        """Wait until ``call`` was made."""
        with self.called:
            assert self.called.wait_for(lambda: call in self.calls, PATIENCE)

    def _note(self, call: str) -> None:
        with self.called:
            self.calls.append(call)
            self.called.notify_all()


@pytest.fixture
def service() -> RecordingService:
    return RecordingService()


@pytest.fixture
def pool(service: RecordingService) -> Iterator[LoopPool]:
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    pool = LoopPool(limit=1, app=SimpleNamespace(loop_service=service))
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


def apply(pool: LoopPool, task_id: str) -> None:
    """Hand over a message as Celery does."""
    pool.on_apply(None, ("task", task_id, {"args": [{}]}), {}, callback=lambda *_: None, accept_callback=None)


def test_first_signal_drains_and_each_further_one_forces_the_stop(pool: LoopPool, service: RecordingService) -> None:
    assert shutdown_signal() == []
    service.wait_for("drain")
    assert shutdown_signal() == []
    service.wait_for("force_stop")
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
