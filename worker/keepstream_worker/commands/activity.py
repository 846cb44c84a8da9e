"""Activity: what runs, what waits and why, and what is used of each limit, in numbers.

In: what the store has looked at, and the policy.  Out: a ``Picture``, to the commands `top` and `limits`, for people
and as JSON.  Pure.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keepstream.client.waiting import closed_reason
from keepstream.results import WaitingFor
from keepstream_worker.limits import OTHER_TENANTS, Limits, Policy
from keepstream_worker.scheduling.report import Use, report
from keepstream_worker.scheduling.state import State
from keepstream_worker.store.activity import Activity, Waiting
from keepstream_worker.values import Target


class Row(NamedTuple):
    """What runs and waits of one target, provider or tenant."""

    name: str
    running: int
    most: int | None  #: As configured, or as learned; None: nobody knows of a limit.
    waiting: int
    waits_for: WaitingFor | None  #: What most of those that wait wait for.

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return self._asdict() | {"waits_for": self.waits_for and self.waits_for.model_dump()}


class LimitRow(NamedTuple):
    """What is used of the limits of one target, or of a provider as a whole."""

    use: Use
    waiting: int

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        use = self.use
        closed = use.closed and {"why": use.closed.why, "until": use.closed.until}
        return {
            "name": use.key,
            "concurrency": use.limits.concurrency,
            "learned_concurrency": use.ceiling,
            "running": use.running,
            "waiting": self.waiting,
            "requests_per_minute": use.limits.requests_per_minute,
            "requests_left": use.requests_left,
            "tokens_per_minute": use.limits.tokens_per_minute,
            "tokens_left": use.tokens_left,
            "closed": closed,
        }


class TenantRow(NamedTuple):
    """What is used of a tenant's limits."""

    name: str
    running: int
    concurrency: int | None
    weight: float
    waiting: int


class Picture(NamedTuple):
    """What goes on."""

    activity: Activity
    targets: list[Row]  #: Those with most waiting and running jobs first.
    tenants: list[Row]  #: The same.
    limits: list[LimitRow]  #: By name.
    tenant_limits: list[TenantRow]  #: By name; of those that have limits, or jobs.

    @property
    def running(self) -> int:
        """Jobs that run, of all tenants."""
        return sum(self.activity.running.values())

    @property
    def waiting(self) -> int:
        """Jobs that wait, of all tenants."""
        return sum(each.jobs for each in self.activity.waiting)

    @property
    def places(self) -> int:
        """Jobs that the living workers run at once at most."""
        return sum(worker.places for worker in self.activity.workers.values())


def draw(activity: Activity, policy: Policy) -> Picture:
    """Return what goes on, in numbers."""
    by_target: Counter[Target] = Counter()
    by_tenant: Counter[str] = Counter()
    for (target, tenant), jobs in activity.running.items():
        by_target[target] += jobs
        by_tenant[tenant] += jobs
    uses = _all_uses(policy, activity, by_target)
    waits_for = [(each, _reason(each, activity)) for each in activity.waiting]
    first = Counter(dict.fromkeys(by_target, 0))
    tenants = Counter(dict.fromkeys(by_tenant, 0))
    for each in activity.waiting:
        first[each.chain[0]] += each.jobs
        tenants[each.tenant] += each.jobs
    return Picture(
        activity,
        targets=_sorted(
            Row(
                f"{target.provider}/{target.model}",
                by_target[target],
                _most(uses.get(f"{target.provider}/{target.model}")),
                waiting,
                _most_frequent((each, why) for each, why in waits_for if each.chain[0] == target),
            )
            for target, waiting in first.items()
        ),
        tenants=_sorted(
            Row(
                tenant,
                by_tenant[tenant],
                policy.tenant(tenant).concurrency,
                waiting,
                _most_frequent((each, why) for each, why in waits_for if each.tenant == tenant),
            )
            for tenant, waiting in tenants.items()
        ),
        limits=[LimitRow(use, _waiting_at(use.key, first)) for _, use in sorted(uses.items())],
        tenant_limits=[
            TenantRow(name, by_tenant[name], of.concurrency, of.weight, tenants[name])
            for name in sorted({*policy.tenants, *tenants} - {OTHER_TENANTS})
            for of in [policy.tenant(name)]
        ],
    )


def as_json(picture: Picture) -> dict[str, Any]:
    """Return a picture for programs."""
    activity = picture.activity
    return {
        "at": activity.at.isoformat(),
        "workers": [{"id": name, **worker._asdict()} for name, worker in sorted(activity.workers.items())],
        "running": picture.running,
        "waiting": picture.waiting,
        "more_running": activity.more_running,
        "more_waiting": activity.more_waiting,
        "targets": [row.as_json() for row in picture.targets],
        "tenants": [row.as_json() for row in picture.tenants],
    }


def limits_json(picture: Picture) -> dict[str, Any]:
    """Return its limits for programs."""
    return {
        "at": picture.activity.at.isoformat(),
        "limits": [row.as_json() for row in picture.limits],
        "tenants": [row._asdict() for row in picture.tenant_limits],
    }


def _all_uses(policy: Policy, activity: Activity, running: Mapping[Target, int]) -> dict[str, Use]:
    """Return what is used of each limit: of targets that are in use or remembered, and of those that are configured."""
    found = {}
    for provider, of_provider in policy.providers.items():
        if of_provider.limits:
            found[provider] = _unused(provider, of_provider.limits)
        for model in of_provider.models:
            for key, limits in policy.limits_of(provider, model):
                found.setdefault(key, _unused(key, limits))
    for use in report(policy, State.from_json(activity.state), running, activity.at.timestamp()):
        found[use.key] = use
    return found


def _unused(key: str, limits: Limits) -> Use:
    return Use(key, limits, None, 0, None, None, None)


def _most(use: Use | None) -> int | None:
    if use is None:
        return None
    known = [int(most) for most in (use.limits.concurrency, use.ceiling) if most is not None]
    return min(known, default=None)


def _waiting_at(key: str, first: Mapping[Target, int]) -> int:
    return sum(jobs for target, jobs in first.items() if key in (target.provider, f"{target.provider}/{target.model}"))


def _reason(each: Waiting, activity: Activity) -> WaitingFor:
    here = [worker for worker in activity.workers.values() if worker.queue == each.queue]
    if not here:
        return WaitingFor(cause="worker", text=f"a worker: none is alive for the queue '{each.queue}'")
    if each.not_due == each.jobs:
        return WaitingFor(cause="retry", text="the next attempt, which is not due yet")
    closed = closed_reason(activity.closed, each.tenant, each.chain, activity.at)
    if closed is not None:
        return closed
    if all(worker.running >= worker.places for worker in here):
        return WaitingFor(cause="place", text="a free place: all workers are busy")
    return WaitingFor(cause="pickup", text="a worker to take it")


def _most_frequent(reasons: Iterable[tuple[Waiting, WaitingFor]]) -> WaitingFor | None:
    jobs: Counter[tuple[str, str]] = Counter()
    for each, why in reasons:
        jobs[why.cause, why.text] += each.jobs
    if not jobs:
        return None
    ((cause, text), _) = jobs.most_common(1)[0]
    return WaitingFor(cause=cause, text=text)


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row.waiting - row.running, row.name))
