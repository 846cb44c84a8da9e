"""The demo's crowd: many jobs at once on two workers, one of which is killed in the middle of its streams.

In: a running dev stack and its workers.
Out: what is known so far, to be shown while it happens; at the end how long a delta took from the provider to its
follower, what a late follower holds, and the stored row.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, Final

from keepstream import AsyncClient
from keepstream.events import AttemptStarted, DeltaEvent
from keepstream.transcript import Transcript
from keepstream_worker.dev_stack.stack import SCRIPTED, DevStack, WorkerProcess

JOBS: Final = 40
ROW_SQL: Final = """\
SELECT status, attempt, content, output_sha256 FROM keepstream_jobs
  JOIN keepstream_choices ON job_id = id WHERE id = '{}'"""

_TEXT: Final = (
    "This answer was begun twice, because its first worker was killed in the middle of it. Followers were told to drop "
    "what they held, and the second worker started over: nada se ha perdido, 什么都没有丢失 ✔"
)
_MESSAGE: Final = {"role": "user", "content": "Tell me what happens when a worker dies."}
_RATE: Final = 25.0  #: Deltas a second of each stream.
_DELTAS: Final = 50
_KILLED_AT: Final = 12  #: The event of the first job at which its worker is killed ...
#: Its first stream cannot end before that, however long this process waits for a core: the model pauses.
_PAUSE: Final[dict[str, Any]] = {"key": "demo-1", "faults": [{"kind": "comments", "after": 24, "for": 60}]}
_JOINED_AT: Final = 12  #: ... and that of the next attempt at which the late follower joins.
_WATCH_INTERVAL: Final = 0.1  #: Seconds.
_CHECK_INTERVAL: Final = 0.01  #: Seconds.
_PATIENCE: Final = 60.0  #: Seconds without an event, on an overloaded machine.

_RUNNING_SQL: Final = "SELECT worker_id, count(*) FROM keepstream_attempts WHERE outcome IS NULL GROUP BY worker_id"
_OWNER_SQL: Final = "SELECT worker_id FROM keepstream_attempts WHERE job_id = ? AND outcome IS NULL"
_RESULTS_SQL: Final = "SELECT count(*) FROM keepstream_attempts WHERE outcome IN ('finished', 'recovered')"


class CrowdError(Exception):
    """The demo cannot be shown; the message says why."""


@dataclass
class Crowd:
    """What is known of the jobs so far. Workers are named by their process ids."""

    running: dict[int, int] = field(default_factory=dict)  #: Streams of each worker.
    victim: int | None = None  #: The worker that was killed ...
    interrupted: int = 0  #: ... and the streams that it had.
    takeover: float | None = None  #: Seconds from the kill until all of these had begun again.
    deltas: int = 0  #: Received by followers.
    delays: list[float] = field(default_factory=list)  #: Milliseconds from provider to follower, of each timed delta.
    right: int = 0  #: Followers that hold exactly the stored text.
    results: int = 0  #: Attempts that came to their end; more than jobs would mean that one did so twice.
    missed: int = 0  #: Events that the late follower had missed when it joined.
    late_is_right: bool = False
    job_id: str = ""  #: The job whose row is shown.
    row: tuple[str, int, str, str] | None = None  #: What ``ROW_SQL`` finds.

    @property
    def succeeded(self) -> bool:
        """Whether each job completed once, and each follower holds the stored text."""
        return self.right == self.results == JOBS and self.late_is_right

    def delay(self, share: float) -> float:
        """Return the milliseconds that ``share`` of the deltas did not exceed."""
        delays = sorted(self.delays)
        return delays[min(int(share * len(delays)), len(delays) - 1)] if delays else 0.0


async def run_crowd(stack: DevStack, workers: Sequence[WorkerProcess], crowd: Crowd) -> None:
    """Run the jobs to their end, and keep ``crowd`` up to date meanwhile.

    Raises:
        CrowdError: the streams were over too soon.
        KeepstreamError: a service failed.
        sqlite3.Error: the database failed.
    """
    url = stack.settings["KEEPSTREAM_DATABASE_URL"]
    with closing(sqlite3.connect(stack.database)) as database:
        async with AsyncClient(stack.redis_url, database_url=url) as client:
            await _Run(client, database, workers, crowd).run()


class _Run:
    """One run of the crowd."""

    def __init__(
        self, client: AsyncClient, database: sqlite3.Connection, workers: Sequence[WorkerProcess], crowd: Crowd
    ) -> None:
        self._client = client
        self._database = database
        self._workers = {worker.pid: worker for worker in workers}
        self._crowd = crowd
        self._killed_at = 0.0
        self._begun_again: set[str] = set()  #: Jobs that the killed worker had and the other one has begun.

    async def run(self) -> None:
        """Run all jobs to their end."""
        crowd, shown, late = self._crowd, Transcript(), Transcript()
        (before,) = self._database.execute(_RESULTS_SQL).fetchone()
        watch = asyncio.create_task(self._watch())
        followers = [asyncio.create_task(self._enqueue_and_follow(number, shown)) for number in range(JOBS)]
        try:
            await _until(lambda: _has_reached(shown, 1, _KILLED_AT), followers)
            await _until(lambda: self._owner(crowd.job_id) is not None or shown.terminal is not None, followers)
            self._kill(self._owner(crowd.job_id))
            await _until(lambda: _has_reached(shown, 2, _JOINED_AT), followers)
            crowd.missed = shown.last.n if shown.last else 0
            await self._follow(crowd.job_id, late)
            await asyncio.gather(*followers)
        finally:
            for task in (watch, *followers):
                task.cancel()
            await asyncio.gather(watch, *followers, return_exceptions=True)
        crowd.late_is_right = _is_right(late)
        (after,) = self._database.execute(_RESULTS_SQL).fetchone()
        crowd.results = after - before
        crowd.row = self._database.execute(ROW_SQL.format(crowd.job_id)).fetchone()

    async def _watch(self) -> None:
        while True:
            streams = self._streams()
            self._crowd.running = {pid: streams.get(pid, 0) for pid in self._workers}
            await asyncio.sleep(_WATCH_INTERVAL)

    def _streams(self) -> dict[int, int]:
        return {_pid(worker_id): count for worker_id, count in self._database.execute(_RUNNING_SQL)}

    async def _enqueue_and_follow(self, number: int, shown: Transcript) -> None:
        """Run one job; the first is the one whose text is shown, the others carry time stamps."""
        script: dict[str, Any] = {"deltas": _DELTAS, "stamp": True} if number else {"text": _TEXT, **_PAUSE}
        request = {"model": "scripted-1", "messages": [_MESSAGE], "script": {**script, "rate": _RATE}}
        job_id = await self._client.enqueue(request, provider=SCRIPTED, id=f"demo-{number + 1}")
        if number == 0:
            self._crowd.job_id = job_id
        transcript = Transcript() if number else shown
        await self._follow(job_id, transcript)
        self._crowd.right += _is_right(transcript)

    async def _follow(self, job_id: str, transcript: Transcript) -> None:
        crowd = self._crowd
        async with aclosing(self._client.follow(job_id, timeout=_PATIENCE)) as events:
            async for event in events:
                now = time.monotonic_ns()
                transcript.apply(event)
                if isinstance(event, DeltaEvent):
                    crowd.deltas += 1
                    if job_id != crowd.job_id:
                        crowd.delays += [(now - int(stamp)) / 1e6 for stamp in (event.delta.content or "").split()]
                elif isinstance(event, AttemptStarted) and event.reason == "worker_lost":
                    self._begun_again.add(job_id)
                    if crowd.takeover is None and len(self._begun_again) == crowd.interrupted:
                        crowd.takeover = time.monotonic() - self._killed_at

    def _owner(self, job_id: str) -> int | None:
        row = self._database.execute(_OWNER_SQL, (job_id,)).fetchone()
        return None if row is None else _pid(row[0])

    def _kill(self, victim: int | None) -> None:
        """Kill a worker in the middle of its streams, as a crash would."""
        if victim is None:
            raise CrowdError(
                "this machine is so busy that the streams ended before a worker could be killed; try again"
            )
        self._crowd.victim, self._crowd.interrupted = victim, self._streams().get(victim, 0)
        self._begun_again.clear()  # on a very busy machine a living worker may have seemed dead
        self._killed_at = time.monotonic()
        self._workers[victim].kill()


async def _until(condition: Callable[[], bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the condition; raise what one of the tasks raised."""
    while not condition():
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(_CHECK_INTERVAL)


def _has_reached(transcript: Transcript, attempt: int, n: int) -> bool:
    """Whether so much has arrived, or will never."""
    return transcript.terminal is not None or (transcript.last is not None and transcript.last >= (attempt, n))


def _is_right(transcript: Transcript) -> bool:
    return transcript.terminal is not None and transcript.sha256() == transcript.terminal.output_sha256


def _pid(worker_id: str) -> int:
    """Return the process id in a worker's id, which is <host>-<process id>-<a random part>."""
    return int(worker_id.rsplit("-", 2)[1])
