"""Activity: what runs, what waits and why, and what is used of each limit, in numbers.

In: what the store has looked at, and the policy.  Out: a ``Picture``, to the commands `top` and `limits`, for people
and as JSON.  Pure.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from keepstream.client.overview import Activity, Waits, what_waits
from keepstream.client.waiting import closed_words
from keepstream.results import WaitingFor
from keepstream_worker.commands.formats import iso_time
from keepstream_worker.limits import OTHER_TENANTS, Limits, Policy, is_pattern, target_key
from keepstream_worker.scheduling.report import Use, Used, report
from keepstream_worker.scheduling.state import State, key_of
from keepstream_worker.values import Target

Key = TypeVar("Key", bound=Hashable)


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

    @property
    def closed(self) -> str:
        """Why no further job can go there, for people; empty: one can."""
        return "" if self.use.closed is None else closed_words(self.use.closed.as_json())

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        use = self.use
        until = None if use.closed is None else use.closed.until
        closes = None if until is None else iso_time(datetime.fromtimestamp(until, UTC))
        return {
            "name": use.key,
            "streams": use.streams._asdict(),
            "requests": use.requests and use.requests._asdict(),
            "tokens": use.tokens and use.tokens._asdict(),
            "waiting": self.waiting,
            "closed": use.closed and {"why": use.closed.why, "until": closes},
        }


class PatternRow(NamedTuple):
    """What each model may use whose name fits, by itself."""

    name: str  #: ``PROVIDER/PATTERN``.
    limits: Limits

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"name": self.name, **asdict(self.limits)}


class TenantRow(NamedTuple):
    """What is used of a tenant's limits."""

    name: str
    jobs: Used
    weight: float
    waiting: int

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        jobs = {"used": self.jobs.used, "allowed": self.jobs.allowed}
        return {"name": self.name, "jobs": jobs, "weight": self.weight, "waiting": self.waiting}


class Picture(NamedTuple):
    """What goes on."""

    activity: Activity
    targets: list[Row]  #: Those with most waiting and running jobs first.
    tenants: list[Row]  #: The same.
    limits: list[LimitRow]  #: By name.
    patterns: list[PatternRow]  #: As configured.
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
        by_target[Target(*target)] += jobs
        by_tenant[tenant] += jobs
    uses = {use.key: use for use in report(policy, State.from_json(activity.state), by_target, activity.at.timestamp())}
    waits = what_waits(activity)
    at_target = _most_frequent((Target(*each.target), each) for each in waits)
    of_tenant = _most_frequent((each.tenant, each) for each in waits)
    first = Counter(dict.fromkeys(by_target, 0))
    tenants = Counter(dict.fromkeys(by_tenant, 0))
    at: Counter[str] = Counter()  # by the name of a limit
    for each in activity.waiting:
        target = Target(*each.chain[0])
        first[target] += each.jobs
        tenants[each.tenant] += each.jobs
        at[target.provider] += each.jobs
        at[key_of(target)] += each.jobs
    return Picture(
        activity,
        targets=_sorted(
            Row(
                key_of(target),
                by_target[target],
                _most(uses.get(key_of(target))),
                waiting,
                at_target.get(target),
            )
            for target, waiting in first.items()
        ),
        tenants=_sorted(
            Row(
                tenant,
                by_tenant[tenant],
                policy.tenant(tenant).concurrency,
                waiting,
                of_tenant.get(tenant),
            )
            for tenant, waiting in tenants.items()
        ),
        limits=[LimitRow(use, at[key]) for key, use in uses.items()],
        patterns=[
            PatternRow(target_key(provider, model), limits)
            for provider, of_provider in policy.providers.items()
            for model, limits in of_provider.models.items()
            if is_pattern(model)
        ],
        tenant_limits=[
            TenantRow(name, Used(by_tenant[name], of.concurrency), of.weight, tenants[name])
            for name in sorted({*policy.tenants, *tenants} - {OTHER_TENANTS})
            for of in [policy.tenant(name)]
        ],
    )


def as_json(picture: Picture) -> dict[str, Any]:
    """Return a picture for programs."""
    activity = picture.activity
    return {
        "at": iso_time(activity.at),
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
        "at": iso_time(picture.activity.at),
        "limits": [row.as_json() for row in picture.limits],
        "patterns": [row.as_json() for row in picture.patterns],
        "tenants": [row.as_json() for row in picture.tenant_limits],
    }


def _most(use: Use | None) -> int | None:
    return None if use is None else use.streams.allowed


def _most_frequent(waits: Iterable[tuple[Key, Waits]]) -> dict[Key, WaitingFor]:
    """Return, by what is given with each, what most of the jobs wait for."""
    jobs: dict[Key, Counter[tuple[str, str]]] = {}
    for key, each in waits:
        jobs.setdefault(key, Counter())[each.why.cause, each.why.text] += each.jobs
    most = {key: max(reasons, key=lambda reason: reasons[reason]) for key, reasons in jobs.items()}
    return {key: WaitingFor(cause=cause, text=text) for key, (cause, text) in most.items()}


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row.waiting - row.running, row.name))
