"""Processes: start them on chosen cores, exchange JSON lines, measure CPU and memory, stop the whole tree.

In: command lines.
Out: ``Process`` values, to the services and the contenders.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
_STOP_SECONDS: Final = 5.0
_LOG_TAIL_BYTES: Final = 2000
_SCHEDSTAT: Final = "%d/task/*/schedstat"  #: Under ``/proc``: nanoseconds run, nanoseconds waited, turns.


class BenchmarkError(Exception):
    """A part of the run failed; the message says which, and shows the end of its log."""


class Cores(NamedTuple):
    """The core that the measured worker has to itself, and those that everything else shares."""

    worker: frozenset[int]
    rest: frozenset[int]


class Memory(NamedTuple):
    """Bytes held by a process tree."""

    rss: int  #: Resident, shared pages counted once per process.
    uss: int  #: Resident and shared with nobody.


def choose_cores() -> Cores:
    """Give the worker the last core available and everything else the others; with a single core they share it."""
    cores = sorted(os.sched_getaffinity(0))
    return Cores(frozenset(cores[-1:]), frozenset(cores[:-1] or cores))


class Process:
    """A child in a session of its own, so that Ctrl-C reaches only the harness."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        cores: frozenset[int],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        speaks: bool = False,
    ) -> None:
        """Start ``command``; its output goes to ``log``, except standard output if it ``speaks`` JSON lines there."""
        self.name = name
        self._log = log
        self._unread = b""
        with log.open("ab") as log_file:
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if speaks else log_file,
                stderr=log_file,
                bufsize=0,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509  # The harness has no threads.
            )

    @property
    def pid(self) -> int:
        """The process id of the root."""
        return self._child.pid

    def send(self, value: object) -> None:
        """Write ``value`` as a JSON line to the child."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(value).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        """Return the next JSON line of the child.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
            BenchmarkError: the child ended.
        """
        assert self._child.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError(f"{self.name} said nothing for {timeout:.0f} s")
            data = os.read(self._child.stdout.fileno(), 65_536)
            if not data:
                raise self.failure("ended early")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def expect(self, event: str, timeout: float, needed: "Process | None" = None) -> dict[str, Any]:
        """Return the next line with this ``event``, discarding others.

        Raises:
            TimeoutError: it did not come within ``timeout`` seconds.
            BenchmarkError: the child ended, or ``needed``, without which it has nothing to say.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self.receive(min(1.0, deadline - time.monotonic()))
            except TimeoutError:
                if needed is not None and not needed.is_running():
                    raise needed.failure("ended") from None
                if time.monotonic() > deadline:
                    raise
            else:
                if message.get("event") == event:
                    return message

    def failure(self, what: str) -> BenchmarkError:
        """Return an error that includes the end of the child's log."""
        log = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return BenchmarkError(f"{self.name} {what}; the end of its log:\n{log}")

    def cpu_seconds(self) -> float:
        """Return the user and system time of the tree's living processes so far, all threads, in seconds."""
        return sum(map(cpu_seconds, self._tree()))

    def waited_seconds(self) -> float:
        """Return for how long the tree's living threads were ready to run so far, and kept waiting for a core."""
        nanoseconds = 0
        for pid in self._tree():
            with suppress(OSError):
                nanoseconds += sum(int(file.read_text().split()[1]) for file in Path("/proc").glob(_SCHEDSTAT % pid))
        return nanoseconds / 1e9

    def memory(self) -> Memory:
        """Return the tree's current memory."""
        infos = [psutil.Process(pid).memory_full_info() for pid in self._tree()]
        return Memory(sum(info.rss for info in infos), sum(info.uss for info in infos))

    def is_running(self) -> bool:
        """Return whether the root is still running."""
        return self._child.poll() is None

    def wait(self, timeout: float) -> None:
        """Wait for the root to end by itself; raise ``subprocess.TimeoutExpired``."""
        self._child.wait(timeout)

    def close(self) -> None:
        """Stop the whole tree: SIGTERM, and SIGKILL after a few seconds."""
        self._child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):  # Also for grandchildren that outlived the root.
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _tree(self) -> list[int]:
        try:
            root = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            raise self.failure("ended") from None
        return [self.pid, *(child.pid for child in root.children(recursive=True))]


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of one process so far, all threads, in seconds; 0 if it has ended."""
    # The clock that clock_getcpuclockid(3) names: nanoseconds, where /proc/<pid>/stat counts ticks of 10 ms.
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0
