"""Many readers of server-sent events, as cheap as Python can make them.

In: one JSON line ``{"port": …, "paths": […], "headers": …, "stalled": …}`` on standard input; so many of the last paths
are read until the first event and no further.
Out: the JSON lines ``here``, ``started`` (each has its first event), and ``ended`` (each that reads has its job's end);
with ``--stamps FILE`` the pairs (received, sent), as of ``followers``.
"""

import argparse
import asyncio
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final, cast

import uvloop

from benchmarks.followers import Tally, say

_STAMP: Final = re.compile(rb"(\d{20}) ")
_TAIL: Final = 64  #: Bytes kept from one read to the next, more than any mark or stamp takes.
_END: Final = b'"type":"job.'
_CONNECTS_AT_ONCE: Final = 50
_SMALL_BUFFER: Final = 16_384  #: Bytes; a reader that stalls keeps no more than that from being noticed.


class Reader(asyncio.Protocol):
    """One reader."""

    def __init__(self, tally: Tally, index: int, request: bytes, *, stalls: bool) -> None:
        """Send ``request`` once connected; ``stalls`` says that it stops reading after the first event."""
        self._tally = tally
        self._index = index
        self._request = request
        self._stalls = stalls
        self._is_begun = False
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Record."""
        now = time.monotonic_ns()
        data = self._tail + data
        end = 0
        for match in _STAMP.finditer(data):
            self._tally.stamps.extend((now, int(match[1])))
            end = match.end()
        self._tail = data[max(end, len(data) - _TAIL) :]
        if not self._is_begun:
            self._begin(data)
        if _END in data:
            self._tally.ended(1)
            self._transport.close()

    def _begin(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"refused: {data!r}")
        if b"\n\n" not in data:
            self._tail = data
            return
        self._is_begun = True
        if self._stalls:
            self._transport.pause_reading()
        self._tally.started(self._index)


async def _main(stamps: Path | None) -> None:
    order = json.loads(sys.stdin.readline())
    paths: list[str] = order["paths"]
    reading = len(paths) - order["stalled"]
    tally = Tally(len(paths), must_end=reading)
    headers = "".join(f"{name}: {value}\r\n" for name, value in order["headers"].items())

    async def connect(index: int) -> None:
        request = f"GET {paths[index]} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode()
        await _connect(order["port"], Reader(tally, index, request, stalls=index >= reading), small=index >= reading)

    for first in range(0, len(paths), _CONNECTS_AT_ONCE):
        await asyncio.gather(*(connect(index) for index in range(first, min(first + _CONNECTS_AT_ONCE, len(paths)))))
        await asyncio.sleep(0.02)
    await tally.done.wait()
    if stamps is not None:
        with stamps.open("wb") as file:
            tally.stamps.tofile(file)
    tally.say_result()
    await asyncio.to_thread(sys.stdin.readline)  # those that read nothing stay until nobody needs them


async def _connect(port: int, reader: Reader, *, small: bool) -> None:
    loop = asyncio.get_running_loop()
    connection: Any = socket.socket()
    connection.setblocking(False)
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.create_connection(lambda: reader, sock=connection)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sse_readers")
    parser.add_argument("--stamps", type=Path, help="record stamped deltas into this file")
    say("here")
    uvloop.run(_main(parser.parse_args().stamps))
