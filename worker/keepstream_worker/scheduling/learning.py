"""Learning: what a provider accepts, from what it refuses.

In: the state of a target, a moment, and what happened there.
Out: the next state, and how many streams may be let in. Pure: no clock, no I/O.

Three things are learnt about a target, each by itself:

- A **ceiling** of streams at once. There is none before the first refusal; until then the number may double with what
  the provider has accepted. A refusal far from where it is expected halves the ceiling, once for all refusals of the
  same moment; one that comes where many were accepted is not because of their number, and lowers nothing. The level of
  the refusal is remembered as the **wall**: the ceiling returns to just below it quickly and tries the next place
  beyond it seldom, so that next to nothing is refused, and a limit that was raised is found.
- A **cool-down** that all workers share, as long as the provider asks for or, if it says nothing, longer each time.
- A **circuit**: after some failures in a row, over some seconds, nothing is let in for a while; then exactly one
  stream, whose clean end opens the target again and whose failure closes it for longer. A burst of requests on which a
  provider chokes is no outage, and must not keep out those of others.

Moments are seconds since the epoch by one clock. ``started`` is the moment at which an attempt was let in and
``running`` the number of streams at the target right after that, all that were let in with it included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from keepstream.errors import ErrorCode
from keepstream_worker.limits import Limits, RateLimits
from keepstream_worker.values import Failure

FIRST_CEILING: Final = 16  #: Streams that a target is given of which nothing is known.
LONGEST_COOL_DOWN: Final = 60.0  #: Seconds, unless the provider asks for more.
LONGEST_BREAK: Final = 300.0  #: Seconds that a broken target is left alone.
FAILING_FOR: Final = 3.0  #: Seconds of failures without a success before a target counts as broken.
PROBE_PATIENCE: Final = 30.0  #: Seconds after which another stream tries a broken target, if the first says nothing.

_ROOM_PATIENCE: Final = 60.0  #: Seconds after which one more stream is let in, if nothing is heard of those before.
_SHORTEST_COOL_DOWN: Final = 0.5  #: Seconds; the first one, if the provider asks for none.
_MOST_DOUBLINGS: Final = 16  #: Keeps powers finite; each is capped long before.
_NEAR: Final = 0.9  #: A refusal at this part of the wall or above is no surprise.
_FULL: Final = 0.8  #: From this part of the ceiling on, what is accepted says something about it.
_GROWTH: Final = 1.5  #: By how much a target that never refused may be given more than it has accepted.
_RETURN: Final = 0.5  #: Places that one accepted stream adds on the way back to the wall.
_PATIENCE: Final = 100  #: Accepted streams before one more place is tried: so many refusals are one per cent.
#: The same for each place below the wall, doubled with each try in vain, and a hundred at most: with a few streams at
#: once a hundred take very long, and what was refused then may have been refused for another reason than their number.
_PATIENCE_A_PLACE: Final = 4
#: A refusal is excused, and lowers nothing, if so many streams were accepted before where it came: the square of the
#: ceiling by ten. Were it because of their number, those would have been refused as well. A provider that refuses one
#: request in ten by chance is left ten streams like this. With more streams less holds them back: beyond 31 no refusal
#: is excused, since one in a hundred is what is aimed at.
_SQUARE_OF_EXCUSED: Final = 10.0
_LEAST_EXCUSE: Final = 2.0
_FEWEST: Final = 2.0  #: A wall lower than this would leave no stream to learn by.
_PAUSE: Final = 20  #: Cool-downs before one more place is tried, since each costs places; fewer with few.
_WALL_MEMORY: Final = 600.0  #: Seconds without a refusal after which the wall is forgotten.


class Verdict(StrEnum):
    """What a failed attempt says about its target."""

    REFUSED = "refused"  #: It has no room for now; nothing is wrong with it.
    FAILED = "failed"  #: It may be broken.
    ANSWERED = "answered"  #: It works; the fault is the request's, or the account's.
    NOTHING = "nothing"  #: Nothing.


class Closed(NamedTuple):
    """Why a target takes nothing."""

    cause: str  #: ``cooling``, ``broken``, or ``probing`` while the one stream that tries it runs.
    until: float | None  #: Since the epoch; None: it is not known.


@dataclass(frozen=True, slots=True)
class TargetState:
    """What is known of a target; as it is made, nothing."""

    accepted: int = 0  #: Streams that it accepted before its first refusal, as far as they say how many it takes.
    ceiling: float | None = None  #: Streams at once; None: it has never refused one.
    wall: float | None = None  #: At so many streams it refused; None: not known, or too long ago.
    clean: float = 0.0  #: Streams accepted at the ceiling since it last changed, less what refusals there cost.
    step: int = 1  #: Places to try beyond the wall next time.
    vain: int = 0  #: Times in a row that a place beyond the wall was tried in vain.
    refused_at: float = 0.0  #: When a refusal was last heeded.
    lowered_at: float = 0.0  #: When a refusal last lowered the ceiling.
    refusals: int = 0  #: Refusals heeded in a row, without a stream accepted in between.
    room: int | None = (
        None  #: Streams that may be let in until another one is accepted; None: as many as there are places.
    )
    tried_at: float = 0.0  #: When the last of them was.
    pause: float = 0.0  #: Seconds of the last cool-down.
    cooling_until: float = 0.0
    failures: int = 0  #: In a row.
    failing_since: float = 0.0  #: When the first of them came.
    broken_until: float | None = None  #: None: the circuit is closed, and the target open.
    breaks: int = 0  #: Times in a row that it was found broken.
    probe_at: float | None = None  #: When the one stream was let in that tries a broken target.
    requests_per_minute: float | None = None  #: What the provider says of itself.
    tokens_per_minute: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether anything is known that may keep a stream out."""
        return self.ceiling is not None or self.broken_until is not None or self.cooling_until > 0 or self._has_rates

    @property
    def _has_rates(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def to_json(self) -> dict[str, Any]:
        """Return what differs from a state in which nothing is known, under short keys."""
        return {key: value for key, name in _KEYS.items() if (value := getattr(self, name)) != _DEFAULTS[name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TargetState":
        """Return the state that ``to_json`` gave; keys of another version are passed over."""
        state = cls(**{name: data[key] for key, name in _KEYS.items() if key in data})
        # A version that does not know of it lowers the ceiling with each refusal. With 0 the wall would be forgotten.
        return state if state.lowered_at else replace(state, lowered_at=state.refused_at)


_KEYS: Final = {
    "a": "accepted",
    "c": "ceiling",
    "w": "wall",
    "n": "clean",
    "s": "step",
    "v": "vain",
    "t": "refused_at",
    "l": "lowered_at",
    "r": "refusals",
    "i": "room",
    "j": "tried_at",
    "p": "pause",
    "u": "cooling_until",
    "f": "failures",
    "g": "failing_since",
    "b": "broken_until",
    "o": "breaks",
    "q": "probe_at",
    "rm": "requests_per_minute",
    "tm": "tokens_per_minute",
}
_DEFAULTS: Final = {field.name: field.default for field in fields(TargetState)}


# -- what may be let in ---------------------------------------------------------------------------


def closed(state: TargetState, now: float) -> Closed | None:
    """Return why a target takes nothing, whatever runs there; None: it is open."""
    cooling = Closed("cooling", state.cooling_until) if now < state.cooling_until else None
    if state.broken_until is None:
        return cooling
    if now < state.broken_until:
        return Closed("broken", max(state.broken_until, state.cooling_until))
    if cooling is None and state.probe_at is not None and now < state.probe_at + PROBE_PATIENCE:
        return Closed("probing", None)
    return cooling


def places(state: TargetState, now: float, running: int, limit: int | None = None) -> int:
    """Return how many more streams a target may be given.

    Args:
        state: Of the target.
        now: The moment.
        running: Streams at the target.
        limit: The configured concurrency; None: there is none.
    """
    if closed(state, now) is not None:
        return 0
    if state.broken_until is not None:
        return 1
    most = int(ceiling(state, limit))
    left = max(0, most - running)
    if state.room is None:
        return left
    # Of those that were let in nothing will be heard any more if none runs: their workers are dead.
    unheard = running == 0 or now >= state.tried_at + _ROOM_PATIENCE
    return min(left, max(1, state.room) if unheard else state.room)


def ceiling(state: TargetState, limit: int | None = None) -> float:
    """Return how many streams a target may have; ``limit`` is the configured concurrency, if there is one."""
    if state.ceiling is not None:
        return state.ceiling if limit is None else min(state.ceiling, limit)
    # Who configured a limit knows what is accepted.
    return limit if limit is not None else max(FIRST_CEILING, _GROWTH * state.accepted)


def limits(state: TargetState, configured: Limits) -> Limits:
    """Return the limits of a target: what is configured, and where that leaves it open, what the provider says."""
    return configured.or_else(Limits(None, state.requests_per_minute, state.tokens_per_minute))


# -- what happens ---------------------------------------------------------------------------------


def let_in(state: TargetState, now: float) -> TargetState:
    """A stream is given to the target."""
    if state.broken_until is not None:
        state = replace(state, probe_at=now)
    return state if state.room is None else replace(state, room=max(0, state.room - 1), tried_at=now)


def accepted(state: TargetState, now: float, *, started: float, running: int) -> TargetState:
    """The provider took the stream: it answered with a success and began to send."""
    if started <= state.refused_at:
        return state  # it says nothing about what has been refused since
    most = state.ceiling
    if most is None:
        return replace(state, accepted=state.accepted + 1) if running > state.accepted else state
    if state.refusals:
        state = replace(state, refusals=0)
    if state.room is not None:
        room = state.room + 2  # one in its place, and one more
        state = replace(state, room=room if 2 * room < most else None)
    if running < min(_FULL * most, int(most)):
        return state
    since = now - state.lowered_at
    wall = state.wall if since <= max(_WALL_MEMORY, 2 * _PAUSE * state.pause) else None
    if wall is None:
        return replace(state, ceiling=most + _RETURN, wall=None, clean=0.0)
    if most < wall - 1:
        return replace(state, ceiling=min(most + _RETURN, wall - 1), clean=0.0)
    if running < int(most):
        return state
    clean = min(state.clean + 1, _PATIENCE)
    in_vain = wall * 2**state.vain
    if clean < min(_PATIENCE, _PATIENCE_A_PLACE * in_vain) or since < min(_PAUSE, in_vain) * state.pause:
        return replace(state, clean=clean)
    # It has accepted so many for so long: the wall is not here.
    vain = 0 if most >= wall else state.vain
    return replace(state, ceiling=most + state.step, wall=most + 1, clean=0.0, step=2 * state.step, vain=vain)


def completed(state: TargetState, now: float, *, started: float) -> TargetState:
    """The stream ended cleanly."""
    return answered(state, now, started=started)


def answered(state: TargetState, now: float, *, started: float) -> TargetState:
    """The provider answered as one that works, be it with an error that is the request's own."""
    state = _heard(state, started)
    if state.broken_until is None:
        return replace(state, failures=0, failing_since=0.0) if state.failures else state
    if state.probe_at is None or started < state.probe_at:
        return state  # a stream from before
    return replace(state, failures=0, failing_since=0.0, broken_until=None, breaks=0, probe_at=None)


def refused(
    state: TargetState, now: float, *, started: float, running: int, retry_after: float | None = None
) -> TargetState:
    """The provider refused the stream, because it or its limits are exhausted.

    Args:
        state: Of the target.
        now: The moment.
        started: When the attempt was let in.
        running: Streams at the target at that moment.
        retry_after: Seconds that the provider asks to wait, if it does.
    """
    state = answered(state, now, started=started)
    asked = retry_after or 0.0
    if started <= state.refused_at:  # let in before the last refusal was known: only its wait may be news
        return replace(state, cooling_until=max(state.cooling_until, now + asked))
    refusals = state.refusals + 1
    pause = asked or min(LONGEST_COOL_DOWN, _SHORTEST_COOL_DOWN * 2.0 ** min(refusals - 1, _MOST_DOUBLINGS))
    state = replace(
        state,
        refused_at=now,
        refusals=refusals,
        pause=pause,
        cooling_until=max(state.cooling_until, now + pause),
    )
    most = state.ceiling
    if most is not None:
        # Nothing has been accepted since the last one: it is still closed, which says nothing about how many it takes.
        if refusals > 1:
            return replace(state, room=1)
        excuse = max(_LEAST_EXCUSE, most**2 / _SQUARE_OF_EXCUSED)
        if state.clean >= excuse or most < _FEWEST:
            return replace(state, clean=max(0.0, state.clean - excuse), room=1)
    return _lowered(replace(state, lowered_at=now, clean=0.0, step=1, accepted=0), max(1, running))


def _lowered(state: TargetState, level: int) -> TargetState:
    if state.wall is None or state.ceiling is None or level < _NEAR * state.wall:
        return replace(state, wall=max(_FEWEST, level), ceiling=max(1.0, level / 2), room=1)
    wall = state.wall
    if state.ceiling >= wall:  # the place beyond the wall was tried
        return replace(state, ceiling=wall - 1, vain=min(state.vain + 1, _MOST_DOUBLINGS))
    wall = max(_FEWEST, min(wall - 1, level))  # refused where it had accepted
    return replace(state, wall=wall, ceiling=wall - 1, room=1)


def _heard(state: TargetState, started: float) -> TargetState:
    """Give back the place of a stream that was let in since the last refusal and is over, or will not be heard of."""
    if state.room is None or started <= state.refused_at:
        return state
    return replace(state, room=state.room + 1)


def failed(state: TargetState, now: float, *, started: float, broken_after: int, broken_for: float) -> TargetState:
    """The stream failed in a way that may be the target's fault.

    Args:
        state: Of the target.
        now: The moment.
        started: When the attempt was let in.
        broken_after: Failures in a row, over ``FAILING_FOR`` seconds at least, after which the target counts as broken.
        broken_for: Seconds that it is left alone at first.
    """
    state = _heard(state, started)
    if state.broken_until is not None:
        if state.probe_at is None or started < state.probe_at:
            return state  # a stream from before: it is known that the target was broken
    else:
        state = replace(state, failures=state.failures + 1, failing_since=state.failing_since or now)
        if state.failures < broken_after or now - state.failing_since < FAILING_FOR:
            return state
    seconds = min(LONGEST_BREAK, broken_for * 2.0 ** min(state.breaks, _MOST_DOUBLINGS))
    return replace(state, broken_until=now + seconds, breaks=state.breaks + 1, probe_at=None)


def withdrawn(state: TargetState, now: float, *, started: float) -> TargetState:
    """The stream ended and said nothing about the target: it was cancelled, handed back or lost."""
    state = _heard(state, started)
    return replace(state, probe_at=None) if state.probe_at is not None and started >= state.probe_at else state


def told(state: TargetState, rates: RateLimits | None) -> TargetState:
    """The provider stated its limits with an answer."""
    if rates is None:
        return state
    requests, tokens = rates.requests_per_minute, rates.tokens_per_minute
    requests = state.requests_per_minute if requests is None else requests
    tokens = state.tokens_per_minute if tokens is None else tokens
    if (requests, tokens) == (state.requests_per_minute, state.tokens_per_minute):
        return state
    return replace(state, requests_per_minute=requests, tokens_per_minute=tokens)


# -- failures -------------------------------------------------------------------------------------

_FAILED: Final = frozenset(
    {
        ErrorCode.SERVER_ERROR,
        ErrorCode.PROVIDER_ERROR,
        ErrorCode.CONNECTION,
        ErrorCode.TIMEOUT,
        ErrorCode.EMPTY_STREAM,
        ErrorCode.TRUNCATED_STREAM,
        ErrorCode.INVALID_STREAM,
        ErrorCode.INVALID_RESPONSE,
    }
)


#: These are Keepstream's own, or the caller's.
_SAYS_NOTHING: Final = frozenset(
    {
        ErrorCode.TOTAL_TIMEOUT,
        ErrorCode.EXPIRED,
        ErrorCode.CANCELLED,
        ErrorCode.INTERRUPTED,
        ErrorCode.WORKER_LOST,
        ErrorCode.SUPERSEDED,
        ErrorCode.INVALID_JOB,
        ErrorCode.UNKNOWN_PROVIDER,
        ErrorCode.INTERNAL,
    }
)


def verdict_of(failure: Failure) -> Verdict:
    """Return what the failure of an attempt says about its target."""
    code = failure.code
    if code is ErrorCode.OVERLOADED:
        # A provider without capacity says when it may have some; a server that is down does not.
        down = failure.http_status == HTTPStatus.SERVICE_UNAVAILABLE and failure.retry_after is None
        return Verdict.FAILED if down else Verdict.REFUSED
    if code is ErrorCode.RATE_LIMITED:
        return Verdict.REFUSED
    if code in _SAYS_NOTHING:
        return Verdict.NOTHING
    return Verdict.FAILED if code in _FAILED else Verdict.ANSWERED
