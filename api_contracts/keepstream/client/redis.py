"""The client's connections to Redis: performs a follower's operations, leaves cancellation requests, looks at logs.

In: a follower's run, and requests to cancel or delete, from ``keepstream.client.sync`` and ``keepstream.client.aio``.
Out: the run's events; keys and messages on Redis.

Every call is bounded in time.  A lost subscription is reported to the follower: redis-py would reconnect
silently, and the events in between would be lost.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar

import redis
import redis.asyncio
from redis.exceptions import RedisError

from keepstream.client.follower import (
    LOG_PAGE,
    DisconnectedError,
    FollowerRun,
    Listen,
    LogEntry,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
)
from keepstream.client.forks import PerProcess
from keepstream.client.payloads import Payload
from keepstream.client.redis_connections import PoolOptions, make_async_pool, make_pool
from keepstream.client.redis_errors import translate
from keepstream.client.redis_url import RedisServer, parse_redis_url
from keepstream.errors import BrokerUnavailableError, KeepstreamError, UnexpectedError
from keepstream.names import JobKeys

#: Seconds; each command is small, so a longer wait means an outage.
_ANSWER_TIMEOUT: Final = 2.0
#: Connections for commands; a caller that finds all of them busy waits so long for one.
_COMMAND_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,
    "answer_timeout": _ANSWER_TIMEOUT,
    "retries": 1,  # the server may have closed a connection that has not been used for long
    "max_connections": 20,
    "wait_for_connection": 5.0,
}
#: Each follower has a connection of its own, so that a slow reader delays nobody else.
_SUBSCRIPTION_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,
    "answer_timeout": _ANSWER_TIMEOUT,
    "max_connections": 100_000,
}
_CONNECTING: Final = 16  #: Followers that connect at once; all at once would keep each other from it.

T = TypeVar("T")
E = TypeVar("E")
DatabaseRead = ReadSummary | ReadResult  #: What the database performs, through a function of the client's.
#: A call to make, and what to do with its reply, which the async form has to await first.
_Call = tuple[Callable[[], Any], Callable[[Any], Any]]


def _is_open() -> None:
    """Say that the client has not been closed."""


class RedisConnections:
    """One client's connections to Redis. Thread-safe; connects when first used, and anew after a fork.

    Args:
        url: The server.
        check_open: Raises the error that ends all followers, once the client has been closed.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """

    def __init__(self, url: str, check_open: Callable[[], None] = _is_open) -> None:
        self._links = PerProcess(partial(_make_links, parse_redis_url(url)))
        self._links.get()
        self._check_open = check_open

    def follow(self, run: FollowerRun[E], keys: JobKeys, read: Callable[[DatabaseRead], Any]) -> Generator[E]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        session = _Session(self._links.get, keys, read=read, sleep=time.sleep, close=methodcaller("close"))
        result = None
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    self._check_open()
                    calls = session.calls(step)
                    attempt = session.links.attempt() if isinstance(step, Subscribe) else nullcontext()
                    with session.links.turns if isinstance(step, Subscribe) else nullcontext(), attempt:
                        for call, read_reply in calls:
                            result = read_reply(call())
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(_explain(error, self._check_open))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
            with suppress(Exception):
                session.pubsub.close()

    def ping(self) -> None:
        """See whether Redis answers.

        Raises:
            BrokerUnavailableError: it does not.
        """
        try:
            self._commands.ping()
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(str(translate(error))) from None

    def request_cancel(self, keys: JobKeys, control_channel: str, message: str, ttl: int) -> None:
        """Leave a request to cancel for whoever claims the job, and tell the workers to look at once.

        The request stays for ``ttl`` seconds.

        Raises:
            BrokerUnavailableError: Redis did not take it.
        """
        try:
            with self._commands.pipeline(transaction=False) as pipeline:
                pipeline.set(keys.cancel, 1, ex=ttl)
                pipeline.publish(control_channel, message)
                pipeline.execute()
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(f"Redis did not take the cancellation ({type(error).__name__})") from None

    def read_newest(self, keys: JobKeys) -> LogEntry | None:
        """Return the newest entry of a job's log, or None if there is no log.

        Raises:
            BrokerUnavailableError: Redis did not answer.
            InvalidSettingError: it does not let us, or its answer is none.
        """
        try:
            return _first_entry(self._commands.xrevrange(keys.log, count=1))
        except (RedisError, OSError) as error:
            known = translate(error)
            if isinstance(known, KeepstreamError):
                raise known from None
            raise BrokerUnavailableError(f"Redis: {known}") from None

    def delete_log(self, keys: JobKeys) -> None:
        """Delete a job's log, if there is one.

        Raises:
            BrokerUnavailableError: Redis did not do it.
        """
        try:
            self._commands.delete(keys.log)
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(f"Redis did not delete the job's log ({type(error).__name__})") from None

    def close(self) -> None:
        """Close all connections."""
        links = self._links.take()
        if links is not None:
            links.commands.close()
            links.subscriptions.close()

    @property
    def _commands(self) -> redis.Redis:
        commands: redis.Redis = self._links.get().commands
        return commands


class AsyncRedisConnections:
    """The same for an async client: it has connections of their own for each event loop that uses it.

    They are closed with their loop.
    """

    def __init__(self, url: str, check_open: Callable[[], None] = _is_open) -> None:
        self._server = parse_redis_url(url)
        self._check_open = check_open
        self._loops: PerProcess[dict[asyncio.AbstractEventLoop, _AsyncLinks]] = PerProcess(dict)

    async def follow(
        self, run: FollowerRun[E], keys: JobKeys, read: Callable[[DatabaseRead], Awaitable[Any]]
    ) -> AsyncGenerator[E]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        links = await self._links()
        session = _Session(lambda: links, keys, read=read, sleep=asyncio.sleep, close=methodcaller("aclose"))
        result = None
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    self._check_open()
                    calls = session.calls(step)
                    attempt = links.attempt() if isinstance(step, Subscribe) else nullcontext()
                    async with links.turns if isinstance(step, Subscribe) else nullcontext():
                        with attempt:
                            for call, read_reply in calls:
                                result = read_reply(await _cancellable(call()))
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(_explain(error, self._check_open))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
            with suppress(Exception):
                await session.pubsub.aclose()
                await self._close_late(links)

    async def _close_late(self, links: "_AsyncLinks") -> None:
        """Close connections that were still being made while the client was closed."""
        try:
            self._check_open()
        except KeepstreamError:
            await links.subscriptions.aclose()
            await links.commands.aclose()

    async def close(self) -> None:
        """Close all connections, those of other running loops as well."""
        here = asyncio.get_running_loop()
        for loop, links in list(self._loops.get().items()):
            if loop is here:
                await links.close()
            elif loop.is_running():
                closing = links.close()
                try:
                    done = asyncio.run_coroutine_threadsafe(closing, loop)
                except RuntimeError:  # it has ended just now, and closed them itself
                    closing.close()
                else:
                    await asyncio.wait([asyncio.wrap_future(done)], timeout=_ANSWER_TIMEOUT)
        self._loops.get().clear()

    async def _links(self) -> "_AsyncLinks":
        """Return the connections of the running loop."""
        loop = asyncio.get_running_loop()
        loops = self._loops.get()
        if loop not in loops:
            for other in [other for other in list(loops) if other.is_closed()]:  # a copy: other threads add theirs
                loops.pop(other, None)  # one that was not ended as asyncio.run does; nothing on it can be closed
            loops[loop] = _make_async_links(self._server)
            await anext(loops[loop].keeper)
        return loops[loop]


@dataclass(slots=True, eq=False)
class _Links:
    """The connections of one process."""

    commands: Any
    subscriptions: Any
    turns: Any  #: A semaphore of those who subscribe; who waits for it has not begun to, so no time-out runs.
    failures: list[tuple[float, str]] = field(default_factory=list)  #: The last attempt that failed: when, and why.

    def attempt(self) -> AbstractContextManager[None]:
        """Surround an attempt to subscribe that begins now to wait for its turn.

        An outage that another attempt met meanwhile is its own as well: it will meet the same.
        """
        return self._attempt(time.monotonic())

    @contextmanager
    def _attempt(self, waiting_since: float) -> Iterator[None]:
        if self.failures and self.failures[0][0] > waiting_since:
            raise DisconnectedError(self.failures[0][1])
        try:
            yield
        except Exception as error:
            outage = translate(error)
            if isinstance(outage, DisconnectedError):
                self.failures[:] = [(time.monotonic(), str(outage))]
            raise


@dataclass(slots=True, eq=False)
class _AsyncLinks(_Links):
    """The connections of one event loop."""

    #: A loop that ends closes its unfinished async generators, and so the connections.
    keeper: AsyncGenerator[None] = field(kw_only=True)

    async def close(self) -> None:
        """Close them, once."""
        with suppress(RuntimeError):  # somebody else does it at this moment
            await self.keeper.aclose()


def _make_links(server: RedisServer) -> _Links:
    return _Links(
        redis.Redis.from_pool(make_pool(server, **_COMMAND_POOL)),
        redis.Redis.from_pool(make_pool(server, **_SUBSCRIPTION_POOL)),
        threading.BoundedSemaphore(_CONNECTING),
    )


def _make_async_links(server: RedisServer) -> _AsyncLinks:
    commands = redis.asyncio.Redis.from_pool(make_async_pool(server, **_COMMAND_POOL))
    subscriptions = redis.asyncio.Redis.from_pool(make_async_pool(server, **_SUBSCRIPTION_POOL))

    async def keep() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            for client in (commands, subscriptions):
                with suppress(RedisError, OSError):
                    await client.aclose()

    return _AsyncLinks(commands, subscriptions, asyncio.Semaphore(_CONNECTING), keeper=keep())


class _Session:
    """Turns one follower's operations into calls of redis-py, for the sync and the async form alike.

    Both forms of redis-py have the same methods, but those of the async one return awaitables.  So a session
    makes no call itself: it returns them to the ``follow`` of either form, which does.
    """

    def __init__(
        self,
        links: Callable[[], _Links],
        keys: JobKeys,
        *,
        read: Callable[[DatabaseRead], Any],
        sleep: Callable[[float], Any],
        close: Callable[[Any], Any],
    ) -> None:
        self.links = links()
        self.pubsub = self.links.subscriptions.pubsub()  #: The present subscription; ``follow`` closes it at the end.
        self._links_now = links
        self._keys = keys
        self._read = read
        self._sleep = sleep
        self._close = close

    def calls(self, operation: Operation) -> tuple[_Call, ...]:
        """Return the calls that perform ``operation``; the last one gives its result.

        Raises:
            DisconnectedError: the subscription is the parent's, and this is a child that goes on with an iteration.
        """
        links = self._links_now()
        if self.links is not links:
            self.links = links
            self._renew(None)
            raise DisconnectedError
        match operation:
            case Listen(seconds):
                return ((partial(self.pubsub.get_message, timeout=seconds), _payload),)
            case Subscribe():
                return (
                    (partial(self._close, self.pubsub), self._renew),
                    (lambda: self.pubsub.subscribe(self._keys.channel), _ignore),
                    (lambda: self.pubsub.get_message(timeout=_ANSWER_TIMEOUT), _check_confirmed),
                )
            case ReadLog(after):
                start = "-" if after is None else f"({after}"
                return ((partial(self.links.commands.xrange, self._keys.log, start, count=LOG_PAGE), _entries),)
            case ReadNewest():
                return ((partial(self.links.commands.xrevrange, self._keys.log, count=1), _first_entry),)
            case Sleep(seconds):
                return ((partial(self._sleep, seconds), _ignore),)
            case ReadSummary() | ReadResult():
                return ((partial(self._read, operation), _unchanged),)
        raise TypeError(f"no such operation: {type(operation).__name__}")

    def _renew(self, _closed: Any) -> None:
        # Only once the previous one is closed: if that was interrupted, ``follow`` closes it at the end.
        self.pubsub = self.links.subscriptions.pubsub()


def _explain(error: Exception, check_open: Callable[[], None]) -> Exception:
    """Return what the follower is thrown for the error of a call."""
    try:
        check_open()  # the error may be a result of that
    except KeepstreamError as closed:
        return closed
    known = translate(error)
    if isinstance(known, KeepstreamError | DisconnectedError):
        return known
    unexpected = UnexpectedError(f"the job cannot be followed ({type(error).__name__})")
    unexpected.__cause__ = error
    return unexpected


async def _cancellable(work: Awaitable[T]) -> T:
    """Await ``work``, and raise ``CancelledError`` if a cancellation was swallowed in it.

    redis-py uses ``asyncio.wait_for``, which before Python 3.12 swallows a cancellation that comes at the
    very moment at which its own wait ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await work
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def _ignore(_reply: Any) -> None:
    return None


def _unchanged(reply: Any) -> Any:
    return reply


def _check_confirmed(message: dict[str, Any] | None) -> None:
    if message is None or message["type"] != "subscribe":
        raise DisconnectedError("it did not confirm the subscription")


def _payload(message: dict[str, Any] | None) -> Payload | None:
    if message is None:
        return None
    if message["type"] != "message":  # a second confirmation: redis-py has made a new connection
        raise DisconnectedError("it has closed the connection")
    return Payload(message["data"])


def _entries(reply: Any) -> list[LogEntry]:
    return [LogEntry(entry_id.decode(), Payload(fields.get(b"event", b""))) for entry_id, fields in reply]


def _first_entry(reply: Any) -> LogEntry | None:
    return next(iter(_entries(reply)), None)
