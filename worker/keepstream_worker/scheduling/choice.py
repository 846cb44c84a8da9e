"""The choice: which jobs the worker gets that has the turn.

In: the policy, the newest state, what was read, what this worker has learned.  Out: what to read; then picks, changed
standings, and the next state.  Pure, and the only place where order is decided.

The rules are sequential: k jobs are k choices, one after the other, each with all before it done.  (1) Targets that
are open; (2) jobs that were started before; (3) interactive before bulk, which has a small share; (4) the lane that is
least far; (5) its oldest job.  What is read is bounded, so a batch ends early where it would have to know more.
"""

import heapq
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Final

from keepstream_worker.limits import Policy
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.gates import Gate, Gates
from keepstream_worker.scheduling.lanes import Lane, Row
from keepstream_worker.scheduling.observations import Accepted, Charged, End, Observation, Settled
from keepstream_worker.scheduling.state import (
    BULK,
    INTERACTIVE,
    FullTenant,
    PoolState,
    State,
    UnreadableStateError,
    class_of,
    key_of,
    pool_state,
)
from keepstream_worker.turn import (
    LATE_ARRIVALS,
    Decision,
    FoundPool,
    Move,
    Pick,
    Question,
    Reading,
    Retimed,
    Standing,
    WaitingJob,
)
from keepstream_worker.values import Target

#: Pools of a class that are read in one turn.
_MOST_POOLS: Final = 16
#: Pools of which restarted jobs are read in one turn: more than it takes jobs, or some of them would come too late.
_MOST_RESTARTED: Final = 64
#: Full tenants that are looked at again in one turn.
_MOST_TENANTS: Final = 20
#: Full tenants that are remembered. Lanes of others are parked all the same; they are looked for when a job of theirs
#: ends, and by a walk of the sweeper.
_MOST_PARKED: Final = 1000
#: Seconds after which nothing is parked but what is remembered: the walk would have found it.
_PARKED_MEMORY: Final = 600.0
#: Seconds after which what waits for the end of a job is looked at again, in case nobody tells of it.
_LAST_RESORT: Final = 1.0
#: Pools in which one lane waits, as far as turns see. Each costs each turn that moves the lane, and tenants, who name
#: the models, may name another one for each job: what is beyond is told again by sweeps, when there is room for it.
_MOST_PLACES: Final = 100
#: Streams at a target of which nothing is known that one worker may start without asking.
_UNKNOWN_STREAMS: Final = 16
#: Seconds for which it is remembered since when jobs run: to find it takes a look at all that have ended.
_OLDEST_MEMORY: Final = 2.0
_NEVER: Final = float("inf")
#: Below every time of a lane; a number that both databases know.
_LONG_AGO: Final = -1e300


class Choice:
    """One turn of one worker: asks, then decides."""

    def __init__(
        self,
        policy: Policy,
        queue: str,
        places: int,
        observations: Sequence[Observation] = (),
        providers: Container[str] | None = None,
        parked: Iterable[str] = (),
        found: Iterable[FoundPool] = (),
    ) -> None:
        """Prepare a turn.

        Args:
            policy: Limits and weights.
            queue: Whose jobs the worker runs.
            places: Jobs that it takes at most; with 0 the turn only tells.
            observations: What it tells, in order.
            parked: Tenants to be looked at again, because lanes of theirs are parked.
            found: Pools in which jobs wait, whether they are known or not.
            providers: Whose jobs it takes; None: all. Others are left to workers that can ask them.
        """
        self.lacking: set[str] = set()  #: Providers for which jobs of the queue wait that could go, but not here.
        self.lost_state = False  #: Whether the newest state could not be read, so that this turn begins a new one.
        self._providers = providers
        self._parked = parked
        self._found = found
        self._policy = policy
        self._queue = queue
        self._places = places
        self._observations = observations

    # -- what is to be read --

    def ask(self, now: float, state: str) -> Question:
        """Return what is to be read; ``state`` is that of the newest turn, ``{}`` before the first."""
        self._now = now
        self._before = state
        try:
            self._state = State.from_json(state)
        except UnreadableStateError:  # it must not keep all jobs waiting for ever
            self._state = State.lost(now)
            self.lost_state = True
        for pool in self._found:
            self._state.find(pool)
        if self._state.passed_since <= now - _LAST_RESORT:
            self._state.passed = []  # perhaps there is room for them now
        self._gates = Gates(self._policy, self._state, now)
        self._lanes: dict[int, Lane] = {}
        self._told: list[Charged | Settled] = []  # what moves lanes
        self._heard: dict[str, list[Accepted | Settled]] = {}  # what teaches, by target
        self._before_hearing: dict[str, learning.TargetState] = {}
        self._freed: set[str] = set(self._parked)
        if self._state.parked_beyond <= now - _PARKED_MEMORY:
            self._state.parked_beyond = 0.0
        for observation in self._observations:
            self._hear(observation)
        self._note_freed({each.place.target.provider for each in self._observations if isinstance(each, Settled)})
        self._asked_pools = self._pools_to_read()
        self._asked_tenants = self._tenants_to_read()
        restarted = self._restarted_to_read()
        self._asked_restarted = set(restarted)
        full = tuple(name for name in self._state.tenants if name not in self._asked_tenants) if restarted else ()
        places = self._places
        lanes = sum(self._state.pools[pool].lanes for pool in self._asked_pools) or 1
        times = self._least_times()
        told = {each.place.lane: times.get((self._queue, each.place.job_class), _LONG_AGO) for each in self._told}
        # One more than can be served says that there are no others before; those that are settled now may fall behind.
        self._standings = places + 1 + min(places, len(told)) if places else 0
        return Question(
            queue=self._queue,
            pools=tuple((pool, self._state.pools[pool].low or 0.0) for pool in self._asked_pools),
            restarted_pools=restarted,
            full_tenants=full,
            lanes=tuple(told.items()),
            arrival_times=times,
            parked_tenants=self._asked_tenants,
            passed=frozenset(self._state.passed),
            standings=self._standings,
            first_jobs=places,
            other_jobs=min(places, -(-2 * places // lanes) + 1),
            restarted=places,
            counted_providers=self._providers_to_count(),
            counted_tenants=self._asked_tenants,
            counts_all_tenants=any(tenant.concurrency is not None for tenant in self._policy.tenants.values()),
            oldest=self._state.oldest if self._knows_oldest() else None,
        )

    def _knows_oldest(self) -> bool:
        found = self._state.oldest_found
        return found <= self._now < found + _OLDEST_MEMORY

    def _hear(self, observation: Observation) -> None:
        """Apply what was learned to targets and buckets; lanes follow when they are read."""
        place = observation.place
        key = key_of(place.target)
        use = self._state.use(key)
        use.used = self._now
        if isinstance(observation, Charged):
            self._gates.of(key).charge(observation.tokens)
            self._told.append(observation)
            return
        if isinstance(observation, Settled):
            self._freed.add(place.tenant)
            if not observation.estimated:
                return  # it was handed out to be ended: no target let it in
            if learning.told(use.learned, observation.rates) != use.learned:
                self._gates.forget()
        self._before_hearing.setdefault(key, use.learned)
        self._heard.setdefault(key, []).append(observation)
        use.learned = self._learn(use.learned, observation)
        if isinstance(observation, Accepted):
            return
        if observation.output is not None:
            use.answered(observation.output)
        if observation.actual is not None and observation.actual != observation.estimated:
            self._gates.of(key).settle(observation.actual - observation.estimated)
            self._told.append(observation)

    def _learn(self, learned: learning.TargetState, told: Accepted | Settled, counted: int = 1) -> learning.TargetState:
        """Return what is known of a target after what is told; ``counted``: its streams, if nobody counted them."""
        now, place = self._now, told.place
        started, running = place.chosen_at, place.running or max(1, counted)
        if isinstance(told, Accepted):
            if learned.ceiling is None:
                # Its turn cannot have counted what was on its way to start without one.
                running = max(running, counted)
            return learning.accepted(learned, now, started=started, running=running)
        learned = learning.told(learned, told.rates)
        if told.end is End.COMPLETED:
            return learning.completed(learned, now, started=started)
        if told.end is End.ANSWERED:
            return learning.answered(learned, now, started=started)
        if told.end is End.REFUSED:
            return learning.refused(learned, now, started=started, running=running, retry_after=told.retry_after)
        if told.end is End.FAILED:
            provider = place.target.provider
            return learning.failed(
                learned,
                now,
                started=started,
                broken_after=self._policy.broken_after(provider),
                broken_for=self._policy.broken_for(provider),
            )
        return learning.withdrawn(learned, now, started=started)

    def _learn_by_count(self, running: Mapping[Target, int]) -> None:
        """Learn once more, now that they are counted, where streams may have been started without a turn.

        How many others a target had is known to no single worker: by its own few, what a target accepts would be taken
        for next to nothing.
        """
        for key, heard in self._heard.items():
            learned = self._before_hearing[key]
            if learned.ceiling is not None and all(told.place.running for told in heard):
                continue
            for told in heard:
                learned = self._learn(learned, told, running.get(told.place.target, 0))
            self._state.use(key).learned = learned

    def _note_freed(self, providers: set[str]) -> None:
        """Note that streams of these have ended: who waits for them need not be last."""
        for pool in self._state.pools.values() if providers else ():
            if pool.full_at and any(key.partition("/")[0] in providers for key in pool.chain):
                pool.full_at = 0.0

    def _note_full_pool(self, pool: PoolState) -> None:
        """Note whether a pool's target runs all it may; not at each turn, or each would have to be written."""
        if self._gate(pool) is not None or self._gate(pool, counted=False) is None:
            pool.full_at = 0.0
        elif pool.full_at < self._now - _LAST_RESORT / 2:
            pool.full_at = self._now

    def _pools_to_read(self) -> tuple[int, ...]:
        """Return the active pools of the queue that are open.

        If they are too many, those whose lanes are least far, and last those whose targets ran all they may a moment
        ago, since these do not come forward: what is read is found to be further than was known, so
        the others are next.  A lane may be served later for that, by as many turns as it takes to read all once.
        """
        if not self._places:
            return ()
        active: dict[str, list[tuple[bool, float, int]]] = {INTERACTIVE: [], BULK: []}
        for number, pool in self._state.pools.items():
            if pool.queue == self._queue and pool.low is not None and pool.job_class in active:
                active[pool.job_class].append((pool.full_at > self._now - _LAST_RESORT, pool.low, number))
        asked: list[int] = []
        for pools in active.values():
            pools.sort()
            most = len(asked) + _MOST_POOLS
            for _, _, number in pools:
                if self._gate(self._state.pools[number], counted=False) is not None:
                    asked.append(number)
                    if len(asked) >= most:
                        break
        return tuple(asked)

    def _tenants_to_read(self) -> tuple[str, ...]:
        """Return full tenants of whom a job may have ended."""
        full = self._state.tenants
        found = [name for name in full if name in self._freed]
        if self._state.parked_beyond:
            found += sorted(self._freed.difference(full))
        due = sorted(
            (tenant.checked, name)
            for name, tenant in full.items()
            if name not in self._freed
            and (tenant.checked <= self._now - _LAST_RESORT or self._has_place(name, tenant.running))
        )
        return tuple(found + [name for _, name in due][: max(_MOST_TENANTS - len(found), 0)])

    def _restarted_to_read(self) -> tuple[int, ...]:
        """Return the open pools in which restarted jobs are due; if they are too many, those that are due first.

        Tenants, who name the models, may have each job wait in a pool of its own.
        """
        if not self._places:
            return ()
        wanted: list[tuple[float, int]] = []
        for number, pool in self._state.pools.items():
            if pool.queue != self._queue:
                continue
            if pool.restarted is not None and pool.restarted <= self._now:
                wanted.append((pool.restarted, number))
            elif pool.hidden and self._asked_tenants:
                wanted.append((_NEVER, number))
        wanted.sort()
        found: list[int] = []
        for _, number in wanted:
            if self._gate(self._state.pools[number], counted=False) is not None:
                found.append(number)
                if len(found) >= _MOST_RESTARTED:
                    break
        return tuple(found)

    def _providers_to_count(self) -> tuple[str, ...]:
        """Return the providers for which jobs wait, and those of streams that were started without a turn."""
        found = {key.partition("/")[0] for pool in self._state.pools.values() for key in pool.chain}
        for heard in self._heard.values():
            found.update(told.place.target.provider for told in heard if not told.place.running)
        return tuple(found)

    def _least_times(self) -> dict[tuple[str, str], float]:
        """Return, by queue and class, the least time that a standing can have which means anything."""
        if self._state.parked_beyond:
            return {}  # how far those are that are not remembered is not known
        times = self._state.idle_times(self._policy.credit)
        for pool in self._state.pools.values():
            key = (pool.queue, pool.job_class)
            if pool.low is not None and key in times:
                times[key] = min(times[key], pool.low)
        for tenant in self._state.tenants.values():
            for key, time in times.items():
                if tenant.low is not None and key[0] in tenant.queues:
                    times[key] = min(time, tenant.low)
        return times

    def _gate(self, pool: PoolState, *, counted: bool = True) -> Gate | None:
        """Return the gate by which the pool's next job passes, if it is open."""
        gate, _ = self._gates.effective(pool.chain)
        if gate is None or gate.closed(counted=counted) is not None:
            return None
        provider = gate.target.provider
        if self._providers is not None and pool.queue == self._queue and provider not in self._providers:
            self.lacking.add(provider)
            return None
        return gate

    # -- what is to be written --

    def decide(self, reading: Reading) -> Decision:
        """Return what is to be written; called after ``ask``, in the same turn."""
        self._reading = reading
        self._running_tenants = dict(reading.running_tenants)
        self._full: set[str] = set()
        self._restarted_arrived: set[int] = set()
        self._misplaced: list[int] = []
        self._passed: list[int] = []
        self._picks: list[tuple[WaitingJob, Target, int, Gate | None]] = []
        self._cut: set[str] = set()  # classes of which more may be open than was read
        self._open: dict[int, Gate | None] = {}
        self._heaps: dict[str, list[tuple[float, int, int]]] = {}
        self._gates.count(reading.running)
        self._learn_by_count(reading.running)
        if reading.oldest is not None:
            self._state.oldest = reading.oldest
            self._state.oldest_found = self._now
        self._unread = {
            number for number, pool in self._state.pools.items() if pool.queue == self._queue and pool.low is not None
        }.difference(self._asked_pools)
        self._read_standings()
        self._horizons = self._find_horizons()
        self._settle()
        for lane in self._lanes.values():
            self._note_tenant(lane.tenant)
        self._park(self._full.difference(self._asked_tenants))
        self._floors = self._find_floors()
        self._unpark()
        self._arrive(reading.arrivals)
        self._choose()
        return self._written()

    def _pool(self, number: int) -> PoolState:
        """Return what is known of a pool; at first, what it is."""
        pool = self._state.pools.get(number)
        if pool is None:
            pool = self._state.pools[number] = pool_state(self._reading.pools[number])
        return pool

    def _is_known(self, number: int) -> bool:
        """Whether a pool is known, or could be read."""
        return number in self._state.pools or number in self._reading.pools

    def _lane(self, number: int, tenant: str, queue: str, job_class: str) -> Lane:
        lane = self._lanes.get(number)
        if lane is None:
            weight = self._policy.tenant(tenant).weight
            lane = self._lanes[number] = Lane(number, tenant, queue, class_of(job_class), weight)
        return lane

    def _read_standings(self) -> None:
        jobs, whole = self._reading.jobs, self._reading.whole
        for standing in self._reading.standings:
            if not self._is_known(standing.pool):
                continue
            pool = self._pool(standing.pool)
            row = self._lane(standing.lane, standing.tenant, pool.queue, pool.job_class).read(standing)
            if row.old is standing:
                place = (standing.lane, standing.pool)
                row.jobs = jobs.get(place, ())
                row.whole = place in whole
                if row.whole and not row.jobs:
                    row.active = row.parked = False

    def _find_horizons(self) -> dict[str, list[tuple[float, int]]]:
        """Return, by class, beyond which times there may be lanes that were not read, and in which pool."""
        times: dict[int, list[float]] = {number: [] for number in self._asked_pools}
        for standing in self._reading.standings:
            if standing.active and standing.pool in times:
                times[standing.pool].append(standing.time)
        horizons: dict[str, list[tuple[float, int]]] = {INTERACTIVE: [], BULK: []}
        for number, found in times.items():
            pool = self._state.pools[number]
            pool.lanes = len(found)
            if len(found) >= self._standings:
                found.sort()
                horizons[pool.job_class].append((found[self._standings - 1], number))
        for found_horizons in horizons.values():
            found_horizons.sort()
        return horizons

    def _least(self, queue: str, job_class: str) -> float:
        """Return the least start of a lane: none is further behind."""
        reach = self._state.queue(queue).reach.get(job_class)
        return 0.0 if reach is None else reach - self._policy.credit

    def _reach(self, queue: str, job_class: str) -> float:
        return self._state.queue(queue).reach.get(job_class, 0.0)

    def _settle(self) -> None:
        """Move lanes by what their jobs really took, and by jobs that were started without a turn; in order."""
        for observation in self._told:
            place = observation.place
            lane = self._lane(place.lane, place.tenant, self._queue, place.job_class)
            if isinstance(observation, Charged):
                reach = self._reach(self._queue, lane.job_class)
                # Nothing waited when it was started, so it was the first to come after a time of idling.
                start = lane.start(self._least(self._queue, lane.job_class) if lane.waits else reach)
                self._state.queue(self._queue).reach[lane.job_class] = max(reach, start)
                lane.time = start + observation.tokens / lane.weight
            else:
                assert observation.actual is not None
                taken = observation.actual - observation.estimated
                if lane.is_unknown:  # then it is further behind than counts
                    if taken < 0:
                        continue
                    lane.time = self._least(self._queue, lane.job_class)
                lane.time += taken / lane.weight
            lane.is_charged = True
            lane.pool = place.pool

    # -- tenants --

    def _note_tenant(self, name: str) -> None:
        """Note whether a tenant is full."""
        if not self._has_place(name, self._running_tenants.get(name, 0)):
            self._full.add(name)

    def _has_place(self, name: str, running: int) -> bool:
        """Whether a tenant with so many running jobs may run another one."""
        most = self._policy.tenant(name).concurrency
        return most is None or running < most

    def _park(self, names: set[str]) -> None:
        """Let the lanes of full tenants wait apart, so that nobody has to look at them."""
        if not names:
            return
        for lane in self._lanes.values():
            is_meant = lane.tenant in names and any(row.active for row in lane.rows.values())
            if is_meant:
                self._note_full(lane.tenant, lane.queue)
                lane.park()

    def _note_full(self, name: str, queue: str) -> FullTenant | None:
        """Remember a full tenant of whom something waits; None: there are too many, which is remembered instead."""
        running = self._running_tenants.get(name, 0)
        tenant = self._state.tenants.get(name)
        if tenant is None:
            if len(self._state.tenants) >= _MOST_PARKED:
                if self._state.parked_beyond < self._now - _LAST_RESORT:
                    self._state.parked_beyond = self._now
                return None
            tenant = self._state.tenants[name] = FullTenant(self._now, running, None, [queue])
        tenant.running = running
        if queue not in tenant.queues:
            tenant.queues.append(queue)
        return tenant

    def _unpark(self) -> None:
        """Let those wait as others do whose tenants have a place again."""
        for name in self._asked_tenants:
            self._note_tenant(name)
            if name not in self._full:
                self._state.tenants.pop(name, None)
                self._look_for_hidden()
            elif name in self._state.tenants:
                tenant = self._state.tenants[name]
                tenant.checked, tenant.running = self._now, self._running_tenants.get(name, 0)
        for lane in self._lanes.values():  # perhaps there is room for them now; else it is known that there is none
            if lane.tenant in self._full and any(row.parked for row in lane.rows.values()):
                self._note_full(lane.tenant, lane.queue)
        self._park(self._full.intersection(self._asked_tenants))
        for lane in sorted(self._lanes.values(), key=lambda lane: (lane.time, lane.id)):
            if lane.tenant not in self._full and lane.tenant not in self._state.tenants:
                comes = not any(row.active for row in lane.rows.values())
                if lane.unpark():
                    self._come(lane, lifts=comes)

    def _look_for_hidden(self) -> None:
        """Let restarted jobs be read soon that were not, because a tenant was full."""
        for number, pool in self._state.pools.items():
            if pool.hidden and number not in self._asked_restarted:
                pool.restarted = self._now if pool.restarted is None else min(pool.restarted, self._now)

    # -- coming to wait --

    def _find_floors(self) -> dict[tuple[str, str], float]:
        """Return, by queue and class, the smallest start of the lanes that can be served."""
        floors = {
            (name, job_class): floor
            for name, queue in self._state.queues.items()
            for job_class, floor in queue.floor.items()
            if name != self._queue or not self._places
        }
        if self._places:
            for lane in self._lanes.values():
                if lane.queue == self._queue and self._is_open(lane):
                    self._lower_floor(floors, lane)
            for job_class, horizons in self._horizons.items():
                for time, number in horizons:
                    if self._gate(self._state.pools[number]) is not None:
                        key = (self._queue, job_class)
                        start = max(time, self._least(*key))
                        floors[key] = min(floors.get(key, start), start)
        return floors

    def _is_open(self, lane: Lane) -> bool:
        """Whether a new job of the lane could go now, as far as is known."""
        return lane.tenant not in self._full and any(
            row.active and row.pool not in self._unread and self._open_gate(row.pool) is not None
            for row in lane.rows.values()
        )

    def _lower_floor(self, floors: dict[tuple[str, str], float], lane: Lane) -> None:
        key = (lane.queue, lane.job_class)
        start = lane.start(self._least(*key))
        floors[key] = min(floors.get(key, start), start)

    def _come(self, lane: Lane, *, lifts: bool) -> None:
        """Take note of a lane whose jobs have come to wait; ``lifts``: none of them waited, so nothing is saved up."""
        key = (lane.queue, lane.job_class)
        if lifts:
            lane.time = max(lane.time, self._floors.get(key, self._reach(*key)))
        if any(row.active and self._gate(self._pool(row.pool)) is not None for row in lane.rows.values()):
            self._lower_floor(self._floors, lane)

    def _arrive(self, arrivals: Iterable[Any]) -> None:
        for arrival in arrivals:
            if not self._is_known(arrival.pool):
                self._misplaced.append(arrival.seq)
                continue
            pool = self._pool(arrival.pool)
            if arrival.due is not None and pool.queue == self._queue:
                self._restarted_arrived.add(arrival.pool)
                continue
            if arrival.due is not None:
                pool.restarted = arrival.due if pool.restarted is None else min(pool.restarted, arrival.due)
                continue
            self._note_tenant(arrival.tenant)
            lane = self._lane(arrival.lane, arrival.tenant, pool.queue, pool.job_class)
            row = lane.row(arrival.pool)
            if row.active or row.parked:
                row.head = min(row.head, arrival.seq)
                continue
            place = (arrival.lane, arrival.pool)
            row.jobs = self._reading.jobs.get(place, ())
            row.whole = place in self._reading.whole
            if row.whole and not row.jobs:
                continue  # it was taken or cancelled before its arrival was read
            if sum(each.active or each.parked for each in lane.rows.values()) >= _MOST_PLACES:
                self._passed.append(arrival.seq)
                continue
            waited = lane.waits
            row.head = arrival.seq
            if lane.tenant in self._full:
                self._note_full(lane.tenant, lane.queue)
                row.parked = True
                if lane.is_unknown:  # it comes when it leaves the park
                    lane.time = self._least(lane.queue, lane.job_class)
                continue
            row.active = True
            self._come(lane, lifts=not waited)

    # -- choosing --

    def _next(self, lane: Lane) -> tuple[WaitingJob | None, Row | None]:
        """Return the lane's next job, if it has one that can go now and was read; and where it waits."""
        job: WaitingJob | None = None
        found: Row | None = None
        for row in lane.rows.values():
            if not row.active or row.pool in self._unread or self._open_gate(row.pool) is None:
                continue
            first = row.peek()
            if first is None:
                if not row.whole:  # it has more, which were not read: it keeps its place for the next turn
                    self._cut.add(lane.job_class)
                    return None, None
            elif job is None or first.seq < job.seq:
                job, found = first, row
        return job, found

    def _open_gate(self, pool: int) -> Gate | None:
        """Return the gate of a pool, if it is open; asked often between two picks."""
        if pool not in self._open:
            self._open[pool] = self._gate(self._pool(pool))
        return self._open[pool]

    def _start(self, lane: Lane) -> float:
        return lane.start(self._least(lane.queue, lane.job_class))

    def _first(self, job_class: str) -> tuple[Lane, WaitingJob, Row] | None:
        """Return the lane of a class that is next, with its job; None: there is none, or it was not read."""
        heap = self._heaps[job_class]
        while heap:
            key = heap[0]
            lane = self._lanes[key[2]]
            job, row = self._next(lane)
            if job is None or row is None or lane.tenant in self._full:
                heapq.heappop(heap)
                continue
            now = (self._start(lane), job.seq, lane.id)
            if now > key:  # it has moved on since it was put here; it never moves back
                heapq.heapreplace(heap, now)
                continue
            if self._is_beyond(now[0], job_class):
                self._cut.add(job_class)
                return None
            return lane, job, row
        return None

    def _is_beyond(self, start: float, job_class: str) -> bool:
        """Whether a lane that was not read may come before one that starts there."""
        least = self._least(self._queue, job_class)
        for time, pool in self._horizons[job_class]:
            if max(time, least) >= start:
                return False
            if self._open_gate(pool) is not None:
                return True
        return False

    def _choose(self) -> None:
        """Take jobs, one after the other."""
        queue = self._state.queue(self._queue)
        self._open = {}
        self._cut.clear()
        self._heaps = {INTERACTIVE: [], BULK: []}
        for lane in self._lanes.values():
            if lane.queue == self._queue and lane.tenant not in self._full:
                job, _ = self._next(lane)
                if job is not None:
                    self._heaps[lane.job_class].append((self._start(lane), job.seq, lane.id))
        for heap in self._heaps.values():
            heapq.heapify(heap)
        if self._places and not self._bulk_waits():
            queue.owed = 0.0
        self._choose_restarted()
        if not self._places:
            return
        while len(self._picks) < self._places:
            bulk = self._first(BULK)
            interactive = self._first(INTERACTIVE)
            if bulk is not None and queue.owed >= self._cost(bulk[1]):
                chosen = bulk
            elif interactive is not None:
                chosen = interactive
            elif bulk is not None and INTERACTIVE not in self._cut:
                chosen = bulk
            else:
                break
            lane, job, row = chosen
            gate = self._open_gate(row.pool)
            assert gate is not None
            row.pop()
            self._take(job, lane, gate)
        if not self._bulk_waits():
            queue.owed = 0.0

    def _choose_restarted(self) -> None:
        """Take the jobs that were started before and are due, before all others."""
        taken: set[int] = set()
        by_pool: dict[int, list[WaitingJob]] = {}
        due = []
        for job in self._reading.restarted:
            if not self._is_known(job.pool):
                continue  # its arrival was read, too
            pool = self._pool(job.pool)
            if pool.queue == self._queue:
                by_pool.setdefault(job.pool, []).append(job)
                if job.due is not None and job.due <= self._now:
                    due.append(job)
        due.sort(key=lambda job: (job.due, job.seq))
        hidden = set()
        put_off = set()
        for job in due:
            if len(self._picks) >= self._places:
                break
            gate = self._open_gate(job.pool)
            if gate is None:
                continue
            self._note_tenant(job.key.tenant)
            if job.key.tenant in self._full:
                if self._note_full(job.key.tenant, self._queue) is None:
                    put_off.add(job.seq)
                else:
                    hidden.add(job.seq)
                    self._pool(job.pool).hidden = True
                continue
            pool = self._pool(job.pool)
            lane = self._lane(job.lane, job.key.tenant, pool.queue, pool.job_class)
            taken.add(job.seq)
            self._take(job, lane, gate)
        for number in self._asked_restarted | self._restarted_arrived:
            self._note_restarted(number, by_pool.get(number, []), taken, hidden, put_off)

    def _note_restarted(
        self, number: int, jobs: list[WaitingJob], taken: set[int], hidden: set[int], put_off: set[int]
    ) -> None:
        """Note when the next restarted job of a pool is due, or is to be looked at again, if it is ``put_off``."""
        pool = self._pool(number)
        jobs.sort(key=lambda job: job.due or 0.0)
        left = [
            self._now + _LAST_RESORT if job.seq in put_off else job.due
            for job in jobs
            if job.seq not in taken and job.seq not in hidden and job.due is not None
        ]
        if number not in self._asked_restarted:
            pool.restarted = min((*left, pool.restarted or _NEVER))
            pool.restarted = None if pool.restarted == _NEVER else pool.restarted
            return
        # Where none waits, none is hidden: else pools would be remembered for as long as any tenant is full.
        pool.hidden = number in self._reading.restarted_wait or any(job.seq in hidden for job in jobs)
        if len(jobs) > self._places:  # there may be more
            left.append(jobs[self._places].due or 0.0)
        pool.restarted = min(left, default=None)

    def _bulk_waits(self) -> bool:
        return self._first(BULK) is not None or BULK in self._cut

    def _cost(self, job: WaitingJob) -> int:
        gate = self._open_gate(job.pool)
        if gate is None or job.expired:
            return 0
        return self._state.estimate(gate.target, job.prompt_tokens, job.max_tokens)

    def _take(self, job: WaitingJob, lane: Lane, gate: Gate) -> None:
        """Let a job pass: charge its target, its lane, its tenant and its class."""
        if job.expired:  # it is handed out to be ended
            self._picks.append((job, gate.target, 0, None))
            return
        tokens = self._cost(job)
        queue = self._state.queue(lane.queue)
        if lane.job_class == BULK:
            queue.owed = max(0.0, queue.owed - tokens)
        elif self._policy.bulk_share and self._bulk_waits():
            share = self._policy.bulk_share
            queue.owed = min(float(self._policy.credit), queue.owed + tokens * share / (1 - share))
        gate.let_in(tokens)
        self._open.clear()
        start = self._start(lane)
        queue.reach[lane.job_class] = max(self._reach(lane.queue, lane.job_class), start)
        lane.time = start + tokens / lane.weight
        lane.is_charged = True
        lane.pool = job.pool
        self._picks.append((job, gate.target, tokens, gate))
        self._running_tenants[lane.tenant] = self._running_tenants.get(lane.tenant, 0) + 1
        self._note_tenant(lane.tenant)
        if lane.tenant in self._full:
            self._park({lane.tenant})

    # -- writing --

    def _written(self) -> Decision:
        moves: list[Move] = []
        made: list[Standing] = []
        times: list[Retimed] = []
        for lane in self._lanes.values():
            changes = lane.written()
            moves += changes[0]
            made += changes[1]
            times += changes[2]
        self._note_lows()
        if self._places:
            self._note_floors()
        state = self._state
        left = {*self._misplaced, *self._passed}
        arrivals = tuple(arrival.seq for arrival in self._reading.arrivals if arrival.seq not in left)
        if arrivals or self._passed:
            state.arrivals_low = max(state.arrivals_low, max(*arrivals, *self._passed, 0) - LATE_ARRIVALS)
            if self._passed and not state.passed:
                state.passed_since = self._now
            state.passed = [seq for seq in (*state.passed, *self._passed) if seq >= state.arrivals_low]
        if self._misplaced:
            state.arrivals_low = min(state.arrivals_low, *self._misplaced)
        ready, closed = self._outlook()
        for name in state.queues.keys() | ready.keys():
            state.queue(name).ready = ready.get(name)
        state.forget_targets(self._now)
        text = state.to_json()
        return Decision(
            picks=tuple(
                Pick(
                    job,
                    target,
                    tokens,
                    self._now,
                    0 if gate is None else gate.running,
                    self._pool(job.pool).job_class,
                )
                for job, target, tokens, gate in self._picks
            ),
            moves=tuple(moves),
            times=tuple(times),
            new_standings=tuple(made),
            arrivals=arrivals,
            arrivals_low=state.arrivals_low,
            misplaced=tuple(self._misplaced),
            ready=ready,
            closed=closed,
            state=text,
            changed=bool(self._picks or moves or made or times or arrivals or text != self._before),
        )

    def _note_lows(self) -> None:
        """Note below which time no lane of a pool is."""
        for number in self._asked_pools:
            self._state.pools[number].low = None
            self._note_full_pool(self._state.pools[number])
        for horizons in self._horizons.values():
            for time, number in horizons:
                self._state.pools[number].low = time
        for lane in self._lanes.values():
            for row in lane.rows.values():
                if row.active:
                    pool = self._pool(row.pool)
                    pool.low = lane.time if pool.low is None else min(pool.low, lane.time)
                elif row.parked:
                    tenant = self._state.tenants.get(lane.tenant)
                    if tenant is not None:
                        tenant.low = lane.time if tenant.low is None else min(tenant.low, lane.time)

    def _note_floors(self) -> None:
        floors = self._find_floors()
        queue = self._state.queue(self._queue)
        queue.floor = {job_class: floor for (name, job_class), floor in floors.items() if name == self._queue}
        for (name, job_class), floor in self._floors.items():
            if name != self._queue:
                self._state.queue(name).floor[job_class] = floor

    def _outlook(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Return when each queue's next turn is worth taking, and why what waits waits."""
        ready: dict[str, float] = {}
        closed: dict[str, Any] = {}
        soon = self._now + _LAST_RESORT

        def note(queue: str, at: float) -> None:
            ready[queue] = min(ready.get(queue, at), at)

        for pool in self._state.pools.values():
            if pool.low is None and pool.restarted is None:
                if pool.hidden:
                    note(pool.queue, soon)
                continue
            opens = self._opens(pool, closed)
            if pool.low is not None:
                note(pool.queue, opens)
            if pool.restarted is not None:
                at = max(pool.restarted, opens)
                note(pool.queue, at if at > self._now else 0.0)
        for name, tenant in self._state.tenants.items():
            for queue in tenant.queues:
                note(queue, soon)
            most = self._policy.tenant(name).concurrency
            closed[f"tenant:{name}"] = {"why": "tenant", "running": tenant.running, "most": most}
        if self._reading.more_arrivals:
            note(self._queue, 0.0)
        elif self._state.passed:
            note(self._queue, self._state.passed_since + _LAST_RESORT)
        return ready, closed

    def _opens(self, pool: PoolState, closed: dict[str, Any]) -> float:
        """Return the moment from which a job of the pool can go, 0 if that is now; note why not in ``closed``."""
        if self._gates.is_free(pool.chain[0]):
            return 0.0
        gate, back = self._gates.effective(pool.chain)
        for key in pool.chain:
            if gate is not None and key == gate.key:
                break
            unfit = self._gates.of(key).unfit()
            if unfit is not None:
                closed[key] = unfit.as_json()
        if gate is None:
            return back
        shut = gate.closed()
        if shut is None:
            return 0.0
        closed[shut.key] = shut.as_json()
        return min(back, self._now + _LAST_RESORT if shut.until is None else shut.until)


def may_start_directly(
    policy: Policy, state: State, chain: Sequence[Target], tenant: str, running_here: int
) -> Target | None:
    """Return the target at which a job may start without a turn; None: it has to wait for one.

    It may if choice would give the same whatever else happens: nothing limits its target or tenant, and this worker has
    few streams there, for what is known of the target (other workers' are not counted).  That the worker has a place
    and no job of its queue waits that could go now, its caller knows: what waits for closed targets loses nothing.

    Args:
        policy: Limits.
        state: Of the newest turn that is known.
        chain: The job's targets.
        tenant: The job's.
        running_here: This worker's streams at the first target, with those that may be on their way there.
    """
    if policy.tenant(tenant).concurrency is not None or tenant in state.tenants:
        return None
    target = chain[0]
    if policy.limits_of(*target):
        return None
    use = state.uses.get(key_of(target))
    learned = learning.TargetState() if use is None else use.learned
    if learned.is_limited or running_here >= max(_UNKNOWN_STREAMS, learned.accepted // 2):
        return None
    return target
