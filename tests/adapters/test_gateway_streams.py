"""Streams over real sockets: slow, silent, absent and too many readers, and a server that stops."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keepstream.errors import JobNotFoundError
from keepstream_gateway.access.rights import Access
from keepstream_gateway.envelope import Envelope
from keepstream_gateway.metrics import Metrics
from keepstream_gateway.server import _Protocol
from keepstream_gateway.settings import load_settings
from keepstream_gateway.streaming import Shortcut, Streams
from tests.cluster import wait_until
from tests.http_streams import HttpStream

FRAME = b"data: x\n\n"


class Bodies:
    """Wraps an application, and counts what it sends after its heads."""

    count = 0

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            Bodies.count += message["type"] == "http.response.body"
            await send(message)

        await self._app(scope, receive, send_counted)


class Server:
    """A server whose streams the test writes."""

    def __init__(self, **settings: Any) -> None:
        self.metrics = Metrics()
        self.revoked: set[str] = set()
        self.streams = Streams(load_settings({}, **settings), self.metrics, self._is_known)
        self.closed = 0  #: Frames that have been closed.
        self.farewell: bytes | None = None
        self._queues: list[asyncio.Queue[bytes | Exception | None]] = []
        self._shortcuts: list[Shortcut] = []
        envelope = Middleware(Envelope, self.metrics, {})
        app = Starlette(routes=[Route("/stream", self._answer)], middleware=[Middleware(Bodies), envelope])
        config = uvicorn.Config(app, port=0, http=_Protocol, ws="none", log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self.streams.start()
            await self._server.serve()

        asyncio.run(serve())

    async def _answer(self, request: Request) -> Response:
        access = Access("default", request.query_params.get("key", "key"))
        self._shortcuts.append(Shortcut())
        return await self.streams.answer(
            access, self._frames(), farewell=lambda _: self.farewell, shortcut=self._shortcuts[-1]
        )

    async def _is_known(self, key_id: str) -> bool:
        return key_id not in self.revoked

    async def _frames(self) -> AsyncGenerator[bytes]:
        queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._queues.append(queue)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1

    def send(self, item: bytes | Exception | None, stream: int = 0) -> None:
        """Give a stream its next frame, an error, or its end."""
        wait_until(lambda: len(self._queues) > stream, "the request")
        self._loop.call_soon_threadsafe(self._queues[stream].put_nowait, item)

    def write(self, frame: bytes) -> bool:
        """Give the first stream a frame by its shortcut; return whether it took it."""
        wait_until(lambda: bool(self._queues), "the request")

        async def write() -> bool:
            return self._shortcuts[0].write(frame)

        return asyncio.run_coroutine_threadsafe(write(), self._loop).result(60)

    def stop_streams(self) -> None:
        """End all streams as when the gateway stops."""
        asyncio.run_coroutine_threadsafe(self.streams.stop(), self._loop).result(60)

    def count(self, name: str, **labels: str) -> float:
        """Return what the metrics say."""
        return self.metrics._registry.get_sample_value(f"keepstream_gateway_{name}", labels) or 0.0

    def wait_for_end(self, how: str) -> None:
        """Wait until one stream has ended so, and has let go of everything."""
        wait_until(lambda: self.count("streams_ended_total", how=how) == 1, f"a stream to have {how}")
        assert self.count("followers") == 0
        assert self.closed == 1

    @property
    def connections(self) -> set[Any]:
        """The connections that are open."""
        return self._server.server_state.connections

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(60)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(**getattr(request, "param", {}))
    yield server
    server.close()


def open_stream(server: Server, path: str = "/stream", **options: Any) -> HttpStream:
    return HttpStream(server.port, path, **options)


def test_frames_go_past_what_is_wrapped_around_the_application(server: Server) -> None:
    Bodies.count = 0
    with open_stream(server) as reader:
        for _ in range(5):
            server.send(FRAME)
        server.send(None)
        assert reader.read_to_the_end()
        assert reader.received == 5 * FRAME
    assert Bodies.count == 1  # the end


def test_frames_arrive_as_they_are_and_the_head_keeps_proxies_from_holding_them_back(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(FRAME)
        assert reader.read_until(FRAME) == FRAME
        assert reader.response.status == 200
        assert reader.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reader.response.headers["cache-control"] == "no-cache, no-transform"
        assert reader.response.headers["x-accel-buffering"] == "no"
        assert reader.response.headers["x-request-id"]
        server.send(b"data: y\n\n")
        server.send(None)
        assert reader.read_to_the_end()
        assert reader.received == FRAME + b"data: y\n\n"
    server.wait_for_end("finished")


def test_a_frame_can_take_a_shortcut_once_the_first_one_is_sent(server: Server) -> None:
    Bodies.count = 0
    with open_stream(server) as reader:
        assert not server.write(b"data: early\n\n")
        server.send(FRAME)
        reader.read_until(FRAME)
        assert server.write(b"data: 2\n\n")
        assert server.write(b"data: 3\n\n")
        reader.read_until(b"data: 3\n\n")
        server.send(b"data: 4\n\n")
        reader.read_until(b"data: 4\n\n")
        assert server.write(b"data: 5\n\n")
        server.send(None)
        assert reader.read_to_the_end()
        assert reader.received == FRAME + b"".join(b"data: %d\n\n" % n for n in (2, 3, 4, 5))
    assert Bodies.count == 1  # the end
    server.wait_for_end("finished")


def test_the_shortcut_is_closed_while_the_connection_takes_no_more(server: Server) -> None:
    big = [b"data: %d" % n + b"x" * 100_000 + b"\n\n" for n in range(200)]
    with open_stream(server, receive_buffer=4096) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
        taken = next(n for n, frame in enumerate(big) if not server.write(frame))
        server.send(big[taken])  # the stream waits with it until there is room
        wait_until(lambda: any(stream._sending_since for stream in server.streams._open), "a full connection")
        assert not server.write(b"data: too early\n\n")
        reader.read_until(big[taken])
        assert server.write(b"data: again\n\n")
        reader.read_until(b"data: again\n\n")
        assert reader.received == FRAME + b"".join(big[: taken + 1]) + b"data: again\n\n"


def test_a_frame_by_the_shortcut_breaks_the_silence(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
        (stream,) = server.streams._open
        before = stream._sent_at
        assert server.write(FRAME)
        assert stream._sent_at > before


def test_nothing_is_written_after_the_end(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
        (stream,) = server.streams._open
        server.send(None)
        assert reader.read_to_the_end()
        server.wait_for_end("finished")
        assert not server.write(FRAME)
        stream.look(time.monotonic() + 1e6, 15.0, 30.0)
        reader._connection.request("GET", "/none")  # by the same connection
        assert reader._connection.getresponse().status == 404


def test_the_shortcut_to_a_reader_that_has_left_leads_nowhere(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
    server.wait_for_end("left")
    assert not server.write(FRAME)


def test_an_error_before_the_first_frame_has_its_own_status(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(JobNotFoundError("no"))
        assert reader.response.status == 404
    assert server.closed == 1
    assert server.count("followers") == 0


def test_frames_that_end_without_any_are_no_content(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(None)
        assert reader.response.status == 204
    assert server.closed == 1
    assert server.count("followers") == 0


def test_the_head_comes_without_a_frame_after_a_moment(server: Server) -> None:
    with open_stream(server) as reader:
        assert reader.response.status == 200
        server.send(FRAME)
        assert reader.read_until(FRAME) == FRAME


@pytest.mark.parametrize("server", [{"ping": 0.2}], indirect=True)
def test_silence_is_broken_by_comments(server: Server) -> None:
    with open_stream(server) as reader:
        reader.read_until(b": ping\n\n: ping\n\n")
        server.send(FRAME)
        reader.read_until(FRAME)


def test_a_reader_that_leaves_frees_its_place(server: Server) -> None:
    with open_stream(server) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
        assert server.count("followers") == 1
    server.wait_for_end("left")


@pytest.mark.parametrize("server", [{"drain_timeout": 5.0}], indirect=True)
def test_a_reader_that_reads_nothing_is_given_up_and_harms_nobody(server: Server) -> None:
    big = b"data: " + b"x" * 100_000 + b"\n\n"
    with open_stream(server, receive_buffer=4096) as lazy, open_stream(server, "/stream?key=other") as keen:
        wait_until(lambda: len(server._queues) == 2, "both requests")
        for _ in range(200):
            server.send(big, 0)
            server.send(FRAME, 1)
        server.send(None, 1)
        assert keen.read_to_the_end()
        assert len(keen.received) in {200 * len(FRAME), 200 * len(big)}
        wait_until(lambda: server.count("streams_ended_total", how="given_up") == 1, "the lazy reader to be given up")
        wait_until(lambda: server.closed == 2, "its frames to be closed")
        assert not lazy.read_to_the_end()
        assert len(lazy.received) < 100 * len(big)


@pytest.mark.parametrize("server", [{"max_followers": 3, "max_followers_per_key": 2}], indirect=True)
def test_too_many_are_refused_with_a_time_to_come_back(server: Server) -> None:
    readers = [open_stream(server, f"/stream?key={key}") for key in "aab"]
    assert [reader.response.status for reader in readers] == [200, 200, 200]
    for key, whose in (("a", "this gateway may have 3"), ("c", "this gateway may have 3")):
        with open_stream(server, f"/stream?key={key}") as refused:
            assert refused.response.status == 429
            assert int(refused.response.headers["retry-after"]) >= 1
            assert whose.encode() in refused.response.read()
    readers.pop().close()
    wait_until(lambda: server.count("followers") == 2, "a free place")
    with open_stream(server, "/stream?key=a") as refused:
        assert refused.response.status == 429
        assert b"this key may have 2" in refused.response.read()
    with open_stream(server, "/stream?key=c") as reader:
        assert reader.response.status == 200
    for reader in readers:
        reader.close()
    assert server.count("followers_refused_total") == 3


@pytest.mark.parametrize("farewell", [b": the gateway stops\n\n", None], ids=["clean", "broken off"])
@pytest.mark.parametrize("cause", ["error", "stop"])
def test_a_stream_that_does_not_come_to_its_end_says_farewell_or_breaks_off(
    server: Server, farewell: bytes | None, cause: str
) -> None:
    server.farewell = farewell
    with open_stream(server) as reader:
        server.send(FRAME)
        reader.read_until(FRAME)
        if cause == "error":
            server.send(JobNotFoundError("gone"))
        else:
            server.stop_streams()
        assert reader.read_to_the_end() is (farewell is not None)
        assert reader.received == FRAME + (farewell or b"")
    server.wait_for_end("failed" if cause == "error" else "stopped")


@pytest.mark.parametrize("endless", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\n"])
def test_a_head_without_an_end_is_cut_off(server: Server, endless: bytes) -> None:
    more = b"X: y\r\n" * 1000 if endless.endswith(b"\n") else b"x" * 6000
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock, pytest.raises(ConnectionError):
        sock.sendall(endless + more * 10_000)
    with open_stream(server) as reader:
        assert reader.response.status == 200


@pytest.mark.parametrize(
    ("begun", "more"),
    [(b"0\r\n", b"a:b\r\n"), (b"0\r\nA: ", b"x"), (b"1;", b"x")],
    ids=["headers after the body", "one of them", "what a piece's size may be followed by"],
)
def test_what_is_no_part_of_a_body_is_cut_off_if_it_does_not_end(server: Server, begun: bytes, more: bytes) -> None:
    head = b"POST /none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    endless = head + begun + more * (18_000_000 // len(more))
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock, pytest.raises(ConnectionError):
        sock.sendall(endless)
    with open_stream(server) as reader:
        assert reader.response.status == 200


def test_headers_after_a_body_are_none_of_the_requests(server: Server) -> None:
    piece = b"100\r\n" + b"a" * 0x100 + b"\r\n"
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(2):
        connection.putrequest("POST", "/none", skip_accept_encoding=True)
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(piece * 400 + b"0\r\nAuthorization: x\r\nX: y\r\n\r\n")  # more than a head may have
        answer = connection.getresponse()
        assert answer.status == 404
        answer.read()
        wait_until(lambda: not any(each._has_head for each in server.connections), "the end of the body")
        (names,) = [[name for name, _ in each.headers] for each in server.connections]
        assert names == [b"host", b"transfer-encoding"]
    connection.close()


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr("keepstream_gateway.server._REST_SECONDS", 1.0)
    for beginning in (b"", b"GET /stream HTTP/1.1\r\nHo"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            sock.sendall(beginning)
            with suppress(ConnectionError):
                assert sock.recv(1) == b""
    # Nor is a further one on a connection; what streams is left alone.
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(b"GET /none HTTP/1.1\r\nHost: x\r\n\r\nGET /none HTTP/1.1\r\nHo")
        received = b""
        with suppress(ConnectionError):
            while piece := sock.recv(1000):
                received += piece
        assert received.count(b"HTTP/1.1 404") == 1
    with open_stream(server) as reader:
        wait_until(lambda: server.count("followers") == 1, "the stream")
        for _ in range(5):
            server.send(FRAME)
            time.sleep(0.3)  # longer, in all, than a head may take
        server.send(None)
        assert reader.read_to_the_end()


def test_the_rest_of_a_body_is_not_waited_for_once_the_answer_is_sent(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """Whoever sends one of many bytes now and then holds no connection: uvicorn's own time begins with the answer."""
    monkeypatch.setattr("keepstream_gateway.server._REST_SECONDS", 0.3)
    head = b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(head + b"x")
        with suppress(ConnectionError):
            assert sock.recv(4096).startswith(b"HTTP/1.1 404")
            sock.sendall(b"x")  # from here on uvicorn waits for ever
            while sock.recv(1000):
                pass
    wait_until(lambda: not server.connections, "the connection to be gone")
    # One that comes whole, though late, ends nothing.
    monkeypatch.setattr("keepstream_gateway.server._REST_SECONDS", 60.0)
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(2):
        connection.putrequest("POST", "/none")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"x")
        answer = connection.getresponse()
        assert answer.status == 404
        answer.read()
        wait_until(lambda: [each._timer is None for each in server.connections] == [False], "the rest to be expected")
        connection.send(b"x" * 999)
        wait_until(lambda: [each._timer is None for each in server.connections] == [True], "the rest to be read")
    connection.close()


async def test_a_request_that_is_cancelled_while_it_lets_go_keeps_no_gateway_from_stopping() -> None:
    """As the server does when the time for its requests is over."""
    closing = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes]:
        try:
            yield FRAME
            await asyncio.Event().wait()
        finally:
            closing.set()
            await asyncio.Event().wait()

    async def known(_: str) -> bool:
        return True

    left: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if message.get("body") == FRAME:
            left.set_result({"type": "http.disconnect"})

    metrics = Metrics()
    streams = Streams(load_settings({}), metrics, known)
    response = await streams.answer(Access("default", "key"), frames(), farewell=lambda _: None)
    request = asyncio.create_task(response({"type": "http", "method": "GET"}, lambda: left, send))
    async with asyncio.timeout(60):
        await closing.wait()
        request.cancel()
        await asyncio.wait([request])
        await streams.stop()
    assert request.cancelled()
    assert sent


def test_streams_of_a_revoked_key_are_ended_and_no_others(server: Server) -> None:
    server.farewell = b": bye\n\n"
    with open_stream(server, "/stream?key=a") as ended, open_stream(server, "/stream?key=b") as left:
        for stream in range(2):
            server.send(FRAME, stream)
        ended.read_until(FRAME)
        server.revoked.add("a")
        assert ended.read_to_the_end()
        assert ended.received.endswith(b": bye\n\n")
        server.send(FRAME, 1)
        left.read_until(FRAME + FRAME)


def test_who_stops_refuses_new_streams_and_ends_those_that_read_nothing(server: Server) -> None:
    server.farewell = b": bye\n\n"
    with open_stream(server, receive_buffer=4096) as lazy:
        wait_until(lambda: len(server._queues) == 1, "the request")
        for _ in range(200):
            server.send(b"data: " + b"x" * 100_000 + b"\n\n")
        wait_until(lambda: any(stream._sending_since for stream in server.streams._open), "a full connection")
        server.stop_streams()
        with open_stream(server) as refused:
            assert refused.response.status == 503
        assert not lazy.read_to_the_end()
