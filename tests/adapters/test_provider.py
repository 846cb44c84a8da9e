"""The provider on real sockets: a scripted provider for what is sent, small raw servers for what goes wrong."""

import asyncio
import gzip
import json
import socket
import ssl
import struct
import subprocess
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest

from keepstream.errors import ErrorCode
from keepstream.results import ProviderError
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.providers.config import parse_providers
from keepstream_worker.providers.provider import Provider, ProviderFailure, Providers, Timeouts
from keepstream_worker.values import Failure

PATIENT = Timeouts(connect=60.0, first_token=60.0, idle=60.0)
REQUEST: dict[str, Any] = {
    "model": "m-1",
    "messages": [{"role": "user", "content": "hi"}],
    "script": {"text": "ok"},
}
EVENT = b'data: {"choices":[]}\n\n'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: req-7\r\n"
CHUNKED = STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Exchange:
    """One connection of a raw server: reads requests and writes what the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self) -> tuple[str, bytes]:
        """Read one request; return its request line and body."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
        return lines[0], await self._reader.readexactly(length)

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()

    def reset(self) -> None:
        """Close so that the other side gets a RST."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        try:
            while await self._reader.read(65_536):
                pass
        except ConnectionError:
            pass


Behaviour = Callable[[Exchange], Awaitable[None]]


class RawServer:
    """A TCP server whose behaviour is a function; ``connections`` counts its connections so far."""

    def __init__(self, behaviour: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        self._behaviour = behaviour
        self._tls = tls
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.base_url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._behaviour(Exchange(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def provider_at(base_url: str, toml: str = "", env: dict[str, str] | None = None) -> AsyncIterator[Provider]:
    text = f'[providers.p]\napi_key_env = "KEY"\n{toml}' + ("" if "kind" in toml else f'\nbase_url = "{base_url}"')
    providers = Providers(parse_providers(text, env or {"KEY": "sk-test"}))
    try:
        yield providers.get("p")
    finally:
        await providers.aclose()


async def read(provider: Provider, request: dict[str, Any] = REQUEST, timeouts: Timeouts = PATIENT) -> bytes:
    data = b""
    async with provider.stream(request, timeouts) as stream:
        async for part in stream:
            data += part
            stream.note_data()
    return data


async def failure_of(behaviour: Behaviour, timeouts: Timeouts = PATIENT) -> Failure:
    async with RawServer(behaviour) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure) as caught:
            await read(provider, timeouts=timeouts)
        return caught.value.failure


def answering(*parts: bytes) -> Behaviour:
    """Answer every request with ``parts``, each written and flushed, then keep listening."""

    async def behave(exchange: Exchange) -> None:
        while True:
            await exchange.request()
            await exchange.send(*parts)

    return behave


# -- what is sent -----------------------------------------------------------------------------------

PARAMETERS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": {"a": None}}},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "seed": 2**80,
    "stop": ["\n", "\ud83d"],
    "temperature": 0.1,
    "reasoning_effort": "high",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "pcm16"},
    "logit_bias": {"50256": -100},
    "user": None,
    "top_k": 40,
    "chat_template_kwargs": {"enable_thinking": False},
    "provider": {"order": ["a", "b"]},
    "metadata": {"topic": "mills"},
    "nested": [[[{"é": "日本"}]]],
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "42", "vendor": {"extra": [1, 2.5, True]}},
]


async def body_sent(request: dict[str, Any], toml: str = "") -> Any:
    request = {"script": {"text": "ok"}, **request}
    async with ScriptedProvider() as server, provider_at(server.base_url, toml) as provider:
        await read(provider, request)
        body = json.loads(server.requests[-1].body)
    assert body.pop("script") == {"text": "ok"}
    return body


async def test_the_request_reaches_the_provider_untouched() -> None:
    request = {"model": "m-1", "messages": MESSAGES, **PARAMETERS}
    sent = await body_sent(request)
    assert sent == request | {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("given", "toml", "sent"),
    [
        ({}, "", {"include_usage": True}),
        ({"stream_options": None}, "", {"include_usage": True}),
        ({"stream_options": {"include_obfuscation": False}}, "", {"include_usage": True, "include_obfuscation": False}),
        ({"stream_options": {"include_usage": False}}, "", {"include_usage": False}),
        ({}, "stream_options = false", None),
        ({"stream_options": {"x": 1}}, "stream_options = false", {"x": 1}),
    ],
)
async def test_usage_is_asked_for_unless_the_caller_or_the_provider_says_otherwise(
    given: dict[str, Any], toml: str, sent: Any
) -> None:
    assert (await body_sent(REQUEST | given, toml)).get("stream_options") == sent


async def test_what_is_no_json_is_refused_before_anything_is_sent() -> None:
    async with ScriptedProvider() as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure) as caught:
            await read(provider, REQUEST | {"x": b"bytes"})
        assert caught.value.failure.code is ErrorCode.INVALID_JOB
        assert not server.requests


async def test_the_key_headers_and_query_of_the_configuration_are_sent() -> None:
    toml = 'headers = { X-Title = "mill" }\nquery = { version = "1 & 2" }'
    async with ScriptedProvider(api_key="sk-test") as server, provider_at(server.base_url, toml) as provider:
        await read(provider)
        request = server.requests[-1]
    assert request.path == "/v1/chat/completions?version=1+%26+2"
    assert request.headers["x-title"] == "mill"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers


async def test_other_providers_see_nothing_of_the_default_providers_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "AZURE_OPENAI_AD_TOKEN"):
        monkeypatch.setenv(name, "leak")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: leak\nAuthorization: Bearer leak")
    heads: list[bytes] = []

    async def behave(exchange: Exchange) -> None:
        heads.append(await exchange._reader.readuntil(b"\r\n\r\n"))
        await exchange.send(CHUNKED, END)

    async with RawServer(behave) as server:
        azure = 'kind = "azure"\napi_version = "v"\nendpoint = "{}"'.format(server.base_url.removesuffix("/v1"))
        for toml in ("", azure):
            async with provider_at(server.base_url, toml) as provider:
                await read(provider)
    assert len(heads) == 2
    assert not [head for head in heads if b"leak" in head]
    assert b"authorization: bearer sk-test" in heads[0].lower()
    assert b"api-key: sk-test" in heads[1].lower()


async def test_a_reused_head_is_the_one_that_the_sdk_would_write() -> None:
    heads: list[bytes] = []

    async def behave(exchange: Exchange) -> None:
        heads.append(await exchange._reader.readuntil(b"\r\n\r\n"))
        await exchange.send(STREAM_HEAD + b"connection: close\r\n\r\n")

    async with RawServer(behave) as server:
        azure = 'kind = "azure"\napi_version = "v"\nendpoint = "{}"'.format(server.base_url.removesuffix("/v1"))
        for toml in ("", azure):
            async with provider_at(server.base_url, toml) as provider, provider_at(server.base_url, toml) as fresh:
                await read(provider)
                await read(provider)
                await read(fresh)
    assert len(heads) == 6
    assert heads[0] == heads[1] == heads[2]
    assert heads[3] == heads[4] == heads[5]
    assert heads[0] != heads[3]


async def test_a_provider_without_a_key_gets_none() -> None:
    async with ScriptedProvider() as server:
        configs = parse_providers(f'[providers.local]\nbase_url = "{server.base_url}"', {})
        providers = Providers(configs)
        await read(providers.get("local"))
        await providers.aclose()
        assert "authorization" not in server.requests[-1].headers


@pytest.mark.parametrize(
    ("deployment", "path"),
    [("", "/openai/deployments/a%2Fb/chat/completions"), ("d-1", "/openai/deployments/d-1/chat/completions")],
)
async def test_azure_has_the_deployment_in_its_path(deployment: str, path: str) -> None:
    async with ScriptedProvider(api_key="sk-test") as server:
        toml = 'kind = "azure"\napi_version = "2024-10-21"\nendpoint = "{}"\n'.format(
            server.base_url.removesuffix("/v1")
        )
        toml += f'deployment = "{deployment}"' if deployment else ""
        async with provider_at("", toml) as provider:
            await read(provider, REQUEST | {"model": "a/b"})
        assert server.requests[-1].path == f"{path}?api-version=2024-10-21"


async def test_cookies_of_one_answer_are_not_sent_with_the_next_request() -> None:
    heads: list[bytes] = []

    async def behave(exchange: Exchange) -> None:
        while True:
            head = await exchange._reader.readuntil(b"\r\n\r\n")
            heads.append(head.lower())
            length = next(int(line.split(b":")[1]) for line in heads[-1].split(b"\r\n") if b"content-length" in line)
            await exchange._reader.readexactly(length)
            await exchange.send(STREAM_HEAD + b"set-cookie: a=b; path=/\r\ntransfer-encoding: chunked\r\n\r\n", END)

    async with RawServer(behave) as server, provider_at(server.base_url) as provider:
        await read(provider)
        await read(provider)
    assert len(heads) == 2
    assert b"cookie" not in heads[1]


# -- the answer -------------------------------------------------------------------------------------


async def test_bytes_are_handed_out_as_they_arrive() -> None:
    async with ScriptedProvider() as server, provider_at(server.base_url) as provider:
        script = {"raw": {"status": 200, "chunks": ["data: {}\n\n", {"b64": "/w=="}, "data: [DONE]\n\n"]}}
        request = REQUEST | {"script": script}
        assert await read(provider, request) == b"data: {}\n\n\xffdata: [DONE]\n\n"


async def test_a_first_event_is_seen_while_the_stream_goes_on() -> None:
    seen = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED, chunk(EVENT))
        await seen.wait()
        await exchange.send(chunk(EVENT), END)

    async with (
        RawServer(behave) as server,
        provider_at(server.base_url) as provider,
        provider.stream(REQUEST, PATIENT) as stream,
    ):
        assert (stream.http_status, stream.content_type) == (200, "text/event-stream")
        assert stream.provider_request_id == "req-7"
        assert await anext(stream) == EVENT
        seen.set()
        assert await anext(stream) == EVENT
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


def raw_deflate(data: bytes, level: int = 9) -> bytes:
    compressor = zlib.compressobj(level, wbits=-15)
    return compressor.compress(data) + compressor.flush()


LARGE = b"".join(b'data: {"n":%d}\n\n' % n for n in range(200_000))


@pytest.mark.parametrize(
    ("encoding", "body", "text"),
    [
        ("gzip", gzip.compress(EVENT * 3), EVENT * 3),
        ("x-gzip", gzip.compress(LARGE), LARGE),
        ("GZIP", gzip.compress(LARGE)[:7] + gzip.compress(LARGE)[7:], LARGE),
        ("gzip", gzip.compress(EVENT) + gzip.compress(EVENT * 2) + gzip.compress(LARGE), EVENT * 3 + LARGE),
        ("deflate", zlib.compress(EVENT), EVENT),
        ("deflate", zlib.compress(LARGE), LARGE),
        ("deflate", raw_deflate(EVENT * 9), EVENT * 9),
        ("deflate", raw_deflate(LARGE), LARGE),
        ("deflate", raw_deflate(EVENT, level=0), EVENT),
        ("identity", EVENT, EVENT),
        ("gzip, identity", gzip.compress(EVENT), EVENT),
        ("br", EVENT, EVENT),
        ("gzip", gzip.compress(EVENT)[:-8], EVENT),
        ("", b"", b""),
    ],
    ids=[
        "gzip",
        "large",
        "capitals",
        "several-members",
        "deflate",
        "deflate-large",
        "raw-deflate",
        "raw-deflate-large",
        "raw-deflate-stored",
        "identity",
        "gzip-and-identity",
        "plain-labelled-br",
        "gzip-truncated",
        "empty",
    ],
)
async def test_a_compressed_answer_is_inflated(encoding: str, body: bytes, text: bytes) -> None:
    head = STREAM_HEAD + b"content-encoding: %s\r\ntransfer-encoding: chunked\r\n\r\n" % encoding.encode()
    beginning = [chunk(body[i : i + 1]) for i in range(min(len(body), 3))]
    pieces = [chunk(body[i : i + 40_000]) for i in range(3, len(body), 40_000)]
    async with RawServer(answering(head, *beginning, *pieces, END)) as server, provider_at(server.base_url) as provider:
        assert await read(provider) == text


@pytest.mark.parametrize(("encoding", "library"), [("br", "brotli"), ("zstd", "backports.zstd")])
async def test_a_compression_whose_library_is_installed_is_inflated(encoding: str, library: str) -> None:
    body = pytest.importorskip(library).compress(LARGE)
    head = STREAM_HEAD + b"content-encoding: %s\r\ntransfer-encoding: chunked\r\n\r\n" % encoding.encode()
    async with RawServer(answering(head, chunk(body), END)) as server, provider_at(server.base_url) as provider:
        assert await read(provider) == LARGE


async def test_an_answer_without_a_body_is_an_empty_answer() -> None:
    head = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with (
        RawServer(answering(head)) as server,
        provider_at(server.base_url) as provider,
        provider.stream(REQUEST, PATIENT) as stream,
    ):
        assert stream.http_status == 204
        assert [data async for data in stream] == []


async def test_an_answer_that_ends_with_its_connection_is_complete() -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(STREAM_HEAD + b"connection: close\r\n\r\n", EVENT)

    async with RawServer(behave) as server, provider_at(server.base_url) as provider:
        assert await read(provider) == EVENT


# -- what goes wrong on the wire --------------------------------------------------------------------


async def close_at_once(_: Exchange) -> None:
    return


async def close_after_the_request(exchange: Exchange) -> None:
    await exchange.request()


async def reset_before_a_byte(exchange: Exchange) -> None:
    await exchange.request()
    exchange.reset()


async def half_the_headers(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-ty")


async def garbage(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


async def huge_header(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000 + b"\r\n\r\n")


async def reset_midway(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED, chunk(EVENT))
    await asyncio.sleep(0.05)
    exchange.reset()


async def end_inside_a_chunk(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED, chunk(EVENT)[:-9])


async def end_without_terminator(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED, chunk(EVENT))


async def short_content_length(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(STREAM_HEAD + b"content-length: 1000\r\n\r\n", EVENT)


async def bad_chunk_size(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED, chunk(EVENT))
    await asyncio.sleep(0.05)
    await exchange.send(b"zz\r\n")


async def corrupt_gzip(exchange: Exchange) -> None:
    await exchange.request()
    body = gzip.compress(EVENT * 50)
    await exchange.send(STREAM_HEAD + b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n")
    await exchange.send(chunk(body[:10] + b"\xff" * 10 + body[20:]), END)


@pytest.mark.parametrize(
    "behaviour",
    [close_at_once, close_after_the_request, reset_before_a_byte, half_the_headers, garbage, huge_header],
)
async def test_a_broken_connection_before_the_answer_is_a_connection_failure(behaviour: Behaviour) -> None:
    failure = await failure_of(behaviour)
    assert (failure.code, failure.http_status) == (ErrorCode.CONNECTION, None)


@pytest.mark.parametrize(
    "behaviour",
    [reset_midway, end_inside_a_chunk, end_without_terminator, short_content_length, bad_chunk_size, corrupt_gzip],
)
async def test_a_broken_connection_within_the_answer_is_a_connection_failure(
    behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepstream_worker.providers.provider._CHECK_INTERVAL", 0.1)
    failure = await failure_of(behaviour)
    assert (failure.code, failure.http_status) == (ErrorCode.CONNECTION, 200)
    assert failure.provider_request_id == "req-7"


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/v1", "http://no-such-host.invalid:{}/v1"])
async def test_a_provider_that_cannot_be_reached_is_a_connection_failure(url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        async with provider_at(url.format(taken.getsockname()[1])) as provider:
            with pytest.raises(ProviderFailure) as caught:
                await read(provider)
    assert caught.value.failure.code is ErrorCode.CONNECTION
    assert "127.0.0.1" not in caught.value.failure.message


async def test_tls_to_a_plain_port_is_a_connection_failure() -> None:
    async with (
        RawServer(answering(CHUNKED, END)) as server,
        provider_at(server.base_url.replace("http:", "https:")) as provider,
    ):
        with pytest.raises(ProviderFailure) as caught:
            await read(provider, timeouts=replace(PATIENT, connect=1.0))
    assert caught.value.failure.code in {ErrorCode.CONNECTION, ErrorCode.TIMEOUT}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", file, "-out", file.with_suffix(".crt")], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_an_unknown_certificate_is_a_connection_failure_that_says_so(certificate: Path) -> None:
    async with (
        RawServer(answering(CHUNKED, END), server_tls(certificate)) as server,
        provider_at(server.base_url) as provider,
    ):
        with pytest.raises(ProviderFailure) as caught:
            await read(provider)
    assert caught.value.failure.code is ErrorCode.CONNECTION
    assert "TLS" in caught.value.failure.message


# -- refusals ---------------------------------------------------------------------------------------


def refusal(status: int, body: bytes, headers: bytes = b"content-type: application/json\r\n") -> bytes:
    return b"HTTP/1.1 %d X\r\n%scontent-length: %d\r\n\r\n%s" % (status, headers, len(body), body)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, ErrorCode.BAD_REQUEST),
        (302, ErrorCode.BAD_REQUEST),
        (303, ErrorCode.BAD_REQUEST),
        (304, ErrorCode.BAD_REQUEST),
        (400, ErrorCode.BAD_REQUEST),
        (401, ErrorCode.AUTH),
        (402, ErrorCode.RATE_LIMITED),
        (403, ErrorCode.PERMISSION),
        (404, ErrorCode.NOT_FOUND),
        (408, ErrorCode.TIMEOUT),
        (409, ErrorCode.CONFLICT),
        (422, ErrorCode.UNPROCESSABLE),
        (429, ErrorCode.RATE_LIMITED),
        (500, ErrorCode.SERVER_ERROR),
        (503, ErrorCode.OVERLOADED),
        (529, ErrorCode.OVERLOADED),
    ],
)
async def test_a_refusal_is_named_by_its_status_and_asked_once(status: int, code: ErrorCode) -> None:
    requests: list[str] = []

    async def behave(exchange: Exchange) -> None:
        while True:
            requests.append((await exchange.request())[0])
            extra = b"location: /v1/elsewhere\r\nx-request-id: req-9\r\nretry-after: 7\r\nx-should-retry: true\r\n"
            await exchange.send(refusal(status, b"" if status == 304 else b'{"error":{"message":"secret"}}', extra))

    failure = await failure_of(behave)
    assert (failure.code, failure.http_status, failure.provider_request_id) == (code, status, "req-9")
    assert failure.retry_after == 7.0
    assert failure.should_retry is True
    assert "secret" not in failure.message
    assert requests == ["POST /v1/chat/completions HTTP/1.1"]


# -- redirects --------------------------------------------------------------------------------------


def redirect(status: int, location: str) -> bytes:
    return refusal(status, b"moved", b"location: %s\r\nx-request-id: req-9\r\n" % location.encode())


def sent_on(locations: Sequence[str], status: int, requests: list[tuple[str, Any]]) -> Behaviour:
    """Answer the first requests by redirects to ``locations``, the next one by a stream; note every request."""

    async def behave(exchange: Exchange) -> None:
        while True:
            line, body = await exchange.request()
            requests.append((line, json.loads(body)))
            if len(requests) <= len(locations):
                await exchange.send(redirect(status, locations[len(requests) - 1]))
            else:
                await exchange.send(CHUNKED, chunk(EVENT), END)

    return behave


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_on_the_same_host_is_followed_with_method_and_body(status: int) -> None:
    requests: list[tuple[str, Any]] = []
    locations = ["/v2/chat/completions?a=1", "completions"]
    async with (
        RawServer(sent_on(locations, status, requests)) as server,
        provider_at(server.base_url) as provider,
    ):
        assert await read(provider) == EVENT
        assert server.connections == 1
    assert [line.split()[:2] for line, _ in requests] == [
        ["POST", "/v1/chat/completions"],
        ["POST", "/v2/chat/completions?a=1"],
        ["POST", "/v2/chat/completions"],
    ]
    assert all(body == requests[0][1] for _, body in requests)
    assert requests[0][1]["messages"] == REQUEST["messages"]


async def test_an_absolute_redirect_on_the_same_host_is_followed() -> None:
    requests: list[tuple[str, Any]] = []
    locations: list[str] = []
    async with (
        RawServer(sent_on(locations, 307, requests)) as server,
        provider_at(server.base_url) as provider,
    ):
        locations.append(f"http://127.0.0.1:{server.port}/else")
        assert await read(provider) == EVENT
    assert requests[1][0].split()[:2] == ["POST", "/else"]


async def test_a_redirect_to_another_host_or_port_is_refused_and_never_asked() -> None:
    async with RawServer(answering(CHUNKED, chunk(EVENT), END)) as other:
        for host in ("localhost", "127.0.0.1"):
            requests: list[tuple[str, Any]] = []
            failure = await failure_of(sent_on([f"http://{host}:{other.port}/v1/x?key=secret"], 307, requests))
            assert (failure.code, failure.http_status) == (ErrorCode.BAD_REQUEST, 307)
            assert failure.provider_request_id == "req-9"
            assert f"redirects to http://{host}:{other.port}" in failure.message
            assert "secret" not in failure.message
            assert len(requests) == 1
        assert other.connections == 0


async def test_a_redirect_that_gives_up_tls_is_refused(certificate: Path) -> None:
    requests: list[tuple[str, Any]] = []
    locations: list[str] = []
    async with RawServer(sent_on(locations, 308, requests), tls=server_tls(certificate)) as server:
        locations.append(f"http://127.0.0.1:{server.port}/v1/chat/completions")
        tls = ssl.create_default_context(cafile=certificate)
        provider = Provider(parse_providers(f'[providers.p]\nbase_url = "{server.base_url}"', {})["p"], tls)
        try:
            with pytest.raises(ProviderFailure, match="redirects to http://127"):
                await read(provider)
        finally:
            await provider.aclose()
    assert len(requests) == 1


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "http://user:pw@127.0.0.1/x", "http://["])
async def test_a_redirect_to_nowhere_is_refused(location: str) -> None:
    failure = await failure_of(sent_on([location], 307, []))
    assert (failure.code, failure.http_status) == (ErrorCode.BAD_REQUEST, 307)


async def test_redirects_in_a_circle_end() -> None:
    requests: list[tuple[str, Any]] = []
    failure = await failure_of(sent_on(["/v1/chat/completions"] * 100, 307, requests))
    assert failure.code is ErrorCode.BAD_REQUEST
    assert "more than 5 times" in failure.message
    assert len(requests) == 6


# -- the option that asks for usage -----------------------------------------------------------------


def refusing_usage_option(bodies: list[Any], status: int, words: str) -> Behaviour:
    """Refuse requests that have ``stream_options`` with ``words``, and answer others."""

    async def behave(exchange: Exchange) -> None:
        while True:
            bodies.append(json.loads((await exchange.request())[1]))
            if "stream_options" in bodies[-1]:
                await exchange.send(refusal(status, words.encode()))
            else:
                await exchange.send(CHUNKED, chunk(EVENT), END)

    return behave


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, '{"error":{"message":"Unrecognized request argument supplied: stream_options"}}'),
        (422, '{"detail":[{"loc":["body","stream_options"],"msg":"Extra inputs are not permitted"}]}'),
        (400, '{"error":{"message":"unknown field","param":"stream_options.include_usage"}}'),
    ],
)
async def test_an_option_that_we_add_and_the_provider_refuses_is_left_out_from_then_on(status: int, words: str) -> None:
    bodies: list[Any] = []
    async with (
        RawServer(refusing_usage_option(bodies, status, words)) as server,
        provider_at(server.base_url) as provider,
    ):
        assert await read(provider) == EVENT
        assert await read(provider) == EVENT
        assert await read(provider, REQUEST | {"model": "m-2"}) == EVENT
    assert [(body["model"], "stream_options" in body) for body in bodies] == [
        ("m-1", True),
        ("m-1", False),
        ("m-1", False),
        ("m-2", True),
        ("m-2", False),
    ]


async def test_an_option_of_the_caller_is_never_left_out() -> None:
    bodies: list[Any] = []
    behaviour = refusing_usage_option(bodies, 400, '{"error":{"message":"no stream_options"}}')
    async with RawServer(behaviour) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure):
            await read(provider, REQUEST | {"stream_options": {"include_usage": True}})
    assert len(bodies) == 1


async def test_another_refusal_is_no_reason_to_ask_again() -> None:
    bodies: list[Any] = []
    behaviour = refusing_usage_option(bodies, 400, '{"error":{"message":"no such parameter: temperature"}}')
    async with RawServer(behaviour) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure):
            await read(provider)
    assert len(bodies) == 1


async def test_the_words_of_a_refusal_are_without_what_the_configuration_holds() -> None:
    words = b'{"error":{"message":"bad key hello-there for team-blue","param":"hello-there"}}'
    toml = 'headers = { "X-Team" = "team-blue" }'
    async with (
        RawServer(answering(refusal(401, words))) as server,
        provider_at(server.base_url, toml, {"KEY": "hello-there"}) as provider,
    ):
        with pytest.raises(ProviderFailure) as caught:
            await read(provider)
        failure = provider.scrubbed(caught.value.failure)
    assert failure.provider_error == ProviderError(message="bad key [removed] for [removed]", param="[removed]")


def cut(head: bytes, body: bytes = b'{"error":', *, reset: bool = False, stall: bool = False) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(b"HTTP/1.1 500 X\r\n" + head + b"\r\n")
        await asyncio.sleep(0.05)
        await exchange.send(body)
        if stall:
            await exchange.gone()
        elif reset:
            await asyncio.sleep(0.05)
            exchange.reset()

    return behave


@pytest.mark.parametrize(
    "behaviour",
    [
        cut(b"content-length: 1000\r\n"),
        cut(b"content-length: 1000\r\n", reset=True),
        cut(b"transfer-encoding: chunked\r\n", chunk(b'{"err')),
        cut(b"transfer-encoding: chunked\r\n", b"zz\r\n"),
        cut(b"content-encoding: gzip\r\ncontent-length: 9\r\n"),
        cut(b"content-encoding: gzip\r\ncontent-length: 30\r\n", gzip.compress(b'{"error":{}}')[:30]),
    ],
    ids=["cut", "reset", "cut-chunk", "bad-chunk", "bad-gzip", "gzip"],
)
async def test_the_status_decides_even_when_the_errors_body_cannot_be_read(
    behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepstream_worker.providers.http._ERROR_BODY_SECONDS", 1.0)
    failure = await failure_of(behaviour)
    assert (failure.code, failure.http_status) == (ErrorCode.SERVER_ERROR, 500)


async def test_an_errors_body_that_stalls_or_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepstream_worker.providers.http._ERROR_BODY_SECONDS", 0.2)
    failure = await failure_of(cut(b"content-length: 1000\r\n", stall=True))
    assert failure.code is ErrorCode.SERVER_ERROR

    async def endless(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            await exchange.send(chunk(b"x" * 65_536))

    assert (await failure_of(endless)).code is ErrorCode.SERVER_ERROR


async def test_a_refusal_is_not_taken_for_silence_because_its_body_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepstream_worker.providers.http._ERROR_BODY_SECONDS", 1.0)
    stalling = cut(b"content-length: 1000\r\n", stall=True)
    failure = await failure_of(stalling, Timeouts(connect=10.0, first_token=0.5, idle=0.5))
    assert (failure.code, failure.http_status) == (ErrorCode.SERVER_ERROR, 500)


async def test_a_compressed_error_body_is_understood() -> None:
    body = gzip.compress(b'{"error":{"code":"insufficient_quota"}}')
    failure = await failure_of(answering(refusal(429, body, b"content-encoding: gzip\r\n")))
    assert failure.code is ErrorCode.INSUFFICIENT_QUOTA


async def test_a_connection_that_carried_a_refusal_serves_again() -> None:
    async with RawServer(answering(refusal(429, b"{}"))) as server, provider_at(server.base_url) as provider:
        for _ in range(3):
            with pytest.raises(ProviderFailure):
                await read(provider)
        assert server.connections == 1


# -- time -------------------------------------------------------------------------------------------


async def silence(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.gone()


async def comments_only(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED)
    while True:
        await exchange.send(chunk(b": keep-alive\n\n"))
        await asyncio.sleep(0.02)


async def stall_after_data(exchange: Exchange) -> None:
    await exchange.request()
    await exchange.send(CHUNKED, chunk(EVENT))
    await exchange.gone()


async def test_silence_before_the_headers_is_a_timeout() -> None:
    failure = await failure_of(silence, replace(PATIENT, first_token=0.2))
    assert failure.code is ErrorCode.TIMEOUT
    assert "0.2 s" in failure.message


async def test_comments_are_no_data() -> None:
    comments: list[bytes] = []

    async def read_without_noting_data(provider: Provider) -> None:
        async with provider.stream(REQUEST, replace(PATIENT, first_token=1.0)) as stream:
            async for data in stream:
                comments.append(data)  # noqa: PERF401  # extend would lose what came before the failure

    async with RawServer(comments_only) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure) as caught:
            await read_without_noting_data(provider)
    assert caught.value.failure.code is ErrorCode.TIMEOUT
    assert len(comments) > 3


async def test_the_idle_limit_replaces_the_first_token_limit_once_data_came() -> None:
    failure = await failure_of(stall_after_data, replace(PATIENT, first_token=600.0, idle=0.2))
    assert failure.code is ErrorCode.TIMEOUT
    assert "0.2 s" in failure.message


async def test_data_in_time_keeps_a_stream_alive_beyond_the_limit() -> None:
    """A machine that stands still for longer than the limit lets no data come in time; then it is tried again."""
    sent_at: list[float] = []

    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        sent_at.append(time.monotonic())
        await exchange.send(CHUNKED)
        for _ in range(12):
            await exchange.send(chunk(EVENT))
            await asyncio.sleep(0.1)
            sent_at.append(time.monotonic())
        await exchange.send(END)

    limit, found = 1.0, b""
    async with RawServer(behave) as server, provider_at(server.base_url) as provider:
        for _ in range(5):
            sent_at[:] = [time.monotonic()]
            try:
                found = await read(provider, timeouts=replace(PATIENT, first_token=limit, idle=limit))
                break
            except ProviderFailure:
                sent_at.append(time.monotonic())
                assert max(after - before for before, after in pairwise(sent_at)) > limit / 2, "all came in time"
    assert found == EVENT * 12
    assert sent_at[-1] - sent_at[0] > limit


async def test_time_that_the_reader_takes_is_not_the_providers() -> None:
    async with (
        RawServer(answering(CHUNKED, chunk(EVENT), END)) as server,
        provider_at(server.base_url) as provider,
        provider.stream(REQUEST, replace(PATIENT, first_token=1.0, idle=1.0)) as stream,
    ):
        await asyncio.sleep(1.5)
        assert [data async for data in stream] == [EVENT]


async def test_a_timeout_leaves_the_task_uncancelled() -> None:
    async with RawServer(silence) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ProviderFailure):
            await read(provider, timeouts=replace(PATIENT, first_token=0.1))
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)


async def test_a_connection_that_is_never_accepted_is_a_timeout() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]  # fill the queue of a socket that accepts nobody
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        async with provider_at(f"http://127.0.0.1:{full.getsockname()[1]}/v1") as provider:
            with pytest.raises(ProviderFailure) as caught:
                await read(provider, timeouts=replace(PATIENT, connect=0.3))
        for filler in fillers:
            filler.close()
    assert caught.value.failure.code is ErrorCode.TIMEOUT


# -- the connection is always released -----------------------------------------------------------------


async def test_a_connection_whose_answer_was_read_serves_again() -> None:
    async with RawServer(answering(CHUNKED, chunk(EVENT), END)) as server, provider_at(server.base_url) as provider:
        for _ in range(5):
            assert await read(provider) == EVENT
        assert server.connections == 1


async def test_a_reader_that_stops_before_the_terminator_leaves_a_connection_that_serves_again() -> None:
    async def behave(exchange: Exchange) -> None:
        while True:
            await exchange.request()
            await exchange.send(CHUNKED, chunk(EVENT))
            await asyncio.sleep(0.02)
            await exchange.send(END)

    async with RawServer(behave) as server, provider_at(server.base_url) as provider:
        for _ in range(3):
            async with provider.stream(REQUEST, PATIENT) as stream:
                assert await anext(stream) == EVENT
            await asyncio.gather(*provider._draining)
        assert server.connections == 1


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("moment", ["before the headers", "within the answer"])
async def test_cancelling_closes_the_connection_within_milliseconds(
    moment: str, *, secure: bool, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    monkeypatch.setattr("keepstream_worker.providers.http._KEEP_ALIVE_SECONDS", 600.0)
    asked, gone = asyncio.Event(), asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        if moment == "within the answer":
            await exchange.send(CHUNKED, chunk(EVENT))
        asked.set()
        await exchange.gone()
        gone.set()

    async with (
        RawServer(behave, server_tls(certificate) if secure else None) as server,
        provider_at(server.base_url) as provider,
    ):
        task = asyncio.create_task(read(provider))
        await asked.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 60.0)  # an idle connection would be kept for ten minutes


async def test_an_exception_of_the_reader_closes_the_connection_and_goes_on() -> None:
    gone = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED, chunk(EVENT))
        await exchange.gone()
        gone.set()

    async def stumble(provider: Provider) -> None:
        async with provider.stream(REQUEST, PATIENT) as stream:
            await anext(stream)
            raise ZeroDivisionError

    async with RawServer(behave) as server, provider_at(server.base_url) as provider:
        with pytest.raises(ZeroDivisionError):
            await stumble(provider)
        await asyncio.wait_for(gone.wait(), 60.0)


async def test_a_burst_of_requests_times_none_of_them_out() -> None:
    async with ScriptedProvider() as server, provider_at(server.base_url) as provider:
        request = REQUEST | {"script": {"text": "a b c", "first_token_delay": 0.2}}
        answers = await asyncio.gather(*(read(provider, request) for _ in range(300)))
    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)


async def test_the_connection_limit_of_the_configuration_is_kept() -> None:
    async with ScriptedProvider() as server, provider_at(server.base_url, "max_connections = 3") as provider:
        request = REQUEST | {"script": {"text": "a b c"}}
        reads = [asyncio.create_task(read(provider, request)) for _ in range(30)]
        most = 0
        while not all(task.done() for task in reads):
            most = max(most, server.stats["connections"])
            await asyncio.sleep(0.001)
        assert all(task.result() for task in reads)
    assert most <= 3


async def test_a_proxy_is_used_and_its_password_sent() -> None:
    heads: list[bytes] = []

    async def behave(exchange: Exchange) -> None:
        heads.append(await exchange._reader.readuntil(b"\r\n\r\n"))
        await exchange.send(CHUNKED, chunk(EVENT), END)

    async with RawServer(behave) as proxy:
        env = {"KEY": "sk-test", "PROXY": f"http://me:word@127.0.0.1:{proxy.port}"}
        async with provider_at("http://provider.example/v1", 'proxy = { env = "PROXY" }', env) as provider:
            assert await read(provider) == EVENT
    assert heads[0].startswith(b"POST http://provider.example/v1/chat/completions HTTP/1.1\r\n")
    assert b"proxy-authorization: basic bwu6d29yza==" in heads[0].lower()


# -- names, keys, checks ------------------------------------------------------------------------------


async def test_an_unknown_provider_is_answered_with_the_names_of_those_that_are_known() -> None:
    providers = Providers(parse_providers('[providers.groq]\nbase_url = "http://127.0.0.1:1"', {}))
    with pytest.raises(ProviderFailure) as caught:
        providers.get("gorq")
    await providers.aclose()
    assert caught.value.failure.code is ErrorCode.UNKNOWN_PROVIDER
    assert caught.value.failure.message == "no provider 'gorq' is configured; there is: default, groq"


async def test_a_missing_key_is_answered_with_the_variable_to_set() -> None:
    providers = Providers(parse_providers("", {}))
    with pytest.raises(ProviderFailure) as caught:
        await read(providers.get("default"))
    check = await providers.get("default").check()
    await providers.aclose()
    assert caught.value.failure.code is ErrorCode.AUTH
    assert caught.value.failure.message.endswith("set the environment variable OPENAI_API_KEY")
    assert not check.ok
    assert check.line.endswith("set the environment variable OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("answer", "ok", "words"),
    [
        (refusal(200, b'{"data":[{"id":"a"},{"id":"b"}]}'), True, "answers and lists 2 models"),
        (refusal(401, b"{}"), False, "did not accept the key"),
        (refusal(404, b"{}"), True, "lists no models"),
        (refusal(200, b"<html>"), False, "not like an OpenAI-compatible provider"),
        (b"nonsense\r\n\r\n", False, "not HTTP"),
    ],
)
async def test_a_check_says_in_one_line_how_the_provider_is(answer: bytes, *, ok: bool, words: str) -> None:
    async with RawServer(answering(answer)) as server, provider_at(server.base_url) as provider:
        check = await provider.check()
    assert check.ok is ok
    assert words in check.line
    assert check.line.startswith(server.base_url)
    assert "sk-test" not in check.line
