"""A model of one job's log and channel in Redis, with the publisher's script as plain code.

In: the publisher's commands, as bytes.
Out: the script's answers, the log, and the events as a subscriber receives them.

Properties can be tried on thousands of schedules without a server. Other tests check that the real script behaves like
this model.
"""

from typing import Any, NamedTuple

import hiredis

from keepstream.names import EventId


class Call(NamedTuple):
    """One call of the script."""

    attempt: int
    n: int  #: of the first event
    mode: bytes  #: a, v or h
    events: list[bytes]


def parse_call(command: bytes) -> Call:
    """Parse an ``EVALSHA`` command."""
    reader = hiredis.Reader()
    reader.feed(command)
    words: Any = reader.gets()
    assert words[0] == b"EVALSHA"
    assert words[2] == b"3"
    attempt, n, _ttl, mode, *events = words[6:]
    return Call(int(attempt), int(n), mode, events)


class LogModel:
    """One job's log and channel."""

    def __init__(self) -> None:
        self.log: list[tuple[EventId, bytes]] = []
        self.heard: list[bytes] = []  #: Everything that was published.
        self.cancelled = False  #: Whether there is a request to cancel.

    @property
    def last(self) -> EventId:
        """The id of the log's newest entry."""
        return self.log[-1][0] if self.log else EventId(0, 0)

    def execute(self, command: bytes) -> bytes:
        """Do what the script does, and return its answer."""
        attempt, n, mode, events = parse_call(command)
        first_n = n
        if n > 1 and mode != b"h":
            if not self.log:
                return b"HOLE"
            if mode == b"v":
                if self.last.attempt > attempt:
                    return b"FENCED"
                if self.last < EventId(attempt, n - 1):
                    return b"HOLE"
        for event in events:
            if self.last.attempt > attempt:
                return b"FENCED"
            if EventId(attempt, n) > self.last:
                self.log.append((EventId(attempt, n), event))
                self.heard.append(event)
            n += 1
        if self.cancelled and (mode != b"a" or first_n == 1):
            return b"CANCEL"
        return b"OK"

    def lose(self, entries: int) -> None:
        """Lose the newest entries, as a fail-over to a replica does, or all, as a restart without data does."""
        del self.log[max(len(self.log) - entries, 0) :]
