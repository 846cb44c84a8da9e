"""What the statements of a turn answer.

In: nothing.  Out: values, from the statements of each database to ``keepstream_worker.store.turns``.
"""

from typing import NamedTuple

from keepstream_worker.turn import Arrival


class Newest(NamedTuple):
    """What the newest turn has left, and what has arrived since."""

    n: int  #: 0: there was no turn yet.
    state: str
    now: float
    arrivals: tuple[Arrival, ...]


class Span(NamedTuple):
    """Where new jobs are read."""

    lane: int
    pool: int
    low: int  #: The least seq.
    most: int  #: Jobs that are wanted; one more is read, to know whether there are more.


class Written(NamedTuple):
    """What was written."""

    taken: frozenset[int]  #: The seqs of the picks that could be taken.
    moved: int  #: Standings that were found as they had been read.
