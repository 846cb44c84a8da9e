"""The addresses of the AI SDK's chats, as real processes: who may, what is refused, and that every replay is whole.

That the AI SDK itself builds the right message is tested in ``tests/clients``.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from keepstream import names
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.ai_sdk import chats
from tests.cluster import Cluster, wait_until
from tests.gateways import GatewayProcess, caller, error_of, make_key, start_gateway
from tests.ui_message import UiMessage

pytestmark = pytest.mark.slow

CHAT = "a chat/with ä?&"
STREAM = f"/api/chat/{quote(CHAT, safe='')}/stream"
STOP = f"/api/chat/{quote(CHAT, safe='')}/stop"
TOKEN = f"/api/chat/{quote(CHAT, safe='')}/token"


def question(chat: str = CHAT, words: str = "Tell me something.", **fields: Any) -> dict[str, Any]:
    """What ``useChat`` sends."""
    message = {"id": "u", "role": "user", "parts": [{"type": "text", "text": words}]}
    return {"id": chat, "messages": [message], "trigger": "submit-message", **fields}


def scripted(chat: str = CHAT, words: str = "Tell me something.", **script: Any) -> dict[str, Any]:
    return question(chat, words, model="scripted-1", script=script)


def frames(response: httpx2.Response) -> Generator[list[dict[str, Any]]]:
    """The chunks of each server-sent event, until the last, which must be the AI SDK's own."""
    assert response.status_code == 200, response.read()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield [json.loads(line.removeprefix("data: "))]
    raise AssertionError("the stream has ended without its last event")


def ask(http: httpx2.Client, body: dict[str, Any]) -> UiMessage:
    """Send a message, and return the answer."""
    message = UiMessage()
    with http.stream("POST", "/api/chat", json=body) as response:
        for chunks in frames(response):
            message.apply(chunks)
    return message


def begin(http: httpx2.Client, body: dict[str, Any]) -> str:
    """Send a message, and leave with the beginning of the answer; return the job's id."""
    with http.stream("POST", "/api/chat", json=body) as response, closing(frames(response)) as found:
        return str(next(found)[0]["messageMetadata"]["keepstream"]["job"])


def resume(http: httpx2.Client, path: str = STREAM) -> UiMessage:
    message = UiMessage()
    with http.stream("GET", path) as response:
        for chunks in frames(response):
            message.apply(chunks)
    return message


def assert_is_answer(message: UiMessage, row: CompletionResult) -> None:
    assert row.status is JobStatus.COMPLETED
    assert (message.texts("text"), message.texts("reasoning")) == (row.text, row.choices[0].reasoning)
    assert message.is_whole
    assert message.is_ended


@pytest.fixture(scope="module")
def gateway(shared_cluster: Cluster) -> GatewayProcess:
    return start_gateway(shared_cluster)


@pytest.fixture
def http(shared_cluster: Cluster, gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """A caller of a tenant of its own, so that no test sees another's chats."""
    tenant = f"t{next(_TENANTS)}"
    with caller(gateway, make_key(shared_cluster, tenant)) as client:
        client.headers["x-tenant"] = tenant  # for the test alone
        yield client


_TENANTS = iter(range(1_000_000))


def row_of(cluster: Cluster, http: httpx2.Client, number: int = 0) -> CompletionResult:
    client = cluster.client.for_tenant(http.headers["x-tenant"])
    job_id = names.numbered_id(chats.prefix(CHAT), number)

    def ended() -> CompletionResult | None:
        result = client.get(job_id)
        return result if result is not None and result.status.terminal else None

    return wait_until(ended, f"{job_id} to end")


def test_a_question_is_answered_and_the_answer_replayed(any_cluster: Cluster) -> None:
    any_cluster.start_worker()
    key = make_key(any_cluster)
    body = scripted(text="It is so.", reasoning="Let me think. ")
    with caller(start_gateway(any_cluster), key) as one, caller(start_gateway(any_cluster), key) as other:
        message = ask(one, body)
        row = any_cluster.result(names.numbered_id(chats.prefix(CHAT), 0))
        assert_is_answer(message, row)
        assert message.id == row.id
        assert row.metadata == {"chat": CHAT}
        assert_is_answer(resume(other), row)
        with any_cluster.redis() as redis:
            redis.flushall()  # the log has expired
        assert_is_answer(resume(other), row)
        # The next question is another job, and the one that counts from now on.
        again = ask(other, body)
        assert again.id == names.numbered_id(chats.prefix(CHAT), 1)
        assert resume(one).id == again.id


def test_who_comes_in_the_middle_gets_everything(shared_cluster: Cluster, http: httpx2.Client) -> None:
    begin(http, scripted(deltas=30, rate=30, key=http.headers["x-tenant"]))
    shared_cluster.wait_for_deltas(http.headers["x-tenant"], 5)
    assert_is_answer(resume(http), row_of(shared_cluster, http))


def test_what_has_failed_is_not_replayed(shared_cluster: Cluster, http: httpx2.Client) -> None:
    ask(http, scripted(text="a b c d e f", faults=[{"kind": "cut", "after": 3}], key=http.headers["x-tenant"]))
    with http.stream("GET", STREAM) as response:
        sent = [chunk for chunks in frames(response) for chunk in chunks]
    assert "reset-step" not in [chunk["type"] for chunk in sent]
    message = UiMessage()
    message.apply(sent)
    assert_is_answer(message, row_of(shared_cluster, http))


def test_a_question_that_comes_twice_is_one_job(shared_cluster: Cluster, http: httpx2.Client) -> None:
    body = scripted(deltas=30, rate=30)
    first = begin(http, body)
    assert begin(http, body) == first
    assert begin(http, scripted(words="Something else.", deltas=30, rate=30)) != first
    assert begin(http, {**body, "trigger": "regenerate-message"}) != first
    assert [row_of(shared_cluster, http, number).status for number in range(3)] == [JobStatus.COMPLETED] * 3


def test_stop_ends_the_answer_and_keeps_its_text(shared_cluster: Cluster, http: httpx2.Client) -> None:
    assert http.post(STOP).status_code == 204
    message = UiMessage()
    statuses: list[str] = []
    with http.stream("POST", "/api/chat", json=scripted(deltas=1000, rate=50)) as response:
        for chunks in frames(response):
            message.apply(chunks)
            if message.texts("text") and not statuses:
                statuses.append(http.post(STOP).json()["status"])
    assert statuses[0] in {"running", "cancelled"}
    row = row_of(shared_cluster, http)
    assert row.status is JobStatus.CANCELLED
    assert message.aborted
    assert message.texts("text") == row.text
    assert http.post(STOP).status_code == 204
    assert resume(http).texts("text") == row.text


def test_an_answer_that_is_long_ended_is_not_resumed(shared_cluster: Cluster) -> None:
    brief = start_gateway(shared_cluster, chat_replay=0.001)
    with caller(brief, make_key(shared_cluster, "brief")) as http:
        assert http.get(STREAM).status_code == 204
        ask(http, scripted(text="Short."))
        assert http.get(STREAM).status_code == 204
        # One that goes on is, whenever it began.
        begin(http, scripted(deltas=20, rate=20))
        assert resume(http).finish_reason == "stop"


def test_an_older_sdk_is_told_of_an_error_and_resumes(shared_cluster: Cluster) -> None:
    with caller(start_gateway(shared_cluster, chat_retry="error"), make_key(shared_cluster, "older")) as http:
        message = ask(http, scripted(text="a b c d e f", faults=[{"kind": "cut", "after": 3}], key="older"))
        assert message.error is not None
        assert "resume" in message.error
        assert resume(http).texts("text") == "a b c d e f"


def test_what_finds_no_place_is_not_stored(shared_cluster: Cluster) -> None:
    """Or the page would be told of an error, and pay for an answer that nobody sees."""
    with caller(start_gateway(shared_cluster, max_followers=1), make_key(shared_cluster, "narrow")) as http:
        with http.stream("POST", "/api/chat", json=scripted("first", deltas=1000, rate=50)) as response:
            found = frames(response)  # kept, for the connection ends with it
            next(found)
            refused = http.post("/api/chat", json=scripted("second", text="Never."))
            assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_followers")
        assert http.post("/api/chat/first/stop").status_code == 200
    client = shared_cluster.client.for_tenant("narrow")
    assert client.last_numbered(chats.prefix("second")) is None
    assert client.last_numbered(chats.prefix("first")) is not None


# -- who may --


def test_another_tenants_chat_is_another_chat(shared_cluster: Cluster, gateway: GatewayProcess) -> None:
    with (
        caller(gateway, make_key(shared_cluster, "one")) as one,
        caller(gateway, make_key(shared_cluster, "two")) as two,
    ):
        ask(one, scripted(text="For one alone."))
        assert two.get(STREAM).status_code == 204
        assert two.post(STOP).status_code == 204


def test_without_a_key_nothing_is_told(gateway: GatewayProcess) -> None:
    with caller(gateway, "ks_000000000000_" + "x" * 43) as stranger:
        for response in (
            stranger.post("/api/chat", json=scripted()),
            stranger.get(STREAM),
            stranger.post(STOP),
            stranger.post(TOKEN),
        ):
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("place", ["header", "address"])
def test_a_browser_has_a_token_for_one_chat(shared_cluster: Cluster, place: str) -> None:
    common = {"model": "scripted-1", "messages": [{"role": "system", "content": "Be brief."}]}
    gateway = start_gateway(shared_cluster, chat_request=json.dumps(common))
    tenant = f"browser-{place}"
    with caller(gateway, make_key(shared_cluster, tenant)) as owner:
        owner.headers["x-tenant"] = tenant
        made = owner.post(TOKEN, json={"seconds": 60})
        assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
        token = made.json()["token"]
        base, headers = f"http://127.0.0.1:{gateway.port}", {}
        suffix = f"?token={token}" if place == "address" else ""
        if place == "header":
            headers = {"Authorization": f"Bearer {token}"}
        with httpx2.Client(base_url=base, headers=headers, timeout=60) as browser:
            response = browser.post(f"/api/chat{suffix}", json=question())
            assert response.status_code == 200
            row = row_of(shared_cluster, owner)
            assert row.request is not None
            assert row.request["messages"] == [*common["messages"], {"role": "user", "content": "Tell me something."}]
            assert browser.get(f"{STREAM}{suffix}").status_code == 200
            assert browser.post(f"{STOP}{suffix}").status_code == 204
            for body in (question("another chat"), {**question(), "id": "job-1"}):
                assert error_of(browser.post(f"/api/chat{suffix}", json=body))["code"] == "job_not_found"
            refused = browser.post(f"/api/chat{suffix}", json=question(model="dear"))
            assert (refused.status_code, error_of(refused)["param"]) == (403, "model")
            assert browser.get(f"/api/chat/other/stream{suffix}").status_code == 404
            assert browser.get(f"/api/jobs/{row.id}{suffix}").status_code in {401, 404}
            assert browser.post(f"{TOKEN}{suffix}").status_code == 401


def test_a_token_for_a_job_is_none_for_a_chat(shared_cluster: Cluster, http: httpx2.Client) -> None:
    ask(http, scripted(text="Hello."))
    job_id = row_of(shared_cluster, http).id
    token = http.post(f"/api/jobs/{job_id}/token").json()["token"]
    answer = http.get(STREAM, headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "job_not_found")


# -- what is refused --


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "id"),
        ({"id": ""}, 400, "id"),
        ({"id": "c"}, 400, "messages"),
        (question(), 400, "model"),
        (scripted() | {"trigger": "later"}, 400, "trigger"),
        (scripted() | {"stream": True}, 400, "stream"),
        (scripted() | {"messages": [{"role": "user", "content": "x"}]}, 400, "messages[0].parts"),
        (scripted() | {"messages": [{"role": "assistant", "id": "a", "parts": []}]}, 400, None),
    ],
)
def test_a_bad_request_is_named(http: httpx2.Client, body: dict[str, Any], status: int, param: str | None) -> None:
    response = http.post("/api/chat", json=body)
    assert response.status_code == status
    assert error_of(response)["param"] == param or param is None


def test_a_bad_address_is_named(http: httpx2.Client) -> None:
    assert error_of(http.get(f"{STREAM}?aftr=1"))["code"] == "unknown_parameter"
    assert error_of(http.get(f"/api/chat/{'x' * 257}/stream"))["param"] == "id"
    assert error_of(http.post(TOKEN, json={"second": 5}))["param"] == "second"
    assert error_of(http.post(TOKEN, json={"seconds": 0}))["param"] == "seconds"
    assert http.get("/api/chat").status_code == 405
