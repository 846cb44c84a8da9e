"""Limits: what the scripted provider accepts, as real providers limit it, and how it refuses the rest.

In: what may be used, from a test or the command line; requests, from the server, with the moment of each.
Out: an admission with its headers, or a refusal; counts of both.

A request is charged when it is accepted, with all that its script will take: the provider knows that beforehand, so a
limit is kept exactly. A refused request is charged nothing.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keepstream_worker.dev_stack.scripted_provider.encoding import error_body

MINUTE: Final = 60.0  #: Seconds.
MAX_SECONDS: Final = 3600  #: Seconds of which the counts are kept; the oldest are dropped.

Rate = Annotated[float, Field(gt=0, le=1e12)]


class Breakdown(BaseModel):
    """``error``: completions are answered with 500.  ``refuse``: connections are refused, those that stream reset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["error", "refuse"]
    seconds: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        default=None, description="For how long; null: until it is told otherwise, which only `error` can be."
    )


class EnforcedLimits(BaseModel):
    """What may be used; null: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: Annotated[int, Field(ge=0)] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    rates: Literal["windows", "buckets"] = Field(
        default="windows",
        description="Full again each minute at once, or steadily, with a minute's worth to begin with.",
    )
    per_model: bool = Field(default=False, description="Whether each model has these limits for itself.")
    headers: bool = Field(default=True, description="Whether answers state limits, rests and resets.")
    retry_after: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Seconds that a refusal for concurrency asks to wait; null: it does not say."
    )
    unknown_models: list[str] = Field(default=[], description="Models that are answered with 404 for good.")
    context_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="A longer prompt is answered with 400."
    )
    breakdown: Breakdown | None = None


class Admission(NamedTuple):
    """A request that is served."""

    headers: dict[str, str]
    whose: str  #: The model whose limits it uses; empty: those of all models together.


class Refusal(NamedTuple):
    """An answer to a request that is not served."""

    cause: str
    status: int
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(slots=True)
class _Rate:
    """How much is left of one rate."""

    limit: float
    steadily: bool
    level: float
    at: float  # when the level was right; of a window, when it began

    def refill(self, now: float) -> None:
        if self.steadily:
            self.level = min(self.limit, self.level + (now - self.at) * self.limit / MINUTE)
            self.at = now
        elif now >= self.at + MINUTE:
            self.at += math.floor((now - self.at) / MINUTE) * MINUTE
            self.level = self.limit

    def wait(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` is there."""
        if self.level >= cost:
            return 0.0
        return (cost - self.level) * MINUTE / self.limit if self.steadily else self.at + MINUTE - now


class Limiter:
    """Keeps the limits of one provider, and counts.

    Args:
        clock: Seconds; never goes back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.limits = EnforcedLimits()
        self._rates: dict[tuple[str, str], _Rate] = {}  # by model, or "" for all, and kind
        self._streams: Counter[str] = Counter()  # likewise
        self.reset()

    def reset(self) -> None:
        """Forget all counts and what was used; the limits and the streams stay."""
        self._began = self._clock()
        self._rates.clear()
        self._accepted = 0
        self._refused: Counter[str] = Counter()
        self._peak = self._peak_asked = self._streams.total()
        self._seconds: dict[int, list[float]] = {}

    def change(self, changes: object) -> None:
        """Change the limits that ``changes`` names and leave the others.

        Raises:
            ValueError: a limit is unknown or has a wrong value; the message names it.
        """
        if not isinstance(changes, dict):
            raise ValueError("limits must be an object")  # noqa: TRY004  # it comes from a client
        try:
            limits = EnforcedLimits.model_validate(self.limits.model_dump() | changes)
        except ValidationError as error:
            item = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise ValueError(f"limits.{'.'.join(map(str, item['loc']))}: {item['msg']}") from None
        if limits.breakdown and limits.breakdown.kind == "refuse" and limits.breakdown.seconds is None:
            raise ValueError("limits.breakdown.seconds: nobody could end it")
        if {"requests_per_minute", "tokens_per_minute", "rates", "per_model"} & changes.keys():
            self._rates.clear()
        self.limits = limits

    @property
    def report(self) -> dict[str, Any]:
        """What ``/_limits`` shows."""
        return {
            "limits": self.limits.model_dump(),
            "accepted": self._accepted,
            "refused": dict(self._refused),
            "streams": self._streams.total(),
            "peak_streams": self._peak,
            "peak_asked": self._peak_asked,
            "seconds": [
                {"second": second, "accepted": accepted, "refused": refused, "tokens": tokens}
                for second, (accepted, refused, tokens) in sorted(self._seconds.items())
            ],
        }

    def admit(self, model: str, prompt_tokens: int, tokens: int) -> Admission | Refusal:
        """Accept a request, whose end is told by ``release``, or refuse it.

        Args:
            model: As the request names it.
            prompt_tokens: Of the request.
            tokens: All that it will take, the prompt included.
        """
        now = self._clock()
        whose = model if self.limits.per_model else ""
        self._peak_asked = max(self._peak_asked, self._streams.total() + 1)
        refusal = self._refusal(model, whose, prompt_tokens, tokens, now)
        if refusal is not None:
            self._refused[refusal.cause] += 1
            self._count(now, 0, 1, 0)
            return refusal
        for kind, cost in (("requests", 1), ("tokens", tokens)):
            if rate := self._rate(whose, kind, now):
                rate.level -= cost
        self._streams[whose] += 1
        self._accepted += 1
        self._peak = max(self._peak, self._streams.total())
        self._count(now, 1, 0, tokens)
        return Admission(self._headers(whose, now), whose)

    def release(self, admission: Admission) -> None:
        """The answer to a request has ended."""
        self._streams[admission.whose] -= 1

    def _refusal(self, model: str, whose: str, prompt_tokens: int, tokens: int, now: float) -> Refusal | None:
        limits = self.limits
        if limits.breakdown is not None:
            return _refused("breakdown", HTTPStatus.INTERNAL_SERVER_ERROR, "The server had an error.", "server_error")
        if model in limits.unknown_models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            return _refused("model", HTTPStatus.NOT_FOUND, message, "invalid_request_error", "model_not_found")
        if limits.context_tokens is not None and prompt_tokens > limits.context_tokens:
            message = (
                f"This model's maximum context length is {limits.context_tokens} tokens. "
                f"However, your messages resulted in {prompt_tokens} tokens."
            )
            code = "context_length_exceeded"
            return _refused("context", HTTPStatus.BAD_REQUEST, message, "invalid_request_error", code)
        if limits.concurrency is not None and self._streams[whose] >= limits.concurrency:
            message = f"Too many concurrent requests for {model}: Limit {limits.concurrency}."
            return self._too_many("concurrency", message, limits.retry_after, whose, now)
        for kind, cost, unit in (("requests", 1, "requests per min (RPM)"), ("tokens", tokens, "tokens per min (TPM)")):
            rate = self._rate(whose, kind, now)
            if rate is None or rate.level >= cost:
                continue
            if cost > rate.limit:
                message = f"Request too large for {model} on {unit}: Limit {rate.limit:g}, Requested {cost}."
                return self._too_many(kind, message, None, whose, now)
            wait = rate.wait(cost, now)
            used = math.ceil(rate.limit - rate.level)
            message = (
                f"Rate limit reached for {model} on {unit}: Limit {rate.limit:g}, Used {used}, Requested {cost}. "
                f"Please try again in {spelled(wait)}."
            )
            return self._too_many(kind, message, wait, whose, now)
        return None

    def _too_many(self, kind: str, message: str, wait: float | None, whose: str, now: float) -> Refusal:
        headers = self._headers(whose, now)
        if wait is not None:
            headers |= {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
        body = error_body(message, kind, "rate_limit_exceeded")
        return Refusal(kind, HTTPStatus.TOO_MANY_REQUESTS, body, headers)

    def _rate(self, whose: str, kind: str, now: float) -> _Rate | None:
        limits = self.limits
        limit = limits.requests_per_minute if kind == "requests" else limits.tokens_per_minute
        if limit is None:
            return None
        rate = self._rates.setdefault((whose, kind), _Rate(limit, limits.rates == "buckets", limit, now))
        rate.refill(now)
        return rate

    def _headers(self, whose: str, now: float) -> dict[str, str]:
        headers: dict[str, str] = {}
        if not self.limits.headers:
            return headers
        for kind in ("requests", "tokens"):
            if rate := self._rate(whose, kind, now):
                headers[f"x-ratelimit-limit-{kind}"] = f"{rate.limit:.0f}"
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(rate.level)))
                headers[f"x-ratelimit-reset-{kind}"] = spelled(rate.wait(rate.limit, now))
        return headers

    def _count(self, now: float, *counts: float) -> None:
        second = int(now - self._began)
        so_far = self._seconds.setdefault(second, [0, 0, 0])
        for i, count in enumerate(counts):
            so_far[i] += count
        if len(self._seconds) > MAX_SECONDS:
            del self._seconds[next(iter(self._seconds))]


def spelled(seconds: float) -> str:
    """Return a duration as OpenAI spells it: ``120ms``, ``8.64s``, ``6m0s``."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    rest = f"{milliseconds / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}" if hours else f"{minutes}m{rest}" if minutes else rest


def _refused(cause: str, status: int, message: str, type_: str, code: str | None = None) -> Refusal:
    return Refusal(cause, status, error_body(message, type_, code), {})
