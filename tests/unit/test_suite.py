"""The test suite itself runs in the ways in which developers start it."""

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
