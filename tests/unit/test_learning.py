"""What is learnt about a target: single steps, and whole runs against models of providers."""

import heapq
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.errors import ErrorCode
from keepstream_worker.limits import Limits, RateLimits
from keepstream_worker.scheduling import learning
from keepstream_worker.scheduling.learning import Closed, TargetState, Verdict, closed, places, verdict_of
from keepstream_worker.values import Failure

NOW = 1_000_000.0
BREAKS: dict[str, Any] = {"broken_after": 3, "broken_for": 10.0}


def refused(state: TargetState, now: float, *, running: int, started: float | None = None, **more: Any) -> TargetState:
    return learning.refused(state, now, started=now if started is None else started, running=running, **more)


def accepted(state: TargetState, now: float, *, running: int, times: int = 1) -> TargetState:
    for _ in range(times):
        state = learning.accepted(state, now, started=now, running=running)
    return state


def failed(state: TargetState, now: float, *, started: float | None = None, times: int = 1) -> TargetState:
    for _ in range(times):
        state = learning.failed(state, now, started=now if started is None else started, **BREAKS)
    return state


# -- the ceiling --


def test_of_a_new_target_little_is_tried_and_more_with_what_it_accepts() -> None:
    state = TargetState()
    assert not state.is_limited
    assert places(state, NOW, 0) == learning.FIRST_CEILING
    assert places(state, NOW, 10) == learning.FIRST_CEILING - 10
    state = accepted(state, NOW, running=learning.FIRST_CEILING, times=learning.FIRST_CEILING)
    assert places(state, NOW, 0) == int(1.5 * learning.FIRST_CEILING)
    # The same few streams accepted again and again prove nothing about more of them.
    assert accepted(state, NOW, running=4, times=1000) == state


def test_a_configured_concurrency_counts_from_the_start() -> None:
    assert places(TargetState(), NOW, 40, 200) == 160
    assert places(TargetState(), NOW, 0, 3) == 3
    assert places(refused(TargetState(), NOW, running=100), NOW + 1, 0, 30) == 1  # one, until it is accepted
    assert learning.ceiling(refused(TargetState(), NOW, running=100), 30) == 30


def test_refusals_of_the_same_moment_halve_once() -> None:
    state = TargetState()
    for i in range(100):
        state = refused(state, NOW + i / 1000, started=NOW - 1, running=200)
    assert learning.ceiling(state) == 100
    assert state.refusals == 1
    assert state.cooling_until == NOW + 0.5


def test_a_refusal_where_streams_were_accepted_since_halves_again() -> None:
    state = refused(TargetState(), NOW, running=200)
    state = accepted(state, NOW + 1, running=50)
    assert learning.ceiling(refused(state, NOW + 2, running=60)) == 30


def test_a_target_that_goes_on_refusing_cools_down_longer_and_keeps_its_ceiling() -> None:
    state = refused(TargetState(), NOW, running=200)
    pauses = []
    for i in range(1, 10):
        state = refused(state, NOW + 100 * i, running=1)
        pauses.append(state.cooling_until - (NOW + 100 * i))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert learning.ceiling(state) == 100


def test_what_the_provider_asks_is_waited_for_and_never_shortened() -> None:
    state = refused(TargetState(), NOW, running=10, retry_after=20.0)
    assert closed(state, NOW + 19) == Closed("cooling", NOW + 20)
    assert places(state, NOW + 19, 0) == 0
    # Another stream of the same moment is told less, or more.
    assert refused(state, NOW + 1, started=NOW - 1, running=10, retry_after=5.0).cooling_until == NOW + 20
    assert refused(state, NOW + 1, started=NOW - 1, running=10, retry_after=50.0).cooling_until == NOW + 51
    assert closed(state, NOW + 20) is None


def test_after_a_cool_down_one_stream_goes_first_and_each_accepted_one_lets_in_more() -> None:
    state = refused(TargetState(), NOW, running=200)
    now = NOW + 1
    assert places(state, now, 0) == 1
    state = learning.let_in(state, now)
    assert places(state, now, 1) == 0
    state = learning.accepted(state, now, started=now, running=1)
    assert places(state, now, 1) == 2
    state = learning.let_in(learning.let_in(state, now), now)
    state = accepted(state, now, running=3, times=2)
    assert places(state, now, 3) == 4


@pytest.mark.parametrize("end", [learning.withdrawn, learning.answered, learning.completed])
def test_a_first_stream_that_ends_without_being_accepted_makes_room_for_another(
    end: Callable[..., TargetState],
) -> None:
    state = learning.let_in(refused(TargetState(), NOW, running=200), NOW + 1)
    assert places(state, NOW + 2, 1) == 0
    assert places(end(state, NOW + 2, started=NOW + 1), NOW + 2, 1) == 1
    assert places(end(state, NOW + 2, started=NOW - 1), NOW + 2, 1) == 0  # that was one from before


def test_a_first_stream_of_which_nothing_is_heard_does_not_close_the_target_for_ever() -> None:
    state = learning.let_in(refused(TargetState(), NOW, running=200), NOW + 1)
    assert places(state, NOW + 60, 1) == 0
    assert places(state, NOW + 62, 1) == 1


def test_a_target_that_refuses_even_single_streams_is_given_one_again() -> None:
    state, now = TargetState(), NOW
    for _ in range(3):
        state = refused(state, now, running=1)
        now = state.cooling_until
        state = learning.let_in(state, now)
        state = accepted(state, now, running=1)
        assert learning.ceiling(state) >= 1
        now += 1
        assert places(state, now, 0) == 1


def test_streams_that_died_with_their_workers_do_not_close_a_target() -> None:
    state = learning.let_in(refused(TargetState(), NOW, running=200), NOW + 1)
    assert places(state, NOW + 2, 1) == 0
    assert places(state, NOW + 2, 0) == 1  # nobody is left who could tell


def test_the_ceiling_returns_quickly_to_just_below_the_wall_and_passes_it_slowly() -> None:
    state = refused(TargetState(), NOW, running=51)
    state = accepted(state, NOW + 1, running=51, times=50)
    assert learning.ceiling(state) == 50
    state = accepted(state, NOW + 1, running=50, times=99)
    assert learning.ceiling(state) == 50
    state = accepted(state, NOW + 20, running=50)
    assert learning.ceiling(state) == 51
    # Refused there, it goes back by one place and is not halved.
    state = refused(state, NOW + 21, running=51)
    assert learning.ceiling(state) == 50


def test_a_target_of_few_places_is_tried_sooner_and_the_more_seldom_the_more_often_in_vain() -> None:
    state, now, tries = refused(TargetState(), NOW, running=2), NOW, []
    for _ in range(6):
        now += 40
        times = 0
        while learning.ceiling(state) < 2:
            state = accepted(state, now, running=1)
            times += 1
        tries.append(times)
        state = refused(state, now + 1, running=2)
        assert learning.ceiling(state) == 1
    assert tries == [8, 16, 32, 64, 100, 100]


def test_after_a_refusal_that_had_another_reason_a_target_has_its_streams_back_soon() -> None:
    """As a limit of requests a minute, met while few streams run."""
    state = refused(TargetState(), NOW, running=1)
    now, streams = NOW, 0
    while learning.ceiling(state) < 50 and streams < 1000:
        running = int(learning.ceiling(state))
        now += 10.0  # which each stream takes
        state = accepted(state, now, running=running, times=running)
        streams += running
    assert now - NOW < 600
    assert streams < 400


def test_a_place_beyond_the_wall_is_tried_the_more_seldom_the_longer_the_provider_asks_to_wait() -> None:
    state = refused(TargetState(), NOW, running=51, retry_after=60.0)
    state = accepted(state, NOW + 61, running=51, times=1000)
    assert learning.ceiling(state) == 50
    assert learning.ceiling(accepted(state, NOW + 1200, running=50)) == 51


def test_a_refusal_where_many_were_accepted_lowers_nothing_and_is_excused_once() -> None:
    state = accepted(refused(TargetState(), NOW, running=21), NOW + 1, running=21, times=20)
    assert learning.ceiling(state) == 20
    state = accepted(state, NOW + 2, running=20, times=60)
    for i in range(2):  # each costs 40
        state = refused(state, NOW + 3 + 10 * i, running=20)
        assert closed(state, NOW + 3 + 10 * i) is not None
        assert places(state, NOW + 9 + 10 * i, 0) == 1
        state = accepted(state, NOW + 9 + 10 * i, running=20)
        assert learning.ceiling(state) == (20 if i == 0 else 19)


def test_a_single_stream_that_is_refused_now_and_then_does_not_stay_alone() -> None:
    state, now = TargetState(), NOW
    for stream in range(200):
        now += 5
        if stream % 10 == 0:
            state = refused(state, now, running=int(learning.ceiling(state)) if state.ceiling else 1)
        else:
            state = accepted(state, now, running=int(learning.ceiling(state)))
    assert learning.ceiling(state) >= 4


@pytest.mark.parametrize("ceiling", [1.5, 2.5, 3.5])
def test_a_part_of_a_place_keeps_no_ceiling_down(ceiling: float) -> None:
    state = TargetState(ceiling=ceiling, wall=10.0, refused_at=NOW, lowered_at=NOW)
    assert learning.ceiling(accepted(state, NOW + 1, running=int(ceiling))) > ceiling


def test_a_limit_that_was_lowered_is_found() -> None:
    state = accepted(refused(TargetState(), NOW, running=51), NOW + 1, running=51, times=50)
    state = refused(state, NOW + 2, running=20)
    assert learning.ceiling(state) == 10
    assert learning.ceiling(accepted(state, NOW + 3, running=20, times=100)) == 19


def test_a_wall_of_long_ago_is_forgotten() -> None:
    state = refused(TargetState(), NOW, running=10)
    state = accepted(state, NOW + 700, running=20, times=20)
    assert learning.ceiling(state) == 5 + 10


# -- the circuit --


def broken() -> TargetState:
    state = failed(failed(TargetState(), NOW - learning.FAILING_FOR), NOW, times=2)
    assert closed(state, NOW) == Closed("broken", NOW + 10)
    return state


def test_some_failures_in_a_row_close_a_target_and_others_do_not() -> None:
    state = failed(TargetState(), NOW - 5, times=2)
    state = learning.completed(state, NOW - 4, started=NOW - 5)
    state = failed(state, NOW - 4, times=2)
    assert closed(state, NOW - 4) is None
    state = failed(state, NOW)
    assert closed(state, NOW) == Closed("broken", NOW + 10)
    assert state.is_limited


def test_a_burst_of_failures_closes_no_target() -> None:
    state = failed(TargetState(), NOW, times=100)
    state = failed(state, NOW + learning.FAILING_FOR - 0.1, times=100)
    assert closed(state, NOW + learning.FAILING_FOR) is None
    assert closed(failed(state, NOW + learning.FAILING_FOR), NOW + learning.FAILING_FOR) is not None
    # A success in between: what fails from then on is another row.
    state = learning.completed(state, NOW + 2, started=NOW + 1)
    assert closed(failed(state, NOW + 4, times=100), NOW + 4) is None


def test_a_broken_target_is_tried_by_exactly_one_stream() -> None:
    state = broken()
    assert places(state, NOW + 9, 0) == 0
    assert places(state, NOW + 10, 0) == 1
    assert places(state, NOW + 10, 500) == 1  # streams from before may still run
    state = learning.let_in(state, NOW + 10)
    assert closed(state, NOW + 11) == Closed("probing", None)
    assert places(state, NOW + 11, 0) == 0
    # What was let in before says nothing.
    assert learning.completed(state, NOW + 12, started=NOW) == state
    assert failed(state, NOW + 12, started=NOW) == state
    opened = learning.completed(state, NOW + 12, started=NOW + 10)
    assert closed(opened, NOW + 12) is None
    assert opened == TargetState()


def test_each_stream_that_tries_in_vain_closes_it_for_longer() -> None:
    state = broken()
    now, times = NOW, []
    for _ in range(7):
        now = state.broken_until or 0
        state = failed(learning.let_in(state, now), now + 1, started=now)
        times.append((state.broken_until or 0) - (now + 1))
    assert times == [20, 40, 80, 160, 300, 300, 300]


def test_a_try_that_was_cancelled_makes_room_for_another() -> None:
    state = learning.let_in(broken(), NOW + 10)
    assert places(learning.withdrawn(state, NOW + 11, started=NOW + 10), NOW + 11, 0) == 1
    assert places(state, NOW + 11 + learning.PROBE_PATIENCE, 0) == 1  # its worker died, and nobody told


def test_a_refusal_shows_that_a_target_lives() -> None:
    state = learning.let_in(broken(), NOW + 10)
    state = refused(state, NOW + 11, started=NOW + 10, running=1)
    assert closed(state, NOW + 11) == Closed("cooling", NOW + 11.5)
    assert closed(state, NOW + 12) is None


# -- what is said --


def test_headers_fill_what_the_configuration_leaves_open() -> None:
    state = learning.told(TargetState(), RateLimits(requests_per_minute=500, tokens_per_minute=30_000))
    assert learning.limits(state, Limits(concurrency=7, requests_per_minute=60)) == Limits(7, 60, 30_000)
    assert learning.told(state, RateLimits(tokens_per_minute=40_000)).requests_per_minute == 500
    assert learning.told(state, None) is state
    assert learning.told(state, RateLimits(remaining_tokens=1)) is state
    assert state.is_limited


@pytest.mark.parametrize(
    ("code", "more", "verdict"),
    [
        (ErrorCode.RATE_LIMITED, {"http_status": 429}, Verdict.REFUSED),
        (ErrorCode.OVERLOADED, {"http_status": 529}, Verdict.REFUSED),
        (ErrorCode.OVERLOADED, {"http_status": 503, "retry_after": 3.0}, Verdict.REFUSED),
        (ErrorCode.OVERLOADED, {"http_status": 503}, Verdict.FAILED),
        (ErrorCode.SERVER_ERROR, {"http_status": 500}, Verdict.FAILED),
        (ErrorCode.CONNECTION, {}, Verdict.FAILED),
        (ErrorCode.NOT_FOUND, {"http_status": 404}, Verdict.ANSWERED),
        (ErrorCode.BAD_REQUEST, {"http_status": 400}, Verdict.ANSWERED),
        (ErrorCode.CANCELLED, {}, Verdict.NOTHING),
        (ErrorCode.WORKER_LOST, {}, Verdict.NOTHING),
    ],
)
def test_what_a_failure_says_about_its_target(code: ErrorCode, more: dict[str, Any], verdict: Verdict) -> None:
    assert verdict_of(Failure(code, "", **more)) is verdict


def test_every_code_has_a_verdict() -> None:
    assert {verdict_of(Failure(code, "")) for code in ErrorCode} == set(Verdict)


# -- whatever happens --

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["let_in", "accepted", "completed", "answered", "refused", "failed", "withdrawn"]),
        st.floats(0, 100),  # seconds since the event before
        st.floats(0, 50),  # seconds since it was let in
        st.integers(1, 3) | st.integers(1, 300),
        st.none() | st.floats(0, 100),
    ),
    max_size=60,
)


def after(events: list[tuple[str, float, float, int, float | None]]) -> tuple[TargetState, float]:
    state, now = TargetState(), NOW
    for name, passed, age, running, retry_after in events:
        now += passed
        match name:
            case "let_in":
                state = learning.let_in(state, now)
            case "accepted":
                state = learning.accepted(state, now, started=now - age, running=running)
            case "refused":
                state = refused(state, now, started=now - age, running=running, retry_after=retry_after)
            case "failed":
                state = failed(state, now, started=now - age)
            case _:
                state = getattr(learning, name)(state, now, started=now - age)
    return state, now


@given(EVENTS)
def test_a_state_survives_its_way_through_the_database(events: list[tuple[str, float, float, int, float | None]]):
    state, _ = after(events)
    stored = json.loads(json.dumps(state.to_json() | {"of a later version": 1}))
    assert TargetState.from_json(stored) == state
    assert TargetState().to_json() == {}


@given(EVENTS, st.integers(0, 300), st.none() | st.integers(1, 50))
def test_a_target_is_never_closed_for_ever(
    events: list[tuple[str, float, float, int, float | None]], running: int, limit: int | None
):
    state, now = after(events)
    assert 0 <= places(state, now, running, limit) <= max(1, learning.ceiling(state, limit))
    assert learning.ceiling(state, limit) >= 1
    later = now + learning.LONGEST_BREAK + learning.PROBE_PATIENCE
    assert closed(state, later) is None
    assert places(state, later, 0, limit) >= 1


# -- whole runs --


class Model(Protocol):
    """A provider."""

    def ask(self, now: float) -> float | None:
        """Return None if a stream is accepted, else what ``Retry-After`` says (0: nothing)."""

    def end(self) -> None:
        """A stream has ended."""


class Concurrency:
    """A provider with so many places."""

    def __init__(self, most: int, retry_after: float = 0.0) -> None:
        self.most = most
        self.streams = 0
        self._retry_after = retry_after

    def ask(self, now: float) -> float | None:
        if self.streams >= self.most:
            return self._retry_after
        self.streams += 1
        return None

    def end(self) -> None:
        self.streams -= 1


class Chance:
    """A provider that refuses some requests, whatever runs."""

    def __init__(self, share: float, retry_after: float = 0.0) -> None:
        self._share = share
        self._retry_after = retry_after
        self._random = Random(7)

    def ask(self, now: float) -> float | None:
        return self._retry_after if self._random.random() < self._share else None

    def end(self) -> None:
        pass


class Bucket:
    """A provider that allows so many requests a minute, at a steady rate or saved up."""

    def __init__(self, per_minute: int) -> None:
        self._per_second = per_minute / 60
        self._most = self._level = float(per_minute)
        self._at = 0.0

    def ask(self, now: float) -> float | None:
        self._level = min(self._most, self._level + (now - self._at) * self._per_second)
        self._at = now
        if self._level < 1:
            return (1 - self._level) / self._per_second
        self._level -= 1
        return None

    def end(self) -> None:
        pass


class Windows:
    """A provider that allows so many requests from each minute's beginning to its end."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._minute = -1
        self._requests = 0

    def ask(self, now: float) -> float | None:
        minute = int(now // 60)
        if minute != self._minute:
            self._minute, self._requests = minute, 0
        if self._requests >= self._per_minute:
            return 60 * (minute + 1) - now
        self._requests += 1
        return None

    def end(self) -> None:
        pass


@dataclass
class Figures:
    accepted: int = 0
    refused: int = 0
    refused_later: int = 0  #: After the first minute.
    stream_seconds: float = 0.0

    @property
    def share_refused(self) -> float:
        return self.refused / (self.accepted + self.refused)


def simulate(
    model: Model,
    seconds: float,
    length: Callable[[Random], float],
    *,
    latency: float = 0.1,
    change: tuple[float, Callable[[], None]] | None = None,
    between: Callable[[TargetState], TargetState] = lambda state: state,
) -> Figures:
    """Run a deployment with more jobs than it has places against a model; return what came of it.

    ``between`` has the state after each answer that was heard, and returns that with which it goes on.
    """
    random = Random(1)
    figures, state, running = Figures(), TargetState(), 0
    start = now = 60_000.0
    order = itertools.count()
    events: list[tuple[float, int, Callable[[], None]]] = []

    def at(moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(events, (moment, next(order), event))

    def choose() -> None:
        nonlocal state, running
        free = min(places(state, now, running), 1000 - running)
        running += free
        for _ in range(free):
            state = learning.let_in(state, now)
            at(now + latency * random.uniform(0.3, 1.0), lambda started=now, level=running: ask(started, level))  # type: ignore[misc]
        if not free and (reason := closed(state, now)) and reason.until:
            at(reason.until + 0.001, choose)

    def ask(started: float, level: int) -> None:
        wait = model.ask(now)
        if wait is not None:
            figures.refused += 1
            figures.refused_later += now > start + 60
            at(now + latency / 2, lambda: hear_refusal(started, level, wait))
            return
        figures.accepted += 1
        takes = length(random)
        figures.stream_seconds += min(takes, max(0.0, start + seconds - now))
        at(now + latency / 2, lambda: hear_acceptance(started, level))
        at(now + takes, model.end)
        at(now + takes + latency / 4, lambda: hear_end(started))

    def hear_acceptance(started: float, level: int) -> None:
        nonlocal state
        state = between(learning.accepted(state, now, started=started, running=level))
        choose()

    def hear_refusal(started: float, level: int, wait: float) -> None:
        nonlocal state, running
        running -= 1
        state = between(refused(state, now, started=started, running=level, retry_after=wait or None))
        choose()

    def hear_end(started: float) -> None:
        nonlocal state, running
        running -= 1
        state = between(learning.completed(state, now, started=started))
        choose()

    if change is not None:
        at(start + change[0], change[1])
    at(start, choose)
    while events[0][0] < start + seconds:
        now, _, event = heapq.heappop(events)
        event()
    return figures


STEADY = pytest.param(lambda random: 5.0, id="all 5 s")
MIXED = pytest.param(lambda random: random.expovariate(1 / 5), id="5 s on average")
SHORT = pytest.param(lambda random: random.expovariate(1), id="1 s on average")


@pytest.mark.parametrize("retry_after", [0.0, 1.0], ids=["silent", "retry-after"])
@pytest.mark.parametrize("length", [STEADY, MIXED])
def test_fifty_places_are_found_and_kept_in_use(length: Callable[[Random], float], retry_after: float) -> None:
    figures = simulate(Concurrency(50, retry_after), 300, length)
    used = figures.stream_seconds / (50 * 300)
    print(f"{figures.share_refused:.1%} of {figures.accepted} refused, {used:.1%} used")  # noqa: T201
    assert figures.accepted > 2500
    assert figures.share_refused <= 0.03
    assert used >= 0.9


def test_fifty_places_are_kept_in_use_while_a_version_before_is_at_work() -> None:
    """It does not know when the ceiling was lowered last, and leaves that out of what it writes."""
    random = Random(3)

    def between(state: TargetState) -> TargetState:
        stored = state.to_json()
        if random.random() < 0.5:  # every second turn is one of the version before
            stored.pop("l", None)
        return TargetState.from_json(stored)

    figures = simulate(Concurrency(50), 300, lambda random: random.expovariate(1 / 5), between=between)
    assert figures.share_refused <= 0.03
    assert figures.stream_seconds / (50 * 300) >= 0.9


def test_places_are_kept_in_use_where_the_provider_is_slow_to_answer() -> None:
    figures = simulate(Concurrency(50), 600, lambda random: random.expovariate(1 / 20), latency=1.0)
    assert figures.share_refused <= 0.03
    assert figures.stream_seconds / (50 * 600) >= 0.85  # each place waits for its next stream for a second


@pytest.mark.parametrize("most", [10, 200], ids=["lowered", "raised"])
def test_places_that_become_fewer_or_more_are_found(most: int) -> None:
    model = Concurrency(50)

    def change() -> None:
        model.most = most

    figures = simulate(model, 300, lambda random: random.expovariate(1), change=(60, change))
    assert figures.share_refused <= 0.03
    assert figures.stream_seconds / (50 * 60 + most * 240) >= 0.7
    assert model.streams <= most


@pytest.mark.parametrize("model", [Bucket(600), Windows(600)], ids=["bucket", "windows"])
def test_a_rate_is_kept_although_only_streams_are_counted(model: Model) -> None:
    """Providers that state their rates are not met like this: their rates are kept from the first answer on."""
    figures = simulate(model, 300, lambda random: random.expovariate(1 / 5))
    later = figures.refused_later / (4 * 600)
    print(f"{later:.1%} refused after the first minute, {figures.accepted} accepted")  # noqa: T201
    assert later <= 0.05
    assert figures.accepted >= 0.9 * 3000


@pytest.mark.parametrize("retry_after", [0.0, 1.0], ids=["silent", "retry-after"])
@pytest.mark.parametrize(("share", "streams"), [(0.02, 15), (0.05, 6), (0.1, 4), (0.2, 2)])
def test_refusals_that_come_by_chance_do_not_leave_a_target_with_one_stream(
    share: float, streams: float, retry_after: float
) -> None:
    figures = simulate(Chance(share, retry_after), 600, lambda random: random.expovariate(1 / 5))
    used = figures.stream_seconds / 600
    print(f"{share:.0%} refused: {used:.1f} streams at once")  # noqa: T201
    assert used >= streams


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_few_places_are_kept_in_use(most: int) -> None:
    figures = simulate(Concurrency(most, 1.0), 600, lambda random: random.expovariate(1))
    used = figures.stream_seconds / (most * 600)
    print(f"{most}: {figures.share_refused:.1%} refused, {used:.1%} used")  # noqa: T201
    assert used >= 0.8
    assert figures.share_refused <= 0.06
