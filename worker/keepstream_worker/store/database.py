"""The worker's way to the database: threads that group operations into transactions.

In: functions of the store with one argument each, from coroutines on the event loop.  Out: each argument's result, or
an error.

The event loop never blocks on the database.  Operations that arrive together share one transaction, because SQLite has
one writer at a time, and on any database a commit costs more than the statements in it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from keepstream.client.database import describe_error
from keepstream.errors import StoreUnavailableError
from keepstream_worker.store.error_answers import DatabaseOutageError, translate
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server

log = get_logger()

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Operation = Callable[[Connection, list[Argument]], list[Result]]

#: Operations of one transaction at most, so that a long backlog does not hold locks for long.
MAX_GROUP = 200
#: Bytes of one transaction, more or less: a database writes some 25 MB of prompts in a second.
MAX_GROUP_BYTES: Final = 4 * 1024 * 1024
#: Seconds without work after which connections are closed: an idle worker needs none but the heartbeat's.
_IDLE: Final = 30.0

#: Seconds without a failure after which an outage is over, though what failed was not tried again.
_SETTLED: Final = 15.0


class _Request(NamedTuple):
    operation: Operation[Any, Any]
    argument: Any
    future: "asyncio.Future[Any]"


class Health:
    """Whether the database does its work, said once for all threads of a process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outage = Outage(Server.DATABASE, "read and write")
        self._failing: set[Operation[Any, Any]] = set()  # what the database answered with an error
        self._failed_at = 0.0

    def note_outage(self, error: DatabaseOutageError, operations: Collection[Operation[Any, Any]]) -> None:
        """Note that these did not work."""
        with self._lock:
            self._outage.failed(error.reason, error.advice)
            self._failed_at = time.monotonic()
            if error.answered:
                self._failing.update(operations)

    def note_success(self, operations: Collection[Operation[Any, Any]]) -> None:
        """Note that these worked: one that needs no room on a full disk says nothing of those that do."""
        if not self._outage.lasts:
            return
        with self._lock:
            self._failing.difference_update(operations)
            if not self._failing or time.monotonic() - self._failed_at > _SETTLED:
                self._failing.clear()
                self._outage.worked()


class WorkerDatabase:
    """Runs the store's functions for the event loop, in a thread of its own; created on the loop that it serves.

    It says when the database does not do its work, and when it does again; whoever asked need not.

    Args:
        engine: Disposed of by ``close``.
        health: Shared with the others of the process.
        turn: Where the database has one writer at a time: what the threads of this process take turns by.  The
            database's own way is to look again and again, and whoever looks at the wrong moment waits for long.
        max_group: Operations of one transaction at most.
    """

    def __init__(
        self,
        engine: Engine,
        health: Health | None = None,
        turn: AbstractContextManager[Any] | None = None,
        max_group: int = MAX_GROUP,
    ) -> None:
        self.engine = engine
        self._health = health or Health()
        self._turn = turn or nullcontext()
        self._max_group = max_group
        self._loop = asyncio.get_running_loop()
        self._requests: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="database", daemon=True)
        self._thread.start()

    async def run(self, operation: Operation[Argument, Result], argument: Argument) -> Result:
        """Run ``operation`` for ``argument``, together with others that arrive at the same time.

        Raises:
            StoreUnavailableError: the database did not answer; nothing was changed, or, if the
                commit itself was cut, everything: operations must allow being repeated.
            StoreRefusedError: the database refused it.
            Exception: a defect in ``operation``.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        with self._wake:
            self._requests.append(_Request(operation, argument, future))
            self._wake.notify()
        return await future

    async def persist(self, operation: Operation[Argument, Result], argument: Argument) -> Result:
        """Like ``run``, repeated until the database answers."""
        delay = 0.1
        while True:
            try:
                return await self.run(operation, argument)
            except StoreUnavailableError:
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)

    def close(self) -> None:
        """End the thread after what was already asked for; then close the connections."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=10)
        self.engine.dispose()

    def _serve(self) -> None:
        while True:
            group = self._next_group()
            if not group:
                return
            try:
                outcomes = self._execute(group)
            except Exception as defect:  # the thread goes on, or nothing would be stored any more
                log.exception("database_defect")
                outcomes = [(request, None, defect) for request in group]
            try:
                self._loop.call_soon_threadsafe(_settle, outcomes)
            except RuntimeError:  # the loop has ended; nobody waits for the answers
                return

    def _next_group(self) -> list[_Request]:
        """Wait for what is to be done together; nothing, at the end."""
        with self._wake:
            while not self._requests and not self._closing:
                if not self._wake.wait(_IDLE) and not self._requests:
                    self.engine.dispose()
                    self._wake.wait()
            group: list[_Request] = []
            size = 0
            while self._requests and len(group) < self._max_group and size < MAX_GROUP_BYTES:
                group.append(self._requests.popleft())
                size += getattr(group[-1].argument, "size", 0)
            return group

    def _execute(self, group: list[_Request]) -> list[tuple[_Request, Any, Exception | None]]:
        try:
            return [(request, result, None) for request, result in self._transact(group)]
        except Exception as cause:  # noqa: BLE001  # whatever it is, those who wait for an answer get it
            error = translate(cause)
            if isinstance(error, DatabaseOutageError):
                self._health.note_outage(error, {request.operation for request in group})
                if not error.conflict:  # a new connection may lead elsewhere, or have other rights
                    self.engine.dispose()
            if len(group) == 1 or isinstance(error, StoreUnavailableError):
                return [(request, None, error) for request in group]
        # One member broke the transaction for all: run each on its own, so that only that one fails.
        outcomes = [outcome for request in group for outcome in self._execute([request])]
        if not any(failure for _, _, failure in outcomes):
            log.error("group_refused", size=len(group), reason=_reason(error))
        return outcomes

    def _transact(self, group: list[_Request]) -> list[tuple[_Request, Any]]:
        by_operation: dict[Operation[Any, Any], list[_Request]] = {}
        for request in group:
            by_operation.setdefault(request.operation, []).append(request)
        answered: list[tuple[_Request, Any]] = []
        with self._turn, self.engine.begin() as connection:
            for operation, requests in by_operation.items():
                results = operation(connection, [request.argument for request in requests])
                answered.extend(zip(requests, results, strict=True))
        self._health.note_success(by_operation.keys())
        return answered


def _reason(error: Exception) -> str:
    """Return what a database says of a refusal, a constraint's name for instance; not the values."""
    cause = error.__cause__
    return describe_error(cause.orig) if isinstance(cause, DBAPIError) else type(cause or error).__name__


def _settle(outcomes: list[tuple[_Request, Any, Exception | None]]) -> None:
    for request, result, error in outcomes:
        if request.future.cancelled():
            continue
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(result)
