"""The worker's way to the database: threads that group operations into transactions.

In: functions of the store with one argument each, from coroutines on the event loop.  Out: each argument's result, or
an error.

The event loop never blocks on the database.  Operations that arrive together share one transaction, because SQLite has
one writer at a time, and on any database a commit costs more than the statements in it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from keepstream.client.database import describe_error
from keepstream.errors import KeepstreamError, StoreUnavailableError
from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Operation = Callable[[Connection, list[Argument]], list[Result]]

#: Rows of one transaction at most, so that a long backlog does not hold locks for long.
MAX_GROUP = 200


#: SQLSTATE classes of what passes, by itself or when an operator acts: connections, conflicts between
#: transactions, resources such as the disk, shutdowns, input and output.
_PASSING_CLASSES: Final = frozenset({"08", "40", "53", "57", "58"})
#: Likewise: a server that is read-only (during a fail-over), an idle transaction cut off, a lock not granted.
_PASSING_STATES: Final = frozenset({"25006", "25P03", "55P03"})


class StoreRefusedError(KeepstreamError):
    """The database answers and refuses a statement or a value; repeating it would change nothing."""


class _Request(NamedTuple):
    operation: Operation[Any, Any]
    argument: Any
    future: "asyncio.Future[Any]"


class WorkerDatabase:
    """Runs the store's functions for the event loop; created on the loop that it serves."""

    def __init__(self, engine: Engine, threads: int = 1) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._requests: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"database-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, operation: Operation[Argument, Result], argument: Argument) -> Result:
        """Run ``operation`` for ``argument``, together with others that arrive at the same time.

        Raises:
            StoreUnavailableError: the database did not answer; nothing was changed, or, if the
                commit itself was cut, everything: operations must allow being repeated.
            StoreRefusedError: the database refused it.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        with self._wake:
            self._requests.append(_Request(operation, argument, future))
            self._wake.notify()
        return await future

    async def persist(self, operation: Operation[Argument, Result], argument: Argument, what: str) -> Result:
        """Like ``run``, repeated until the database answers; ``what`` names the write in the log."""
        delay = 0.1
        while True:
            try:
                return await self.run(operation, argument)
            except StoreUnavailableError as error:
                log.warning("database_unavailable", waiting_to=what, retry_in=delay, reason=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)

    def close(self) -> None:
        """End the threads after what was already asked for; then close the connections."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)
        self.engine.dispose()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._requests and not self._closing:
                    self._wake.wait()
                if not self._requests:
                    return
                group = [self._requests.popleft() for _ in range(min(len(self._requests), MAX_GROUP))]
            outcomes = self._execute(group)
            try:
                self._loop.call_soon_threadsafe(_settle, outcomes)
            except RuntimeError:  # the loop has ended; nobody waits for the answers
                return

    def _execute(self, group: list[_Request]) -> list[tuple[_Request, Any, Exception | None]]:
        try:
            return [(request, result, None) for request, result in self._transact(group)]
        except Exception as cause:  # noqa: BLE001  # whatever it is, those who wait for an answer get it
            error = _translate(cause)
            if len(group) == 1 or isinstance(error, StoreUnavailableError):
                return [(request, None, error) for request in group]
        # One member broke the transaction for all: run each on its own, so that only that one fails.
        outcomes = [outcome for request in group for outcome in self._execute([request])]
        if not any(failure for _, _, failure in outcomes):
            log.error("group_refused", size=len(group), reason=type(error.__cause__ or error).__name__)
        return outcomes

    def _transact(self, group: list[_Request]) -> list[tuple[_Request, Any]]:
        by_operation: dict[Operation[Any, Any], list[_Request]] = {}
        for request in group:
            by_operation.setdefault(request.operation, []).append(request)
        answered: list[tuple[_Request, Any]] = []
        with self.engine.begin() as connection:
            for operation, requests in by_operation.items():
                results = operation(connection, [request.argument for request in requests])
                answered.extend(zip(requests, results, strict=True))
        return answered


def _settle(outcomes: list[tuple[_Request, Any, Exception | None]]) -> None:
    for request, result, error in outcomes:
        if request.future.cancelled():
            continue
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(result)


def _translate(error: Exception) -> Exception:
    """Tell an outage from a defect; the text of an outage holds no statement and no values."""
    if isinstance(error, DBAPIError) and (error.connection_invalidated or _is_outage(error.orig)):
        return StoreUnavailableError(f"the database is not available ({describe_error(error.orig)})")
    if isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError) and "QueuePool" in str(error):
        return StoreUnavailableError("no database connection was free in time")
    if isinstance(error, SQLAlchemyError):
        refusal = StoreRefusedError(f"the database refused it ({type(getattr(error, 'orig', error)).__name__})")
        refusal.__cause__ = error
        return refusal
    return error


def _is_outage(error: BaseException | None) -> bool:
    state = getattr(error, "sqlstate", None)
    if state is not None:  # PostgreSQL has answered
        return state[:2] in _PASSING_CLASSES or state in _PASSING_STATES
    # No connection, none in time, or SQLite: locks, full disks and input/output errors.  A missing table is
    # an OperationalError too on SQLite, but there the schema is checked at the start.
    return any(base.__name__ in {"OperationalError", "InterfaceError"} for base in type(error).__mro__)
