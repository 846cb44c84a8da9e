"""Observations: what workers have learned since their last turn, and tell at the next.

In: claims and their endings.  Out: values, to ``Choice``, which applies them in order before it chooses.

They are kept in the worker until they are told; with a worker that dies they are lost, and an estimate stays what it
was.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Protocol

from keepstream_worker.limits import RateLimits
from keepstream_worker.scheduling.learning import Verdict, verdict_of
from keepstream_worker.turn import Pick
from keepstream_worker.values import Ending, JobKey, Outcome, Target


class End(StrEnum):
    """How an attempt ended, as far as its target is concerned."""

    COMPLETED = "completed"
    ANSWERED = "answered"  #: By an error that is the request's own.
    REFUSED = "refused"  #: It has no room for now.
    FAILED = "failed"  #: It may be broken.
    WITHDRAWN = "withdrawn"  #: It says nothing of the target: cancelled, handed back, lost.


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attempt was let in, and when."""

    lane: int
    pool: int
    tenant: str
    job_class: str
    target: Target
    chosen_at: float = 0.0  #: Moment of the turn that let it in.
    running: int = 0  #: Streams at the target after that turn; 0: it was let in without one, so nobody counted them.


@dataclass(frozen=True, slots=True)
class Charged:
    """A job was started without a turn: nothing waited, and nothing was limited."""

    place: Place
    tokens: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The provider has begun to answer."""

    place: Place


@dataclass(frozen=True, slots=True)
class Settled:
    """An attempt has ended, and its tenant has a place again."""

    place: Place
    estimated: int  #: Tokens charged when it was let in.
    actual: int | None  #: Tokens taken; None: unknown, and the estimate stands.
    output: int | None  #: Tokens of the answer, if it was whole.
    end: End
    retry_after: float | None = None  #: Seconds that a refusal asks to wait.
    rates: RateLimits | None = None  #: What the provider says of its limits.


Observation = Charged | Accepted | Settled

_VERDICTS: Final = {
    Verdict.REFUSED: End.REFUSED,
    Verdict.FAILED: End.FAILED,
    Verdict.ANSWERED: End.ANSWERED,
    Verdict.NOTHING: End.WITHDRAWN,
}
#: Endings of attempts about which their targets can do nothing.
_WITHDRAWN: Final = frozenset(
    {Outcome.CANCELLED, Outcome.INTERRUPTED, Outcome.LOST, Outcome.RECOVERED, Outcome.UNSTARTED}
)


class Placed(Protocol):
    """What is to be known of a job that was let in: the store's, which this module need not know."""

    @property
    def key(self) -> JobKey: ...  # noqa: D102
    @property
    def lane(self) -> int: ...  # noqa: D102
    @property
    def pool(self) -> int: ...  # noqa: D102
    @property
    def job_class(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> Target: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def chosen_at(self) -> float: ...  # noqa: D102


class Claimed(Placed, Protocol):
    """A job that is to run here."""

    @property
    def running(self) -> int: ...  # noqa: D102


class Released(Placed, Protocol):
    """A job that was taken from its worker."""

    @property
    def begun(self) -> bool: ...  # noqa: D102


def charge_of(claim: Claimed) -> Observation:
    """Return what is told of a job that was started without a turn."""
    return Charged(_place(claim, claim.running), claim.tokens)


def accepted_of(claim: Claimed) -> Observation:
    """Return what is told when a provider has begun to answer."""
    return Accepted(_place(claim, claim.running))


def observation_of(claim: Claimed, ending: Ending) -> Observation:
    """Return what is told of an attempt that has ended."""
    failure = ending.failure
    rates = ending.rate_limits
    if ending.outcome in _WITHDRAWN or failure is None:
        end = End.WITHDRAWN if ending.outcome in _WITHDRAWN else End.COMPLETED
        retry_after = None
    else:
        end = _VERDICTS[verdict_of(failure)]
        retry_after = failure.retry_after
        rates = rates or failure.rate_limits
    return Settled(
        place=_place(claim, claim.running),
        estimated=claim.tokens,
        actual=_taken(ending),
        output=ending.usage.completion_tokens if end is End.COMPLETED else None,
        end=end,
        retry_after=retry_after,
        rates=rates,
    )


def withdrawn_of(pick: Pick) -> Observation:
    """Return what is told of a job that a turn has picked and that does not begin: it takes nothing."""
    job = pick.job
    place = Place(job.lane, job.pool, job.key.tenant, pick.job_class, pick.target, pick.chosen_at, pick.running)
    return Settled(place, estimated=pick.tokens, actual=0, output=None, end=End.WITHDRAWN)


def lost_of(released: Released) -> Observation:
    """Return what is told of a job that was taken from a worker which did not run it: if it had begun, nobody knows."""
    actual = None if released.begun else 0
    return Settled(_place(released), estimated=released.tokens, actual=actual, output=None, end=End.WITHDRAWN)


def merged(observations: Iterable[Observation], most: int) -> list[Observation]:
    """Return what many observations say in few: of each kind, lane and target one; at most ``most``, the newest.

    What attempts have taken is summed. Of how they ended the newest counts, as it would if all were told.
    """
    found: dict[tuple[object, ...], Observation] = {}
    for observation in observations:
        place = observation.place
        end = observation.end if isinstance(observation, Settled) else None
        key = (type(observation), end, place.lane, place.pool, place.target)
        earlier = found.pop(key, None)  # and in again behind the others: order is that of the newest
        found[key] = observation if earlier is None else _together(earlier, observation)
    return list(found.values())[-most:]


def _together(earlier: Observation, later: Observation) -> Observation:
    if isinstance(earlier, Charged) and isinstance(later, Charged):
        return replace(later, tokens=earlier.tokens + later.tokens)
    if isinstance(earlier, Settled) and isinstance(later, Settled):
        return replace(
            later,
            estimated=earlier.estimated + later.estimated,
            actual=_known(earlier) + _known(later),
            output=earlier.output if later.output is None else later.output,
            rates=later.rates or earlier.rates,
        )
    return later


def _known(settled: Settled) -> int:
    return settled.estimated if settled.actual is None else settled.actual


def is_refusal(ending: Ending) -> bool:
    """Whether an ending should be told at once: its target has no room."""
    return (
        ending.failure is not None
        and ending.outcome not in _WITHDRAWN
        and verdict_of(ending.failure) is Verdict.REFUSED
    )


def _taken(ending: Ending) -> int | None:
    """Return the tokens that an attempt has taken; None: nobody knows."""
    if ending.usage.total_tokens is not None:
        return ending.usage.total_tokens
    if ending.outcome in (Outcome.RECOVERED, Outcome.UNSTARTED):
        return 0  # no request was made
    refused = ending.failure is not None and ending.failure.http_status is not None
    return 0 if refused and ending.first_token_ms is None else None


def _place(job: Placed, running: int = 0) -> Place:
    return Place(job.lane, job.pool, job.key.tenant, job.job_class, job.target, job.chosen_at, running)
