"""Clients survive every kind of fork: a child never shares a connection with its parent, and never waits for a lock."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine

from keepstream import names, tables
from keepstream.names import job_keys
from tests.cluster import PATIENCE
from tests.event_texts import JOB_ID, delta, ended, started
from tests.forking_service import SCENARIOS
from tests.live_join import append

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = "from tests.forking_service import main; main()"
POSTGRESQL_ONLY = {"locks are held", "own connections"}  # they look at its sessions


def start(scenario: str, redis_url: str, database_url: str, **environment: str) -> "subprocess.Popen[str]":
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTREAM_")}
    settings = {names.ENV_REDIS_URL: redis_url, names.ENV_DATABASE_URL: database_url}
    return subprocess.Popen(
        # In Python 3.12 and later a fork with threads is warned of; that is what is tried here.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", PROGRAM, scenario],
        cwd=ROOT,
        env=inherited | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> Any:
    out, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, err
    assert err == ""
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - POSTGRESQL_ONLY - {"iterating"}))
def test_parent_and_children_get_right_answers(scenario: str, redis_url: str, database_url: str) -> None:
    assert finish(start(scenario, redis_url, database_url))["wrong"] == []


@pytest.mark.parametrize("scenario", sorted(POSTGRESQL_ONLY))
def test_a_child_has_connections_and_locks_of_its_own(scenario: str, redis_url: str, postgres_url: str) -> None:
    assert finish(start(scenario, redis_url, postgres_url))["wrong"] == []


async def test_parent_and_child_each_go_on_with_an_iteration(redis_url: str, postgres_url: str) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as log:
        keys = job_keys("default", JOB_ID)
        await append(log, keys, started("1-1"))
        process = start("iterating", redis_url, postgres_url, FOLLOWED_JOB=JOB_ID)
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        await append(log, keys, delta("1-2", "a"))
        await append(log, keys, ended("1-3", "completed", "a"))
        assert finish(process)["wrong"] == []
