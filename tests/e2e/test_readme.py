"""The README's examples, run unchanged against a real deployment."""

import asyncio
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler

from keepstream.events import is_terminal, parse_event
from tests.cluster import Cluster
from tests.gateways import make_key, start_gateway

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

Browser: TypeAlias = TestClient[web.Request, web.Application]
ENDED: web.AppKey[list[Exception | None]] = web.AppKey("ended", list)

#: A stand-in for machines without ``redis-cli``: it does what the README asks of it.
REDIS_CLI = f"""\
#!{sys.executable}
import sys, redis
_, _, url, *command = sys.argv
print(redis.Redis.from_url(url).execute_command(*command))
"""


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def environment(cluster: Cluster) -> dict[str, str]:
    """What `. .keepstream/env` sets, with the repository on the path."""
    return cluster.environment() | {"PYTHONPATH": str(ROOT)}


def test_the_example_of_the_client_streams_queries_and_cancels(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    done = run_example(cluster, tmp_path, blocks("python")[0])
    (summary,) = cluster.client.list()
    result = cluster.result(summary.id)
    assert done.stdout.startswith(result.text)
    assert done.stdout.splitlines()[-2:] == [f"['{summary.id}']", "completed"]
    assert result.metadata == {"conversation": "4711"}


def test_the_example_of_waiting_waits_and_lists(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    done = run_example(cluster, tmp_path, blocks("python")[1])
    (summary,) = cluster.client.list()
    assert done.stdout.splitlines()[-1] == f"{summary.id} completed Hi!"


def test_the_example_of_the_next_turn_ends_when_no_tool_is_called(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    done = run_example(cluster, tmp_path, blocks("python")[3])
    assert done.stdout == "['user', 'assistant', 'tool', 'assistant']\n"
    assert [job.status for job in cluster.client.list()] == ["completed", "completed"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_example_of_http_creates_follows_lists_and_deletes(cluster: Cluster) -> None:
    cluster.start_worker()
    gateway = start_gateway(cluster)
    (example,) = [block for block in blocks("sh") if "/events" in block]
    api = {"KEEPSTREAM_API_KEY": make_key(cluster), "KEEPSTREAM_API_URL": f"http://127.0.0.1:{gateway.port}"}
    command = ["/bin/sh", "-euc", example]
    done = subprocess.run(command, env=os.environ | api, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"type":"job.completed"' in done.stdout
    assert done.stdout.count('"id":"hello-1"') >= 4
    assert "/api/jobs/hello-1/events?token=" in done.stdout
    assert '"error":{' not in done.stdout
    assert cluster.client.get("hello-1") is None


def test_the_example_of_openais_library_follows_to_the_end(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    gateway = start_gateway(cluster)
    (text,) = [block for block in blocks("python") if "from openai import" in block]
    api = {"KEEPSTREAM_API_KEY": make_key(cluster), "KEEPSTREAM_API_URL": f"http://127.0.0.1:{gateway.port}"}
    done = run_example(cluster, tmp_path, text, **api)
    (job,) = cluster.client.list()
    assert done.stdout == f"{cluster.result(job.id).text}\ncompleted\n"


def run_example(cluster: Cluster, directory: Path, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the README, which must not fail."""
    example = directory / "example.py"
    example.write_text(text)
    command = [sys.executable, str(example)]
    env = environment(cluster) | variables
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


class Server(TestServer):
    """Leaves the handler of a client that has left running, as ``web.run_app`` does."""

    async def _make_runner(self, **kwargs: Any) -> web.BaseRunner:
        return await super()._make_runner(**(kwargs | {"handler_cancellation": False}))


@web.middleware
async def _note_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Record how each request ended: None, or an exception, which the server would log with its traceback."""
    try:
        answer = await handler(request)
    except Exception as error:
        request.app[ENDED].append(None if isinstance(error, web.HTTPException) else error)
        raise
    request.app[ENDED].append(None)
    return answer


@pytest.fixture
async def browser(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Browser]:
    """A browser at the example of server-sent events, which sends a comment after a second of silence."""
    for name, value in environment(cluster).items():
        monkeypatch.setenv(name, value)
    example = tmp_path / "gateway.py"
    example.write_text(blocks("python")[2])
    make_app = runpy.run_path(str(example))["make_app"]
    monkeypatch.setitem(make_app.__globals__, "SILENCE", 1)
    app = make_app()
    app[ENDED] = []
    app.middlewares.append(_note_failures)
    async with TestClient(Server(app)) as client:
        yield client


async def _enqueue(browser: Browser) -> str:
    answer = await browser.post("/jobs", json={"prompt": "Hello!"})
    return f"/jobs/{(await answer.json())['job_id']}/events"


async def test_the_example_of_server_sent_events_resumes_after_the_last_event_id(
    cluster: Cluster, browser: Browser
) -> None:
    cluster.start_worker()
    events = await _enqueue(browser)
    whole = _events(await (await browser.get(events)).text())
    rest = _events(await (await browser.get(events, headers={"Last-Event-ID": whole[9][0]})).text())
    assert rest == whole[10:]
    assert [id_ for id_, _ in whole] == [parse_event(data).id for _, data in whole]
    assert is_terminal(parse_event(whole[-1][1]))


async def test_the_example_of_server_sent_events_stops_a_browser_that_has_the_last_event(
    cluster: Cluster, browser: Browser
) -> None:
    cluster.start_worker()
    events = await _enqueue(browser)
    last, _ = _events(await (await browser.get(events)).text())[-1]
    again = await browser.get(events, headers={"Last-Event-ID": last})
    assert (again.status, await again.text()) == (204, "")


async def test_the_example_of_server_sent_events_answers_errors_with_a_status(browser: Browser) -> None:
    assert (await browser.get("/jobs/nope/events")).status == 404
    events = await _enqueue(browser)
    assert (await browser.get(events, headers={"Last-Event-ID": "nonsense"})).status == 400
    assert (await browser.get(events, headers={"Last-Event-ID": "7-1"})).status == 400


async def test_the_example_of_server_sent_events_sends_comments_until_the_browser_leaves(
    browser: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await browser.get(await _enqueue(browser))  # no worker: the job stays silent
    told: list[str] = []
    while not told:  # with a comment every few seconds, until the follower has seen what is missing
        assert await answer.content.readuntil(b"\n\n") == b": waiting\n\n"
        told = [record.getMessage() for record in caplog.records if record.name == "keepstream"]
    assert "waits for a worker" in told[0]
    ended = browser.app[ENDED]
    ended.clear()
    answer.close()
    async with asyncio.timeout(60):
        while not ended:  # noqa: ASYNC110  # the handler notices with its next comment
            await asyncio.sleep(0.05)
    assert ended == [None]
    complaints = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in complaints if record.name != "keepstream"] == []


def _events(body: str) -> list[tuple[str, str]]:
    return re.findall(r"^id: (.*)\ndata: (.*)\n$", body, re.MULTILINE)


def test_the_example_of_a_message_is_a_job(cluster: Cluster) -> None:
    cluster.start_worker()
    cluster.push(blocks("json")[0].encode())
    assert cluster.wait_for(json.loads(blocks("json")[0])["headers"]["id"]).status == "completed"


def test_the_example_of_a_shell_enqueues_a_job(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    (tmp_path / "redis-cli").write_text(REDIS_CLI)
    (tmp_path / "redis-cli").chmod(0o755)
    enqueue, watch = (block for block in blocks("sh") if "redis-cli" in block)
    search = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-euc", enqueue], env=environment(cluster) | search, check=True)
    assert cluster.wait_for("by-hand-2").status == "completed"
    read = watch.splitlines()[1]
    done = subprocess.run(["sh", "-euc", read], env=environment(cluster) | search, capture_output=True, check=True)
    assert b"job.completed" in done.stdout
