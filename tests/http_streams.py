"""A stream of server-sent events as a careful reader of bytes sees it: what was sent, and whether the end was clean.

In: an address, a path, headers.  Out: status, headers, bytes as they come; the raw socket, for readers that misbehave.
"""

import socket
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from typing import Self

PATIENCE = 60.0  #: Seconds for which a reader waits for anything at all.


class HttpStream:
    """One GET request whose answer is read piece by piece."""

    def __init__(
        self, port: int, path: str, headers: Mapping[str, str] | None = None, *, receive_buffer: int | None = None
    ) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        if receive_buffer is not None:  # before it connects, or the window is as large as usual
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(PATIENCE)
            sock.connect(("127.0.0.1", port))
            self._connection.sock = sock
        self._connection.request("GET", path, headers=dict(headers or {}))
        self._response: HTTPResponse | None = None
        self.received = b""
        self.ended_cleanly = False
        self._left = b""

    @property
    def response(self) -> HTTPResponse:
        """The head of the answer."""
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    def read_until(self, mark: bytes) -> bytes:
        """Read until ``mark`` has come; return all that has been received so far."""
        while mark not in self.received:
            piece = self.response.read1(65_536)
            assert piece, f"the stream ended before {mark!r}: {self.received[-300:]!r}"
            self.received += piece
        return self.received

    def read_to_the_end(self) -> bool:
        """Read all that comes; return whether the end was clean."""
        try:
            while piece := self.response.read1(65_536):
                self.received += piece
        except (IncompleteRead, ConnectionError):
            return False
        return True

    def read_frame(self) -> bytes | None:
        """Read one server-sent event or comment; None: the stream has ended, and ``ended_cleanly`` says how."""
        while b"\n\n" not in self._left:
            try:
                piece = self.response.read1(65_536)
            except (IncompleteRead, ConnectionError):
                return None
            if not piece:
                self.ended_cleanly = True
                return None
            self._left += piece
        frame, _, self._left = self._left.partition(b"\n\n")
        return frame

    def close(self) -> None:
        """Leave."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
