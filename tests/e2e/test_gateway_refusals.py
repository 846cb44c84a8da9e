"""OpenAI's addresses refuse what is wrong by the status and the shape that its libraries know, and before the commit.

What has been committed is never answered with an error of a server, at which a library would send the request again.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.cluster import Cluster, wait_until
from tests.gateways import GatewayProcess, caller, error_of, make_key, start_gateway
from tests.http_streams import HttpStream

pytestmark = pytest.mark.slow

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
_KEYS = itertools.count(1)


def response(**script: Any) -> dict[str, Any]:
    """A request for a response, with what makes the scripted provider answer so."""
    own = {"key": f"refusals-{next(_KEYS)}", **script}
    return {"model": "scripted-1", "input": "Hi", "keepstream": {"request": {"script": own}}}


def chat(**script: Any) -> dict[str, Any]:
    """The same for a chat completion."""
    return {"model": "scripted-1", "messages": MESSAGES, "script": {"key": f"refusals-{next(_KEYS)}", **script}}


#: Every address of responses and of chat completions; ``{id}`` is a job's.
ADDRESSES = [
    ("POST", RESPONSES),
    ("GET", f"{RESPONSES}/resp_{{id}}"),
    ("GET", f"{RESPONSES}/resp_{{id}}?stream=true"),
    ("POST", f"{RESPONSES}/resp_{{id}}/cancel"),
    ("GET", f"{RESPONSES}/resp_{{id}}/input_items"),
    ("DELETE", f"{RESPONSES}/resp_{{id}}"),
    ("POST", CHAT),
    ("GET", CHAT),
    ("GET", f"{CHAT}/chatcmpl-{{id}}"),
    ("GET", f"{CHAT}/chatcmpl-{{id}}/messages"),
    ("DELETE", f"{CHAT}/chatcmpl-{{id}}"),
    ("GET", "/v1/models"),
]


def ask(http: httpx2.Client, method: str, path: str, job_id: str, **further: Any) -> httpx2.Response:
    """Send a request that has nothing wrong in it but what the test is about."""
    body = None
    if method == "POST" and "{id}" not in path:
        body = (response() if path == RESPONSES else chat()) | further
    return http.request(method, path.format(id=job_id), json=body)


@pytest.fixture(scope="module")
def gateway(shared_cluster: Cluster) -> GatewayProcess:
    return start_gateway(shared_cluster, max_body_bytes=100_000, max_followers_per_key=1)


@pytest.fixture(scope="module")
def key(shared_cluster: Cluster) -> str:
    return make_key(shared_cluster)


@pytest.fixture
def http(gateway: GatewayProcess, key: str) -> Iterator[httpx2.Client]:
    with caller(gateway, key) as client:
        yield client


@pytest.fixture(scope="module")
def ended(shared_cluster: Cluster) -> str:
    """The id of a job that has ended."""
    return shared_cluster.wait_for(shared_cluster.enqueue(deltas=3)).id


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_a_wrong_key_is_a_401(gateway: GatewayProcess, ended: str, method: str, path: str) -> None:
    for wrong in ("sk-wrong", f"ks_0123456789ab_{'a' * 43}"):
        with caller(gateway, wrong) as stranger:
            answer = ask(stranger, method, path, ended)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [each for each in ADDRESSES if "{id}" in each[1]])
def test_another_tenants_job_is_a_404(
    shared_cluster: Cluster, gateway: GatewayProcess, ended: str, method: str, path: str
) -> None:
    with caller(gateway, make_key(shared_cluster, "another")) as stranger:
        answers = [ask(stranger, method, path, job_id) for job_id in (ended, "nobodys")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert error_of(answers[0]) == error_of(answers[1])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (RESPONSES, {"modle": "m"}, "modle"),
        (RESPONSES, {"temperature": 0.5, "unheard_of": 1}, "unheard_of"),
        (RESPONSES, {"background": "yes"}, "background"),
        (RESPONSES, {"model": None}, "model"),
        (RESPONSES, {"conversation": "conv_1"}, "conversation"),
        (RESPONSES, {"keepstream": {"max_atempts": 3}}, "keepstream.max_atempts"),
        (RESPONSES, {"metadata": {"n": 1}}, "metadata"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"model": 7}, "model"),
        (CHAT, {"keepstream": {"max_attempts": 0}}, "keepstream.max_attempts"),
        (RESPONSES, {"keepstream": {"max_attempts": 0}}, "keepstream.max_attempts"),
        (CHAT, {"keepstream": {"max_atempts": 3}}, "keepstream.max_atempts"),
    ],
)
def test_a_parameter_that_is_wrong_or_unknown_is_a_400_with_its_name(
    shared_cluster: Cluster, http: httpx2.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    before = {job.id for job in shared_cluster.client.list(limit=200)}
    answer = ask(http, "POST", path, "", **fields)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert {job.id for job in shared_cluster.client.list(limit=200)} == before, "nothing is stored"


@pytest.mark.parametrize(("path", "body"), [(RESPONSES, response), (CHAT, chat)])
def test_a_model_that_the_provider_does_not_know_is_a_400_with_its_parameter(
    http: httpx2.Client, path: str, body: Any
) -> None:
    said = {"error": {"message": "no such model", "type": "invalid_request_error", "param": None, "code": None}}
    answer = http.post(path, json=body(faults=[{"kind": "status", "status": 404, "body": said}]))
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "model"


@pytest.mark.parametrize("path", [f"{RESPONSES}/", f"{CHAT}/", "/api/jobs/", "/api/chat/", "/login/"])
def test_an_address_with_a_slash_too_much_leads_nowhere_else(http: httpx2.Client, path: str) -> None:
    """Behind a proxy with TLS it would lead to an address without, and the key would go there."""
    for method in ("GET", "POST"):
        answer = http.request(method, path, follow_redirects=False)
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "not_found"
        assert "location" not in answer.headers


@pytest.mark.parametrize("limit", ["0", "1001", "x", "\u0662", "9" * 5000])
def test_a_limit_that_is_none_is_a_400(http: httpx2.Client, limit: str) -> None:
    for path in ("/api/jobs", CHAT):
        answer = http.get(path, params={"limit": limit})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "limit"


@pytest.mark.parametrize(("path", "body"), [(RESPONSES, response), (CHAT, chat)])
def test_a_body_that_is_too_large_is_a_413(http: httpx2.Client, path: str, body: Any) -> None:
    content = json.dumps(body() | {"metadata": {"x": "y" * 100_000}}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    for sent in (content, pieces()):
        answer = http.post(path, content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"


def test_too_many_followers_are_a_429_that_says_when_to_come_back_and_store_nothing(
    shared_cluster: Cluster, gateway: GatewayProcess
) -> None:
    key = make_key(shared_cluster, "crowded")
    client = shared_cluster.make_client(tenant="crowded")
    with caller(gateway, key) as http:
        slow = response(deltas=1000, rate=10) | {"background": True}
        begun = http.post(RESPONSES, json=slow).raise_for_status().json()["id"]
        headers = {"Authorization": f"Bearer {key}"}
        with HttpStream(gateway.port, f"{RESPONSES}/{begun}?stream=true", headers) as stream:
            stream.read_until(b"response.created")
            refused = [
                http.get(f"{RESPONSES}/{begun}", params={"stream": "true"}),
                http.post(RESPONSES, json=response() | {"stream": True}),
                http.post(RESPONSES, json=response() | {"stream": True, "background": True}),
                http.post(CHAT, json=chat() | {"stream": True}),
                # Those that wait for a whole answer last as long and cost as much.
                http.post(RESPONSES, json=response()),
                http.post(CHAT, json=chat()),
            ]
            for answer in refused:
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert error_of(answer)["code"] == "too_many_followers"
            assert [f"resp_{job.id}" for job in client.list()] == [begun]
            http.post(f"{RESPONSES}/{begun}/cancel").raise_for_status()
    client.close()


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "", "99999999999999999", "9000000000000000"])
def test_a_cursor_that_is_none_is_a_400_before_the_head(http: httpx2.Client, ended: str, cursor: str) -> None:
    answer = http.get(f"{RESPONSES}/resp_{ended}", params={"stream": "true", "starting_after": cursor})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == ("starting_after", "invalid_cursor")


# -- servers that are away --


def test_a_database_that_is_away_is_a_503_that_says_when_to_come_back(postgres_cluster: Cluster) -> None:
    gateway, key = start_gateway(postgres_cluster, key_cache=600), make_key(postgres_cluster)
    job_id = postgres_cluster.enqueue(deltas=3)
    with caller(gateway, key) as http, caller(gateway, make_key(postgres_cluster)) as new:
        http.get("/v1/models").raise_for_status()  # this key is known by now, the other is not
        postgres_cluster.postgres.stop()
        streamed = [("POST", RESPONSES), ("POST", CHAT)]
        answers = [ask(each, method, path, job_id) for each in (http, new) for method, path in ADDRESSES]
        answers += [ask(http, method, path, job_id, stream=True) for method, path in streamed]
        for answer in answers:
            assert answer.status_code == 503, answer.request.url
            assert int(answer.headers["retry-after"]) >= 1
            error = error_of(answer)
            assert (error["code"], error["type"]) == ("database_unavailable", "server_error")
        postgres_cluster.postgres.start()
        wait_until(lambda: ask(http, "GET", f"{RESPONSES}/resp_{{id}}", job_id).status_code == 200, "an answer")
        with_key = postgres_cluster.client.list()
        assert [job.id for job in with_key] == [job_id], "nothing was stored that was refused"


def test_while_redis_is_away_a_response_is_accepted_and_found(cluster: Cluster) -> None:
    cluster.start_worker()
    gateway, key = start_gateway(cluster), make_key(cluster)
    with caller(gateway, key) as http:
        http.get("/v1/models").raise_for_status()
        cluster.valkey.stop()
        begun = http.post(RESPONSES, json=response(deltas=3) | {"background": True})
        assert begun.status_code == 200
        response_id = begun.json()["id"]
        found = http.get(f"{RESPONSES}/{response_id}")
        assert (found.status_code, found.json()["id"]) == (200, response_id)
        headers = {"Authorization": f"Bearer {key}"}
        with HttpStream(gateway.port, f"{RESPONSES}/{response_id}?stream=true", headers) as stream:
            assert stream.response.status == 200
            assert b"response.created" in stream.read_until(b"\n\n")
            cluster.valkey.start()
            stream.read_until(b"response.completed")
        assert http.get(f"{RESPONSES}/{response_id}").json()["status"] == "completed"


@pytest.mark.parametrize(("path", "body"), [(RESPONSES, response), (CHAT, chat)])
def test_a_database_that_goes_while_an_answer_is_waited_for_is_no_error(
    postgres_cluster: Cluster, path: str, body: Any
) -> None:
    """The job is stored by then: at an error the request would be sent again, and paid for again."""
    postgres_cluster.start_worker()
    gateway, key = start_gateway(postgres_cluster, key_cache=600), make_key(postgres_cluster)
    answers: list[httpx2.Response] = []

    def wait_for_the_answer() -> None:
        with caller(gateway, key) as http:
            answers.append(http.post(path, json=body(deltas=20, rate=10)))

    asking = threading.Thread(target=wait_for_the_answer)
    asking.start()
    job = wait_until(lambda: next(iter(postgres_cluster.client.list()), None), "the job to be stored")
    following = postgres_cluster.follow(job.id)
    following.wait_for("delta")
    postgres_cluster.postgres.stop()
    following.wait_for("attempt.finished")
    postgres_cluster.postgres.start()
    asking.join()
    assert answers[0].status_code == 200, answers[0].text
    assert job.id in answers[0].json()["id"]
    assert len(postgres_cluster.client.list()) == 1
