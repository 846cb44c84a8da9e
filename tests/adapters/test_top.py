"""`keepstream top` and `keepstream limits` on a database, and on a terminal."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert

from keepstream.client import overview, queries
from keepstream.client.database import make_engine
from keepstream.client.overview import Waiting
from keepstream.tables import now, turns, workers
from keepstream_worker.dev_stack.embedded import sqlite_url
from keepstream_worker.store import schema
from keepstream_worker.supervisor import python_module
from keepstream_worker.values import Target
from tests.jobs import make_job
from tests.stored_jobs import pause, start
from tests.terminal import CTRL_C, Terminal

COMMAND = python_module("keepstream_worker.commands")
LIMITED = """
[providers.default]
base_url = "http://127.0.0.1:1/v1"
concurrency = 7
[tenants.acme]
concurrency = 2
"""


def enqueue(engine: Engine, *ids: str, **fields: Any) -> None:
    with engine.begin() as connection:
        for job_id in ids:
            queries.enqueue(connection, make_job(id=job_id, **fields))


def work(engine: Engine, running: int = 1) -> None:
    """Let there be a worker with three places."""
    sign = {"started_at": now(), "heartbeat_at": now(), "lease": 3600, "queue": "completions", "places": 3}
    with engine.begin() as connection:
        connection.execute(insert(workers).values(id="w", running=running, **sign))


def test_what_runs_and_waits_is_counted(engine: Engine) -> None:
    enqueue(engine, "a-1", "a-2", tenant="a", provider="p", fallbacks=[{"provider": "q", "model": "n"}])
    enqueue(engine, "b-1", "b-2", "b-3", tenant="b", job_class="bulk")
    work(engine)
    with engine.begin() as connection:
        for job_id in ("b-1", "b-2"):
            start(connection, job_id, "b")
        pause(connection, "b-2", "b", seconds=3600)
        newest = {"arrivals_low": 0, "ready": "{}", "closed": '{"p": {"why": "cooling", "until": 1}}', "state": "{}"}
        connection.execute(insert(turns).values([{"n": 1, **newest, "closed": "{}"}, {"n": 2, **newest}]))
    with engine.begin() as connection:
        seen = overview.look(connection)
    assert seen.running == {(Target("default", "m"), "b"): 1}
    assert sorted(seen.waiting) == [
        Waiting("a", "completions", "interactive", (Target("p", "m"), Target("q", "n")), 2),
        Waiting("b", "completions", "bulk", (Target("default", "m"),), 1, is_due=False),
        Waiting("b", "completions", "bulk", (Target("default", "m"),), 1),
    ]
    assert (list(seen.workers), seen.closed) == (["w"], {"p": {"why": "cooling", "until": 1}})
    assert (seen.more_running, seen.more_waiting, seen.at.utcoffset() is not None) == (False, False, True)


def settings(tmp_path: Path) -> tuple[dict[str, str], Engine]:
    url = sqlite_url(tmp_path / "top.db")
    file = tmp_path / "providers.toml"
    file.write_text(LIMITED)
    engine = make_engine(url, writer=True)
    schema.migrate(engine)
    return {"KEEPSTREAM_DATABASE_URL": url, "KEEPSTREAM_PROVIDERS_FILE": str(file), "PATH": "/usr/bin:/bin"}, engine


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_top_is_live_on_a_terminal_and_ends_cleanly(tmp_path: Path) -> None:
    environment, engine = settings(tmp_path)
    enqueue(engine, "a-1", tenant="acme")
    with Terminal([*COMMAND, "top", "--every", "0.2"], environment, columns=80, rows=24) as terminal:
        terminal.wait_for("none is alive for the queue")
        terminal.wait_for("acme")  # a screen comes in pieces
        work(engine)
        enqueue(engine, "b-1", tenant="umbrella")
        terminal.wait_for("umbrella")
        assert terminal.scrolled_off == []
        terminal.press(CTRL_C)
        assert terminal.wait() == 0
        # The cursor is back, and what was on the screen before.
        assert terminal.written.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
        assert "Traceback" not in terminal.text
    engine.dispose()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_top_that_is_told_to_end_gives_the_terminal_back(tmp_path: Path, signum: signal.Signals) -> None:
    environment, engine = settings(tmp_path)
    engine.dispose()
    with Terminal([*COMMAND, "top", "--every", "0.2"], environment) as terminal:
        terminal.wait_for("nothing runs or waits")
        os.kill(terminal.process.pid, signum)
        assert terminal.wait() == 128 + signum
        assert terminal.written.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
        assert "Traceback" not in terminal.text


def test_top_and_limits_are_lines_or_json_for_a_pipe(tmp_path: Path) -> None:
    environment, engine = settings(tmp_path)
    enqueue(engine, "a-1", "a-2", tenant="acme")
    work(engine)
    engine.dispose()
    shown = run(environment, "top")
    assert (shown.returncode, shown.stderr, "acme" in shown.stdout, "\x1b" in shown.stdout) == (0, "", True, False)
    document = json.loads(run(environment, "top", "--json").stdout)
    assert (document["waiting"], document["tenants"][0]["name"], document["tenants"][0]["most"]) == (2, "acme", 2)
    assert "0 of 7" in run(environment, "limits").stdout
    (limit, *_) = json.loads(run(environment, "limits", "--json").stdout)["limits"]
    assert (limit["name"], limit["streams"]["allowed"], limit["waiting"]) == ("default", 7, 2)


def test_limits_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    environment, engine = settings(tmp_path)
    engine.dispose()
    Path(environment["KEEPSTREAM_PROVIDERS_FILE"]).write_text(LIMITED.replace("concurrency = 7", "concurrency = 0"))
    for command in ("top", "limits"):
        done = run(environment, command)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert "concurrency" in done.stderr
