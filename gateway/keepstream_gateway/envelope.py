"""The envelope: what every answer has, whatever room it comes from.

In: the application.  Out: the same, with an ``x-request-id``, errors of one shape, and metrics.
"""

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keepstream.errors import BrokerUnavailableError, InvalidSettingError, StoreUnavailableError
from keepstream_gateway.errors import api_error, unforeseen
from keepstream_gateway.logs import get_logger
from keepstream_gateway.metrics import Metrics

log = get_logger()

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.\-]{1,64}")
_SAID_EVERY: Final = 5.0  #: Seconds between two lines that say that a server is away; each request would say it.


class Envelope:
    """Wraps an application.

    Args:
        app: It.
        metrics: Count its answers.
        paths: The address of each endpoint, by which metrics name it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Mapping[Any, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._said_at: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        began = time.monotonic()
        has_begun = False

        async def send_head(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                route = self._paths.get(scope.get("endpoint"), "none")
                self._metrics.answered(route, scope["method"], message["status"], time.monotonic() - began)
            await send(message)

        try:
            await self._app(scope, receive, send_head)
        except Exception as error:
            answer = api_error(error)
            if answer is None:
                log.exception("request_failed", request_id=request_id.decode())
                answer = unforeseen()
            else:
                self._note(error)
            if has_begun:  # too late for a status: the server breaks the connection off
                raise
            await answer.response()(scope, receive, send_head)

    def _note(self, error: Exception) -> None:
        """Log that a server is away, now and then."""
        if not isinstance(error, BrokerUnavailableError | StoreUnavailableError | InvalidSettingError):
            return
        kind, now = type(error).__name__, time.monotonic()
        if now - self._said_at.get(kind, -_SAID_EVERY) >= _SAID_EVERY:
            self._said_at[kind] = now
            log.warning("server_away", reason=str(error))


def _request_id(scope: Scope) -> bytes:
    """Return the id that the caller or a proxy gave, if it can be one; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            given: bytes = value
            return given
    return f"req_{uuid.uuid4().hex}".encode()
