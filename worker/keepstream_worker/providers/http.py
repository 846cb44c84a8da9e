"""Provider HTTP: one request to a provider over the wire, as the transport under the SDK's client.

In: finished HTTP requests, from the SDK by way of httpx2's transport interface.  Out: responses whose
body is read as it arrives, or a ``ProviderFailure``.  Exists so that whatever can go wrong between us
and the provider gets its name in one place, the only one that knows aiohttp: the SDK ships an aiohttp
transport too, but that one reports a dropped connection as a time-out, reads error bodies without a
bound, and cannot tell when a connection stands.
"""

import asyncio
import os
import ssl
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import aiohttp
import httpx2
from typing_extensions import override
from yarl import URL

from keepstream.errors import ErrorCode
from keepstream_worker.providers.failures import failure_from_response
from keepstream_worker.values import Failure

#: Connections that are made at the same time. A burst of a thousand handshakes on one loop would
#: starve all of them until they time out; in small groups each is quick.
_CONNECTING_AT_ONCE: Final = 64
#: Seconds an unused connection is kept: less than the five after which uvicorn and Node close it,
#: so that no request is written into a closing connection.
_KEPT_ALIVE: Final = 4.0
_ERROR_BODY_BYTES: Final = 64 * 1024  #: More of an error page tells nothing more.
_ERROR_BODY_SECONDS: Final = 5.0
_INFLATED_AT_ONCE: Final = 1024 * 1024  #: Bytes; what one read of a compressed body may grow to.
_FIRST_REFUSAL: Final = 300  #: HTTP status; redirects are refusals too: a followed 302 would turn the POST into a GET.
_REQUEST_ID_HEADERS: Final = ("x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "cf-ray")
_REQUEST_ID_LENGTH: Final = 200


class ProviderFailure(Exception):  # noqa: N818  # it carries a Failure
    """The provider, or the way to it, failed. ``failure`` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body, as the SDK made it."""

    method: str
    url: URL
    headers: list[tuple[str, str]]  #: Without the length, which is the body's.


class HttpTransport(httpx2.AsyncBaseTransport):
    """The connections to one provider; made, used and closed on one event loop."""

    def __init__(self, *, tls: ssl.SSLContext, proxy: str | None = None, max_connections: int | None = None) -> None:
        self._proxy = proxy
        self._connecting = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(_take_turn)
        trace.on_connection_create_end.append(_end_turn)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections or 0, ssl=tls, keepalive_timeout=_KEPT_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie set for one tenant's request belongs in no other
            auto_decompress=False,
            trace_configs=[trace],
        )

    @override
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request of the SDK's; the response carries its ``Body`` and its ``Head`` as extensions."""
        head = Head(
            request.method,
            URL(str(request.url), encoded=True),
            [(name, value) for name, value in request.headers.multi_items() if name.lower() != "content-length"],
        )
        body = await self.send(head, request.content, request.extensions["timeout"]["connect"])
        extensions = {"body": body, "head": head}
        return httpx2.Response(body.status, headers=body.raw_headers, stream=body, extensions=extensions)

    async def send(self, head: Head, content: bytes, connect_timeout: float) -> "Body":
        """Send a request; return as soon as the headers of a success have arrived.

        Raises:
            ProviderFailure: there is no answer, or the provider refused.
        """
        turn = _Turn(self._connecting)
        try:
            response = await self._session.request(
                head.method,
                head.url,
                headers=head.headers,
                data=content or None,
                allow_redirects=False,
                proxy=self._proxy,
                # Only connecting is timed here: what comes later is the watchdog's, and cheaper there.
                timeout=aiohttp.ClientTimeout(sock_connect=connect_timeout),
                trace_request_ctx=turn,
            )
        except Exception as error:
            raise ProviderFailure(_failure(error)) from error
        finally:
            turn.end()
        body = Body(response)
        if response.status >= _FIRST_REFUSAL:
            text = await _error_body(body)
            raise ProviderFailure(failure_from_response(response.status, response.headers, text))
        return body

    @override
    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()


class Body(httpx2.AsyncByteStream):
    """The body of one response, decompressed, as it arrives."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        encoding = response.headers.get("content-encoding", "").strip().lower()
        # We ask for no compression; this is for those who compress all the same. What we cannot read
        # (br, zstd) passes as it is: it may be plain text with a wrong label.
        compressed = encoding in {"gzip", "x-gzip", "deflate"}
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32) if compressed else None
        self._pending = b""
        self._more_inside = False

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._response.status

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The headers as they came."""
        return self._response.raw_headers

    @property
    def content_type(self) -> str:
        """The content type as the provider sent it; empty if it sent none."""
        return self._response.headers.get("content-type", "")

    @property
    def request_id(self) -> str | None:
        """The provider's own name for this request."""
        headers = self._response.headers
        found = next((value for name in _REQUEST_ID_HEADERS if (value := headers.get(name))), None)
        return found[:_REQUEST_ID_LENGTH] if found and found.isascii() and found.isprintable() else None

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived; the connection is then free for the next request."""
        return self._response.connection is None

    @property
    def lost(self) -> bool:
        """Whether the connection is gone although the body is not complete.

        A read usually says so itself, but on broken chunk framing aiohttp closes the connection and
        leaves the reader waiting for good.
        """
        connection = self._response.connection
        return connection is not None and connection.transport is None

    async def read(self) -> bytes:
        """Return what has arrived and was not read yet, waiting for some; empty at the end.

        Raises:
            ProviderFailure: the connection broke, or the compressed body is corrupt.
        """
        try:
            if self._inflate is None:
                return await self._content.readany()
            return await self._read_inflated(self._inflate)
        except Exception as error:
            raise ProviderFailure(_failure(error, status=self.status, request_id=self.request_id)) from error

    async def _read_inflated(self, inflate: "zlib._Decompress") -> bytes:
        while True:
            if not self._more_inside:
                self._pending = await self._content.readany()
                if not self._pending:
                    return b""
            data = inflate.decompress(self._pending, _INFLATED_AT_ONCE)
            self._pending = inflate.unconsumed_tail
            self._more_inside = len(data) == _INFLATED_AT_ONCE
            if data:
                return data

    def close(self) -> None:
        """Let go of the connection: reset it if the body is not complete. Harmless when repeated."""
        self._response.close()

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    @override
    async def aclose(self) -> None:
        self.close()


class _Turn:
    """A request's place among those that are connecting; a reused connection needs none."""

    def __init__(self, connecting: asyncio.Semaphore) -> None:
        self._connecting = connecting
        self._taken = False

    async def take(self) -> None:
        await self._connecting.acquire()
        self._taken = True

    def end(self) -> None:
        if self._taken:
            self._taken = False
            self._connecting.release()


async def _take_turn(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    await context.trace_request_ctx.take()


async def _end_turn(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.end()


async def _error_body(body: Body) -> bytes:
    """Return as much of an error's body as arrives whole, in time and within bounds: the status says the rest."""
    parts: list[bytes] = []
    try:
        with suppress(ProviderFailure, TimeoutError):
            async with asyncio.timeout(_ERROR_BODY_SECONDS):
                while sum(map(len, parts)) < _ERROR_BODY_BYTES and (data := await body.read()):
                    parts.append(data)
    finally:
        body.close()
    return b"".join(parts)[:_ERROR_BODY_BYTES]


_NAMED: Final[tuple[tuple[type[Exception], ErrorCode, str], ...]] = (  # the first that fits
    (aiohttp.ClientConnectorDNSError, ErrorCode.CONNECTION, "the provider's host name cannot be resolved"),
    (aiohttp.ClientConnectorCertificateError, ErrorCode.CONNECTION, "the provider's TLS certificate is not valid"),
    (aiohttp.ClientSSLError, ErrorCode.CONNECTION, "the TLS handshake with the provider failed"),
    (ssl.SSLError, ErrorCode.CONNECTION, "the TLS connection to the provider failed"),
    (aiohttp.ClientProxyConnectionError, ErrorCode.CONNECTION, "the proxy cannot be reached"),
    (aiohttp.ClientHttpProxyError, ErrorCode.CONNECTION, "the proxy did not connect to the provider"),
    (TimeoutError, ErrorCode.TIMEOUT, "no connection to the provider within the limit"),
    (aiohttp.ServerDisconnectedError, ErrorCode.CONNECTION, "the provider closed the connection without an answer"),
    (aiohttp.ClientPayloadError, ErrorCode.CONNECTION, "the connection broke before the answer was complete"),
    (aiohttp.ClientResponseError, ErrorCode.CONNECTION, "the provider's answer is not HTTP"),
    (zlib.error, ErrorCode.CONNECTION, "the compressed answer is corrupt"),
    (OSError, ErrorCode.CONNECTION, "the connection to the provider failed"),
    (aiohttp.ClientError, ErrorCode.CONNECTION, "the connection to the provider failed"),
    (Exception, ErrorCode.INTERNAL, "unexpected failure of the request to the provider"),
)


def _failure(error: Exception, *, status: int | None = None, request_id: str | None = None) -> Failure:
    """Name what aiohttp, the system or zlib raised. The words are ours: theirs may hold addresses and headers."""
    code, message = next((code, message) for kind, code, message in _NAMED if isinstance(error, kind))
    detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return Failure(code=code, message=f"{message} ({detail})", http_status=status, provider_request_id=request_id)
