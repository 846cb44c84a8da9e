"""Rate headers: what a provider's answer says about its limits.

In: the headers of an answer, a success or a refusal, from the HTTP transport.
Out: ``RateLimits``, for whoever learns limits. Pure.

Only a limit per minute is of use, and few headers name their period. The rule: a limit counts as one of a minute if

- its name says so; or
- its name says neither period nor the contrary, and nothing speaks against it: its reset is not more than a minute
  away, and the time in which what is used comes back is not that of an hour or a day. (OpenAI's and Groq's limits of
  requests may be those of a day: 14,400 of them, of which one comes back in 6 seconds.)
- ``X-RateLimit-Limit``, of which not even the kind is known, is believed if its reset is more than half a minute away:
  it is then neither one of seconds nor one of a day.

A limit that does not count takes its rest and its reset with it.
"""

import math
import time
from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from keepstream_worker.limits import RateLimits
from keepstream_worker.providers.durations import until_reset

_MINUTE: Final = 60.0
_ROUNDED: Final = 1.0  #: Seconds by which a reset may be rounded up.
_LONGER_PERIODS: Final = (3_600.0, 86_400.0)  #: Seconds.
_ALIKE: Final = 0.03  #: How far apart two periods may be and still be the same, as a part of them.
_MOST: Final = 1e12  #: A larger number is a way to say that there is no limit.


class _Period(Enum):
    NAMED = 1  #: By the header: a minute.
    UNNAMED = 2
    UNKNOWN = 3  #: Not even what is counted is named.


class _Names(NamedTuple):
    limit: str
    remaining: str
    reset: str
    period: _Period


def _names(pattern: str, period: _Period) -> _Names:
    return _Names(pattern.format("limit"), pattern.format("remaining"), pattern.format("reset"), period)


_REQUESTS: Final = (  # the first that says something counts
    _names("x-ratelimit-{}-requests-minute", _Period.NAMED),  # Cerebras
    _names("x-ratelimit-{}-req-minute", _Period.NAMED),  # Mistral
    _names("x-ratelimit-{}-requests", _Period.UNNAMED),  # OpenAI, Azure, Groq and most others
    _names("anthropic-ratelimit-requests-{}", _Period.UNNAMED),
    _names("x-ratelimit-{}", _Period.UNKNOWN),  # OpenRouter
)
_TOKENS: Final = (
    _names("x-ratelimit-{}-tokens-minute", _Period.NAMED),  # Cerebras, Mistral
    _names("x-ratelimitbysize-{}-minute", _Period.NAMED),  # Mistral, formerly
    _names("ratelimitbysize-{}", _Period.UNNAMED),
    _names("x-ratelimit-{}-tokens", _Period.UNNAMED),
    _names("anthropic-ratelimit-tokens-{}", _Period.UNNAMED),
)
#: Limited each by itself; we count both together, and their sum is the least that is never below what is allowed.
_TOKEN_PARTS: Final = (
    _names("anthropic-ratelimit-input-tokens-{}", _Period.UNNAMED),
    _names("anthropic-ratelimit-output-tokens-{}", _Period.UNNAMED),
)


class _Said(NamedTuple):
    """What is said about one limit."""

    limit: float | None = None
    remaining: float | None = None
    reset: float | None = None


def read_rate_limits(headers: Mapping[str, str], *, now: float | None = None) -> RateLimits | None:
    """Return what headers say about limits; None: nothing that can be believed.

    Args:
        headers: Of an answer; case does not matter.
        now: Seconds since 1970, to interpret moments; None uses the clock.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    if not any("ratelimit" in name for name in lowered):
        return None
    now = time.time() if now is None else now
    requests = _first(_REQUESTS, lowered, now)
    tokens = _first(_TOKENS, lowered, now)
    if tokens.limit is None:
        tokens = _sum([_read(names, lowered, now) for names in _TOKEN_PARTS]) or tokens
    rates = RateLimits(
        requests_per_minute=requests.limit,
        tokens_per_minute=tokens.limit,
        remaining_requests=requests.remaining,
        remaining_tokens=tokens.remaining,
        requests_reset=requests.reset,
        tokens_reset=tokens.reset,
    )
    return rates or None


def _first(spellings: tuple[_Names, ...], headers: Mapping[str, str], now: float) -> _Said:
    said = (_read(names, headers, now) for names in spellings)
    return next((each for each in said if each != _Said()), _Said())


def _read(names: _Names, headers: Mapping[str, str], now: float) -> _Said:
    limit = _number(headers.get(names.limit), least=1)
    remaining = _number(headers.get(names.remaining), least=0)
    reset = until_reset(headers.get(names.reset, ""), now)
    if names.limit in headers and limit is None:
        return _Said()  # none at all, by the form of its number
    if remaining is not None and limit is not None and remaining > limit:
        remaining = None
    return _Said(limit, remaining, reset) if _is_of_a_minute(names.period, limit, remaining, reset) else _Said()


def _is_of_a_minute(period: _Period, limit: float | None, remaining: float | None, reset: float | None) -> bool:
    if period is _Period.NAMED:
        return True
    if period is _Period.UNKNOWN and (reset is None or reset <= _MINUTE / 2):
        return False
    if reset is None:
        return True
    if reset > _MINUTE + _ROUNDED:
        return False
    if limit is None or remaining is None or remaining == limit:
        return True
    whole = reset * limit / (limit - remaining)  # if it comes back steadily
    return not any(abs(whole - longer) <= _ALIKE * longer for longer in _LONGER_PERIODS)


def _sum(parts: list[_Said]) -> _Said | None:
    if any(part.limit is None for part in parts):
        return None
    remaining = [part.remaining for part in parts if part.remaining is not None]
    return _Said(
        limit=sum(part.limit or 0.0 for part in parts),
        remaining=sum(remaining) if len(remaining) == len(parts) else None,
        reset=max((part.reset for part in parts if part.reset is not None), default=None),
    )


def _number(text: str | None, least: float) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and least <= value <= _MOST else None
