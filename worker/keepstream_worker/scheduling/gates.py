"""Gates: whether a target may be asked now, and if not, why and until when.

In: the policy, the state, the running jobs.  Out: gates, to ``Choice``, which passes jobs through them, and reports.

A gate is closed, in this order, if its target cools down or is broken, runs as many streams as it may, has no request
left, or is in debt of tokens.  Limits hold for a model and for its provider as a whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from keepstream_worker.limits import Limits, Policy
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.state import State, UseState
from keepstream_worker.values import Target

#: Of a limit per minute that is used: a provider's minute is not ours.
_USED_PART: Final = 0.95
#: Seconds of a limit that may be used at once.
_BURST: Final = 3.0
#: Targets whose limits are kept: more than a turn meets, or they would be looked up anew in each.
_MOST_KNOWN: Final = 50_000
#: Seconds by which sums of fractions may be off.
_ROUNDING: Final = 1e-6


class Closed(NamedTuple):
    """Why a target, or its provider, may not be asked."""

    key: str  #: ``PROVIDER/MODEL`` or ``PROVIDER``.
    why: str  #: cooling, broken, probing, concurrency, requests_per_minute or tokens_per_minute.
    until: float | None  #: None: until a job ends.
    running: int | None = None  #: With concurrency.
    most: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it without its key, for people."""
        if self.most is not None:
            return {"why": self.why, "running": self.running, "most": self.most}
        return {"why": self.why, "until": self.until}


class Limit:
    """One limit, of a model or of a provider as a whole, and its use."""

    __slots__ = ("key", "limits", "request_seconds", "requests_full", "running", "token_seconds", "use")

    def __init__(self, key: str, limits: Limits, use: UseState, running: int, now: float) -> None:
        self.key = key
        self.limits = limits
        self.use = use
        self.running = running
        per_minute = limits.requests_per_minute
        self.request_seconds = 0.0 if per_minute is None else 60.0 / (per_minute * _USED_PART)
        self.requests_full = max(_BURST, self.request_seconds)
        per_minute = limits.tokens_per_minute
        self.token_seconds = 0.0 if per_minute is None else 60.0 / (per_minute * _USED_PART)
        if use.requests + self.requests_full <= now:
            use.requests = 0.0
        if use.tokens + _BURST <= now:
            use.tokens = 0.0

    @property
    def is_full(self) -> bool:
        """Whether as many streams run as may."""
        return self.limits.concurrency is not None and self.running >= self.limits.concurrency

    def is_open(self, now: float) -> bool:
        """Whether it lets another job pass."""
        return not self.is_full and max(self.request_at(), self.tokens_at()) <= now + _ROUNDING

    def request_at(self) -> float:
        """Return the moment from which a request is left."""
        return self.use.requests + self.request_seconds if self.request_seconds else 0.0

    def tokens_at(self) -> float:
        """Return the moment from which no tokens are owed."""
        return self.use.tokens if self.token_seconds else 0.0

    def requests(self, now: float) -> tuple[int, int] | None:
        """Return the requests in use, of those that may be made at once; None: there is no limit."""
        if not self.request_seconds:
            return None
        most = int(self.requests_full / self.request_seconds + _ROUNDING)
        left = min(now - self.use.requests, self.requests_full) / self.request_seconds
        return min(most, most - int(left + _ROUNDING)), most

    def tokens(self, now: float) -> tuple[int, int] | None:
        """Return the tokens in use, of those that may be taken at once: more of them are a debt; None: no limit."""
        if not self.token_seconds:
            return None
        left = min(now - self.use.tokens, _BURST)
        return round((_BURST - left) / self.token_seconds), round(_BURST / self.token_seconds)

    def charge(self, now: float, tokens: int) -> None:
        """Take one request and ``tokens``."""
        self.running += 1
        if self.request_seconds:
            self.use.requests = max(self.use.requests, now - self.requests_full) + self.request_seconds
        if self.token_seconds:
            self.use.tokens = max(self.use.tokens, now - _BURST) + tokens * self.token_seconds

    def settle(self, now: float, tokens: int) -> None:
        """Take further tokens, or give them back."""
        if self.token_seconds:
            self.use.tokens = max(self.use.tokens, now - _BURST) + tokens * self.token_seconds


class Gate:
    """A target's limits and what was learned of it; changes as jobs pass."""

    __slots__ = ("_configured", "_now", "key", "limits", "target", "use")

    def __init__(self, key: str, use: UseState, limits: tuple[Limit, ...], now: float) -> None:
        self.key = key
        self.target = target_of(key)
        self.use = use
        self.limits = limits  #: Of the provider and of the model; the model's own always last.
        self._now = now
        # Whoever configured a limit, of the model or of its provider, knows what is accepted.
        self._configured = min(
            (most for limit in limits if (most := limit.limits.concurrency) is not None), default=None
        )

    @property
    def running(self) -> int:
        """Streams at this target."""
        return self.limits[-1].running

    def most(self) -> int | None:
        """Return how many streams it may have, whatever its provider has; None: only the provider's limit counts."""
        own, learned = self.limits[-1].limits.concurrency, self.use.learned
        if own is None and learned.ceiling is None and self._configured is not None:
            return None
        return int(learning.ceiling(learned, own))

    def unfit(self) -> Closed | None:
        """Return why no job can go there, whatever runs: it cools down, or is broken."""
        closed = learning.closed(self.use.learned, self._now)
        return closed and Closed(self.key, closed.cause, closed.until)

    def closed(self, *, counted: bool = True) -> Closed | None:
        """Return why no further job can go there now; without ``counted``, but for its running ones."""
        unfit = self.unfit()
        if unfit is not None:
            return unfit
        own = self.limits[-1]
        if counted:
            for limit in self.limits[:-1]:
                if limit.is_full:
                    return Closed(limit.key, "concurrency", None, limit.running, limit.limits.concurrency)
            if learning.places(self.use.learned, self._now, own.running, self._configured) <= 0:
                most = int(learning.ceiling(self.use.learned, self._configured))
                return Closed(self.key, "concurrency", None, own.running, most)
        for limit in self.limits:
            if limit.request_at() > self._now + _ROUNDING:
                return Closed(limit.key, "requests_per_minute", limit.request_at())
        for limit in self.limits:
            if limit.tokens_at() > self._now + _ROUNDING:
                return Closed(limit.key, "tokens_per_minute", limit.tokens_at())
        return None

    def charge(self, tokens: int) -> None:
        """Take a request and ``tokens``."""
        for limit in self.limits:
            limit.charge(self._now, tokens)
        self.use.used = self._now

    def let_in(self, tokens: int) -> None:
        """Let a job pass, which takes ``tokens``."""
        self.charge(tokens)
        self.use.learned = learning.let_in(self.use.learned, self._now)

    def settle(self, tokens: int) -> None:
        """Take further tokens for a job that has passed, or give them back."""
        for limit in self.limits:
            limit.settle(self._now, tokens)


class Gates:
    """The gates of all targets, made when they are first asked for."""

    def __init__(self, policy: Policy, state: State, now: float) -> None:
        self.now = now
        self._policy = policy
        self._state = state
        self._known = _limits_by_key(policy)
        self._running_of: dict[str, int] = {}
        self._gates: dict[str, Gate] = {}
        self._limits: dict[str, Limit] = {}

    def count(self, running: Mapping[Target, int]) -> None:
        """Set the running jobs; before, there are none."""
        for target, number in running.items():
            self._running_of[target.provider] = self._running_of.get(target.provider, 0) + number
            self._running_of[f"{target.provider}/{target.model}"] = number
        for key, limit in self._limits.items():
            limit.running = self._running_of.get(key, 0)

    def forget(self) -> None:
        """Make all gates anew when they are next asked for: what was learned has changed."""
        self._gates.clear()
        self._limits.clear()

    def of(self, key: str) -> Gate:
        """Return the gate of a target."""
        gate = self._gates.get(key)
        if gate is None:
            use = self._state.use(key)
            own = _NO_LIMITS
            shared = []
            for name, limits in self._configured(key):
                if name == key:
                    own = limits
                else:
                    shared.append(self._limit(name, limits, self._state.use(name)))
            limit = self._limit(key, learning.limits(use.learned, own), use)
            gate = self._gates[key] = Gate(key, use, (*shared, limit), self.now)
        return gate

    def is_free(self, key: str) -> bool:
        """Whether a target is open because nothing is known of it: quickly said, for most of very many.

        False: ``of`` knows.
        """
        if key in self._state.uses:
            return False
        most = None
        for name, limits in self._configured(key):
            if name == key or not self._limit(name, limits, self._state.use(name)).is_open(self.now):
                return False
            most = limits.concurrency
        return self._running_of.get(key, 0) < (learning.FIRST_CEILING if most is None else most)

    def _configured(self, key: str) -> Sequence[tuple[str, Limits]]:
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._policy.limits_of(*target_of(key))
        return found

    def _limit(self, key: str, limits: Limits, use: UseState) -> Limit:
        limit = self._limits.get(key)
        if limit is None:
            limit = self._limits[key] = Limit(key, limits, use, self._running_of.get(key, 0), self.now)
        return limit

    def effective(self, chain: Sequence[str]) -> tuple[Gate | None, float]:
        """Return the gate by which a pool's jobs pass, and the moment when another target may come before it.

        That is the first target which neither is broken nor cools down for longer than its provider may.  None: there
        is no such target before that moment.
        """
        back = _NEVER
        for key in chain:
            gate = self.of(key)
            unfit = gate.unfit()
            if unfit is None:
                return gate, back
            until = self.now + 1.0 if unfit.until is None else unfit.until
            if unfit.why == "cooling" and until - self.now <= self._policy.max_cooldown(gate.target.provider):
                return gate, back
            back = min(back, until)
        return None, back


class _Known:
    """The limits of targets as they were last looked up; a worker has one policy for long."""

    policy: Policy | None = None
    limits: ClassVar[dict[str, Sequence[tuple[str, Limits]]]] = {}


def _limits_by_key(policy: Policy) -> dict[str, Sequence[tuple[str, Limits]]]:
    """Return the limits that were looked up in a policy, to be added to."""
    if _Known.policy is not policy or len(_Known.limits) > _MOST_KNOWN:
        _Known.policy, _Known.limits = policy, {}
    return _Known.limits


def target_of(key: str) -> Target:
    """Return the target of a key ``PROVIDER/MODEL``; a provider's name has no slash."""
    provider, _, model = key.partition("/")
    return Target(provider, model)


_NO_LIMITS: Final = Limits()
_NEVER: Final = float("inf")
