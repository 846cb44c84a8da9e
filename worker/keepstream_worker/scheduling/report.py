"""The report: what is used of each limit, and what closes it.

In: the policy, a state, the running jobs.  Out: a table of limits, to ``keepstream limits`` and ``keepstream top``.
Pure.
"""

from collections.abc import Mapping
from typing import NamedTuple

from keepstream_worker.limits import Limits, Policy
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.gates import Closed, Gates
from keepstream_worker.scheduling.state import State, key_of
from keepstream_worker.values import Target


class Use(NamedTuple):
    """A target, or a provider as a whole: what limits it, and what is used of that."""

    key: str  #: ``PROVIDER/MODEL`` or ``PROVIDER``.
    limits: Limits  #: As configured; where that leaves them open, as learned.
    ceiling: float | None  #: Streams at once that were learned to be accepted; None: nothing was learned.
    running: int
    requests_left: float | None  #: That may be made at once; None: there is no limit.
    tokens_left: float | None  #: The same; negative: a debt.
    closed: Closed | None  #: Why no further job can go there.


def report(policy: Policy, state: State, running: Mapping[Target, int], now: float) -> list[Use]:
    """Return all targets of which something is known or that run jobs, and their providers, by key.

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
    found: dict[str, Use] = {}
    for key in sorted(keys):
        gate = gates.of(key)
        closed = gate.closed()
        for limit in gate.limits:
            learned = limit.use.learned if limit.key == key else learning.TargetState()
            found[limit.key] = Use(
                limit.key,
                limit.limits,
                learned.ceiling,
                limit.running,
                limit.requests_left(now),
                limit.tokens_left(now),
                closed if closed is not None and closed.key == limit.key else None,
            )
    return [found[key] for key in sorted(found)]
