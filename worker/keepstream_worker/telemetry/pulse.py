"""The pulse: a worker's sign of life that needs no server, so that an outage of one is never taken for a death.

In: a beat of each worker process every few seconds, while both of its threads run.  Out: one small file per process,
with the time of its last beat; what is wrong, to `keepstream alive`.

Only little of the standard library is imported: a health check asks every few seconds, for ever.
"""

import os
import time
from contextlib import suppress
from typing import Final

INTERVAL: Final = 5.0  #: Seconds between two beats.
#: Seconds without a beat after which a process counts as hung. More than a busy machine, a slow resolver or the pause
#: before a process that died is replaced can take.
LIMIT: Final = 60.0
_SUFFIX: Final = ".pulse"


class PulseError(Exception):
    """The directory cannot be used; the message says why, on one line."""


class Pulse:
    """The pulse of one worker process.

    Args:
        directory: On a file system in memory, since the event loop writes there; it belongs to one `keepstream worker`.
        number: The process's number among those of the command, from 1.
    """

    def __init__(self, directory: str, number: int = 1) -> None:
        self._path = _path(directory, number)

    def beat(self) -> None:
        """Note that the process is alive now.

        Raises:
            OSError: the file cannot be written.
        """
        # Opened anew, so that a file that was tidied away comes back. One write of always the same length, so that
        # nobody reads half of it. Not the time of day, which can be set.
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.write(file, b"%020.3f\n" % time.monotonic())
        finally:
            os.close(file)

    def end(self) -> None:
        """Take the file away: the process ends in order, and nobody is to wait for its next beat."""
        with suppress(OSError):  # if it stays, it is out of date soon
            os.unlink(self._path)


def expect(directory: str, processes: int) -> None:
    """Make the directory ready for so many processes, each of which has yet to give its first beat.

    What an earlier command left behind is removed.

    Raises:
        PulseError: the directory cannot be made or written.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in _names(directory):
            os.unlink(os.path.join(directory, name))
        for number in range(1, processes + 1):
            os.close(os.open(_path(directory, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise PulseError(f"{directory} cannot be written ({error.strerror})") from None


def complaint(directory: str, limit: float = LIMIT) -> str | None:
    """Return what is wrong with the worker whose processes beat in ``directory``; None: all of them are alive.

    Args:
        directory: As in ``Pulse``.
        limit: Seconds since the last beat after which a process counts as hung.
    """
    try:
        names = _names(directory)
    except OSError as error:
        return f"no worker has run here: {directory} cannot be read ({error.strerror})"
    if not names:
        return f"no worker runs here: {directory} is empty"
    for name in names:
        process = f"worker process {name.removesuffix(_SUFFIX)} of {len(names)}"
        try:
            with open(os.path.join(directory, name), "rb") as file:
                text = file.read(64)
        except OSError:  # it has ended in order since we looked
            continue
        if not text:
            return f"{process} has not started yet"
        silence = time.monotonic() - float(text)
        if silence > limit:
            return f"{process} has given no sign of life for {silence:.0f} s"
    return None


def _path(directory: str, number: int) -> str:
    return os.path.join(directory, f"{number}{_SUFFIX}")


def _names(directory: str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.endswith(_SUFFIX))
