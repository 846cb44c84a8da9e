"""A fork server: it has imported the worker's modules, and each process that it starts is a copy of it.

In: a module, its environment and a log file, from the test cluster; commands, from tests of the command line.
Out: a process of its own, with its exit code; what a command has said.

A worker takes 1.3 s of CPU to start and a command half of that, nearly all of it for imports, and the tests start some
two hundred of each. A copy runs the module as `python -m` would, in a session, with an environment, file descriptors
and signals of its own. Tests about starting, and the chaos suite, start their workers as in production.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedServiceError

_ROOT: Final = Path(__file__).parents[1]

#: What a worker and the provider have imported by the time that they are at work.
_PRELOADED: Final = (
    "celery.apps.worker",
    "celery.concurrency.base",
    "celery.worker.autoscale",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "kombu.transport.redis",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "keepstream_gateway.server",
    "keepstream_worker.app",
    "tests.recording_provider",
    # And what commands need besides; they themselves are imported in the copy, which has their environment.
    "alembic.command",
    "rich.console",
    "rich.live",
    "rich.padding",
    "rich.table",
    "typer",
)


class ForkedProcess(subprocess.Popen[bytes]):
    """A process that the server has started, used like any other."""

    def __init__(self, module: str, channel: socket.socket) -> None:
        # Not by the constructor, which would start a program.
        self.args = ["-m", module]
        self.stdin = self.stdout = self.stderr = None
        self.returncode: int | None = None
        self._child_created = False  # of this process it is no child, so there is nothing to collect at the end
        self._channel = channel
        self.pid = self._next_number()

    @override
    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    @override
    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self._channel], [], [], timeout)
            if not ready:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._next_number()
            self._channel.close()
        return self.returncode

    def _next_number(self) -> int:
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: what is left in a buffer, ``select`` would not see
            received = self._channel.recv(1)
            if not received:
                raise EmbeddedServiceError("the fork server has ended")
            line += received
        return int(line)


class ForkServer:
    """The server, as long as the context is entered."""

    def __enter__(self) -> Self:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=_ROOT, pass_fds=[theirs.fileno()], start_new_session=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._control.close()
        self._process.wait()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        log: Path,
        *,
        errors: Path | None = None,
        given: Path | None = None,
        directory: Path | None = None,
    ) -> ForkedProcess:
        """Run ``module`` in a process in a session of its own; what it says is appended to ``log``.

        With ``errors``, what it says on standard error is appended there. It reads what is ``given``, by default what
        this process does, and is in ``directory``, by default that of the project.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        request = {
            "module": module,
            "arguments": arguments,
            "environment": environment,
            "log": str(log),
            "errors": str(errors or log),
            "given": given and str(given),
            "directory": directory and str(directory),
        }
        ours.sendall(json.dumps(request).encode() + b"\n")
        return ForkedProcess(module, ours)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        *,
        given: str = "",
        directory: Path | None = None,
        timeout: float,
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``module`` to its end, as ``subprocess.run`` would; raise ``TimeoutExpired`` after so many seconds."""
        with tempfile.TemporaryDirectory() as folder:
            log, errors, file = (Path(folder) / name for name in ("output", "errors", "given"))
            file.write_text(given)
            process = self.start(module, arguments, environment, log, errors=errors, given=file, directory=directory)
            try:
                code = process.wait(timeout)
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()
            return subprocess.CompletedProcess([module, *arguments], code, log.read_text(), errors.read_text())


def _serve(control: socket.socket) -> None:
    """Start what is asked for, until the other end is closed."""
    while True:
        received, (*channels,), _, _ = socket.recv_fds(control, 1, 1)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not received:
            return
        if os.fork() == 0:
            control.close()
            _watch(socket.socket(fileno=channels[0]))
        os.close(channels[0])


def _watch(channel: socket.socket) -> NoReturn:
    """Start one process, and tell how it ends."""
    request = json.loads(channel.makefile("r").readline())
    pid = os.fork()
    if pid == 0:
        channel.close()
        _become(**request)
    channel.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # nobody waits for it
        channel.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
    errors: str,
    given: str | None,
    directory: str | None,
) -> NoReturn:
    """Be what `python -m module` is from its first line on."""
    os.setsid()
    for path, descriptor in ((log, 1), (errors, 2)):
        output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(output, descriptor)
        os.close(output)
    if given is not None:
        source = os.open(given, os.O_RDONLY)
        os.dup2(source, 0)
        os.close(source)
    if directory is not None:
        os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    gc.enable()
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit


def _main(descriptor: str) -> None:
    control = socket.socket(fileno=int(descriptor))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a copy need not look through what it has from here, nor write to its memory
    _serve(control)


if __name__ == "__main__":
    _main(sys.argv[1])
