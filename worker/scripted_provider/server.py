"""The scripted provider: an HTTP server that plays scripted streams.

In: HTTP requests of OpenAI clients, each with its script.  Out: streams and faults on the wire; what
was asked and sent, to tests.  Exists so that demo, tests and benchmarks meet a real server on a real
socket, and every fault of a real provider on request.

A response is a generator that writes to its connection and yields the loop time at which it wants to
go on.  One ticker wakes all of them with one timer, so that a paced stream costs no task.
"""

import asyncio
import heapq
import hmac
import json
import math
import socket
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, cast

from worker.scripted_provider import replies
from worker.scripted_provider.replies import Reply, Write, error_body, http_chunk, sse_event, to_json
from worker.scripted_provider.script import (
    CommentsFault,
    EndFault,
    ErrorEventFault,
    Fault,
    MidwayFault,
    RawResponse,
    Script,
    SilentFault,
    StatusFault,
    parse_script,
)

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_RECORDED: Final = 1000  #: Requests kept for tests to look at …
MAX_RECORDED_BYTES: Final = 64 * 1024 * 1024  #: … and the most their bodies may hold.
MAX_KEYS: Final = 100_000  #: Keys whose attempts are counted; the oldest go first.
BATCH: Final = 256  #: Deltas written at once when unpaced: about what the transport buffers before it pauses us.
RESET_AFTER: Final = 0.05  #: Seconds for the client to read what was sent: a reset discards what it has not.
COMMENT_EVERY: Final = 0.05  #: Seconds between two SSE comments.
NOW: Final = 0.0
NEVER: Final = math.inf

_GARBAGE: Final = b'data: {"id":"chatcmpl-garbage","choices":[{"del\xff\xfe\n\n'
_STREAM_HEADERS: Final = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_SECRET_HEADERS: Final = frozenset({"authorization", "api-key", "proxy-authorization", "cookie"})

#: A response under way; yields loop times.
Performance = Generator[float, None, None]


class RecordedRequest(NamedTuple):
    """A request as it arrived; the values of headers that hold secrets are replaced by ``***``."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body decoded; raise ``ValueError`` if it is no JSON."""
        return json.loads(self.body)


@dataclass(slots=True)
class Attempt:
    """The last attempt of a key; times are CLOCK_MONOTONIC in nanoseconds."""

    attempts: int
    started_ns: int
    deltas: int = 0
    ended_ns: int | None = None  #: When the response ended, by whichever side.
    client_closed_ns: int | None = None  #: When the client closed the connection before the response had ended.


class Ticker:
    """Wakes many streams with one timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0  # Breaks ties, so that callables are never compared.
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = NEVER

    def wake_at(self, due: float, wake: Callable[[], None]) -> None:
        """Call ``wake`` at loop time ``due``; a time in the past means in the next round of the loop."""
        if due <= self._loop.time():
            self._loop.call_soon(wake)
            return
        self._count += 1
        heapq.heappush(self._due, (due, self._count, wake))
        if due < self._armed_for:
            self._arm(due)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = due
        self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer, self._armed_for = None, NEVER
        # Who is due within the timer's own resolution goes now: it saves a wake-up.
        horizon = self._loop.time() + 0.0005
        due = self._due
        ready = []
        while due and due[0][0] <= horizon:
            ready.append(heapq.heappop(due)[2])
        for wake in ready:
            wake()
        if due and due[0][0] < self._armed_for:
            self._arm(due[0][0])

    def close(self) -> None:
        """Forget everyone who waits."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()


class Connection(asyncio.Protocol):
    """One client connection: parses requests, one at a time, and drives the response of each."""

    def __init__(self, provider: "ScriptedProvider") -> None:
        self._provider = provider
        self._buffer = bytearray()
        self._performance: Performance | None = None
        self._paused = False
        self._parked = False  # The performance wanted to go on while the client was not reading.
        self._keep_alive = True
        self._chunked = False
        self._transport: asyncio.Transport
        self.attempt: Attempt | None = None

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass of it.
        self._provider.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._performance is None:
            self._next_request()
        elif len(self._buffer) > MAX_HEAD_BYTES + MAX_BODY_BYTES:
            self._transport.abort()  # Someone pipelines without end.

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._parked:
            self._parked = False
            self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._provider.connections.discard(self)
        if self._performance is not None:
            if self.attempt is not None:
                self.attempt.client_closed_ns = time.monotonic_ns()
            self._finish()

    # -- requests

    def _next_request(self) -> None:
        try:
            request = self._parse_request()
        except _BadRequestError as error:
            self._keep_alive = False
            self._buffer.clear()
            self._perform(send_json(self, error.status, error_body(error.message, "invalid_request_error")))
            return
        if request is not None:
            self._perform(self._provider.respond(self, request))

    def _parse_request(self) -> RecordedRequest | None:
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise _BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too large")
            return None
        request_line, *lines = self._buffer[:head_end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        try:
            method, path, version = request_line.split(" ")
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise _BadRequestError(HTTPStatus.BAD_REQUEST, "this is no HTTP request") from None
        if version != "HTTP/1.1":
            raise _BadRequestError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "speak HTTP/1.1")
        if "transfer-encoding" in headers:
            raise _BadRequestError(HTTPStatus.LENGTH_REQUIRED, "send the body with a content-length")
        if not 0 <= length <= MAX_BODY_BYTES:
            raise _BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body may have {MAX_BODY_BYTES} bytes")
        end = head_end + 4 + length
        if len(self._buffer) < end:
            if "expect" in headers and len(self._buffer) == head_end + 4:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        body = bytes(self._buffer[head_end + 4 : end])
        del self._buffer[:end]
        self._keep_alive = headers.get("connection", "").lower() != "close"
        return RecordedRequest(method, path, headers, body)

    # -- the response under way

    def _perform(self, performance: Performance) -> None:
        self._performance = performance
        self._advance()

    def _advance(self) -> None:
        if self._performance is None:
            return
        if self._paused:
            self._parked = True
            return
        try:
            due = next(self._performance)
        except StopIteration:
            self._finish()
            if not self._keep_alive:
                self._transport.close()
            elif self._buffer:
                self._next_request()
        else:
            if due != NEVER:
                self._provider.ticker.wake_at(due, self._advance)

    def _finish(self) -> None:
        if self._performance is not None:
            self._performance.close()
        self._performance = None
        if self.attempt is not None:
            self.attempt.ended_ns = time.monotonic_ns()
            self.attempt = None
            self._provider.open_streams -= 1

    # -- called by performances

    def begin(self, status: int, headers: Mapping[str, str], length: int | None = None) -> None:
        """Send the head of a response; without ``length`` its body is chunked."""
        self._chunked = length is None and status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        framing = {"transfer-encoding": "chunked"} if self._chunked else {"content-length": str(length or 0)}
        fields = {**headers, "x-request-id": f"req_{uuid.uuid4().hex}", **framing}
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Scripted"
        lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self._transport.write("\r\n".join(lines).encode("latin-1"))

    def send(self, data: bytes) -> None:
        """Send bytes that are framed already."""
        self._transport.write(data)

    def send_chunk(self, data: bytes) -> None:
        """Send bytes as one HTTP chunk."""
        self._transport.write(http_chunk(data))

    def end(self) -> None:
        """End a chunked body."""
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection after what was written."""
        self._keep_alive = False
        self._transport.close()

    def reset(self) -> Performance:
        """Give the client the time to read what was sent, then reset the connection."""
        while True:
            yield self._provider.loop.time() + RESET_AFTER
            if self._transport.get_write_buffer_size() == 0:
                break
        # Without lingering, closing the socket sends RST.
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._keep_alive = False
        self._transport.abort()

    def later(self, seconds: float) -> float:
        """Return the loop time some seconds from now."""
        return self._provider.loop.time() + seconds

    def count(self, deltas: int) -> None:
        """Count deltas as sent."""
        self._provider.deltas_sent += deltas
        if self.attempt is not None:
            self.attempt.deltas += deltas

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()


class _BadRequestError(Exception):
    """What arrived cannot be understood; the connection is closed after the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def send_json(connection: Connection, status: int, value: object, headers: Mapping[str, str] = {}) -> Performance:
    """Send a JSON response."""
    body = to_json(value)
    connection.begin(status, {"content-type": "application/json", **headers}, len(body))
    connection.send(body)
    yield from ()


def play(connection: Connection, script: Script, fault: Fault | None, reply: Reply) -> Performance:
    """Play a stream, or the fault that takes its place."""
    if script.delay:
        yield connection.later(script.delay)
    match fault:
        case StatusFault():
            yield from _send_fault(connection, fault)
            return
        case SilentFault(kind="refuse"):
            connection.drop()
            return
        case SilentFault():
            yield NEVER
    if script.raw is not None and fault is None:
        yield from _play_raw(connection, script.raw)
        return

    connection.begin(HTTPStatus.OK, _STREAM_HEADERS)
    if script.first_token_delay:
        yield connection.later(script.first_token_delay)
    total = len(reply.deltas)
    cut = total
    if isinstance(fault, MidwayFault | ErrorEventFault | CommentsFault):
        cut = min(fault.after, total)
        if cut:
            connection.send(reply.opening)
            yield from _send_deltas(connection, script, reply.writes(0, cut, script.chunk_size))
        match fault:
            case CommentsFault():
                until = connection.later(fault.seconds)
                while (due := connection.later(COMMENT_EVERY)) < until:
                    connection.send_chunk(b": keep-alive\n\n")
                    yield due
                yield until
            case MidwayFault(kind="cut"):
                yield from connection.reset()
                return
            case MidwayFault(kind="stall"):
                yield NEVER
            case MidwayFault(kind="garbage"):
                connection.send_chunk(_GARBAGE)
                connection.end()
                return
            case ErrorEventFault():
                connection.send_chunk(sse_event({"error": fault.error}))
                connection.end()
                return
            case MidwayFault():
                connection.end()
                return
        if not cut:
            connection.send(reply.opening)
        yield from _send_deltas(connection, script, reply.writes(cut, total, script.chunk_size))
    else:
        connection.send(reply.opening)
        yield from _send_deltas(connection, script, reply.writes(0, total, script.chunk_size))

    connection.send(reply.finish)
    if isinstance(fault, EndFault) and fault.kind == "cut_after_finish":
        yield from connection.reset()
        return
    if not isinstance(fault, EndFault):
        connection.send(reply.usage)
    connection.send(reply.done)
    connection.end()


def _send_deltas(connection: Connection, script: Script, writes: list[Write]) -> Performance:
    size = script.chunk_size
    if not script.rate:
        for start in range(0, len(writes), BATCH):
            batch = writes[start : start + BATCH]
            stamp = b"%020d " % time.monotonic_ns()
            connection.count(len(batch) * size)
            connection.send(b"".join([stamp.join(segments) for segments in batch]))
            yield NOW
        return
    interval = size / script.rate
    due = connection.later(0)
    for segments in writes:
        connection.count(size)
        connection.send(b"".join(segments) if len(segments) == 1 else (b"%020d " % time.monotonic_ns()).join(segments))
        due += interval  # Counted from the start, so that late wake-ups do not add up.
        yield due


def _send_fault(connection: Connection, fault: StatusFault) -> Performance:
    body = fault.body
    if body is None:
        body = error_body(f"Scripted HTTP status {fault.status}.", "scripted_error", None)
    return send_json(connection, fault.status, body, fault.headers)


def _play_raw(connection: Connection, raw: RawResponse) -> Performance:
    if raw.status == 0:
        connection.drop()
        return
    connection.begin(raw.status, raw.headers)
    for chunk in raw.chunk_bytes():
        yield NOW  # Another round of the loop is another write to the socket.
        connection.send_chunk(chunk)
    yield NOW
    match raw.close:
        case "clean":
            connection.end()
        case "reset":
            yield from connection.reset()
        case "stall":
            yield NEVER


class ScriptedProvider:
    """The server; an asynchronous context manager that listens while it is entered.

    ``api_key``: if given, requests with another key get a 401.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None) -> None:
        self._host = host
        self._port = port
        self._api_key = api_key
        self._server: asyncio.Server | None = None
        self._recorded: deque[RecordedRequest] = deque()
        self._recorded_bytes = 0
        self.loop: asyncio.AbstractEventLoop
        self.ticker: Ticker
        self.connections: set[Connection] = set()
        self.open_streams = 0
        self.deltas_sent = 0
        self.request_count = 0
        self.keys: dict[str, Attempt] = {}  #: The last attempt of each key.

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        self.ticker = Ticker(self.loop)
        self._server = await self.loop.create_server(
            lambda: Connection(self), self._host, self._port, backlog=4096, reuse_address=True
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        self.ticker.close()
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        """The URL to give to an OpenAI client."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/v1"

    @property
    def requests(self) -> list[RecordedRequest]:
        """The latest completion requests, oldest first."""
        return list(self._recorded)

    def reset(self) -> None:
        """Forget requests, attempts and counts; streams under way go on."""
        self._recorded.clear()
        self._recorded_bytes = 0
        self.keys.clear()
        self.deltas_sent = 0
        self.request_count = 0

    def stats(self) -> dict[str, Any]:
        """Return what ``/_stats`` shows."""
        return {
            "open_streams": self.open_streams,
            "connections": len(self.connections),
            "requests": self.request_count,
            "deltas_sent": self.deltas_sent,
            "keys": {key: asdict(attempt) for key, attempt in self.keys.items()},
        }

    def respond(self, connection: Connection, request: RecordedRequest) -> Performance:
        """Return the performance that answers a request."""
        path = request.path.partition("?")[0]
        if path.endswith("/chat/completions"):
            return self._respond_completion(connection, request)
        match request.method, path:
            case "GET", "/healthz":
                return send_json(connection, HTTPStatus.OK, {"status": "ok"})
            case "GET", "/_stats":
                return send_json(connection, HTTPStatus.OK, self.stats())
            case "GET", "/_requests":
                return send_json(connection, HTTPStatus.OK, [_as_json(recorded) for recorded in self._recorded])
            case "POST", "/_reset":
                self.reset()
                return send_json(connection, HTTPStatus.OK, {})
            case "GET", "/v1/models":
                model = {"id": replies.DEFAULT_MODEL, "object": "model", "created": 0, "owned_by": "millrace"}
                return send_json(connection, HTTPStatus.OK, {"object": "list", "data": [model]})
        error = error_body(f"Nothing here for {request.method} {path}.", "invalid_request_error", "unknown_url")
        return send_json(connection, HTTPStatus.NOT_FOUND, error)

    def _respond_completion(self, connection: Connection, request: RecordedRequest) -> Performance:
        self._record(request)
        if request.method != "POST":
            error = error_body("Completions are asked for with POST.", "invalid_request_error")
            return send_json(connection, HTTPStatus.METHOD_NOT_ALLOWED, error, {"allow": "POST"})
        if not self._is_authorised(request.headers):
            error = error_body("Incorrect API key provided.", "invalid_request_error", "invalid_api_key")
            return send_json(connection, HTTPStatus.UNAUTHORIZED, error)
        try:
            body = _decode(request.body)
            script = parse_script(body["script"]) if "script" in body else replies.friendly_script(body)
            prompt_tokens = max(1, len(request.body) // 4)
            stream = bool(body.get("stream"))
            reply = replies.encode_stream(body, script, prompt_tokens)
            completion = {} if stream else replies.plain_completion(body, script, prompt_tokens)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = str(error) if isinstance(error, ValueError) else f"the request is malformed: {error!r}"
            return send_json(
                connection, HTTPStatus.BAD_REQUEST, error_body(message, "invalid_request_error", "invalid_request")
            )
        number = self._begin_attempt(connection, script.key)
        fault = script.fault(number)
        if stream:
            return play(connection, script, fault, reply)
        return _send_completion(connection, script, fault, completion)

    def _is_authorised(self, headers: Mapping[str, str]) -> bool:
        if self._api_key is None:
            return True
        given = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._api_key.encode())

    def _record(self, request: RecordedRequest) -> None:
        self.request_count += 1
        headers = {name: "***" if name in _SECRET_HEADERS else value for name, value in request.headers.items()}
        self._recorded.append(request._replace(headers=headers))
        self._recorded_bytes += len(request.body)
        while len(self._recorded) > MAX_RECORDED or self._recorded_bytes > MAX_RECORDED_BYTES:
            self._recorded_bytes -= len(self._recorded.popleft().body)

    def _begin_attempt(self, connection: Connection, key: str | None) -> int:
        before = self.keys.pop(key, None) if key is not None else None
        attempt = Attempt(attempts=before.attempts + 1 if before else 1, started_ns=time.monotonic_ns())
        connection.attempt = attempt
        self.open_streams += 1
        if key is not None:
            self.keys[key] = attempt
            if len(self.keys) > MAX_KEYS:
                del self.keys[next(iter(self.keys))]
        return attempt.attempts


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise ValueError("the body must be an object with at least one message")
    return value


def _as_json(request: RecordedRequest) -> dict[str, Any]:
    try:
        body = request.json()
    except (ValueError, RecursionError):
        body = None
    return {"method": request.method, "path": request.path, "headers": request.headers, "body": body}


def _send_completion(
    connection: Connection, script: Script, fault: Fault | None, completion: dict[str, Any]
) -> Performance:
    if isinstance(fault, StatusFault | SilentFault) or script.raw is not None:
        yield from play(connection, script, fault, Reply(b"", (), b"", b"", b""))
        return
    if delay := script.delay + script.first_token_delay:
        yield connection.later(delay)
    yield from send_json(connection, HTTPStatus.OK, completion)
