"""The test suite itself runs in the ways in which developers start it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pytest_starts_without_xdist() -> None:
    collect = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--collect-only", "-q", __file__]
    run = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "test_pytest_starts_without_xdist" in run.stdout


@pytest.mark.slow
def test_the_tests_of_a_group_run_in_one_process() -> None:
    """Or each process would set up, once more, what the tests of a module share."""
    distribute = ["-p", "xdist", "--numprocesses=2", "--dist=loadgroup", "--no-loadscope-reorder", "-v"]
    modules = ["tests/unit/test_usage.py", "tests/unit/test_words.py"]
    command = [sys.executable, "-m", "pytest", *distribute, *modules]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    ran = re.findall(r"^\[(gw\d)\].* PASSED tests/unit/(\w+)\.py::", run.stdout, re.MULTILINE)
    assert len(ran) > 50
    assert len(set(ran)) == 2, "each module in its process"
