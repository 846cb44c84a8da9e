"""A terminal for the tests: a real pseudo-terminal, and what a person would see on it.

In: a command, a size, key strokes.
Out: the screen, what has scrolled off it, and how the command ended.
"""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pyte

CTRL_C: Final = b"\x03"
PATIENCE: Final = 120.0  #: Seconds that a busy machine may take for what takes a second elsewhere.

#: Run in a session of its own, a shell that opens the terminal gets it as its controlling one, so that Ctrl-C counts.
_ATTACH: Final = 'terminal=$1; shift; exec "$@" <"$terminal" >"$terminal" 2>&1'
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a terminal of its own; leaving the context kills it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        columns: int = 80,
        rows: int = 24,
        cwd: Path | None = None,
    ) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1e-9)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""  #: Everything the command wrote, escape sequences included.
        self._parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", _ATTACH, "terminal", os.ttyname(child), *command],
            env={"TERM": "xterm-256color", **environment},
            cwd=cwd,
            start_new_session=True,
        )
        self._child: int | None = child  # kept until the command writes: a terminal that nobody has open is at its end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        if self._child is not None:
            os.close(self._child)
        os.close(self._parent)

    @property
    def text(self) -> str:
        """Everything that was written so far, without escape sequences."""
        return _ESCAPES.sub("", self.written.decode(errors="replace")).replace("\r\n", "\n")

    @property
    def lines(self) -> list[str]:
        """The rows of the screen, without spaces at their ends."""
        return [row.rstrip() for row in self._screen.display]

    @property
    def scrolled_off(self) -> list[str]:
        """The rows that are not on the screen any more."""
        return ["".join(row[column].data for column in sorted(row)).rstrip() for row in self._screen.history.top]

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._parent, keys)

    def wait_for(self, text: str) -> None:
        """Wait until the command has written this."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            assert self._read(deadline), f"{text!r} was not written: {self.text}"

    def wait(self) -> int:
        """Read to the end and print the screen; return the command's exit code, as a shell would show it."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        code = self.process.wait(max(deadline - time.monotonic(), 1))
        sys.stdout.write("\n".join([*self.scrolled_off, *self.lines]))  # shown with a test that fails
        return code if code >= 0 else 128 - code

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._parent], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"nothing more was written: {self.text}"
        try:
            data = os.read(self._parent, 65_536)
        except OSError:  # the end, on Linux
            return False
        if self._child is not None:
            os.close(self._child)
            self._child = None
        self.written += data
        self._stream.feed(data)
        return bool(data)
