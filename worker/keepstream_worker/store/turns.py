"""Turns: one worker at a time chooses for the whole deployment.

In: a worker and its ``Decider``, from the chooser.  Out: the jobs that are the worker's from now on, and what is known
of all others.

A turn is one short transaction that no other turn overlaps: a little is read, all of it after what was committed
before; the decider decides; what it decided is written, at once.  On PostgreSQL an advisory lock makes the turn, and
its commit waits for no disk: until ``claims.begin`` has committed, losing it with a crash of the database does no harm.
On SQLite it is the lock of its only writer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection

from keepstream.errors import StoreUnavailableError
from keepstream_worker.store import turns_postgresql, turns_sqlite
from keepstream_worker.store.pools import find_pools
from keepstream_worker.store.turn_values import Newest, Span, Written
from keepstream_worker.turn import (
    LATE_ARRIVALS,
    Arrival,
    Decider,
    Decision,
    Oldest,
    Pick,
    Pool,
    Question,
    Reading,
    Standing,
    WaitingJob,
)
from keepstream_worker.values import Target

#: Arrivals that one turn handles at most.
_MOST_ARRIVALS: Final = 200
_ALL_TIMES: Final = float("-inf")


class TurnLostError(StoreUnavailableError):
    """What a turn had read was changed by somebody else. Nothing was written; the next turn reads anew."""


class Turn(NamedTuple):
    """A worker would choose."""

    worker_id: str
    decider: Decider


class Turned(NamedTuple):
    """What a turn has brought."""

    picks: tuple[Pick, ...]  #: The worker's from now on, to be begun by ``begin``.
    ready: Mapping[str, float]  #: See ``keepstream_worker.turn.Decision``.
    closed: Mapping[str, Any]
    now: float  #: The moment of the turn.
    turn: int  #: Its number; that of the one before if nothing was written.
    state: str  #: Which it has left, JSON.
    #: Picks that could not be taken, because somebody ends or starts these jobs: they were charged all the same.
    left_out: tuple[Pick, ...] = ()
    misplaced: tuple[int, ...] = ()  #: Seqs of arrivals that wait where no turn can look; for ``put_right``.
    more_arrivals: bool = False  #: Whether more jobs have arrived than one turn takes note of.


class _Statements(Protocol):
    """What the two databases say in their own ways."""

    def open_turn(self, connection: Connection, most_arrivals: int) -> Newest:
        """Wait for the turn; return what the turn before has left, and what has arrived since."""

    def find_restarted(self, connection: Connection, question: Question, seqs: Sequence[int]) -> Iterable[WaitingJob]:
        """Return jobs that were started before: the first of the pools asked for, and those of ``seqs``."""

    def find_restarted_pools(self, connection: Connection, pools: Sequence[int]) -> frozenset[int]:
        """Return those of the pools in which jobs wait that were started before."""

    def find_standings(
        self, connection: Connection, question: Question, lanes: Sequence[tuple[int, float]]
    ) -> Iterable[Standing]:
        """Return standings: the first of the pools asked for, by pool and time; of lanes; of parked tenants.

        Of the lanes asked for at least those that wait, if any does, or else the highest; of ``lanes`` all.
        """

    def find_jobs(self, connection: Connection, spans: Sequence[Span]) -> Iterable[WaitingJob]:
        """Return new jobs, oldest first."""

    def count_running(
        self, connection: Connection, providers: Sequence[str], tenants: Sequence[str], oldest: Oldest
    ) -> tuple[dict[Target, int], dict[str, int]]:
        """Return how many jobs run, none of which was started before ``oldest``, by target and by tenant."""

    def find_oldest(self, connection: Connection) -> Oldest | None:
        """Return since when the jobs were started that run; None: it makes no difference."""

    def write(self, connection: Connection, worker_id: str, n: int, decision: Decision) -> Written:
        """Write what was decided, as turn ``n``."""


_STATEMENTS: Final[Mapping[str, _Statements]] = {"postgresql": turns_postgresql, "sqlite": turns_sqlite}


def take_turn(connection: Connection, turns: list[Turn]) -> list[Turned]:
    """Wait for the turn, and choose; one in a transaction of its own.

    Raises:
        TurnLostError: it must be taken again.
    """
    (turn,) = turns
    statements = _STATEMENTS[connection.dialect.name]
    newest = statements.open_turn(connection, _MOST_ARRIVALS + LATE_ARRIVALS + 2)
    question = turn.decider.ask(newest.now, newest.state)
    reading = _read(connection, statements, newest, question)
    decision = turn.decider.decide(reading)
    if not decision.changed:
        answer = Turned((), decision.ready, decision.closed, newest.now, newest.n, newest.state)
        return [answer._replace(misplaced=decision.misplaced, more_arrivals=reading.more_arrivals)]
    written = statements.write(connection, turn.worker_id, newest.n + 1, decision)
    if written.moved != len(decision.moves):
        raise TurnLostError("somebody else has changed what was to be chosen from")
    picks = tuple(pick for pick in decision.picks if pick.job.seq in written.taken)
    left_out = tuple(pick for pick in decision.picks if pick.job.seq not in written.taken)
    answer = Turned(picks, decision.ready, decision.closed, newest.now, newest.n + 1, decision.state)
    more = reading.more_arrivals
    return [answer._replace(left_out=left_out, misplaced=decision.misplaced, more_arrivals=more)]


def _read(connection: Connection, statements: _Statements, newest: Newest, question: Question) -> Reading:
    arrived = tuple(arrival for arrival in newest.arrivals if arrival.seq not in question.passed)
    arrivals = arrived[:_MOST_ARRIVALS]
    restarted_arrivals = [arrival.seq for arrival in arrivals if arrival.due is not None]
    restarted: dict[int, WaitingJob] = {}
    if question.restarted_pools or restarted_arrivals:
        found = statements.find_restarted(connection, question, restarted_arrivals)
        restarted = {job.seq: job for job in found}
    restarted_wait: frozenset[int] = frozenset()
    if question.restarted_pools and question.full_tenants:
        restarted_wait = statements.find_restarted_pools(connection, question.restarted_pools)
    named: list[Arrival | WaitingJob] = [*arrivals, *restarted.values()]
    pools = dict(find_pools(connection, {item.pool for item in named}))
    lanes = _lanes_of(question, pools, named)
    standings: dict[tuple[int, int], Standing] = {}
    if question.pools or question.lanes or lanes or question.parked_tenants:
        for standing in statements.find_standings(connection, question, lanes):
            known = standings.setdefault((standing.lane, standing.pool), standing)
            # An older one in which nothing waits means nothing.
            if (standing.active, standing.time) > (known.active, known.time):
                standings[standing.lane, standing.pool] = standing
    pools |= find_pools(connection, {standing.pool for standing in standings.values()})
    spans = _spans(question, pools, standings, arrivals)
    jobs: dict[tuple[int, int], list[WaitingJob]] = {(span.lane, span.pool): [] for span in spans}
    if spans:
        for job in statements.find_jobs(connection, spans):
            jobs[job.lane, job.pool].append(job)
    tenants = set(question.counted_tenants)
    if question.counts_all_tenants:
        tenants |= {standing.tenant for standing in standings.values()}
        tenants |= {item.tenant for item in arrivals} | {job.key.tenant for job in restarted.values()}
    running: dict[Target, int] = {}
    running_tenants: dict[str, int] = {}
    oldest: Oldest | None = None
    providers = {*question.counted_providers, *(target.provider for pool in pools.values() for target in pool.chain)}
    if providers or tenants:
        if question.oldest is None:
            oldest = statements.find_oldest(connection)
        since = question.oldest or oldest or Oldest({}, 0.0)
        running, running_tenants = statements.count_running(connection, sorted(providers), sorted(tenants), since)
    return Reading(
        now=newest.now,
        pools=pools,
        standings=tuple(standings.values()),
        jobs={(span.lane, span.pool): tuple(jobs[span.lane, span.pool][: span.most]) for span in spans},
        whole=frozenset((span.lane, span.pool) for span in spans if len(jobs[span.lane, span.pool]) <= span.most),
        restarted=tuple(restarted.values()),
        arrivals=arrivals,
        more_arrivals=len(arrived) > _MOST_ARRIVALS,
        running=running,
        running_tenants=running_tenants,
        oldest=oldest,
        restarted_wait=restarted_wait,
    )


def _lanes_of(
    question: Question, pools: Mapping[int, Pool], items: Iterable[Arrival | WaitingJob]
) -> list[tuple[int, float]]:
    """Return the lanes of arrivals and restarted jobs, and from which time on their standings are read."""
    lanes: dict[int, float] = {}
    for item in items:
        pool = pools.get(item.pool)
        time = _ALL_TIMES
        if pool is not None:
            time = question.arrival_times.get((pool.queue, pool.job_class), _ALL_TIMES)
        lanes[item.lane] = min(time, lanes.get(item.lane, time))
    return list(lanes.items())


def _spans(
    question: Question,
    pools: Mapping[int, Pool],
    standings: Mapping[tuple[int, int], Standing],
    arrivals: Iterable[Arrival],
) -> list[Span]:
    """Return where new jobs are read: each lane and pool once."""
    asked = dict(question.pools)
    spans: dict[tuple[int, int], Span] = {}
    begun: set[int] = set()  # pools whose first standing was met
    for place, standing in standings.items():
        is_asked = standing.active and standing.time >= asked.get(standing.pool, float("inf"))
        if is_asked or standing.parked:
            is_first = is_asked and standing.pool not in begun
            begun.add(standing.pool)
            spans[place] = Span(*place, standing.head, question.first_jobs if is_first else question.other_jobs)
    least: dict[tuple[int, int], int] = {}
    for arrival in arrivals:
        if arrival.due is None:
            place = (arrival.lane, arrival.pool)
            least[place] = min(arrival.seq, least.get(place, arrival.seq))
    for place, seq in least.items():
        known = standings.get(place)
        low = min(seq, known.head) if known is not None and (known.active or known.parked) else seq
        most = spans[place].most if place in spans else question.other_jobs
        spans[place] = Span(*place, low, most)
    # A pool that was asked for and has lost its row is of this queue, or nobody would know of it.
    return [
        span
        for span in spans.values()
        if (pools[span.pool].queue == question.queue if span.pool in pools else span.pool in asked)
    ]


def look_for_arrivals_below(connection: Connection, numbers: int, seq_from: int) -> int:
    """Have the next turn handle arrivals that turns have passed by, because they were committed late, or left.

    Args:
        connection: In a transaction that has done nothing else.
        numbers: How far below what turns look at to look.
        seq_from: The least seq to look at.

    Returns:
        Where to go on after these; 0: there are no more.
    """
    lower = turns_postgresql.lower if connection.dialect.name == "postgresql" else turns_sqlite.lower
    return lower(connection, numbers, seq_from, _MOST_ARRIVALS)
