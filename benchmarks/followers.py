"""The follower and the direct reader: record when each delta arrives, as cheaply as Python can.

In: one JSON line on standard input, ``{"channels": […], "ended": …, "failed": …}`` or ``{"streams": n, "script": …}``.
Out: the JSON lines ``ready``, ``started`` (every stream has delivered a delta) and ``ended`` on standard output; with
``--stamps FILE`` the pairs (received, sent), as native 64-bit nanoseconds of CLOCK_MONOTONIC, which all processes of a
machine share.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from array import array
from pathlib import Path
from typing import Any, Final, cast

import hiredis
import uvloop

from benchmarks.wire import address, completion_request, resp_command

_STAMP: Final = re.compile(rb"(\d{20}) ")
_TAIL: Final = 64  #: Bytes kept from one read to the next, more than any mark or stamp takes.
_CONNECTS_AT_ONCE: Final = 100


class Tally:
    """What has been seen so far, reported on standard output as it happens."""

    def __init__(self, streams: int) -> None:
        """Expect ``streams`` streams, and their ends."""
        self.done = asyncio.Event()
        self.stamps = array("q")  # received, sent, received, sent, …
        self.messages = 0
        self.failed = 0
        self._waiting = set(range(streams))
        self._running = streams
        self._first_end_ns = 0

    def started(self, stream: int) -> None:
        """Note that a stream has delivered a delta."""
        if self._waiting:
            self._waiting.discard(stream)
            if not self._waiting:
                say("started")

    def ended(self, streams: int, failed: int = 0) -> None:
        """Note that streams have ended."""
        if streams == 0:
            return
        self._first_end_ns = self._first_end_ns or time.monotonic_ns()
        self.failed += failed
        self._running -= streams
        if self._running <= 0:
            self.done.set()

    def say_result(self) -> None:
        """Print the last line."""
        say("ended", messages=self.messages, failed=self.failed, first_end_ns=self._first_end_ns)


def say(event: str, **fields: object) -> None:
    """Print one JSON line."""
    print(json.dumps({"event": event, **fields}), flush=True)


class Counter(asyncio.Protocol):
    """Subscribes, and counts end marks in the raw bytes without parsing them."""

    def __init__(self, tally: Tally, channels: list[str], ended: bytes, failed: bytes) -> None:
        """Count ``ended`` marks and, among these, ``failed`` ones."""
        self._tally = tally
        self._channels = channels
        self._ended = ended
        self._failed = failed
        self._tail = b""
        self._subscribed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Subscribe."""
        cast("asyncio.WriteTransport", transport).write(
            resp_command(b"SUBSCRIBE", *(channel.encode() for channel in self._channels))
        )

    def data_received(self, data: bytes) -> None:
        """Count."""
        data, before = self._tail + data, self._tail
        self._tail = data[-_TAIL:]
        if self._subscribed < len(self._channels):
            self._subscribed += _new(data, before, b"subscribe\r\n")
            if self._subscribed == len(self._channels):
                say("ready")
        self._tally.messages += _new(data, before, b"$7\r\nmessage\r\n")
        self._tally.ended(_new(data, before, self._ended), _new(data, before, self._failed))


def _new(data: bytes, before: bytes, mark: bytes) -> int:
    # whatever lies entirely within the bytes of the previous read was counted then
    return data.count(mark) - before.count(mark)


class Recorder(asyncio.Protocol):
    """Subscribes, and records the time of every stamped delta."""

    def __init__(self, tally: Tally, channels: list[str], ended: bytes, failed: bytes) -> None:
        """Record until every channel has delivered ``ended``."""
        self._tally = tally
        self._index = {channel.encode(): i for i, channel in enumerate(channels)}
        self._ended = ended
        self._failed = failed
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Subscribe."""
        cast("asyncio.WriteTransport", transport).write(resp_command(b"SUBSCRIBE", *self._index))

    def data_received(self, data: bytes) -> None:
        """Record."""
        now = time.monotonic_ns()
        tally = self._tally
        self._reader.feed(data)
        while reply := self._reader.gets():
            kind, channel, payload = reply
            if kind == b"subscribe":
                if payload == len(self._index):
                    say("ready")
                continue
            tally.messages += 1
            if stamps := _STAMP.findall(payload):
                for stamp in stamps:
                    tally.stamps.extend((now, int(stamp)))
                tally.started(self._index[channel])
            elif self._ended in payload:
                tally.ended(1, failed=self._failed in payload)


class DirectReader(asyncio.Protocol):
    """Reads one stream directly from the provider and records its stamps; no worker can be faster."""

    def __init__(self, tally: Tally, index: int, request: bytes) -> None:
        """Send ``request`` once connected."""
        self._tally = tally
        self._index = index
        self._request = request
        self._transport: asyncio.WriteTransport
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Record."""
        now = time.monotonic_ns()
        data = self._tail + data
        end = 0
        for match in _STAMP.finditer(data):
            self._tally.stamps.extend((now, int(match[1])))
            end = match.end()
        if end:
            self._tally.started(self._index)
        if b"[DONE]" in data:
            self._tally.ended(1)
            self._transport.close()
        self._tail = data[max(end, len(data) - _TAIL) :]


async def _follow(order: dict[str, Any], tally: Tally, port: int, kind: type[Counter] | type[Recorder]) -> None:
    ended, failed = order["ended"].encode(), order["failed"].encode()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(
        lambda: kind(tally, order["channels"], ended, failed), "127.0.0.1", port
    )
    await tally.done.wait()
    transport.close()


async def _read_directly(order: dict[str, Any], tally: Tally, base_url: str) -> None:
    host, port = address(base_url)
    request = completion_request(base_url, order["script"])
    loop = asyncio.get_running_loop()
    say("ready")

    async def connect(index: int) -> None:
        await loop.create_connection(lambda: DirectReader(tally, index, request), host, port)

    for first in range(0, order["streams"], _CONNECTS_AT_ONCE):
        last = min(first + _CONNECTS_AT_ONCE, order["streams"])
        await asyncio.gather(*(connect(index) for index in range(first, last)))
    await tally.done.wait()


async def _main(arguments: argparse.Namespace) -> None:
    order = json.loads(sys.stdin.readline())
    tally = Tally(order["streams"] if "streams" in order else len(order["channels"]))
    if arguments.base_url:
        await _read_directly(order, tally, arguments.base_url)
    else:
        await _follow(order, tally, arguments.redis_port, Recorder if arguments.stamps else Counter)
    if arguments.stamps:
        with arguments.stamps.open("wb") as file:
            tally.stamps.tofile(file)
    tally.say_result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.followers")
    parser.add_argument("--redis-port", type=int)
    parser.add_argument("--base-url", help="read the provider directly instead of following in Redis")
    parser.add_argument("--stamps", type=Path, help="record stamped deltas into this file")
    uvloop.run(_main(parser.parse_args()))
