"""The pool: runs each Celery task as a coroutine on one uvloop event loop.

In: messages and signals from Celery, on Celery's thread; the service to run, from ``app.loop_service``.
Out: one ``deliver`` call per message, on the loop's thread; acknowledgements, back on Celery's thread.
Streams wait and hardly compute, so one loop holds thousands of them where processes or threads would not.

Celery loads it by its extension point for pools (``CELERY_CUSTOM_WORKER_POOL``, ``--pool custom``).
"""

import asyncio
import gc
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Final, Protocol

import uvloop
from celery.concurrency.base import BasePool
from celery.signals import worker_shutting_down

from keepstream.errors import KeepstreamError
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.pulse import INTERVAL, Pulse

log = get_logger()

#: Seconds that one turn of Celery's thread may take. More than redis-py's time-outs and repetitions add up to while
#: Redis does not answer.
_LONGEST_TURN: Final = 120.0
#: Seconds.
_LOOK_UP: Final = 0.2


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message, handed to the service."""

    task_id: str
    arguments: list[Any]
    acknowledge: Callable[[], None]  #: To be called as soon as the job is safe; repeating it does nothing.


class LoopService(Protocol):
    """What the pool runs. All calls come on the event loop's thread."""

    async def start(self) -> None:
        """Open connections.

        Raises:
            KeepstreamError: the worker cannot start; the message becomes one line in the log.
        """

    async def deliver(self, delivery: Delivery) -> None:
        """Work on one message; ends when the job needs no more of this process."""

    def drain(self) -> None:
        """Prepare to stop: begin no new job."""

    def force_stop(self) -> None:
        """Stop what is running now instead of at the end of the grace period."""

    async def stop(self) -> None:
        """Finish or interrupt what runs, and close connections; bounded in time."""


class _Handle:
    """What Celery holds of a running task."""

    def terminate(self, signal: int) -> None:
        """Cancelling goes through the database (``client.cancel``), never through Celery's revoke."""


def _keep_pauses_short() -> None:
    """Keep the other threads and the garbage collector from holding up the loop for long."""
    # Everything imported so far stays: examining it again takes a quarter of a second each time.
    gc.collect()
    gc.freeze()
    # Streams make many objects that live for a moment; looking for cycles after every 700 finds nothing.
    gc.set_threshold(10_000, 20, 20)
    # When the loop wants the interpreter, Celery's thread and the database's give it back after this time.
    sys.setswitchinterval(0.001)


def _guarded(function: Callable[..., Any], *args: Any) -> None:
    """Call ``function``; on Celery's thread, an exception would end the worker."""
    try:
        function(*args)
    except Exception:
        log.exception("pool_defect")


def _wait_for(future: Future[None]) -> None:
    """Wait without end, but look up: Python heeds a signal that comes just before a thread waits only afterwards."""
    while not future.done():
        wait((future,), timeout=_LOOK_UP)
    future.result()


def _log_defect(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Called by the event loop with what a callback or a forgotten task raised; asyncio's own way shows values."""
    log.error("loop_defect", what=str(context.get("message", "")), exc_info=context.get("exception"))


class LoopPool(BasePool):
    """Celery's pool on one event loop in a thread of its own."""

    signal_safe = False
    task_join_will_block = False
    body_can_be_buffer = True

    def on_start(self) -> None:
        """Start the loop and the service on it; called on Celery's thread."""
        self._service: LoopService = self.app.loop_service
        self._pulse: Pulse | None = self.app.pulse
        self._pulse_fails = False
        self._hub: Any = None
        #: When the hub's present turn began; None: it makes none, because Celery connects, or the pool stops.
        self._turned_at: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived: deque[tuple[Delivery, Callable[[], None]]] = deque()
        self._woken = False
        self._signalled = False
        self._stopped = False
        self._loop = uvloop.new_event_loop()
        self._loop.set_exception_handler(_log_defect)
        self._thread = threading.Thread(target=self._run_loop, name="streams", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._service.start(), self._loop).result()
        except KeepstreamError as error:
            log.critical("worker_not_started", reason=str(error))  # one line, where Celery would print a traceback
            raise SystemExit(1) from None
        worker_shutting_down.connect(self._on_signal)
        _keep_pauses_short()
        if self._pulse is not None:
            self._loop.call_soon_threadsafe(self._beat, self._pulse)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def register_with_event_loop(self, hub: Any) -> None:
        """Called by Celery, each time it has connected, with the hub whose thread owns the broker connection."""
        self._hub = hub
        if self._pulse is not None:
            self._note_turn()
            hub.on_tick.add(self._note_turn)
            hub.on_close.add(self._note_pause)

    def _note_turn(self) -> None:
        """Called on Celery's thread at each turn of its hub, at least every ten seconds."""
        self._turned_at = time.monotonic()

    def _note_pause(self, _hub: Any) -> None:
        """Called when the hub stops turning: Celery connects anew, and waits as long as the broker is away."""
        self._turned_at = None

    def _beat(self, pulse: Pulse) -> None:
        """Give a sign of life for both threads: here, and unless the other one hangs."""
        self._loop.call_later(INTERVAL, self._beat, pulse)  # first, so that whatever comes up below, the next is given
        turned_at = self._turned_at
        if self._signalled or turned_at is None or time.monotonic() - turned_at < _LONGEST_TURN:
            try:
                pulse.beat()
                self._pulse_fails = False
            except OSError as error:
                if not self._pulse_fails:
                    log.warning("pulse_not_written", reason=error.strerror)
                self._pulse_fails = True

    def on_apply(
        self,
        _target: Any,
        args: Any = None,
        _kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_options: Any,
    ) -> _Handle:
        """Called by Celery for each message."""
        _name, task_id, request, *_rest = args
        acknowledged = False

        def acknowledge() -> None:
            nonlocal acknowledged
            if not acknowledged:
                acknowledged = True
                self._call_on_hub(accept_callback, threading.get_ident(), time.monotonic())

        def finished() -> None:
            # Also wakes the hub, which otherwise refills a free place only at its next tick.
            self._call_on_hub(callback, (0, None, 0.0))

        self._arrived.append((Delivery(task_id, request["args"], acknowledge), finished))
        if not self._woken:  # one wake-up is enough for all that arrive until the loop looks
            self._woken = True
            self._call_on_loop(self._spawn_arrived)
        return _Handle()

    def _call_on_loop(self, function: Callable[[], object]) -> None:
        """Call ``function`` on the loop's thread; once the loop is closed there is nothing left to call."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _call_on_hub(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` on Celery's thread."""
        if self._hub is not None:
            self._hub.call_soon(_guarded, function, *args)

    def _spawn_arrived(self) -> None:
        self._woken = False  # before looking, so that what arrives from here on wakes us again
        while self._arrived:
            task = self._loop.create_task(self._deliver(*self._arrived.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, delivery: Delivery, finished: Callable[[], None]) -> None:
        try:
            await self._service.deliver(delivery)
        except Exception:
            log.exception("delivery_failed", task_id=delivery.task_id)
        finally:
            finished()

    def _on_signal(self, **_: Any) -> None:
        """Called in Celery's signal handler: the first signal drains, each further one forces the stop."""
        action = self._service.force_stop if self._signalled else self._service.drain
        self._signalled = True
        self._call_on_loop(action)
        # Wakes the hub, by way of the loop: the hub's lock may be held by the very code that the signal interrupted.
        self._call_on_loop(lambda: self._call_on_hub(lambda: None))

    def on_stop(self) -> None:
        """Called by Celery when it has stopped consuming; waits for the service."""
        if self._stopped:
            return
        self._stopped = True
        self._turned_at = None  # until the service has stopped, Celery's thread waits here
        _guarded(_wait_for, asyncio.run_coroutine_threadsafe(self._service.stop(), self._loop))
        self._call_on_loop(self._loop.stop)
        self._thread.join(timeout=5)

    def on_terminate(self) -> None:
        """Called by Celery for a cold shutdown: running jobs are interrupted at once, and go on elsewhere."""
        self._call_on_loop(self._service.force_stop)
        self.on_stop()

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Nothing to kill: jobs are coroutines; see ``_Handle``."""
