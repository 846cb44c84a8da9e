"""The follower: how a reader gets every event of a job once and in order, whatever happens meanwhile.

In: answers from Redis and from the database, handed in by ``keepstream.client.client``.  Out: the events
for the reader, and the next step for the client to perform.  Exists so that the thinking is written
once, without I/O, for the sync and the async client alike.

The way of a follower: subscribe to the channel and wait until Redis confirms it; read the log; then
take what comes on the channel.  Both carry the same events in the same order, so an event that was
seen is dropped by its id, and nothing falls between the two.  When an event is missing, when nothing
came for a while, or when the connection was lost, the log is read again.  When the log does not help
either, the job's row answers: a job that has ended is told from its stored result.
"""

import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from keepstream.errors import (
    EventsLostError,
    FollowTimeoutError,
    InvalidCursorError,
    JobNotFoundError,
    StoreUnavailableError,
)
from keepstream.events import Event, is_terminal, parse_event, snapshot_event, terminal_event
from keepstream.names import EventId, parse_event_id
from keepstream.results import CompletionResult, JobSummary
from keepstream.transcript import Place, place_of

LOG_PAGE: Final = 500  #: Log entries read at once; what a follower holds in memory at most.
CHECK_EVERY: Final = 3.0  #: Seconds of silence after which the log and the row are looked at.
_FIRST_PAUSE: Final = 0.1  #: Seconds before the first reconnection; doubled up to the longest.
_LONGEST_PAUSE: Final = 2.0


class Step:
    """Something the client is to do; its answer is sent into the plan."""


@dataclass(frozen=True, slots=True)
class Subscribe(Step):
    """Open a new subscription to the job's channel and wait until Redis has confirmed it."""


@dataclass(frozen=True, slots=True)
class Listen(Step):
    """Wait for a message on the channel; answer its payload, or None if there was none."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ReadLog(Step):
    """Answer a list of at most ``LOG_PAGE`` log entries (``LogEntry``) whose ids are greater than ``after``."""

    after: str | None


@dataclass(frozen=True, slots=True)
class ReadNewest(Step):
    """Answer the log's newest entry (``LogEntry``), or None if there is no log."""


@dataclass(frozen=True, slots=True)
class ReadSummary(Step):
    """Answer the job's row without its output, or None."""


@dataclass(frozen=True, slots=True)
class ReadResult(Step):
    """Answer the job's whole result, or None."""


@dataclass(frozen=True, slots=True)
class Pause(Step):
    """Do nothing for a while."""

    seconds: float


class LogEntry(NamedTuple):
    """One entry of the log."""

    id: str
    payload: bytes


class DisconnectedError(Exception):
    """Thrown into the plan when Redis did not answer a step."""


#: Gives steps, which want an answer, and events, which go to the reader.
Plan = Generator[Step | Event, Any, None]


def parse_cursor(text: str | None) -> EventId | None:
    """Return the event id a reader gives as ``after``.

    Raises:
        InvalidCursorError: it is no event id.
    """
    if text is None:
        return None
    try:
        return parse_event_id(text)
    except ValueError as error:
        raise InvalidCursorError(f"'after' is {error}") from None


class Follower:
    """Follows one job for one reader, from the event after ``after`` to the terminal one.

    Args:
        job_id: The job.
        after: The last event the reader has; None for a reader that has none.
        has_database: Whether ``ReadSummary`` and ``ReadResult`` can be performed.
        timeout: Seconds without an event after which to give up.
        patience: Seconds for which a job of which there is no trace may be on its way.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        job_id: str,
        after: EventId | None,
        *,
        has_database: bool,
        timeout: float,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job_id = job_id
        self._has_database = has_database
        self._timeout = timeout
        self._patience = patience
        self._clock = clock
        self._last = after
        self._cursor_is_proven = after is None
        self._ahead: Event | None = None  # the newest event that could not be delivered, for others are missing
        self._log_is_missing = False
        self._heard = clock()  # when the last event was delivered
        self._pause = _FIRST_PAUSE
        self._ended = False

    def run(self) -> Plan:
        """Give events and steps until the terminal event was given.

        Raises:
            EventsLostError: the job has ended, events are missing, and there is no database.
            FollowTimeoutError: no event came for ``timeout`` seconds.
            InvalidCursorError: ``after`` is beyond everything that is known of the job.
            JobNotFoundError: neither log nor row exist.
        """
        self._heard = self._clock()
        while not self._ended:
            try:
                yield Subscribe()
                yield from self._catch_up()
                self._pause = _FIRST_PAUSE
                while not self._ended:
                    was_silent = yield from self._listen()
                    last = self._last
                    yield from self._catch_up()
                    if was_silent and self._last != last:
                        break  # the log grew and the channel kept silent: subscribe anew, the connection may be dead
            except DisconnectedError:
                self._log_is_missing = False  # not known while Redis is away
                yield from self._ask_database()
                if not self._ended:
                    self._check_timeout()
                    # Jitter, because a restarted Redis meets all its followers at once.
                    yield Pause(self._pause * random.uniform(0.5, 1.0))  # noqa: S311
                    self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _catch_up(self) -> Plan:
        """Deliver what the log has; ask the database if it has nothing new, or not all."""
        last = self._last
        position = str(last) if last is not None else None
        while not self._ended:
            entries: list[LogEntry] = yield ReadLog(position)
            for entry in entries:
                yield from self._take(entry.payload)
            if len(entries) < LOG_PAGE:
                break
            position = entries[-1].id
        if self._ended:
            return
        if self._last == last:
            newest: LogEntry | None = yield ReadNewest()
            self._log_is_missing = newest is None
            if newest is not None:
                self._check_cursor(_stream_id(newest.id))
                self._ended = newest.id == position and _is_end(newest)  # the reader had everything before
        if self._end_is_ahead and not self._has_database:
            raise EventsLostError(f"job {self._job_id} has ended, but events before its end are lost")
        if not self._ended and (self._last == last or self._end_is_ahead):
            yield from self._ask_database()
        if not self._ended:
            self._check_timeout()

    def _listen(self) -> Generator[Step | Event, Any, bool]:
        """Deliver what comes on the channel, until an event is missing or nothing comes for a while (True)."""
        look_again = self._clock() + CHECK_EVERY
        while not self._ended:
            seconds = min(look_again, self._heard + self._timeout) - self._clock()
            if seconds <= 0:
                return True
            payload: bytes | None = yield Listen(seconds)
            if payload is None:
                continue
            was_behind = self._is_behind
            place = yield from self._take(payload)
            if place is Place.NEXT:
                look_again = self._clock() + CHECK_EVERY
            elif place is Place.AHEAD and (not was_behind or self._end_is_ahead):
                # Read the log.  If it has been read for this gap already, it has not got what is missing:
                # wait for a snapshot, a new attempt, or the next look.
                return False
        return False

    def _take(self, payload: bytes) -> Generator[Step | Event, Any, Place]:
        """Deliver the event if it comes next; remember it if others must come before it."""
        try:
            event = parse_event(payload)
            place = place_of(event, self._last)
        except ValueError:
            return Place.SEEN  # unreadable: if it mattered, the next event shows the gap
        if place is Place.NEXT:
            yield from self._deliver(event)
        elif place is Place.AHEAD:
            self._ahead = event
        return place

    def _deliver(self, event: Event) -> Plan:
        self._last = event.event_id
        self._cursor_is_proven = True
        self._ended = is_terminal(event)
        yield event
        self._heard = self._clock()  # after the reader came back: its own pauses are no silence

    def _ask_database(self) -> Plan:
        """Tell a job that has ended from its stored result."""
        if not self._has_database:
            return
        try:
            summary: JobSummary | None = yield ReadSummary()
            if summary is None:
                self._check_patience()
                return
            self._check_cursor(EventId(summary.attempt + 1, 0))
            if not summary.status.terminal:
                return
            result: CompletionResult | None = yield ReadResult()
        except StoreUnavailableError:
            return
        if result is None:  # purged just now
            return
        end = terminal_event(result)
        self._check_cursor(end.event_id)
        for event in _stored_events(result, self._last):
            yield from self._deliver(event)
        self._ended = True

    @property
    def _is_behind(self) -> bool:
        return self._ahead is not None and (self._last is None or self._last < self._ahead.event_id)

    @property
    def _end_is_ahead(self) -> bool:
        return self._is_behind and self._ahead is not None and is_terminal(self._ahead)

    def _check_cursor(self, limit: EventId) -> None:
        if not self._cursor_is_proven and self._last is not None and self._last > limit:
            raise InvalidCursorError(f"'after' is {self._last}, and job {self._job_id} has not come that far")

    def _check_patience(self) -> None:
        if self._log_is_missing and self._clock() - self._heard >= self._patience:
            raise JobNotFoundError(f"there is no job {self._job_id}, neither on Redis nor in the database")

    def _check_timeout(self) -> None:
        if self._clock() - self._heard >= self._timeout:
            raise FollowTimeoutError(f"nothing was heard of job {self._job_id} for {self._timeout:g} s")


def _stored_events(result: CompletionResult, last: EventId | None) -> Iterator[Event]:
    """Give what a reader at ``last`` lacks of a job that has ended: its output, and its terminal event."""
    end = terminal_event(result)
    before = EventId(end.event_id.attempt, end.event_id.n - 1)
    if before.n > 0 and (last is None or last < before):
        yield snapshot_event(result, str(before))
    if last is None or last < end.event_id:
        yield end


def _is_end(entry: LogEntry) -> bool:
    try:
        return is_terminal(parse_event(entry.payload))
    except ValueError:
        return False


def _stream_id(text: str) -> EventId:
    attempt, n = text.split("-")
    return EventId(int(attempt), int(n))
