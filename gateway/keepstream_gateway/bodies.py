"""Bodies of requests: no more of them than is allowed, and within a time.

In: a request.  Out: its body, or the JSON object in it, or an ``ApiError``.  The limit holds while the body is read,
whatever its head says of its length.
"""

import asyncio
import json
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from keepstream_gateway.errors import ApiError, invalid

_PATIENCE: Final = 60.0  #: Seconds in which a whole body has to come.
#: What is left unread is not waited for: the connection ends with the answer.
_AND_CLOSE: Final = {"Connection": "close"}


async def read_object(request: Request, limit: int, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in a request's body; with ``optional``, no body is an empty one.

    Args:
        request: It.
        limit: Bytes that the body may have.
        optional: Whether there may be no body.

    Raises:
        ApiError: there is none, it is too large, not declared as JSON, or no JSON object.
    """
    body = await read_body(request, limit)
    if optional and not body:
        return {}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json", "unsupported_media_type")
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise invalid("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return value


async def read_body(request: Request, limit: int) -> bytes:
    """Return a request's body, of at most ``limit`` bytes.

    Raises:
        ApiError: it is larger, or does not come whole in time.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body was complete", "incomplete_body") from None
    except TimeoutError:
        message = f"the body did not come within {_PATIENCE:g} seconds"
        raise ApiError(408, message, "body_too_slow", headers=_AND_CLOSE) from None
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than the {limit} bytes that are accepted"
    return ApiError(413, message, "body_too_large", headers=_AND_CLOSE)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
