"""The client's connections to Redis: performs a follower's operations and leaves cancellation requests.

In: a follower's run, and requests to cancel, from ``keepstream.client.sync`` and ``keepstream.client.aio``.
Out: the run's events; keys and messages on Redis.

Every call is bounded in time.  A lost subscription is reported to the follower: redis-py would reconnect
silently, and the events in between would be lost.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

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
from keepstream.client.redis_errors import translate
from keepstream.errors import BrokerUnavailableError, InvalidSettingError
from keepstream.events import Event
from keepstream.names import JobKeys

#: Seconds; each command is small, so a longer wait means an outage.
_ANSWER_TIMEOUT: Final = 2.0
_TIMEOUTS: Final[dict[str, Any]] = {"socket_connect_timeout": 1.0, "socket_timeout": _ANSWER_TIMEOUT}
#: Connections for commands; a caller that finds all of them busy waits at most ``timeout`` seconds for one.
_COMMAND_POOL: Final[dict[str, Any]] = {**_TIMEOUTS, "max_connections": 20, "timeout": 5.0}
#: Each follower has a connection of its own, so that a slow reader delays nobody else.
_SUBSCRIPTION_POOL: Final[dict[str, Any]] = {**_TIMEOUTS, "max_connections": 100_000}
_BAD_URL: Final = "the Redis URL cannot be used; it looks like redis://host:6379/0"

T = TypeVar("T")
DatabaseRead = ReadSummary | ReadResult  #: What the database performs, through a function of the client's.
#: A call to make, and what to do with its reply, which the async form has to await first.
_Call = tuple[Callable[[], Any], Callable[[Any], Any]]


class RedisConnections:
    """One client's connections to Redis. Thread-safe; connects when first used.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            self._commands = redis.Redis.from_pool(
                redis.BlockingConnectionPool.from_url(url, retry=Retry(NoBackoff(), 1), **_COMMAND_POOL)
            )
            self._subscriptions = redis.Redis.from_pool(
                redis.ConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), **_SUBSCRIPTION_POOL)
            )
        except ValueError:
            raise InvalidSettingError(_BAD_URL) from None

    def follow(self, run: FollowerRun, keys: JobKeys, read: Callable[[DatabaseRead], Any]) -> Generator[Event]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        session = _Session(
            self._commands, self._subscriptions, keys, read=read, sleep=time.sleep, close=methodcaller("close")
        )
        result = None
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    for call, read_reply in session.calls(step):
                        result = read_reply(call())
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(translate(error))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
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

    def close(self) -> None:
        """Close all connections."""
        self._commands.close()
        self._subscriptions.close()


class AsyncRedisConnections:
    """The same for an async client, on its event loop.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            self._commands = redis.asyncio.Redis.from_pool(
                redis.asyncio.BlockingConnectionPool.from_url(url, retry=AsyncRetry(NoBackoff(), 1), **_COMMAND_POOL)
            )
            self._subscriptions = redis.asyncio.Redis.from_pool(
                redis.asyncio.ConnectionPool.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **_SUBSCRIPTION_POOL)
            )
        except ValueError:
            raise InvalidSettingError(_BAD_URL) from None

    async def follow(
        self, run: FollowerRun, keys: JobKeys, read: Callable[[DatabaseRead], Awaitable[Any]]
    ) -> AsyncGenerator[Event]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        session = _Session(
            self._commands,
            self._subscriptions,
            keys,
            read=read,
            sleep=asyncio.sleep,
            close=methodcaller("aclose"),
        )
        result = None
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    for call, read_reply in session.calls(step):
                        result = read_reply(await _cancellable(call()))
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(translate(error))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
            await session.pubsub.aclose()

    async def close(self) -> None:
        """Close all connections."""
        await self._commands.aclose()
        await self._subscriptions.aclose()


class _Session:
    """Turns one follower's operations into calls of redis-py, for the sync and the async form alike.

    Both forms of redis-py have the same methods, but those of the async one return awaitables.  So a session
    makes no call itself: it returns them to the ``follow`` of either form, which does.
    """

    def __init__(
        self,
        commands: Any,
        subscriptions: Any,
        keys: JobKeys,
        *,
        read: Callable[[DatabaseRead], Any],
        sleep: Callable[[float], Any],
        close: Callable[[Any], Any],
    ) -> None:
        self.pubsub = subscriptions.pubsub()  #: The present subscription; ``follow`` closes it at the end.
        self._commands = commands
        self._subscriptions = subscriptions
        self._keys = keys
        self._read = read
        self._sleep = sleep
        self._close = close

    def calls(self, operation: Operation) -> tuple[_Call, ...]:
        """Return the calls that perform ``operation``; the last one gives its result."""
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
                return ((partial(self._commands.xrange, self._keys.log, start, count=LOG_PAGE), _entries),)
            case ReadNewest():
                return ((partial(self._commands.xrevrange, self._keys.log, count=1), _first_entry),)
            case Sleep(seconds):
                return ((partial(self._sleep, seconds), _ignore),)
            case ReadSummary() | ReadResult():
                return ((partial(self._read, operation), _unchanged),)
        raise TypeError(f"no such operation: {type(operation).__name__}")

    def _renew(self, _closed: Any) -> None:
        # Only once the previous one is closed: if that was interrupted, ``follow`` closes it at the end.
        self.pubsub = self._subscriptions.pubsub()


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


def _payload(message: dict[str, Any] | None) -> bytes | None:
    if message is None:
        return None
    if message["type"] != "message":  # a second confirmation: redis-py has made a new connection
        raise DisconnectedError("it has closed the connection")
    return bytes(message["data"])


def _entries(reply: Any) -> list[LogEntry]:
    return [LogEntry(entry_id.decode(), fields.get(b"event", b"")) for entry_id, fields in reply]


def _first_entry(reply: Any) -> LogEntry | None:
    return next(iter(_entries(reply)), None)
