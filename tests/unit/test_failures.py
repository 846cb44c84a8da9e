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
        (500, error(code="insufficient_quota"), ErrorCode.INSUFFICIENT_QUOTA),
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


OPENAI_QUOTA = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        # No credit, however it is said.
        (429, error(code="1113", message="Insufficient balance or no resource package."), "insufficient_quota"),
        (429, error(code="1113", message="x"), "insufficient_quota"),
        (429, error(code="9", message="余额不足或无可用资源包,请充值。"), "insufficient_quota"),
        (429, error(message="Your team has reached its monthly spending limit."), "insufficient_quota"),
        (400, error(message="Billing hard limit has been reached"), "insufficient_quota"),
        (
            400,
            error(message="input length and `max_tokens` exceed context limit: 9 + 2 > 8"),
            "context_length_exceeded",
        ),
        (429, error(type="exceeded_current_quota_error", message="suspended"), "insufficient_quota"),
        (429, error(message=OPENAI_QUOTA, code=429), "insufficient_quota"),
        (429, error(message=OPENAI_QUOTA, code=429, status="RESOURCE_EXHAUSTED"), "rate_limited"),
        (429, error(message=OPENAI_QUOTA + " Please retry in 32.1s.", code=429), "rate_limited"),
        (400, error(type="invalid_request_error", message="Your credit balance is too low"), "insufficient_quota"),
        (400, error(code="Arrearage", message="Access denied"), "insufficient_quota"),
        (403, error(code="insufficient_user_quota", type="new_api_error"), "insufficient_quota"),
        (500, error(message=f"litellm.RateLimitError: OpenAIException - {OPENAI_QUOTA}"), "insufficient_quota"),
        (503, error(message="Error code: 429 - {'error': {'code': 'insufficient_quota'}}"), "insufficient_quota"),
        (502, error(message="x", metadata={"raw": '{"error":{"code":"insufficient_quota"}}'}), "insufficient_quota"),
        (502, error(message='{"error":{"message":"x","type":"insufficient_quota"}}'), "insufficient_quota"),
        (500, "upstream: insufficient_quota", "server_error"),
        (429, error(message="Rate limit reached: no more than 5 requests per day"), "rate_limited"),
        (429, error(message="limit of 40,000 input tokens per minute exceeded"), "rate_limited"),
        (
            429,
            error(message="Request too large for m on tokens per min (TPM): Limit 3, Requested 5"),
            "payload_too_large",
        ),
        # 402 usually stays; if the provider says how long, the credit is only reserved.
        (402, error(code=402, message="x", metadata={"headers": {"Retry-After": "1"}}), "rate_limited"),
        (402, error(code=402, message="Insufficient credits"), "insufficient_quota"),
        # A key that is not accepted.
        (400, error(code=400, status="INVALID_ARGUMENT", message="API key not valid."), "auth"),
        (400, error(code=400, details=[{"@type": "x.ErrorInfo", "reason": "API_KEY_INVALID"}]), "auth"),
        (500, error(message="litellm.AuthenticationError: AuthenticationError: OpenAIException"), "auth"),
        (429, error(message="x", type="authentication_error"), "auth"),
        (403, error(message="x", code="unauthorized"), "permission"),
        # A filter.
        (400, error(message="The response was filtered due to Azure's content management policy."), "content_filter"),
        (400, error(code="data_inspection_failed"), "content_filter"),
        (400, error(code="1301", message="x"), "content_filter"),
        (403, error(message="your input was flagged", code=403), "content_filter"),
        (500, error(message="litellm.ContentPolicyViolationError: content_policy_violation"), "content_filter"),
        (400, error(message="Your request was rejected by our safety system."), "content_filter"),
        # A prompt that is too long.
        (500, error(message="the request exceeds the available context size"), "context_length_exceeded"),
        (400, error(message="litellm.ContextWindowExceededError: x"), "context_length_exceeded"),
        (400, error(message="Input is too long for requested model."), "context_length_exceeded"),
        (400, error(message="The input token count (9) exceeds the maximum number"), "context_length_exceeded"),
        (400, error(code="1261", message="Prompt exceeds max length"), "context_length_exceeded"),
        (
            422,
            error(message="Prompt contains 9 tokens, too large for model with 8 maximum context length"),
            "context_length_exceeded",
        ),
        # What passes stays what it is, also if a page or a message sounds like one of these.
        (502, "<html><title>502</title>prompt is too long, insufficient balance</html>", "server_error"),
        (429, error(message="Too many requests, reduce the length of the prompt"), "rate_limited"),
        (503, error(message="The model is overloaded. Please try again later."), "overloaded"),
        (500, error(message="rpc error: code = DeadlineExceeded desc = context deadline exceeded"), "server_error"),
        (503, error(message="Timeout exceeded: the request's context was canceled"), "overloaded"),
        (500, error(message="The content filter timed out"), "server_error"),
        (503, error(message="content_filter: the service is unavailable"), "overloaded"),
        (503, error(message="Unavailable: cannot tell whether the spending limit is reached"), "overloaded"),
        (500, error(message="Your API key is valid, but something else broke"), "server_error"),
        (429, error(message="Rate limit reached. A higher spending limit gives more.", code="x"), "rate_limited"),
    ],
)
def test_what_no_waiting_removes_is_told_whatever_it_is_wrapped_in(status: int, body: object, code: str):
    assert failure_from_response(status, {}, body).code == code
    if isinstance(body, dict):
        assert failure_from_response(status, {}, json.dumps(body)).code == code


def test_a_402_that_says_how_long_to_wait_passes():
    for headers in ({"retry-after": "1"}, {"retry-after-ms": "250"}):
        failure = failure_from_response(402, headers, error(code=402, message="in-flight budget"))
        assert failure.code == ErrorCode.RATE_LIMITED
        assert failure.retry_after
    assert failure_from_response(402, {"retry-after": "soon"}, None).code == ErrorCode.INSUFFICIENT_QUOTA


@pytest.mark.parametrize(
    ("headers", "advice"),
    [
        ({"x-should-retry": "true"}, True),
        ({"X-Should-Retry": " False "}, False),
        ({"x-should-retry": "perhaps"}, None),
        ({}, None),
    ],
)
def test_the_providers_advice_is_read(headers: dict[str, str], *, advice: bool | None):
    assert failure_from_response(500, headers, None).should_retry is advice


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
        ({"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, ErrorCode.BAD_REQUEST),
        ({"base_resp": {"status_code": 2013, "status_msg": "context window exceeds limit"}}, "context_length_exceeded"),
        ({"base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}, ErrorCode.AUTH),
        ({"base_resp": {"status_code": 1026, "status_msg": "input sensitive"}}, ErrorCode.CONTENT_FILTER),
        ({"base_resp": {"status_code": 1039, "status_msg": "token limit"}}, ErrorCode.RATE_LIMITED),
        (error(message="tokens to keep from the prompt is greater than the context length"), "context_length_exceeded"),
        (error(message="x", code=402, retry_after=2), ErrorCode.RATE_LIMITED),
        (error(message="input tokens per minute exceeded", type="rate_limit_error"), ErrorCode.RATE_LIMITED),
        (error(message="too many input tokens: limit exceeded", type="rate_limit_error"), ErrorCode.RATE_LIMITED),
        (error(message="too many prompt tokens: capacity exceeded", code="overloaded"), ErrorCode.OVERLOADED),
        (error(message="Rate limit for input tokens exceeded"), ErrorCode.PROVIDER_ERROR),
        (error(message="context deadline exceeded: context canceled", type="server_error"), ErrorCode.SERVER_ERROR),
        ({"error": "over_capacity"}, ErrorCode.OVERLOADED),
        ({"error": "insufficient_quota"}, ErrorCode.INSUFFICIENT_QUOTA),
        ({"error": '{"error":{"code":503}}'}, ErrorCode.OVERLOADED),
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
        ({"retry-after": formatdate(NOW + 30, usegmt=True).replace("GMT", "-0000")}, 30.0),
        ({"retry-after": "Thu, 15 Jan 2027 08:00:30"}, 30.0),
        ({"retry-after": "Friday, 15-Jan-27 08:00:30 GMT"}, 30.0),
        ({"retry-after": "1m30s"}, 90.0),
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
    ("fields", "seconds"),
    [
        ({"retry_after_ms": 250}, 0.25),
        ({"retryAfter": "1m30s"}, 90.0),
        ({"retry_after_seconds": 7}, 7.0),
        ({"metadata": {"headers": {"Retry-After": "9"}}}, 9.0),
        ({"metadata": {"headers": {"X-RateLimit-Reset": "12"}}}, 12.0),
        ({"message": "Rate limit reached. Please try again in 6.57s. Visit x."}, 6.57),
        ({"message": "Please try again in 20ms."}, 0.02),
        ({"message": "Please retry after 12 seconds."}, 12.0),
        ({"message": "Please retry in 1m2.5s."}, 62.5),
        ({"message": "Try again in 3 minutes"}, 180.0),
        ({"message": "try again in a while"}, None),
        ({"message": "Please try again in 5 parsecs"}, None),
        ({"message": "Please try again in 1.2.3s"}, None),
        ({"retry_after": True}, None),
        ({"retry_after": -1}, None),
    ],
)
def test_a_wait_in_the_body_is_read_in_every_form(fields: dict[str, Any], seconds: float | None):
    assert failure_from_response(429, {}, error(code=429, **fields)).retry_after == (
        seconds if seconds is None else pytest.approx(seconds)
    )


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
        assert "sk-proj" not in repr(failure.provider_error)
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
