"""The subscriptions: all followers of an event loop hear of their jobs by one connection to Redis.

In: names of channels, from followers; messages, from Redis.  Out: payloads, to the mailboxes of the followers.

A channel is subscribed for its first follower and left with its last.  A connection that is lost takes all its
mailboxes with it, and each follower subscribes anew; who asks while a connection is being made waits for that one.  A
connection that answers, and yet does not deliver what is published, leads to a server to which the events do not go any
more.  It is retired: who notices goes over to a new one.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from keepstream.client.cancellation import cancellable
from keepstream.client.mailbox import Mailbox
from keepstream.client.payloads import Payload

_PAUSE: Final = 0.1  #: Seconds after an attempt to connect that failed, before the next.
# A connection is looked at once a second. What counts are looks: a loop that stood still for long has heard nothing.
_TICK: Final = 1.0  #: Seconds.
_ASK_AFTER: Final = 2  #: Looks without a word from the server, after which it is asked for one,
_DEAD_AFTER: Final = 5  #: and after which the connection counts as lost.
_IDLE_AFTER: Final = 10  #: Looks without a channel, after which the connection is closed.


class Subscription(Mailbox):
    """One follower's part in the subscription of a channel."""

    __slots__ = ("_link", "channel")

    def __init__(self, link: "_Link", channel: bytes) -> None:
        self.channel = channel
        self._link = link
        super().__init__()

    async def is_late(self) -> bool:
        """Tell, when a message has not come that was published, whether it comes after all."""
        await self._link.ping()  # whatever was published before comes before the answer
        return self.has_something

    def retire(self) -> None:
        """Let nobody else subscribe by this connection."""
        self._link.retire()

    def leave(self) -> None:
        """End it."""
        self._link.remove(self)


class Subscriptions:
    """The subscriptions of one event loop.

    Args:
        pool: Makes the connections.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._links: set[_Link] = set()  # those that are retired as well
        self._link: _Link | None = None  # by which whoever comes subscribes
        self._connecting: asyncio.Task[_Link] | None = None
        self._failed_at = -math.inf
        self._is_closed = False

    async def subscribe(self, channel: str) -> Subscription:
        """Subscribe, and return a mailbox for what is published from now on: Redis has confirmed it.

        Raises:
            RedisError, OSError: there is no connection, or Redis refuses the channel.
        """
        link = self._link or await self._connect()
        subscription = Subscription(link, channel.encode())
        await link.add(subscription)
        return subscription

    async def close(self) -> None:
        """Close all connections; who follows finds its mailbox lost."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        for link in list(self._links):
            await link.close()

    async def _connect(self) -> "_Link":
        """Return the connection that is being made, for all who wait for one."""
        if self._is_closed:
            raise RedisConnectionError("closed")
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._make_link(), name="keepstream-connect")
            self._connecting.add_done_callback(self._connected)
        return await asyncio.shield(self._connecting)

    def _connected(self, task: "asyncio.Task[_Link]") -> None:
        self._connecting = None
        if task.cancelled() or task.exception() is not None:  # those who wait have got it
            self._failed_at = asyncio.get_running_loop().time()

    async def _make_link(self) -> "_Link":
        await asyncio.sleep(self._failed_at + _PAUSE - asyncio.get_running_loop().time())
        connection = await cancellable(self._pool.get_connection())
        if self._is_closed:
            await connection.disconnect(nowait=True)
            raise RedisConnectionError("closed")
        self._link = link = _Link(connection, self._pool, self._retire, self._links.discard)
        self._links.add(link)
        return link

    def _retire(self, link: "_Link") -> None:
        if self._link is link:
            self._link = None


class _Channel:
    """A channel that is subscribed, or about to be."""

    __slots__ = ("answer", "followers")

    def __init__(self, answer: "asyncio.Future[Exception | None]") -> None:
        self.answer = answer  #: Gives Redis' refusal, or None.
        self.followers: dict[Subscription, None] = {}  #: A set that keeps their order.


class _Link:
    """One connection, and the channels that are subscribed by it; a task of its own reads and writes.

    Args:
        connection: Is connected, and used by nobody else.
        pool: Gets it back.
        on_retired: Called when nobody may subscribe any more.
        on_closed: Called at the end.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        pool: ConnectionPool,
        on_retired: Callable[["_Link"], None],
        on_closed: Callable[["_Link"], None],
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._on_retired = on_retired
        self._on_closed = on_closed
        self._channels: dict[bytes, _Channel] = {}
        self._commands: list[tuple[bytes, ...]] = []  # to be sent
        self._answers: deque[asyncio.Future[Exception | None] | None] = deque()  # to the commands, in the same order
        self._has_commands = asyncio.Event()
        self._lost: Exception | None = None
        self._silence = 0  # looks since the last word from the server
        self._idleness = 0  # looks since there was a channel
        self._task = asyncio.create_task(self._run(), name="keepstream-subscriptions")

    async def add(self, subscription: Subscription) -> None:
        """Let a mailbox get what arrives on its channel; return when Redis has confirmed the subscription."""
        channel = self._channels.get(subscription.channel)
        if channel is None:
            channel = _Channel(self._ask(b"SUBSCRIBE", subscription.channel))
            self._channels[subscription.channel] = channel
        channel.followers[subscription] = None
        try:
            await _success(channel.answer)
        except BaseException:
            self.remove(subscription)
            raise

    def remove(self, subscription: Subscription) -> None:
        """Let a mailbox get nothing more."""
        channel = self._channels.get(subscription.channel)
        if channel is None or subscription not in channel.followers:
            return
        del channel.followers[subscription]
        if not channel.followers:
            del self._channels[subscription.channel]
            self._send((b"UNSUBSCRIBE", subscription.channel))

    async def ping(self) -> None:
        """Return when all has arrived that had been published before."""
        await _success(self._ask(b"PING"))

    def retire(self) -> None:
        """Let nobody else subscribe."""
        self._on_retired(self)

    async def close(self) -> None:
        """Close the connection; who follows finds its mailbox lost."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _ask(self, *command: bytes) -> "asyncio.Future[Exception | None]":
        """Have a command sent, together with others; the future gives Redis' refusal, or None."""
        answer: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            answer.set_result(self._lost)
        else:
            self._send(command, answer)
        return answer

    def _send(self, command: tuple[bytes, ...], answer: "asyncio.Future[Exception | None] | None" = None) -> None:
        self._commands.append(command)
        self._answers.append(answer)
        self._has_commands.set()

    async def _run(self) -> None:
        error: Exception = RedisConnectionError("closed")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read())
                tasks.create_task(self._write())
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
        finally:
            self._end(error)
            with suppress(RedisError, OSError):
                await self._connection.disconnect(nowait=True)
                await self._pool.release(self._connection)

    async def _read(self) -> None:
        while True:
            try:
                reply = await self._connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except ResponseError as refusal:
                self._answer(refusal)
            else:
                self._take(reply)
            self._silence = 0

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        next_look = loop.time() + _TICK
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_look):
                    await self._has_commands.wait()
            if loop.time() >= next_look:
                self._look()
                next_look = loop.time() + _TICK
            self._has_commands.clear()
            commands, self._commands = self._commands, []
            if commands:
                packed = self._connection.pack_commands(commands)
                await cancellable(self._connection.send_packed_command(packed, check_health=False))

    def _take(self, reply: object) -> None:
        match reply:
            case [b"message", bytes(name), bytes(data)]:
                channel = self._channels.get(name)
                if channel is not None:
                    payload = Payload(data)
                    for follower in channel.followers:
                        follower.put(payload)
            case _:  # it confirms a subscription or its end, or answers a ping
                self._answer(None)

    def _answer(self, refusal: Exception | None) -> None:
        if not self._answers:
            raise RedisConnectionError("an answer to no question") from refusal
        answer = self._answers.popleft()
        if answer is not None and not answer.done():
            answer.set_result(refusal)

    def _look(self) -> None:
        self._silence += 1
        if self._silence == _ASK_AFTER:
            self._send((b"PING",))
        elif self._silence >= _DEAD_AFTER:
            raise RedisTimeoutError("no answer")
        self._idleness = 0 if self._channels else self._idleness + 1
        if self._idleness >= _IDLE_AFTER:
            self.retire()
            raise RedisConnectionError("closed")

    def _end(self, error: Exception) -> None:
        self._lost = error
        self.retire()
        self._on_closed(self)
        while self._answers:
            self._answer(error)
        for channel in self._channels.values():
            for follower in channel.followers:
                follower.lose(error)


async def _success(answer: "asyncio.Future[Exception | None]") -> None:
    """Wait for an answer, for which others may wait too.

    Raises:
        Exception: it is a refusal.
    """
    refusal = answer.result() if answer.done() else await asyncio.shield(answer)
    if refusal is not None:
        raise refusal.with_traceback(None)  # else it would grow with each follower that raises it
