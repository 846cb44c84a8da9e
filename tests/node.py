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
from typing import Any, Final

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


def run(program: str, told: Any = None, *, timeout: float = 2 * PATIENCE) -> list[Any]:
    """Run a program of ``tests/clients`` to its end, which must be a good one, and return what it has printed."""
    command = [*node(), str(CLIENTS / program), json.dumps(told)]
    done = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        pytest.fail(f"{program} ended with code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]
