"""Programs of ours in JavaScript, which use other people's packages.

In: a program in ``tests/clients`` and what it is told.
Out: what it prints: one JSON value on each line.

A program reads what it is told as JSON from its first argument.  The packages are those of
``tests/clients/package-lock.json``, installed by ``make test-clients``.
"""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from tests.cluster import PATIENCE
from tests.services import REQUIRE_ALL, debian_program

CLIENTS: Final = Path(__file__).parent / "clients"


def node() -> list[str]:
    """Return the command that runs Node; without it or the packages the test is skipped."""
    program = debian_program("node")
    if not (CLIENTS / "node_modules" / ".package-lock.json").exists():
        if os.environ.get(REQUIRE_ALL):
            pytest.fail(f"the packages are not installed, and {REQUIRE_ALL} is set; run `make test-clients`")
        pytest.skip("the packages are not installed; `make test-clients` installs them")
    return [str(program)]


class Running:
    """A program of ``tests/clients`` that runs; a context manager that ends it if it has not ended."""

    def __init__(self, program: str, told: Any = None) -> None:
        self._program = program
        command = [*node(), str(CLIENTS / program), json.dumps(told)]
        self._process = subprocess.Popen(
            command, cwd=CLIENTS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, timeout: float = 2 * PATIENCE) -> list[Any]:
        """Wait for its end, which must be a good one, and return what it has printed."""
        printed, complaints = self._process.communicate(timeout=timeout)
        if self._process.returncode:
            pytest.fail(f"{self._program} ended with code {self._process.returncode}:\n{printed}\n{complaints}")
        return [json.loads(line) for line in printed.splitlines()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def run(program: str, told: Any = None) -> list[Any]:
    """Run a program of ``tests/clients`` to its end, which must be a good one, and return what it has printed."""
    with Running(program, told) as running:
        return running.finish()
