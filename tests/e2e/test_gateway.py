"""The gateway's native addresses, as real processes: jobs are created, followed, cut off, resumed elsewhere and ended.

Whatever is done to the connection, a reader that comes back with the id of its last event holds the row's text.
"""

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from keepstream.client import api_keys
from keepstream.names import Right
from keepstream.results import CompletionResult, output_sha256
from tests.cluster import PATIENCE, Cluster, wait_until
from tests.gateways import GatewayProcess, Reader, caller, error_of, make_key, start_gateway
from tests.http_streams import HttpStream

pytestmark = pytest.mark.slow


def job(*, hold: int | None = None, **script: Any) -> dict[str, Any]:
    """A job as its creator writes it; one that is held goes on when its script's key is released."""
    request: dict[str, Any] = {"model": "scripted-1", "messages": [{"role": "user", "content": "Tell me something."}]}
    if hold is not None:
        request["hold"] = hold
    return {"request": request | ({"script": script} if script else {})}


def create(http: httpx2.Client, *, hold: int | None = None, **script: Any) -> str:
    response = http.post("/api/jobs", json=job(hold=hold, **script))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def assert_same_text(reader: Reader, result: CompletionResult) -> None:
    """What the reader holds is what is stored, and both say so."""
    assert reader.has_the_end
    assert [choice.content for choice in reader.transcript.choices] == [choice.content for choice in result.choices]
    assert reader.events[-1].output_sha256 == result.output_sha256 == output_sha256([result.text])  # type: ignore[union-attr]
    ids = [event.event_id for event in reader.events]
    assert ids == sorted(set(ids))


def stranger(gateway: GatewayProcess) -> httpx2.Client:
    """A caller without a key."""
    return httpx2.Client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=PATIENCE)


# -- the way of a job --


def test_a_job_is_created_followed_read_listed_and_deleted(any_cluster: Cluster) -> None:
    any_cluster.start_worker()
    gateway, key = start_gateway(any_cluster), make_key(any_cluster)
    with caller(gateway, key) as http:
        response = http.post("/api/jobs", json=job(deltas=20) | {"metadata": {"user": "u-17"}})
        assert response.status_code == 202
        job_id = response.json()["id"]
        assert response.headers["location"] == f"/api/jobs/{job_id}"
        reader = Reader(job_id, key)
        assert reader.follow(gateway)
        result = CompletionResult.model_validate_json(http.get(f"/api/jobs/{job_id}").text)
        assert result == any_cluster.result(job_id)
        assert result.status == "completed"
        assert_same_text(reader, result)
        with reader.open(gateway) as again:  # as an EventSource does after each end
            assert again.response.status == 204
        listed = http.get("/api/jobs", params={"status": "completed,failed", "metadata[user]": "u-17"}).json()
        assert [summary["id"] for summary in listed["jobs"]] == [job_id]
        assert listed["next_before"] is None
        assert http.get("/api/jobs", params={"metadata[user]": "u-18"}).json()["jobs"] == []
        assert http.delete(f"/api/jobs/{job_id}").status_code == 204
        assert error_of(http.get(f"/api/jobs/{job_id}"))["code"] == "job_not_found"
        assert http.delete(f"/api/jobs/{job_id}").status_code == 404


def test_a_reader_that_is_cut_off_at_every_event_resumes_at_another_gateway(any_cluster: Cluster) -> None:
    any_cluster.start_worker()
    gateways, key = [start_gateway(any_cluster), start_gateway(any_cluster)], make_key(any_cluster)
    with caller(gateways[0], key) as http:
        # The first attempt breaks in the middle: its text is dropped, and the second one counts.
        job_id = create(http, deltas=12, rate=20, faults=[{"kind": "cut", "after": 5}])
    reader = Reader(job_id, key)
    for number in range(100):
        reader.follow(gateways[number % 2], most=1)
        if reader.has_the_end:
            break
    assert "attempt.failed" in {event.type for event in reader.events}
    assert_same_text(reader, any_cluster.result(job_id))
    # And once more from each event on, now that the job has ended. The row says so before the log does: who came in
    # between has got a snapshot of the row in place of the last events.
    wait_until(lambda: any_cluster.log(job_id)[-1].id == reader.events[-1].id, "the end in the log")
    events = any_cluster.log(job_id)
    for place, event in enumerate(events[:-1]):
        late = Reader(job_id, key)
        late.last_id = event.id
        assert late.follow(gateways[place % 2])
        assert [again.id for again in late.events] == [later.id for later in events[place + 1 :]]


def test_a_job_whose_log_has_expired_is_followed_from_its_row(cluster: Cluster) -> None:
    cluster.start_worker(log_ttl=1)
    gateway, key = start_gateway(cluster), make_key(cluster)
    with caller(gateway, key) as http:
        job_id = create(http, deltas=5)
    result = cluster.wait_for(job_id)
    wait_until(lambda: not cluster.log(job_id), "the log to expire")
    reader = Reader(job_id, key)
    assert reader.follow(gateway)
    assert_same_text(reader, result)


def test_a_job_is_cancelled_while_it_streams(any_cluster: Cluster) -> None:
    any_cluster.start_worker()
    gateway, key = start_gateway(any_cluster), make_key(any_cluster)
    with caller(gateway, key) as http:
        job_id = create(http, deltas=5000, rate=20)
        reader = Reader(job_id, key)
        with reader.open(gateway) as stream:
            reader.take(stream, 5)
            for _ in range(2):
                answer = http.post(f"/api/jobs/{job_id}/cancel")
                assert answer.status_code == 200
                assert answer.json()["status"] in {"running", "cancelled"}
            assert reader.take(stream)
        result = any_cluster.result(job_id)
        assert result.status == "cancelled"
        assert result.text
        assert_same_text(reader, result)
        assert http.post(f"/api/jobs/{job_id}/cancel").json() == {"id": job_id, "status": "cancelled"}


def test_an_ended_job_is_run_again_as_a_new_one(cluster: Cluster) -> None:
    cluster.start_worker()
    with caller(start_gateway(cluster), make_key(cluster)) as http:
        job_id = create(http, deltas=3)
        cluster.wait_for(job_id)
        refused = http.post(f"/api/jobs/{job_id}/retry")
        assert refused.status_code == 409
        assert error_of(refused)["code"] == "job_state"
        assert refused.headers["x-should-retry"] == "false"
        again = http.post(f"/api/jobs/{job_id}/retry", json={"force": True})
        assert again.status_code == 202
        assert cluster.wait_for(again.json()["id"]).retry_of == job_id


def test_the_same_key_is_the_same_job(any_cluster: Cluster) -> None:
    with caller(start_gateway(any_cluster), make_key(any_cluster)) as http:
        headers = {"Idempotency-Key": "turn-3"}
        ids = {http.post("/api/jobs", json=job(deltas=3), headers=headers).json()["id"] for _ in range(3)}
        assert len(ids) == 1
        other = http.post("/api/jobs", json=job(deltas=4), headers=headers)
        assert other.status_code == 422
        assert error_of(other)["code"] == "idempotency_conflict"
        both = http.post("/api/jobs", json=job() | {"idempotency_key": "turn-4"}, headers=headers)
        assert both.status_code == 400
        assert error_of(both)["param"] == "idempotency_key"


# -- who may --


@pytest.fixture(scope="module")
def gateway(shared_cluster: Cluster) -> GatewayProcess:
    """A gateway for tests that do no harm."""
    return start_gateway(shared_cluster, max_body_bytes=200_000, token_seconds=60)


@pytest.fixture(scope="module")
def key(shared_cluster: Cluster) -> str:
    return make_key(shared_cluster)


@pytest.fixture
def http(gateway: GatewayProcess, key: str) -> Iterator[httpx2.Client]:
    with caller(gateway, key) as client:
        yield client


@pytest.mark.parametrize(
    "header", [None, "", "Basic abc", "Bearer", "Bearer sk-abc", f"Bearer ks_0123456789ab_{'a' * 43}", "Bearer \xff"]
)
def test_a_wrong_key_is_refused(gateway: GatewayProcess, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with stranger(gateway) as client:
        for method, path in (("GET", "/api/jobs"), ("POST", "/api/jobs"), ("GET", "/api/jobs/x/events")):
            response = client.request(method, path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "text", [r'["a\u0000","x",1,["read"]]', r'["\ud800","x",1,["read"]]', '["a","x",1e999,["read"]]']
)
def test_a_token_that_anybody_wrote_is_refused_and_never_a_failure(gateway: GatewayProcess, text: str) -> None:
    token = base64.urlsafe_b64encode(bytes(32) + text.encode()).decode().rstrip("=")
    with stranger(gateway) as client:
        for response in (
            client.get("/api/jobs/x", params={"token": token}),
            client.get("/api/jobs/x", headers={"Authorization": f"Bearer {token}"}),
        ):
            assert response.status_code == 401, response.text


def test_a_key_with_a_changed_secret_is_refused(http: httpx2.Client, key: str) -> None:
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert http.get("/api/jobs", headers={"Authorization": f"Bearer {changed}"}).status_code == 401


def test_a_key_without_the_right_is_told_so(shared_cluster: Cluster, gateway: GatewayProcess) -> None:
    with caller(gateway, make_key(shared_cluster, "default", Right.CONSOLE)) as http:
        response = http.get("/api/jobs")
        assert response.status_code == 403
        assert error_of(response)["code"] == "missing_right"


def test_a_revoked_key_ends_within_the_time_it_is_remembered(shared_cluster: Cluster, gateway: GatewayProcess) -> None:
    key = make_key(shared_cluster)
    with caller(gateway, key) as http:
        assert http.get("/api/jobs").status_code == 200
        with shared_cluster.database() as connection:
            api_keys.revoke(connection, api_keys.id_of(key) or "")
        wait_until(lambda: http.get("/api/jobs").status_code == 401, "the key to be refused")


def test_another_tenants_job_does_not_exist(
    shared_cluster: Cluster, gateway: GatewayProcess, http: httpx2.Client
) -> None:
    job_id = create(http, deltas=3)
    shared_cluster.wait_for(job_id)
    with caller(gateway, make_key(shared_cluster, "other")) as stranger:
        paths = (("GET", ""), ("DELETE", ""), ("GET", "/events"))
        for method, path in (*paths, ("POST", "/cancel"), ("POST", "/retry"), ("POST", "/token")):
            response = stranger.request(method, f"/api/jobs/{job_id}{path}")
            assert response.status_code == 404, (method, path)
            assert error_of(response)["code"] == "job_not_found"
        assert stranger.get("/api/jobs").json()["jobs"] == []
        assert stranger.get("/api/jobs", params={"before": job_id}).status_code == 404
        refused = stranger.post("/api/jobs", json=job() | {"tenant": "default"})
        assert refused.status_code == 400
    assert http.get(f"/api/jobs/{job_id}").status_code == 200


def test_a_browser_follows_one_job_by_a_token(
    shared_cluster: Cluster, gateway: GatewayProcess, http: httpx2.Client
) -> None:
    job_id, other = create(http, deltas=3), create(http, deltas=3)
    made = http.post(f"/api/jobs/{job_id}/token", json={"seconds": 30})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    token = made.json()["token"]
    with HttpStream(gateway.port, made.json()["events"]) as stream:
        assert stream.response.status == 200
        assert stream.read_to_the_end()
        assert b'"job.completed"' in stream.received
    with stranger(gateway) as browser:
        query = {"token": token}
        assert browser.get(f"/api/jobs/{job_id}", params=query).status_code == 200
        assert browser.get(f"/api/jobs/{other}", params=query).status_code == 404
        assert error_of(browser.post(f"/api/jobs/{job_id}/cancel", params=query))["code"] == "missing_right"
        for method, path in (("GET", "/api/jobs"), ("DELETE", f"/api/jobs/{job_id}"), ("POST", "/api/jobs")):
            assert browser.request(method, path, params=query).status_code == 401
        changed = {"token": token[:-2] + ("AA" if token[-2:] != "AA" else "BB")}
        assert browser.get(f"/api/jobs/{job_id}", params=changed).status_code == 401
        stopper = http.post(f"/api/jobs/{job_id}/token", json={"may": ["read", "cancel"]}).json()["token"]
        assert browser.post(f"/api/jobs/{job_id}/cancel", params={"token": stopper}).status_code == 200
        brief = http.post(f"/api/jobs/{job_id}/token", json={"seconds": 1}).json()
        wait_until(lambda: time.time() > brief["expires_at"], "the token to expire")
        expired = browser.get(f"/api/jobs/{job_id}", params={"token": brief["token"]})
        assert expired.status_code == 401
        assert error_of(expired)["code"] == "token_expired"


# -- bad input --


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/api/jobs", {}, 400, "request"),
        ("POST", "/api/jobs", {"request": {"model": "m"}}, 400, "request"),
        ("POST", "/api/jobs", job() | {"max_atempts": 3}, 400, None),
        ("POST", "/api/jobs", job() | {"max_attempts": 0}, 400, "max_attempts"),
        ("POST", "/api/jobs", job() | {"v": 1}, 400, "v"),
        ("POST", "/api/jobs", job() | {"id": "a b"}, 400, "id"),
        ("POST", "/api/jobs?limit=1", job(), 400, "limit"),
        ("POST", "/api/jobs", [], 400, None),
        ("POST", "/api/jobs", "text", 400, None),
        ("POST", "/api/jobs/none/retry", {"forec": True}, 400, "forec"),
        ("POST", "/api/jobs/none/retry", {"force": 1}, 400, "force"),
        ("POST", "/api/jobs/none/token", {"seconds": 61}, 400, "seconds"),
        ("POST", "/api/jobs/none/token", {"may": ["fly"]}, 400, "may"),
        ("GET", "/api/jobs?statsu=completed", None, 400, "statsu"),
        ("GET", "/api/jobs?status=done", None, 400, "status"),
        ("GET", "/api/jobs?limit=0", None, 400, "limit"),
        ("GET", "/api/jobs?limit=many", None, 400, "limit"),
        ("GET", "/api/jobs?since=yesterday", None, 400, "since"),
        ("GET", "/api/jobs?since=0001-01-01T00:00:00%2B14:00", None, 400, "since"),
        ("GET", "/api/jobs?until=9999-12-31T23:59:59-14:00", None, 400, "until"),
        ("GET", "/api/jobs?before=none", None, 404, None),
        ("GET", "/api/jobs/none", None, 404, None),
        ("GET", "/api/jobs/a%20b", None, 404, None),
        ("GET", "/api/jobs/none/events", None, 404, None),
        ("GET", "/api/jobs/none/events?after=abc", None, 400, "after"),
        ("POST", "/api/jobs/none/cancel", None, 404, None),
        ("PUT", "/api/jobs", {}, 405, None),
        ("GET", "/api/nothing", None, 404, None),
    ],
)
def test_bad_input_is_named_and_refused(
    http: httpx2.Client, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    response = http.request(method, path, json=body) if body is not None else http.request(method, path)
    assert response.status_code == status, response.text
    assert error_of(response)["param"] == param


def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(http: httpx2.Client) -> None:
    message = error_of(http.post("/api/jobs", json=job() | {"max_atempts": 3}))["message"]
    assert "did you mean 'max_attempts'" in message
    assert "did you mean 'status'" in error_of(http.get("/api/jobs?statsu=completed"))["message"]


@pytest.mark.parametrize("cursor", ["abc", "0-1", "1-", "1-1\n", "9-9"])
def test_a_malformed_or_impossible_cursor_is_refused_before_the_head(
    shared_cluster: Cluster, http: httpx2.Client, cursor: str
) -> None:
    job_id = create(http, deltas=3)
    shared_cluster.wait_for(job_id)
    responses = [http.get(f"/api/jobs/{job_id}/events", params={"after": cursor})]
    if cursor.isprintable():
        responses.append(http.get(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": cursor}))
    for response in responses:
        assert response.status_code == 400
        assert error_of(response)["code"] == "invalid_cursor"


def test_the_limit_of_a_body_holds_whatever_its_head_says(http: httpx2.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    large = json.dumps(job() | {"metadata": {"x": "y" * 300_000}}).encode()
    for content in (large, pieces()):
        response = http.post("/api/jobs", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"


def test_only_json_is_accepted(http: httpx2.Client) -> None:
    body = json.dumps(job())
    assert http.post("/api/jobs", content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    for broken in (b"{", b'{"a": NaN}', b"[" * 100_000, b"\xff"):
        response = http.post("/api/jobs", content=broken, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert error_of(response)["code"] == "invalid_json"


def test_no_page_of_another_origin_may_call_unless_it_is_named(shared_cluster: Cluster, http: httpx2.Client) -> None:
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
    assert "access-control-allow-origin" not in http.options("/api/jobs", headers=ask).headers
    assert "access-control-allow-origin" not in http.get("/api/jobs", headers=ask).headers
    open_one = start_gateway(shared_cluster, cors_origins="https://app.example")
    with caller(open_one, "none") as named:
        preflight = named.options("/api/jobs", headers=ask | {"Access-Control-Request-Headers": "authorization"})
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        refused = named.get("/api/jobs", headers=ask)  # an error, which the page is to be able to read
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = named.get("/api/jobs", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_health_and_metrics_need_no_key_and_name_no_job(gateway: GatewayProcess, http: httpx2.Client) -> None:
    job_id = create(http, deltas=3)
    http.get(f"/api/jobs/{job_id}")
    with stranger(gateway) as anybody:
        assert anybody.get("/healthz").text == "ok\n"
        assert anybody.get("/readyz").json() == {"redis": "ok", "database": "ok"}
        metrics = anybody.get("/metrics").text
    assert 'keepstream_gateway_requests_total{method="GET",route="/api/jobs/{job_id}",status="200"}' in metrics
    assert job_id not in metrics


# -- faults --


def test_on_sigterm_streams_end_and_their_readers_go_on_elsewhere(cluster: Cluster) -> None:
    cluster.start_worker()
    first, second, key = start_gateway(cluster), start_gateway(cluster), make_key(cluster)
    with caller(first, key) as http:
        job_id = create(http, key="stopped", deltas=60, rate=20, hold=20)
    reader = Reader(job_id, key)
    with reader.open(first) as stream:
        reader.take(stream, 5)
        first.terminate()
        assert reader.take(stream)  # to a clean end
    assert not reader.has_the_end
    cluster.release("stopped")
    assert first.wait() == 0
    assert reader.follow(second)
    assert_same_text(reader, cluster.wait_for(job_id))
    with pytest.raises(ConnectionError):
        reader.open(first)


def test_a_gateway_that_is_killed_costs_its_readers_nothing(cluster: Cluster) -> None:
    cluster.start_worker()
    first, second, key = start_gateway(cluster), start_gateway(cluster), make_key(cluster)
    with caller(first, key) as http:
        job_id = create(http, key="killed", deltas=60, rate=20, hold=20)
    reader = Reader(job_id, key)
    with reader.open(first) as stream:
        reader.take(stream, 5)
        first.kill()
        assert not reader.take(stream)
    cluster.release("killed")
    assert reader.follow(second)
    assert_same_text(reader, cluster.wait_for(job_id))


def test_while_the_database_is_away_nothing_is_accepted_and_who_asks_is_told_when_to_come_back(
    postgres_cluster: Cluster,
) -> None:
    postgres_cluster.start_worker()
    gateway, key = start_gateway(postgres_cluster, key_cache=600), make_key(postgres_cluster)
    with caller(gateway, key) as http:
        job_id = create(http, deltas=3)
        postgres_cluster.wait_for(job_id)
        postgres_cluster.postgres.stop()
        for method, path in (("POST", ""), ("GET", ""), ("GET", f"/{job_id}"), ("POST", f"/{job_id}/cancel")):
            body = job() if (method, path) == ("POST", "") else None
            response = http.request(method, f"/api/jobs{path}", json=body)
            assert response.status_code == 503, (method, path)
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["code"] == "database_unavailable"
        assert http.get("/healthz").status_code == 200
        wait_until(lambda: http.get("/readyz").status_code == 503, "the gateway not to be ready")
        gateway.wait_to_say("server_away")
        reader = Reader(job_id, key)  # its log is on Redis
        assert reader.follow(gateway)
        assert reader.has_the_end
        postgres_cluster.postgres.start()
        wait_until(lambda: http.post("/api/jobs", json=job()).status_code == 202, "jobs to be accepted")


def test_while_redis_is_away_jobs_are_accepted_and_readers_wait(cluster: Cluster) -> None:
    cluster.start_worker()
    gateway, key = start_gateway(cluster, ping=0.3), make_key(cluster)
    with caller(gateway, key) as http:
        cluster.valkey.stop()
        job_id = create(http, deltas=3)
        assert http.get(f"/api/jobs/{job_id}").status_code == 200
        reader = Reader(job_id, key)
        with reader.open(gateway) as stream:
            assert stream.response.status == 200
            cluster.valkey.start()
            assert reader.take(stream)
        assert_same_text(reader, cluster.wait_for(job_id))
