"""The server: routes requests, and records what was asked and sent.

In: requests, from the connections.
Out: the playback that answers each, to its connection; requests, counts and what the limits refused, to tests and
benchmarks.
"""

import asyncio
import hmac
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

from keepstream_worker.dev_stack.scripted_provider import encoding
from keepstream_worker.dev_stack.scripted_provider.connection import (
    TICK,
    Attempt,
    Connection,
    Counters,
    Playback,
    Request,
    Ticker,
    send_json,
)
from keepstream_worker.dev_stack.scripted_provider.encoding import error_body
from keepstream_worker.dev_stack.scripted_provider.limiter import Limiter, Refusal
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
        self.limiter = Limiter(time.monotonic)  #: What may be used of it, and the counts of that.
        self._holder: socket.socket | None = None  # keeps the port while nothing listens
        self._mending: asyncio.Task[None] | None = None
        self._recorded: deque[Request] = deque()
        self._recorded_bytes = 0

    async def __aenter__(self) -> Self:
        self._ticker = Ticker(asyncio.get_running_loop())
        await self._listen()
        return self

    async def _listen(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._respond, self._ticker, self._counters, self._connections),
            self._host,
            self._port,
            backlog=4096,  # benchmarks open all their streams at once
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._mending is not None:
            self._mending.cancel()
        if self._holder is not None:
            self._holder.close()
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
        self._counters.peak_streams = self._counters.open_streams
        self.limiter.reset()

    def limit(self, changes: object) -> None:
        """Change the limits that ``changes`` names, and begin or end a breakdown.

        Raises:
            ValueError: a limit is unknown or has a wrong value; the message names it.
        """
        self.limiter.change(changes)
        breakdown = self.limiter.limits.breakdown
        if isinstance(changes, dict) and "breakdown" in changes:
            if self._mending is not None:
                self._mending.cancel()
            refuses = breakdown is not None and breakdown.kind == "refuse"
            if refuses or self._holder is not None or (breakdown is not None and breakdown.seconds is not None):
                seconds = (breakdown.seconds or 0.0) if breakdown else 0.0
                self._mending = asyncio.create_task(self._mend(seconds, refuses=refuses))

    async def _mend(self, seconds: float, *, refuses: bool) -> None:
        """Let a breakdown last for so many seconds."""
        if refuses and self._holder is None:
            self._holder = await self._stop_listening()
        await asyncio.sleep(seconds)
        if self._holder is not None:
            self._holder.close()
            await self._listen()
            self._holder = None
        self.limiter.change({"breakdown": None})

    async def _stop_listening(self) -> socket.socket:
        """Refuse connections and reset those that stream; return what keeps the port until it is listened on again."""
        family = self._server.sockets[0].family
        address = self._server.sockets[0].getsockname()
        self._server.close()
        for connection in list(self._connections):
            connection.break_off()
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                holder.bind(address)  # bound without listening, so that connecting is refused
            except OSError:
                await asyncio.sleep(TICK)  # the loop has not closed the other one yet
            else:
                return holder

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
            case "GET", "/_limits":
                return send_json(connection, HTTPStatus.OK, self.limiter.report)
            case "POST", "/_limits":
                return self._change_limits(connection, request)
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

    def _change_limits(self, connection: Connection, request: Request) -> Playback:
        try:
            self.limit(request.json())
        except ValueError as error:
            return _send_error(connection, HTTPStatus.BAD_REQUEST, str(error), "invalid_limits")
        return send_json(connection, HTTPStatus.OK, self.limiter.report)

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
            encoded = encode(body, script, prompt_tokens)
            completion_tokens = len(encoded.deltas)
            answer = stream(connection, script, fault, encoded)
        elif isinstance(fault, StatusFault | SilentFault | None):
            plain = plain_response if by_responses else encoding.plain_completion
            completion_tokens = len(encoding.pieces(script))
            answer = complete(connection, script, plain(body, script, prompt_tokens))
        else:
            raise ValueError(f"script.faults: {fault.kind} needs a request with stream=true")

        model = str(body.get("model") or encoding.DEFAULT_MODEL)
        admission = self.limiter.admit(model, prompt_tokens, prompt_tokens + completion_tokens)
        if isinstance(admission, Refusal):  # no attempt: the script's faults are for those that are served
            return send_json(connection, admission.status, admission.body, admission.headers)
        attempt = Attempt(number, started_ns=time.monotonic_ns())
        connection.begin_attempt(attempt, admission.headers, lambda: self.limiter.release(admission))
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
