"""OpenAI's library for Node, and curl, are clients of the gateway."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests import node
from tests.cluster import PATIENCE, Cluster
from tests.gateways import GatewayProcess, make_key, start_gateway
from tests.services import debian_program

TEXT = "Grüße aus der Küche 🍲, with a few words more."
_KEYS = itertools.count(1)


class House:
    """A cluster with a worker, two gateways and a key."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.start_worker()
        self.gateways: list[GatewayProcess] = [start_gateway(cluster), start_gateway(cluster)]
        self.key = make_key(cluster)

    def run(self, what: str, **script: Any) -> list[Any]:
        """Run a part of the program in JavaScript; return what it prints."""
        urls = [f"http://127.0.0.1:{gateway.port}/v1" for gateway in self.gateways]
        script = {"key": f"node-{next(_KEYS)}", "text": TEXT, **script}
        return node.run("openai.mjs", {"urls": urls, "key": self.key, "what": what, "script": script})

    def text(self, response_id: str) -> str:
        """Return what the row holds."""
        return self.cluster.wait_for(response_id.removeprefix("resp_").removeprefix("chatcmpl-")).text


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    with Cluster(directory, sqlite_url(directory / "keepstream.db")) as cluster:
        yield House(cluster)


@pytest.mark.parametrize("faults", [[], [{"kind": "cut", "after": 4}]], ids=["whole", "retried"])
def test_a_response_cut_at_every_event(house: House, faults: list[Any]) -> None:
    read, helped, retrieved = house.run("cut", words=2, rate=20, reasoning="Let me see.", faults=faults)
    assert read["text"] == helped["text"] == house.text(read["id"]) == TEXT
    assert read["status"] == helped["status"] == retrieved["status"] == "completed"
    assert read["types"][0] == "response.created"
    assert len(read["types"]) > 15


@pytest.mark.parametrize("fault", [None, "cut", "eof", "error_event"])
def test_the_stateful_helper(house: House, fault: str | None) -> None:
    faults = [{"kind": fault, "after": 6}] if fault else []
    call = {"name": "add", "arguments": {"a": 1}}
    first, again = house.run("helper", delta_chars=4, reasoning="Hm.", tool_calls=[call], faults=faults)
    assert first["text"] == again["text"] == house.text(first["id"]) == TEXT
    assert first["status"] == "completed"
    assert first["calls"] == [["add", '{"a":1}']]
    assert again["all_seen"]


def test_calls_whose_ids_come_again_in_the_next_attempt(house: House) -> None:
    call = {"name": "add", "arguments": {"a": "x" * 40}, "id": "call_0"}
    faults = [{"kind": "cut", "after": 4}]
    first, again = house.run("helper", text="", tool_calls=[call], faults=faults)
    assert [name for name, _ in first["calls"]] == ["add"]
    assert json.loads(first["calls"][0][1]) == {"a": "x" * 40}
    assert again["all_seen"]


def test_cancelling(house: House) -> None:
    cancelled, final = house.run("cancel", text=None, deltas=1000, rate=20)
    assert cancelled["status"] == final["status"] == "cancelled"
    assert final["text"] == house.text(final["id"])
    assert final["text"]


def test_a_chat_completion(house: House) -> None:
    streamed, stored = house.run("chat", words=2, reasoning="Hm.")
    assert streamed["text"] == streamed["whole"] == stored == house.text(streamed["id"]) == TEXT
    assert streamed["usage"]["completion_tokens"]


def test_a_chat_completion_that_begins_anew_raises(house: House) -> None:
    (broken,) = house.run("chat", delta_chars=4, faults=[{"kind": "cut", "after": 5}])
    assert TEXT.startswith(broken["text"])
    assert broken["error"]["code"] == "answer_restarted"


def test_curl_creates_follows_resumes_and_cancels(house: House, tmp_path: Path) -> None:
    curl = debian_program("curl")
    first, second = (f"http://127.0.0.1:{gateway.port}/v1/responses" for gateway in house.gateways)

    def call(*arguments: str) -> str:
        command = [str(curl), "--silent", "--show-error", "--max-time", str(PATIENCE), "--no-buffer"]
        command += ["--header", f"Authorization: Bearer {house.key}", "--header", "Content-Type: application/json"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout

    script = {"key": f"curl-{next(_KEYS)}", "text": TEXT, "words": 2}
    body = {"model": "m", "input": "Hi", "background": True, "keepstream": {"request": {"script": script}}}
    made = json.loads(call("--data", json.dumps(body), first))
    frames = call(f"{second}/{made['id']}?stream=true").split("\n\n")[:-1]
    events = [json.loads(frame.partition("\ndata: ")[2]) for frame in frames]
    assert [frame.partition("\n")[0].removeprefix("event: ") for frame in frames] == [e["type"] for e in events]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == TEXT
    cut = len(frames) // 2
    rest = call(f"{first}/{made['id']}?stream=true&starting_after={events[cut]['sequence_number']}")
    assert rest.split("\n\n")[:-1] == frames[cut + 1 :]
    assert json.loads(call("--request", "POST", f"{second}/{made['id']}/cancel"))["status"] == "completed"
    assert json.loads(call("--request", "DELETE", f"{second}/{made['id']}"))["deleted"]
