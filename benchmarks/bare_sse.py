"""A bare fan-out of server-sent events: the least that it can cost in Python to bring what Redis publishes to readers.

In: ``--redis-port``, and HTTP requests for ``/<channel>``.
Out: the JSON line ``ready`` with its port; the messages of a channel to all its readers, as they are.

One asyncio protocol per reader and one subscription connection; no log, no cursor, no keys, no time-out, and a reader
that does not read fills the memory.
"""

import argparse
import asyncio
from collections import defaultdict
from typing import Final, cast

import hiredis
import uvloop

from benchmarks.followers import say
from benchmarks.wire import resp_command

_BACKLOG: Final = 4096
_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: here\n\n"

Readers = defaultdict[bytes, list[asyncio.WriteTransport]]


class _Subscription(asyncio.Protocol):
    """Passes on what is published."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._parser = hiredis.Reader()
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        while reply := self._parser.gets():
            kind, channel, payload = reply
            if kind == b"message":
                frame = b"data: %b\n\n" % payload
                for reader in self._readers[channel]:
                    reader.write(frame)
            elif kind == b"subscribe":
                for reader in self._readers[channel]:
                    reader.write(_HEAD)


class _Reader(asyncio.Protocol):
    """Asks for one channel, and stays."""

    def __init__(self, readers: Readers, redis: _Subscription) -> None:
        self._readers = readers
        self._redis = redis
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        channel = data.split(b" ", 2)[1].removeprefix(b"/")
        if channel in self._readers:
            self._transport.write(_HEAD)
        else:
            self._redis.transport.write(resp_command(b"SUBSCRIBE", channel))
        self._readers[channel].append(self._transport)


async def _main(redis_port: int) -> None:
    readers: Readers = defaultdict(list)
    loop = asyncio.get_running_loop()
    _, redis = await loop.create_connection(lambda: _Subscription(readers), "127.0.0.1", redis_port)
    server = await loop.create_server(lambda: _Reader(readers, redis), "127.0.0.1", 0, backlog=_BACKLOG)
    say("ready", port=server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_sse")
    parser.add_argument("--redis-port", type=int, required=True)
    uvloop.run(_main(parser.parse_args().redis_port))
