"""The supervisor: keeps several worker processes running on one machine.

In: a command and a number, from `keepstream worker`; signals.
Out: that many child processes, replaced when they die; an exit code.

A Python process uses one core; this fills the machine, and one signal to one process still stops it all.
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
SETTLED: Final = 60.0  #: Seconds after which a child counts as started: the pauses begin anew.
_CHECK_INTERVAL: Final = 0.1  #: Seconds between two checks of the children.
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


def python_module(module: str) -> list[str]:
    """Return the command that runs one of our modules as a process."""
    # Without -P, a directory "keepstream_worker" in the current directory would be imported instead of ours.
    return [sys.executable, "-P", "-m", module]


class _Slot:
    """A slot for a worker process; a process that dies is replaced in its slot."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.pause = FIRST_PAUSE
        self.due = 0.0  #: When to start the next process, by the monotonic clock.


class Supervisor:
    """Runs ``count`` processes of ``command`` until a signal stops it.

    Each process is given its number, from 1, as its last argument; one that replaces another has the same number.
    Each signal is passed on, also a second one, which shortens the shutdown of a worker.
    """

    def __init__(self, command: Sequence[str], count: int, environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._slots = [_Slot(number) for number in range(1, count + 1)]
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Run until all children have ended after a signal; returns 0, or the code of one that ended badly."""
        with self._signals_forwarded():
            while not self._stopping or any(slot.process for slot in self._slots):
                for slot in self._slots:
                    self._tend(slot)
                time.sleep(_CHECK_INTERVAL)
        return self._exit_code

    def _tend(self, slot: _Slot) -> None:
        """See to one slot, whatever comes up: the other processes need us all the same."""
        try:
            if slot.process is not None:
                self._check(slot, slot.process)
            elif not self._stopping and time.monotonic() >= slot.due:
                self._start(slot)
        except Exception:
            log.exception("supervisor_defect")
            self._postpone(slot)

    def _start(self, slot: _Slot) -> None:
        # In a process group of its own, so that Ctrl-C reaches it only through us, once.
        command = [*self._command, str(slot.number)]
        try:
            slot.process = subprocess.Popen(command, env=self._environment, process_group=0)
        except OSError as error:  # no memory or no process number is left
            log.error("worker_process_not_started", reason=error.strerror, retry_in=slot.pause)  # noqa: TRY400  # no defect
            self._postpone(slot)
            return
        slot.started = time.monotonic()
        if self._stopping:  # the signal came while the process was being started, and missed it
            slot.process.terminate()

    def _check(self, slot: _Slot, process: subprocess.Popen[bytes]) -> None:
        code = process.poll()
        if code is None:
            return
        slot.process = None
        if self._stopping:
            # The signal ended the process before it handled signals, so no job had been started.
            if -code not in _FORWARDED:
                self._exit_code = self._exit_code or (code if code >= 0 else 128 - code)
            return
        if time.monotonic() - slot.started > SETTLED:
            slot.pause = FIRST_PAUSE
        log.error("worker_process_ended", pid=process.pid, code=code, restart_in=slot.pause)
        self._postpone(slot)

    def _postpone(self, slot: _Slot) -> None:
        slot.due = time.monotonic() + slot.pause
        slot.pause = min(slot.pause * 2, LONGEST_PAUSE)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for slot in self._slots:
            try:
                if slot.process is not None:
                    slot.process.send_signal(signum)
            except Exception:  # the others are to hear of it too
                log.exception("supervisor_defect")

    @contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        ignored = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ()  # as nohup leaves it
        heard = [signum for signum in _FORWARDED if signum not in ignored]
        before = {signum: signal.signal(signum, self._forward) for signum in heard}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
