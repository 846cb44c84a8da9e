"""The summaries of jobs that are silent: all followers of a client get them by one query at a time.

In: the names of their jobs, from followers in any thread or on any event loop.  Out: futures of the summaries.

A follower whose job is silent looks at the job's row every few seconds.  Hundreds of them would make hundreds of
transactions; so the more of them there are, the longer the pause between two queries, up to a second.
"""

import random
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

from keepstream.client.forks import ForkMember
from keepstream.results import JobSummary

_PAUSE_EACH: Final = 0.02  #: Seconds between the beginnings of two queries, for each follower that there is,
_LONGEST_PAUSE: Final = 1.0  #: but no more than this.
_MOST: Final = 500  #: Jobs in one query.

K = TypeVar("K", bound=Hashable)  #: What names a job.


class SummaryReader(ForkMember, Generic[K]):
    """Reads summaries for all followers of a client. Thread-safe; its thread runs while there is something to read.

    Args:
        read: Returns the summaries of some jobs, those that there are.
    """

    def __init__(self, read: Callable[[list[K]], Mapping[K, JobSummary]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._followers: weakref.WeakSet[SummaryQuestion[K]] = weakref.WeakSet()
        self._asked: list[tuple[K, Future[JobSummary | None]]] = []
        self._is_running = False
        self._began = -_LONGEST_PAUSE
        super().__init__()

    def join(self, job: K) -> "SummaryQuestion[K]":
        """Return what one follower asks with, for as long as it follows."""
        return SummaryQuestion(self, job)

    def ask(self, job: K) -> Future[JobSummary | None]:
        """Return the job's summary, or None if there is no row."""
        answer: Future[JobSummary | None] = Future()
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._run, name="keepstream-summaries", daemon=True).start()
                self._is_running = True
            self._asked.append((job, answer))
        return answer

    def pause(self) -> float:
        """Return for how many seconds a follower should not ask again, so that all can be answered; each time others.

        Their number divided by ``_MOST`` is how long it takes to answer all.
        """
        return len(self._followers) / _MOST * _LONGEST_PAUSE * random.uniform(0.5, 1.5)  # noqa: S311  # no secret

    def add_follower(self, follower: "SummaryQuestion[K]") -> None:
        """Count a follower, until it is gone."""
        with self._lock:
            self._followers.add(follower)

    def after_fork_in_child(self) -> None:
        """Forget the thread, and what the parent's followers have asked."""
        self._lock = threading.Lock()
        self._followers = weakref.WeakSet()
        self._asked = []
        self._is_running = False

    def _run(self) -> None:
        while True:
            pause = min(_LONGEST_PAUSE, _PAUSE_EACH * len(self._followers))
            time.sleep(max(0.0, self._began + pause - time.monotonic()))
            with self._lock:
                asked, self._asked = self._asked[:_MOST], self._asked[_MOST:]
                if not asked:
                    self._is_running = False
                    return
            self._began = time.monotonic()
            self._answer([(job, answer) for job, answer in asked if answer.set_running_or_notify_cancel()])

    def _answer(self, asked: list[tuple[K, Future[JobSummary | None]]]) -> None:
        try:
            found = self._read(list(dict.fromkeys(job for job, _ in asked)))
        except Exception as error:  # noqa: BLE001  # each follower gets it, and says what it means
            for _, answer in asked:
                answer.set_exception(error)
        else:
            for job, answer in asked:
                answer.set_result(found.get(job))


class SummaryQuestion(Generic[K]):
    """What one follower asks a ``SummaryReader``: again and again, how its job is."""

    def __init__(self, reader: SummaryReader[K], job: K) -> None:
        self._job = job
        self._reader = reader
        reader.add_follower(self)

    def ask(self) -> Future[JobSummary | None]:
        """Return the job's summary, or None if there is no row."""
        return self._reader.ask(self._job)
