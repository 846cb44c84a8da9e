"""A follower gives every event once and in order and always comes to an end, whatever the world does to it.

The world here is simulated: a worker that publishes, a Redis that loses connections and data, a
database that comes and goes, and a clock that costs nothing.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstream.client.follower import (
    LOG_PAGE,
    DisconnectedError,
    Follower,
    Interruption,
    Listen,
    LogEntry,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
    parse_cursor,
)
from keepstream.client.payloads import TYPED, Payload
from keepstream.errors import (
    EventsLostError,
    FollowTimeoutError,
    InvalidCursorError,
    JobNotFoundError,
    StoreUnavailableError,
)
from keepstream.events import Event, Snapshot
from keepstream.names import EventId, parse_event_id
from keepstream.results import AttemptResult, Choice, CompletionResult, JobStatus, JobSummary, WaitingFor, output_sha256
from keepstream.transcript import Transcript
from tests.event_texts import attempt_failed, attempt_finished, delta, ended, snapshot, started

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: A first attempt that fails, and a second one that does not.
HISTORY = [
    started("1-1"),
    *(delta(f"1-{n}", f"void{n} ") for n in range(2, 6)),
    attempt_failed("1-6"),
    started("2-1", "retry"),
    *(delta(f"2-{n}", f"word{n} ") for n in range(2, 12)),
    attempt_finished("2-12"),
    ended("2-13", "completed", "".join(f"word{n} " for n in range(2, 12))),
]
TEXT = "".join(f"word{n} " for n in range(2, 12))


def id_of(text: str) -> EventId:
    return parse_event_id(json.loads(text)["id"])


class World:
    """A job's surroundings; every operation of the follower is answered from here."""

    def __init__(self, history: list[str] = HISTORY, *, row: bool = True) -> None:
        self.now = 0.0
        self.to_publish = list(history)
        self.row = row
        self.attempt = 0
        self.log: dict[EventId, str] = {}
        self.channel: list[str] = []
        self.subscribed = False
        self.redis_is_up = True
        self.database_is_up = True
        self.committed = False
        self.operations: list[Operation] = []
        self.waiting_for: WaitingFor | None = None
        self.reports: list[WaitingFor] = []
        self.at_once: Callable[[], int] = lambda: 1  # how many messages a follower gets at once
        self.pause = 0.0
        self.overrun = False  # whether messages have been given up

    def publish(self, count: int = 1) -> None:
        """Publish as the worker does: log and channel in one step, and a snapshot where the log has a hole."""
        for _ in range(min(count, len(self.to_publish))):
            if len(self.to_publish) == 1:
                self.committed = True  # commit, then tell
            if not self.redis_is_up:
                return
            text = self.to_publish.pop(0)
            here = id_of(text)
            self.attempt = here.attempt
            if here.n > 1 and EventId(here.attempt, here.n - 1) not in self.log:
                before = EventId(here.attempt, here.n - 1)
                if "job." not in json.loads(text)["type"]:
                    text = snapshot(str(here), self.text_until(here), finished="finished" in text)
                else:
                    self.append(snapshot(str(before), self.text_until(before), finished=True))
            self.append(text)

    def append(self, text: str) -> None:
        self.log[id_of(text)] = text
        if self.subscribed:
            self.channel.append(text)

    @staticmethod
    def text_until(last: EventId) -> str:
        events = [json.loads(text) for text in HISTORY if id_of(text) <= last and id_of(text).attempt == last.attempt]
        if any(event["type"] == "attempt.failed" for event in events):
            return ""
        return "".join(event["delta"]["content"] for event in events if event["type"] == "delta")

    def disconnect(self) -> None:
        self.subscribed = self.overrun = False
        self.channel.clear()

    def overflow(self) -> None:
        """Give up what has arrived, as for a reader that is too slow."""
        self.overrun = self.subscribed
        self.channel.clear()

    def restart_redis_empty(self) -> None:
        self.disconnect()
        self.log.clear()

    def perform(self, operation: Operation) -> Any:
        self.operations.append(operation)
        match operation:
            case Sleep(seconds):
                self.now += seconds
                return None
            case ReadSummary(unless_message=True) if self.channel or self.overrun:
                return Interruption()
            case ReadSummary() | ReadResult():
                if not self.database_is_up:
                    raise StoreUnavailableError("the database does not answer")
                return (self.summary() if isinstance(operation, ReadSummary) else self.result()) if self.row else None
        if not self.redis_is_up or (isinstance(operation, Listen) and not self.subscribed):
            self.disconnect()
            raise DisconnectedError("it does not answer (Connection refused)")
        match operation:
            case Subscribe():
                self.disconnect()
                self.subscribed = True
            case Listen(seconds, pass_on):
                assert seconds > 0
                if self.overrun:
                    self.overrun = False
                    return None
                while self.channel and pass_on is not None and pass_on(Payload(self.channel[0].encode())):
                    self.channel.pop(0)
                if self.channel:
                    count = self.at_once()
                    arrived, self.channel = self.channel[:count], self.channel[count:]
                    return [Payload(text.encode()) for text in arrived]
                self.now += seconds
                return []
            case ReadLog(after):
                since = parse_event_id(after) if after else EventId(0, 0)
                entries = [
                    LogEntry(str(here), Payload(text.encode()))
                    for here, text in sorted(self.log.items())
                    if here > since
                ]
                return entries[:LOG_PAGE]
            case ReadNewest():
                return LogEntry(str(max(self.log)), Payload(self.log[max(self.log)].encode())) if self.log else None
        return None

    @property
    def status(self) -> JobStatus:
        return JobStatus.COMPLETED if self.committed else JobStatus.RUNNING

    def summary(self) -> JobSummary:
        return JobSummary(
            id="j",
            tenant="t",
            status=JobStatus.QUEUED if self.waiting_for else self.status,
            model="m",
            provider="p",
            created_at=NOON,
            attempt=self.attempt,
            waiting_for=self.waiting_for,
        )

    def result(self) -> CompletionResult:
        tries = [
            AttemptResult(number=n, reason="first", outcome=None, provider="p", model="m", started_at=NOON)
            for n in (1, 2)
        ]
        return CompletionResult(
            **self.summary().model_dump(),
            choices=[Choice(index=0, content=TEXT, finish_reason="stop")],
            output_sha256=output_sha256([TEXT]),
            terminal_event_id="2-13",
            attempts=tries,
        )

    def follow(
        self, after: str | None = None, *, timeout: float = 60, not_found_after: float = 10, **given: Any
    ) -> Iterator[Event]:
        """Follow the job as a client does."""
        follower = Follower(
            "job-1",
            parse_cursor(after),
            form=TYPED,
            has_database=given.get("has_database", True),
            timeout=timeout,
            not_found_after=not_found_after,
            report=self.reports.append,
            offer=given.get("offer"),
            total_timeout=given.get("total_timeout", math.inf),
            pause=lambda: self.pause,
            clock=lambda: self.now,
        )
        run = follower.run()
        try:
            operation = next(run)
            while True:
                if not isinstance(operation, Operation):
                    yield operation
                    operation = next(run)
                    continue
                try:
                    answer = self.perform(operation)
                except (DisconnectedError, StoreUnavailableError) as error:
                    operation = run.throw(error)
                else:
                    operation = run.send(answer)
        except StopIteration:
            return


def ids(events: Iterator[Event]) -> list[str]:
    return [event.id for event in events]


ALL = [str(id_of(text)) for text in HISTORY]


def test_a_finished_log_is_replayed_whole() -> None:
    world = World()
    world.publish(99)
    assert ids(world.follow()) == ALL


def test_a_follower_subscribes_before_it_reads_the_log() -> None:
    world = World()
    world.publish(99)
    list(world.follow())
    assert [type(operation) for operation in world.operations[:2]] == [Subscribe, ReadLog]


@pytest.mark.parametrize("position", range(len(ALL)))
def test_every_cursor_gives_what_comes_after_it(position: int) -> None:
    world = World()
    world.publish(99)
    assert ids(world.follow(ALL[position])) == ALL[position + 1 :]


def test_a_log_longer_than_a_page_is_read_in_pages() -> None:
    history = [started("1-1"), *(delta(f"1-{n}", "x") for n in range(2, 2 * LOG_PAGE + 1))]
    world = World([*history, ended(f"1-{2 * LOG_PAGE + 1}", "completed", "x" * (2 * LOG_PAGE - 1))])
    world.publish(9999)
    assert len(ids(world.follow())) == 2 * LOG_PAGE + 1


def test_live_events_that_the_log_had_already_are_dropped() -> None:
    world = World()
    events = world.follow()
    world.publish(3)
    assert next(events).id == "1-1"  # the log was read
    world.channel = [world.log[EventId(1, n)] for n in (1, 2, 3)]  # and its events come on the channel as well
    world.publish(99)
    assert ids(events) == ALL[1:]


def test_a_skipped_event_is_fetched_from_the_log() -> None:
    world = World()
    events = world.follow()
    world.publish(2)
    assert [next(events).id, next(events).id] == ALL[:2]
    world.publish(1)
    world.channel.clear()  # lost on the way
    world.publish(99)
    assert ids(events) == ALL[2:]
    assert world.now == 0  # without waiting


def test_what_was_given_up_for_a_slow_reader_is_read_from_the_log_at_once() -> None:
    world = World()
    events = world.follow()
    world.publish(2)
    assert [next(events).id, next(events).id] == ALL[:2]
    world.publish(5)
    world.overflow()
    world.publish(99)
    assert ids(events) == ALL[2:]
    assert world.now == 0  # without waiting


def test_several_messages_at_once_are_delivered_in_order() -> None:
    world = World()
    world.at_once = lambda: 99
    events = world.follow()
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(3)
    del world.channel[-1]  # lost on the way, between others
    world.publish(99)
    assert ids(events) == ALL[1:]
    assert world.now == 0  # without waiting


def test_what_a_waiting_reader_takes_at_once_is_not_delivered_again_and_the_end_is_not_offered() -> None:
    world = World()
    taken: list[str] = []

    def take(event: Event) -> bool:
        taken.append(event.id)
        return True

    events = world.follow(offer=take)
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(99)
    world.channel.insert(2, world.channel[1])  # comes twice
    assert ids(events) == ALL[-1:]
    assert taken == ALL[1:-1]


def test_what_a_reader_does_not_take_at_once_comes_next() -> None:
    world = World()
    received: list[str] = []

    def take_every_other(event: Event) -> bool:
        if event.event_id.n % 2:
            received.append(event.id)
            return True
        return False

    world.publish(1)
    for event in world.follow(offer=take_every_other):
        received.append(event.id)
        world.publish(99)
    assert received == ALL
    assert world.now == 0  # without waiting


def test_what_is_offered_comes_next() -> None:
    world = World()
    offered: list[str] = []

    def note(event: Event) -> bool:
        offered.append(event.id)
        return True

    events = world.follow(offer=note)
    world.publish(2)
    assert [next(events).id, next(events).id] == ALL[:2]
    world.publish(4)
    del world.channel[1]  # lost on the way
    world.publish(99)
    assert ids(events) == ALL[3:]  # by the log
    assert offered == ALL[2:3]


def test_a_reader_that_fails_when_it_is_offered_an_event_fails_alone() -> None:
    world = World()

    def fail(_event: Event) -> bool:
        raise ZeroDivisionError

    events = world.follow(offer=fail)
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(1)
    with pytest.raises(ZeroDivisionError):  # raised where the run is, not where the message came
        next(events)


def test_a_job_that_a_reader_follows_at_once_is_not_silent() -> None:
    world = World([started("1-1"), *(delta(f"1-{n}", "x") for n in range(2, 200))])
    perform = world.perform

    def steadily(operation: Operation) -> Any:
        if isinstance(operation, Listen):
            world.publish(1)
            answer = perform(operation)
            if not answer:
                world.now += 1.0 - operation.seconds  # the next one comes after a second
            return answer
        return perform(operation)

    world.perform = steadily  # type: ignore[method-assign]
    world.publish(1)
    with pytest.raises(FollowTimeoutError, match="did not end within 30 s"):
        list(world.follow(offer=lambda _event: True, timeout=5.0, total_timeout=30.0))
    assert [type(operation) for operation in world.operations].count(ReadSummary) <= 2


def test_nothing_is_delivered_after_the_end() -> None:
    world = World()
    world.at_once = lambda: 99
    events = world.follow()
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(99)
    world.channel.append(started("3-1"))
    assert ids(events) == ALL[1:]


def test_a_message_goes_before_the_answer_of_the_database() -> None:
    world = World()
    world.waiting_for = NO_WORKER
    events = world.follow()
    perform = world.perform

    def meanwhile(operation: Operation) -> Any:
        if isinstance(operation, ReadSummary):
            world.publish(1)
        return perform(operation)

    world.perform = meanwhile  # type: ignore[method-assign]
    assert next(events).id == "1-1"
    assert [operation for operation in world.operations if isinstance(operation, ReadSummary)]
    assert world.reports == []


def test_the_pauses_of_many_are_longer() -> None:
    world = World()
    world.pause = 30.0
    world.publish(1)
    with pytest.raises(FollowTimeoutError):
        ids(world.follow(timeout=100))
    assert sum(isinstance(operation, ReadNewest) for operation in world.operations) <= 5


def test_a_subscription_that_fell_silent_is_found_out_by_the_log() -> None:
    world = World()
    events = world.follow()
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(99)
    world.channel.clear()
    assert [next(events).id for _ in ALL[1:-1]] == ALL[1:-1]
    assert 0 < world.now < 10
    assert ids(events) == ALL[-1:]


def test_a_subscription_that_fell_silent_is_made_anew() -> None:
    world = World()
    events = world.follow()
    world.publish(1)
    assert next(events).id == "1-1"
    world.publish(1)
    world.channel.clear()  # it did not come through
    assert next(events).id == "1-2"  # found in the log
    world.publish(1)
    assert next(events).id == "1-3"
    assert [operation for operation in world.operations if isinstance(operation, Subscribe)] == [
        Subscribe(),
        Subscribe(seems_deaf=True),
    ]
    world.disconnect()
    world.publish(1)
    assert next(events).id == "1-4"
    assert [operation for operation in world.operations if isinstance(operation, Subscribe)][2:] == [Subscribe()]


@pytest.mark.parametrize("after", [None, "1-3", "2-4"])
def test_an_expired_log_is_replaced_by_the_stored_result(after: str | None) -> None:
    world = World()
    world.publish(99)
    world.log.clear()
    events = list(world.follow(after))
    assert [(event.id, event.type) for event in events] == [("2-12", "snapshot"), ("2-13", "job.completed")]
    assert isinstance(events[0], Snapshot)
    assert events[0].choices[0].content == TEXT
    assert world.now == 0  # without waiting


def test_a_reader_who_lacks_only_the_end_gets_only_the_end() -> None:
    world = World()
    world.publish(99)
    world.log.clear()
    assert ids(world.follow("2-12")) == ["2-13"]


def test_a_reader_who_has_the_end_gets_nothing_more() -> None:
    world = World()
    world.publish(99)
    assert ids(world.follow("2-13")) == []
    assert ids(world.follow("2-13", has_database=False)) == []
    world.log.clear()
    assert ids(world.follow("2-13")) == []


def test_a_terminal_event_that_was_never_published_is_told_from_the_row() -> None:
    world = World()
    world.publish(len(HISTORY) - 1)
    world.committed = True
    assert ids(world.follow()) == ALL


@pytest.mark.parametrize("after", ["", "1", "-1", "0-0", "1-0", "x", "1-1-1", "9" * 40 + "-1", "$"])
def test_a_malformed_cursor_is_an_error_at_once(after: str) -> None:
    with pytest.raises(InvalidCursorError, match="2-17"):
        parse_cursor(after)


@pytest.mark.parametrize("after", ["2-14", "3-1"])
@pytest.mark.parametrize("log_is_there", [True, False])
def test_a_cursor_beyond_the_end_is_an_error(after: str, log_is_there: bool) -> None:  # noqa: FBT001
    world = World()
    world.publish(99)
    if not log_is_there:
        world.log.clear()
    with pytest.raises(InvalidCursorError, match="not come that far"):
        list(world.follow(after))


def test_a_cursor_beyond_a_running_job_is_an_error_once_the_log_cannot_only_have_lost_its_end() -> None:
    world = World()
    world.publish(3)
    with pytest.raises(InvalidCursorError):
        next(world.follow("1-9"))
    assert 15 <= world.now < 20


def test_a_cursor_beyond_an_attempt_that_has_not_begun_is_an_error_at_once() -> None:
    world = World()
    world.publish(3)
    with pytest.raises(InvalidCursorError):
        next(world.follow("3-1"))
    assert world.now == 0


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_log_that_has_lost_its_end_in_a_fail_over_is_waited_for(lost: int) -> None:
    """The reader has what the new master has not; what comes next begins where the worker is."""
    world = World()
    world.publish(5)
    after = str(max(world.log))
    for newest in sorted(world.log)[-lost:]:
        del world.log[newest]
    perform = world.perform

    def go_on(operation: Operation) -> Any:
        if world.now >= 5:
            world.publish(99)
        return perform(operation)

    world.perform = go_on  # type: ignore[method-assign]
    assert ids(world.follow(after)) == ALL[5:]


def test_a_reader_from_before_a_restart_of_redis_goes_on() -> None:
    world = World()
    world.publish(9)
    world.restart_redis_empty()
    events = world.follow("2-2")  # a good cursor, though no log knows it any more
    world.publish(2)
    assert next(events).type == "snapshot"
    world.publish(99)
    assert ids(events) == ALL[ALL.index("2-5") :]


def test_an_unknown_job_is_an_error_after_a_while() -> None:
    world = World(row=False)
    with pytest.raises(JobNotFoundError):
        next(world.follow(not_found_after=10))
    assert 10 <= world.now <= 14


def test_a_job_that_is_still_on_its_way_is_waited_for() -> None:
    world = World(row=False)
    events = world.follow(not_found_after=10)
    perform = world.perform

    def arrive_later(operation: Operation) -> Any:
        if world.now > 5:
            world.row = True
            world.publish(99)
        return perform(operation)

    world.perform = arrive_later  # type: ignore[method-assign]
    assert ids(events) == ALL


def test_without_a_database_an_unknown_job_is_a_timeout() -> None:
    world = World()
    with pytest.raises(FollowTimeoutError):
        next(world.follow(has_database=False, timeout=20))
    assert 20 <= world.now < 21


def test_a_silent_job_is_a_timeout() -> None:
    world = World()
    world.publish(3)
    events = world.follow(timeout=20)
    with pytest.raises(FollowTimeoutError, match="20 s"):
        ids(events)
    assert 20 <= world.now < 21


def test_a_readers_own_pause_is_no_silence() -> None:
    world = World()
    world.publish(1)
    events = world.follow(timeout=20)
    next(events)
    world.now += 1000
    world.publish(99)
    world.channel.clear()
    assert ids(events) == ALL[1:]


def test_a_redis_that_stays_away_is_a_timeout() -> None:
    world = World()
    world.redis_is_up = False
    with pytest.raises(FollowTimeoutError):
        next(world.follow(timeout=20))
    assert 20 <= world.now < 23


def test_a_redis_that_stays_away_does_not_hide_the_end() -> None:
    world = World()
    world.publish(3)
    events = world.follow()
    assert next(events).id == "1-1"
    world.redis_is_up = False
    world.committed, world.attempt = True, 2
    assert ids(events) == ["1-2", "1-3", "2-12", "2-13"]


def test_a_database_that_is_away_does_not_stop_the_events() -> None:
    world = World()
    world.database_is_up = False
    events = world.follow()
    world.publish(3)
    assert next(events).id == "1-1"
    world.publish(99)
    assert ids(events) == ALL[1:]


def test_lost_events_of_an_ended_job_are_an_error_without_a_database() -> None:
    world = World()
    world.publish(99)
    del world.log[EventId(2, 5)]
    events = world.follow(has_database=False)
    with pytest.raises(EventsLostError):
        ids(events)


def test_lost_events_of_an_ended_job_are_made_up_for_by_its_row() -> None:
    world = World()
    world.publish(99)
    del world.log[EventId(2, 5)]
    assert ids(world.follow()) == [*ALL[: ALL.index("2-5")], "2-12", "2-13"]


def test_a_hole_in_the_log_does_not_make_each_further_event_read_it() -> None:
    world = World(HISTORY[:-2])
    world.publish(9)
    del world.log[EventId(2, 2)]
    events = world.follow(has_database=False, timeout=20)
    assert [next(events).id for _ in range(7)] == ALL[:7]
    world.publish(99)
    with pytest.raises(FollowTimeoutError):
        next(events)
    assert sum(isinstance(operation, ReadLog) for operation in world.operations) <= 10  # in twenty seconds


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff", b'{"v":2,"id":"2-2"}'])
def test_garbage_on_the_channel_is_passed_over(garbage: bytes) -> None:
    world = World()
    events = world.follow()
    world.publish(1)
    next(events)
    world.channel.append(garbage.decode("latin-1"))
    world.publish(99)
    assert ids(events) == ALL[1:]


def test_an_event_of_the_future_in_the_log_is_made_up_for_by_the_row() -> None:
    world = World()
    world.publish(99)
    world.log[EventId(2, 5)] = '{"v":2,"id":"2-5"}'
    assert ids(world.follow())[-2:] == ["2-12", "2-13"]


# -- who waits for what will not come is told so --

NO_WORKER = WaitingFor(cause="worker", text="a worker: none is alive")
BUSY = WaitingFor(cause="place", text="a free place")


def outcome(world: World, **given: Any) -> tuple[Exception, list[tuple[float, str]]]:
    """Follow a job that never goes on; return the error, and what was reported when (in seconds)."""
    times: list[tuple[float, str]] = []
    world.reports = Reports(world, times)
    with pytest.raises((FollowTimeoutError, JobNotFoundError)) as caught:
        list(world.follow(**given))
    return caught.value, times


class Reports(list[WaitingFor]):
    """What was reported, with the time."""

    def __init__(self, world: World, times: list[tuple[float, str]]) -> None:
        super().__init__()
        self._world = world
        self._times = times

    def append(self, reason: WaitingFor) -> None:
        self._times.append((self._world.now, reason.text))


def test_a_job_without_a_worker_is_reported_at_once_and_once() -> None:
    world = World()
    world.waiting_for = NO_WORKER
    error, reports = outcome(world, timeout=20)
    assert reports == [(0.0, NO_WORKER.text)]
    assert str(error) == "no event of job job-1 came for 20 s; it waits for a worker: none is alive"


def test_what_passes_by_itself_is_reported_after_a_silence() -> None:
    world = World()
    world.waiting_for = BUSY
    _, reports = outcome(world, timeout=20)
    assert reports == [(3.0, BUSY.text)]


def test_a_provider_that_takes_its_time_is_reported_after_a_silence() -> None:
    world = World()
    world.publish(3)
    _, reports = outcome(world, timeout=20)
    assert reports == [(3.0, "its provider: attempt 1 runs and has nothing new yet")]


def test_a_redis_that_is_away_is_reported_at_once_and_named_in_the_error() -> None:
    world = World()
    world.redis_is_up = False
    error, reports = outcome(world, timeout=20)
    assert reports[0] == (0.0, "Redis: it does not answer (Connection refused)")
    assert "it waits for Redis: it does not answer (Connection refused)" in str(error)


def test_a_connection_that_is_cut_and_made_anew_is_not_worth_a_report() -> None:
    world = World()
    events = world.follow()
    world.publish(1)
    next(events)
    world.disconnect()
    world.publish(3)
    assert [next(events).id for _ in range(3)] == ALL[1:4]
    assert world.reports == []


def test_a_redis_that_goes_away_later_is_reported() -> None:
    world = World()
    events = world.follow(timeout=20)
    world.publish(1)
    next(events)
    world.redis_is_up = False
    with pytest.raises(FollowTimeoutError):
        next(events)
    assert [reason.cause for reason in world.reports] == ["redis", "provider"]


def test_a_database_that_is_away_is_reported_if_nothing_comes() -> None:
    world = World()
    world.database_is_up = False
    error, reports = outcome(world, timeout=20)
    assert reports == [(0.0, "the database: the database does not answer")]
    assert "the database does not answer" in str(error)


def test_what_was_reported_before_an_event_is_reported_again_after_it() -> None:
    world = World()
    world.waiting_for = NO_WORKER
    perform = world.perform

    def once(operation: Operation) -> Any:
        if world.now > 5 and not world.log:
            world.publish(1)
        return perform(operation)

    world.perform = once  # type: ignore[method-assign]
    with pytest.raises(FollowTimeoutError):
        list(world.follow(timeout=20))
    assert world.reports == [NO_WORKER, NO_WORKER]


@pytest.mark.parametrize("redis_is_up", [True, False])
@pytest.mark.parametrize("timeout", [2, 600])
def test_an_unknown_job_is_not_found_whatever_the_timeout(redis_is_up: bool, timeout: float) -> None:  # noqa: FBT001
    world = World(row=False)
    world.redis_is_up = redis_is_up
    error, reports = outcome(world, timeout=timeout, not_found_after=10)
    assert isinstance(error, JobNotFoundError)
    assert world.now <= 13
    told = [when for when, text in reports if text.startswith("a job of this id")]
    assert len(told) == 1
    assert 0 < told[0] <= 3


def test_without_a_database_the_silence_about_a_job_is_reported() -> None:
    error, reports = outcome(World(), has_database=False, timeout=20)
    assert len(reports) == 1
    assert reports[0][0] <= 3
    assert "without a database" in str(error)


def test_a_wait_ends_at_its_own_time_however_many_events_come() -> None:
    world = World([started("1-1"), *(delta(f"1-{n}", "x") for n in range(2, 200))])
    perform = world.perform

    def steadily(operation: Operation) -> Any:
        if isinstance(operation, Listen):
            world.now += 1.0
            world.publish(1)
        return perform(operation)

    world.perform = steadily  # type: ignore[method-assign]
    with pytest.raises(FollowTimeoutError, match="did not end within 30 s"):
        list(world.follow(timeout=math.inf, total_timeout=30.0))
    assert 30 <= world.now < 32


@settings(max_examples=500, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    after=st.sampled_from([None, None, "1-2", "2-3"]),
    has_database=st.booleans(),
    takes=st.sampled_from([0.0, 0.5, 1.0]),  # of what is offered
)
def test_whatever_happens_the_reader_ends_up_with_the_stored_text(
    seed: int,
    after: str | None,
    has_database: bool,  # noqa: FBT001
    takes: float,
) -> None:
    dice = random.Random(seed)
    world = World()
    world.publish(9 if after else 0)  # a reader has a cursor only of what was published
    perform = world.perform
    world.at_once = lambda: dice.randrange(1, 5)
    trouble_ends = 200.0

    def troubled(operation: Operation) -> Any:
        troubled_times = world.now < trouble_ends and len(world.operations) < 400
        if dice.random() < 0.5 and (troubled_times or dice.random() < 0.3):
            world.publish(dice.randrange(4))
        if troubled_times:
            match dice.randrange(25):
                case 0:
                    world.disconnect()
                case 1 if len(world.to_publish) > 1:
                    world.restart_redis_empty()
                case 2:
                    world.redis_is_up = not world.redis_is_up
                case 3:
                    world.database_is_up = not world.database_is_up
                case 4 if world.channel:
                    world.channel.pop(0)
                case 5:
                    world.overflow()
        else:
            world.redis_is_up = world.database_is_up = True
        return perform(operation)

    world.perform = troubled  # type: ignore[method-assign]
    received, held = [], Transcript()

    def receive(event: Event) -> bool:
        received.append(event.event_id)
        assert held.apply(event) or after is not None, f"{event.id} came out of turn"
        return True

    def offer(event: Event) -> bool:
        return dice.random() < takes and receive(event)

    for event in world.follow(after, has_database=has_database, timeout=1000, offer=offer):
        receive(event)
    assert all(before < later for before, later in pairwise(received))
    assert received[-1] == EventId(2, 13)
    if after is None:
        assert held.text == TEXT
        assert held.terminal is not None
        assert held.sha256() == held.terminal.output_sha256
