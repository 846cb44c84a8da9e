"""The turn: what is asked, read and written while one worker chooses for the whole deployment.

In: nothing.  Out: values, to ``keepstream_worker.store.turns``, which reads and writes, and to
``keepstream_worker.scheduling``, which asks and decides.  One turn goes

    newest state → ``Question`` → ``Reading`` → ``Decision`` → written, as one transaction

so that deciding is a pure function of what was read, the same for both databases.  All moments are seconds since the
epoch by the database's clock; virtual times are tokens divided by a lane's weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from keepstream_worker.values import JobKey, Target

#: How far a slow transaction's arrival may be behind the newest one and still be found by a turn; a sweep finds others.
LATE_ARRIVALS: Final = 1000
#: Seconds between a start without a turn and its commit. If it takes longer, the job is not counted for as long as it
#: is remembered since when jobs run.
LATE_STARTS: Final = 2.0


class Pool(NamedTuple):
    """What waits for the same: jobs of one queue and class with the same targets in the same order."""

    id: int
    queue: str
    job_class: str  #: ``interactive`` or ``bulk``.
    chain: tuple[Target, ...]  #: The job's target, then its fallbacks.


class WaitingJob(NamedTuple):
    """A job that waits, as the narrow table has it."""

    seq: int  #: Its age: smaller is older.
    key: JobKey
    lane: int
    pool: int
    attempt: int  #: The newest attempt so far; 0: none.
    prompt_tokens: int  #: As estimated when it was stored.
    max_tokens: int | None  #: Of the answer, if the request says so.
    due: float | None = None  #: Of a job that was started before: not to go on earlier.  None: it is new.
    expired: bool = False  #: It is new, and its ``expires_at`` has passed.


class FoundPool(NamedTuple):
    """A pool in which jobs wait, as a sweep has found it, whatever turns know of it."""

    pool: Pool
    time: float | None  #: The least of the lanes that are active there; None: none is.
    due: float | None  #: When the first restarted job goes on; None: none waits.


class Standing(NamedTuple):
    """A lane in a pool, as stored."""

    lane: int
    pool: int
    tenant: str
    time: float  #: The lane's virtual time; the same in all its pools in which it is active.
    head: int  #: No new job of it waits in this pool with a smaller seq, as far as is known.
    active: bool  #: Whether jobs wait here, and may be chosen.
    parked: bool = False  #: Whether its tenant runs as many jobs as it may; then it is not active.


class Arrival(NamedTuple):
    """A note that a job has come to wait."""

    seq: int  #: The waiting job's.
    lane: int
    pool: int
    tenant: str
    due: float | None  #: As the waiting job's.


class Oldest(NamedTuple):
    """Since when jobs are counted that run: none was started before."""

    by_provider: Mapping[str, float]
    others: float  #: At the providers that are missing there.


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be read. Everything is bounded by what is named here."""

    queue: str = ""  #: The worker's; jobs of others need not be read.
    #: Active pools that are open, with the least virtual time in each: the first ``standings`` of each are read, by
    #: time and lane.
    pools: tuple[tuple[int, float], ...] = ()
    #: Open pools with restarted jobs: the first ``restarted`` + 1 of each by their moment, due or not.
    restarted_pools: tuple[int, ...] = ()
    full_tenants: tuple[str, ...] = ()  #: Whose restarted jobs are not among those: they run as many as they may.
    #: Lanes that are settled or charged now: standings are read that have at least this time. If any waits, those that
    #: wait are enough, and all that are higher; or else the highest.
    lanes: tuple[tuple[int, float], ...] = ()
    #: The same for the lanes that arrivals and restarted jobs name, by queue and class. Of a queue and class that is
    #: missing here nothing was ever chosen: all are read.
    arrival_times: Mapping[tuple[str, str], float] = field(default_factory=dict)
    #: Tenants whose parked standings are read, because a job of theirs may have ended.
    parked_tenants: tuple[str, ...] = ()
    passed: frozenset[int] = frozenset()  #: Seqs of arrivals that are not read, though they are there.
    standings: int = 0  #: In each pool.
    first_jobs: int = 0  #: Of the first standing of each pool.
    other_jobs: int = 0  #: Of each other one, of each parked one read, and of each lane and pool that arrivals name
    #: (there from the smaller of the head, if it is active, and the seq of its least arrival).
    restarted: int = 0
    #: Whose running jobs are counted, by target; those of the pools that are read are counted as well.
    counted_providers: tuple[str, ...] = ()
    counted_tenants: tuple[str, ...] = ()  #: The same, by tenant; those of the standings read are counted as well.
    #: Whether the tenants of the standings, arrivals and restarted jobs read are to be counted.
    counts_all_tenants: bool = False
    oldest: Oldest | None = None  #: None: it is not known, and looked for.


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, after everything that was committed before the turn."""

    now: float
    pools: Mapping[int, Pool]  #: Those that the standings, arrivals and jobs below are in.
    standings: tuple[Standing, ...]  #: Of the pools asked for, by pool and time; of lanes that arrivals name; of
    #: lanes asked for; of parked tenants.  Each once.
    jobs: Mapping[tuple[int, int], tuple[WaitingJob, ...]]  #: New ones by (lane, pool), oldest first.
    whole: frozenset[tuple[int, int]]  #: The (lane, pool) of which no further new jobs wait.
    restarted: tuple[WaitingJob, ...]  #: Of the pools asked for, by moment, and those that arrivals name by their seq,
    #: whatever their pool and tenant.  Each once; not all may be due.
    arrivals: tuple[Arrival, ...]
    more_arrivals: bool  #: Whether there are further ones; the next turn takes them.
    running: Mapping[Target, int]
    running_tenants: Mapping[str, int]
    oldest: Oldest | None = None  #: None: it was not looked for.
    #: Of the pools asked for, those in which any restarted job waits, whatever its tenant; empty if none was left out.
    restarted_wait: frozenset[int] = frozenset()


class Pick(NamedTuple):
    """A job that goes to the worker that has the turn."""

    job: WaitingJob
    target: Target
    tokens: int  #: Charged to its lane and its target's buckets.
    chosen_at: float = 0.0  #: The moment of the turn.
    running: int = 0  #: Jobs at the target after this turn's picks; with its moment, what its end teaches.
    job_class: str = "interactive"  #: Of its lane.


class Move(NamedTuple):
    """A standing that changes; it is found by its old lane, pool and time, and must be there."""

    old: Standing
    new: Standing


class Retimed(NamedTuple):
    """A lane that has moved: its standings with exactly the old time get the new one.

    Those that ``Decision.moves`` names have it already; here it is about its other pools, which need not have been
    read, so there may be none.
    """

    lane: int
    old: float
    new: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What is written."""

    picks: tuple[Pick, ...] = ()
    moves: tuple[Move, ...] = ()
    times: tuple[Retimed, ...] = ()  #: After the moves.
    new_standings: tuple[Standing, ...] = ()
    arrivals: tuple[int, ...] = ()  #: Their seqs; they are deleted. Others are left for a later turn.
    misplaced: tuple[int, ...] = ()  #: Seqs of arrivals whose pool could not be read; they are left.
    arrivals_low: int = 0  #: From where the next turn looks for arrivals; a sweep looks below.
    ready: Mapping[str, float] = field(default_factory=dict)  #: By queue: when the next turn is worth taking, if
    #: nothing arrives; 0: at once.  Queues in which nothing waits are missing.
    closed: Mapping[str, Any] = field(default_factory=dict)  #: Why what waits waits, for people; JSON.
    state: str = "{}"  #: For the next turn; JSON.
    changed: bool = True  #: Whether anything is to be written at all.


class Decider(Protocol):
    """What the store asks while it holds the turn. Quick, and without I/O."""

    def ask(self, now: float, state: str) -> Question:
        """Return what is to be read; ``state`` is that of the newest turn, ``{}`` before the first."""

    def decide(self, reading: Reading) -> Decision:
        """Return what is to be written; called after ``ask``, in the same turn."""
