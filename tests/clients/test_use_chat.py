"""The example of a page with `useChat`, in a real browser: a site of somebody else's, a token, and the whole way.

The page is reloaded in the middle of an answer, loses its connection, and stops an answer.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from keepstream import names
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.ai_sdk import chats
from tests import node
from tests.chromium import Page
from tests.cluster import Cluster, wait_until
from tests.gateways import caller, make_key, start_gateway
from tests.site import Site
from tests.tcp_proxy import TcpProxy

EXAMPLES: Final = Path(__file__).parents[2] / "docs" / "examples"
SOURCE: Final = """
import { createRoot } from "react-dom/client";
import { Chat } from "./chat.jsx";

const told = new URLSearchParams(location.search);
const getToken = async () => told.get("token");
createRoot(document.getElementById("chat")).render(
  <Chat id={told.get("chat")} gateway={told.get("gateway")} getToken={getToken} />
);
"""
PAGE: Final = """<!doctype html>
<meta charset="utf-8"><title>Chat</title><link rel="icon" href="data:,">
<div id="chat"></div><script src="page.js"></script>"""
_NUMBERS: Final = itertools.count(1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    node.run("build.mjs", {"source": SOURCE, "modules": str(EXAMPLES), "out": str(folder / "page.js")})
    (folder / "index.html").write_text(PAGE)
    with Site(folder) as site:
        yield site


class Visit:
    """A browser on the page of a new chat."""

    def __init__(self, cluster: Cluster, site: Site, page: Page, **script: object) -> None:
        self.chat = f"visit {next(_NUMBERS)}"
        self._cluster = cluster
        self._page = page
        self.key = f"use-chat-{self.chat}"  # by which the provider counts
        request = {"model": "scripted-1", "script": {"key": self.key, **script}}
        settings = {"cors_origins": site.url, "chat_request": json.dumps(request), "token_secret": "shared"}
        self.gateways = [start_gateway(cluster, **settings) for _ in range(2)]
        self.proxy = TcpProxy(self.gateways[0].port)
        with caller(self.gateways[0], make_key(cluster)) as http:
            token = http.post(f"/api/chat/{self.chat}/token").json()["token"]
        gateway = f"http://127.0.0.1:{self.proxy.port}"
        self.address = f"{site.url}/?chat={self.chat}&gateway={gateway}&token={token}"

    def send(self, text: str) -> None:
        self._page.wait_for("!!document.querySelector('form')", "the chat")
        self._page.click("input")
        self._page.write(text)
        self._page.press("Enter")

    def answer(self) -> str:
        """The text of the last answer, as the page has it."""
        found = "[...document.querySelectorAll('.assistant')].at(-1)?.textContent ?? ''"
        return str(self._page.evaluate(found))

    def wait_for_text(self, least: int = 1) -> None:
        wait_until(lambda: len(self.answer()) >= least, f"{least} characters of an answer")

    def wait_to_the_end(self) -> CompletionResult:
        """Wait until the page says that the answer is complete; return its row."""
        self._page.wait_for("!!document.querySelector('button:not([type])')", "the button to send")
        return self._cluster.wait_for(names.numbered_id(chats.prefix(self.chat), 0))


def test_an_answer_comes_and_survives_a_reload(cluster: Cluster, site: Site, page: Page) -> None:
    visit = Visit(cluster, site, page, deltas=120, rate=30, delta_text="wörd ")
    with visit.proxy:
        page.open(visit.address)
        visit.send("Hello!")
        visit.wait_for_text(20)
        assert page.text(".user") == "Hello!"
        seen = visit.answer()
        page.open(visit.address)
        visit.wait_for_text(len(seen))
        row = visit.wait_to_the_end()
        assert row.status is JobStatus.COMPLETED
        wait_until(lambda: visit.answer() == row.text, "the whole answer")
        assert len(row.text) == 5 * 120
        assert page.errors == []


def test_a_lost_connection_is_taken_up_at_another_gateway(cluster: Cluster, site: Site, page: Page) -> None:
    visit = Visit(cluster, site, page, deltas=120, rate=30)
    with visit.proxy:
        page.open(visit.address)
        visit.send("Hello!")
        visit.wait_for_text(20)
        visit.proxy.lead_to(visit.gateways[1].port)
        page.wait_for("!!document.querySelector('[role=alert] button')", "the page to notice")
        page.click("[role=alert] button")
        row = visit.wait_to_the_end()
        wait_until(lambda: visit.answer() == row.text, "the whole answer")
        assert page.evaluate("document.querySelectorAll('.assistant').length") == 1


def test_a_failed_attempts_text_vanishes_from_the_page(cluster: Cluster, site: Site, page: Page) -> None:
    visit = Visit(cluster, site, page, text="one two three four", faults=[{"kind": "cut", "after": 2}])
    with visit.proxy:
        page.open(visit.address)
        visit.send("Hello!")
        visit.wait_for_text()
        row = visit.wait_to_the_end()
        wait_until(lambda: visit.answer() == row.text == "one two three four", "the second attempt's text")
        assert len(row.attempts) == 2


def test_stop_ends_the_answer(cluster: Cluster, site: Site, page: Page) -> None:
    visit = Visit(cluster, site, page, deltas=3000, rate=30)
    with visit.proxy:
        page.open(visit.address)
        visit.send("Hello!")
        visit.wait_for_text(20)
        page.click("button[type=button]")
        row = visit.wait_to_the_end()
        assert row.status is JobStatus.CANCELLED
        wait_until(lambda: visit.answer() == row.text, "the text that is stored")
