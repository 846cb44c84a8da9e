"""OpenAI's own library is a client of the gateway: whatever is cut, it ends with what the row holds."""

import asyncio
import itertools
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
)

from keepstream.names import job_keys
from keepstream.results import CompletionResult
from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import PATIENCE, Cluster, wait_until
from tests.fork_server import ForkServer
from tests.gateways import GatewayProcess, caller, error_of, make_key, start_gateway

pytestmark = pytest.mark.slow

TEXT = "Grüße aus der Küche 🍲, with a few words more."
_KEYS = itertools.count(1)


def script(**given: Any) -> dict[str, Any]:
    """Return what makes the scripted provider answer so, as a client's library sends it with a response."""
    return {"keepstream": {"request": {"script": {"key": f"openai-{next(_KEYS)}", "text": TEXT, **given}}}}


def library(gateway: GatewayProcess, key: str) -> OpenAI:
    return OpenAI(api_key=key, base_url=f"http://127.0.0.1:{gateway.port}/v1", timeout=PATIENCE, max_retries=0)


def job_of(cluster: Cluster, response_id: str) -> CompletionResult:
    return cluster.result(response_id.removeprefix("resp_").removeprefix("chatcmpl-"))


class House:
    """A cluster with a worker, two gateways and a key, which the tests of this module share."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gateways = [start_gateway(cluster), start_gateway(cluster)]
        self.key = make_key(cluster)
        self.clients = [library(gateway, self.key) for gateway in self.gateways]

    @property
    def client(self) -> OpenAI:
        return self.clients[0]


@pytest.fixture(scope="module")
def house(shared_cluster: Cluster) -> House:
    return House(shared_cluster)


class Reader:
    """Reads events as they come and keeps the text by item, dropping what a retry has made void."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.items: list[str] = []  # by their ids: those that count
        self.types: list[str] = []
        self.last: int | None = None
        self.response: Any = None

    def read(self, event: Any) -> None:
        self.types.append(event.type)
        assert self.last is None or event.sequence_number > self.last
        self.last = event.sequence_number
        if event.type == "response.in_progress":
            counting = [item for item in event.response.output if item.status != "incomplete"]
            messages = [item for item in counting if item.type == "message"]
            self.items = [item.id for item in counting]
            self.texts = {item.id: "".join(part.text for part in item.content) for item in messages}
        elif event.type == "response.output_item.added":
            self.items.append(event.item.id)
        elif event.type == "response.output_text.delta":
            self.texts[event.item_id] = self.texts.get(event.item_id, "") + event.delta
        elif event.type in {"response.completed", "response.incomplete", "response.failed"}:
            self.response = event.response
            assert sorted(self.items) == sorted(item.id for item in event.response.output)

    @property
    def text(self) -> str:
        return "".join(self.texts.values())


def follow(client: OpenAI, response_id: str, reader: Reader, most: int = 1_000_000) -> None:
    """Read at most so many events from where the reader is, and leave."""
    cursor = {} if reader.last is None else {"starting_after": reader.last}
    with client.responses.retrieve(response_id, stream=True, **cast(Any, cursor)) as stream:
        for event in itertools.islice(stream, most):
            reader.read(event)


def test_a_background_response_cut_at_every_event_and_resumed_at_another_gateway(any_cluster: Cluster) -> None:
    any_cluster.start_worker()
    house = House(any_cluster)
    begun = house.client.responses.create(
        model="scripted-1", input="Hi", background=True, extra_body=script(words=2, rate=20, reasoning="Let me think.")
    )
    assert begun.status in {"queued", "in_progress"}
    reader = Reader()
    for client in itertools.cycle(house.clients):
        follow(client, begun.id, reader, most=1)
        if reader.response is not None:
            break
    row = job_of(any_cluster, begun.id)
    assert reader.text == row.text == TEXT
    assert reader.response.status == "completed"
    assert reader.response.output_text == TEXT
    assert reader.types[:2] == ["response.created", "response.queued"]
    assert len(reader.types) > 15
    retrieved = house.client.responses.retrieve(begun.id)
    assert retrieved.to_dict() == reader.response.to_dict()
    assert retrieved.usage is not None
    assert row.usage is not None
    assert retrieved.usage.output_tokens == row.usage.completion_tokens


@pytest.mark.parametrize("background", [True, False])
def test_a_stream_of_the_stateful_helper(house: House, background: bool) -> None:  # noqa: FBT001  # a parameter
    with house.client.responses.stream(
        model="scripted-1", input="Hi", background=background, extra_body=script(reasoning="Hm.")
    ) as stream:
        final = stream.get_final_response()
    assert final.output_text == job_of(house.cluster, final.id).text == TEXT
    assert [item.type for item in final.output] == ["reasoning", "message"]


@pytest.mark.parametrize("fault", ["cut", "stall", "error_event"])
def test_a_retry_in_the_middle_leaves_only_the_new_text(house: House, fault: str) -> None:
    body = script(delta_chars=4, faults=[{"kind": fault, "after": 5}])
    if fault == "stall":
        body["keepstream"]["idle_timeout"] = 5.0  # which the next attempt must not run into on a busy machine
    reader = Reader()
    with house.client.responses.create(model="scripted-1", input="Hi", stream=True, extra_body=body) as stream:
        for event in stream:
            reader.read(event)
    row = job_of(house.cluster, reader.response.id)
    assert row.attempt == 2
    assert reader.text == row.text == TEXT
    assert reader.types.count("response.output_item.done") == 2
    with house.clients[1].responses.stream(response_id=reader.response.id) as helper:
        assert helper.get_final_response().output_text == TEXT


def test_many_async_readers_of_one_response(house: House) -> None:
    begun = house.client.responses.create(
        model="scripted-1", input="Hi", background=True, extra_body=script(delta_chars=3, rate=40)
    )

    async def read(gateway: GatewayProcess) -> str:
        url = f"http://127.0.0.1:{gateway.port}/v1"
        async with (
            AsyncOpenAI(api_key=house.key, base_url=url, timeout=PATIENCE, max_retries=0) as client,
            client.responses.stream(response_id=begun.id) as stream,
        ):
            return (await stream.get_final_response()).output_text

    async def read_all() -> list[str]:
        return await asyncio.gather(*(read(gateway) for gateway in house.gateways * 4))

    assert asyncio.run(read_all()) == [TEXT] * 8


def test_cancelling_keeps_the_partial_text_and_may_be_repeated(house: House) -> None:
    reader = Reader()
    body = script(deltas=1000, text=None, rate=20)
    with house.client.responses.create(
        model="scripted-1", input="Hi", background=True, stream=True, extra_body=body
    ) as stream:
        for event in stream:
            reader.read(event)
            if event.type == "response.output_text.delta" and reader.types.count(event.type) == 3:
                response_id = event.item_id.split("_")[1]
                cancelled = [client.responses.cancel(f"resp_{response_id}") for client in house.clients]
                assert [response.status for response in cancelled] == ["cancelled", "cancelled"]
    assert reader.types[-1] == "response.incomplete"
    assert reader.response.status == "cancelled"
    row = job_of(house.cluster, reader.response.id)
    assert reader.text == row.text == reader.response.output_text
    assert row.text
    assert house.client.responses.cancel(reader.response.id).to_dict() == reader.response.to_dict()


@pytest.mark.parametrize("seen", [0, 1, 3, 6, 9])
def test_a_reader_comes_back_after_the_log_has_expired(house: House, seen: int) -> None:
    begun = house.client.responses.create(
        model="scripted-1", input="Hi", background=True, extra_body=script(delta_chars=5)
    )
    job_id = begun.id.removeprefix("resp_")
    reader = Reader()
    follow(house.client, begun.id, reader, most=seen)
    house.cluster.wait_for(job_id)
    with house.cluster.redis() as redis:
        redis.delete(job_keys("default", job_id).log)
    follow(house.clients[1], begun.id, reader)
    assert reader.text == TEXT
    assert reader.response.output_text == TEXT
    with house.client.responses.stream(response_id=begun.id) as helper:
        assert helper.get_final_response().output_text == TEXT


@pytest.mark.parametrize("seen", [0, 4, 12])
@pytest.mark.parametrize("lost", [(0.0, 0.4), (0.3, 0.7), (0.6, 1.0)])
def test_a_reader_comes_back_after_a_part_of_the_log_was_lost(
    house: House, seen: int, lost: tuple[float, float]
) -> None:
    faults = [{"kind": "cut", "after": 6}]
    begun = house.client.responses.create(
        model="scripted-1",
        input="Hi",
        background=True,
        extra_body=script(delta_chars=5, reasoning="Let me think.", faults=faults),
    )
    job_id = begun.id.removeprefix("resp_")
    house.cluster.wait_for(job_id)
    readers = [Reader() for _ in house.clients]
    for reader, client in zip(readers, house.clients, strict=True):
        follow(client, begun.id, reader, most=seen)
    log = job_keys("default", job_id).log
    with house.cluster.redis() as redis:
        entries: Any = wait_until(lambda: redis.xrange(log), "events in the log")
        first, last = (round(share * len(entries)) for share in lost)
        first = min(first, len(entries) - 1)  # pieces of a text may have come in one event
        redis.xdel(log, *[entry for entry, _ in entries[first : max(last, first + 1)]])
    told = []
    for reader, client in zip(readers, house.clients, strict=True):
        follow(client, begun.id, reader)
        assert reader.text == TEXT
        told.append((reader.types, reader.last, reader.response.to_dict()))
    assert told[0] == told[1], "every gateway tells the same"
    assert told[0][2] == house.client.responses.retrieve(begun.id).to_dict()


def test_a_gateway_that_stops_breaks_streams_off_and_they_go_on_elsewhere(tmp_path: Path, forks: ForkServer) -> None:
    with Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db"), forks=forks) as cluster:
        cluster.start_worker()
        house = House(cluster)
        reader = Reader()
        body = script(key="broken off", deltas=60, text=None, rate=20)
        body["keepstream"]["request"]["hold"] = 20
        begun = house.client.responses.create(model="scripted-1", input="Hi", background=True, extra_body=body)

        def read_until_it_breaks() -> None:
            with house.client.responses.retrieve(begun.id, stream=True) as stream:
                for event in stream:
                    reader.read(event)
                    if reader.types.count("response.output_text.delta") == 3:
                        house.gateways[0].terminate()

        with pytest.raises((APIConnectionError, httpx2.TransportError)):
            read_until_it_breaks()
        assert "response.completed" not in reader.types
        cluster.release("broken off")
        follow(house.clients[1], begun.id, reader)
        assert reader.text == job_of(cluster, begun.id).text == reader.response.output_text


def test_a_tool_loop_by_the_previous_response_and_by_items(house: House) -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    first = house.client.responses.create(
        model="scripted-1",
        input="1 + 2?",
        instructions="Use the tool.",
        tools=cast(Any, [tool]),
        extra_body=script(text="", reasoning="I shall add.", tool_calls=[call]),
    )
    (made,) = [item for item in first.output if item.type == "function_call"]
    assert (made.name, made.arguments) == ("add", '{"a":1,"b":2}')
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "3"}
    stored = job_of(house.cluster, first.id)
    expected = [
        {"role": "user", "content": "1 + 2?"},
        stored.assistant_message(),
        {"role": "tool", "tool_call_id": made.call_id, "content": "3"},
    ]
    assert stored.assistant_message()["reasoning_content"] == "I shall add."
    by_id = house.client.responses.create(
        model="scripted-1", previous_response_id=first.id, input=cast(Any, [result]), extra_body=script()
    )
    back = [{"role": "user", "content": "1 + 2?"}, *(item.to_dict() for item in first.output), result]
    by_items = house.client.responses.create(model="scripted-1", input=cast(Any, back), extra_body=script())
    for second in (by_id, by_items):
        assert second.output_text == TEXT
        request = job_of(house.cluster, second.id).request
        assert request is not None
        assert request["messages"] == expected
    assert by_id.previous_response_id == first.id
    items = list(house.client.responses.input_items.list(by_id.id, order="asc", limit=2))
    assert [item.type for item in items] == ["message", "reasoning", "function_call", "function_call_output"]


def test_deleting(house: House) -> None:
    made = house.client.responses.create(model="scripted-1", input="Hi", extra_body=script())
    house.client.responses.delete(made.id)
    for call in (house.client.responses.retrieve, house.client.responses.delete, house.client.responses.cancel):
        with pytest.raises(NotFoundError):
            call(made.id)


def test_chat_completions_plain_streamed_and_stored(house: House) -> None:
    client = house.client
    body = script(reasoning="Hm.")["keepstream"]["request"]
    ask: dict[str, Any] = {"model": "scripted-2", "messages": [{"role": "user", "content": "Hi"}], "extra_body": body}
    plain = client.chat.completions.create(**ask, metadata={"topic": "plain"})
    assert plain.choices[0].message.content == TEXT
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == plain.usage
    with client.chat.completions.stream(**ask) as helper:
        assert helper.get_final_completion().choices[0].message.content == TEXT
    assert client.chat.completions.retrieve(plain.id).to_dict() == plain.to_dict()
    assert plain.id in [found.id for found in client.chat.completions.list(model="scripted-2", order="desc", limit=2)]
    assert [found.id for found in client.chat.completions.list(metadata={"topic": "plain"})] == [plain.id]
    assert [message.content for message in client.chat.completions.messages.list(plain.id)] == ["Hi"]
    assert client.chat.completions.delete(plain.id).deleted
    with pytest.raises(NotFoundError):
        client.chat.completions.retrieve(plain.id)
    assert "scripted-2" in [model.id for model in client.models.list()]
    assert client.models.retrieve("scripted-2").owned_by == "default"


def test_a_chat_stream_says_that_its_beginning_is_void(house: House) -> None:
    faults = [{"kind": "cut", "after": 0}, {"kind": "cut", "after": 5}]
    body = script(delta_chars=4, faults=faults)["keepstream"]["request"]
    ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "extra_body": body}
    told: list[Any] = []
    with pytest.raises(APIError, match="/v1/chat/completions/chatcmpl-") as broken:
        told.extend(house.client.chat.completions.create(**ask, stream=True))
    assert broken.value.code == "answer_restarted"
    completion = str(broken.value.message).rpartition("/")[2]
    house.cluster.wait_for(completion.removeprefix("chatcmpl-"))
    assert house.client.chat.completions.retrieve(completion).choices[0].message.content == TEXT


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_repetition_is_the_same_job(house: House, api: str) -> None:
    body = {"model": "m", "input": "Again", "background": True} | script()
    path, name = "/v1/responses", "metadata"
    if api == "chat":
        path = "/v1/chat/completions"
        body = {"model": "m", "messages": [{"role": "user", "content": "Again"}]} | script()["keepstream"]["request"]
    ids = []
    with caller(house.gateways[0], house.key) as first, caller(house.gateways[1], house.key) as second:
        for number, http in enumerate((first, second, second)):
            headers = {"x-stainless-retry-count": str(number)}
            ids.append(http.post(path, json=body, headers=headers).raise_for_status().json()["id"])
        assert len(set(ids)) == 1
        ids += [http.post(path, json=body).raise_for_status().json()["id"] for http in (first, second)]
        assert len(set(ids)) == 3
        keyed = body | {name: {"idempotency_key": f"{api}-in-the-metadata"}}
        ids = [http.post(path, json=keyed).raise_for_status().json()["id"] for http in (first, second)]
        assert len(set(ids)) == 1
        headers = {"Idempotency-Key": f"{api}-in-the-header"}
        ids = [http.post(path, json=body, headers=headers).raise_for_status().json()["id"] for http in (first, second)]
        assert len(set(ids)) == 1
        conflict = second.post(path, json=body | {"model": "other"}, headers=headers)
        assert conflict.status_code == 422
        assert error_of(conflict)["code"] == "idempotency_conflict"


def test_what_the_provider_refuses_is_a_400_with_its_parameter(house: House) -> None:
    error = {"error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "x"}}
    body = script(faults=[{"kind": "status", "status": 404, "body": error}])
    with pytest.raises(BadRequestError) as refusal:
        house.client.responses.create(model="scripted-9", input="Hi", extra_body=body)
    assert refusal.value.param == "model"
    body = script(faults=[{"kind": "status", "status": 404, "body": error}])["keepstream"]["request"]
    with pytest.raises(BadRequestError) as refusal:
        house.client.chat.completions.create(
            model="scripted-9", messages=[{"role": "user", "content": "Hi"}], extra_body=body
        )
    assert refusal.value.param == "model"


def test_a_job_that_fails_otherwise_is_never_a_server_error(house: House) -> None:
    body = script(faults=[{"kind": "status", "status": 500}])
    body["keepstream"]["max_attempts"] = 1
    failed = house.client.responses.create(model="m", input="Hi", extra_body=body)
    assert failed.status == "failed"
    assert failed.error is not None
    chat = {"keepstream": {"max_attempts": 1}} | script(faults=[{"kind": "status", "status": 500}])["keepstream"][
        "request"
    ]
    with pytest.raises(APIStatusError) as refusal:
        house.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}], extra_body=chat)
    assert refusal.value.status_code == 424


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("resp_nobody", 404, None),
        ("nobody", 404, None),
        ("resp_..", 404, None),
        ("{id}?stream=true&starting_after=x", 400, "starting_after"),
        ("{id}?stream=true&starting_after=-1", 400, "starting_after"),
        ("{id}?stream=true&starting_after=9000000000000000", 400, "starting_after"),
        ("{id}/input_items?limit=0", 400, "limit"),
        ("{id}/input_items?order=up", 400, "order"),
        ("{id}/input_items?after=msg_x", 400, "after"),
    ],
)
def test_bad_addresses_and_cursors(house: House, path: str, status: int, param: str | None) -> None:
    with caller(house.gateways[0], house.key) as http:
        response_id = http.post("/v1/responses", json={"model": "m", "input": "Hi", **script()}).json()["id"]
        answer = http.get(f"/v1/responses/{path.format(id=response_id)}")
        assert answer.status_code == status
        assert error_of(answer)["param"] == param


def test_who_may_not(house: House) -> None:
    made = house.client.responses.create(model="m", input="Hi", extra_body=script())
    with pytest.raises(AuthenticationError):
        library(house.gateways[0], "ks_wrong").responses.retrieve(made.id)
    stranger = library(house.gateways[0], make_key(house.cluster, "another"))
    for call in (stranger.responses.retrieve, stranger.responses.cancel, stranger.responses.delete):
        with pytest.raises(NotFoundError):
            call(made.id)
    with pytest.raises(NotFoundError):
        stranger.responses.input_items.list(made.id)
    with pytest.raises(NotFoundError):
        stranger.chat.completions.retrieve(made.id.replace("resp_", "chatcmpl-"))
    with pytest.raises(BadRequestError) as refusal:
        stranger.responses.create(model="m", input="Hi", previous_response_id=made.id)
    assert refusal.value.code == "previous_response_not_found"
    assert [model.id for model in stranger.models.list()] == []


def test_a_running_response_cannot_be_deleted(house: House) -> None:
    made = house.client.responses.create(
        model="m", input="Hi", background=True, extra_body=script(deltas=1000, text=None, rate=20)
    )
    wait_until(lambda: house.client.responses.retrieve(made.id).status == "in_progress", "the job to run")
    with pytest.raises(APIStatusError) as refusal:
        house.client.responses.delete(made.id)
    assert refusal.value.status_code == 409
    house.client.responses.cancel(made.id)
    house.client.responses.delete(made.id)
