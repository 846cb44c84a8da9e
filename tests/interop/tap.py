"""The tap: forwards the traffic between worker and server, and records the server's answer.

In: bytes from both.
Out: the same bytes, to the other side; the body of the last answer, to the comparison, with its random ids and token
counts.
"""

import contextlib
import http.client
import io
import socket
import socketserver
import threading
from typing import Any, Final, Self, cast

from typing_extensions import override

from tests.cluster import wait_until

_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


class Tap(socketserver.ThreadingTCPServer):
    """A local port that leads to another one. One answer at a time."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.upstream = upstream
        self.kept = bytearray()

    @property
    def port(self) -> int:
        """The port to connect to."""
        return int(self.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, name="tap", daemon=True).start()
        return self

    @override
    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def take_answer(self) -> bytes:
        """Return the body of the answer that has arrived since the last call."""
        wait_until(lambda: self.kept.endswith(_LAST_CHUNK), "the end of the server's answer")
        raw = bytes(self.kept)
        self.kept.clear()
        response = http.client.HTTPResponse(cast("socket.socket", _Recorded(raw)))
        response.begin()
        return response.read()


class _Passage(socketserver.BaseRequestHandler):
    """One connection."""

    @override
    def handle(self) -> None:
        tap = cast("Tap", self.server)
        with socket.create_connection(("127.0.0.1", tap.upstream)) as upstream:
            threading.Thread(target=_pass_on, args=(self.request, upstream, bytearray()), daemon=True).start()
            _pass_on(upstream, self.request, tap.kept)


class _Recorded:
    """As much of a socket as ``HTTPResponse`` needs."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self._raw)


def _pass_on(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            kept += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
