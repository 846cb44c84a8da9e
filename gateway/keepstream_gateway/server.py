"""The server: uvicorn, with a graceful end.

In: settings.  Out: a process that serves until SIGTERM or Ctrl-C, and its exit code.

On SIGTERM it listens no more, ends all streams so that their readers resume at another gateway, and lets other requests
come to their end for some seconds.
"""

import asyncio
import gc
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from socket import socket
from typing import Final, NoReturn

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from keepstream.errors import InvalidSettingError
from keepstream_gateway.app import make_app
from keepstream_gateway.context import Context
from keepstream_gateway.logs import configure_logging, get_logger
from keepstream_gateway.settings import Settings, SettingsError, load_settings
from keepstream_gateway.streaming import ABORT, WRITE

log = get_logger()

#: Of a request's line and headers; also of what may come between two pieces of its body, or after the last one.
_HEAD_BYTES: Final = 65_536
#: Seconds from a connection, or the first byte of a further request, to the end of the head; and from an answer to the
#: end of a body that it did not wait for.
_REST_SECONDS: Final = 30.0
_BACKLOG: Final = 4096  #: Connections that may wait to be accepted; after a failure elsewhere all readers come at once.


class StartError(Exception):
    """The gateway cannot start; the message is one line that says what to do, and holds no secret."""


def serve(settings: Settings) -> int:
    """Serve until the process is told to stop; return its exit code.

    Raises:
        StartError: a URL cannot be used, or the address cannot be listened on.
    """
    configure_logging(settings.log_level, settings.log_format)
    _allow_many_connections()
    try:
        app, context = make_app(settings)
    except InvalidSettingError as error:
        raise StartError(str(error)) from None
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing depends on who the peer is
        backlog=_BACKLOG,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace)),
    )
    server = _Server(config, context)
    _collect_less_often()
    try:
        server.run()
    except KeyboardInterrupt:
        pass  # it has ended gracefully by then
    except SystemExit:
        message = f"{settings.host}:{settings.port} cannot be listened on; set KEEPSTREAM_GATEWAY_PORT or --port"
        raise StartError(message) from None
    return 0


class _Protocol(HttpToolsProtocol):
    """Bounds what uvicorn leaves open: the size of a request's head, the time in which it comes, and its body's rest.

    Headers that come after a body in pieces are dropped: nobody looks at them, and uvicorn would keep as many as come,
    and show them as if they had stood in the head.

    It also lets a response write past the application, and end its connection although not all has been read.
    """

    _bytes = 0  #: Received since the last request, or the last piece of this one's body.
    _has_head = False  #: Whether the present request's head is complete.
    _timer: asyncio.TimerHandle | None = None  #: Ends the connection if what has begun does not come to its end.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_the_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes > _HEAD_BYTES + len(data):  # a piece of what is received may go on with a body
            self.transport.abort()
            return
        if not self._has_head and self._timer is None:  # the first of a further request on this connection
            self._expect_the_rest()
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None:
            self.scope["extensions"][WRITE] = partial(self._write, self.cycle)  # type: ignore[assignment]

    def _write(self, cycle: RequestResponseCycle, body: bytes) -> bool:
        """Send a part of a response's body, as ``cycle.send`` does; False: not now, or not so."""
        takes_no_more = self.flow.write_paused or self.transport.is_closing()
        if takes_no_more or not cycle.chunked_encoding or cycle.response_complete or not body:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()
        self._has_head, self._bytes = False, 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_head and self._timer is None:  # what is left of the body is nobody's
            self._expect_the_rest()

    def _expect_the_rest(self) -> None:
        self._timer = self.loop.call_later(_REST_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]  # a call is what is needed


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        listening: Sequence[socket] = self.servers[0].sockets
        log.info("gateway_started", host=self.config.host, port=listening[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        log.info("gateway_stopping")
        for server in self.servers:  # before the streams end: their readers must not come back here
            server.close()
        stop = asyncio.ensure_future(self._context.streams.stop())
        await super().shutdown(sockets)
        await stop
        log.info("gateway_stopped")

    def handle_exit(self, sig: int, frame: object) -> None:
        """Called for a signal: a second one ends at once what still goes on."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _allow_many_connections() -> None:
    """Raise the number of open files as far as we may: each reader is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _collect_less_often() -> None:
    """Let the garbage collector look at new objects less often, and never at those that a gateway begins with.

    While it looks at the objects of thousands of streams, all of them stand still for a quarter of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def main() -> NoReturn:
    """Serve as the environment says."""
    try:
        code = serve(load_settings())
    except (SettingsError, StartError) as error:
        raise SystemExit(f"keepstream: {error}") from None
    sys.exit(code)
