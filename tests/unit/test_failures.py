"""Failures: every way in which providers report an error maps to one of the contract's codes."""

import json
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.errors import ErrorCode
from keepstream_worker.providers.failures import failure_from_response, failure_from_stream_error

NOW = 1_800_000_000.0


def error(**fields: object) -> dict[str, object]:
    return {"error": fields}


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, error(message="bad", type="invalid_request_error", code="invalid_value"), ErrorCode.BAD_REQUEST),
        (400, None, ErrorCode.BAD_REQUEST),
        (400, error(message="x", code="context_length_exceeded"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, error(message="x", type="exceed_context_size_error"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, error(message="This model's maximum context length is 8 tokens."), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, error(message="prompt is too long: 9 tokens > 8 maximum"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, error(message="the request exceeds the available context size"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, error(message="Input length 9 exceeds the context window"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, [error(code=400, message="x", status="INVALID_ARGUMENT")], ErrorCode.BAD_REQUEST),
        (400, error(message="filtered", code="content_filter", status=400), ErrorCode.CONTENT_FILTER),
        (400, error(code="x", innererror={"code": "ResponsibleAIPolicyViolation"}), ErrorCode.CONTENT_FILTER),
        (400, error(message="x", code="tool_use_failed"), ErrorCode.TOOL_USE_FAILED),
        (400, {"object": "error", "message": "maximum context length", "code": 400}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, b"Error: prompt is too long", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (400, b"\xff\xfe", ErrorCode.BAD_REQUEST),
        (401, error(code="invalid_api_key"), ErrorCode.AUTH),
        (402, error(code=402, message="Insufficient credits"), ErrorCode.INSUFFICIENT_QUOTA),
        (403, error(message="no"), ErrorCode.PERMISSION),
        (404, error(code="model_not_found"), ErrorCode.NOT_FOUND),
        (405, None, ErrorCode.BAD_REQUEST),
        (408, None, ErrorCode.TIMEOUT),
        (409, error(message="conflict"), ErrorCode.CONFLICT),
        (413, error(code="rate_limit_exceeded", type="tokens"), ErrorCode.PAYLOAD_TOO_LARGE),
        (415, None, ErrorCode.BAD_REQUEST),
        (422, {"detail": [{"loc": ["body"], "msg": "field required", "type": "value_error"}]}, ErrorCode.UNPROCESSABLE),
        (425, None, ErrorCode.SERVER_ERROR),
        (429, error(code="rate_limit_exceeded"), ErrorCode.RATE_LIMITED),
        (429, error(code="slow_down", type="rate_limit_error"), ErrorCode.RATE_LIMITED),
        (429, error(code=429, status="RESOURCE_EXHAUSTED", message="exceeded your quota"), ErrorCode.RATE_LIMITED),
        (429, "Too Many Requests", ErrorCode.RATE_LIMITED),
        (429, error(type="insufficient_quota", code=None), ErrorCode.INSUFFICIENT_QUOTA),
        (429, error(type="x", code="credit_balance_exhausted"), ErrorCode.INSUFFICIENT_QUOTA),
        (429, error(code="organization_spend_limit_exceeded"), ErrorCode.INSUFFICIENT_QUOTA),
        (429, error(code="project_spend_limit_exceeded"), ErrorCode.INSUFFICIENT_QUOTA),
        (429, error(code="organization_usage_limit_exceeded"), ErrorCode.INSUFFICIENT_QUOTA),
        (429, [error(code="insufficient_quota")], ErrorCode.INSUFFICIENT_QUOTA),
        (498, error(code="capacity_exceeded"), ErrorCode.OVERLOADED),
        (499, None, ErrorCode.CONNECTION),
        (500, '{"error":{"mess', ErrorCode.SERVER_ERROR),
        (500, error(code="insufficient_quota"), ErrorCode.SERVER_ERROR),
        (501, None, ErrorCode.BAD_REQUEST),
        (502, "<html><h1>502 Bad Gateway</h1></html>", ErrorCode.SERVER_ERROR),
        (503, error(code="server_is_overloaded"), ErrorCode.OVERLOADED),
        (503, error(code="slow_down"), ErrorCode.OVERLOADED),
        (504, b"upstream request timeout", ErrorCode.SERVER_ERROR),
        (505, None, ErrorCode.BAD_REQUEST),
        *((status, "", ErrorCode.SERVER_ERROR) for status in (507, 520, 521, 522, 523, 524, 530, 599)),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, ErrorCode.OVERLOADED),
        *((status, "", ErrorCode.BAD_REQUEST) for status in (300, 301, 302, 303, 304, 307, 308)),
        (418, None, ErrorCode.BAD_REQUEST),
        (204, None, ErrorCode.EMPTY_STREAM),
        (200, error(code=429, message="slow down"), ErrorCode.RATE_LIMITED),
        (200, "<html></html>", ErrorCode.INVALID_RESPONSE),
    ],
)
def test_a_response_is_named_by_status_and_cause(status: int, body: object, code: ErrorCode):
    failure = failure_from_response(status, {}, body)
    assert failure.code == code
    assert failure.http_status == status
    if isinstance(body, dict | list):
        assert failure_from_response(status, {}, json.dumps(body)) == failure
        assert failure_from_response(status, {}, json.dumps(body).encode()) == failure


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (error(message="x", type="server_error", code=None), ErrorCode.SERVER_ERROR),
        (error(message="x", code=502), ErrorCode.SERVER_ERROR),
        (error(message="x", code="502"), ErrorCode.SERVER_ERROR),
        (error(message="x", code=503), ErrorCode.OVERLOADED),
        (error(message="x", code=429), ErrorCode.RATE_LIMITED),
        (error(message="x", code=401), ErrorCode.AUTH),
        (error(message="x", code=402), ErrorCode.INSUFFICIENT_QUOTA),
        (error(message="x", code=400), ErrorCode.BAD_REQUEST),
        (error(message="x", status_code=404), ErrorCode.NOT_FOUND),
        (error(message="x", type="invalid_request_error"), ErrorCode.BAD_REQUEST),
        (error(message="x", type="BadRequestError"), ErrorCode.BAD_REQUEST),
        (error(message="x", type="rate_limit_error"), ErrorCode.RATE_LIMITED),
        (error(message="x", type="tokens", code="rate_limit_exceeded"), ErrorCode.RATE_LIMITED),
        (error(message="x", type="insufficient_quota", code=429), ErrorCode.INSUFFICIENT_QUOTA),
        (error(message="x", type="invalid_request_error", code="tool_use_failed", status_code=400), "tool_use_failed"),
        (error(message="x", code="CONTEXT_LENGTH_EXCEEDED"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (error(message="Context length exceeded"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (error(message="x", code="content_filter"), ErrorCode.CONTENT_FILTER),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, ErrorCode.OVERLOADED),
        ({"type": "error", "error": {"type": "api_error", "message": "x"}}, ErrorCode.SERVER_ERROR),
        ({"message": "upstream crashed", "type": "server_error", "code": 500}, ErrorCode.SERVER_ERROR),
        ({"object": "error", "message": "maximum context length", "code": 400}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ({"success": False, "errors": [{"code": 7009, "message": "Upstream"}]}, ErrorCode.PROVIDER_ERROR),
        ([error(code=503, status="UNAVAILABLE")], ErrorCode.OVERLOADED),
        ([error(status="RESOURCE_EXHAUSTED")], ErrorCode.RATE_LIMITED),
        ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, ErrorCode.RATE_LIMITED),
        ({"base_resp": {"status_code": 1000, "status_msg": "unknown"}}, ErrorCode.PROVIDER_ERROR),
        (error(message="x", code="1002"), ErrorCode.PROVIDER_ERROR),
        ({"error": "something went wrong"}, ErrorCode.PROVIDER_ERROR),
        ({"error": {"error": {"code": 503}}}, ErrorCode.OVERLOADED),
        ("something went wrong", ErrorCode.PROVIDER_ERROR),
        (b'{"code":500}', ErrorCode.SERVER_ERROR),
        ({}, ErrorCode.PROVIDER_ERROR),
        (None, ErrorCode.PROVIDER_ERROR),
        ([], ErrorCode.PROVIDER_ERROR),
        (17, ErrorCode.PROVIDER_ERROR),
    ],
)
def test_an_error_in_a_stream_is_named_whatever_its_shape(payload: object, code: ErrorCode):
    failure = failure_from_stream_error(payload)
    assert failure.code == code
    assert failure.http_status is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"Retry-After": " 1.5 "}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, None),
        *(
            ({"retry-after": text}, None)
            for text in ("", "soon", "inf", "nan", "-3", "0", "1e999", "1e300", "3, 4", "Mon, 99 Foo", "\u0663\u0663x")
        ),
        ({"retry-after": "nan", "x-ratelimit-reset-requests": "1s"}, 1.0),
        ({"x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-tokens": "7.66s"}, 7.66),
        ({"x-ratelimit-reset-tokens": "1d"}, 86_400.0),
        ({"x-ratelimit-reset-tokens": "12.5"}, 12.5),
        ({"x-ratelimit-reset-tokens": "later"}, None),
        ({"x-ratelimit-reset-tokens": "0s"}, None),
        ({"x-ratelimit-reset": str(int(NOW + 9))}, 9.0),
        ({"x-ratelimit-reset": str(int((NOW + 9) * 1000))}, 9.0),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, 1.0),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-requests": "3",
                "x-ratelimit-remaining-tokens": "0",
            },
            360.0,
        ),
        ({"retry-after": "2", "x-ratelimit-reset-tokens": "6m0s"}, 2.0),
        ({}, None),
    ],
)
def test_the_wait_is_what_the_most_precise_header_says(headers: dict[str, str], seconds: float | None):
    wait = failure_from_response(429, headers, None, now=NOW).retry_after
    assert wait == (seconds if seconds is None else pytest.approx(seconds))


def test_the_wait_may_stand_in_the_body():
    google = error(code=429, details=[{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "32s"}])
    assert failure_from_stream_error([google]).retry_after == 32.0
    assert failure_from_stream_error(error(code=429, retry_after=3)).retry_after == 3.0
    assert failure_from_response(429, {"retry-after": "5"}, google).retry_after == 5.0


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [
        ({"x-request-id": "req_123"}, "req_123"),
        ({"X-Request-ID": "req_123", "cf-ray": "8a-FRA"}, "req_123"),
        ({"cf-ray": "8a-FRA"}, "8a-FRA"),
        ({"x-request-id": "two words"}, None),
        ({"x-request-id": "x" * 500}, None),
        ({}, None),
    ],
)
def test_the_request_id_is_kept_if_it_is_one(headers: dict[str, str], request_id: str | None):
    assert failure_from_response(500, headers, None).provider_request_id == request_id


@pytest.mark.parametrize(
    ("fields", "provider_code"),
    [
        ({"code": "rate_limit_exceeded"}, "rate_limit_exceeded"),
        ({"code": 503, "type": "BadRequestError"}, "BadRequestError"),
        ({"code": 503}, "503"),
        ({"code": "sk-proj-abcdef"}, None),
        ({"code": "sk_live_51H8x9"}, None),
        ({"code": "the prompt was: hello"}, None),
        ({"code": "x" * 40}, None),
        ({"code": None, "type": ["odd"]}, None),
    ],
)
def test_only_a_plain_identifier_is_kept_of_the_providers_words(fields: dict[str, object], provider_code: str | None):
    assert failure_from_stream_error({"error": fields}).provider_code == provider_code


SECRET = "sk-proj-a1b2c3 and my prompt"
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just(SECRET),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["error", "errors", "message", "code", "type", "status", "detail", "base_resp", "details", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(body=JSON, status=st.integers(100, 599), retry_after=st.text(max_size=20))
def test_any_body_gives_a_failure_without_the_providers_text(body: object, status: int, retry_after: str):
    for failure in (
        failure_from_response(status, {"retry-after": retry_after, "x-ratelimit-reset-a": retry_after}, body),
        failure_from_stream_error(body),
    ):
        assert "sk-proj" not in repr(failure)
        assert "prompt" not in repr(failure).replace("the prompt", "").replace("refused the prompt", "")
        assert failure.retry_after is None or 0 < failure.retry_after < 1e7


@pytest.mark.parametrize("key", ["error", "code", "type", "message", "detail", "details", "base_resp", "retry_after"])
def test_a_body_nested_without_end_is_no_obstacle(key: str):
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for body in (
        deep,
        {key: deep},
        {"error": {key: deep}},
        {key: {"status_code": deep}},
        {key: [{"retryDelay": deep}]},
    ):
        assert failure_from_response(500, {}, body).code == ErrorCode.SERVER_ERROR
        assert failure_from_stream_error(body).code == ErrorCode.PROVIDER_ERROR
