"""The rules of choice, written down as plainly as they can be: one choice at a time, with everything in memory.

It is what ``keepstream_worker.scheduling.choice`` is compared with.  It knows all that waits, so it needs no batches,
no lower bounds and no state; buckets are balances that grow; and nothing in it is quick.  What a target accepts is
learned by ``keepstream_worker.scheduling.learning``, which has tests of its own.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from keepstream_worker.limits import Limits, Policy
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.observations import Accepted, Charged, End, Observation, Settled
from keepstream_worker.turn import Pool, WaitingJob
from keepstream_worker.values import Target

_LONG = 1e9  # seconds for which nothing was used

Class = tuple[str, str]  # queue and class


@dataclass
class Bucket:
    """A balance in seconds of its rate; what is above the most that it holds is not there."""

    balance: float
    at: float

    def grow(self, now: float, most: float) -> float:
        """Return the balance now."""
        self.balance += now - self.at
        self.at = now
        return min(most, self.balance)

    def take(self, seconds: float, most: float) -> None:
        """Take from it, just after it has grown."""
        self.balance = min(most, self.balance) - seconds


@dataclass
class Option:
    """What comes next: a job, its lane's start, and its target."""

    job: WaitingJob
    target: Target
    start: float


@dataclass
class Model:
    """Chooses by the rules."""

    policy: Policy
    pools: Mapping[int, Pool]
    now: float = 0.0
    places: dict[int, float] = field(default_factory=dict)  #: Virtual time by lane.
    reach: dict[Class, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)
    buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)
    learned: dict[Target, learning.TargetState] = field(default_factory=dict)
    outputs: dict[Target, float] = field(default_factory=dict)
    waiting: dict[int, WaitingJob] = field(default_factory=dict)
    running: Counter[Target] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    hidden: set[int] = field(default_factory=set)  #: Jobs of which the turn cannot know.

    # -- targets --

    def limits(self, target: Target) -> list[tuple[str, Limits]]:
        """Return the limits of a target by key."""
        found = dict(self.policy.limits_of(*target))
        own = f"{target.provider}/{target.model}"
        known = self.learned.get(target, learning.TargetState())
        found[own] = learning.limits(known, found.get(own, Limits()))
        return list(found.items())

    def bucket(self, key: str, kind: str, seconds: float) -> float:
        """Return the seconds that are left in a bucket of which one unit takes ``seconds``."""
        most = max(3.0, seconds) if kind == "requests" else 3.0
        return self.buckets.setdefault((key, kind), Bucket(_LONG, self.now)).grow(self.now, most)

    def is_open(self, target: Target) -> bool:
        """Whether a job can go to a target now."""
        known = self.learned.get(target, learning.TargetState())
        if learning.closed(known, self.now) is not None:
            return False
        configured = []
        for key, limits in self.limits(target):
            most = limits.concurrency
            if most is None:
                continue
            configured.append(most)
            of_all = sum(number for each, number in self.running.items() if each.provider == target.provider)
            if (of_all if key == target.provider else self.running[target]) >= most:
                return False
        if learning.places(known, self.now, self.running[target], min(configured, default=None)) <= 0:
            return False
        for key, limits in self.limits(target):
            if limits.requests_per_minute is not None:
                one = 60.0 / (0.95 * limits.requests_per_minute)
                if self.bucket(key, "requests", one) < one - 1e-6:
                    return False
            if limits.tokens_per_minute is not None and self.bucket(key, "tokens", 0.0) < -1e-6:
                return False
        return True

    def effective(self, pool: int) -> Target | None:
        """Return the target that a pool's jobs go to, open or not."""
        for target in self.pools[pool].chain:
            closed = learning.closed(self.learned.get(target, learning.TargetState()), self.now)
            if closed is None:
                return target
            until = self.now + 1.0 if closed.until is None else closed.until
            if closed.cause == "cooling" and until - self.now <= self.policy.max_cooldown(target.provider):
                return target
        return None

    def open_target(self, pool: int) -> Target | None:
        """Return the target that a pool's jobs go to, if it is open."""
        target = self.effective(pool)
        return target if target is not None and self.is_open(target) else None

    def charge(self, target: Target, tokens: int, requests: int = 1) -> None:
        """Take requests and tokens from a target's buckets, or give tokens back."""
        for key, limits in self.limits(target):
            if limits.requests_per_minute is not None and requests:
                one = 60.0 / (0.95 * limits.requests_per_minute)
                self.bucket(key, "requests", one)
                self.buckets[key, "requests"].take(requests * one, max(3.0, one))
            if limits.tokens_per_minute is not None:
                self.bucket(key, "tokens", 0.0)
                self.buckets[key, "tokens"].take(tokens * 60.0 / (0.95 * limits.tokens_per_minute), 3.0)

    def cost(self, job: WaitingJob, target: Target) -> int:
        """Return what a job is estimated to take."""
        output = job.max_tokens
        if target in self.outputs:
            mean = round(self.outputs[target])
            output = mean if output is None else min(mean, output)
        return max(1, job.prompt_tokens + (500 if output is None else output))

    # -- lanes --

    def place_of(self, pool: int) -> Class:
        """Return queue and class of a pool."""
        return self.pools[pool].queue, self.pools[pool].job_class

    def start(self, lane: int, where: Class) -> float:
        """Return where a lane's next job starts."""
        least = self.reach[where] - self.policy.credit if where in self.reach else 0.0
        return max(self.places.get(lane, float("-inf")), least)

    def is_full(self, tenant: str) -> bool:
        """Whether a tenant runs as many jobs as it may."""
        most = self.policy.tenant(tenant).concurrency
        return most is not None and self.tenants[tenant] >= most

    def floor(self, where: Class, *, but: int, waits: Callable[[WaitingJob], bool]) -> float:
        """Return where a lane begins that comes to wait: beside the one that is least far."""
        starts = [
            self.start(job.lane, where)
            for job in self.waiting.values()
            if job.lane != but
            and self.place_of(job.pool) == where
            and job.due is None
            and not self.is_full(job.key.tenant)
            and waits(job)
            and self.open_target(job.pool) is not None
        ]
        return min(starts, default=self.reach.get(where, 0.0))

    def come(self, lane: int, where: Class, waits: Callable[[WaitingJob], bool]) -> None:
        """Let a lane come to wait: nothing is saved up, what was overdrawn stays overdrawn."""
        floor = self.floor(where, but=lane, waits=waits)
        self.places[lane] = max(self.places.get(lane, float("-inf")), floor)

    # -- what is told --

    def hear(self, told: Observation, queue: str) -> None:
        """Apply what a worker has learned."""
        place = told.place
        target, started = place.target, place.chosen_at
        known = self.learned.get(target, learning.TargetState())
        weight = self.policy.tenant(place.tenant).weight
        running = place.running or max(1, self.running[target])  # without a turn, those that run now say it
        if isinstance(told, Accepted):
            self.learned[target] = learning.accepted(known, self.now, started=started, running=running)
            return
        assert isinstance(told, Settled)
        if not told.estimated:
            return  # it was handed out to be ended, and no target let it in
        known = learning.told(known, told.rates)
        if told.end is End.COMPLETED:
            known = learning.completed(known, self.now, started=started)
        elif told.end is End.ANSWERED:
            known = learning.answered(known, self.now, started=started)
        elif told.end is End.REFUSED:
            known = learning.refused(known, self.now, started=started, running=running, retry_after=told.retry_after)
        elif told.end is End.FAILED:
            known = learning.failed(
                known,
                self.now,
                started=started,
                broken_after=self.policy.broken_after(target.provider),
                broken_for=self.policy.broken_for(target.provider),
            )
        else:
            known = learning.withdrawn(known, self.now, started=started)
        self.learned[target] = known
        if told.output is not None:
            mean = self.outputs.get(target)
            self.outputs[target] = float(told.output) if mean is None else mean + 0.1 * (told.output - mean)
        if told.actual is not None:
            more = told.actual - told.estimated
            self.charge(target, more, requests=0)
            if place.lane in self.places:
                self.places[place.lane] += more / weight

    def start_directly(self, told: Charged, queue: str, *, waits: bool) -> None:
        """Charge a job that was started without a turn."""
        place = told.place
        where = (queue, place.job_class)
        self.charge(place.target, told.tokens)
        start = self.start(place.lane, where)
        if not waits:
            start = max(start, self.reach.get(where, 0.0))
        self.reach[where] = max(self.reach.get(where, 0.0), start)
        self.places[place.lane] = start + told.tokens / self.policy.tenant(place.tenant).weight

    # -- choosing --

    def restarted(self, queue: str) -> list[Option]:
        """Return the restarted jobs that can go now, in order."""
        due = sorted(
            (job.due, job.seq)
            for job in self.waiting.values()
            if job.due is not None and job.due <= self.now and self.pools[job.pool].queue == queue
        )
        found = []
        for _, seq in due:
            if seq in self.hidden:
                continue
            job = self.waiting[seq]
            target = self.open_target(job.pool)
            if target is not None and not self.is_full(job.key.tenant):
                found.append(Option(job, target, 0.0))
        return found

    def first(self, where: Class, dropped: Collection[int] = ()) -> Option | None:
        """Return a class's next new job: the oldest of the lane that is least far."""
        options: list[tuple[float, int, Option]] = []
        seen = set(dropped)
        for seq in sorted(self.waiting):
            job = self.waiting[seq]
            if job.due is not None or seq in self.hidden or job.lane in seen or self.place_of(job.pool) != where:
                continue
            target = None if self.is_full(job.key.tenant) else self.open_target(job.pool)
            if target is not None:
                seen.add(job.lane)
                start = self.start(job.lane, where)
                options.append((start, seq, Option(job, target, start)))
        return min(options, default=(0.0, 0, None), key=lambda option: option[:2])[2]

    def next(self, queue: str, dropped: Collection[int] = ()) -> Option | None:
        """Return what comes next of a queue's jobs, but for lanes that are left out."""
        for option in self.restarted(queue):
            return option
        bulk, interactive = self.first((queue, "bulk"), dropped), self.first((queue, "interactive"), dropped)
        if bulk is not None:
            cost = 0 if bulk.job.expired else self.cost(bulk.job, bulk.target)
            if self.owed.get(queue, 0.0) >= cost or interactive is None:
                return bulk
        return interactive

    def settle_owed(self, queue: str) -> None:
        """Forget what is owed to bulk if nothing of it can go."""
        if self.first((queue, "bulk")) is None:
            self.owed[queue] = 0.0

    def take(self, job: WaitingJob, target: Target) -> int:
        """Let a job go; return what is charged for it."""
        if job.expired:
            del self.waiting[job.seq]
            return 0
        where = queue, job_class = self.place_of(job.pool)
        tokens = self.cost(job, target)
        owed = self.owed.get(queue, 0.0)
        if job_class == "bulk":
            owed = max(0.0, owed - tokens)
        elif self.first((queue, "bulk")) is not None:
            share = self.policy.bulk_share
            owed = min(float(self.policy.credit), owed + tokens * share / (1 - share))
        self.owed[queue] = owed
        start = self.start(job.lane, where)
        self.charge(target, tokens)
        known = self.learned.get(target, learning.TargetState())
        self.learned[target] = learning.let_in(known, self.now)
        self.running[target] += 1
        self.tenants[job.key.tenant] += 1
        self.reach[where] = max(self.reach.get(where, 0.0), start)
        self.places[job.lane] = start + tokens / self.policy.tenant(job.key.tenant).weight
        del self.waiting[job.seq]
        return tokens
