"""The console in a real browser: each page opened, a job watched, cancelled and run again, by mouse and by keyboard.

No page has an error in the browser's console, and axe finds nothing that keeps anybody out, light or dark, on a screen
or a phone.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from keepstream.jobs import parse_job
from keepstream.names import Right
from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.chromium import Page
from tests.cluster import Cluster, wait_until
from tests.fork_server import ForkServer
from tests.gateways import GatewayProcess, make_key, start_gateway
from tests.node import CLIENTS, node

AXE: Final = CLIENTS / "node_modules" / "axe-core" / "axe.min.js"
#: Run at the strictest level that says what is wrong, rather than what a person might look at.
_RUN_AXE: Final = """axe.run(document, {resultTypes: ["violations"]}).then(({violations}) =>
  violations.map(({id, nodes}) => `${id}: ${nodes.map(node => node.html).join(" ")}`))"""
LOOKS: Final = [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("console")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks, concurrency=4) as cluster:
        cluster.start_worker()
        yield cluster


@pytest.fixture(scope="module")
def gateway(cluster: Cluster) -> GatewayProcess:
    return start_gateway(cluster)


class Console:
    """The console in a page."""

    def __init__(self, page: Page, gateway: GatewayProcess) -> None:
        self.page = page
        self._base = f"http://127.0.0.1:{gateway.port}"

    def open(self, address: str) -> None:
        """Go to a page and wait for it."""
        self.page.open(f"{self._base}{address}")

    @property
    def address(self) -> str:
        """Where the page is."""
        return str(self.page.evaluate("location.pathname + location.search"))

    def sign_in(self, key: str) -> None:
        """Type a key."""
        self.page.wait_for("document.activeElement.id === 'key'", "the field to have the focus")
        self.page.write(key)
        self.page.press("Enter")
        self.page.wait_for("document.querySelector('nav') !== null", "the console to open")

    def wait_for_text(self, selector: str, text: str) -> None:
        """Wait until an element shows a text."""
        words, where = json.dumps(text), json.dumps(selector)
        self.page.wait_for(f"document.querySelector({where})?.innerText.includes({words})", f"{text!r} in {selector}")

    def check(self) -> None:
        """See that nothing is wrong with the page, once it is there: light and dark, large and small."""
        self.page.wait_for("document.readyState === 'complete' && document.body !== null", "the page to be loaded")
        for width, scheme in LOOKS:
            self.page.resize(width, 900)
            self.page.prefer(prefers_color_scheme=scheme)
            # Charts follow the width a moment later.
            self.page.wait_for("document.documentElement.scrollWidth <= innerWidth", f"{self.address} to fit {width}")
            # The protocol may, what the page's policy forbids: run a script that is not from here.
            self.page.evaluate(f"{AXE.read_text()}; undefined")
            assert self.page.evaluate(_RUN_AXE) == [], (self.address, width, scheme)
        self.page.resize(1440, 900)
        self.page.prefer(prefers_color_scheme="light")
        assert self.page.errors == []


@pytest.fixture
def console(page: Page, cluster: Cluster, gateway: GatewayProcess) -> Console:
    """The overview, after signing in."""
    node()  # axe is one of its packages; without them the test is skipped
    console = Console(page, gateway)
    console.open("/")
    console.sign_in(make_key(cluster, "default", Right.CONSOLE))
    return console


def enqueue(cluster: Cluster, job_id: str, tenant: str = "default", **script: Any) -> str:
    request = {
        "model": "scripted-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"About {job_id}, please"},
        ],
        "temperature": 0.5,
        "script": {"key": job_id, **script},
    }
    job = {"v": 2, "id": job_id, "tenant": tenant, "request": request, "metadata": {"user": "ada"}}
    return cluster.make_client(tenant=tenant).enqueue(parse_job(job))


def test_the_door(page: Page, cluster: Cluster, gateway: GatewayProcess) -> None:
    node()
    console = Console(page, gateway)
    console.open("/jobs?status=failed")
    console.check()
    page.wait_for("document.activeElement.id === 'key'", "the field to have the focus")
    page.write(make_key(cluster))
    page.press("Enter")
    console.wait_for_text("[role=alert]", "lacks the right")
    assert any("403" in error for error in page.errors)
    page.errors.clear()
    console.check()
    console.sign_in(make_key(cluster, "default", Right.CONSOLE))
    assert console.address == "/jobs?status=failed"
    page.click(".who button")
    page.wait_for("location.pathname === '/login'", "the end of the session")


def test_a_job_is_watched_from_its_queue_to_its_end(console: Console, cluster: Cluster) -> None:
    page, text = console.page, "The Rhine rises in the Alps. " * 8
    for number in range(4):  # nothing else begins meanwhile
        enqueue(cluster, f"before-{number}", deltas=1000, rate=50)
    enqueue(
        cluster,
        "watched",
        text=text,
        reasoning="What is the Rhine? ",
        tool_calls=[{"name": "get_weather", "arguments": {"city": "Basel"}}],
        rate=15,
        faults=[{"kind": "cut", "after": 10}],
    )
    console.open("/jobs/default/watched")
    console.wait_for_text("#job-head", "queued")
    console.wait_for_text("#job-head", "a free place")
    console.check()
    for number in range(4):
        cluster.client.cancel(f"before-{number}")
    page.evaluate("document.querySelector('#events-of-job').open = true")
    console.wait_for_text("#events", "attempt.failed")  # the one that is cut off
    console.wait_for_text("#answers .text", "What is the Rhine?")
    lengths = set()

    def grown() -> bool:
        lengths.add(len(page.evaluate("document.querySelector('#answers .answer > .text')?.textContent || ''")))
        return bool(page.evaluate("document.querySelector('#job-head .status').innerText === 'completed'"))

    wait_until(grown, "the end of the job")
    assert len(lengths) > 2
    page.wait_for("document.querySelector('#output .proof') !== null", "the stored answer")
    assert page.evaluate("document.querySelector('#answers .answer > .text').textContent") == text
    assert page.text(".call strong") == "get_weather"
    assert "connection" in page.text("#attempts")
    assert page.evaluate("document.querySelectorAll('#attempts .bar').length") == 2
    page.evaluate("document.querySelectorAll('details:not(.sure)').forEach(part => { part.open = true })")
    assert page.evaluate("document.querySelector('#events').lastElementChild.innerText.includes('job.completed')")
    console.check()
    # From the log, and from the row.
    console.open("/jobs/default/watched")
    page.click("#events-of-job summary")
    console.wait_for_text("#events", "job.completed")
    assert console.page.errors == []


def test_a_job_is_cancelled_and_run_again_by_keyboard(console: Console, cluster: Cluster) -> None:
    page = console.page
    enqueue(cluster, "long", deltas=100_000, rate=20)
    console.open("/jobs/default/long")
    console.wait_for_text("#answers", "word")
    page.evaluate("document.querySelector('#cancel').focus()")
    page.press("Enter")
    console.wait_for_text(".sure form", "The text so far is kept")
    page.press("Escape")
    page.wait_for("document.activeElement.id === 'cancel' && !document.querySelector('.sure[open]')", "the end of it")
    page.press("Enter")
    page.press("Tab")
    page.evaluate("window.isOfBefore = true")  # which may hear of the end before the form's answer takes its place
    page.press("Enter")
    page.wait_for("!window.isOfBefore", "the form's answer")
    console.wait_for_text("#job-head", "cancelled")
    console.check()
    page.evaluate("document.querySelector('#retry').focus()")
    page.press("Enter")
    page.press("Tab")
    page.press("Enter")
    page.wait_for("location.pathname !== '/jobs/default/long'", "the new job")
    console.wait_for_text("#job-head", "repeats long")
    again = console.address.rpartition("/")[2]
    assert cluster.result(again).retry_of == "long"
    cluster.client.cancel(again)
    console.wait_for_text("#job-head", "cancelled")
    assert page.errors == []


def test_without_scripts_a_job_is_watched_cancelled_and_run_again(console: Console, cluster: Cluster) -> None:
    page = console.page
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    enqueue(cluster, "unscripted", deltas=100_000, rate=20)
    console.open("/jobs/default/unscripted")
    page.wait_for("location.search === '?still'", "the page that loads itself again")
    console.wait_for_text("#answers", "word word word")
    length = len(page.text("#answers"))
    page.wait_for(f"(document.querySelector('#answers')?.innerText.length || 0) > {length}", "the text to grow")
    page.click("form[action$='/cancel'] button")
    cluster.wait_for("unscripted", "cancelled")
    console.open("/jobs/default/unscripted")
    console.wait_for_text("#job-head", "cancelled")
    page.click("#retry")
    page.click("form[action$='/retry'] button")
    console.wait_for_text("#job-head", "repeats unscripted")
    cluster.client.cancel(console.address.partition("?")[0].rpartition("/")[2])
    console.open("/")
    console.wait_for_text("main", "their figures are in the table below")
    page.click("#figures summary")
    console.wait_for_text("#figures-table", "Deltas a second")
    console.open("/jobs")
    page.click("[name=q]")
    page.write("unscripted")
    page.press("Enter")
    page.wait_for("location.pathname === '/jobs/default/unscripted'", "the job that was searched")
    assert page.errors == []


def test_the_pages_that_are_looked_at(console: Console, cluster: Cluster) -> None:
    page = console.page
    enqueue(cluster, "shown", "shop", text="A short answer.")
    enqueue(cluster, "refused", "shop", faults=[{"kind": "status", "status": 400}])
    enqueue(cluster, "slow", "lab", deltas=100_000, rate=20)
    cluster.push(b"this is no message")
    console.open("/")
    console.wait_for_text("#tables", "default/scripted-1")
    page.wait_for("document.querySelectorAll('.plot canvas').length === 4", "the charts")
    page.evaluate("document.querySelector('#figures').open = true")
    console.check()
    for span in ("6h", "24h", "7d"):
        page.evaluate(f"document.querySelector('.segments a[href$=\"{span}\"]').click()")
        page.wait_for(
            f"location.search === '?span={span}' && document.querySelectorAll('.plot canvas').length === 4", span
        )
    console.open("/jobs")
    console.wait_for_text("#results", "shown")
    console.check()
    page.evaluate("document.querySelector('[name=status]').value = 'failed'")
    # The list is being brought up to date at that moment; what it was asked before does not count any more.
    page.evaluate(
        "htmx.trigger(document.body, 'tick');"
        "document.querySelector('[name=status]').dispatchEvent(new Event('change', {bubbles: true}))"
    )
    page.wait_for("location.search.includes('status=failed')", "the address to say what is shown")
    page.wait_for("!document.querySelector('#results').innerText.includes('shown')", "the filter")
    page.evaluate("document.querySelector('[name=q]').focus()")
    page.write("shown")
    page.press("Enter")
    page.wait_for("location.pathname === '/jobs/shop/shown'", "the job that was searched")
    console.check()
    console.open("/jobs/shop/refused")
    console.check()
    console.open("/rejected")
    console.wait_for_text("main", "not named")
    console.check()
    cluster.make_client(tenant="lab").cancel("slow")


def test_a_page_says_that_it_is_not_up_to_date(console: Console, cluster: Cluster) -> None:
    other = start_gateway(cluster)
    beside = Console(console.page, other)
    beside.open("/login")
    beside.sign_in(make_key(cluster, "default", Right.CONSOLE))
    beside.page.wait_for("document.querySelectorAll('.plot canvas').length === 4", "the charts")
    other.kill()
    beside.wait_for_text("#trouble", "the gateway does not answer")
