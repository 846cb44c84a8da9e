"""Choice over time: shares, limits and what they cost, in a world where jobs run for a while and end."""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import orjson
import pytest

from keepstream_worker.limits import Limits, Policy, ProviderPolicy, TenantPolicy
from keepstream_worker.scheduling import choice as choice_module
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.choice import Choice, may_start_directly
from keepstream_worker.scheduling.learning import FAILING_FOR
from keepstream_worker.scheduling.observations import Accepted, Charged, End, Observation, Place, Settled
from keepstream_worker.scheduling.report import Used, report
from keepstream_worker.scheduling.state import PoolState, State
from keepstream_worker.turn import Pick, Question, Reading, WaitingJob
from keepstream_worker.values import JobKey, Target
from tests.choice_world import Running, World

CHAIN = [("p", "m")]
TARGET = Target("p", "m")


TEN = Limits(concurrency=10)
NOTHING = State()


def policy(limits: Limits = TEN, *, bulk_share: float = 0.05, **tenants: TenantPolicy) -> Policy:
    return Policy(providers={"p": ProviderPolicy(limits=limits)}, tenants=tenants, bulk_share=bulk_share)


class Deployment:
    """Workers that take turns and run jobs, by a clock that jumps from one moment to the next."""

    def __init__(
        self, rules: Policy, *, places: int = 10, seconds: float = 1.0, actual: Callable[[Pick], int] | None = None
    ) -> None:
        self.world = World()
        self.rules = rules
        self.places = places
        self.seconds = seconds
        self.actual = actual or (lambda pick: pick.tokens)
        self.told: list[Observation] = []
        self.ends: list[tuple[float, JobKey]] = []
        self.picks: list[tuple[float, Pick]] = []
        self.taken: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.most = 0

    def step(self) -> None:
        """Take one turn and go to the next moment at which something happens."""
        world = self.world
        told, self.told = self.told, []
        for pick in world.turn(self.rules, self.places, told).picks:
            self.picks.append((world.now, pick))
            heapq.heappush(self.ends, (world.now + self.seconds, pick.job.key))
            self.told.append(Accepted(world.running[pick.job.key].place))
        self.most = max(self.most, len(world.running))
        ready = world.ready.get("main")
        moments = [self.ends[0][0]] if self.ends else []
        if ready is not None:
            moments.append(ready)
        if moments:
            world.now = max(world.now, min(moments))
        while self.ends and self.ends[0][0] <= world.now:
            running = world.end(heapq.heappop(self.ends)[1])
            actual = self.actual(running.pick)
            self.taken[running.pick.job.key.tenant] += actual
            self.classes[running.job_class] += actual
            self.told.append(Settled(running.place, running.pick.tokens, actual, None, End.COMPLETED))

    def run(self, until: Callable[[], bool], steps: int = 20_000) -> None:
        """Go on until something holds."""
        for _ in range(steps):
            if until():
                return
            self.step()
        raise AssertionError("it never came to that")


def test_tokens_are_shared_by_weight():
    deployment = Deployment(policy(b=TenantPolicy(weight=2.0), c=TenantPolicy(weight=4.0)), places=7)
    random_ = random.Random(1)
    for _ in range(500):
        for tenant in "abc":
            deployment.world.store(tenant, CHAIN, prompt_tokens=random_.randint(10, 900))
    deployment.run(lambda: len(deployment.picks) > 700)
    shares = [deployment.taken[tenant] for tenant in "abc"]
    assert shares[1] / shares[0] == pytest.approx(2, rel=0.05)
    assert shares[2] / shares[0] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("wrong", [2, 5])
def test_shares_are_of_what_was_really_used(wrong: int):
    """One tenant's jobs take far more than estimated, another one's far less."""
    factors = {"a": float(wrong), "b": 1.0, "c": 1 / wrong}
    deployment = Deployment(policy(), actual=lambda pick: round(pick.tokens * factors[pick.job.key.tenant]))
    for tenant, number in (("a", 400), ("b", 800), ("c", 2000)):
        for _ in range(number):
            deployment.world.store(tenant, CHAIN, prompt_tokens=100)
    deployment.run(lambda: len(deployment.picks) > 900)
    mean = sum(deployment.taken.values()) / 3
    for tenant in "abc":
        assert deployment.taken[tenant] == pytest.approx(mean, rel=0.1)


def test_a_providers_limit_is_kept_however_many_models_are_known() -> None:
    """What is used of it is among what is remembered first: no job goes past it, and it is used all the time."""
    world = World()
    known = State()
    for number in range(1500):
        use = known.use(f"p/m{number}")
        use.output, use.used = 5.0, world.now
    world.state = known.to_json()
    for _ in range(20):
        world.store("a", CHAIN)
    rules = policy(Limits(requests_per_minute=60))
    picks = [pick for _ in range(20) for pick in world.turn(rules, 1).picks]
    assert len(picks) <= 3  # of three seconds


@pytest.mark.parametrize("text", ["", "null", "[]", '{"p":{"x":[]}}', '{"p":{"1":7}}', '{"a"', '{"t":{"a":null}}'])
def test_a_state_that_cannot_be_read_keeps_no_job_waiting(text: str) -> None:
    """New ones, those that were started before, and those of a tenant that runs as many as it may."""
    rules = policy(Limits(), full=TenantPolicy(concurrency=1))
    world = World()
    for tenant in ("full", "full", "a", "b"):
        world.store(tenant, CHAIN)
    world.store("a", [("p", "other")])
    for pick in world.turn(rules, 2).picks:
        if pick.job.key.tenant != "full":
            world.restart(pick.job.key, 0.0)
    world.turn(rules, 0)
    assert not world.arrivals
    assert len(world.running) == 1
    assert any(standing.parked for standing in world.standings)
    world.state = text
    assert world.turn(rules, 10).picks == ()
    assert world.choice.lost_state
    state = State.from_json(world.state)
    found = world.waiting_pools()
    assert not any(map(state.knows, found))
    assert state.parked_beyond  # so the sweeper walks through those as well
    taken = world.turn(rules, 10, parked=["full"], found=found).picks
    assert sorted(pick.job.key.tenant for pick in taken) == ["a", "a", "b"]
    world.end(next(iter(world.running)))
    for _ in range(3):
        world.now += 1.0
        world.turn(rules, 10)
    assert not world.waiting
    world.check()


def test_lanes_are_found_again_that_are_less_far_than_one_by_which_turns_have_heard_of_their_pool() -> None:
    world = World()
    world.store("far", CHAIN, max_tokens=90_000)
    world.turn(policy(), 1)
    for tenant in ("far", "near"):
        world.store(tenant, CHAIN)
    world.turn(policy(), 0)
    world.state = "lost"
    world.store("far", CHAIN)  # its note leads to the pool, from its lane's time on
    assert [pick.job.key.tenant for pick in world.turn(policy(), 1).picks] == ["far"]
    (found,) = world.waiting_pools()
    assert not State.from_json(world.state).knows(found)
    picks = world.turn(policy(), 5, found=[found]).picks
    assert [pick.job.key.tenant for pick in picks] == ["near", "far"]


def test_a_flood_does_not_keep_others_waiting():
    """Ten tenants with ten jobs each come after one with very many: theirs take twice the time they need alone."""
    others = [f"tenant-{number}" for number in range(10)]

    def seconds(flood: int) -> float:
        deployment = Deployment(policy())
        world = deployment.world
        for _ in range(flood):
            world.store("flood", CHAIN)
        for _ in range(5):
            deployment.step()
        began = world.now
        for tenant in others:
            for _ in range(10):
                world.store(tenant, CHAIN)
        deployment.run(lambda: sum(pick.job.key.tenant in others for _, pick in deployment.picks) == 100)
        return world.now - began

    assert seconds(1000) <= 2 * seconds(0)


def test_bulk_has_its_share_and_no_more():
    deployment = Deployment(policy(bulk_share=0.2))
    for _ in range(500):
        for job_class in ("interactive", "bulk"):
            deployment.world.store("a", CHAIN, job_class=job_class)
    deployment.run(lambda: len(deployment.picks) > 450)
    assert deployment.classes["bulk"] / deployment.classes.total() == pytest.approx(0.2, abs=0.02)


def test_bulk_takes_everything_when_nothing_else_can_go():
    deployment = Deployment(policy())
    for _ in range(50):
        deployment.world.store("a", CHAIN, job_class="bulk")
        deployment.world.store("a", [("q", "full")])
    deployment.rules = Policy(
        providers={**deployment.rules.providers, "q": ProviderPolicy(limits=Limits(requests_per_minute=0.001))}
    )
    deployment.run(lambda: len(deployment.picks) == 51)
    assert Counter(pick.target.provider for _, pick in deployment.picks) == {"p": 50, "q": 1}


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_tokens_per_minute_are_used_and_kept(factor: float):
    """Whether the estimate is right, half, or double: at least nine tenths are used, and one job too much at most."""
    limit, cost = 60_000, 600
    deployment = Deployment(
        policy(Limits(tokens_per_minute=limit, concurrency=50)), actual=lambda pick: round(cost * factor)
    )
    for _ in range(int(400 / factor)):
        deployment.world.store("a", CHAIN, prompt_tokens=cost - 100)
    began = deployment.world.now
    deployment.run(lambda: deployment.world.now > began + 180 or not deployment.world.waiting)
    used = [(at, round(cost * factor)) for at, _ in deployment.picks]
    minutes = (deployment.world.now - began) / 60
    assert sum(tokens for _, tokens in used) >= 0.9 * limit * minutes
    for start, _ in used:
        # What was estimated too low is known a second later.
        assert sum(tokens for at, tokens in used if start <= at < start + 60) <= 1.13 * limit + cost


def test_requests_per_minute_are_used_and_kept():
    limit = 120
    deployment = Deployment(policy(Limits(requests_per_minute=limit, concurrency=50)))
    for _ in range(500):
        deployment.world.store("a", CHAIN)
    began = deployment.world.now
    deployment.run(lambda: deployment.world.now > began + 120)
    moments = [at for at, _ in deployment.picks]
    assert len(moments) >= 0.9 * limit * 2
    assert max(sum(start <= at < start + 60 for at in moments) for start in moments) <= limit


def test_a_limit_of_less_than_one_request_in_a_burst_lets_one_at_a_time():
    deployment = Deployment(policy(Limits(requests_per_minute=6)))
    for _ in range(5):
        deployment.world.store("a", CHAIN)
    deployment.run(lambda: len(deployment.picks) == 5)
    moments = [at for at, _ in deployment.picks]
    assert all(later - at >= 10 for at, later in pairwise(moments))


def test_concurrency_is_kept():
    deployment = Deployment(policy(Limits(concurrency=4)), places=50)
    for _ in range(40):
        deployment.world.store("a", CHAIN)
    deployment.run(lambda: len(deployment.picks) == 40)
    assert deployment.most == 4


def test_what_was_started_goes_first_of_either_class():
    world = World()
    for _ in range(20):
        world.store("flood", CHAIN)
    world.store("b", CHAIN, job_class="bulk")
    rules = policy(Limits(concurrency=1000))
    while not any(running.job_class == "bulk" for running in world.running.values()):
        world.turn(rules, 1)
    for _ in range(20):
        world.store("flood", CHAIN)
    (key,) = (key for key, running in world.running.items() if running.job_class == "bulk")
    world.restart(key, 1.0)
    assert world.turn(rules, 1).picks[0].job.key.tenant == "flood"
    world.now += 1.0
    assert world.turn(rules, 1).picks[0].job.key == key


def test_a_known_moment_is_said():
    world = World()
    rules = policy(Limits(concurrency=10))
    world.store("a", CHAIN)
    job = world.turn(rules, 1).picks[0].job
    world.restart(job.key, 30.0)
    decision = world.turn(rules, 1)
    assert not decision.picks
    assert decision.ready == {"main": world.now + 30.0}
    assert not decision.closed


def test_a_cool_down_passes_jobs_on_and_takes_them_back():
    world = World()
    rules = Policy(providers={"p": ProviderPolicy(max_cooldown=5.0), "other": ProviderPolicy()})
    chain = [*CHAIN, ("other", "m")]
    for _ in range(4):
        world.store("a", chain)
    place = world.end(world.turn(rules, 1).picks[0].job.key).place
    refusal = Settled(place, 100, 0, None, End.REFUSED, retry_after=20.0)
    world.now += 0.1
    decision = world.turn(rules, 1, [refusal])
    assert decision.picks[0].target == Target("other", "m")
    assert decision.closed["p/m"] == {"why": "cooling", "until": world.now + 20.0}
    world.now += 16.0  # what is left is waited for
    decision = world.turn(rules, 1)
    assert not decision.picks
    assert decision.ready["main"] == pytest.approx(world.now + 4.0)
    world.now += 4.0
    assert world.turn(rules, 1).picks[0].target == TARGET


def test_a_broken_target_is_tried_with_one_job():
    world = World()
    rules = Policy(providers={"p": ProviderPolicy(broken_after=2, broken_for=10.0)})
    for _ in range(10):
        world.store("a", CHAIN)
    first, second = (world.running[pick.job.key].place for pick in world.turn(rules, 2).picks)
    world.now += 1.0
    world.turn(rules, 0, [Settled(first, 100, 0, None, End.FAILED)])
    world.now += FAILING_FOR
    decision = world.turn(rules, 5, [Settled(second, 100, 0, None, End.FAILED)])
    assert not decision.picks
    assert decision.closed["p/m"]["why"] == "broken"
    world.now = decision.ready["main"]
    probe = world.turn(rules, 5).picks
    assert len(probe) == 1
    assert not world.turn(rules, 5).picks
    world.now += 1.0
    ended = Settled(world.running[probe[0].job.key].place, 100, 100, 10, End.COMPLETED)
    assert len(world.turn(rules, 5, [ended]).picks) == 5


def test_a_full_tenant_is_not_looked_at_until_it_has_a_place():
    world = World()
    rules = policy(single=TenantPolicy(concurrency=1))
    for _ in range(3):
        world.store("single", CHAIN)
    (first,) = world.turn(rules, 5).picks
    assert [standing.parked for standing in world.standings] == [True]
    decision = world.turn(rules, 5)
    assert decision.closed == {"tenant:single": {"why": "tenant", "running": 1, "most": 1}}
    assert decision.ready["main"] == world.now + 1.0
    running = world.end(first.job.key)
    assert len(world.turn(rules, 5, [Settled(running.place, 200, 200, None, End.COMPLETED)]).picks) == 1


def test_a_place_of_a_tenant_whose_worker_died_is_found():
    world = World()
    rules = policy(single=TenantPolicy(concurrency=1))
    world.store("single", CHAIN)
    world.store("single", CHAIN)
    (first,) = world.turn(rules, 5).picks
    world.end(first.job.key)  # nobody tells
    world.now = world.turn(rules, 5).ready["main"]
    assert len(world.turn(rules, 5).picks) == 1


def test_more_arrivals_than_one_turn_takes():
    world = World()
    rules = policy()
    for number in range(450):
        world.store(f"tenant-{number}", CHAIN)
    for _ in range(3):
        assert world.turn(rules, 0).ready["main"] == 0.0
        world.check()
    assert not world.arrivals
    assert len(world.standings) == 450


def test_a_queue_does_not_see_the_jobs_of_another():
    world = World()
    rules = policy()
    world.store("a", CHAIN, queue="other")
    world.store("a", CHAIN)
    decision = world.turn(rules, 5)
    assert [world.pools[pick.job.pool].queue for pick in decision.picks] == ["main"]
    assert decision.ready == {"other": 0.0}
    assert len(world.turn(rules, 5, queue="other").picks) == 1


def test_an_idle_turn_writes_nothing():
    world = World()
    rules = policy()
    assert not world.turn(rules, 5).changed
    world.store("a", CHAIN)
    assert world.turn(rules, 5).changed
    assert not world.turn(rules, 5).changed


def test_a_job_may_start_without_a_turn_where_nothing_limits_it():
    def may(rules: Policy, state: State = NOTHING, tenant: str = "a", here: int = 0) -> bool:
        return may_start_directly(rules, state, [TARGET], tenant, here) == TARGET

    world = World()
    free = Policy(tenants={"few": TenantPolicy(concurrency=3)})
    assert may(free)
    assert not may(free, tenant="few")
    assert not may(free, here=16)
    assert not may(policy())
    world.store("a", CHAIN)
    place = world.running[world.turn(free, 1).picks[0].job.key].place
    refused = world.turn(free, 0, [Settled(place, 200, 0, None, End.REFUSED)])
    assert not may(free, State.from_json(refused.state))


def start_directly(world: World, here: int) -> Place | None:
    """Start a job as a worker does that has so many streams, or let it wait; return where it was let in."""
    job = world.store("a", CHAIN)
    if may_start_directly(Policy(), State.from_json(world.state), [TARGET], "a", here) is None:
        return None
    world.cancel(job.seq)
    running = world.running[job.key] = Running(Pick(job, TARGET, 200, world.now))
    return running.place


def started_by_four_workers() -> tuple[World, list[Observation]]:
    """Return a world in which each of four workers has started ten jobs, and what they tell."""
    world = World()
    told: list[Observation] = []
    for here in range(10):
        for _ in range(4):
            world.now += 0.1
            place = start_directly(world, here)
            assert place is not None
            told += [Charged(place, 200), Accepted(place)]
    return world, told


def test_jobs_that_started_without_a_turn_keep_nobody_waiting():
    """What a target accepts is known by all of its streams, not by those of the worker that has most."""
    world, told = started_by_four_workers()
    world.turn(Policy(), 90, told)
    waiting = [start_directly(world, 20) for _ in range(4)]
    assert waiting == [None] * 4
    decision = world.turn(Policy(), 84)
    assert (len(decision.picks), decision.closed) == (4, {})


@pytest.mark.parametrize("latest_first", [False, True])
def test_streams_on_their_way_when_a_turn_counted_are_among_those_that_a_target_accepts(*, latest_first: bool):
    """Or what it accepts is taken for fewer than run, and nothing goes until some of these end."""
    world = World()
    for _ in range(48):
        world.store("a", CHAIN)
    picks = world.turn(Policy(), 16).picks
    told: list[Observation] = [Accepted(world.running[pick.job.key].place) for pick in picks]
    for _ in range(16):  # a message had brought each of them, and its start was not committed yet
        place = start_directly(world, 0)
        assert place is not None
        told += [Charged(place, 200), Accepted(place)]
    assert len(world.turn(Policy(), 100, told[::-1] if latest_first else told).picks) == 16


def test_a_refusal_is_measured_by_all_streams_of_a_target():
    world, told = started_by_four_workers()
    place = next(iter(world.running.values())).place
    world.end(next(iter(world.running)))
    refusal = Settled(place, 200, 0, None, End.REFUSED)
    decision = world.turn(Policy(), 0, [*told, refusal])
    assert State.from_json(decision.state).use("p/m").learned.ceiling == 39 / 2


def test_jobs_that_started_without_a_turn_are_paid_for():
    world = World()
    place = Place(1, 2, "a", "interactive", TARGET, world.now)
    decision = world.turn(Policy(), 0, [Charged(place, 300), Charged(place, 200)])
    (standing,) = decision.new_standings
    assert (standing.time, standing.active) == (500.0, False)


def test_an_estimate_knows_the_usual_answer():
    state = State()
    assert state.estimate(TARGET, 10, None) == 510
    assert state.estimate(TARGET, 10, 50) == 60
    state.use("p/m").answered(200)
    assert state.estimate(TARGET, 10, None) == 210
    assert state.estimate(TARGET, 10, 50) == 60
    assert state.estimate(TARGET, 0, 0) == 1


def test_the_report_says_what_is_used():
    rules = policy(Limits(concurrency=2, requests_per_minute=60, tokens_per_minute=6000))
    world = World()
    world.store("a", CHAIN)
    world.turn(rules, 5)
    provider, model = report(rules, State.from_json(world.state), {TARGET: 1}, world.now)
    assert (provider.key, provider.streams) == ("p", Used(1, 2))
    assert provider.requests == Used(1, 2, 60)  # of three seconds' worth
    assert provider.tokens == Used(200, 285, 6000)
    assert provider.closed is None
    assert (model.key, model.streams) == ("p/m", Used(1, None))
    (full, _) = report(rules, State.from_json(world.state), {TARGET: 2}, world.now)
    assert full.closed is not None
    assert full.closed.as_json() == {"why": "concurrency", "running": 2, "most": 2}


def test_what_is_learned_is_reported_as_such():
    """A target that was never refused has a ceiling as well, and whoever is in debt has used more than it may."""
    state = State()
    state.use("new/m").output = 7.0
    state.use("met/m").learned = learning.TargetState(ceiling=7.5, requests_per_minute=600.0)
    state.use("debt").tokens = 1020.0
    rules = Policy(
        {
            "debt": ProviderPolicy(Limits(tokens_per_minute=6000), {"a": Limits(concurrency=3), "b*": Limits(1)}),
            "met": ProviderPolicy(models={"m": Limits(concurrency=9)}),
        }
    )
    found = {use.key: use for use in report(rules, state, {}, 1000.0)}
    assert list(found) == ["debt", "debt/a", "met/m", "new/m"]  # and no pattern
    assert found["new/m"].streams == Used(0, learning.FIRST_CEILING, learned=True)
    assert found["met/m"].streams == Used(0, 7, learned=True)
    assert found["met/m"].requests == Used(0, 28, 600.0, learned=True)
    assert found["debt/a"].streams == Used(0, 3)
    assert found["debt"].tokens == Used(23 * 95, 3 * 95, 6000)
    assert found["debt"].closed is not None
    assert found["debt"].closed.until == 1020.0


def test_what_closes_a_provider_is_reported_though_its_targets_are_closed_for_other_reasons():
    state = State()
    state.use("p/b").learned = learning.TargetState(cooling_until=1020.0)
    state.use("p/a").output = 1.0
    rules = policy(Limits(concurrency=1))
    provider, *targets = report(rules, state, {Target("p", "a"): 1}, 1000.0)
    assert [use.closed and use.closed.why for use in (provider, *targets)] == ["concurrency", None, "cooling"]


def chains(number: int) -> Sequence[list[tuple[str, str]]]:
    return [[("provider", f"a-model-with-a-long-name-{each}"), ("other", f"model-{each}")] for each in range(number)]


def test_the_state_stays_small():
    """It is read and written under the lock of the whole deployment."""
    world = World()
    rules = policy()
    for number, chain in enumerate(chains(300)):
        world.store("abc"[number % 3], chain)
    while world.arrivals:
        world.turn(rules, 0)
    assert len(world.state) < 300 * 150
    assert State.from_json(world.state).to_json() == world.state
    while world.waiting:
        world.turn(rules, 50)
        for key in list(world.running):
            world.end(key)
    assert "p" not in orjson.loads(world.state)


def test_a_tenant_that_names_another_model_for_each_job_costs_the_others_little():
    """Only so many pools of its lane are in sight; all its jobs are served in the end, and the others' meanwhile."""
    world, rules = World(), policy(Limits())
    for chain in chains(1300):
        world.store("flood", chain)
    for _ in range(10):
        world.turn(rules, 0)
    assert len(world.arrivals) == 1200
    assert len(world.standings) == 100
    for _ in range(50):
        world.store("other", CHAIN)
    late = world.store("other", [("p", "late")], slow=True)
    for chain in chains(100):
        world.store("flood", [*chain, ("p", "fallback")])
    served = []
    world.turn(rules, 0)
    world.commit_slow(late.seq)
    for number in range(1000):
        if number % 3 == 0:  # a sweep
            world.arrivals_low = min((seq for seq in world.arrivals if seq > number % 1000), default=0)
        for pick in world.turn(rules, 5).picks:
            served.append(pick.job.key.tenant)
            world.end(pick.job.key)
        assert sum(standing.active for standing in world.standings if standing.tenant == "flood") <= 100
        assert len(State.from_json(world.state).passed) <= 1200
        world.now += 0.1
        if not world.waiting:
            break
    assert not world.waiting
    assert served[:100].count("other") >= 40
    world.check()


def test_jobs_that_turns_have_left_are_looked_at_each_second():
    world, rules = World(), policy(Limits(requests_per_minute=1))
    for number in range(150):
        world.store("flood", [("p", f"m{number}")])
    assert len(world.turn(rules, 1).picks) == 1
    world.turn(rules, 1)
    assert State.from_json(world.state).passed
    assert world.ready == {"main": world.now + 1.0}, "the next request could be made a minute later"


def test_limits_of_very_many_targets_are_looked_up_once(monkeypatch: pytest.MonkeyPatch):
    state = State()
    for number in range(12_000):
        state.pools[number] = PoolState("main", "interactive", (f"p/m{number}",), low=1.0)
    looked_up: Counter[str] = Counter()
    limits_of = Policy.limits_of

    def counted(self: Policy, provider: str, model: str) -> list[tuple[str, Limits]]:
        looked_up[model] += 1
        return limits_of(self, provider, model)

    monkeypatch.setattr(Policy, "limits_of", counted)
    world, rules = World(state=state.to_json()), policy()
    for _ in range(2):
        world.turn(rules, 0)
    assert len(looked_up) == looked_up.total() == 12_000


def test_what_is_asked_is_bounded():
    world = World()
    rules = policy()
    for chain in chains(100):
        world.store("a", chain)
    while world.arrivals:
        world.turn(rules, 0)
    question = Choice(rules, "main", 10).ask(world.now, world.state)
    assert len(question.pools) == 16
    assert question.standings <= 21
    assert question.first_jobs == 10


def test_every_pool_gets_its_turn_where_there_are_very_many():
    world = World()
    rules = Policy(providers={"provider": ProviderPolicy(limits=Limits(concurrency=10_000))})
    for chain in chains(100):
        for _ in range(3):
            world.store("a", chain)
    for _ in range(100):
        world.turn(rules, 10)
    assert not world.waiting


def test_full_pools_keep_no_others_from_being_read() -> None:
    """More pools than one turn reads wait for a full provider: those of another provider have their turn."""
    world = World()
    rules = Policy(providers={"full": ProviderPolicy(limits=Limits(concurrency=1))})
    for number in range(24):
        world.store("flood", [("full", f"model-{number}")])
    assert len(world.turn(rules, 4, []).picks) == 1
    for _ in range(8):  # after the first four its lane is further than the others
        world.store("other", [("free", "m")])
    picked = [pick.target.provider for _ in range(4) for pick in world.turn(rules, 4, []).picks]
    assert picked == ["free"] * 8


# -- providers that a worker lacks --


def test_jobs_of_a_provider_that_a_worker_lacks_are_left_alone() -> None:
    world = World()
    there = world.store("a", [("there", "m")])
    here = world.store("b", [("here", "m"), ("there", "m")])
    lacking = world.turn(Policy(), 5, providers={"here"})
    assert [pick.job.key for pick in lacking.picks] == [here.key]
    assert world.choice.lacking == {"there"}
    assert lacking.ready == {"main": 0.0}, "they can go, by another worker"
    assert [pick.job.key for pick in world.turn(Policy(), 5, providers={"here", "there"}).picks] == [there.key]
    assert world.choice.lacking == set()


def test_restarted_jobs_of_a_provider_that_a_worker_lacks_are_left_alone() -> None:
    world = World()
    job = world.store("a", [("there", "m")])
    assert len(world.turn(Policy(), 5, providers={"there"}).picks) == 1
    again = world.restart(job.key, 0.0)
    for _ in range(2):  # with the note of its arrival, and without
        assert world.turn(Policy(), 5, providers={"here"}).picks == ()
        assert world.choice.lacking == {"there"}
    assert [pick.job.seq for pick in world.turn(Policy(), 5, providers={"there"}).picks] == [again.seq]


def test_restarted_jobs_in_very_many_pools_are_read_in_the_order_in_which_they_are_due() -> None:
    world = World()
    for number in range(1000):
        world.store("a", [("p", f"m{number}")])
    while len(world.running) < 1000:
        world.turn(Policy(), 50)
        world.now += 1.0
    random_ = random.Random(1)
    for key in list(world.running):
        world.restart(key, random_.uniform(0.0, 10.0))
    for _ in range(5):
        world.turn(Policy(), 0)
    world.now += 10.0
    taken: list[WaitingJob] = []
    while world.waiting:
        picks = world.turn(Policy(), 50).picks
        assert len(picks) == 50
        assert len(world.question.restarted_pools) <= 100
        taken += [pick.job for pick in picks]
    assert taken == sorted(taken, key=lambda job: job.due or 0.0)


def test_pools_are_forgotten_in_which_nothing_waits_however_many_tenants_are_full() -> None:
    limits = {"p": ProviderPolicy(limits=Limits(concurrency=100))}
    rules = Policy(limits, {"*": TenantPolicy(concurrency=1), "a": TenantPolicy()})
    world = World()
    for number in range(60):
        for _ in range(2):
            world.store(f"full-{number}", CHAIN)
    assert len(world.turn(rules, 80).picks) == 60
    job = world.store("a", [("p", "seldom")])
    world.turn(rules, 1)
    world.restart(job.key, 3.0)
    while job.key not in world.running:
        world.turn(rules, 1)
        world.now += 1.0
    world.end(job.key)
    for _ in range(10):
        world.turn(rules, 1)
        world.now += 1.0
    assert job.pool not in State.from_json(world.state).pools


# -- what makes no sense --


def test_class_that_this_version_does_not_know_counts_as_bulk() -> None:
    world = World()
    odd = world.store("a", CHAIN, job_class="sometimes")
    plain = world.store("a", CHAIN)
    place = Place(odd.lane, odd.pool, "a", "sometimes", TARGET)
    told: list[Observation] = [Charged(place, 100), Settled(place, 100, 300, None, End.COMPLETED)]
    decision = world.turn(Policy(), 5, told)
    assert [pick.job for pick in decision.picks] == [plain, odd]
    again = world.restart(odd.key, 0.0)
    assert [pick.job for pick in world.turn(Policy(), 5).picks] == [again]


def test_jobs_whose_pool_cannot_be_read_keep_no_others_waiting() -> None:
    world = World()
    odd = world.store("a", [("odd", "m")])
    world.store("a", [("odd", "n")])
    started = world.store("a", [("odd", "o")])
    world.turn(Policy(), 0)
    (pick,) = [pick for pick in world.turn(Policy(), 3).picks if pick.job == started]
    again = world.restart(pick.job.key, 0.0)
    good = world.store("b", CHAIN)
    later = world.store("a", [("odd", "p")])
    unreadable = {later.pool, again.pool}
    reading = world.read

    def read(question: Question) -> Reading:
        found = reading(question)
        return replace(found, pools={id_: pool for id_, pool in found.pools.items() if id_ not in unreadable})

    world.read = read  # type: ignore[method-assign]
    decision = world.turn(Policy(), 5)
    assert good in [pick.job for pick in decision.picks]
    assert odd.key in world.running
    assert set(decision.misplaced) == {later.seq, again.seq}
    assert set(world.arrivals) == {later.seq, again.seq}, "their notes are left, and found by the next turn"
    assert set(world.turn(Policy(), 0).misplaced) == {later.seq, again.seq}
    unreadable.clear()
    assert {pick.job for pick in world.turn(Policy(), 5).picks} == {later, again}


# -- what is remembered --


def test_target_that_nobody_uses_is_forgotten_after_a_day() -> None:
    rules = Policy(providers={"p": ProviderPolicy(limits=Limits(requests_per_minute=60.0))})
    world = World()
    world.store("a", CHAIN)
    (pick,) = world.turn(rules, 1).picks
    told = [Accepted(world.end(pick.job.key).place)]
    world.turn(rules, 1, told)
    assert set(State.from_json(world.state).uses) == {"p", "p/m"}
    world.now += 80_000.0
    world.turn(rules, 1)
    assert "p/m" in State.from_json(world.state).uses
    world.now += 10_000.0
    world.turn(rules, 1)
    assert State.from_json(world.state).uses == {}


def test_only_providers_are_counted_for_which_jobs_wait() -> None:
    rules = Policy(providers={name: ProviderPolicy(limits=TEN) for name in ("p", "q", "r")})
    world = World()
    world.store("a", CHAIN)
    world.turn(rules, 0)
    assert not world.question.counted_providers
    world.store("a", [("q", "m"), ("s", "m")])
    world.turn(rules, 0)
    assert set(world.question.counted_providers) == {"p"}
    world.turn(rules, 0)
    assert set(world.question.counted_providers) == {"p", "q", "s"}


# -- more full tenants than are remembered --


def full_tenants(monkeypatch: pytest.MonkeyPatch) -> tuple[World, Policy, list[str]]:
    """Return a world in which twelve tenants run all they may, and wait with more; two of them are remembered."""
    monkeypatch.setattr(choice_module, "_MOST_PARKED", 2)
    rules = Policy(tenants={"*": TenantPolicy(concurrency=1), "free": TenantPolicy()})
    world = World()
    names = [f"tenant-{number}" for number in range(12)]
    for name in names:
        for _ in range(3):
            world.store(name, CHAIN)
    assert len(world.turn(rules, 12).picks) == 12
    for _ in range(8):
        world.now += 2.0
        assert world.turn(rules, 3).picks == ()
    return world, rules, names


def test_full_tenants_beyond_those_that_are_remembered_starve_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world, rules, _ = full_tenants(monkeypatch)
    assert len(State.from_json(world.state).tenants) == 2
    job = world.store("free", CHAIN)
    assert [pick.job for pick in world.turn(rules, 2).picks] == [job]
    assert not any(each.active for each in world.standings if each.tenant != "free"), "nobody has to pass them by"
    world.check()


def test_tenants_that_are_not_remembered_go_on_when_their_jobs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world, rules, names = full_tenants(monkeypatch)
    for name in (*names, *names):
        (running,) = [each for key, each in world.running.items() if key.tenant == name]
        told = [Settled(world.end(running.pick.job.key).place, running.pick.tokens, None, None, End.COMPLETED)]
        assert [pick.job.key.tenant for pick in world.turn(rules, 3, told).picks] == [name]
        world.check()


def test_tenants_that_are_not_remembered_go_on_though_nobody_tells_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world, rules, names = full_tenants(monkeypatch)
    for key in list(world.running):
        world.end(key)
    world.now += 300.0
    picks = world.turn(rules, 12, parked=names).picks
    assert {pick.job.key.tenant for pick in picks} == set(names)
    world.check()
