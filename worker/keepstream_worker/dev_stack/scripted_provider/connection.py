"""One client connection: HTTP/1.1 by hand, and the timer that drives the responses.

In: a client's bytes; playbacks, from the server.
Out: parsed requests, to the server; what the playbacks send, and their faults, to the client.

Without an HTTP library a delta costs one write, and faults that no library would produce are possible. A response is
a generator, a ``Playback``: it writes to its connection and yields the loop time at which to resume. One ticker wakes
all of them, so that a paced stream needs no task.
"""

import asyncio
import heapq
import json
import math
import socket
import struct
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, NamedTuple, cast

from typing_extensions import override

from keepstream_worker.dev_stack.scripted_provider.encoding import error_body, http_chunk, to_json

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
TICK: Final = 0.002  #: Seconds; wake-up times are rounded up to this, which means fewer of them.
RESET_AFTER: Final = 0.05  #: Seconds for the client to read what was sent: a reset discards the rest.
NOW: Final = 0.0
NEVER: Final = math.inf  #: Yielded by a playback that will not resume: only the client can end it.

#: A response under way; yields loop times.
Playback = Generator[float, None, None]


class Request(NamedTuple):
    """A request as received, with header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Decode the body; raise ``ValueError`` if it is not JSON."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("the body is nested too deeply") from None


@dataclass(slots=True)
class Attempt:
    """One request for a key. Times are CLOCK_MONOTONIC in nanoseconds."""

    attempts: int  #: The number of requests for the key, this one included.
    started_ns: int
    deltas: int = 0  #: Sent so far.
    first_delta_ns: int | None = None  #: When the first of them was sent.
    ended_ns: int | None = None  #: When the response ended, whichever side ended it.
    client_closed_ns: int | None = None  #: When the client closed the connection before the response had ended.


@dataclass(slots=True)
class Counters:
    """Counts shared by all connections of a server."""

    open_streams: int = 0
    peak_streams: int = 0  #: The most of them at once.
    requests: int = 0
    deltas_sent: int = 0


class Ticker:
    """Wakes many playbacks with one timer: those due within the same tick wake together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ticks: list[int] = []  # a heap of the keys of _sleepers
        self._sleepers: dict[int, list[Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def time(self) -> float:
        """Return the loop time."""
        return self._loop.time()

    def wake_at(self, due: float, wake: Callable[[], None]) -> None:
        """Call ``wake`` at loop time ``due``, or in the loop's next iteration if that has passed."""
        if due <= self._loop.time():
            self._loop.call_soon(wake)
            return
        tick = math.ceil(due / TICK)
        if tick not in self._sleepers:
            self._sleepers[tick] = []
            heapq.heappush(self._ticks, tick)
            if tick == self._ticks[0]:
                self._arm()
        self._sleepers[tick].append(wake)

    def close(self) -> None:
        """Wake nobody any more."""
        self._ticks.clear()
        self._sleepers.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._ticks[0] * TICK, self._wake)

    def _wake(self) -> None:
        self._timer = None
        horizon = self._loop.time() + TICK / 2  # the loop's timers may fire a fraction of a millisecond early
        while self._ticks and self._ticks[0] * TICK <= horizon:
            for wake in self._sleepers.pop(heapq.heappop(self._ticks)):
                wake()
        if self._ticks:
            self._arm()


class Connection(asyncio.Protocol):
    """One client connection: parses its requests, one at a time, and drives the response to each.

    Args:
        respond: Returns the playback that answers a request.
        ticker: Wakes the playbacks.
        counters: The server's counts.
        connections: The server's open connections, to which this one adds and removes itself.
    """

    def __init__(
        self,
        respond: Callable[["Connection", Request], Playback],
        ticker: Ticker,
        counters: Counters,
        connections: set["Connection"],
    ) -> None:
        self._respond = respond
        self._ticker = ticker
        self._counters = counters
        self._connections = connections
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._playback: Playback | None = None
        self._attempt: Attempt | None = None
        self._paused = False
        self._parked = False  # the playback was due while the client was not reading
        self._keep_alive = True
        self._chunked = False
        self._headers: dict[str, str] = {}  # of the response under way, beside its own
        self._on_end: Callable[[], None] | None = None

    # Called by the loop.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not a subclass
        self._connections.add(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_HEAD_BYTES + MAX_BODY_BYTES:
            self._transport.abort()  # the client keeps sending requests without waiting for answers
        elif self._playback is None:
            self._next_request()

    @override
    def pause_writing(self) -> None:
        self._paused = True

    @override
    def resume_writing(self) -> None:
        self._paused = False
        if self._parked:
            self._parked = False
            self._advance()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._attempt is not None:
            self._attempt.client_closed_ns = time.monotonic_ns()
        self._finish()

    # Requests.

    def _next_request(self) -> None:
        if self._playback is not None or self._transport.is_closing():
            return
        try:
            request = self._parse_request()
        except _NotServedError as error:
            self._keep_alive = False
            self._playback = send_json(self, error.status, error_body(str(error), "invalid_request_error"))
        else:
            if request is None:
                return
            self._playback = self._respond(self, request)
        self._advance()

    def _parse_request(self) -> Request | None:
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise _NotServedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too large")
            return None
        request_line, *lines = self._buffer[:head_end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        try:
            method, path, version = request_line.split(" ")
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise _NotServedError(HTTPStatus.BAD_REQUEST, "this is not an HTTP request") from None
        if version != "HTTP/1.1":
            raise _NotServedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is spoken here")
        if "transfer-encoding" in headers:
            raise _NotServedError(HTTPStatus.LENGTH_REQUIRED, "the body must come with a content-length")
        if not 0 <= length <= MAX_BODY_BYTES:
            raise _NotServedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY_BYTES} bytes")
        body_start = head_end + 4
        if len(self._buffer) < body_start + length:
            if "expect" in headers and len(self._buffer) == body_start:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        body = bytes(self._buffer[body_start : body_start + length])
        del self._buffer[: body_start + length]
        self._keep_alive = headers.get("connection", "").lower() != "close"
        return Request(method, path, headers, body)

    # The response under way.

    def _advance(self) -> None:
        if self._playback is None:  # the client left meanwhile
            return
        if self._paused:
            self._parked = True
            return
        due = next(self._playback, None)
        if due is None:
            self._finish()
            if not self._keep_alive:
                self._transport.close()
            elif self._buffer:
                self._ticker.wake_at(NOW, self._next_request)
        elif due != NEVER:
            self._ticker.wake_at(due, self._advance)

    def _finish(self) -> None:
        if self._playback is not None:
            self._playback.close()
            self._playback = None
        if self._attempt is not None:
            self._attempt.ended_ns = time.monotonic_ns()
            self._attempt = None
            self._counters.open_streams -= 1
        self._headers = {}
        if self._on_end is not None:
            self._on_end()
            self._on_end = None

    # Called by playbacks and by the server.

    def begin_attempt(self, attempt: Attempt, headers: dict[str, str], on_end: Callable[[], None]) -> None:
        """Keep ``attempt`` up to date until the response ends, add ``headers`` to it, and call ``on_end`` then."""
        self._attempt = attempt
        self._headers = headers
        self._on_end = on_end
        self._counters.open_streams += 1
        self._counters.peak_streams = max(self._counters.peak_streams, self._counters.open_streams)

    def count(self, deltas: int) -> None:
        """Count deltas as sent."""
        self._counters.deltas_sent += deltas
        if self._attempt is not None:
            self._attempt.deltas += deltas
            self._attempt.first_delta_ns = self._attempt.first_delta_ns or time.monotonic_ns()

    @property
    def peak_streams(self) -> int:
        """The most streams that the server has had open at once."""
        return self._counters.peak_streams

    def later(self, seconds: float) -> float:
        """Return the loop time some seconds from now."""
        return self._ticker.time() + seconds

    def begin(self, status: int, headers: dict[str, str], length: int | None = None) -> None:
        """Send the head of a response; without ``length`` its body is chunked."""
        self._chunked = length is None and status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        framing = "transfer-encoding: chunked" if self._chunked else f"content-length: {length or 0}"
        fields = "".join([f"{name}: {value}\r\n" for name, value in (headers | self._headers).items()])
        # The reason phrase may be empty, and no client reads it.
        head = f"HTTP/1.1 {status} \r\n{fields}x-request-id: req_{uuid.uuid4().hex}\r\n{framing}\r\n\r\n"
        self._transport.write(head.encode())

    def send(self, data: bytes) -> None:
        """Send bytes that are already framed."""
        self._transport.write(data)

    def send_chunk(self, data: bytes) -> None:
        """Send bytes as one HTTP chunk."""
        self._transport.write(http_chunk(data))

    def end(self) -> None:
        """End a chunked body."""
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection once everything is sent."""
        self._transport.close()

    def reset(self) -> Playback:
        """Reset the connection once the client has had time to read everything."""
        yield self.later(RESET_AFTER)
        while self._transport.get_write_buffer_size():
            yield self.later(RESET_AFTER)
        # Without lingering, closing the socket sends a reset.
        connection: socket.socket = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def break_off(self) -> None:
        """Close the connection: at once if it streams, else once everything is sent."""
        if self._attempt is not None:
            self._transport.abort()
        else:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()


class _NotServedError(Exception):
    """The request is not supported; the connection is closed after the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def send_json(connection: Connection, status: int, value: object, headers: Mapping[str, str] | None = None) -> Playback:
    """Send a JSON response."""
    body = to_json(value)
    connection.begin(status, {"content-type": "application/json"} | dict(headers or {}), len(body))
    connection.send(body)
    yield from ()
