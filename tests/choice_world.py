"""A world for the tests of choice: a store in memory that answers a turn's questions honestly, with no more than asked.

It stands for the tables and for what changes them between two turns: jobs that are stored, now and then by a slow
transaction; attempts that end; jobs that are cancelled.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from keepstream.client.lanes import lane_id, pool_id
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling.choice import Choice
from keepstream_worker.scheduling.observations import Observation, Place
from keepstream_worker.turn import Arrival, Decision, Pick, Pool, Question, Reading, Standing, WaitingJob
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
    slow: dict[int, WaitingJob] = field(default_factory=dict)  #: Of transactions that are not committed.
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    standings: list[Standing] = field(default_factory=list)
    pools: dict[int, Pool] = field(default_factory=dict)
    running: dict[JobKey, Running] = field(default_factory=dict)
    question: Question = field(default_factory=Question)
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
        job = old._replace(seq=self.seq, due=self.now + after, attempt=old.attempt + 1)
        self._insert(job)
        return job

    def end(self, key: JobKey) -> Running:
        """End a running job."""
        return self.running.pop(key)

    def cancel(self, seq: int) -> None:
        """Delete a waiting job."""
        del self.waiting[seq]
        self.arrivals.pop(seq, None)

    def _insert(self, job: WaitingJob) -> None:
        self.waiting[job.seq] = job
        self.arrivals[job.seq] = Arrival(job.seq, job.lane, job.pool, job.key.tenant, job.due)

    # -- the turn --

    def turn(
        self, policy: Policy, places: int, observations: Sequence[Observation] = (), *, queue: str = "main"
    ) -> Decision:
        """Take a turn."""
        choice = Choice(policy, queue, places, observations)
        self.question = choice.ask(self.now, self.state)
        self.reading = self.read(self.question)
        decision = choice.decide(self.reading)
        self.write(decision)
        return decision

    def read(self, question: Question) -> Reading:
        """Answer what is asked, and nothing else."""
        found: dict[tuple[int, int, float], Standing] = {}
        jobs: dict[tuple[int, int], tuple[WaitingJob, ...]] = {}
        whole: set[tuple[int, int]] = set()

        def take(standing: Standing) -> None:
            found[standing.lane, standing.pool, standing.time] = standing

        def look(lane: int, pool: int, head: int, limit: int) -> None:
            waits = sorted(
                job.seq
                for job in self.waiting.values()
                if job.lane == lane and job.pool == pool and job.due is None and job.seq >= head
            )
            if len(jobs.get((lane, pool), ())) < limit:
                jobs[lane, pool] = tuple(self.waiting[seq] for seq in waits[:limit])
                self.jobs_read += len(waits[:limit])
            if len(waits) <= limit:
                whole.add((lane, pool))
            if not jobs.get((lane, pool)):
                jobs.pop((lane, pool), None)

        low = self.arrivals_low
        seqs = sorted(seq for seq in self.arrivals if seq >= low)
        arrivals = tuple(self.arrivals[seq] for seq in seqs[:ARRIVALS_READ])
        restarted: dict[int, WaitingJob] = {}
        for pool in question.restarted_pools:
            due = sorted(
                (job.due, job.seq)
                for job in self.waiting.values()
                if job.pool == pool and job.due is not None and job.key.tenant not in question.full_tenants
            )
            restarted.update((seq, self.waiting[seq]) for _, seq in due[: question.restarted + 1])
        for arrival in arrivals:
            if arrival.due is not None and self.pools[arrival.pool].queue == question.queue:
                job = self.waiting.get(arrival.seq)
                if job is not None:
                    restarted[job.seq] = job
        for pool, least in question.pools:
            lanes = sorted(
                (standing for standing in self.standings if standing.pool == pool and standing.active),
                key=lambda standing: (standing.time, standing.lane),
            )
            assert all(standing.time >= least for standing in lanes), "low is above a lane's time"
            for position, standing in enumerate(lanes[: question.standings]):
                take(standing)
                limit = question.other_jobs if position else question.first_jobs
                look(standing.lane, pool, standing.head, limit)
        named = {(arrival.lane, arrival.pool) for arrival in arrivals}
        named |= {(job.lane, job.pool) for job in restarted.values()}
        times = dict(question.lanes)
        for lane, pool in named:
            where = self.pools[pool]
            least = question.arrival_times.get((where.queue, where.job_class), float("-inf"))
            times[lane] = min(times.get(lane, least), least)
        for standing in self.standings:
            if (standing.lane in times and standing.time >= times[standing.lane]) or (
                standing.parked and standing.tenant in question.parked_tenants
            ):
                take(standing)
            else:
                continue
            if standing.parked and standing.tenant in question.parked_tenants:
                look(standing.lane, standing.pool, standing.head, question.other_jobs)
        heads: dict[tuple[int, int], int] = {}
        for arrival in arrivals:
            if arrival.due is None and self.pools[arrival.pool].queue == question.queue:
                place = (arrival.lane, arrival.pool)
                heads[place] = min(heads.get(place, arrival.seq), arrival.seq)
        for standing in found.values():
            place = (standing.lane, standing.pool)
            if place in heads and (standing.active or standing.parked):
                heads[place] = min(heads[place], standing.head)
        for (lane, pool), head in heads.items():
            look(lane, pool, head, question.other_jobs)
        targets = Counter(each.pick.target for each in self.running.values())
        tenants = Counter(key.tenant for key in self.running)
        counted = set(question.counted_tenants)
        if question.counts_all_tenants:
            counted |= {standing.tenant for standing in found.values()}
            counted |= {arrival.tenant for arrival in arrivals}
            counted |= {job.key.tenant for job in restarted.values()}
        pools = {standing.pool for standing in found.values()} | {arrival.pool for arrival in arrivals}
        pools |= {job.pool for job in restarted.values()}
        return Reading(
            now=self.now,
            pools={pool: self.pools[pool] for pool in pools},
            standings=tuple(found.values()),
            jobs=jobs,
            whole=frozenset(whole),
            restarted=tuple(restarted.values()),
            arrivals=arrivals,
            more_arrivals=len(seqs) > ARRIVALS_READ,
            running={each: number for each, number in targets.items() if each.provider in question.counted_providers},
            running_tenants={each: number for each, number in tenants.items() if each in counted},
        )

    def write(self, decision: Decision) -> None:
        """Write what was decided, and check that it can be."""
        for pick in decision.picks:
            job = self.waiting.pop(pick.job.seq)
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
            assert not (decision.picks or decision.moves or decision.new_standings or decision.times)

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
