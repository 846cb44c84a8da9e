"""The async client's connections to Redis: performs the operations of all followers of an event loop.

In: followers' runs, from ``keepstream.client.aio``.  Out: the runs' events.

Each event loop has one connection for all subscriptions, and a few for reading logs.  They are closed with their loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.client.follower import (
    FollowerRun,
    Interruption,
    Listen,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
)
from keepstream.client.forks import PerProcess
from keepstream.client.log_reader import CONNECTIONS, LogReader
from keepstream.client.redis_connections import PoolOptions, make_async_pool
from keepstream.client.redis_errors import explain
from keepstream.client.redis_url import RedisServer, parse_redis_url
from keepstream.client.subscriptions import Subscription, Subscriptions
from keepstream.names import JobKeys

_ANSWER_TIMEOUT: Final = 2.0  #: Seconds; each command is small, so a longer wait means an outage.
_LOG_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,
    "answer_timeout": _ANSWER_TIMEOUT,
    "retries": 1,  # the server may have closed a connection that has not been used for long
    "max_connections": CONNECTIONS,
    "wait_for_connection": 5.0,
}
#: Version 2 of the protocol, because redis-py makes a text of each message that version 3 pushes.
_SUBSCRIPTION_POOL: Final[PoolOptions] = {"connect_timeout": 1.0, "answer_timeout": _ANSWER_TIMEOUT, "protocol": 2}

E = TypeVar("E")
#: Performs what the database does.
AsyncDatabase = Callable[[ReadSummary | ReadResult], Awaitable[Any]]


class AsyncRedisConnections:
    """One client's connections to Redis, of their own for each event loop that uses it, and for each process.

    Args:
        url: The server.
        check_open: Raises the error that ends all followers, once the client has been closed.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """

    def __init__(self, url: str, check_open: Callable[[], None] = lambda: None) -> None:
        self._server = parse_redis_url(url)
        self._check_open = check_open
        self._loops: PerProcess[dict[asyncio.AbstractEventLoop, _Links]] = PerProcess(dict)

    async def follow(self, run: FollowerRun[E], keys: JobKeys, read: AsyncDatabase) -> AsyncGenerator[E]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        session = _Session(await self._links(), keys, read)
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    self._check_open()
                    result = await session.perform(step)
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(explain(error, self._check_open))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
            session.leave()

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

    async def _links(self) -> "_Links":
        """Return the connections of the running loop."""
        self._check_open()
        loop = asyncio.get_running_loop()
        loops = self._loops.get()
        if loop not in loops:
            for other in [other for other in list(loops) if other.is_closed()]:  # a copy: other threads add theirs
                loops.pop(other, None)  # one that was not ended as asyncio.run does; nothing on it can be closed
            loops[loop] = _make_links(self._server)
            await anext(loops[loop].keeper)
        return loops[loop]


@dataclass(slots=True, eq=False)
class _Links:
    """The connections of one event loop."""

    subscriptions: Subscriptions
    logs: LogReader
    #: A loop that ends closes its unfinished async generators, and so the connections.
    keeper: AsyncGenerator[None]

    async def close(self) -> None:
        """Close them, once."""
        with suppress(RuntimeError):  # somebody else does it at this moment
            await self.keeper.aclose()


def _make_links(server: RedisServer) -> _Links:
    commands = redis.asyncio.Redis.from_pool(make_async_pool(server, **_LOG_POOL))
    pool = make_async_pool(server, **_SUBSCRIPTION_POOL)
    subscriptions, logs = Subscriptions(pool), LogReader(commands)

    async def keep() -> AsyncGenerator[None]:
        with suppress(RedisError, OSError):
            async with AsyncExitStack() as parts:  # the others are closed even if the loop ends in the midst of it
                for close in (commands.aclose, pool.aclose, logs.close, subscriptions.close):
                    parts.push_async_callback(close)
                yield

    return _Links(subscriptions, logs, keep())


class _Session:
    """Performs one follower's operations."""

    def __init__(self, links: _Links, keys: JobKeys, read: AsyncDatabase) -> None:
        self._links = links
        self._keys = keys
        self._read = read
        self._subscription: Subscription | None = None

    async def perform(self, operation: Operation) -> Any:
        """Perform an operation and return its result."""
        match operation:
            case Listen(seconds, pass_on):
                assert self._subscription is not None  # the follower subscribes first
                return await self._subscription.take(seconds, pass_on)
            case Subscribe(seems_deaf):
                return await self._subscribe(seems_deaf=seems_deaf)
            case ReadLog(after):
                return await self._links.logs.read(self._keys.log, after)
            case ReadNewest():
                return await self._links.logs.read_newest(self._keys.log)
            case ReadSummary(unless_message=True):
                return await self._read_unless_message(operation)
            case ReadSummary() | ReadResult():
                return await self._read(operation)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
        raise TypeError(f"no such operation: {type(operation).__name__}")

    def leave(self) -> None:
        """End the subscription, if there is one."""
        if self._subscription is not None:
            self._subscription.leave()
            self._subscription = None

    async def _subscribe(self, *, seems_deaf: bool) -> None:
        if self._subscription is not None and not self._subscription.is_lost:
            # If not, reading the log has failed, by another connection.
            if not seems_deaf or await self._subscription.is_late():
                return
            self._subscription.retire()
        self.leave()
        self._subscription = await self._links.subscriptions.subscribe(self._keys.channel)

    async def _read_unless_message(self, question: ReadSummary) -> Any:
        """Ask the database, but deliver a message that comes before it has answered."""
        assert self._subscription is not None  # the follower subscribes first
        answer = asyncio.ensure_future(self._read(question))
        arrival = self._subscription.arrival()
        try:
            await asyncio.wait([answer, arrival], return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Interruption()
        finally:
            answer.cancel()
            arrival.cancel()
