"""Provider HTTP: the transport, built on aiohttp.

In: finished HTTP requests, from the provider module.
Out: responses whose body is read as it arrives, or a ``ProviderFailure`` that names what went wrong.

The SDK ships an aiohttp transport of its own, but it reports a dropped connection as a time-out, reads error bodies
without a bound, and does not say when a connection is established.
"""

import asyncio
import os
import re
import ssl
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import aiohttp
import httpx2
from aiohttp import compression_utils
from typing_extensions import override
from yarl import URL

from keepstream.errors import ErrorCode
from keepstream_worker.limits import RateLimits
from keepstream_worker.providers.failures import failure_from_response
from keepstream_worker.providers.rate_headers import read_rate_limits
from keepstream_worker.values import Failure

#: Connections opened at the same time. A thousand handshakes at once on one loop would starve each other until they
#: time out; in small groups each is quick.
_CONNECTING_AT_ONCE: Final = 64
#: Seconds an idle connection is kept: less than the five after which uvicorn and Node close it, so that no request is
#: written to a connection that is about to close.
_KEEP_ALIVE_SECONDS: Final = 4.0
_ERROR_BODY_BYTES: Final = 64 * 1024  #: Reading more of an error page adds nothing.
_ERROR_BODY_SECONDS: Final = 5.0
_MAX_INFLATED_BYTES: Final = 1024 * 1024  #: What one read of a compressed body may expand to.
_ZLIB_HEADER: Final = 2  #: Bytes.
_FIRST_ERROR_STATUS: Final = 300  #: Other redirects are errors too: following a 302 would turn the POST into a GET.
_SAME_REQUEST: Final = frozenset({307, 308})  #: Redirects that ask for the same method and body at another address.
_MAX_REDIRECTS: Final = 5
_HOST: Final = re.compile(r"[a-z0-9.\-]{1,253}")
_REQUEST_ID_HEADERS: Final = ("x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "cf-ray")
_REQUEST_ID_LENGTH: Final = 200


class ProviderFailure(Exception):  # noqa: N818  # it carries a Failure
    """The provider, or the connection to it, failed. ``failure`` says how, ``body`` is that of the refusal, if any."""

    def __init__(self, failure: Failure, body: bytes = b"") -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.body = body


@dataclass(frozen=True, slots=True)
class Head:
    """Method, URL and headers of a request, as the SDK built them."""

    method: str
    url: URL
    headers: list[tuple[str, str]]  #: Without the content length, which depends on the body, and without a key.


class HeadRecorder(httpx2.AsyncBaseTransport):
    """A transport for the SDK that sends nothing: the response carries the ``Head`` of the request as an extension."""

    @override
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        head = Head(
            request.method,
            URL(str(request.url), encoded=True),
            [(name, value) for name, value in request.headers.multi_items() if name.lower() != "content-length"],
        )
        return httpx2.Response(200, extensions={"head": head})


class _Connector(aiohttp.TCPConnector):
    """Opens no more than so many connections at the same time; one that is open already is free to be used again."""

    def __init__(self, *, limit: int, ssl: ssl.SSLContext, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, ssl=ssl, keepalive_timeout=keepalive_timeout)
        self._opening = asyncio.Semaphore(_CONNECTING_AT_ONCE)

    @override
    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> Any:
        # aiohttp has no other place for it: its signals tell of a beginning, but not of every end.
        async with self._opening:
            return await super()._create_connection(req, traces, timeout)


@cache
def _timeout(connect: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(sock_connect=connect)


class HttpTransport:
    """The connections to one provider. Created, used and closed on one event loop."""

    def __init__(self, *, tls: ssl.SSLContext, proxy: str | None = None, max_connections: int | None = None) -> None:
        self._proxy = proxy
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=max_connections or 0, ssl=tls, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),  # a cookie set for one tenant's request must not reach another's
            auto_decompress=False,
        )

    async def send(
        self, head: Head, content: bytes, connect_timeout: float, refused: Callable[[], None] | None = None
    ) -> "Body":
        """Send a request; return as soon as the headers of a successful response have arrived.

        A redirect that keeps method and body (307, 308) is followed, as long as the host stays the same and TLS is not
        given up: the request carries the key.

        Args:
            head: Method, URL and headers.
            content: The request body.
            connect_timeout: Seconds to establish a connection, TLS included.
            refused: Called when the provider has answered with anything but a success; what it says of it is awaited
                for a bounded time.

        Raises:
            ProviderFailure: there is no response, or the provider refused the request.
        """
        url = head.url
        redirects = 0
        while True:
            response = await self._request(head, url, content, connect_timeout)
            body = Body(response)
            if response.status < _FIRST_ERROR_STATUS:
                return body
            if refused is not None:
                refused()
            text = await _error_body(body)
            location = response.headers.get("location")
            if response.status not in _SAME_REQUEST or not location:
                raise ProviderFailure(failure_from_response(response.status, response.headers, text), text)
            target = _joined(url, location)
            if target is None or not _same_place(url, target):
                raise ProviderFailure(_redirect_refused(body, target))
            if redirects == _MAX_REDIRECTS:
                message = f"the provider redirects more than {_MAX_REDIRECTS} times"
                raise ProviderFailure(_redirect_failure(body, message))
            redirects += 1
            url = target

    async def _request(self, head: Head, url: URL, content: bytes, connect_timeout: float) -> aiohttp.ClientResponse:
        try:
            return await self._session.request(
                head.method,
                url,
                headers=head.headers,
                data=content or None,
                allow_redirects=False,
                proxy=self._proxy,
                # Only connecting is timed here; the watchdog times everything else, more cheaply.
                timeout=_timeout(connect_timeout),
            )
        except Exception as error:
            raise ProviderFailure(_failure(error)) from error

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()


class Body:
    """The body of one response, decompressed as it arrives."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        # We ask for no compression, but some servers compress anyway.
        given = (name.strip() for name in response.headers.get("content-encoding", "").lower().split(","))
        encoding = ",".join(name for name in given if name != "identity")
        self._inflater = _Inflater(encoding) if encoding in _READABLE_ENCODINGS else None

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._response.status

    @property
    def content_type(self) -> str:
        """The content type as sent by the provider; empty if there was none."""
        return self._response.headers.get("content-type", "")

    @property
    def request_id(self) -> str | None:
        """The provider's id for this request."""
        headers = self._response.headers
        found = next((value for name in _REQUEST_ID_HEADERS if (value := headers.get(name))), None)
        return found[:_REQUEST_ID_LENGTH] if found and found.isascii() and found.isprintable() else None

    @property
    def rate_limits(self) -> RateLimits | None:
        """What the provider says about its limits."""
        return read_rate_limits(self._response.headers)

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived; the connection is then free for the next request."""
        return self._response.connection is None

    @property
    def lost(self) -> bool:
        """Whether the connection was lost before the body was complete.

        A read usually raises then, but on broken chunk framing aiohttp closes the connection and leaves the reader
        waiting forever.
        """
        connection = self._response.connection
        return connection is not None and connection.transport is None

    async def read(self) -> bytes:
        """Return the bytes that have arrived, waiting for at least one; empty at the end.

        Raises:
            ProviderFailure: the connection broke, or the compressed body is corrupt.
        """
        try:
            if self._inflater is None:
                return await self._content.readany()
            return await self._read_inflated(self._inflater)
        except Exception as error:
            raise ProviderFailure(_failure(error, status=self.status, request_id=self.request_id)) from error

    async def _read_inflated(self, inflater: "_Inflater") -> bytes:
        while True:
            compressed = b""
            if not inflater.has_more and not (compressed := await self._content.readany()):
                return b""
            if data := inflater.inflate(compressed):
                return data

    def close(self) -> None:
        """Release the connection, resetting it if the body is incomplete. May be repeated."""
        self._response.close()


#: What we can decompress. Anything else is passed on as it is: it may be plain text with a wrong label.
_READABLE_ENCODINGS: Final = frozenset(
    {"gzip", "x-gzip", "deflate"}
    | ({"br"} if compression_utils.HAS_BROTLI else set())
    | ({"zstd"} if compression_utils.HAS_ZSTD else set())
)


class _Inflater:
    """Decompresses one body, a bounded amount at a time. A gzip or zstd body may have several members."""

    def __init__(self, encoding: str) -> None:
        self._beginning = b""  # what came before it was clear how to read it
        self._plain: bool | None = None if encoding == "br" else False  # whether it is text with a wrong label
        self._decompressor: compression_utils.DecompressionBaseHandler | None = None
        if encoding == "br":
            self._decompressor = compression_utils.BrotliDecompressor()
        elif encoding == "zstd":
            self._decompressor = compression_utils.ZSTDDecompressor()
        elif encoding != "deflate":
            self._decompressor = compression_utils.ZLibDecompressor("gzip")

    @property
    def has_more(self) -> bool:
        """Whether ``inflate`` has more to give without further input."""
        return self._decompressor is not None and not self._plain and self._decompressor.data_available

    def inflate(self, compressed: bytes) -> bytes:
        """Return the next bytes, perhaps none.

        Raises:
            Exception: the body is corrupt; the type depends on the library.
        """
        if self._decompressor is None:
            self._beginning += compressed
            if len(self._beginning) < _ZLIB_HEADER:
                return b""
            compressed = self._beginning
            # "deflate" means the zlib format, but some servers send the raw one, which has no header.
            headless = compressed[0] & 0x0F != 8 or int.from_bytes(compressed[:_ZLIB_HEADER]) % 31 != 0
            self._decompressor = compression_utils.ZLibDecompressor("deflate", suppress_deflate_header=headless)
        if self._plain is not None:
            return compressed if self._plain else self._decompressor.decompress_sync(compressed, _MAX_INFLATED_BYTES)
        # Brotli has no mark at its beginning: it is text if it cannot be decompressed.
        self._beginning += compressed
        try:
            data = self._decompressor.decompress_sync(compressed, _MAX_INFLATED_BYTES)
        except Exception:  # noqa: BLE001  # the library's error, of which there are two
            self._plain = True
            return self._beginning
        if data:
            self._plain, self._beginning = False, b""
        return data


def _joined(url: URL, location: str) -> URL | None:
    """Return the address that a redirect names, or None if it is none."""
    try:
        target = url.join(URL(location, encoded=True))
        return target if target.scheme in {"http", "https"} and target.host else None
    except ValueError:
        return None


def _same_place(url: URL, target: URL) -> bool:
    """Return whether a redirect leads to the same server, or from plain HTTP to TLS on the same host."""
    if target.host != url.host or target.user is not None:
        return False
    return (target.scheme, target.port) == (url.scheme, url.port) or (url.scheme, target.scheme) == ("http", "https")


def _redirect_refused(body: "Body", target: URL | None) -> Failure:
    host = (target.host or "") if target is not None else ""
    named = (
        f"{target.scheme}://{host}:{target.port}" if target is not None and _HOST.fullmatch(host) else "another host"
    )
    return _redirect_failure(body, f"the provider redirects to {named}, where the key must not go; correct its URL")


def _redirect_failure(body: "Body", message: str) -> Failure:
    code = ErrorCode.BAD_REQUEST
    return Failure(code=code, message=message, http_status=body.status, provider_request_id=body.request_id)


async def _error_body(body: Body) -> bytes:
    """Return as much of an error body as arrives in time and within bounds; the status alone is enough otherwise."""
    parts: list[bytes] = []
    try:
        with suppress(ProviderFailure, TimeoutError):
            async with asyncio.timeout(_ERROR_BODY_SECONDS):
                while sum(map(len, parts)) < _ERROR_BODY_BYTES and (data := await body.read()):
                    parts.append(data)
    finally:
        body.close()
    return b"".join(parts)[:_ERROR_BODY_BYTES]


_ERRORS: Final[tuple[tuple[type[Exception], ErrorCode, str], ...]] = (  # the first match counts
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
    (compression_utils.TooManyMembersError, ErrorCode.CONNECTION, "the compressed answer is corrupt"),
    (OSError, ErrorCode.CONNECTION, "the connection to the provider failed"),
    (aiohttp.ClientError, ErrorCode.CONNECTION, "the connection to the provider failed"),
    (Exception, ErrorCode.INTERNAL, "unexpected failure of the request to the provider"),
)


def _failure(error: Exception, *, status: int | None = None, request_id: str | None = None) -> Failure:
    """Translate an exception of aiohttp, the system or zlib, whose own text may quote addresses or headers."""
    code, message = next((code, message) for kind, code, message in _ERRORS if isinstance(error, kind))
    detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return Failure(code=code, message=f"{message} ({detail})", http_status=status, provider_request_id=request_id)
