"""A world for the tests of choice: a store in memory that answers a turn's questions honestly, with no more than asked.

It stands for the tables and for what changes them between two turns: jobs that are stored, now and then by a slow
transaction; attempts that end; jobs that are cancelled.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from keepstream.client.lanes import lane_id, pool_id
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling.choice import Choice
from keepstream_worker.scheduling.observations import Observation, Place
from keepstream_worker.turn import Arrival, Decision, FoundPool, Pick, Pool, Question, Reading, Standing, WaitingJob
from keepstream_worker.values import JobKey, Target

ARRIVALS_READ = 200


@dataclass
class Running:
    """A job that a worker has."""

    pick: Pick

    @property
    def place(self) -> Place:
        """What its observations say of it."""
        job = self.pick.job
        return Place(
            job.lane, job.pool, job.key.tenant, self.job_class, self.pick.target, self.pick.chosen_at, self.pick.running
        )

    job_class: str = "interactive"


@dataclass
class World:
    """The tables, and a clock."""

    now: float = 1_000_000.0
    state: str = "{}"
    ready: dict[str, float] = field(default_factory=dict)
    arrivals_low: int = 0
    waiting: dict[int, WaitingJob] = field(default_factory=dict)
    places: dict[tuple[int, int], list[int]] = field(default_factory=dict)  #: Seqs of new ones, by lane and pool.
    slow: dict[int, WaitingJob] = field(default_factory=dict)  #: Of transactions that are not committed.
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    standings: list[Standing] = field(default_factory=list)
    pools: dict[int, Pool] = field(default_factory=dict)
    running: dict[JobKey, Running] = field(default_factory=dict)
    question: Question = field(default_factory=Question)
    choice: Choice = field(default_factory=lambda: Choice(Policy(), "main", 0))
    reading: Reading | None = None
    jobs_read: int = 0
    seq: int = 0
    names: int = 0

    # -- between turns --

    def store(
        self,
        tenant: str,
        chain: Sequence[tuple[str, str]],
        *,
        job_class: str = "interactive",
        queue: str = "main",
        prompt_tokens: int = 100,
        max_tokens: int | None = 100,
        slow: bool = False,
        expired: bool = False,
    ) -> WaitingJob:
        """Store a new job."""
        pool = Pool(pool_id(queue, job_class, chain), queue, job_class, tuple(Target(*each) for each in chain))
        self.pools[pool.id] = pool
        self.names += 1
        self.seq += 1
        job = WaitingJob(
            seq=self.seq,
            key=JobKey(tenant, f"job-{self.names}"),
            lane=lane_id(tenant, job_class, queue),
            pool=pool.id,
            attempt=0,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            expired=expired,
        )
        if slow:
            self.slow[job.seq] = job
        else:
            self._insert(job)
        return job

    def commit_slow(self, seq: int) -> None:
        """Let a slow transaction end."""
        self._insert(self.slow.pop(seq))

    def restart(self, key: JobKey, after: float) -> WaitingJob:
        """Put a running job back, to go on after some seconds."""
        old = self.running.pop(key).pick.job
        self.seq += 1
        job = old._replace(seq=self.seq, due=self.now + after, attempt=old.attempt + 1, expired=False)
        self._insert(job)
        return job

    def end(self, key: JobKey) -> Running:
        """End a running job."""
        return self.running.pop(key)

    def cancel(self, seq: int) -> None:
        """Delete a waiting job."""
        self.remove(seq)
        self.arrivals.pop(seq, None)

    def _insert(self, job: WaitingJob) -> None:
        self.waiting[job.seq] = job
        if job.due is None:
            insort(self.places.setdefault((job.lane, job.pool), []), job.seq)
        self.arrivals[job.seq] = Arrival(job.seq, job.lane, job.pool, job.key.tenant, job.due)

    def remove(self, seq: int) -> WaitingJob:
        """Delete a waiting job's row."""
        job = self.waiting.pop(seq)
        if job.due is None:
            self.places[job.lane, job.pool].remove(seq)
        return job

    def waiting_pools(self) -> list[FoundPool]:
        """Return where jobs wait, as a sweep finds it."""
        found = []
        for pool in self.pools.values():
            times = [each.time for each in self.standings if each.pool == pool.id and each.active]
            dues = [job.due for job in self.waiting.values() if job.pool == pool.id and job.due is not None]
            if times or dues:
                found.append(FoundPool(pool, min(times, default=None), min(dues, default=None)))
        return found

    # -- the turn --

    def turn(
        self,
        policy: Policy,
        places: int,
        observations: Sequence[Observation] = (),
        *,
        queue: str = "main",
        providers: Container[str] | None = None,
        parked: Sequence[str] = (),
        found: Sequence[FoundPool] = (),
    ) -> Decision:
        """Take a turn."""
        choice = self.choice = Choice(policy, queue, places, observations, providers, parked, found)
        self.question = choice.ask(self.now, self.state)
        self.reading = self.read(self.question)
        decision = choice.decide(self.reading)
        self.write(decision)
        return decision

    def read(self, question: Question) -> Reading:
        """Answer what is asked, and nothing else."""
        return _Reader(self, question).read()

    def write(self, decision: Decision) -> None:
        """Write what was decided, and check that it can be."""
        for pick in decision.picks:
            job = self.remove(pick.job.seq)
            assert job == pick.job
            assert job.key not in self.running
            self.running[job.key] = Running(pick, self.pools[job.pool].job_class)
        moved = set()
        for old, new in decision.moves:
            assert (old.lane, old.pool) == (new.lane, new.pool)
            assert old != new
            self.standings.remove(old)
            self.standings.append(new)
            moved.add((old.lane, old.pool))
        for lane, before, after in decision.times:
            for index, standing in enumerate(self.standings):
                if standing.lane == lane and standing.time == before and (lane, standing.pool) not in moved:
                    self.standings[index] = standing._replace(time=after)
        self.standings += decision.new_standings
        for seq in decision.arrivals:
            del self.arrivals[seq]
        self.state, self.ready, self.arrivals_low = decision.state, dict(decision.ready), decision.arrivals_low
        if not decision.changed:
            assert not any((decision.picks, decision.moves, decision.new_standings, decision.times))

    def check(self) -> None:
        """Assert what holds between two turns, whatever happened."""
        places = Counter((each.lane, each.pool) for each in self.standings if each.active or each.parked)
        assert all(number == 1 for number in places.values()), "a lane waits twice in a pool"
        times: dict[int, set[float]] = {}
        for each in self.standings:
            assert not (each.active and each.parked)
            if each.active or each.parked:
                times.setdefault(each.lane, set()).add(each.time)
        assert all(len(found) == 1 for found in times.values()), "a lane is at two times"
        heads = {(each.lane, each.pool): each.head for each in self.standings if each.active or each.parked}
        for job in self.waiting.values():
            if job.due is None and job.seq not in self.arrivals:
                assert heads[job.lane, job.pool] <= job.seq, "a job is out of sight"


class _Reader:
    """Reads what one question asks for."""

    def __init__(self, world: World, question: Question) -> None:
        self.world = world
        self.question = question
        self.standings: dict[Standing, None] = {}
        self.jobs: dict[tuple[int, int], tuple[WaitingJob, ...]] = {}
        self.whole: set[tuple[int, int]] = set()

    def read(self) -> Reading:
        """Return everything."""
        world, question = self.world, self.question
        seqs = sorted(seq for seq in world.arrivals if seq >= world.arrivals_low and seq not in question.passed)
        arrivals = tuple(world.arrivals[seq] for seq in seqs[:ARRIVALS_READ])
        restarted = self.restarted(arrivals)
        self.read_pools()
        self.read_lanes(arrivals, restarted)
        self.read_arrivals(arrivals)
        targets = Counter(each.pick.target for each in world.running.values())
        tenants = Counter(key.tenant for key in world.running)
        counted = set(question.counted_tenants)
        if question.counts_all_tenants:
            counted |= {standing.tenant for standing in self.standings}
            counted |= {arrival.tenant for arrival in arrivals}
            counted |= {job.key.tenant for job in restarted}
        pools = {each.pool for group in (self.standings, arrivals, restarted) for each in group}
        providers = {target.provider for pool in pools for target in world.pools[pool].chain}
        providers.update(question.counted_providers)
        return Reading(
            now=world.now,
            pools={pool: world.pools[pool] for pool in pools},
            standings=tuple(self.standings),
            jobs={place: jobs for place, jobs in self.jobs.items() if jobs},
            whole=frozenset(self.whole),
            restarted=restarted,
            arrivals=arrivals,
            more_arrivals=len(seqs) > ARRIVALS_READ,
            running={each: number for each, number in targets.items() if each.provider in providers},
            running_tenants={each: number for each, number in tenants.items() if each in counted},
            restarted_wait=frozenset(
                job.pool
                for job in world.waiting.values()
                if job.due is not None and question.full_tenants and job.pool in question.restarted_pools
            ),
        )

    def restarted(self, arrivals: Sequence[Arrival]) -> tuple[WaitingJob, ...]:
        """Read the first restarted jobs of pools, and those that arrivals name."""
        world, question = self.world, self.question
        found: dict[int, WaitingJob] = {}
        for pool in question.restarted_pools:
            due = sorted(
                (job.due, job.seq)
                for job in world.waiting.values()
                if job.due is not None and job.pool == pool and job.key.tenant not in question.full_tenants
            )
            found.update((seq, world.waiting[seq]) for _, seq in due[: question.restarted + 1])
        for arrival in arrivals:
            if arrival.due is not None and world.pools[arrival.pool].queue == question.queue:
                job = world.waiting.get(arrival.seq)
                if job is not None:
                    found[job.seq] = job
        return tuple(found.values())

    def read_pools(self) -> None:
        """Read the first standings of each pool, and their first jobs."""
        question = self.question
        for pool, least in question.pools:
            lanes = sorted(
                (standing for standing in self.world.standings if standing.pool == pool and standing.active),
                key=lambda standing: (standing.time, standing.lane),
            )
            assert all(standing.time >= least for standing in lanes), "low is above a lane's time"
            for position, standing in enumerate(lanes[: question.standings]):
                self.standings[standing] = None
                limit = question.other_jobs if position else question.first_jobs
                self.read_jobs(standing.lane, pool, standing.head, limit)

    def read_lanes(self, arrivals: Sequence[Arrival], restarted: Sequence[WaitingJob]) -> None:
        """Read the standings of lanes that are named, and those of parked tenants."""
        question = self.question
        times = {lane: self.least_read(lane, low) for lane, low in question.lanes}
        named = {(each.lane, each.pool) for each in arrivals} | {(each.lane, each.pool) for each in restarted}
        for lane, number in named:
            pool = self.world.pools[number]
            least = question.arrival_times.get((pool.queue, pool.job_class), float("-inf"))
            times[lane] = min(times.get(lane, least), least)
        for standing in self.world.standings:
            unparks = standing.parked and standing.tenant in question.parked_tenants
            if unparks or standing.time >= times.get(standing.lane, float("inf")):
                self.standings[standing] = None
            if unparks:
                self.read_jobs(standing.lane, standing.pool, standing.head, question.other_jobs)

    def least_read(self, lane: int, low: float) -> float:
        """Return from which time on standings are read of a lane that is settled: its own if it waits, and no more."""
        found = [each for each in self.world.standings if each.lane == lane and each.time >= low]
        highest = max((each.time for each in found), default=low)
        waits = any(each.active or each.parked for each in found if each.time == highest)
        return highest if waits else low

    def read_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        """Read the first jobs of each lane and pool that arrivals name."""
        heads: dict[tuple[int, int], int] = {}
        for arrival in arrivals:
            if arrival.due is None and self.world.pools[arrival.pool].queue == self.question.queue:
                place = (arrival.lane, arrival.pool)
                heads[place] = min(heads.get(place, arrival.seq), arrival.seq)
        for standing in self.standings:
            place = (standing.lane, standing.pool)
            if place in heads and (standing.active or standing.parked):
                heads[place] = min(heads[place], standing.head)
        for (lane, pool), head in heads.items():
            self.read_jobs(lane, pool, head, self.question.other_jobs)

    def read_jobs(self, lane: int, pool: int, head: int, limit: int) -> None:
        """Read the first new jobs of a lane in a pool."""
        seqs = self.world.places.get((lane, pool), [])
        first = bisect_left(seqs, head)
        waits = seqs[first : first + limit + 1]
        # Read twice, it has one answer: from the smaller head, to the larger limit.
        earlier = self.jobs.get((lane, pool))
        if earlier is not None:
            limit = max(limit, len(earlier))
            waits = sorted({*seqs[first : first + limit + 1], *(job.seq for job in earlier)})
        self.jobs[lane, pool] = tuple(self.world.waiting[seq] for seq in waits[:limit])
        if len(waits) <= limit:
            self.whole.add((lane, pool))
        else:
            self.whole.discard((lane, pool))
