"""One writer: whose turn it is where a database has one writer at a time.

In: threads that want to write, of this process and of others.  Out: the turn, to one after the other.

SQLite itself makes a writer look again and again, with growing pauses, so that whoever looks at the wrong moments waits
for seconds while others pass: a heartbeat, for instance.  Here everyone looks at the same short intervals.
"""

import fcntl
import os
import random
import threading
import time
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

#: Seconds between two looks, at most.
_LOOK: Final = 0.002
#: Seconds after which a thread goes on without a turn: whoever has it is frozen, and SQLite says whether it may write.
_PATIENCE: Final = 2.0


class OneWriter:
    """Lets one thread at a time in, of all processes that name the same file; a context manager for each of them.

    Args:
        file: Beside the database; made if it is not there, and left there.
    """

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._threads = threading.Lock()  # of this process: the file's lock is the process's
        self._is_ours = False

    @classmethod
    def of(cls, engine: Engine) -> "OneWriter | None":
        """Return that of a database; None: it has many writers."""
        if engine.dialect.name != "sqlite" or not engine.url.database:
            return None
        return cls(Path(engine.url.database + "-turn"))

    def __enter__(self) -> None:
        """Wait for the turn, for a while."""
        self._threads.acquire()
        deadline = time.monotonic() + _PATIENCE
        while not self._is_ours:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._is_ours = True
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(random.uniform(_LOOK / 4, _LOOK))  # noqa: S311  # no secret

    def __exit__(self, *_: object) -> None:
        """Give the turn to others."""
        if self._is_ours:
            self._is_ours = False
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()

    def close(self) -> None:
        """Close the file, when nobody writes any more."""
        os.close(self._file)
