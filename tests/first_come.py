"""A decider for tests of the store: what was stored first goes first, and nothing is limited.

In: what a turn reads.  Out: what it is to write. It needs none of the rules of choice, only that no job is forgotten.
"""

import json
from dataclasses import dataclass, field

from keepstream_worker.turn import Decision, Move, Pick, Question, Reading, Standing


@dataclass
class FirstComeDecider:
    """Takes up to ``places`` jobs of its queue; its state is which pools have waiting jobs."""

    places: int
    queue: str = "completions"
    reads: list[Reading] = field(default_factory=list)  #: What was read, for tests to look at.

    def ask(self, now: float, state: str) -> Question:
        """Return what is to be read: the first jobs of the first lanes of all pools."""
        self._known = json.loads(state)
        return Question(
            queue=self.queue,
            pools=tuple((pool, 0.0) for pool in self._known.get("active", [])),
            restarted_pools=tuple(self._known.get("restarted", [])),
            standings=max(self.places, 1),
            first_jobs=max(self.places, 1),
            other_jobs=max(self.places, 1),
            restarted=max(self.places, 1),
        )

    def decide(self, reading: Reading) -> Decision:
        """Return what is to be written."""
        self.reads.append(reading)
        free = self.places
        picks = []
        for job in sorted(reading.restarted, key=lambda job: (job.due or 0.0, job.seq)):
            if free and job.due is not None and job.due <= reading.now and self._is_ours(reading, job.pool):
                picks.append(Pick(job, reading.pools[job.pool].chain[0], 1, chosen_at=reading.now))
                free -= 1
        new = sorted((job for jobs in reading.jobs.values() for job in jobs), key=lambda job: job.seq)
        picks += [Pick(job, reading.pools[job.pool].chain[0], 1, chosen_at=reading.now) for job in new[:free]]
        taken = {pick.job.seq for pick in picks}
        known = {(standing.lane, standing.pool): standing for standing in reading.standings}
        least: dict[tuple[int, int], int] = {}
        for arrival in reading.arrivals:
            if arrival.due is None:
                place = (arrival.lane, arrival.pool)
                least[place] = min(arrival.seq, least.get(place, arrival.seq))
        tenants = {arrival.lane: arrival.tenant for arrival in reading.arrivals}
        moves, added = [], []
        for place in {*known, *least}:
            old = known.get(place)
            left = [job.seq for job in reading.jobs.get(place, ()) if job.seq not in taken]
            if place in reading.jobs:
                active = bool(left) or place not in reading.whole
                last = max((job.seq for job in reading.jobs[place]), default=0)
                head = min(left) if left else last + 1
            elif place in least:  # of another queue: its own workers read it
                active = True
                head = min(least[place], old.head if old is not None and old.active else least[place])
            else:
                continue
            if old is None:
                added.append(Standing(*place, tenants[place[0]], 0.0, head, active=active))
            elif (old.head, old.active) != (head, active):
                moves.append(Move(old, old._replace(head=head, active=active)))
        active_pools = {*self._known.get("active", []), *(pool for _, pool in least)}
        restarted_pools = {*self._known.get("restarted", [])}
        restarted_pools |= {arrival.pool for arrival in reading.arrivals if arrival.due is not None}
        state = json.dumps({"active": sorted(active_pools), "restarted": sorted(restarted_pools)})
        now = {**known, **{(move.new.lane, move.new.pool): move.new for move in moves}}
        now |= {(standing.lane, standing.pool): standing for standing in added}
        waits = {reading.pools[standing.pool].queue for standing in now.values() if standing.active}
        ready = dict.fromkeys(waits, 0.0)
        return Decision(
            picks=tuple(picks),
            moves=tuple(moves),
            new_standings=tuple(added),
            arrivals=tuple(arrival.seq for arrival in reading.arrivals),
            arrivals_low=max((arrival.seq - 1000 for arrival in reading.arrivals), default=0),
            ready=ready,
            state=state,
            changed=bool(picks or moves or added or reading.arrivals),
        )

    def _is_ours(self, reading: Reading, pool: int) -> bool:
        return pool in reading.pools and reading.pools[pool].queue == self.queue
