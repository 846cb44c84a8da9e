"""The client hands jobs over within bounded time, whatever state Redis and the database are in."""

import base64
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, select

from keepstream import AsyncClient, Client, names, tables
from keepstream.client.sender import Sender
from keepstream.errors import (
    BrokerUnavailableError,
    IdempotencyConflictError,
    InvalidJobError,
    InvalidSettingError,
    JobNotFoundError,
    NotConfiguredError,
    StoreUnavailableError,
)
from keepstream.jobs import Job
from keepstream.results import JobStatus
from keepstream.tables import jobs, waiting
from keepstream_worker.dev_stack.embedded import EmbeddedValkey, sqlite_url
from keepstream_worker.settings import Settings
from tests.cluster import PATIENCE
from tests.jobs import make_job
from tests.stored_jobs import start

MESSAGES = [{"role": "user", "content": "Hello"}]
REQUEST: dict[str, Any] = {"model": "m", "messages": MESSAGES}
#: Seconds that an enqueue may take at most. It is bounded at two; the rest is for a busy machine.
BOUND = 30.0


def make_tables(database_url: str) -> str:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return database_url


def rows(database_url: str) -> list[Any]:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        columns = (jobs.c.id, jobs.c.status, jobs.c.cancel_requested_at, waiting.c.seq)
        here = (waiting.c.tenant == jobs.c.tenant) & (waiting.c.job_id == jobs.c.id)
        found = list(connection.execute(select(*columns).outerjoin(waiting, here)))
    engine.dispose()
    return found


def messages(url: str, queue: str = names.QUEUE) -> list[dict[str, Any]]:
    """Return the messages on the queue, oldest first."""
    with redis.Redis.from_url(url) as connection:
        return [json.loads(message) for message in reversed(connection.lrange(queue, 0, -1))]


def sent_job(message: dict[str, Any]) -> Any:
    args, _kwargs, _embed = json.loads(base64.b64decode(message["body"]))
    return args[0]


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    """A server that the test may harm."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def client(redis_url: str, database_url: str) -> Iterator[Client]:
    with Client(redis_url, database_url=make_tables(database_url)) as client:
        yield client


@pytest.fixture
def bare_client(redis_url: str) -> Iterator[Client]:
    """A client without a database."""
    with Client(redis_url) as client:
        yield client


# -- enqueue --


def test_a_job_is_sent_in_celerys_protocol_2(bare_client: Client, redis_url: str) -> None:
    job = make_job(temperature=0.5)
    assert bare_client.enqueue(job) == job.id
    (message,) = messages(redis_url)
    assert sent_job(message) == job.to_wire()
    headers, properties = message["headers"], message["properties"]
    assert (headers["task"], headers["id"], headers["eta"]) == (names.TASK, job.id, None)
    assert properties["delivery_info"] == {"exchange": "", "routing_key": names.QUEUE}
    assert (message["content-type"], message["content-encoding"]) == ("application/json", "utf-8")


def test_the_prompt_stands_in_no_header(bare_client: Client, redis_url: str) -> None:
    bare_client.enqueue(model="m", messages=[{"role": "user", "content": "a secret prompt"}])
    (message,) = messages(redis_url)
    assert "secret" not in json.dumps({name: part for name, part in message.items() if name != "body"})


def test_closing_one_sender_leaves_others_alone(redis_url: str) -> None:
    first, second = Sender(redis_url), Sender(redis_url)
    job = make_job().to_wire()
    first.send(job)
    first.close()
    second.send(job)
    second.close()


def test_with_a_database_the_row_is_written_as_well(client: Client, redis_url: str, database_url: str) -> None:
    job_id = client.enqueue(model="m", messages=MESSAGES)
    ((row_id, status, _, seq),) = rows(database_url)
    assert (row_id, status, seq is not None) == (job_id, "queued", True)
    # The prompt has gone to the database; the message names the job alone.
    assert [sent_job(message) for message in messages(redis_url)] == [{"v": 2, "id": job_id, "tenant": "default"}]


def test_the_same_key_is_sent_once(client: Client, redis_url: str) -> None:
    first = client.enqueue(model="m", messages=MESSAGES, idempotency_key="k")
    assert client.enqueue(model="m", messages=MESSAGES, idempotency_key="k") == first
    assert len(messages(redis_url)) == 1
    with pytest.raises(IdempotencyConflictError):
        client.enqueue(model="n", messages=MESSAGES, idempotency_key="k")


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m"},
        {"model": "m", "messages": MESSAGES, "tenant": "other"},
        {"request": REQUEST | {"x": float("nan")}},
        {"request": REQUEST | {"x": "x" * 9_000_000}},
    ],
)
def test_what_is_no_acceptable_job_leaves_nothing_behind(
    client: Client, redis_url: str, database_url: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidJobError):
        client.enqueue(**fields)
    assert messages(redis_url) == []
    assert rows(database_url) == []


def test_a_job_made_for_another_tenant_is_refused(redis_url: str) -> None:
    job = Job(request=REQUEST, tenant="b")
    with Client(redis_url, tenant="a") as client, pytest.raises(InvalidJobError, match="'b'"):
        client.enqueue(job)


def test_fields_become_a_job_of_the_clients_tenant(redis_url: str) -> None:
    with Client(redis_url, tenant="a") as client:
        client.enqueue(REQUEST)
        client.enqueue(model="m", messages=MESSAGES)
    assert [sent_job(message)["tenant"] for message in messages(redis_url)] == ["a", "a"]


def test_a_request_and_the_fields_of_its_job_do_not_mix(bare_client: Client, redis_url: str) -> None:
    """Names that mean one thing to us and another to a provider can be given for both."""
    request = REQUEST | {"metadata": {"theirs": 1}, "provider": {"order": ["a"]}, "max_attempts": "odd", "user": "u"}
    job_id = bare_client.enqueue(request, metadata={"ours": 2}, provider="groq", max_attempts=3)
    (message,) = messages(redis_url)
    fields = {"metadata": {"ours": 2}, "provider": "groq", "max_attempts": 3}
    assert sent_job(message) == {"v": 2, "id": job_id, "tenant": "default", "request": request} | fields


def test_model_and_messages_alone_make_a_request(bare_client: Client, redis_url: str) -> None:
    bare_client.enqueue(model="m", messages=MESSAGES, metadata={"a": 1})
    bare_client.enqueue({"model": "m", "messages": MESSAGES}, metadata={"a": 1})
    first, second = (sent_job(message) for message in messages(redis_url))
    assert first | {"id": ""} == second | {"id": ""}


@pytest.mark.parametrize(
    ("arguments", "fields", "said"),
    [
        ((), {}, "request: is missing"),
        (({"model": "m"},), {"messages": MESSAGES}, "give the request once"),
        ((), {"messages": MESSAGES, "request": REQUEST}, "give the request once"),
        ((REQUEST,), {"request": REQUEST}, "give the request once"),
        ((make_job(),), {"max_attempts": 3}, "a whole job takes no further arguments"),
        ((make_job().to_wire(),), {}, "this looks like a whole job"),
        (({"request": REQUEST},), {}, "this looks like a whole job"),
        (("Hello",), {}, "request: must be an object"),
        (({"model": "m", "mesages": MESSAGES},), {}, "'messages' is missing; is 'mesages' a typo?"),
        ((REQUEST,), {"max_attempt": 3}, "did you mean 'max_attempts'?"),
        ((), REQUEST | {"temperature": 1}, "put it in 'request'"),
    ],
)
def test_arguments_that_make_no_job_say_what_is_wrong(
    bare_client: Client, arguments: tuple[Any, ...], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidJobError) as caught:
        bare_client.enqueue(*arguments, **fields)
    assert said in str(caught.value)


# -- a broker in trouble --


def harm(server: EmbeddedValkey, how: str) -> None:
    if how == "frozen":
        server.freeze()
    else:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["frozen", "dead"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_without_a_database_a_broker_in_trouble_is_an_error_within_the_bound(
    own_valkey: EmbeddedValkey,
    how: str,
    warm: bool,  # noqa: FBT001
) -> None:
    with Client(own_valkey.url) as client:
        if warm:
            client.enqueue(model="m", messages=MESSAGES)
        harm(own_valkey, how)
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                client.enqueue(model="m", messages=MESSAGES)
            assert time.monotonic() - started < BOUND


@pytest.mark.parametrize("how", ["frozen", "dead"])
def test_with_a_database_a_job_is_accepted_though_the_broker_is_in_trouble(
    own_valkey: EmbeddedValkey, database_url: str, how: str
) -> None:
    with Client(own_valkey.url, database_url=make_tables(database_url)) as client:
        harm(own_valkey, how)
        started = time.monotonic()
        job_id = client.enqueue(model="m", messages=MESSAGES)
        assert time.monotonic() - started < BOUND
    ((row_id, status, _, seq),) = rows(database_url)
    assert (row_id, status, seq is not None) == (job_id, "queued", True)  # it waits in the table, where workers look


@pytest.mark.slow
def test_many_threads_get_their_answer_within_the_bound_too(own_valkey: EmbeddedValkey) -> None:
    with Client(own_valkey.url) as client, ThreadPoolExecutor(30) as pool:
        own_valkey.freeze()

        def enqueue(_: int) -> float:
            started = time.monotonic()
            with pytest.raises(BrokerUnavailableError):
                client.enqueue(model="m", messages=MESSAGES)
            return time.monotonic() - started

        assert max(pool.map(enqueue, range(30))) < 2 * BOUND


def test_a_job_that_the_broker_refuses_is_an_error_of_ours(own_valkey: EmbeddedValkey, database_url: str) -> None:
    with (
        redis.Redis.from_url(own_valkey.url) as connection,
        Client(own_valkey.url) as bare,
        Client(own_valkey.url, database_url=make_tables(database_url)) as full,
    ):
        connection.set(names.QUEUE, "somebody else's")  # WRONGTYPE
        with pytest.raises(BrokerUnavailableError):
            bare.enqueue(model="m", messages=MESSAGES)
        full.enqueue(model="m", messages=MESSAGES)
        connection.delete(names.QUEUE)
        connection.config_set("maxmemory", 1)  # OOM
        with pytest.raises(BrokerUnavailableError):
            bare.enqueue(model="m", messages=MESSAGES)
        full.enqueue(model="m", messages=MESSAGES)
    assert all(row.seq is not None for row in rows(database_url))  # they wait in the table, where workers look


def test_a_client_recovers_with_its_broker(own_valkey: EmbeddedValkey) -> None:
    with Client(own_valkey.url) as client:
        client.enqueue(model="m", messages=MESSAGES)
        own_valkey.restart()
        job_id = ""
        for _ in range(2):  # the first may use the old connection
            try:
                job_id = client.enqueue(model="m", messages=MESSAGES)
                break
            except BrokerUnavailableError:
                pass
    assert sent_job(messages(own_valkey.url)[-1])["id"] == job_id


def test_a_database_that_is_away_refuses_the_job(redis_url: str) -> None:
    url = "postgresql+psycopg://someone:hunter2@127.0.0.1:1/keepstream"
    with Client(redis_url, database_url=url) as client:
        for call in (
            lambda: client.enqueue(model="m", messages=MESSAGES),
            lambda: client.get("x"),
            client.list,
            lambda: client.cancel("x"),
        ):
            with pytest.raises(StoreUnavailableError) as caught:
                call()
            assert "hunter2" not in str(caught.value)
    assert messages(redis_url) == []


# -- cancel --


def test_a_queued_job_is_cancelled_and_the_workers_are_told(client: Client, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection, connection.pubsub() as pubsub:
        pubsub.subscribe(names.control_channel())
        assert pubsub.get_message(timeout=PATIENCE)["type"] == "subscribe"
        job_id = client.enqueue(model="m", messages=MESSAGES)
        assert client.cancel(job_id) is JobStatus.CANCELLED
        message = pubsub.get_message(timeout=PATIENCE)
        assert json.loads(message["data"]) == {"tenant": "default", "job_id": job_id}
        key = names.job_keys("default", job_id).cancel
        assert connection.exists(key)
        assert 0 < connection.ttl(key) <= 86_400
    assert client.cancel(job_id) is JobStatus.CANCELLED


def test_a_running_job_stays_running_until_its_worker_has_stopped(client: Client, database_url: str) -> None:
    job_id = client.enqueue(model="m", messages=MESSAGES)
    engine = create_engine(database_url)
    with engine.begin() as connection:
        start(connection, job_id)
    engine.dispose()
    assert client.cancel(job_id) is JobStatus.RUNNING
    assert rows(database_url)[0].cancel_requested_at is not None


def test_with_a_database_a_cancel_does_not_need_redis(own_valkey: EmbeddedValkey, database_url: str) -> None:
    with Client(own_valkey.url, database_url=make_tables(database_url)) as client:
        job_id = client.enqueue(model="m", messages=MESSAGES)
        own_valkey.kill()
        assert client.cancel(job_id) is JobStatus.CANCELLED


def test_without_a_database_a_cancel_waits_on_redis_for_its_job(bare_client: Client, redis_url: str) -> None:
    assert bare_client.cancel("some-job") is None
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.exists(names.job_keys("default", "some-job").cancel)


def test_a_cancel_that_nobody_can_keep_is_an_error(own_valkey: EmbeddedValkey, tmp_path: Path) -> None:
    with (
        Client(own_valkey.url) as bare,
        Client(own_valkey.url, database_url=make_tables(sqlite_url(tmp_path / "db"))) as full,
    ):
        own_valkey.kill()
        for client in (bare, full):  # the second has a database, but no row for this job
            with pytest.raises(BrokerUnavailableError):
                client.cancel("some-job")


@pytest.mark.parametrize("job_id", ["", "a b", "a}:{b", "../x", "x" * 200])
def test_an_id_that_no_job_can_have_is_not_found(bare_client: Client, job_id: str) -> None:
    with pytest.raises(JobNotFoundError):
        bare_client.cancel(job_id)
    with pytest.raises(JobNotFoundError):
        bare_client.follow(job_id)


# -- queries and settings --


def test_stored_jobs_can_be_queried(client: Client) -> None:
    ids = [client.enqueue(model="m", messages=MESSAGES, metadata={"n": n}) for n in range(3)]
    stored = client.get(ids[0])
    assert stored is not None
    assert (stored.status, stored.metadata, stored.text) == (JobStatus.QUEUED, {"n": 0}, "")
    assert {summary.id for summary in client.list(status=JobStatus.QUEUED)} == set(ids)
    assert client.get("nothing") is None


@pytest.mark.parametrize("text", ["\ud800", "a\0", "\0"], ids=ascii)
def test_a_query_for_what_cannot_be_stored_finds_nothing(client: Client, text: str) -> None:
    client.enqueue(model="m", messages=MESSAGES)
    assert client.get(text) is None
    assert client.list(model=text) == []
    assert client.list(provider=text) == []
    with pytest.raises(JobNotFoundError):
        client.list(before=text)


@pytest.mark.parametrize("job_id", ["", "a b", "x" * 200])
def test_an_id_that_no_job_can_have_is_of_no_stored_job(client: Client, job_id: str) -> None:
    assert client.get(job_id) is None
    with pytest.raises(JobNotFoundError):
        client.list(before=job_id)


def test_queries_need_a_database(bare_client: Client) -> None:
    for call in (lambda: bare_client.get("x"), bare_client.list):
        with pytest.raises(NotConfiguredError, match=names.ENV_DATABASE_URL):
            call()


def test_a_client_is_made_from_the_environment(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names.ENV_REDIS_URL, redis_url)
    monkeypatch.setenv(names.ENV_DATABASE_URL, make_tables(sqlite_url(tmp_path / "db")))
    monkeypatch.setenv(names.ENV_QUEUE, "elsewhere")
    monkeypatch.setenv(names.ENV_PREFIX, "other")
    with Client.from_env("acme") as client:
        job_id = client.enqueue(model="m", messages=MESSAGES)
        client.cancel(job_id)
        assert client.tenant == "acme"
    assert len(messages(redis_url, "elsewhere")) == 1
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.exists(names.job_keys("acme", job_id, "other").cancel)


def test_an_environment_without_redis_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(NotConfiguredError, match=names.ENV_REDIS_URL):
        Client.from_env()


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("KEEPSTREAM_REDIS_URI", names.ENV_REDIS_URL),
        ("KEEPSTREAM_REDISURL", names.ENV_REDIS_URL),
        ("keepstream_redis_url", names.ENV_REDIS_URL),
        ("KEEPSTREAM_DATABASE", names.ENV_DATABASE_URL),
        ("KEEPSTREAM_BROKER_URI", names.ENV_BROKER_URL),
        ("KEEPSTREAM_QEUE", names.ENV_QUEUE),
        ("KEEPSTREAM_PREFX", names.ENV_PREFIX),
    ],
)
def test_a_variable_with_nearly_the_right_name_is_refused(
    client: type[Client] | type[AsyncClient], misspelt: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {misspelt: "redis://:hunter2@h", names.ENV_REDIS_URL: "redis://b", "PATH": "/bin"}
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(InvalidSettingError, match=f"{misspelt}: .*did you mean {meant}") as caught:
        client.from_env()
    assert "hunter2" not in str(caught.value)


def test_variables_of_others_are_no_business_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = {f"KEEPSTREAM_{name.upper()}": "1" for name in Settings.model_fields}
    platforms = {"KEEPSTREAM_BROKER_PORT": "tcp://10.0.0.1:6379", "KEEPSTREAM_DATABASE_SERVICE_HOST": "10.0.0.2"}
    own = {names.ENV_REDIS_URL: "redis://b", names.ENV_BROKER_URL: "", names.ENV_DATABASE_URL: ""}
    services = {"KEEPSTREAM_REDIS_PORT": "6379", "KEEPSTREAM_TENANT": "acme", "KEEPSTREAM_UI": "1"}
    monkeypatch.setattr(os, "environ", workers | platforms | services | own)
    Client.from_env().close()


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("variable", [names.ENV_REDIS_URL, names.ENV_BROKER_URL, names.ENV_DATABASE_URL])
def test_a_variable_that_cannot_be_used_is_named(
    variable: str, client: type[Client] | type[AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {names.ENV_REDIS_URL: "redis://h"} | {variable: "nonsense://u:hunter2@h"})
    with pytest.raises(InvalidSettingError, match=variable) as caught:
        client.from_env()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"redis_url": "http://localhost"}, "redis://"),
        ({"redis_url": None}, "redis_url.*missing"),
        ({"redis_url": "redis://localhost", "broker_url": "redis+cluster://localhost"}, "broker_url.*Cluster"),
        ({"redis_url": "redis://localhost", "tenant": "a:b"}, "tenant"),
        ({"redis_url": "redis://localhost", "database_url": "nonsense"}, "database URL"),
        ({"redis_url": "redis://localhost", "database_url": "mysql://localhost/x"}, "database URL"),
        ({"redis_url": "redis://localhost", "database_url": "postgresql://u:p@localhost:port/x"}, "database URL"),
    ],
)
def test_a_setting_that_cannot_be_used_says_so(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettingError, match=said):
        Client(**given)


async def test_the_async_client_does_the_same(redis_url: str, database_url: str) -> None:
    async with AsyncClient(redis_url, database_url=make_tables(database_url)) as client:
        job_id = await client.enqueue(model="m", messages=MESSAGES)
        stored = await client.get(job_id)
        assert stored is not None
        assert stored.status is JobStatus.QUEUED
        assert [summary.id for summary in await client.list()] == [job_id]
        assert await client.cancel(job_id) is JobStatus.CANCELLED
        with pytest.raises(InvalidJobError):
            await client.enqueue(model="m")
    assert len(messages(redis_url)) == 1
