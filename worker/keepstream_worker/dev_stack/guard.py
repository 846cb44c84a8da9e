"""The guard: ends a group of processes when the process that started it is gone, however that died.

In: files and directories that shall go with the group, from `embedded` and `dev`.
Out: a process group, to be joined by the processes that must not outlive us.

No process can clean up after its own SIGKILL.  The guard is a shell that waits at one end of a pipe; the other end is
ours alone, and the system closes it when we end.  That works the same on Linux and on macOS.
"""

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

#: A line releases the guard; the end of the pipe without one means that we are gone.  The guard leads the group and
#: ends with it.  It outlives Ctrl-C and a closed terminal, because we are told of these ourselves.
_SCRIPT: Final = "trap '' HUP INT TERM; read -r line && exit; rm -rf -- \"$@\"; kill -9 0"


class Guard:
    """Leads a process group that is killed (SIGKILL) if we end without releasing it.

    Args:
        paths: Files and directories that are removed as well.
    """

    def __init__(self, *paths: Path) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "keepstream-guard", *(str(path.absolute()) for path in paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            process_group=0,
        )

    @property
    def group(self) -> int:
        """The process group, for the ``process_group`` of ``subprocess.Popen``."""
        return self._process.pid

    def release(self) -> None:
        """End the guard; the group and the files stay."""
        with suppress(BrokenPipeError):  # somebody has killed it
            self._process.communicate(b"\n")
