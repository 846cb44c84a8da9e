"""A process from the fork server is what a process started in the ordinary way is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import PATIENCE, wait_until
from tests.fork_server import ForkServer

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]


def test_a_forked_process_begins_like_any_other(forks: ForkServer, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "ONLY": "this"}
    log = tmp_path / "log"
    forked = forks.start("tests.process_state", ["3"], environment, log)
    assert forked.wait() == 3
    assert forked.poll() == 3
    assert not psutil.pid_exists(forked.pid)
    ordinary = subprocess.run(
        [sys.executable, "-m", "tests.process_state", "3"],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        capture_output=True,
        check=False,
    )
    assert ordinary.returncode == 3

    def state(line: str | bytes) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(line)
        found["environment"] = {name: found["environment"].get(name) for name in ("PATH", "ONLY", "HOME")}
        return found

    assert state(log.read_text()) == state(ordinary.stdout)


def test_a_forked_process_can_be_killed_and_says_by_what(forks: ForkServer, tmp_path: Path) -> None:
    process = forks.start("http.server", ["0", "--bind", "127.0.0.1"], dict(os.environ), tmp_path / "log")
    assert process.poll() is None
    process.kill()
    assert process.wait() == -9
    assert not psutil.pid_exists(process.pid)


def test_a_forked_command_reads_what_it_is_given_and_its_errors_are_kept_apart(
    forks: ForkServer, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"]}
    (tmp_path / "file.json").write_text('{"from": "a file"}')

    def run(*arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        return forks.run("json.tool", arguments, environment, given=given, directory=tmp_path, timeout=PATIENCE)

    assert json.loads(run(given='{"from": "a pipe"}').stdout) == {"from": "a pipe"}
    assert json.loads(run("file.json").stdout) == {"from": "a file"}
    wrong = run(given="{")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Expecting property name")


def test_a_forked_command_that_takes_too_long_is_ended(forks: ForkServer) -> None:
    arguments = ["0", "--bind", "127.0.0.1"]

    def living() -> set[psutil.Process]:
        children = psutil.Process(forks.pid).children(recursive=True)
        return {child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE}

    before = living()
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run("http.server", arguments, dict(os.environ), timeout=0.1)
    wait_until(lambda: living() <= before, "it to end")
