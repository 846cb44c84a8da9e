"""The directory of `keepstream dev`: who runs in it, and what other shells need.

In: a directory, and the environment of a shell that may have sourced its file `env`.
Out: a lock that one `dev` holds for as long as it runs, the file `env` for as long, and whether a shell's settings are
those of a `dev` that has ended.

The lock is the system's own (flock): it ends with its process, however that dies, where a stored process id could be
somebody else's by now.  What stands in the lock file is only for people.
"""

import fcntl
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from keepstream import names
from keepstream_worker.dev_stack.guard import Guard

DIRECTORY: Final = Path(".keepstream")  #: By default, in the working directory.
DEV_VARIABLE: Final = "KEEPSTREAM_DEV"  #: Set by the file `env`: the directory.
API_URL: Final = "KEEPSTREAM_API_URL"  #: Set by the file `env`, for people: where the gateway is.
API_KEY: Final = "KEEPSTREAM_API_KEY"  #: Set by the file `env`, for people: a key for it.
PROVIDERS_VARIABLE: Final = "KEEPSTREAM_PROVIDERS_FILE"

_LOCK_WAIT: Final = 0.5  #: Seconds; a shell that only looks whether we run holds the lock for a moment.
_LOCK_CHECK: Final = 0.05


class DevDirectoryError(Exception):
    """The directory cannot be used; the message says what to type."""


class DevDirectory:
    """The directory of a `dev` that holds its lock."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self.env = path / "env"  #: To be sourced by other shells.
        self._lock = lock

    def publish(self, settings: Mapping[str, str]) -> None:
        """Write what other shells need, in one step, and who runs here."""
        self._describe(f"process {os.getpid()}, {settings['KEEPSTREAM_REDIS_URL']}")
        exports = {**settings, DEV_VARIABLE: str(self.path.absolute())}
        new = self.env.with_suffix(".new")
        new.touch(0o600)
        new.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()), "utf-8")
        new.replace(self.env)

    def api_key(self, database: Path) -> str:
        """Return an API key for the gateway, which is kept from run to run, with the database that knows it."""
        from keepstream.client import api_keys
        from keepstream.client.database import ClientDatabase
        from keepstream_worker.dev_stack.embedded import sqlite_url

        file = self.path / "api-key"
        client = ClientDatabase(sqlite_url(database))
        try:
            with client.transaction() as connection:
                key = file.read_text("utf-8") if file.is_file() else ""
                stored = api_keys.find(connection, api_keys.id_of(key) or "")
                if stored is None or not api_keys.is_key_of(key, stored):
                    _, key = api_keys.create(connection, names.DEFAULT_TENANT, "dev", frozenset(names.Right))
                    file.touch(0o600)
                    file.write_text(key, "utf-8")
        finally:
            client.close()
        return key

    def _describe(self, text: str) -> None:
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(text)
        self._lock.flush()


@contextmanager
def dev_directory(path: Path, command: str) -> Iterator[DevDirectory]:
    """Create the directory if need be, and hold its lock; on leaving, the file `env` is removed.

    ``command`` is how our command line is called, for messages.

    Raises:
        DevDirectoryError: another `dev` runs there, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".gitignore").write_text("*\n", "utf-8")
        lock = (path / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise DevDirectoryError(
            f"the directory {path} cannot be written ({reason}); choose another: {command} dev --directory DIR"
        ) from None
    with lock:
        if not _lock_exclusively(lock):
            lock.seek(0)
            raise DevDirectoryError(
                f"a dev runs in {path} already ({lock.read() or 'it is still starting'}); to use it: . {path / 'env'}; "
                f"for another one: {command} dev --directory DIR"
            )
        directory = DevDirectory(path, lock)
        directory._describe(f"process {os.getpid()}")  # noqa: SLF001  # the rest comes with the servers' addresses
        directory.env.unlink(missing_ok=True)  # of a dev that was killed together with its guard
        guard = Guard(directory.env)
        try:
            yield directory
        finally:
            directory.env.unlink(missing_ok=True)
            guard.release()


def has_ended(environment: Mapping[str, str]) -> bool:
    """Whether these are the settings of a `dev` that does not run any more."""
    path = environment.get(DEV_VARIABLE)
    if not path:
        return False
    try:
        with (Path(path) / "lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the directory is gone
        return True
    return True


def env_file_here() -> Path | None:
    """Return the file `env` of a `dev` that runs in the default directory; None: there is none."""
    file = DIRECTORY / "env"
    return file if file.is_file() and not has_ended({DEV_VARIABLE: str(DIRECTORY)}) else None


def own_providers_file(environment: Mapping[str, str]) -> Path | None:
    """Return the user's own providers file, if the environment names one: not that of a `dev`."""
    file, dev = environment.get(PROVIDERS_VARIABLE), environment.get(DEV_VARIABLE)
    if not file or (dev and Path(file).parent == Path(dev)):
        return None
    return Path(file)


def _lock_exclusively(lock: IO[str]) -> bool:
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_CHECK)
        else:
            return True
