"""The console over HTTP: who gets in, what a form must bring, what each page says, and what goes wrong politely."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from keepstream.client import api_keys, overview
from keepstream.names import Right
from keepstream_gateway.console.session import COOKIE
from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import PATIENCE, Cluster, wait_until
from tests.fork_server import ForkServer
from tests.gateways import GatewayProcess, make_key, start_gateway
from tests.http_streams import HttpStream


@contextmanager
def browser(gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Give a caller that keeps cookies and goes where it is sent."""
    with httpx2.Client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=PATIENCE, follow_redirects=True) as client:
        yield client


def sign_in(client: httpx2.Client, key: str, address: str = "/") -> httpx2.Response:
    return client.post("/login", data={"key": key, "next": address})


def form_token(html: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', html)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster without a worker, for the tests of this module."""
    directory = tmp_path_factory.mktemp("console")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def gateway(cluster: Cluster) -> GatewayProcess:
    return start_gateway(cluster)


@pytest.fixture
def inside(cluster: Cluster, gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """A browser in which somebody has signed in."""
    with browser(gateway) as client:
        assert sign_in(client, make_key(cluster, "default", Right.CONSOLE)).status_code == 200
        yield client


def test_an_empty_console_says_what_to_do(inside: httpx2.Client) -> None:
    assert "No tenant has jobs that run or wait." in inside.get("/").text
    assert "keepstream worker" in inside.get("/").text
    assert "keepstream submit" in inside.get("/jobs").text
    assert "There are no jobs yet." in inside.get("/jobs").text
    assert "No message has been rejected." in inside.get("/rejected").text
    assert "No job is like that." in inside.get("/jobs?status=failed").text


def test_without_a_session_every_page_asks_for_one(cluster: Cluster, gateway: GatewayProcess) -> None:
    job_id = cluster.enqueue()
    with browser(gateway) as client:
        for address in ("/", "/jobs", "/rejected", f"/jobs/default/{job_id}", f"/jobs/default/{job_id}/events"):
            answer = client.get(address)
            assert answer.url.path == "/login", address
            assert "Sign in" in answer.text
            assert client.get(address, headers={"HX-Request": "true"}).status_code == 401
        assert client.post(f"/jobs/default/{job_id}/cancel").status_code == 401
        assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).url.path == "/"  # once more, from here


def test_a_key_with_the_right_gets_in_and_is_not_in_the_cookie(cluster: Cluster, gateway: GatewayProcess) -> None:
    key = make_key(cluster, "default", Right.CONSOLE)
    with browser(gateway) as client:
        answer = client.post("/login", data={"key": f" {key} ", "next": "/jobs"}, follow_redirects=False)
        cookie = answer.headers["set-cookie"]
        assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
        assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age="))
        assert "Secure" not in cookie
        assert key.split("_", 2)[2] not in cookie
        assert client.get("/jobs").url.path == "/jobs"
        secure = client.post(
            "/login", data={"key": key}, headers={"X-Forwarded-Proto": "https"}, follow_redirects=False
        )
        assert "Secure" in secure.headers["set-cookie"]


def test_other_keys_are_told_why_not(cluster: Cluster, gateway: GatewayProcess) -> None:
    with browser(gateway) as client:
        lacking = sign_in(client, make_key(cluster))
        assert (lacking.status_code, "lacks the right &#39;console&#39;" in lacking.text) == (403, True)
        for key in ("", "nonsense", "ks_0123456789ab_" + "A" * 43):
            refused = sign_in(client, key)
            assert (refused.status_code, "not known here" in refused.text) == (401, True)
        assert COOKIE not in client.cookies
        assert client.post("/login", content=b"{}").status_code == 415
        assert client.post("/login", data={"key": "x" * 20_000}).status_code == 413
        assert client.post("/login", data={f"key{number}": "x" for number in range(100)}).status_code == 400
        other_site = {"Sec-Fetch-Site": "cross-site"}
        assert client.post("/login", data={"key": "x"}, headers=other_site).status_code == 403


@pytest.mark.parametrize("address", ["https://example.org/", "//example.org", "/\\example.org", "jobs", "/\n/x"])
def test_signing_in_leads_nowhere_else(cluster: Cluster, gateway: GatewayProcess, address: str) -> None:
    with browser(gateway) as client:
        key = make_key(cluster, "default", Right.CONSOLE)
        answer = client.post("/login", data={"key": key, "next": address}, follow_redirects=False)
        assert answer.headers["location"] == "/"


def test_a_session_ends_with_its_key_and_by_signing_out(cluster: Cluster, gateway: GatewayProcess) -> None:
    key = make_key(cluster, "default", Right.CONSOLE)
    with browser(gateway) as client:
        sign_in(client, key)
        page = client.get("/")
        assert client.post("/logout", data={"token": "0" * 64}).status_code == 403
        assert client.post("/logout", data={"token": form_token(page.text)}).url.path == "/login"
        assert client.get("/").url.path == "/login"
        sign_in(client, key)
        assert client.get("/").url.path == "/"
        with cluster.database() as connection:
            api_keys.revoke(connection, key.split("_")[1])
        wait_until(lambda: client.get("/").url.path == "/login", "the revoked key's session to end")


def test_a_forged_cookie_is_none(cluster: Cluster, gateway: GatewayProcess) -> None:
    with browser(gateway) as client:
        sign_in(client, make_key(cluster, "default", Right.CONSOLE))
        cookie = client.cookies[COOKIE]
        client.cookies.clear()
        texts = ('["a\\u0000",1,"x"]', '["\\ud800",1,"x"]', '["0123456789ab",1e999,"x"]', '[["0123456789ab"],1,"x"]')
        written = [base64.urlsafe_b64encode(bytes(32) + text.encode()).decode() for text in texts]
        for forged in ("", "x", cookie[:-8] + "AAAAAAAA", cookie[::-1], *written):
            assert client.get("/", headers={"Cookie": f"{COOKIE}={forged}"}).url.path == "/login"


def test_every_page_keeps_the_rules_of_browsers(cluster: Cluster, inside: httpx2.Client) -> None:
    job_id = cluster.enqueue()
    for address in ("/", "/series", "/jobs", f"/jobs/default/{job_id}", "/rejected", "/jobs/default/missing", "/login"):
        headers = inside.get(address).headers
        assert "default-src 'none'" in headers["content-security-policy"], address
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    files = re.findall(r'(?:src|href)="(/assets/[^"]+)"', inside.get("/").text)
    assert len(files) >= 5
    for name in files:
        answer = inside.get(name)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert inside.get("/assets/old/console.css").headers["cache-control"] == "no-store"
    assert inside.get("/assets/x/../guard.py").status_code == 404
    assert inside.get("/assets/x/%2e%2e/guard.py").status_code == 404


def test_jobs_of_all_tenants_are_listed_searched_and_shown(cluster: Cluster, inside: httpx2.Client) -> None:
    mine = cluster.enqueue()
    other = cluster.make_client(tenant="shop").enqueue(
        {"model": "scripted-1", "messages": [{"role": "user", "content": "<b>Rhine</b>"}]}
    )
    everything = inside.get("/jobs").text
    assert mine in everything
    assert other in everything
    assert "<b>Rhine</b>" not in everything
    assert mine not in inside.get("/jobs?tenant=shop").text
    assert other in inside.get("/jobs?q=rhine").text
    assert mine not in inside.get("/jobs?q=rhine").text
    assert mine not in inside.get("/jobs?error=rate_limited").text
    assert inside.get(f"/jobs?q={other}").url.path == f"/jobs/shop/{other}"
    assert inside.get(f"/jobs?q={mine}&tenant=default").url.path == f"/jobs/default/{mine}"
    assert "Any" in inside.get(f"/jobs?q={mine}&tenant=shop").text
    asked = inside.get(f"/jobs?q={other}", headers={"HX-Request": "true"}, follow_redirects=False)
    assert asked.headers["hx-redirect"] == f"/jobs/shop/{other}"
    page = inside.get(f"/jobs/shop/{other}").text
    assert "&lt;b&gt;Rhine&lt;/b&gt;" in page
    assert "It waits for a worker" in page
    request = inside.get(f"/jobs/shop/{other}/request.json").json()
    assert request["messages"][0]["content"] == "<b>Rhine</b>"
    assert json.loads(inside.get(f"/jobs/shop/{other}/result.json").text)["status"] == "queued"


@pytest.mark.parametrize(
    "query",
    [
        "q=%00",
        "tenant=%00",
        "tenant=not%20a%20name",
        "model=%0a",
        "provider=%00",
        "status=nonsense",
        "since=nonsense",
        "before=nonsense",
        "before=default/gone",
        "q=%25_%5C%27%22",
        "q=" + "x" * 5000,
        "q=%ff%fe",
        "q=%ed%a0%80",
    ],
)
def test_whatever_is_asked_for_is_answered_with_a_page(inside: httpx2.Client, query: str) -> None:
    answer = inside.get(f"/jobs?{query}")
    assert answer.status_code == 200
    assert 'id="results"' in answer.text


@pytest.mark.parametrize(
    "address", ["/?span=nonsense", "/series?span=%00", "/rejected?before=nonsense", "/rejected?before=%00"]
)
def test_whatever_is_asked_of_other_pages_is_answered(inside: httpx2.Client, address: str) -> None:
    assert inside.get(address).status_code == 200


@pytest.mark.parametrize(
    "address", ["default/missing", "missing/missing", "default/%00", "de%20fault/x", "default/a%2fb"]
)
def test_a_job_that_is_not_there_is_a_page_that_says_so(inside: httpx2.Client, address: str) -> None:
    answer = inside.get(f"/jobs/{address}")
    assert answer.status_code == 404
    assert "x-request-id" in answer.headers


def test_a_job_is_cancelled_and_run_again_by_forms_of_the_session(cluster: Cluster, inside: httpx2.Client) -> None:
    job_id = cluster.enqueue()
    address = f"/jobs/default/{job_id}"
    for token in ("", "0" * 64):
        assert inside.post(f"{address}/cancel", data={"token": token}).status_code == 403
    assert cluster.result(job_id).status == "queued"
    token = form_token(inside.get(address).text)
    assert inside.post(f"{address}/cancel", data={"token": token}).url.path == address
    assert cluster.result(job_id).status == "cancelled"
    assert "cancelled" in inside.get(address).text
    again = inside.post(f"{address}/retry", data={"token": token})
    assert again.url.path != address
    assert cluster.result(again.url.path.rpartition("/")[2]).retry_of == job_id
    assert inside.post(f"{again.url.path}/retry", data={"token": token}).status_code == 409
    assert inside.post("/jobs/default/missing/cancel", data={"token": token}).status_code == 404


def test_a_job_is_followed_live_and_again_from_its_log(shared_cluster: Cluster) -> None:
    gateway = start_gateway(shared_cluster)
    job_id = shared_cluster.make_client(tenant="shop").enqueue(
        {"model": "scripted-1", "messages": [{"role": "user", "content": "Go"}], "script": {"text": "one two three"}}
    )
    with browser(gateway) as client:
        sign_in(client, make_key(shared_cluster, "default", Right.CONSOLE))
        cookie = {"Cookie": f"{COOKIE}={client.cookies[COOKIE]}"}
        texts, last = [], ""
        for _ in range(2):
            with HttpStream(gateway.port, f"/jobs/shop/{job_id}/events", cookie) as stream:
                events = []
                while (frame := stream.read_frame()) is not None:
                    events.append(json.loads(frame.decode().partition("data: ")[2]))
                assert stream.ended_cleanly
                assert events[-1]["type"] == "job.completed"
                texts.append("".join(event["delta"].get("content", "") for event in events if event["type"] == "delta"))
                last = events[-1]["id"]
        assert texts == ["one two three"] * 2
        for cursor, status in ((last, 204), ("x", 400)):  # 204: an EventSource comes no more
            headers = {**cookie, "Last-Event-ID": cursor}
            with HttpStream(gateway.port, f"/jobs/shop/{job_id}/events", headers) as stream:
                assert stream.response.status == status
        page = client.get(f"/jobs/shop/{job_id}").text
        assert "one two three" in page
        assert "finished" in page
        shared_cluster.push(b"this is no message")
        wait_until(lambda: "<td>" in client.get("/rejected").text, "the rejected message to be shown")
        assert "not named" in client.get("/rejected").text


def forms(html: str) -> dict[str, dict[str, str]]:
    """Return the forms of a page that change something: their hidden fields, by their addresses."""
    found = re.findall(r'<form method="post" action="([^"]+)">(.*?)</form>', html, re.DOTALL)
    fields = r'<input type="hidden" name="(\w+)" value="([^"]*)">'
    return {address: dict(re.findall(fields, inner)) for address, inner in found}


def test_without_scripts_a_job_is_read_as_it_comes_and_cancelled_and_run_again(shared_cluster: Cluster) -> None:
    gateway = start_gateway(shared_cluster)
    job_id = shared_cluster.enqueue(deltas=100_000, rate=20)
    address = f"/jobs/default/{job_id}"
    with browser(gateway) as client:
        sign_in(client, make_key(shared_cluster, "default", Right.CONSOLE))
        still = f"{address}?still"
        assert f"url={still}" in client.get(address).text
        wait_until(lambda: re.search(r'<div class="text">(word ){5}', client.get(still).text), "the text so far")
        page = client.get(still).text
        client.post(f"{address}/cancel", data=forms(page)[f"{address}/cancel"])
        shared_cluster.wait_for(job_id, "cancelled")
        ended = client.get(still).text
        assert "http-equiv" not in ended, "what has ended stays as it is"
        assert "word word" in ended
        again = client.post(f"{address}/retry", data=forms(ended)[f"{address}/retry"])
        assert f'repeats <a id="retry-of" href="{address}">' in again.text
        client.post(f"{again.url.path}/cancel", data=forms(client.get(f"{again.url.path}?still").text).popitem()[1])
        for page in ("/", "/jobs?status=cancelled", "/rejected"):
            assert job_id in client.get(page).text or page != "/jobs?status=cancelled"


def test_a_job_whose_log_cannot_be_read_is_shown_without_its_text(tmp_path: Path, forks: ForkServer) -> None:
    with Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db"), forks=forks) as cluster:
        gateway = start_gateway(cluster)
        job_id = cluster.enqueue()
        with browser(gateway) as client:
            sign_in(client, make_key(cluster, "default", Right.CONSOLE))
            cluster.valkey.stop()
            answer = client.get(f"/jobs/default/{job_id}?still")
            assert (answer.status_code, "The job waits" in answer.text) == (200, True)


def test_limits_are_told_as_the_command_tells_them(tmp_path: Path, forks: ForkServer) -> None:
    file = tmp_path / "providers.toml"
    with Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db"), forks=forks) as cluster:
        file.write_text(
            f'[providers.default]\nbase_url = "{cluster.provider.base_url}"\napi_key_env = "OPENAI_API_KEY"\n'
            "concurrency = 7\nrequests_per_minute = 600\n"
        )
        gateway = start_gateway(cluster)
        cluster.start_worker(providers_file=file)
        job_id = cluster.enqueue(deltas=100_000, rate=20)
        with browser(gateway) as client:
            sign_in(client, make_key(cluster, "default", Right.CONSOLE))
            wait_until(lambda: "1 of 7 streams" in client.get("/").text, "the limit of the provider")
            assert " requests, 600 a minute" in client.get("/").text
        cluster.client.cancel(job_id)


def test_what_workers_did_is_told_also_by_one_that_stops(cluster: Cluster, inside: httpx2.Client) -> None:
    worker = cluster.start_worker()
    for job_id in (cluster.enqueue(deltas=7), cluster.enqueue(faults=[{"kind": "status", "status": 400}])):
        cluster.wait_for(job_id)
    worker.terminate()
    worker.wait()
    with cluster.database() as connection:
        past = overview.history(connection, 60, 1)
    assert sum(sums.deltas for sums in past.sums) >= 7
    assert sum(sum(sums.first_outputs) for sums in past.sums) >= 1
    assert sum(sums.completion_tokens for sums in past.sums) > 0
    assert [error.code for error in past.errors] == ["bad_request"]
    wait_until(lambda: "bad_request" in inside.get("/").text, "the errors to be shown")
    assert inside.get("/jobs?error=bad_request").text.count('class="what"') == 1
    series = inside.get("/series?span=1h").json()
    assert len(series["charts"]["deltas"][0]) == len(series["at"])


def test_a_database_that_is_away_is_a_page_that_says_so(postgres_cluster: Cluster) -> None:
    gateway = start_gateway(postgres_cluster, key_cache=600)
    with browser(gateway) as client:
        sign_in(client, make_key(postgres_cluster, "default", Right.CONSOLE))
        postgres_cluster.postgres.kill()
        answer = client.get("/jobs")
        assert answer.status_code == 503
        assert "database does not answer" in answer.text
        part = client.get("/", headers={"HX-Request": "true"})
        assert (part.status_code, "database does not answer" in part.headers["x-trouble"]) == (503, True)
        postgres_cluster.postgres.start()
        wait_until(lambda: client.get("/jobs").status_code == 200, "the console to come back")
