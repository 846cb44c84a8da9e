"""The follower: delivers each event of a job once and in order, whatever happens to Redis and the database meanwhile.

In: the results of its operations, from ``keepstream.client.redis``.  Out: events for the reader, and the next
operation to perform.  It does no I/O itself, so the sync and the async client share it.

A follower subscribes to the job's channel, waits until Redis confirms the subscription, reads the log, and
then takes what arrives on the channel.  Log and channel carry the same events in the same order, so events
seen before are dropped by their ids, and none can be missed in between.  The log is read again when an event
is missing, when the channel has been silent for a while, and after a lost connection.  If the log does not
help either, the job's row does: for a job that has ended, the events are made from its stored result.

A reader may be able to take an event the moment it comes. It is offered each that comes next while the follower waits
for one, and the follower goes on waiting: for thousands of live readers, waking each costs more than all the rest.

Who waits for what will not come is told so: the follower reports once what is missing, and its last error repeats it.
"""

import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

from keepstream.client.payloads import Form, Payload
from keepstream.errors import (
    EventsLostError,
    FollowTimeoutError,
    InvalidCursorError,
    JobNotFoundError,
    StoreUnavailableError,
)
from keepstream.events import TERMINAL_TYPES, Event, snapshot_event, terminal_event
from keepstream.names import EventId, parse_event_id
from keepstream.results import CompletionResult, JobStatus, JobSummary, WaitingFor
from keepstream.transcript import Place, place_of_id

E = TypeVar("E")  #: The form in which the reader gets events.

LOG_PAGE: Final = 500  #: Log entries read at once: the most that a follower holds in memory.
CHECK_EVERY: Final = 3.0  #: Seconds of silence after which the log and the row are checked.
_CHECK_UNKNOWN_EVERY: Final = 1.0  #: The same for a job that is not known yet.
#: Seconds for which a log may lack its newest events: a replica that takes over has not got them all, and the worker
#: may go on writing to the old master for as long as that does not know of it.
_TAIL_LOST_FOR: Final = 15.0
_FIRST_RECONNECT_DELAY: Final = 0.1  #: Seconds; doubled with every failure.
_MAX_RECONNECT_DELAY: Final = 2.0  #: Seconds.


class Operation:
    """What the client is to do next; the result is sent back into the follower."""


@dataclass(frozen=True, slots=True)
class Subscribe(Operation):
    """See to it that there is a subscription to the job's channel, confirmed by Redis. Result: None."""

    seems_deaf: bool = False  #: Whether the present one has not brought what is in the log.


@dataclass(frozen=True, slots=True)
class Listen(Operation):
    """Wait for messages on the channel.

    Result: the ``Payload`` of each that has come, in order; none after ``seconds``.  None: some have been given up,
    because the reader was slow, and are to be read from the log.
    """

    seconds: float  #: The longest wait, which begins anew with what is passed on.
    #: May be called with what comes meanwhile, as long as it returns True; what it returns True for is in no result.
    pass_on: Callable[[Payload], bool] | None = None


@dataclass(frozen=True, slots=True)
class ReadLog(Operation):
    """Read the log. Result: the first ``LOG_PAGE`` entries (``LogEntry``) with ids greater than ``after``."""

    after: str | None


@dataclass(frozen=True, slots=True)
class ReadNewest(Operation):
    """Read the log's newest entry. Result: a ``LogEntry``, or None if there is no log."""


@dataclass(frozen=True, slots=True)
class ReadSummary(Operation):
    """Read the job's row without its output, and what it waits for.

    Result: a ``JobSummary``, or None if there is no row.  With ``unless_message`` also an ``Interruption``, if a
    message came first: the database must not keep it from its reader.
    """

    unless_message: bool = False


@dataclass(frozen=True, slots=True)
class ReadResult(Operation):
    """Read everything stored about the job. Result: a ``CompletionResult``, or None if there is no row."""


@dataclass(frozen=True, slots=True)
class Sleep(Operation):
    """Do nothing for ``seconds``. Result: None."""

    seconds: float


class Interruption:
    """A message came before the answer of the database."""


class LogEntry(NamedTuple):
    """One entry of the log."""

    id: str
    payload: Payload


class DisconnectedError(Exception):
    """Thrown into the follower when Redis did not perform an operation; the text says why."""


#: What ``Follower.run`` returns: yields operations, whose results are sent back, and events for the reader.
FollowerRun = Generator[Operation | E, Any, None]


def parse_cursor(text: str | None) -> EventId | None:
    """Return the event id that a reader passes as ``after``.

    Raises:
        InvalidCursorError: ``text`` is not an event id.
    """
    if text is None:
        return None
    try:
        return parse_event_id(text)
    except ValueError as error:
        raise InvalidCursorError(f"'after' is {error}") from None


class Progress(NamedTuple):
    """How far a job has come, by its row."""

    status: JobStatus
    attempt: int
    terminal_event_id: str | None


def is_more_to_come(
    job_id: str, after: EventId | None, newest: LogEntry | None, progress: Progress | None, *, has_database: bool
) -> bool:
    """Tell whether a reader at ``after`` has events to expect; False: it has the job's terminal event.

    A cursor is refused only if it can never become good, so a follower may still refuse one later.

    Args:
        job_id: The job.
        after: The last event the reader has, or None.
        newest: The newest entry of the log, if there is one and Redis answers.
        progress: The job's row, if there is one and the database answers.
        has_database: Whether the database answers.

    Raises:
        InvalidCursorError: ``after`` is beyond the job's end, or beyond its next attempt.
        JobNotFoundError: there is neither log nor row, as far as the database can tell.
    """
    if newest is None and progress is None and has_database:
        raise JobNotFoundError(f"there is no job {job_id}, neither on Redis nor in the database")
    end = limit = None
    if newest is not None and _is_end(newest):
        end = limit = _stream_id(newest.id)
    elif progress is not None and progress.terminal_event_id is not None:
        end = limit = parse_event_id(progress.terminal_event_id)
    elif progress is not None:
        limit = EventId(progress.attempt + 1, 0)
    elif newest is not None and not has_database:
        limit = EventId(_stream_id(newest.id).attempt + 1, 0)
    if after is not None and limit is not None and after > limit:
        raise InvalidCursorError(f"'after' is {after}, and job {job_id} has not come that far")
    return after is None or after != end


class Follower(Generic[E]):
    """Follows one job for one reader, from the event after ``after`` to the terminal event.

    Args:
        job_id: The job.
        after: The last event the reader has, or None.
        form: The form in which the reader gets events.
        has_database: Whether ``ReadSummary`` and ``ReadResult`` can be performed.
        timeout: Seconds without an event after which to give up.
        not_found_after: Seconds to wait for a job that is neither on Redis nor in the database.
        report: Told once what the job waits for, until the next event; what passes by itself only after some seconds.
        offer: Called with an event that comes while the reader waits; returns whether the reader has taken it. What it
            does not take, it gets from the run. What it raises ends the run.
        total_timeout: Seconds after which to give up in any case, as soon as the run is asked.
        pause: Returns the least seconds between two checks of a silent job; the more followers, the longer.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        job_id: str,
        after: EventId | None,
        *,
        form: Form[E],
        has_database: bool,
        timeout: float,
        not_found_after: float,
        report: Callable[[WaitingFor], None],
        offer: Callable[[E], bool] | None = None,
        total_timeout: float = math.inf,
        pause: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job_id = job_id
        self._form = form
        self._has_database = has_database
        self._timeout = timeout
        self._total_timeout = total_timeout
        self._not_found_after = not_found_after
        self._report = report
        self._offer = offer
        self._pass_on = self._passes_on if offer is not None else None
        self._offer_error: Exception | None = None
        self._pause = pause
        self._clock = clock
        self._last = after
        self._cursor_is_valid = after is None  # True once the job is known to have come as far as ``after``
        self._beyond_log_since: float | None = None  # when the log was first seen to end before ``after``
        self._ahead: EventId | None = None  # the newest event that cannot be delivered yet, because others are missing
        self._ahead_is_end = False
        self._log_is_missing: bool | None = None  # None: not known
        self._is_connected = False
        self._waits_for: dict[str, WaitingFor] = {}  # by cause, as it was when last looked at
        self._reported: set[str] = set()  # causes, since the last event
        self._began_at = clock()
        self._delivered_at = clock()  # when the reader took the last event
        self._reconnect_delay = _FIRST_RECONNECT_DELAY
        self._ended = False

    def run(self) -> FollowerRun[E]:
        """Yield operations and events until the terminal event has been delivered.

        Raises:
            EventsLostError: the job has ended, events are missing, and there is no database.
            FollowTimeoutError: no event came for ``timeout`` seconds; it says what the job waits for.
            InvalidCursorError: ``after`` is beyond everything known of the job.
            JobNotFoundError: neither log nor row exist.
        """
        self._began_at = self._delivered_at = self._clock()
        seems_deaf = False
        while not self._ended:
            try:
                yield Subscribe(seems_deaf)
                seems_deaf = False
                yield from self._catch_up()
                self._reconnect_delay = _FIRST_RECONNECT_DELAY
                self._is_connected = True
                self._reported.discard("redis")
                while not self._ended:
                    was_silent = yield from self._listen()
                    last = self._last
                    yield from self._catch_up()
                    if was_silent and self._last != last:
                        seems_deaf = True
                        break  # the log grew while the channel was silent: the connection may be dead
            except DisconnectedError as error:
                self._log_is_missing = None
                self._waits_for.clear()
                # A connection that is cut and made anew is nobody's concern.
                self._note("redis", f"Redis: {error}", after=math.inf if self._is_connected else 0.0)
                self._is_connected = False
                yield from self._ask_database(ReadSummary())
                if not self._ended:
                    self._check_timeout()
                    # Jitter, because a restarted Redis meets all its followers at once.
                    delay = self._reconnect_delay * random.uniform(0.5, 1.0)  # noqa: S311
                    yield Sleep(min(delay, self._seconds_left()))
                    self._reconnect_delay = min(2 * self._reconnect_delay, _MAX_RECONNECT_DELAY)

    def _catch_up(self) -> FollowerRun[E]:
        """Deliver what is in the log; ask the database if the log has nothing new or has gaps."""
        self._waits_for.clear()
        last = self._last
        position = str(last) if last is not None else None
        while not self._ended:
            entries: list[LogEntry] = yield ReadLog(position)
            for entry in entries:
                yield from self._handle(entry.payload)
            if len(entries) < LOG_PAGE:
                break
            position = entries[-1].id
        if self._ended:
            return
        if self._last == last:
            newest: LogEntry | None = yield ReadNewest()
            self._log_is_missing = newest is None
            if newest is not None:
                self._check_cursor_by_log(newest)
                self._ended = newest.id == position and _is_end(newest)  # the reader already has the terminal event
        if self._end_is_ahead and not self._has_database:
            raise EventsLostError(f"job {self._job_id} has ended, but events before its end are lost")
        if not self._ended and (self._last == last or self._end_is_ahead):
            yield from self._ask_database(ReadSummary(unless_message=True))
            if self._log_is_missing and not self._has_database:
                self._note("job", "its first event; without a database nobody knows whether there is such a job")
        if not self._ended:
            self._check_timeout()

    def _listen(self) -> Generator[Operation | E, Any, bool]:
        """Deliver what arrives on the channel; return False when an event is missing, True after a silence."""
        silence = max(_CHECK_UNKNOWN_EVERY if "job" in self._waits_for else CHECK_EVERY, self._pause())
        next_check = self._clock() + silence
        while not self._ended:
            seconds = min(next_check - self._clock(), self._seconds_left())
            if seconds <= 0:
                return True
            last = self._last
            payloads: list[Payload] | None = yield Listen(seconds, self._pass_on)
            if self._offer_error is not None:
                raise self._offer_error
            if payloads is None or (yield from self._is_event_missing(payloads)):
                return False
            if self._last != last:
                next_check = self._delivered_at + CHECK_EVERY
        return False

    def _passes_on(self, payload: Payload) -> bool:
        """Deliver an event while the run waits in ``Listen``; return False if the run is to have it."""
        assert self._offer is not None
        try:
            here, event_type = payload.event_id, payload.raw.type
            if event_type in TERMINAL_TYPES or place_of_id(here, event_type, self._last) is not Place.NEXT:
                return False
            event = self._form.of_payload(payload)
        except ValueError:
            return False
        try:
            is_taken = self._offer(event)
        except Exception as error:  # noqa: BLE001  # the run raises it: who calls here reads for others too
            self._offer_error = error
            return False
        if is_taken:
            self._note_delivery(here)
            self._delivered_at = self._clock()
        return is_taken

    def _is_event_missing(self, payloads: list[Payload]) -> Generator[Operation | E, Any, bool]:
        """Deliver what comes next; return True for a gap that the log may close."""
        for payload in payloads:
            was_behind = self._is_behind
            place = yield from self._handle(payload)
            if self._ended:
                return False
            if place is Place.AHEAD and (not was_behind or self._end_is_ahead):
                # If the log has been read for this gap before, the missing event is not in it: then
                # wait for a snapshot, a new attempt, or the next check.
                return True
        return False

    def _handle(self, payload: Payload) -> Generator[Operation | E, Any, Place]:
        """Deliver the event if it comes next; remember it if events before it are missing."""
        try:
            here, event_type = payload.event_id, payload.raw.type
            place = place_of_id(here, event_type, self._last)
            event = self._form.of_payload(payload) if place is Place.NEXT else None
        except ValueError:
            return Place.SEEN  # unreadable: if it mattered, the next event shows the gap
        if event is not None:
            yield from self._deliver(event, here, event_type)
        elif place is Place.AHEAD:
            self._ahead = here
            self._ahead_is_end = event_type in TERMINAL_TYPES
        return place

    def _deliver(self, event: E, here: EventId, event_type: str) -> FollowerRun[E]:
        self._note_delivery(here)
        self._ended = event_type in TERMINAL_TYPES
        yield event
        self._delivered_at = self._clock()  # after the reader came back: its own pauses do not count as silence

    def _note_delivery(self, here: EventId) -> None:
        self._last = here
        self._cursor_is_valid = True
        self._log_is_missing = False
        self._waits_for.clear()
        self._reported.clear()

    def _ask_database(self, question: ReadSummary) -> FollowerRun[E]:
        """If the job's row says that it has ended, deliver the rest from the stored result."""
        if not self._has_database:
            return
        try:
            summary: JobSummary | Interruption | None = yield question
            if isinstance(summary, Interruption):
                return
            if summary is None:
                self._note("job", "a job of this id: the database has none", after=_CHECK_UNKNOWN_EVERY)
                self._check_not_found()
                return
            self._check_cursor(EventId(summary.attempt + 1, 0))
            if not summary.status.terminal:
                self._note_reason(summary)
                return
            result: CompletionResult | None = yield ReadResult()
        except StoreUnavailableError as error:
            self._note("database", f"the database: {error}", after=0.0)
            return
        if result is None:  # purged just now
            return
        end = terminal_event(result)
        self._check_cursor(end.event_id)
        for event in _stored_events(result, self._last):
            yield from self._deliver(self._form.of_event(event), event.event_id, event.type)
        self._ended = True

    @property
    def _is_behind(self) -> bool:
        return self._ahead is not None and (self._last is None or self._last < self._ahead)

    @property
    def _end_is_ahead(self) -> bool:
        return self._is_behind and self._ahead_is_end

    def _check_cursor(self, limit: EventId) -> None:
        if not self._cursor_is_valid and self._last is not None and self._last > limit:
            raise InvalidCursorError(f"'after' is {self._last}, and job {self._job_id} has not come that far")

    def _check_cursor_by_log(self, newest: LogEntry) -> None:
        """Refuse a cursor beyond the log's end, once it is sure that the log has not only lost its newest events."""
        end = _stream_id(newest.id)
        if self._cursor_is_valid or self._last is None or self._last <= end:
            return
        if self._beyond_log_since is None:
            self._beyond_log_since = self._clock()
        unknown_attempt = self._last.attempt > end.attempt and not self._has_database  # else the row tells
        if _is_end(newest) or unknown_attempt or self._clock() - self._beyond_log_since >= _TAIL_LOST_FOR:
            self._check_cursor(end)

    def _note_reason(self, summary: JobSummary) -> None:
        if (reason := summary.waiting_for) is not None:
            self._note(reason.cause, reason.text, after=CHECK_EVERY if reason.passes else 0.0)
        elif summary.status is JobStatus.RUNNING:
            self._note("provider", f"its provider: attempt {summary.attempt} runs and has nothing new yet")

    def _note(self, cause: str, text: str, after: float = CHECK_EVERY) -> None:
        """Remember what the job waits for, and report it once it has been silent for ``after`` seconds."""
        reason = self._waits_for[cause] = WaitingFor(cause=cause, text=text)
        if cause not in self._reported and self._clock() - self._delivered_at >= after:
            self._reported.add(cause)
            self._report(reason)

    def _check_not_found(self) -> None:
        if self._log_is_missing is not False and self._clock() - self._delivered_at >= self._not_found_after:
            raise self._not_found()

    def _not_found(self) -> JobNotFoundError:
        where = "neither on Redis nor in the database" if self._log_is_missing else "as far as the database knows"
        return JobNotFoundError(f"there is no job {self._job_id}, {where}")

    def _seconds_left(self) -> float:
        ends_at = min(self._delivered_at + self._timeout, self._began_at + self._total_timeout)
        return max(0.0, ends_at - self._clock())

    def _check_timeout(self) -> None:
        if self._seconds_left() > 0:
            return
        if "job" in self._waits_for and self._has_database:
            raise self._not_found()
        reasons = " and ".join(reason.text for reason in self._waits_for.values())
        waits = f"; it waits for {reasons}" if reasons else ""
        if self._clock() - self._began_at >= self._total_timeout:
            raise FollowTimeoutError(f"job {self._job_id} did not end within {self._total_timeout:g} s{waits}")
        raise FollowTimeoutError(f"no event of job {self._job_id} came for {self._timeout:g} s{waits}")


def _stored_events(result: CompletionResult, last: EventId | None) -> Iterator[Event]:
    """Yield what a reader at ``last`` lacks of a job that has ended: its output and its terminal event."""
    end = terminal_event(result)
    before = EventId(end.event_id.attempt, end.event_id.n - 1)
    if before.n > 0 and (last is None or last < before):
        yield snapshot_event(result, str(before))
    if last is None or last < end.event_id:
        yield end


def _is_end(entry: LogEntry) -> bool:
    try:
        return entry.payload.raw.type in TERMINAL_TYPES
    except ValueError:
        return False


def _stream_id(text: str) -> EventId:
    attempt, n = text.split("-")
    return EventId(int(attempt), int(n))
