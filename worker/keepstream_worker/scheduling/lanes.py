"""Lanes: how far each tenant's jobs of one class and queue have come, within one turn.

In: standings and jobs as they were read.  Out: the lanes, which ``Choice`` moves; the standings that change.

A lane's time is the tokens it was given divided by its weight.  It is stored in each of its standings; those in which
it is active or parked have the same one, and old ones mean nothing below it.
"""

from collections.abc import Sequence

from keepstream_worker.turn import Move, Retimed, Standing, WaitingJob


class Row:
    """One standing of a lane, as it will be."""

    __slots__ = ("active", "head", "jobs", "next", "old", "parked", "pool", "whole")

    def __init__(self, pool: int, old: Standing | None) -> None:
        self.pool = pool
        self.old = old
        self.active = old is not None and old.active
        self.parked = old is not None and old.parked
        self.head = 0 if old is None else old.head
        self.jobs: Sequence[WaitingJob] = ()  #: New ones, oldest first, as far as they were read.
        self.next = 0  #: Which of them is the next.
        self.whole = False  #: Whether these are all.

    def peek(self) -> WaitingJob | None:
        """Return the next job, if one was read."""
        return self.jobs[self.next] if self.next < len(self.jobs) else None

    def pop(self) -> None:
        """Take the next job."""
        taken = self.jobs[self.next].seq
        self.next += 1
        if self.next < len(self.jobs):
            self.head = self.jobs[self.next].seq
        else:
            self.head = taken + 1
            self.active = self.active and not self.whole


class Lane:
    """A lane within one turn."""

    __slots__ = ("id", "is_charged", "job_class", "old_time", "pool", "queue", "rows", "tenant", "time", "weight")

    def __init__(self, number: int, tenant: str, queue: str, job_class: str, weight: float) -> None:
        self.id = number
        self.tenant = tenant
        self.queue = queue
        self.job_class = job_class
        self.weight = weight
        self.rows: dict[int, Row] = {}  #: By pool.
        self.time = _LONG_AGO
        self.old_time = _LONG_AGO  #: As it was read.
        self.is_charged = False  #: Whether its time is to be kept though nothing waits.
        self.pool: int | None = None  #: Where a standing is made to keep it, if there is none.

    def read(self, standing: Standing) -> Row:
        """Take in one of its standings."""
        row = self.rows.get(standing.pool)
        if row is not None and row.old is not None and not _counts_before(standing, row.old):
            return row
        row = self.rows[standing.pool] = Row(standing.pool, standing)
        waits = [row for row in self.rows.values() if row.active or row.parked]
        self.time = max(row.old.time for row in waits or self.rows.values() if row.old is not None)
        self.old_time = self.time
        return row

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of how far it is."""
        return self.time == _LONG_AGO

    @property
    def waits(self) -> bool:
        """Whether jobs of it wait, parked or not, as far as is known."""
        return any(row.active or row.parked for row in self.rows.values())

    def row(self, pool: int) -> Row:
        """Return its standing in a pool, a new one if it has none."""
        found = self.rows.get(pool)
        if found is None:
            found = self.rows[pool] = Row(pool, None)
        return found

    def start(self, least: float) -> float:
        """Return where its next job starts; no lane is further behind than ``least``."""
        return max(self.time, least)

    def park(self) -> bool:
        """Wait until the tenant has a place again; return whether anything changes."""
        changes = False
        for row in self.rows.values():
            if row.active:
                row.active, row.parked, changes = False, True, True
        return changes

    def unpark(self) -> bool:
        """Wait as others do; return whether anything changes."""
        changes = False
        for row in self.rows.values():
            if row.parked:
                row.active, row.parked, changes = True, False, True
        return changes

    def written(self) -> tuple[list[Move], list[Standing], list[Retimed]]:
        """Return what changes: standings, new standings, and its time in pools that were not read."""
        moves: list[Move] = []
        made: list[Standing] = []
        keeps_time = False
        idle: Row | None = None
        for row in self.rows.values():
            old = row.old
            waits = row.active or row.parked
            if waits or (old is not None and (old.active or old.parked)):
                time = self.time
            elif old is not None:
                time = min(old.time, self.time)
                if idle is None or idle.old is None or old.time > idle.old.time:
                    idle = row
            else:
                continue  # nothing was known of it, and nothing is
            keeps_time = keeps_time or time == self.time
            new = Standing(self.id, row.pool, self.tenant, time, row.head, row.active, row.parked)
            if old is None:
                made.append(new)
            elif new != old:
                moves.append(Move(old, new))
        if not keeps_time and self.is_charged:
            if idle is not None and idle.old is not None:
                moves = [move for move in moves if move.old is not idle.old]
                moves.append(Move(idle.old, idle.old._replace(time=self.time)))
            elif self.pool is not None:
                made.append(Standing(self.id, self.pool, self.tenant, self.time, 0, active=False))
        times = []
        waited = any(row.old and (row.old.active or row.old.parked) for row in self.rows.values())
        if self.time != self.old_time and waited:
            times.append(Retimed(self.id, self.old_time, self.time))
        return moves, made, times


def _counts_before(one: Standing, other: Standing) -> bool:
    """Whether, of two standings of a lane in one pool, the first counts: the older is left to the sweep."""
    return (one.active or one.parked, one.time) > (other.active or other.parked, other.time)


_LONG_AGO = float("-inf")
