"""The report: what is used of each limit, and what closes it.

In: the policy, a state, the running jobs.  Out: a table of limits, to ``keepstream limits`` and ``keepstream top``.
Pure.
"""

from collections.abc import Mapping
from typing import NamedTuple

from keepstream_worker.limits import Limits, Policy, is_pattern, target_key
from keepstream_worker.scheduling.gates import Closed, Gates, Limit
from keepstream_worker.scheduling.state import State, key_of
from keepstream_worker.values import Target


class Used(NamedTuple):
    """What is used of a limit."""

    used: int
    allowed: int | None  #: At once; None: nothing limits it here.
    per_minute: float | None = None  #: At this rate it comes back; None: when a job ends.
    learned: bool = False  #: Whether the limit was learned, rather than configured.


class Use(NamedTuple):
    """A target, or a provider as a whole: what is used of its limits."""

    key: str  #: ``PROVIDER/MODEL`` or ``PROVIDER``.
    streams: Used
    requests: Used | None  #: None: there is no limit.
    tokens: Used | None  #: The same; more used than allowed: a debt.
    closed: Closed | None  #: Why no further job can go there.


def report(policy: Policy, state: State, running: Mapping[Target, int], now: float) -> list[Use]:
    """Return all targets and providers that have a limit, learned ones included, or run jobs, by key.

    Args:
        policy: The limits.
        state: Of the newest turn.
        running: Running jobs by target.
        now: Seconds since the epoch by the database's clock.
    """
    gates = Gates(policy, state, now)
    gates.count(running)
    keys = {key for key in state.uses if "/" in key} | {key_of(target) for target in running}
    keys.update(key for pool in state.pools.values() for key in pool.chain)
    for provider, of_provider in policy.providers.items():
        keys.update(target_key(provider, model) for model in of_provider.models if not is_pattern(model))
    found: dict[str, Use] = {}
    for provider, of_provider in policy.providers.items():
        if of_provider.limits:
            unused = Limit(provider, of_provider.limits, state.use(provider), 0, now)
            found[provider] = _use(unused, of_provider.limits, unused.limits.concurrency, None, now)
    for key in sorted(keys):
        gate = gates.of(key)
        closed = gate.closed()
        configured = dict(policy.limits_of(*gate.target))
        for limit in gate.limits:
            why = closed if closed is not None and closed.key == limit.key else None
            if why is None and limit.key in found:
                why = found[limit.key].closed  # another of the provider's targets has met it
            most = gate.most() if limit.key == key else limit.limits.concurrency
            found[limit.key] = _use(limit, configured.get(limit.key, Limits()), most, why, now)
    return [found[key] for key in sorted(found)]


def _use(limit: Limit, configured: Limits, most: int | None, closed: Closed | None, now: float) -> Use:
    requests, tokens = limit.requests(now), limit.tokens(now)
    return Use(
        limit.key,
        Used(limit.running, most, learned=most is not None and most != configured.concurrency),
        requests and Used(*requests, limit.limits.requests_per_minute, configured.requests_per_minute is None),
        tokens and Used(*tokens, limit.limits.tokens_per_minute, configured.tokens_per_minute is None),
        closed,
    )
