"""Errors as HTTP has them: every failure becomes a status and a body of OpenAI's shape.

In: the contract's errors, our own, and those of the framework.  Out: an ``ApiError``, and the response that tells it.

An SDK reads the status, ``Retry-After`` and ``x-should-retry``; people read the message, which holds no prompt, no
output and no key, as the contract's errors hold none.  What nobody foresaw is a 500 without details.
"""

import re
from http import HTTPStatus
from typing import Final

from starlette.exceptions import HTTPException

from keepstream import errors
from keepstream_gateway.json_answers import JsonResponse

RETRY_AFTER: Final = 2  #: Seconds after which to ask again, where a server is away.
_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"


class ApiError(Exception):
    """A request is refused, or failed.

    Args:
        status: Of HTTP.
        message: What is wrong and what to do, for people.
        code: The same for programs, in lower case with underscores.
        param: The name of the parameter that is wrong.
        type: As OpenAI sorts errors; by default it follows from the status.
        retry_after: Seconds after which to ask again.
        headers: Further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        type: str | None = None,  # noqa: A002  # as OpenAI calls it
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type or (_INVALID if status < 500 and status != 429 else _SERVER)
        self.retry_after = retry_after
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """Return the response that tells it."""
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status == HTTPStatus.CONFLICT:
            headers["x-should-retry"] = "false"  # SDKs repeat a 409; asking again does not mend ours
        return JsonResponse(self.body(), self.status, headers)


def not_found(what: str = "job") -> ApiError:
    """Return the answer for what does not exist, or is another tenant's: these two cannot be told apart."""
    return ApiError(404, f"there is no such {what}", f"{what}_not_found")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the answer to a request that is not as it must be; ``param`` is what is wrong in it."""
    return ApiError(400, message, code or "invalid_parameter", param=param)


def api_error(error: Exception) -> ApiError | None:
    """Return what an error means to whoever called; None: it is a defect."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _of_the_framework(error)
        case errors.KeepstreamError():
            return _of_the_contract(error)
    return None


def unforeseen() -> ApiError:
    """Return the answer where we have failed; the log has the details."""
    return ApiError(500, "the gateway failed; its log has the details, under this answer's x-request-id", "internal")


def _of_the_contract(error: errors.KeepstreamError) -> ApiError | None:
    message = str(error)
    match error:
        case errors.InvalidJobError():
            return invalid(message, _named(message), "invalid_job")
        case errors.InvalidArgumentError():
            return invalid(message, _named(message), "invalid_argument")
        case errors.InvalidCursorError():
            return invalid(message, "after", "invalid_cursor")
        case errors.JobNotFoundError():
            return not_found()
        case errors.IdempotencyConflictError():
            return ApiError(422, message, "idempotency_conflict", param="Idempotency-Key")
        case errors.JobStateError():
            return ApiError(409, message, "job_state")
        case errors.EventsLostError():
            return ApiError(410, message, "events_lost")
        case errors.FollowTimeoutError():
            return ApiError(504, message, "timeout", retry_after=RETRY_AFTER)
        case errors.BrokerUnavailableError():
            return ApiError(503, "Redis does not answer", "redis_unavailable", retry_after=RETRY_AFTER)
        case errors.StoreUnavailableError():
            return ApiError(503, "the database does not answer", "database_unavailable", retry_after=RETRY_AFTER)
        case errors.InvalidSettingError():  # Redis refuses the gateway itself; its log says how
            return ApiError(503, "Redis refuses the gateway", "redis_unavailable", retry_after=RETRY_AFTER)
        case errors.ClientClosedError():
            return ApiError(503, "this gateway is stopping", "stopping", retry_after=1)
    return None


def _of_the_framework(error: HTTPException) -> ApiError:
    phrase = HTTPStatus(error.status_code).phrase
    return ApiError(
        error.status_code,
        {404: "there is nothing under this address", 405: "this address has no such method"}.get(
            error.status_code, phrase
        ),
        phrase.lower().replace(" ", "_"),
        headers=dict(error.headers or {}),
    )


def _named(message: str) -> str | None:
    """Return the field that a message of the contract begins with."""
    match = re.match(r"([A-Za-z_][\w.\[\]]*): ", message)
    return match[1] if match else None
