"""The report of limits: what is used of each, told by the worker that sweeps.

In: the policy, which only workers have; what runs, and what the newest turn knows.  Out: a report, as JSON, to the
table of reports, for the gateway's console.  It is written when it has changed, and now and then as a sign of life.
"""

import asyncio
import time
from typing import Any, Final

from keepstream_worker import store
from keepstream_worker.limits import OTHER_TENANTS, Policy
from keepstream_worker.scheduling.report import Use, report
from keepstream_worker.scheduling.state import State
from keepstream_worker.store.database import WorkerDatabase

_EVERY: Final = 5.0  #: Seconds between two looks.
_AT_LATEST: Final = 30.0  #: Seconds after which a report is written that has not changed.
_LIMITS: Final = 200  #: Of targets and providers in a report, those with most in use first.
_TENANTS: Final = 1000  #: In a report that have a limit of their own, by name.


class LimitsReport:
    """Tells what is used of limits, as often as is worth it. Used on the event loop."""

    def __init__(self, policy: Policy, database: WorkerDatabase) -> None:
        self._policy = policy
        self._database = database
        self._looked_at = self._told_at = -_AT_LATEST
        self._told: dict[str, Any] | None = None

    async def tell(self) -> None:
        """Look, and tell what is new.

        Raises:
            StoreUnavailableError: the database did not answer; the next call does it.
        """
        now = time.monotonic()
        if now - self._looked_at < _EVERY:
            return
        self._looked_at = now
        seen = await self._database.run(store.read_use, None)
        # In a thread: with jobs of very many models it takes longer than streams should have to wait.
        found = await asyncio.to_thread(as_json, self._policy, seen)
        if found != self._told or now - self._told_at >= _AT_LATEST:
            await self._database.run(store.tell_limits, found)
            self._told, self._told_at = found, now


def as_json(policy: Policy, seen: store.InUse) -> dict[str, Any]:
    """Return a report; ``keepstream.client.overview.Limits`` says what it has."""
    uses = report(policy, State.from_json(seen.state), seen.running, seen.now)
    uses.sort(key=lambda use: (-use.streams.used, use.key))
    others = policy.tenant(OTHER_TENANTS).concurrency
    own = {name: of.concurrency for name, of in sorted(policy.tenants.items()) if of.concurrency != others}
    return {
        "limits": [_limit(use) for use in uses[:_LIMITS]],
        "tenants": dict(list(own.items())[:_TENANTS]),
        "other_tenants": others,
    }


def _limit(use: Use) -> dict[str, Any]:
    return {
        "name": use.key,
        "streams": use.streams._asdict(),
        "requests": use.requests and use.requests._asdict(),
        "tokens": use.tokens and use.tokens._asdict(),
    }
