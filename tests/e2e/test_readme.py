"""The README's examples, run as they cluster there against a real Keepstream."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from keepstream.events import is_terminal, parse_event
from tests.cluster import Cluster

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

#: For machines without one; it does what the README asks of it.
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
    """What `. .keepstream/env` gives, with our modules in reach."""
    return cluster.environment() | {"PYTHONPATH": str(ROOT)}


def test_the_example_of_the_client_streams_queries_and_cancels(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_worker()
    example = tmp_path / "example.py"
    example.write_text(blocks("python")[0])
    command = [sys.executable, str(example)]
    done = subprocess.run(command, env=environment(cluster), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (summary,) = cluster.client.list()
    result = cluster.result(summary.id)
    assert done.stdout.startswith(result.text)
    assert done.stdout.splitlines()[-2:] == [f"['{summary.id}']", "completed"]
    assert result.metadata == {"conversation": "4711"}


async def test_the_example_of_server_sent_events_resumes_after_the_last_event_id(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.start_worker()
    for name, value in environment(cluster).items():
        monkeypatch.setenv(name, value)
    example = tmp_path / "gateway.py"
    example.write_text(blocks("python")[1])
    async with TestClient(TestServer(runpy.run_path(str(example))["make_app"]())) as browser:
        answer = await browser.post("/jobs", json={"prompt": "Hello!"})
        job_id = (await answer.json())["job_id"]
        whole = _events(await (await browser.get(f"/jobs/{job_id}/events")).text())
        cursor = {"Last-Event-ID": whole[9][0]}
        rest = _events(await (await browser.get(f"/jobs/{job_id}/events", headers=cursor)).text())
        refused = await browser.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "nonsense"})
    assert rest == whole[10:]
    assert [id_ for id_, _ in whole] == [parse_event(data).id for _, data in whole]
    assert is_terminal(parse_event(whole[-1][1]))
    assert refused.status == 400


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
