"""Many readers of server-sent events, which tell when each delta reached their sockets.

In: one JSON line ``{"port": …, "paths": […], "headers": …, "stalled": …}`` on standard input; so many of the last paths
are read until the first event and no further.
Out: the JSON lines ``here``, ``started`` (each has its first event), and ``ended`` (each that reads has its job's end);
with ``--stamps FILE`` a triple for each stamped delta: when it was in the socket, when it was sent, and when it was
read, as native 64-bit nanoseconds of CLOCK_MONOTONIC.

When a delta was in the socket, the kernel says.  So it does not matter to that figure how late these readers come to
read, and they do so only every few milliseconds: readers elsewhere in the world are not woken by the process that
writes to them, and that must not be counted as its work.  Nor do they hinder what they wait for: they are nicer.
"""

import argparse
import gc
import json
import os
import re
import resource
import select
import socket
import struct
import sys
import time
from array import array
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.followers import say

_STAMP: Final = re.compile(rb"(\d{20}) ")
_TAIL: Final = 64  #: Bytes kept from one read to the next, more than any mark or stamp takes.
_END: Final = b'"type":"job.'
_CONNECTS_AT_ONCE: Final = 50
_PAUSE: Final = 0.02  #: Seconds between them.
_READ_BYTES: Final = 262_144
_SMALL_BUFFER: Final = 16_384  #: Bytes; a reader that stalls keeps no more than that from being noticed.
_READS_EVERY: Final = 0.005  #: Seconds.
_NICENESS: Final = 10
#: Has the kernel say when it received what is read: the last of it, if it came in pieces.
_SO_TIMESTAMPNS: Final = 35
_TIMESPEC: Final = struct.Struct("qq")


class _Arrival(NamedTuple):
    """Moments, in nanoseconds of CLOCK_MONOTONIC."""

    here: int  #: In the socket.
    read: int


class Reader:
    """One reader."""

    def __init__(self, connection: socket.socket, *, stalls: bool) -> None:
        """Read from a connection on which the request has been sent; ``stalls``: only until the first event."""
        self.stalls = stalls
        self.has_begun = False
        self.has_ended = False
        self._connection = connection
        self._tail = b""

    def fileno(self) -> int:
        """Return the number of its socket, for ``select``."""
        return self._connection.fileno()

    def read(self, stamps: "array[int]") -> None:
        """Read what is there, and record its deltas."""
        data, messages, _, _ = self._connection.recvmsg(_READ_BYTES, 64)
        if not data:
            sys.exit(f"the stream has ended early; the last of it: {self._tail!r}")
        here, read = _arrival(messages)
        data = self._tail + data
        end = 0
        for match in _STAMP.finditer(data):
            stamps.extend((here, int(match[1]), read))
            end = match.end()
        self._tail = data[max(end, len(data) - _TAIL) :]
        if not self.has_begun:
            self._begin(data)
        self.has_ended = _END in data

    def _begin(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"refused: {data!r}")
        self.has_begun = b"\n\n" in data
        if not self.has_begun:
            self._tail = data

    def close(self) -> None:
        """Leave."""
        self._connection.close()


def _arrival(messages: list[tuple[int, int, bytes]]) -> _Arrival:
    now, now_of_kernel = time.monotonic_ns(), time.time_ns()
    if not messages:  # it came before the kernel had heard that it is to be stamped
        return _Arrival(now, now)
    seconds, nanoseconds = _TIMESPEC.unpack(messages[0][2])
    return _Arrival(now - (now_of_kernel - seconds * 1_000_000_000 - nanoseconds), now)


def _connect(port: int, request: bytes, *, stalls: bool) -> Reader:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    if stalls:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    connection.connect(("127.0.0.1", port))
    connection.sendall(request)
    return Reader(connection, stalls=stalls)


class _Crowd:
    """All readers."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._port: int = order["port"]
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in order["headers"].items())
        self._paths: list[str] = order["paths"]
        self._reading = len(self._paths) - order["stalled"]
        self._poll = select.epoll()
        self._readers: dict[int, Reader] = {}
        self._to_begin = len(self._paths)
        self._to_end = self._reading
        self.stamps = array("q")

    def connect(self) -> None:
        """Connect all, reading meanwhile what comes."""
        for first in range(0, len(self._paths), _CONNECTS_AT_ONCE):
            for index in range(first, min(first + _CONNECTS_AT_ONCE, len(self._paths))):
                request = f"GET {self._paths[index]} HTTP/1.1\r\nHost: localhost\r\n{self._headers}\r\n".encode()
                reader = _connect(self._port, request, stalls=index >= self._reading)
                self._readers[reader.fileno()] = reader
                self._poll.register(reader, select.EPOLLIN)
            until = time.monotonic() + _PAUSE
            while time.monotonic() < until:
                self._read()

    def read_to_the_end(self) -> None:
        """Read until all that do not stall have their jobs' ends."""
        while self._to_end:
            self._read()

    def _read(self) -> None:
        time.sleep(_READS_EVERY)  # nobody waits on the sockets meanwhile
        for number, _ in self._poll.poll(0, len(self._paths)):
            reader = self._readers[number]
            had_begun = reader.has_begun
            reader.read(self.stamps)
            if reader.has_begun and not had_begun:
                self._begun(reader)
            if reader.has_ended:
                self._ended(reader)

    def _begun(self, reader: Reader) -> None:
        if reader.stalls:
            self._poll.unregister(reader)  # it stays, and reads nothing
        self._to_begin -= 1
        if not self._to_begin:
            say("started")

    def _ended(self, reader: Reader) -> None:
        del self._readers[reader.fileno()]
        self._poll.unregister(reader)
        reader.close()
        self._to_end -= 1


def main(stamps: Path | None) -> None:
    """Read as the order says, until standard input says no more."""
    os.nice(_NICENESS)
    gc.disable()  # what it stops for would count as a delay, and there are no cycles
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    say("here")
    crowd = _Crowd(json.loads(sys.stdin.readline()))
    crowd.connect()
    crowd.read_to_the_end()
    if stamps is not None:
        with stamps.open("wb") as file:
            crowd.stamps.tofile(file)
    say("ended")
    sys.stdin.readline()  # those that read nothing stay until nobody needs them


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sse_readers")
    parser.add_argument("--stamps", type=Path, help="record stamped deltas into this file")
    main(parser.parse_args().stamps)
