"""The server: routes requests, and records what was asked and sent.

In: requests, from the connections.
Out: the playback that answers each, to its connection; requests and counts, to tests and benchmarks.
"""

import asyncio
import hmac
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

from keepstream_worker.dev_stack.scripted_provider import encoding
from keepstream_worker.dev_stack.scripted_provider.connection import (
    Attempt,
    Connection,
    Counters,
    Playback,
    Request,
    Ticker,
    send_json,
)
from keepstream_worker.dev_stack.scripted_provider.encoding import error_body
from keepstream_worker.dev_stack.scripted_provider.playback import complete, play, stream
from keepstream_worker.dev_stack.scripted_provider.responses_encoding import encode_response_stream, plain_response
from keepstream_worker.dev_stack.scripted_provider.script import EndFault, SilentFault, StatusFault, parse_script

MAX_RECORDED: Final = 1000  #: Requests kept for inspection …
MAX_RECORDED_BYTES: Final = 64 * 1024 * 1024  #: … and the total size of their bodies.
MAX_KEYS: Final = 100_000  #: Keys whose attempts are counted; the oldest are dropped.

_SECRET_HEADERS: Final = frozenset({"authorization", "api-key", "proxy-authorization", "cookie"})


class ScriptedProvider:
    """The server, an asynchronous context manager that listens while it is entered.

    Args:
        host: The address to listen on.
        port: The port; 0 picks a free one.
        api_key: The key that requests must bring, or they are answered with 401; None accepts any.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None) -> None:
        self._host = host
        self._port = port
        self._api_key = api_key
        self._server: asyncio.Server
        self._ticker: Ticker
        self._connections: set[Connection] = set()
        self._counters = Counters()
        self._attempts: dict[str, Attempt] = {}  # the latest of each key
        self._recorded: deque[Request] = deque()
        self._recorded_bytes = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._ticker = Ticker(loop)
        self._server = await loop.create_server(
            lambda: Connection(self._respond, self._ticker, self._counters, self._connections),
            self._host,
            self._port,
            backlog=4096,  # benchmarks open all their streams at once
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        self._ticker.close()
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        """The base URL for an OpenAI client."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/v1"

    @property
    def requests(self) -> list[Request]:
        """The latest completion requests, oldest first, with secret header values shown as ``***``."""
        return list(self._recorded)

    @property
    def stats(self) -> dict[str, Any]:
        """What ``/_stats`` shows: counts, and the latest attempt of each key."""
        return {
            **asdict(self._counters),
            "connections": len(self._connections),
            "keys": {key: asdict(attempt) for key, attempt in self._attempts.items()},
        }

    def reset(self) -> None:
        """Forget requests, attempts and counts; running streams continue."""
        self._recorded.clear()
        self._recorded_bytes = 0
        self._attempts.clear()
        self._counters.requests = self._counters.deltas_sent = 0

    def _respond(self, connection: Connection, request: Request) -> Playback:
        path = request.path.partition("?")[0]
        if path.endswith(("/chat/completions", "/responses")):  # Azure puts a deployment's name before it
            self._record(request)
            return self._respond_with_completion(connection, request)
        match request.method, path:
            case "GET", "/healthz":
                return send_json(connection, HTTPStatus.OK, {"status": "ok", "pid": os.getpid()})
            case "GET", "/_stats":
                return send_json(connection, HTTPStatus.OK, self.stats)
            case "GET", "/_requests":
                return send_json(connection, HTTPStatus.OK, [_describe(recorded) for recorded in self._recorded])
            case "POST", "/_reset":
                self.reset()
                return send_json(connection, HTTPStatus.OK, {})
            case "GET", "/v1/models" if not self._is_authorised(request.headers):
                return _send_unauthorised(connection)
            case "GET", "/v1/models":
                model = {"id": encoding.DEFAULT_MODEL, "object": "model", "created": 0, "owned_by": "keepstream"}
                return send_json(connection, HTTPStatus.OK, {"object": "list", "data": [model]})
        message = f"There is nothing at {request.method} {path}."
        return _send_error(connection, HTTPStatus.NOT_FOUND, message, "unknown_url")

    def _respond_with_completion(self, connection: Connection, request: Request) -> Playback:
        if request.method != "POST":
            return _send_error(connection, HTTPStatus.METHOD_NOT_ALLOWED, "Ask for a completion with POST.", None)
        if not self._is_authorised(request.headers):
            return _send_unauthorised(connection)
        try:
            return self._playback_for(connection, request)
        except ValueError as error:
            return _send_error(connection, HTTPStatus.BAD_REQUEST, str(error), "invalid_request")
        except (TypeError, KeyError, AttributeError):
            return _send_error(connection, HTTPStatus.BAD_REQUEST, "A field has a wrong form.", "invalid_request")

    def _playback_for(self, connection: Connection, request: Request) -> Playback:
        body = request.json()
        by_responses = request.path.partition("?")[0].endswith("/responses")
        if not isinstance(body, dict) or not _asks(body, "input" if by_responses else "messages"):
            raise ValueError(f"the body must be an object with at least one {'item' if by_responses else 'message'}")
        script = parse_script(body["script"]) if "script" in body else encoding.default_script(body)
        last = self._attempts.get(script.key) if script.key is not None else None
        number = last.attempts + 1 if last else 1
        fault = script.fault(number)
        if isinstance(fault, EndFault) and fault.kind == "no_usage":
            script = script.model_copy(update={"usage": None})
        prompt_tokens = max(1, len(request.body) // 4)  # the usual rule of thumb
        if body.get("stream"):
            encode = encode_response_stream if by_responses else encoding.encode_stream
            answer = stream(connection, script, fault, encode(body, script, prompt_tokens))
        elif isinstance(fault, StatusFault | SilentFault | None):
            plain = plain_response if by_responses else encoding.plain_completion
            answer = complete(connection, script, plain(body, script, prompt_tokens))
        else:
            raise ValueError(f"script.faults: {fault.kind} needs a request with stream=true")

        attempt = Attempt(number, started_ns=time.monotonic_ns())
        connection.begin_attempt(attempt)
        if script.key is not None:
            self._attempts.pop(script.key, None)  # so that the newest comes last
            self._attempts[script.key] = attempt
            if len(self._attempts) > MAX_KEYS:
                del self._attempts[next(iter(self._attempts))]
        return play(connection, script, fault, answer)

    def _is_authorised(self, headers: Mapping[str, str]) -> bool:
        if self._api_key is None:
            return True
        given = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self._api_key.encode())

    def _record(self, request: Request) -> None:
        self._counters.requests += 1
        headers = {name: "***" if name in _SECRET_HEADERS else value for name, value in request.headers.items()}
        self._recorded.append(request._replace(headers=headers))
        self._recorded_bytes += len(request.body)
        while len(self._recorded) > MAX_RECORDED or self._recorded_bytes > MAX_RECORDED_BYTES:
            self._recorded_bytes -= len(self._recorded.popleft().body)


def _asks(body: dict[str, Any], name: str) -> bool:
    """Whether the body has something to answer; the Responses API takes a plain text as well."""
    return bool(body.get(name)) and isinstance(body[name], (str, list) if name == "input" else list)


def _send_error(connection: Connection, status: HTTPStatus, message: str, code: str | None) -> Playback:
    return send_json(connection, status, error_body(message, "invalid_request_error", code))


def _send_unauthorised(connection: Connection) -> Playback:
    return _send_error(connection, HTTPStatus.UNAUTHORIZED, "Incorrect API key provided.", "invalid_api_key")


def _describe(request: Request) -> dict[str, Any]:
    try:
        body = request.json()
    except ValueError:
        body = None
    return {"method": request.method, "path": request.path, "headers": request.headers, "body": body}
