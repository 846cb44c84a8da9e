"""The supervisor: keeps several worker processes going on one machine.

In: a command, a number and signals.  Out: that many child processes, told to stop when we are, and
started again when they die; an exit code.  Exists so that one `keepstream worker` fills a machine's
cores and can still be stopped, like a single worker, by one signal to one process.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

FIRST_PAUSE: Final = 1.0  #: Seconds before a dead child is replaced; doubled each time up to the longest.
LONGEST_PAUSE: Final = 30.0
SETTLED: Final = 60.0  #: Seconds after which a child counts as well started: the pauses begin anew.
_LOOK_EVERY: Final = 0.1  #: Seconds between two looks at the children.
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def python_module(module: str) -> list[str]:
    """Return the command that runs one of our modules as a process."""
    # Without -P a directory "worker" where the user happens to stand would be taken for ours.
    return [sys.executable, "-P", "-m", module]


class _Child:
    """One place for a worker process; its process changes."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.pause = FIRST_PAUSE
        self.due = 0.0  #: When to start the next process, by the monotonic clock.


class Supervisor:
    """Runs ``count`` processes of ``command`` until it is told to stop.

    A signal is passed on as it came, and so is the second one, with which workers force_stop.
    """

    def __init__(self, command: Sequence[str], count: int, environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._children = [_Child() for _ in range(count)]
        self._stopping = False
        self._worst = 0

    def run(self) -> int:
        """Run until all children have ended after a signal; returns 0, or the code of one that ended badly."""
        with self._signals_forwarded():
            while not self._stopping or any(child.process for child in self._children):
                for child in self._children:
                    if child.process is not None:
                        self._look_after(child, child.process)
                    elif not self._stopping and time.monotonic() >= child.due:
                        self._start(child)
                time.sleep(_LOOK_EVERY)
        return self._worst

    def _start(self, child: _Child) -> None:
        # In a group of its own, so that Ctrl-C reaches it through us, once.
        child.process = subprocess.Popen(self._command, env=self._environment, process_group=0)
        child.started = time.monotonic()
        if self._stopping:  # the signal came while the process was started, and passed it by
            child.process.terminate()

    def _look_after(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        code = process.poll()
        if code is None:
            return
        child.process = None
        if self._stopping:
            # Ended by the signal itself: it came before the worker listened for signals, so nothing was begun.
            if -code not in _FORWARDED:
                self._worst = self._worst or (code if code >= 0 else 128 - code)
            return
        if time.monotonic() - child.started > SETTLED:
            child.pause = FIRST_PAUSE
        log.error("worker_process_ended", pid=process.pid, code=code, restart_in=child.pause)
        child.due = time.monotonic() + child.pause
        child.pause = min(child.pause * 2, LONGEST_PAUSE)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for child in self._children:
            if child.process is not None:
                child.process.send_signal(signum)

    @contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        before = {signum: signal.signal(signum, self._forward) for signum in _FORWARDED}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
