"""The publisher's connection to Redis: packed commands out, replies in, nothing between.

In: a Redis URL, and bytes that are whole commands, from the publisher.  Out: their replies, in order.
Everything else in the worker uses redis-py; but the publisher sends thousands of small pipelines a second,
and redis-py spends more on one awaited reply than all the rest of a delta costs.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Any, cast

import hiredis
from redis.asyncio.connection import parse_url


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
    async def connect(cls, url: str, timeout: float) -> "RedisLink":
        """Connect, authenticate and select the database that ``url`` names.

        Raises:
            LinkError: no connection within ``timeout`` seconds, or Redis refused us; the message
                holds no password.
        """
        options: dict[str, Any] = dict(parse_url(url))
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                if "path" in options:
                    _, link = await loop.create_unix_connection(cls, options["path"])
                else:
                    host, port = options.get("host", "127.0.0.1"), options.get("port", 6379)
                    _, link = await loop.create_connection(cls, host, port, ssl=_tls(options))
                await link._greet(options)  # noqa: SLF001  # our own, made by the loop
        except (OSError, TimeoutError) as error:
            raise LinkError(f"no connection to Redis ({type(error).__name__})") from error
        return link

    async def _greet(self, options: dict[str, Any]) -> None:
        commands = []
        if options.get("password"):
            user = [options["username"]] if options.get("username") else []
            commands.append(pack("AUTH", *user, options["password"]))
        if options.get("db"):
            commands.append(pack("SELECT", options["db"]))
        for reply in await self.call(commands, len(commands)) if commands else ():
            if isinstance(reply, hiredis.ReplyError):
                self.close()
                raise LinkError("Redis refused the user, the password or the database number")

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


def _tls(options: dict[str, Any]) -> ssl.SSLContext | None:
    if "ssl_cert_reqs" not in options and not options.get("connection_class", type).__name__.startswith("SSL"):
        return None
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    if options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
