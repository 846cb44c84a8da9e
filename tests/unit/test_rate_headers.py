"""What providers say about their limits, in all their spellings, and what of it is believed."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream_worker.limits import RateLimits
from keepstream_worker.providers.failures import failure_from_response
from keepstream_worker.providers.rate_headers import read_rate_limits

NOW = 1_800_000_000.0
IN_20_SECONDS = datetime.fromtimestamp(NOW + 20, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def openai(kind: str, limit: object, remaining: object, reset: object) -> dict[str, str]:
    parts = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{part}-{kind}": str(value) for part, value in parts.items()}


def read(headers: dict[str, str]) -> RateLimits | None:
    return read_rate_limits(headers, now=NOW)


@pytest.mark.parametrize(
    ("headers", "rates"),
    [
        pytest.param(
            openai("requests", 500, 499, "120ms") | openai("tokens", 30_000, 29_000, "2s"),
            RateLimits(500, 30_000, 499, 29_000, 0.12, 2.0),
            id="OpenAI",
        ),
        pytest.param(
            openai("requests", 10_000, 9_999, "6ms") | openai("tokens", 2_000_000, 1_000_000, "30s"),
            RateLimits(10_000, 2_000_000, 9_999, 1_000_000, 0.006, 30.0),
            id="OpenAI, a high tier",
        ),
        pytest.param(
            openai("requests", 10_000, 9_999, "8.64s") | openai("tokens", 30_000, 0, "1m0s"),
            RateLimits(None, 30_000, None, 0, None, 60.0),
            id="OpenAI, requests of a day",
        ),
        pytest.param(
            {
                "x-ratelimit-limit-requests": "100",
                "x-ratelimit-remaining-requests": "99",
                "x-ratelimit-limit-tokens": "9000",
            },
            RateLimits(100, 9000, 99),
            id="Azure, without resets",
        ),
        pytest.param(
            {"x-ratelimit-remaining-requests": "99", "x-ratelimit-remaining-tokens": "8000"},
            RateLimits(remaining_requests=99, remaining_tokens=8000),
            id="Azure, formerly",
        ),
        pytest.param(
            openai("requests", 14_400, 14_370, "2m59.56s") | openai("tokens", 18_000, 17_997, "7.66s"),
            RateLimits(None, 18_000, None, 17_997, None, 7.66),
            id="Groq, requests of a day",
        ),
        pytest.param(
            openai("requests", 14_400, 14_399, "6s") | openai("tokens", 18_000, 17_997, "10ms"),
            RateLimits(None, 18_000, None, 17_997, None, 0.01),
            id="Groq, the first request of a day",
        ),
        pytest.param(
            {
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": IN_20_SECONDS,
                "anthropic-ratelimit-tokens-limit": "40000",
                "anthropic-ratelimit-tokens-remaining": "39000",
                "anthropic-ratelimit-tokens-reset": IN_20_SECONDS,
            },
            RateLimits(50, 40_000, 49, 39_000, 20.0, 20.0),
            id="Anthropic",
        ),
        pytest.param(
            {
                "anthropic-ratelimit-input-tokens-limit": "40000",
                "anthropic-ratelimit-input-tokens-remaining": "39000",
                "anthropic-ratelimit-output-tokens-limit": "8000",
                "anthropic-ratelimit-output-tokens-remaining": "7000",
                "anthropic-ratelimit-output-tokens-reset": IN_20_SECONDS,
            },
            RateLimits(None, 48_000, None, 46_000, None, 20.0),
            id="Anthropic, by input and output",
        ),
        pytest.param(
            {
                "X-RateLimit-Limit": "20",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": str(int((NOW + 40) * 1000)),
            },
            RateLimits(20, None, 0, None, 40.0, None),
            id="OpenRouter, of a minute",
        ),
        pytest.param(
            {
                "X-RateLimit-Limit": "50",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": str(int((NOW + 9000) * 1000)),
            },
            None,
            id="OpenRouter, of a day",
        ),
        pytest.param(
            {"X-RateLimit-Limit": "5", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1"}, None, id="of a second"
        ),
        pytest.param({"X-RateLimit-Limit": "5"}, None, id="of who knows what"),
        pytest.param(
            {
                "x-ratelimit-limit-req-minute": "60",
                "x-ratelimit-remaining-req-minute": "59",
                "x-ratelimit-limit-tokens-minute": "500000",
                "x-ratelimit-remaining-tokens-minute": "499000",
                "x-ratelimit-limit-tokens-month": "1000000000",
            },
            RateLimits(60, 500_000, 59, 499_000),
            id="Mistral",
        ),
        pytest.param(
            {"x-ratelimitbysize-limit-minute": "500000", "x-ratelimitbysize-remaining-minute": "499000"},
            RateLimits(tokens_per_minute=500_000, remaining_tokens=499_000),
            id="Mistral, formerly",
        ),
        pytest.param(
            openai("requests-day", 14_400, 14_399, "33011.38") | openai("tokens-minute", 60_000, 59_000, "11.38"),
            RateLimits(None, 60_000, None, 59_000, None, 11.38),
            id="Cerebras",
        ),
        pytest.param({"content-type": "text/event-stream"}, None, id="nothing"),
    ],
)
def test_each_spelling_is_read(headers: dict[str, str], rates: RateLimits | None) -> None:
    assert read(headers) == rates
    assert read({name.upper(): value for name, value in headers.items()}) == rates


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "1e300", "unlimited", "", "100, 100;w=60"])
def test_what_is_no_limit_takes_its_rest_and_its_reset_with_it(limit: str) -> None:
    assert read(openai("requests", limit, 5, "1s")) is None


@pytest.mark.parametrize("reset", ["1h", "61m", "3600", str(NOW + 86_000), "2m0s"])
def test_a_limit_that_resets_after_more_than_a_minute_is_of_a_longer_time(reset: str) -> None:
    assert read(openai("tokens", 1000, 10, reset)) is None


def test_a_rest_above_its_limit_is_none() -> None:
    assert read(openai("tokens", 1000, 2000, "1s")) == RateLimits(tokens_per_minute=1000, tokens_reset=1.0)


@pytest.mark.parametrize("used", [1, 2, 59, 300, 599])
def test_a_window_of_a_minute_is_believed_however_much_of_it_is_used(used: int) -> None:
    # A window's reset says nothing about how much comes back until then; a bucket's does.
    window = read(openai("requests", 600, 600 - used, "59s"))
    bucket = read(openai("requests", 600, 600 - used, f"{used / 10}s"))
    assert window is not None
    assert bucket is not None
    assert window.requests_per_minute == bucket.requests_per_minute == 600


@pytest.mark.parametrize("used", [1, 2, 5])
@pytest.mark.parametrize("seconds", [3600, 86_400])
def test_a_bucket_of_an_hour_or_a_day_is_known_by_how_slowly_it_fills(used: int, seconds: int) -> None:
    limit = 10 * seconds // 60
    assert read(openai("requests", limit, limit - used, f"{used * seconds / limit:.2f}s")) is None


def test_a_refusal_says_it_as_well() -> None:
    failure = failure_from_response(429, openai("tokens", 1000, 0, "30s"), None, now=NOW)
    assert failure.rate_limits == RateLimits(tokens_per_minute=1000, remaining_tokens=0, tokens_reset=30.0)
    assert failure_from_response(429, {}, None).rate_limits is None


NAMES = sorted(
    {
        f"x-ratelimit-{part}{kind}"
        for part in ("limit", "remaining", "reset")
        for kind in ("", "-requests", "-tokens", "-req-minute", "-tokens-minute")
    }
    | {f"anthropic-ratelimit-{kind}-{part}" for kind in ("requests", "input-tokens") for part in ("limit", "reset")}
)


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=80) | st.floats().map(str) | st.integers().map(str)))
def test_any_headers_are_read_and_only_sane_numbers_come_out(headers: dict[str, str]) -> None:
    rates = read(headers)
    for limit in (rates.requests_per_minute, rates.tokens_per_minute) if rates else ():
        assert limit is None or 1 <= limit <= 2e12
