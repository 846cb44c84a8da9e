"""The log reader: reads the logs of jobs for all followers of an event loop, many in one round trip.

In: questions, from followers.  Out: entries, or Redis' refusal.

After a reconnection, or a silence, many followers ask at once.  What is asked in one moment is asked together, by few
connections.  Who waits for its turn has no time-out running, and learns at once what an outage did to those before it.
"""

import asyncio
from typing import Any, Final, NamedTuple

import redis.asyncio

from keepstream.client.cancellation import cancellable
from keepstream.client.follower import LOG_PAGE, LogEntry
from keepstream.client.payloads import Payload

CONNECTIONS: Final = 4  #: Round trips at the same time.
_TOGETHER: Final = 16  #: Questions of one round trip; each may bring ``LOG_PAGE`` entries.


class _Question(NamedTuple):
    log: str
    start: str  #: Of the range, as ``XRANGE`` takes it; empty: only the newest entry is wanted.


_Answer = list[LogEntry] | Exception


class LogReader:
    """Reads logs. Belongs to an event loop.

    Args:
        commands: Performs the commands.
    """

    def __init__(self, commands: "redis.asyncio.Redis") -> None:
        self._commands = commands
        self._asked: dict[_Question, asyncio.Future[_Answer]] = {}  # and not sent yet
        self._readers: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def read(self, log: str, after: str | None) -> list[LogEntry]:
        """Return the first ``LOG_PAGE`` entries with ids greater than ``after``."""
        return await self._ask(_Question(log, "-" if after is None else f"({after}"))

    async def read_newest(self, log: str) -> LogEntry | None:
        """Return the newest entry, or None if there is no log."""
        entries = await self._ask(_Question(log, ""))
        return entries[0] if entries else None

    async def close(self) -> None:
        """End; who still waits gets an error."""
        self._is_closed = True
        readers = list(self._readers)
        for reader in readers:
            reader.cancel()
        if readers:
            await asyncio.wait(readers)
        _answer(self._take(len(self._asked)), redis.ConnectionError("closed"))

    async def _ask(self, question: _Question) -> list[LogEntry]:
        if self._is_closed:
            raise redis.ConnectionError("closed")
        # Nobody joins a question that has been sent: it may have been answered before they had subscribed.
        answer = self._asked.get(question)
        if answer is None:
            answer = self._asked[question] = asyncio.get_running_loop().create_future()
            # One that has just ended reads no more, though the loop has not told us yet.
            if sum(not reader.done() for reader in self._readers) < CONNECTIONS:
                reader = asyncio.create_task(self._read_all(), name="keepstream-logs")
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)
        found = await asyncio.shield(answer)
        if isinstance(found, Exception):
            raise found.with_traceback(None)  # else it would grow with each follower that raises it
        return found

    async def _read_all(self) -> None:
        """Ask until there are no questions."""
        while self._asked:
            sent = self._take(_TOGETHER)
            try:
                answers = await cancellable(self._perform(list(sent)))
            except Exception as error:  # noqa: BLE001  # each follower gets it, and says what it means
                _answer(sent | self._take(len(self._asked)), error)
            except BaseException:
                _answer(sent, redis.ConnectionError("closed"))
                raise
            else:
                for waiting, answer in zip(sent.values(), answers, strict=True):
                    waiting.set_result(answer)

    def _take(self, count: int) -> "dict[_Question, asyncio.Future[_Answer]]":
        questions = list(self._asked)[:count]
        return {question: self._asked.pop(question) for question in questions}

    async def _perform(self, questions: list[_Question]) -> list[_Answer]:
        pipeline: Any
        async with self._commands.pipeline(transaction=False) as pipeline:
            for log, start in questions:
                if start:
                    pipeline.xrange(log, start, count=LOG_PAGE)
                else:
                    pipeline.xrevrange(log, count=1)
            replies = await pipeline.execute(raise_on_error=False)
        return [reply if isinstance(reply, Exception) else log_entries(reply) for reply in replies]


def _answer(questions: "dict[_Question, asyncio.Future[_Answer]]", error: Exception) -> None:
    for waiting in questions.values():
        waiting.set_result(error)


def log_entries(reply: Any) -> list[LogEntry]:
    """Return the entries in a reply of ``XRANGE``."""
    return [LogEntry(entry_id.decode(), Payload(fields.get(b"event", b""))) for entry_id, fields in reply]
