"""The floor: the least that reading streams, joining their text and publishing each delta can cost in Python.

In: per batch, one JSON line ``{"channels": […], "script": {…}}`` on standard input.
Out: one PUBLISH per delta, and ``[DONE]`` at the end of a stream, to Redis.

One asyncio protocol per stream, orjson and hand-written RESP; no retry, no time-out, no log, no store.
"""

import argparse
import asyncio
import json
import sys
from typing import Final, cast

import orjson
import uvloop

from benchmarks.wire import address, completion_request

_CONNECTS_AT_ONCE: Final = 100


class Redis(asyncio.Protocol):
    """A write-only connection; replies are discarded unread."""

    transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.WriteTransport", transport)


class Stream(asyncio.Protocol):
    """One provider stream."""

    def __init__(self, request: bytes, channel: bytes, redis: asyncio.WriteTransport) -> None:
        """Publish the answer to ``request`` on ``channel``."""
        self._request = request
        self._redis = redis
        self._publish = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n" % (len(channel), channel)
        self._transport: asyncio.WriteTransport
        self._unread = b""
        self._head_is_read = False
        self._text: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Join and publish every delta in ``data`` with one write."""
        data = self._unread + data
        if not self._head_is_read:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._unread = head
                return
            self._head_is_read = True
        commands = []
        position = 0
        while (line_end := data.find(b"\r\n", position)) >= 0:  # one HTTP chunk at a time
            size = int(data[position:line_end], 16)
            start = line_end + 2
            if len(data) < start + size + 2:
                break
            position = start + size + 2
            for event in data[start : start + size].split(b"\n\n"):
                if event.startswith(b"data: {"):
                    for choice in orjson.loads(event[6:])["choices"]:
                        if content := choice["delta"].get("content"):
                            self._text.append(content)
                            payload = content.encode()
                            commands.append(b"%b$%d\r\n%b\r\n" % (self._publish, len(payload), payload))
                elif event == b"data: [DONE]":
                    "".join(self._text)
                    commands.append(b"%b$6\r\n[DONE]\r\n" % self._publish)
                    self._transport.close()
        self._unread = data[position:]
        if commands:
            self._redis.write(b"".join(commands))


async def _main(base_url: str, redis_port: int) -> None:
    loop = asyncio.get_running_loop()
    host, port = address(base_url)
    _, redis = await loop.create_connection(Redis, "127.0.0.1", redis_port)

    async def open_stream(stream: Stream) -> None:
        await loop.create_connection(lambda: stream, host, port)

    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await _read_line(orders):
        order = json.loads(line)
        request = completion_request(base_url, order["script"])
        streams = [Stream(request, channel.encode(), redis.transport) for channel in order["channels"]]
        for first in range(0, len(streams), _CONNECTS_AT_ONCE):
            await asyncio.gather(*map(open_stream, streams[first : first + _CONNECTS_AT_ONCE]))


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    # a line with thousands of channels is longer than StreamReader.readline() allows
    line = b""
    while not line.endswith(b"\n") and (data := await reader.read(65_536)):
        line += data
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--redis-port", type=int, required=True)
    arguments = parser.parse_args()
    uvloop.run(_main(arguments.base_url, arguments.redis_port))
