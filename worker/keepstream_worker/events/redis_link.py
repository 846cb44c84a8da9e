"""The publisher's connection to Redis: packed commands out, replies in, nothing between.

In: a Redis server, and bytes that are whole commands, from the publisher.  Out: their replies, in order.
Everything else in the worker uses redis-py; but the publisher sends thousands of small pipelines a second,
and redis-py spends more on one awaited reply than all the rest of a delta costs.  Where the server is and
whether it is the right one is found out as by redis-py: by the same Sentinels and the same TLS context.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, cast

import hiredis
from redis.exceptions import RedisError

from keepstream.client.redis_connections import AsyncMasterFinder, tls_context
from keepstream.client.redis_url import RedisServer, Sentinels, UnixSocket
from keepstream.errors import InvalidSettingError


class LinkError(ConnectionError):
    """There is no connection, or it was lost before all replies came."""


def pack(*arguments: bytes | str | int) -> bytes:
    """Return one command in the Redis protocol."""
    packed: bytes = hiredis.pack_command(arguments)  # type: ignore[arg-type]  # typed as a tuple of one
    return packed


class RedisLink(asyncio.Protocol):
    """One connection; after an error it is dead, and a new one is to be made."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._expected: deque[tuple[asyncio.Future[list[Any]], int]] = deque()
        self._replies: list[Any] = []
        self._lost: Exception | None = None

    @classmethod
    async def connect(cls, server: RedisServer, timeout: float) -> "RedisLink":
        """Connect, authenticate and select the database.

        With Sentinels they are asked anew, so that after a fail-over the link leads to the new master.

        Args:
            server: Where to connect.
            timeout: Seconds, without those that Sentinels take.

        Raises:
            LinkError: no connection in time, or Redis refused us; the message holds no password, and the
                cause says what was wrong.
        """
        place = server.place
        try:
            tls = None if server.tls is None else await asyncio.to_thread(tls_context, server.tls)  # reads files
            if isinstance(place, Sentinels):
                place = await AsyncMasterFinder(server).discover_master(place.service)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(timeout):
                if isinstance(place, UnixSocket):
                    _, link = await loop.create_unix_connection(cls, place.path)
                else:
                    _, link = await loop.create_connection(cls, place.host, place.port, ssl=tls)
                await link._greet(server)  # noqa: SLF001  # our own, made by the loop
        except LinkError:
            raise
        except (OSError, TimeoutError, RedisError, InvalidSettingError) as error:
            raise LinkError(f"no connection to Redis ({type(error).__name__})") from error
        return link

    async def _greet(self, server: RedisServer) -> None:
        commands = []
        if server.username or server.password:
            # The user is named, as redis-py does: else a Redis that needs no password would refuse one.
            commands.append(pack("AUTH", server.username or "default", server.password or ""))
        if server.db:
            commands.append(pack("SELECT", server.db))
        for reply in await self.call(commands, len(commands)) if commands else ():
            if isinstance(reply, hiredis.ReplyError):
                self.close()
                raise LinkError("Redis refused the user, the password or the database number") from reply

    def call(self, commands: Iterable[bytes], count: int) -> "asyncio.Future[list[Any]]":
        """Send ``commands``; the future gives their ``count`` replies, with errors as values among them."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._lost is not None or self._transport is None:
            future.set_exception(LinkError("the connection to Redis is closed"))
            return future
        self._expected.append((future, count))
        self._transport.write(b"".join(commands))
        return future

    @property
    def alive(self) -> bool:
        """Whether the connection is up, as far as is known."""
        return self._lost is None

    def close(self) -> None:
        """Close the connection; waiting calls fail."""
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._reader.feed(data)
        replies = self._replies
        while self._expected:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError as error:
                self._lost = error
                self.close()
                return
            if reply is False:
                return
            replies.append(reply)
            future, count = self._expected[0]
            if len(replies) == count:
                self._expected.popleft()
                self._replies = []
                if not future.done():
                    future.set_result(replies)
                replies = self._replies

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._lost = self._lost or exc or LinkError("closed")
        while self._expected:
            future, _ = self._expected.popleft()
            if not future.done():
                future.set_exception(LinkError("the connection to Redis was lost"))
