"""Choice against the plain model of its rules, in a world where everything happens in any order.

Each turn is checked against what the model would do, one choice at a time; where a batch ends early or a lane drops out
of it, that must be for want of having been read, and the next turn must be due at once.
"""

import copy
import os
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepstream_worker.limits import Limits, Policy, ProviderPolicy, RateLimits, TenantPolicy
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.choice import may_start_directly
from keepstream_worker.scheduling.observations import Accepted, Charged, End, Observation, Settled
from keepstream_worker.scheduling.state import State, key_of
from keepstream_worker.turn import Decision, Pick, Standing, WaitingJob
from keepstream_worker.values import Target
from tests.choice_model import Model, Option
from tests.choice_world import Running, World

#: Of a run by hand: steps and examples, for instance 60 and 2000.
STEPS = int(os.environ.get("CHOICE_STEPS", "40"))
EXAMPLES = int(os.environ.get("CHOICE_EXAMPLES", "40"))

QUEUE = "main"
CHAINS = [
    [("free", "m")],
    [("few", "m")],
    [("few", "n")],
    [("rated", "m")],
    [("tokens", "m")],
    [("few", "m"), ("free", "m")],
    [("rated", "m"), ("few", "n"), ("tokens", "m")],
    [("free", "m"), ("free", "n")],
]
TENANTS = ["a", "b", "c", "d", "narrow", "single"]
POLICIES = [
    Policy(
        providers={
            "free": ProviderPolicy(),
            "few": ProviderPolicy(
                limits=Limits(concurrency=few),
                models={"n": Limits(concurrency=2)},
                broken_after=2,
                max_cooldown=cooling,
            ),
            "rated": ProviderPolicy(limits=Limits(requests_per_minute=rate), broken_after=2, broken_for=2.0),
            "tokens": ProviderPolicy(limits=Limits(tokens_per_minute=rate * 300), max_cooldown=0.0),
        },
        tenants={
            "b": TenantPolicy(weight=2.0),
            "c": TenantPolicy(weight=weight),
            "narrow": TenantPolicy(concurrency=2),
            "single": TenantPolicy(concurrency=single),
        },
        credit=credit,
        bulk_share=share,
    )
    for few, cooling, rate, weight, single, credit, share in [
        (3, 2.0, 60.0, 4.0, 1, 100_000, 0.05),
        (1, 10.0, 600.0, 0.5, 3, 100_000, 0.3),
        (5, 0.0, 6.0, 3.0, 1, 3_000, 0.0),
    ]
]


class ChoiceMachine(RuleBasedStateMachine):
    """Everything that can happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.policy = POLICIES[0]
        self.model = Model(self.policy, self.world.pools, now=self.world.now)
        self.told: list[Observation] = []
        self.failed = False

    @initialize(number=st.integers(0, 2))
    def begin(self, number: int) -> None:
        self.policy = self.model.policy = POLICIES[number]

    # -- what happens between turns --

    @rule(
        tenant=st.sampled_from(TENANTS),
        chain=st.sampled_from(CHAINS),
        job_class=st.sampled_from(["interactive", "interactive", "bulk"]),
        prompt=st.integers(0, 2000),
        most=st.sampled_from([None, 1, 100, 1000]),
        slow=st.booleans(),
        expired=st.sampled_from([False, False, False, True]),
        number=st.integers(1, 6),
    )
    def store(
        self,
        tenant: str,
        chain: list[tuple[str, str]],
        job_class: str,
        prompt: int,
        most: int | None,
        slow: bool,  # noqa: FBT001  # drawn by name
        expired: bool,  # noqa: FBT001
        number: int,
    ) -> None:
        for index in range(number):
            self.world.store(
                tenant,
                chain,
                job_class=job_class,
                prompt_tokens=prompt,
                max_tokens=most,
                slow=slow and index == 0,
                expired=expired,
            )

    @precondition(lambda self: self.world.slow)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.world.commit_slow(data.draw(st.sampled_from(sorted(self.world.slow))))

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.waiting))))

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.5, 1.0, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(number=st.integers(0, 2))
    def change(self, number: int) -> None:
        self.policy = self.model.policy = POLICIES[number]

    def _one(self, data: st.DataObject) -> Running:
        return self.world.running[data.draw(st.sampled_from(sorted(self.world.running)))]

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.told.append(Accepted(self._one(data).place))

    @precondition(lambda self: self.world.running)
    @rule(
        data=st.data(),
        actual=st.sampled_from([None, 0, 10, 300, 5000]),
        output=st.sampled_from([None, 1, 50, 800]),
        end=st.sampled_from(End),
        rates=st.sampled_from([None, None, RateLimits(requests_per_minute=120.0, tokens_per_minute=10_000.0)]),
        retry_after=st.sampled_from([None, 0.2, 5.0]),
        again=st.sampled_from([None, None, 0.0, 0.5, 4.0]),
    )
    def end(
        self,
        data: st.DataObject,
        actual: int | None,
        output: int | None,
        end: End,
        rates: RateLimits | None,
        retry_after: float | None,
        again: float | None,
    ) -> None:
        running = self._one(data)
        key = running.pick.job.key
        if running.pick.job.expired:
            actual, end = 0, End.WITHDRAWN
        self.told.append(
            Settled(
                running.place,
                running.pick.tokens,
                actual,
                output if end is End.COMPLETED else None,
                end,
                retry_after if end is End.REFUSED else None,
                rates,
            )
        )
        if again is None:
            self.world.end(key)
        else:
            self.world.restart(key, again)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """Nobody tells of the end, but the job goes on."""
        self.world.restart(self._one(data).pick.job.key, 0.0)

    @precondition(lambda self: not (self.world.waiting or self.world.arrivals or self.world.slow))
    @rule(tenant=st.sampled_from(TENANTS), chain=st.sampled_from(CHAINS), prompt=st.integers(0, 2000))
    def start_directly(self, tenant: str, chain: list[tuple[str, str]], prompt: int) -> None:
        state = State.from_json(self.world.state)
        here = sum(each.pick.target == chain[0] for each in self.world.running.values())
        target = may_start_directly(self.policy, state, [Target(*each) for each in chain], tenant, here)
        if target is None:
            return
        job = self.world.store(tenant, chain, prompt_tokens=prompt)
        self.world.cancel(job.seq)
        pick = Pick(job, target, state.estimate(target, prompt, job.max_tokens), self.world.now)
        running = self.world.running[job.key] = Running(pick)
        self.told.append(Charged(running.place, pick.tokens))

    # -- the turn --

    @rule(places=st.sampled_from([0, 1, 1, 2, 3, 10]), tells=st.booleans())
    def turn(self, places: int, *, tells: bool) -> None:
        told, rest = (self.told, []) if tells else ([], self.told)
        before = list(self.world.standings)
        full = State.from_json(self.world.state).tenants
        waiting = dict(self.world.waiting)
        running = Counter(each.pick.target for each in self.world.running.values())
        tenants = Counter(key.tenant for key in self.world.running)
        decision = self.world.turn(self.policy, places, told)
        self.told = list(rest)
        model = self.model
        model.now, model.waiting, model.running, model.tenants = self.world.now, waiting, running, tenants
        self.failed = True
        held = set(full).difference(self.world.question.parked_tenants)
        Check(self.world, model, before, places, told, held).turn(decision)
        self.failed = False

    @invariant()
    def consistent(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """Everything that waits runs in the end."""
        world = self.world
        if self.failed:
            return
        for seq in list(world.slow):
            world.commit_slow(seq)
        self.change(1)
        for _ in range(2000):
            if not world.waiting and not world.arrivals:
                break
            self.turn(10, tells=True)
            for running in list(world.running.values()):
                self.told.append(Settled(running.place, running.pick.tokens, None, None, End.COMPLETED))
                world.end(running.pick.job.key)
            ready = world.ready.get(QUEUE)
            world.now = max(world.now + 0.001, min(ready, world.now + 10) if ready is not None else world.now)
            assert ready is not None or not world.waiting, "what waits is forgotten"
        assert not world.waiting


class Check:
    """Compares one turn with the model."""

    def __init__(
        self,
        world: World,
        model: Model,
        before: list[Standing],
        places: int,
        told: list[Observation],
        held: set[str],
    ) -> None:
        assert world.reading is not None
        self.world = world
        self.model = model
        self.places = places
        self.told = told
        self.held = held  # tenants of whom nobody has told that they have a place again
        self.reading = world.reading
        self.question = world.question
        empty = {
            (each.lane, each.pool)
            for each in before
            if (each.lane, each.pool) in self.reading.whole and (each.lane, each.pool) not in self.reading.jobs
        }
        self.active = {(each.lane, each.pool) for each in before if each.active} - empty
        self.parked = {
            (each.lane, each.pool): each for each in before if each.parked and (each.lane, each.pool) not in empty
        }
        self.known = {each.lane for each in self.reading.standings}
        read = Counter(each.pool for each in self.reading.standings if each.active)
        full = {pool for pool, _ in self.question.pools if read[pool] >= self.question.standings}
        self.horizons = {
            pool: sorted(each.time for each in self.reading.standings if each.pool == pool and each.active)[
                self.question.standings - 1
            ]
            for pool in full
        }
        # Then nobody knows where the first lane with a job is.
        self.is_blind = any(
            all((each.lane, pool) in empty for each in self.reading.standings if each.pool == pool) for pool in full
        )

    def turn(self, decision: Decision) -> None:
        """Check all of it."""
        self.hear()
        self.unpark()
        self.arrive()
        self.model.hidden = self.hidden()
        if self.places and not self.is_blind:
            self.picks(decision)
        else:
            for pick in decision.picks:
                self.model.take(pick.job, pick.target)
        self.lanes()
        self.state(decision)
        self.outlook(decision)

    def hear(self) -> None:
        model = self.model
        for told in self.told:
            lane, where = told.place.lane, (QUEUE, told.place.job_class)
            waits = any(each == lane for each, _ in (*self.active, *self.parked))
            if isinstance(told, Charged):
                model.start_directly(told, QUEUE, waits=waits)
                self.known.add(lane)
                continue
            more = 0 if isinstance(told, Accepted) or told.actual is None else told.actual - told.estimated
            if more and lane not in self.known:  # so far behind that it was forgotten
                if more > 0:
                    model.places[lane] = model.start(lane, where)
                    self.known.add(lane)
                else:
                    model.places.pop(lane, None)
            model.hear(told, QUEUE)

    def unpark(self) -> None:
        freed = [name for name in self.question.parked_tenants if not self.model.is_full(name)]
        lanes: dict[int, list[Standing]] = {}
        for each in self.parked.values():
            if each.tenant in freed:
                lanes.setdefault(each.lane, []).append(each)
        for lane, standings in sorted(lanes.items(), key=lambda item: (self.model.places[item[0]], item[0])):
            if not any(each == lane for each, _ in self.active):
                self.come(lane, standings[0].pool)
            for each in standings:
                self.active.add((lane, each.pool))
                del self.parked[lane, each.pool]

    def come(self, lane: int, pool: int) -> None:
        def waits(job: WaitingJob) -> bool:
            return (job.lane, job.pool) in self.active

        self.model.come(lane, self.model.place_of(pool), waits)

    def arrive(self) -> None:
        for arrival in self.reading.arrivals:
            place = (arrival.lane, arrival.pool)
            if arrival.due is not None or place in self.active or place in self.parked:
                continue
            if self.model.is_full(arrival.tenant):
                self.parked[place] = Standing(
                    arrival.lane, arrival.pool, arrival.tenant, 0.0, 0, active=False, parked=True
                )
                if arrival.lane not in self.known:  # it comes when it leaves the park
                    self.model.places.pop(arrival.lane, None)
                    self.model.places[arrival.lane] = self.model.start(arrival.lane, self.model.place_of(arrival.pool))
                    self.known.add(arrival.lane)
                continue
            if not any(lane == arrival.lane for lane, _ in (*self.active, *self.parked)):
                self.come(*place)
            self.known.add(arrival.lane)
            self.active.add(place)

    def picks(self, decision: Decision) -> None:
        model = self.model
        model.settle_owed(QUEUE)
        dropped: set[int] = set()
        spent: set[int] = set()
        taken: Counter[tuple[int, int]] = Counter()

        def is_exhausted(lane: int) -> bool:
            return any(
                taken[place] >= len(self.reading.jobs.get(place, ()))
                for place in self.active - self.reading.whole
                if place[0] == lane and model.open_target(place[1]) is not None
            )

        for pick in decision.picks:
            option = model.next(QUEUE, dropped)
            # A lane of which no further jobs were read drops out, be it that the pool where they wait closes then.
            spent |= {lane for lane, _ in self.active if is_exhausted(lane)}
            while option is not None and option.job.due is None and option.job.lane in spent:
                if option.job.seq == pick.job.seq:
                    break
                dropped.add(option.job.lane)
                option = model.next(QUEUE, dropped)
            assert option is not None, "a job was taken that could not go"
            if option.job.seq != pick.job.seq and option.job.due is None:
                option = self.tied(pick, option)
            assert option.job.seq == pick.job.seq, (option, pick)
            if option.job.expired:
                assert pick.tokens == model.take(option.job, option.target) == 0
            else:
                assert pick.target == option.target
                assert pick.tokens == model.take(option.job, option.target)
            taken[option.job.lane, option.job.pool] += option.job.due is None
        if len(decision.picks) < self.places:
            option = model.next(QUEUE, dropped)
            if option is not None:
                assert decision.ready[QUEUE] == 0.0, "a job that can go is left, and nobody will look"
                place = (option.job.lane, option.job.pool)
                seen = [job.seq for job in self.reading.jobs.get(place, ())]
                cut = (
                    any(time < option.start for time in self.horizons.values())
                    or is_exhausted(option.job.lane)
                    or place not in {(each.lane, each.pool) for each in self.reading.standings}
                )
                assert cut or dropped or option.job.seq not in seen, "a batch ended early"
        model.settle_owed(QUEUE)

    def hidden(self) -> set[int]:
        """Return jobs of which the turn cannot know, because their tenants are full or were when last seen."""
        blocked = {job.pool for job in self.reading.restarted if self.model.is_full(job.key.tenant)}
        read = {job.seq for job in self.reading.restarted}
        found = set()
        for seq, job in self.model.waiting.items():
            if job.due is None:
                if (job.lane, job.pool) in self.parked and job.key.tenant in self.held:
                    found.add(seq)
            elif seq not in read and (job.pool in blocked or job.key.tenant in self.held):
                found.add(seq)
        return found

    def tied(self, pick: Pick, option: Option) -> Option:
        """Return what was picked in place of ``option``, if that is just as near and was not read."""
        job = pick.job
        where = self.model.place_of(job.pool)
        target = self.model.open_target(job.pool)
        read = {(each.lane, each.pool) for each in self.reading.standings}
        start = self.model.start(job.lane, where)
        if target is None or start > option.start or where != self.model.place_of(option.job.pool):
            return option
        return option if (option.job.lane, option.job.pool) in read else Option(job, target, start)

    def lanes(self) -> None:
        """Compare the times of lanes that wait; of others, what is stored counts from here."""
        places: dict[int, float] = {}
        for each in self.world.standings:
            places[each.lane] = max(each.time, places.get(each.lane, each.time))
        for each in self.world.standings:
            if each.active or each.parked:
                places[each.lane] = each.time
                if self.places and not self.is_blind:
                    assert each.time == pytest.approx(self.model.places[each.lane], rel=1e-9, abs=1e-6)
        self.model.places = places

    def state(self, decision: Decision) -> None:
        """Compare what goes to the next turn."""
        state, model = State.from_json(decision.state), self.model
        queue = state.queue(QUEUE)
        for (_, job_class), reach in model.reach.items():
            assert queue.reach[job_class] == pytest.approx(reach)
            model.reach[QUEUE, job_class] = queue.reach[job_class]
        if self.places and not self.is_blind:
            assert queue.owed == pytest.approx(model.owed.get(QUEUE, 0.0))
        model.owed[QUEUE] = queue.owed
        for target, learned in model.learned.items():
            use = state.uses.get(key_of(target))
            assert (learning.TargetState() if use is None else use.learned) == learned
        for (key, kind), bucket in model.buckets.items():
            use = state.uses.get(key)
            moment = getattr(use, kind) if use is not None else 0.0
            balance = bucket.balance + model.now - bucket.at
            if moment:
                assert min(model.now - moment, 3.0) == pytest.approx(min(balance, 3.0), abs=1e-5)
            else:
                assert balance >= 3.0 - 1e-5

    def outlook(self, decision: Decision) -> None:
        """Check when the next turn is worth taking, and that everybody is told why not earlier."""
        model, ready = self.model, decision.ready.get(QUEUE)
        if model.waiting:
            assert ready is not None
        open_now = model.next(QUEUE) is not None
        if open_now:
            assert ready == 0.0
        elif ready is not None and ready > model.now:
            later = replace(model, buckets=copy.deepcopy(model.buckets))
            later.now = model.now + (ready - model.now) * 0.99 - 1e-4
            if later.now > model.now:
                early = later.next(QUEUE)
                assert early is None, ("a job could go earlier than anybody will look", early, ready, later.now)
        for job in model.waiting.values():
            if job.due is None or job.due <= model.now:
                self.reason(job, decision, open_now=open_now)

    def reason(self, job: WaitingJob, decision: Decision, *, open_now: bool) -> None:
        """Check that it can be said why a job waits."""
        model = self.model
        target = model.effective(job.pool)
        of_tenant = f"tenant:{job.key.tenant}"
        if target is None:
            known = all(key_of(each) in decision.closed for each in model.pools[job.pool].chain)
            assert known or of_tenant in decision.closed
        elif not model.is_open(target):
            assert decision.closed.keys() & {target.provider, key_of(target), of_tenant}
        elif model.is_full(job.key.tenant):
            assert of_tenant in decision.closed or self.places == 0 or open_now


ChoiceMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    derandomize="CHOICE_EXAMPLES" not in os.environ,  # the suite runs the same examples each time
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestChoice = ChoiceMachine.TestCase
