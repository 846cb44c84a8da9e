"""A TCP proxy that can be cut, so that one client loses a server that all others still reach.

In: a server's port.
Out: a port that leads to it until the proxy is cut, or leads elsewhere; how many connections were asked for.
"""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Final, Self

_PIECE: Final = 65_536


class TcpProxy:
    """Forwards connections to a local port; a context manager that listens while it is entered."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self.asked = 0  #: Connections that clients have asked for.
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        self._open.clear()
        while self._sockets:
            with contextlib.suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def lead_to(self, target: int) -> None:
        """Break all connections; new ones lead to another port."""
        self.cut()
        self._target = target
        self.mend()

    def mend(self) -> None:
        """Let new connections through again."""
        self._open.set()

    def divert(self, target: int) -> None:
        """Let new connections lead to another port; those that there are stay."""
        self._target = target

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.asked += 1
                if not self._open.is_set():
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
