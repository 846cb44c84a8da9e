"""Failures: maps every form in which providers report an error to the contract's error codes.

In: an HTTP status with headers and body, from the HTTP transport; an error object found in a stream, from the stream
reader.
Out: a ``Failure``, for the engine, the retry table, rows and events.

Providers quote prompts, outputs and parts of keys in their error messages, while our messages are stored and logged.
So ``message`` contains nothing a provider wrote, except an error code that is a plain identifier. What it did write is
kept apart, scrubbed, as ``provider_error``: see ``words``.

Some causes no waiting removes: no credit, a key that is not accepted, a filter, a prompt that is too long. Providers
send them with any status, and gateways wrap them in errors of their own. So they are looked for in every layer, by
codes and types first (``_CAUSES``), then by what the message says (``_TEXTS``).
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import orjson

from keepstream.errors import ErrorCode
from keepstream.results import ProviderError
from keepstream_worker.providers import durations
from keepstream_worker.providers.rate_headers import read_rate_limits
from keepstream_worker.providers.words import provider_error
from keepstream_worker.values import Failure


def failure_from_response(
    status: int, headers: Mapping[str, str], body: object, *, now: float | None = None
) -> Failure:
    """Translate an error response.

    Args:
        status: The HTTP status.
        headers: The response headers; case does not matter.
        body: As much of the body as could be read: decoded JSON, text, bytes or None.
        now: Seconds since 1970, to interpret a date in ``Retry-After``; None uses the clock.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    report = _Report.of(body)
    now = time.time() if now is None else now
    wait = _retry_after(lowered, now)
    asked_to_wait = wait is not None and bool(lowered.keys() & {"retry-after", "retry-after-ms"})
    code = _code_of_response(status, report, asked_to_wait=asked_to_wait)
    return Failure(
        code=code,
        message=_sentence(f"HTTP {status}", code, report.provider_code),
        http_status=status,
        retry_after=report.retry_after if wait is None else wait,
        should_retry=_SHOULD_RETRY.get(lowered.get("x-should-retry", "").strip().lower()),
        provider_request_id=_request_id(lowered),
        rate_limits=read_rate_limits(lowered, now=now),
        provider_error=report.provider_error,
        provider_code=report.provider_code,
    )


def failure_from_stream_error(payload: object) -> Failure:
    """Translate an error object, of whatever form, that came in a stream or in the body of an HTTP 200."""
    report = _Report.of(payload)
    code = _code_of_report(report)
    return Failure(
        code=code,
        message=_sentence("an error in the stream", code, report.provider_code),
        retry_after=report.retry_after,
        provider_error=report.provider_error,
        provider_code=report.provider_code,
    )


# -- codes ----------------------------------------------------------------------------------------

_MEANING: Final[dict[ErrorCode, str]] = {
    ErrorCode.BAD_REQUEST: "it does not accept the request",
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "the prompt is longer than the model's context",
    ErrorCode.CONTENT_FILTER: "its filter refused the prompt",
    ErrorCode.AUTH: "it did not accept the key",
    ErrorCode.PERMISSION: "the key may not use this model or endpoint",
    ErrorCode.NOT_FOUND: "there is no such model or endpoint",
    ErrorCode.INSUFFICIENT_QUOTA: "no credit or spending limit is left",
    ErrorCode.PAYLOAD_TOO_LARGE: "the request is too large",
    ErrorCode.UNPROCESSABLE: "it cannot run the request",
    ErrorCode.CONFLICT: "the request conflicts with another one",
    ErrorCode.RATE_LIMITED: "too many requests or tokens for now",
    ErrorCode.OVERLOADED: "it has no capacity for now",
    ErrorCode.SERVER_ERROR: "it failed to serve the request",
    ErrorCode.TOOL_USE_FAILED: "the model produced a tool call that cannot be read",
    ErrorCode.CONNECTION: "the connection behind it was lost",
    ErrorCode.TIMEOUT: "the request took too long",
    ErrorCode.EMPTY_STREAM: "there is no output",
    ErrorCode.INVALID_RESPONSE: "that is no event stream",
}

# The status decides, except for the causes in _CAUSES, which providers send with various statuses.
_BY_STATUS: Final[dict[int, ErrorCode]] = {
    204: ErrorCode.EMPTY_STREAM,
    401: ErrorCode.AUTH,
    402: ErrorCode.INSUFFICIENT_QUOTA,
    403: ErrorCode.PERMISSION,
    404: ErrorCode.NOT_FOUND,
    408: ErrorCode.TIMEOUT,
    409: ErrorCode.CONFLICT,
    410: ErrorCode.NOT_FOUND,
    413: ErrorCode.PAYLOAD_TOO_LARGE,
    422: ErrorCode.UNPROCESSABLE,
    425: ErrorCode.SERVER_ERROR,
    429: ErrorCode.RATE_LIMITED,
    498: ErrorCode.OVERLOADED,  # Groq: no flex capacity
    499: ErrorCode.CONNECTION,  # a proxy reports that the client disconnected
    501: ErrorCode.BAD_REQUEST,
    503: ErrorCode.OVERLOADED,
    505: ErrorCode.BAD_REQUEST,
    529: ErrorCode.OVERLOADED,
}

# Codes and types that are more precise than the status. Folded: lower case, letters and digits only, and without a
# trailing "error" or "exception".
_CAUSES: Final[dict[str, ErrorCode]] = {
    "contextlengthexceeded": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "exceedcontextsize": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "contextwindowexceeded": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "modelcontextwindowexceeded": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "contextoverflow": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "prompttoolong": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "inputtoolong": ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    "1261": ErrorCode.CONTEXT_LENGTH_EXCEEDED,  # Z.ai
    "contentfilter": ErrorCode.CONTENT_FILTER,
    "contentfiltered": ErrorCode.CONTENT_FILTER,
    "contentpolicy": ErrorCode.CONTENT_FILTER,
    "contentpolicyviolation": ErrorCode.CONTENT_FILTER,
    "responsibleaipolicyviolation": ErrorCode.CONTENT_FILTER,
    "moderationblocked": ErrorCode.CONTENT_FILTER,
    "datainspectionfailed": ErrorCode.CONTENT_FILTER,
    "inputsensitive": ErrorCode.CONTENT_FILTER,
    "1301": ErrorCode.CONTENT_FILTER,  # Z.ai
    "insufficientquota": ErrorCode.INSUFFICIENT_QUOTA,
    "insufficientuserquota": ErrorCode.INSUFFICIENT_QUOTA,
    "insufficientbalance": ErrorCode.INSUFFICIENT_QUOTA,
    "insufficientcredits": ErrorCode.INSUFFICIENT_QUOTA,
    "insufficientfunds": ErrorCode.INSUFFICIENT_QUOTA,
    "outofcredits": ErrorCode.INSUFFICIENT_QUOTA,
    "paymentrequired": ErrorCode.INSUFFICIENT_QUOTA,
    "exceededcurrentquota": ErrorCode.INSUFFICIENT_QUOTA,  # Moonshot
    "creditbalanceexhausted": ErrorCode.INSUFFICIENT_QUOTA,
    "organizationusagelimitexceeded": ErrorCode.INSUFFICIENT_QUOTA,
    "billinghardlimitreached": ErrorCode.INSUFFICIENT_QUOTA,
    "billingnotactive": ErrorCode.INSUFFICIENT_QUOTA,
    "billing": ErrorCode.INSUFFICIENT_QUOTA,
    "budgetexceeded": ErrorCode.INSUFFICIENT_QUOTA,  # LiteLLM
    "arrearage": ErrorCode.INSUFFICIENT_QUOTA,  # Alibaba
    "accountoverdue": ErrorCode.INSUFFICIENT_QUOTA,  # Volcengine
    "1113": ErrorCode.INSUFFICIENT_QUOTA,  # Z.ai
    "spendlimitexceeded": ErrorCode.INSUFFICIENT_QUOTA,
    "toolusefailed": ErrorCode.TOOL_USE_FAILED,
    # The Responses API reports these within the stream.
    "biopolicy": ErrorCode.CONTENT_FILTER,
    "misalignmentpolicyviolation": ErrorCode.CONTENT_FILTER,
    "imagecontentpolicyviolation": ErrorCode.CONTENT_FILTER,
    "vectorstoretimeout": ErrorCode.TIMEOUT,
}

# Codes and types that say that the key is not accepted, where the status does not: see _VAGUE_STATUSES.
_KEY_CAUSES: Final = frozenset(
    {
        "authentication",
        "unauthenticated",
        "unauthorized",
        "invalidapikey",
        "incorrectapikey",
        "apikeyinvalid",  # Google, with 400
        "invalidauthentication",
        "invalidiamtoken",
    }
)

# Codes and types of errors without a status. Folded as above.
_BY_TYPE: Final[dict[str, ErrorCode]] = {
    "badrequest": ErrorCode.BAD_REQUEST,
    "invalidrequest": ErrorCode.BAD_REQUEST,
    "invalidargument": ErrorCode.BAD_REQUEST,
    "failedprecondition": ErrorCode.BAD_REQUEST,
    "invalidprompt": ErrorCode.BAD_REQUEST,
    "dataresidencymismatch": ErrorCode.BAD_REQUEST,
    "unsupportedimagemediatype": ErrorCode.BAD_REQUEST,
    "unsupportedimageformat": ErrorCode.BAD_REQUEST,
    "emptyimagefile": ErrorCode.BAD_REQUEST,
    "failedtodownloadimage": ErrorCode.BAD_REQUEST,
    "maxtokensexceeded": ErrorCode.BAD_REQUEST,
    "stringtoolong": ErrorCode.BAD_REQUEST,
    "preconditionfailed": ErrorCode.BAD_REQUEST,
    "validation": ErrorCode.BAD_REQUEST,
    "permission": ErrorCode.PERMISSION,
    "permissiondenied": ErrorCode.PERMISSION,
    "forbidden": ErrorCode.PERMISSION,
    "notfound": ErrorCode.NOT_FOUND,
    "modelnotfound": ErrorCode.NOT_FOUND,
    "requesttoolarge": ErrorCode.PAYLOAD_TOO_LARGE,
    "payloadtoolarge": ErrorCode.PAYLOAD_TOO_LARGE,
    "unprocessable": ErrorCode.UNPROCESSABLE,
    "unprocessableentity": ErrorCode.UNPROCESSABLE,
    "conflict": ErrorCode.CONFLICT,
    "ratelimit": ErrorCode.RATE_LIMITED,
    "ratelimitexceeded": ErrorCode.RATE_LIMITED,
    "ratelimited": ErrorCode.RATE_LIMITED,
    "toomanyrequests": ErrorCode.RATE_LIMITED,
    "resourceexhausted": ErrorCode.RATE_LIMITED,
    "ratelimitreached": ErrorCode.RATE_LIMITED,
    "tokens": ErrorCode.RATE_LIMITED,  # OpenAI's types: what there were too many of
    "requests": ErrorCode.RATE_LIMITED,
    "slowdown": ErrorCode.RATE_LIMITED,
    "throttling": ErrorCode.RATE_LIMITED,
    "overloaded": ErrorCode.OVERLOADED,
    "overcapacity": ErrorCode.OVERLOADED,
    "engineoverloaded": ErrorCode.OVERLOADED,
    "modeloverloaded": ErrorCode.OVERLOADED,
    "provideroverloaded": ErrorCode.OVERLOADED,
    "providerunavailable": ErrorCode.OVERLOADED,
    "serverisoverloaded": ErrorCode.OVERLOADED,
    "capacityexceeded": ErrorCode.OVERLOADED,
    "serviceunavailable": ErrorCode.OVERLOADED,
    "unavailable": ErrorCode.OVERLOADED,
    "timeout": ErrorCode.TIMEOUT,
    "requesttimeout": ErrorCode.TIMEOUT,
    "deadlineexceeded": ErrorCode.TIMEOUT,
    "server": ErrorCode.SERVER_ERROR,
    "internal": ErrorCode.SERVER_ERROR,
    "internalserver": ErrorCode.SERVER_ERROR,
    "api": ErrorCode.SERVER_ERROR,
    "badgateway": ErrorCode.SERVER_ERROR,
    "gatewaytimeout": ErrorCode.SERVER_ERROR,
    # MiniMax's own numbers; see _layers.
    "baseresp1001": ErrorCode.TIMEOUT,
    "baseresp1002": ErrorCode.RATE_LIMITED,
    "baseresp1004": ErrorCode.AUTH,
    "baseresp1008": ErrorCode.INSUFFICIENT_QUOTA,
    "baseresp1013": ErrorCode.SERVER_ERROR,
    "baseresp1024": ErrorCode.SERVER_ERROR,
    "baseresp1026": ErrorCode.CONTENT_FILTER,
    "baseresp1027": ErrorCode.CONTENT_FILTER,
    "baseresp1033": ErrorCode.SERVER_ERROR,
    "baseresp1039": ErrorCode.RATE_LIMITED,
    "baseresp1041": ErrorCode.RATE_LIMITED,
    "baseresp1042": ErrorCode.BAD_REQUEST,
    "baseresp2013": ErrorCode.BAD_REQUEST,
    "baseresp2045": ErrorCode.RATE_LIMITED,
    "baseresp2049": ErrorCode.AUTH,
    "baseresp2056": ErrorCode.RATE_LIMITED,
}

#: Of these there are many, and more with every release: what they begin or end with is enough.
_IMAGE_CAUSES: Final = ("image", "invalidimage", "invalidbase64image")
_SPEND_CAUSE: Final = "spendlimitexceeded"

_CONTEXT_LENGTH: Final = re.compile(
    r"maximum context length|max(imum)? context (size|window)|context[ _]?(length|size|window)[^.]{0,40}exceed"
    r"|exceed[^.]{0,60}context[ _-]?(length|size|window|limit)|(greater|longer|larger|more) than the [^.]{0,40}context"
    r"|(prompt|input) (is )?too long|reduce the length of the (messages|prompt|input)"
    r"|(input|prompt)[^.]{0,20} tokens?[^.]{0,60}(exceed|must (be|have) (<=|less))|maximum (prompt|input) length"
    r"|tokens in the (prompt|input)[^.]{0,20}exceed|exceed[^.]{0,20}model('s)? token limit"
    r"|range of input length should be|context (the )?overflows?\b|loaded with context length",
    re.IGNORECASE,
)
#: A limit of tokens in a time; its messages name prompts and inputs, too.
_RATE: Final = re.compile(
    r"per[ -](second|min|hour|day)|\b[TR]P[MD]\b|rate[ -]?limit|throttl|quota",
    re.IGNORECASE,
)
#: What a server that failed says of itself or of one behind it: "context deadline exceeded", "the content filter timed
#: out". Whatever else it names, waiting may help.
_PASSES: Final = re.compile(r"deadline ?exceeded|time[sd]?[ -]?out|unavailable|overloaded|cancell?ed", re.IGNORECASE)
_TOO_LARGE: Final = re.compile(r"request too large for ", re.IGNORECASE)
_CONTENT: Final = re.compile(
    r"content (management|moderation|safety|usage) policy|content[ _]?(filter|policy)|our safety system"
    r"|inappropriate content|input (was|is) flagged",
    re.IGNORECASE,
)
_NO_CREDIT: Final = re.compile(
    r"insufficient (account )?(balance|credits?|funds)|(credit|account) balance (is )?(too low|insufficient|exhausted)"
    r"|(not enough|no|out of) (credits?|funds)\b|please (recharge|top up)|account is overdue|余额不足|欠费"
    r"|(billing( hard)?|spend(ing)?) limit[^.]{0,30}(reached|exceeded|hit)"
    r"|(reached|exceed(s|ed)?|hit)[^.]{0,60}(billing( hard)?|spend(ing)?) limit",
    re.IGNORECASE,
)
#: OpenAI says this if there is no credit, Google also if a limit per minute is reached, which passes.
_NO_QUOTA: Final = re.compile(r"exceeded your current quota", re.IGNORECASE)
_BAD_KEY: Final = re.compile(
    r"(invalid|incorrect|expired) api[ _-]?key|api[ _-]?key (is )?(not valid|invalid|incorrect|expired|missing)"
    r"|no api[ _-]?key|\bauthentication ?error\b",
    re.IGNORECASE,
)
#: Names of causes within a message, in which a gateway quotes the error it received.
_QUOTED_CODE: Final = re.compile(r"\b[A-Za-z]{2,32}(?:_[a-z]{2,32}){1,5}\b")

#: Statuses (None: there is none) that leave the cause open; the others name it at least as well as a message does.
_VAGUE_STATUSES: Final = frozenset({None, 400, 402, 403, 422, 429})


def _code_of_response(status: int, report: "_Report", *, asked_to_wait: bool) -> ErrorCode:
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES and status not in _BY_STATUS:
        return _code_of_report(report) if report.is_error else ErrorCode.INVALID_RESPONSE
    if status == HTTPStatus.PAYMENT_REQUIRED and (asked_to_wait or report.retry_after is not None):
        return ErrorCode.RATE_LIMITED  # the credit is only reserved by requests that are running
    return report.cause(status) or _code_of_status(status)


def _code_of_report(report: "_Report") -> ErrorCode:
    if report.status is not None:
        return _code_of_response(report.status, report, asked_to_wait=False)
    cause = report.cause(None)
    if cause is not None:
        return cause
    for word in report.words:
        code = _meant_by(_folded(word))
        if code is not None:
            return code
    return ErrorCode.PROVIDER_ERROR


def _meant_by(word: str) -> ErrorCode | None:
    return _BY_TYPE.get(word) or (ErrorCode.BAD_REQUEST if word.startswith(_IMAGE_CAUSES) else None)


def _cause_named(word: str) -> ErrorCode | None:
    return _CAUSES.get(_SPEND_CAUSE if word.endswith(_SPEND_CAUSE) else word)


def _code_of_status(status: int) -> ErrorCode:
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return ErrorCode.SERVER_ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ErrorCode.BAD_REQUEST


def _folded(word: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", word.lower())
    return letters.removesuffix("exception").removesuffix("error")


def _sentence(what: str, code: ErrorCode, provider_code: str | None) -> str:
    named = f" ({provider_code})" if provider_code else ""
    meaning = _MEANING.get(code)
    return f"The provider answered with {what}{named}" + (f": {meaning}." if meaning else ".")


# -- error reports --------------------------------------------------------------------------------

#: Words of letters, or a number. No hyphens, no digits among letters, no long words: those could be part of a key.
_PLAIN_CODE: Final = re.compile(r"[A-Za-z]{1,32}(?:[_.][A-Za-z]{1,32}){0,6}(?:_[0-9]{1,5})?|[0-9]{1,6}")
_PLAIN_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=\-]{1,128}")
_MAX_BODY: Final = 1024 * 1024  #: Bytes of an error body that are examined.
_MAX_TEXT: Final = 10_000  #: Characters of an error's texts that are examined.
_MAX_WRAPPERS: Final = 8  #: Levels of nesting around an error that are unwrapped.
_WORD_KEYS: Final = ("code", "type", "status", "error_code", "reason")
_EXACT_KEY: Final = "error_type"  #: OpenRouter folds what others send into a few codes; this is the exact one.
_STATUS_KEYS: Final = ("status_code", "statusCode", "http_status", "http_code", "status", "code")
_TEXT_KEYS: Final = ("message", "msg", "detail")
_INNER_KEYS: Final = ("error", "errors", "detail", "innererror", "metadata", "raw", "message")
_MAX_DETAILS: Final = 8  #: Entries of a list of details that are looked at.
_SHOULD_RETRY: Final = {"true": True, "false": False}  #: The provider's own advice.


@dataclass(frozen=True, slots=True)
class _Report:
    """An error body without its wrapping. ``text`` is matched against patterns and never stored or shown."""

    is_error: bool
    status: int | None
    words: tuple[str, ...]
    text: str
    retry_after: float | None
    provider_error: ProviderError | None

    @classmethod
    def of(cls, body: object) -> "_Report":
        decoded = _decoded(body)
        layers = list(_layers(decoded, _MAX_WRAPPERS))
        # The innermost layer is the most precise: gateways wrap the error they received.
        words = [word for layer in reversed(layers) if (word := _word(layer.get(_EXACT_KEY)))]
        words += [word for layer in reversed(layers) for key in _WORD_KEYS if (word := _word(layer.get(key)))]
        statuses = [status for layer in reversed(layers) for key in _STATUS_KEYS if (status := _status(layer.get(key)))]
        texts = [text for layer in layers for key in _TEXT_KEYS if isinstance(text := layer.get(key), str)]
        waits = [wait for layer in reversed(layers) for wait in _waits(layer)]
        waits += [wait for text in texts if (wait := _wait_in(text[:_MAX_TEXT])) is not None]
        return cls(
            is_error=bool(layers) and not isinstance(decoded, str),
            status=statuses[0] if statuses else None,
            words=tuple(words),
            text="\n".join(texts)[:_MAX_TEXT],
            retry_after=waits[0] if waits else None,
            provider_error=provider_error(layers),
        )

    @property
    def provider_code(self) -> str | None:
        plain = [word for word in self.words if _PLAIN_CODE.fullmatch(word)]
        return next((word for word in plain if not word.isdecimal()), plain[0] if plain else None)

    def cause(self, status: int | None) -> ErrorCode | None:
        """Return the code that the error's words give, if it is more precise than ``status``."""
        broken = status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR
        vague = broken or status in _VAGUE_STATUSES
        readable = vague and (self.is_error or not broken)  # not the page of a gateway
        if readable and (broken or status is None):
            readable = _PASSES.search(self.text) is None
        quoted = [_folded(word) for word in _QUOTED_CODE.findall(self.text)] if readable else []
        for word in (*map(_folded, self.words), *quoted):
            if (code := _cause_named(word)) is not None:
                return code
            if vague and word in _KEY_CAUSES and status != HTTPStatus.FORBIDDEN:
                return ErrorCode.AUTH
        return self._cause_of_text(status) if readable else None

    def _cause_of_text(self, status: int | None) -> ErrorCode | None:
        text = self.text
        if status == HTTPStatus.TOO_MANY_REQUESTS and _TOO_LARGE.search(text):
            return ErrorCode.PAYLOAD_TOO_LARGE  # larger than what a minute allows: no minute will do
        meant = {_meant_by(_folded(word)) for word in self.words}
        busy = not meant.isdisjoint({ErrorCode.RATE_LIMITED, ErrorCode.OVERLOADED})
        rated = status == HTTPStatus.TOO_MANY_REQUESTS or busy or _RATE.search(text)
        if not rated and _CONTEXT_LENGTH.search(text):
            return ErrorCode.CONTEXT_LENGTH_EXCEEDED
        if _NO_CREDIT.search(text):
            return ErrorCode.INSUFFICIENT_QUOTA
        google = any(_folded(word) == "resourceexhausted" for word in self.words)
        if _NO_QUOTA.search(text) and not google and self.retry_after is None:
            return ErrorCode.INSUFFICIENT_QUOTA
        if not rated and _CONTENT.search(text):
            return ErrorCode.CONTENT_FILTER
        if status != HTTPStatus.FORBIDDEN and _BAD_KEY.search(text):
            return ErrorCode.AUTH
        return None


def _decoded(body: object) -> object:
    if not isinstance(body, bytes | bytearray | str):
        return body
    beginning = body[:_MAX_BODY]
    try:
        return orjson.loads(beginning)
    except orjson.JSONDecodeError:
        return beginning if isinstance(beginning, str) else beginning.decode(errors="replace")


def _layers(value: object, depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the nested objects of an error, outermost first; a text may hold the JSON of another error."""
    if not depth:
        return
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("{", "[")) and not isinstance(inner := _decoded(text), str):
            yield from _layers(inner, depth - 1)
        elif text:
            yield {"code": text} if "_" in text and _PLAIN_CODE.fullmatch(text) else {"message": text}
    elif isinstance(value, list):
        if value:
            yield from _layers(value[0], depth - 1)
    elif isinstance(value, Mapping) and value:
        yield value
        base_resp = value.get("base_resp")  # MiniMax; elsewhere the same numbers mean something else
        if isinstance(base_resp, Mapping) and base_resp.get("status_code"):
            yield {"code": f"base_resp_{_word(base_resp['status_code'])}", "message": base_resp.get("status_msg")}
        for key in _INNER_KEYS:
            inner = value.get(key)
            if isinstance(inner, str) and key in _TEXT_KEYS and not inner.lstrip().startswith(("{", "[")):
                continue  # the layer's own text
            yield from _layers(inner, depth - 1)
        details = value.get("details")  # Google
        for detail in details[:_MAX_DETAILS] if isinstance(details, list) else ():
            if isinstance(detail, Mapping):
                yield detail


def _word(value: object) -> str | None:
    if isinstance(value, str):
        return value.strip()[:200] or None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**9:
        return str(value)
    return None


def _status(value: object) -> int | None:
    word = _word(value)
    if word is None or not re.fullmatch(r"[45][0-9]{2}", word):
        return None
    return int(word)


def _waits(layer: Mapping[str, Any]) -> Iterator[float]:
    """Yield the waits, in seconds, that an error object asks for."""
    for key, unit in _WAIT_KEYS.items():
        asked = layer.get(key)
        if isinstance(asked, int | float | str) and (
            wait := durations.of_number(str(asked), unit) or durations.of_units(str(asked))
        ):
            yield wait
    headers = layer.get("headers")  # OpenRouter, LiteLLM: those of the provider behind them
    if isinstance(headers, Mapping):
        lowered = {str(name).lower(): str(value) for name, value in headers.items()}
        if (wait := _retry_after(lowered, time.time())) is not None:
            yield wait
    delay = layer.get("retryDelay")  # Google: a RetryInfo among the details
    if isinstance(delay, str) and (wait := durations.of_units(delay)) is not None:
        yield wait


def _wait_in(text: str) -> float | None:
    """Return the seconds that an error's text asks to wait, as in ``Please try again in 6.57s``."""
    match = _TRY_AGAIN.search(text)
    if match is None:
        return None
    number, unit = match["number"], match["unit"]
    if unit is None:
        return durations.of_units(match["duration"]) if match["duration"] else None
    return durations.plausible(
        float(number) * durations.UNIT_SECONDS["ms" if unit.lower().startswith("mil") else unit[0].lower()]
    )


# -- headers --------------------------------------------------------------------------------------

_REQUEST_ID_HEADERS: Final = ("x-request-id", "request-id", "apim-request-id", "x-ms-request-id", "cf-ray")
#: Fields of an error object that hold a wait, and their unit in seconds.
_WAIT_KEYS: Final = {
    "retry_after": 1.0,
    "retryAfter": 1.0,
    "retry_after_seconds": 1.0,
    "retry_after_ms": 0.001,
    "retryAfterMs": 0.001,
}
_TRY_AGAIN: Final = re.compile(
    r"(?:try again|retry)(?: your request)? (?:in|after) (?:(?P<number>[0-9]{1,6}(?:\.[0-9]{1,9})?) ?"
    r"(?P<unit>milliseconds?|seconds?|minutes?|hours?)|(?P<duration>(?:[0-9.]{1,12}(?:ms|[dhms]))+))\b",
    re.IGNORECASE,
)
_RESET: Final = "x-ratelimit-reset"
_REMAINING: Final = "x-ratelimit-remaining"


def _request_id(headers: Mapping[str, str]) -> str | None:
    for name in _REQUEST_ID_HEADERS:
        value = headers.get(name, "").strip()
        if _PLAIN_REQUEST_ID.fullmatch(value):
            return value
    return None


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that the headers ask to wait; the most precise header counts."""
    milliseconds = durations.of_number(headers.get("retry-after-ms", ""), unit=0.001)
    if milliseconds is not None:
        return milliseconds
    text = headers.get("retry-after", "")
    asked = durations.of_number(text) or durations.of_units(text) or durations.until_date(text, now)
    return _until_reset(headers, now) if asked is None else asked


def _until_reset(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until all exhausted limits have reset, or until the first reset if none is exhausted."""
    exhausted: list[float] = []
    others: list[float] = []
    for name, value in headers.items():
        if not name.startswith(_RESET) or (wait := durations.until_reset(value, now)) is None:
            continue
        remaining = headers.get(_REMAINING + name.removeprefix(_RESET), "").strip()
        (exhausted if remaining == "0" else others).append(wait)
    return max(exhausted) if exhausted else min(others, default=None)
