"""A browser's own EventSource at the native addresses: what it does by itself has to be enough.

It cannot set headers, comes back by itself with the id of the last event, and stops only when it is told so.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from keepstream.results import CompletionResult
from tests.chromium import Page
from tests.cluster import Cluster
from tests.gateways import GatewayProcess, caller, make_key, start_gateway
from tests.site import Site
from tests.tcp_proxy import TcpProxy

#: Follows an address, and notes each event once more than it should be, if it comes twice.
FOLLOW: Final = """
const address = %s;
window.events = [];
window.errors = 0;
window.source = new EventSource(address);
source.onmessage = message => events.push({id: message.lastEventId, data: JSON.parse(message.data)});
source.onerror = () => { errors += 1; };
"""
_OPEN, _CLOSED = 1, 2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<!doctype html><title>Somebody's page</title>")
    with Site(folder) as site:
        yield site


@pytest.fixture(scope="module")
def gateways(cluster: Cluster, site: Site) -> list[GatewayProcess]:
    """Two that the site's pages may call."""
    return [start_gateway(cluster, cors_origins=site.url, token_secret="shared") for _ in range(2)]


@pytest.fixture
def proxy(gateways: list[GatewayProcess]) -> Iterator[TcpProxy]:
    """What a browser knows of the gateways: one address."""
    with TcpProxy(gateways[0].port) as proxy:
        yield proxy


def events_of(cluster: Cluster, gateway: GatewayProcess, job_id: str, seconds: float = 600) -> str:
    """The path of a job's events, with a token, as a page is given it."""
    with caller(gateway, make_key(cluster)) as http:
        made = http.post(f"/api/jobs/{job_id}/token", json={"seconds": seconds})
        assert made.status_code == 201, made.text
        return str(made.json()["events"])


def follow(page: Page, site: Site, address: str) -> None:
    page.open(site.url)
    page.evaluate(FOLLOW % json.dumps(address))


def wait_for_events(page: Page, number: int) -> None:
    page.wait_for(f"events.length >= {number}", f"{number} events")


def wait_to_the_end(page: Page) -> list[dict[str, Any]]:
    """Wait until the browser has stopped by itself; return the events that it got."""
    page.wait_for(f"source.readyState === {_CLOSED}", "the EventSource to close")
    events: list[dict[str, Any]] = page.evaluate("events")
    return events


def assert_all_once(cluster: Cluster, row: CompletionResult, events: list[dict[str, Any]]) -> None:
    assert [event["id"] for event in events] == [event.id for event in cluster.log(row.id)]
    assert [event["id"] for event in events] == [event["data"]["id"] for event in events]
    deltas = [event["data"]["delta"] for event in events if event["data"]["type"] == "delta"]
    assert "".join(delta.get("content") or "" for delta in deltas) == row.text
    assert events[-1]["data"]["type"] == "job.completed"
    assert events[-1]["data"]["output_sha256"] == row.output_sha256


def test_all_events_come_once_and_then_it_stops(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    job_id = cluster.enqueue(text="Grüße, 你好 🌊! " * 5, rate=50)
    path = events_of(cluster, gateways[0], job_id)
    follow(page, site, f"http://127.0.0.1:{gateways[0].port}{path}")
    events = wait_to_the_end(page)
    assert_all_once(cluster, cluster.wait_for(job_id), events)
    # The end of the stream makes it come back once, and the answer to that stops it for good.
    assert [status for status, url in page.responses if "/events" in url] == [200, 204]


def test_a_page_that_opens_late_gets_everything(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    job_id = cluster.enqueue(text="All of it.")
    row = cluster.wait_for(job_id)
    follow(page, site, f"http://127.0.0.1:{gateways[1].port}{events_of(cluster, gateways[1], job_id)}")
    assert_all_once(cluster, row, wait_to_the_end(page))


def test_it_resumes_by_itself_at_another_gateway(
    cluster: Cluster, gateways: list[GatewayProcess], proxy: TcpProxy, site: Site, page: Page
) -> None:
    job_id = cluster.enqueue(deltas=200, rate=40)
    follow(page, site, f"http://127.0.0.1:{proxy.port}{events_of(cluster, gateways[0], job_id)}")
    for number, seen in enumerate((3, 30, 60)):
        wait_for_events(page, seen)
        proxy.lead_to(gateways[(number + 1) % 2].port)
    assert_all_once(cluster, cluster.wait_for(job_id), wait_to_the_end(page))
    assert page.evaluate("errors") >= 3


def test_a_gateway_that_stops_sends_it_to_another(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    leaving = start_gateway(cluster, cors_origins=site.url, token_secret="shared")
    job_id = cluster.enqueue(deltas=120, rate=40)
    with TcpProxy(leaving.port) as proxy:
        follow(page, site, f"http://127.0.0.1:{proxy.port}{events_of(cluster, leaving, job_id)}")
        wait_for_events(page, 5)
        leaving.stop()
        proxy.lead_to(gateways[0].port)
        assert_all_once(cluster, cluster.wait_for(job_id), wait_to_the_end(page))


def test_a_failed_attempt_is_told_like_every_event(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    job_id = cluster.enqueue(text="a b c d", faults=[{"kind": "cut", "after": 2}])
    follow(page, site, f"http://127.0.0.1:{gateways[0].port}{events_of(cluster, gateways[0], job_id)}")
    events = wait_to_the_end(page)
    assert [event["id"] for event in events] == [event.id for event in cluster.log(job_id)]
    assert [event["data"]["type"] for event in events].count("attempt.failed") == 1


def test_a_token_that_has_expired_ends_it(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    """For good: the browser does not ask again, and the page can ask for a new token."""
    job_id = cluster.enqueue(text="Never seen.")
    path = events_of(cluster, gateways[0], job_id, seconds=1)
    address = f"http://127.0.0.1:{gateways[0].port}{path}"
    page.open(site.url)
    told = page.wait_for(
        f"fetch({json.dumps(address)}).then(async r => r.status === 401 && (await r.json()).error.code)",
        "the token to expire",
    )
    assert told == "token_expired"
    page.responses.clear()
    page.evaluate(FOLLOW % json.dumps(address))
    assert wait_to_the_end(page) == []
    assert [status for status, _ in page.responses] == [401]


def test_a_token_for_another_job_is_no_token(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    mine, other = cluster.enqueue(text="Mine."), cluster.enqueue(text="Not mine.")
    path = events_of(cluster, gateways[0], mine).replace(mine, other)
    follow(page, site, f"http://127.0.0.1:{gateways[0].port}{path}")
    assert wait_to_the_end(page) == []
    assert 404 in [status for status, _ in page.responses]


# -- pages of other origins --


def test_a_page_that_may_not_call_reads_nothing(cluster: Cluster, site: Site, page: Page) -> None:
    closed = start_gateway(cluster, cors_origins="https://another.example")
    job_id = cluster.enqueue(text="Secret.")
    cluster.wait_for(job_id)
    address = f"http://127.0.0.1:{closed.port}{events_of(cluster, closed, job_id)}"
    follow(page, site, address)
    assert wait_to_the_end(page) == []
    read = f"fetch({json.dumps(address)}).then(r => r.text(), error => error.name)"
    assert page.evaluate(read) == "TypeError"
    assert any("CORS policy" in error for error in page.errors)


def test_a_page_that_may_call_can_enqueue_and_read_errors(
    cluster: Cluster, gateways: list[GatewayProcess], site: Site, page: Page
) -> None:
    """With headers of its own, for which a browser asks first."""
    page.open(site.url)
    key = make_key(cluster)
    jobs = f"http://127.0.0.1:{gateways[0].port}/api/jobs"
    request = {"model": "scripted-1", "messages": [{"role": "user", "content": "Hello"}]}
    ask = """(async () => {
      const headers = {Authorization: `Bearer ${%s}`, "Content-Type": "application/json", "Idempotency-Key": "k"};
      const answer = await fetch(%s, {method: "POST", headers, body: JSON.stringify(%s)});
      return [answer.status, await answer.json(), answer.headers.get("x-request-id")];
    })()"""
    status, body, _ = page.evaluate(ask % (json.dumps(key), json.dumps(jobs), json.dumps({"request": request})))
    assert status == 202
    assert cluster.wait_for(body["id"]).request == request
    status, body, request_id = page.evaluate(ask % (json.dumps("ks_wrong"), json.dumps(jobs), json.dumps({})))
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert request_id.startswith("req_")


def test_a_page_of_the_gateways_own_origin_needs_no_setting(cluster: Cluster, page: Page) -> None:
    gateway = start_gateway(cluster)
    job_id = cluster.enqueue(text="At home.")
    row = cluster.wait_for(job_id)
    page.open(f"http://127.0.0.1:{gateway.port}/healthz")
    page.evaluate(FOLLOW % json.dumps(events_of(cluster, gateway, job_id)))
    assert_all_once(cluster, row, wait_to_the_end(page))
