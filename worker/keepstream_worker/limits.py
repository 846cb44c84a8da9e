"""Limits: what providers, models and tenants may use, as the configuration says it, and as a provider's answer says it.

In: checked values of the providers file (``keepstream_worker.providers.config``); headers of an answer.
Out: a ``Policy`` and ``RateLimits``, for whoever decides what runs next. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final

OTHER_TENANTS: Final = "*"  #: The name in the configuration under which all tenants stand that have no entry.

DEFAULT_MAX_COOLDOWN: Final = 10.0  #: Seconds.
DEFAULT_BROKEN_AFTER: Final = 5  #: Failures.
DEFAULT_BROKEN_FOR: Final = 10.0  #: Seconds.
DEFAULT_BULK_SHARE: Final = 0.05
DEFAULT_CREDIT: Final = 100_000  #: Tokens.

#: Tokens that one usual request takes; a limit per minute below it is more likely a slip than meant.
_USUAL_REQUEST: Final = 1_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used of a provider, or of one of its models, by the whole deployment; None: no limit."""

    concurrency: int | None = None  #: Streams at once.
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  #: Prompt and completion together.

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return (self.concurrency, self.requests_per_minute, self.tokens_per_minute) != (None, None, None)

    def or_else(self, other: "Limits") -> "Limits":
        """Return these limits, completed by those of ``other``."""
        return Limits(
            self.concurrency if self.concurrency is not None else other.concurrency,
            self.requests_per_minute if self.requests_per_minute is not None else other.requests_per_minute,
            self.tokens_per_minute if self.tokens_per_minute is not None else other.tokens_per_minute,
        )


@dataclass(frozen=True, slots=True)
class RateLimits:
    """What a provider's answer says about its limits; None: nothing, or nothing that can be believed.

    The moments are counted from the answer: seconds until the limit is whole again.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    remaining_requests: float | None = None
    remaining_tokens: float | None = None
    requests_reset: float | None = None
    tokens_reset: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is said."""
        return any(getattr(self, each.name) is not None for each in fields(self))


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """What a tenant may use."""

    concurrency: int | None = None  #: Jobs running at once; None: no limit.
    weight: float = 1.0  #: Its share, in tokens, relative to that of other tenants who wait.


@dataclass(frozen=True, slots=True)
class ProviderPolicy:
    """What holds for one provider."""

    limits: Limits = Limits()  #: Of all its models together.
    models: Mapping[str, Limits] = field(default_factory=lambda: MappingProxyType({}))  #: By name or pattern, in order.
    max_cooldown: float = DEFAULT_MAX_COOLDOWN  #: Seconds a target may cool down before its jobs use their fallbacks.
    broken_after: int = DEFAULT_BROKEN_AFTER  #: Failures in a row, over some seconds, after which a target is broken.
    broken_for: float = DEFAULT_BROKEN_FOR  #: Seconds for which it does at first; doubled each time it stays broken.


@dataclass(frozen=True, slots=True)
class Policy:
    """What the deployment may use, and how it is divided."""

    providers: Mapping[str, ProviderPolicy] = field(default_factory=lambda: MappingProxyType({}))
    tenants: Mapping[str, TenantPolicy] = field(default_factory=lambda: MappingProxyType({}))
    bulk_share: float = DEFAULT_BULK_SHARE  #: Of the tokens, for bulk jobs, while interactive ones wait: 0 to below 1.
    credit: int = DEFAULT_CREDIT  #: Tokens ÷ weight by which a lane may be behind the others at most.

    @property
    def is_limited(self) -> bool:
        """Whether the use of anything is limited."""
        return any(policy.limits or any(policy.models.values()) for policy in self.providers.values()) or any(
            tenant.concurrency is not None for tenant in self.tenants.values()
        )

    def limits_of(self, provider: str, model: str) -> list[tuple[str, Limits]]:
        """Return all limits that hold for a model, each with the key under which its use is counted.

        The key ``PROVIDER`` stands for all models of the provider together, ``PROVIDER/MODEL`` for this model alone.
        All of them have to be kept. What limits nothing is left out.

        A limit of a model is that of its exact name; where that leaves it open, that of the first pattern that fits.
        """
        policy = self.providers.get(provider)
        if policy is None:
            return []
        of_model = policy.models.get(model, Limits())
        for pattern, limits in policy.models.items():
            if fnmatchcase(model, pattern):
                of_model = of_model.or_else(limits)
        found = [(provider, policy.limits), (target_key(provider, model), of_model)]
        return [(key, limits) for key, limits in found if limits]

    def tenant(self, name: str) -> TenantPolicy:
        """Return what a tenant may use."""
        return self.tenants.get(name) or self.tenants.get(OTHER_TENANTS) or TenantPolicy()

    def max_cooldown(self, provider: str) -> float:
        """Return the seconds that a target of a provider may cool down before its jobs use their fallbacks."""
        return self._provider(provider).max_cooldown

    def broken_after(self, provider: str) -> int:
        """Return the failures in a row after which a target of a provider counts as broken."""
        return self._provider(provider).broken_after

    def broken_for(self, provider: str) -> float:
        """Return the seconds for which a target of a provider counts as broken at first."""
        return self._provider(provider).broken_for

    def _provider(self, name: str) -> ProviderPolicy:
        return self.providers.get(name) or ProviderPolicy()

    def doubts(self) -> list[str]:
        """Return what is allowed but hardly meant, one line each, to show to the operator."""
        found = []
        for name, policy in self.providers.items():
            tables = [
                ("", policy.limits),
                *((f" models.{pattern}", limits) for pattern, limits in policy.models.items()),
            ]
            for table, limits in tables:
                tokens = limits.tokens_per_minute
                if tokens is not None and tokens < _USUAL_REQUEST:
                    found.append(
                        f"[providers.{name}]{table} tokens_per_minute: {tokens:g} is less than one usual request "
                        "takes, so that minutes of waiting follow each request"
                    )
        return found


def is_pattern(model: str) -> bool:
    """Whether a name in the configuration stands for all models that fit it."""
    return any(sign in model for sign in "*?[")


def target_key(provider: str, model: str) -> str:
    """Return the key under which the use of one model is counted; a provider's name has no slash."""
    return f"{provider}/{model}"
