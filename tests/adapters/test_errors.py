"""Every error that a client raises is one of ours, whatever is wrong; and whatever can be done nevertheless is done."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from sqlalchemy import create_engine, make_url

from keepstream import AsyncClient, Client, KeepstreamError, tables
from keepstream.errors import (
    BrokerUnavailableError,
    ClientClosedError,
    InvalidArgumentError,
    InvalidSettingError,
    NotConfiguredError,
    StoreUnavailableError,
    UnexpectedError,
)
from keepstream.results import JobStatus
from keepstream_worker.dev_stack.embedded import free_port, sqlite_url
from tests.services import PostgresServer

REQUEST: Final[dict[str, Any]] = {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}
PASSWORD: Final = "hunter2"

Urls = tuple[str, str | None]  # of Redis and the database


# -- what may be wrong --


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
        yield server.getsockname()[1]


@pytest.fixture
def good(redis_url: str, postgres_url: str) -> tuple[str, str]:
    engine = create_engine(postgres_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return redis_url, postgres_url


#: Per situation, the URLs of Redis and the database, made of the good ones; "{silent}" and "{free}" are ports.
SITUATIONS: Final[dict[str, tuple[str, str | None]]] = {
    "Redis is away": (f"redis://:{PASSWORD}@127.0.0.1:{{free}}", "{database}"),
    "Redis is away, and there is no database": (f"redis://:{PASSWORD}@127.0.0.1:{{free}}", None),
    "Redis never answers": ("redis://127.0.0.1:{silent}", "{database}"),
    "Redis never answers, and there is no database": ("redis://127.0.0.1:{silent}", None),
    "Redis does not know the user": (f"redis://nobody:{PASSWORD}@{{server}}", None),
    "Redis lets the user do nothing": (f"redis://idle:{PASSWORD}@{{server}}", None),
    "Redis is PostgreSQL": ("redis://127.0.0.1:{postgres}", None),
    "Redis is no host": ("redis://there-is-none.invalid", None),
    "the database is away": ("{redis}", f"postgresql://u:{PASSWORD}@127.0.0.1:{{free}}/x"),
    "the database never answers": ("{redis}", f"postgresql://u:{PASSWORD}@127.0.0.1:{{silent}}/x?connect_timeout=2"),
    "the database does not exist": ("{redis}", "{database}-not"),
    "there are no tables": ("{redis}", "sqlite:///{directory}/empty.db"),
    "the file cannot be made": ("{redis}", "sqlite:///{directory}/no/such/folder.db"),
    "the file is no database": ("{redis}", "sqlite:///{directory}/text.db"),
    "the database is read-only": ("{redis}", "{database}?options=-cdefault_transaction_read_only%3Don"),
    "all is well": ("{redis}", "{database}"),
}


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def urls(situation: str, good: tuple[str, str], tmp_path: Path, silent: int) -> Urls:
    redis_url, database_url = good
    (tmp_path / "text.db").write_text("not a database at all" * 100)
    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "idle", "on", f">{PASSWORD}", "-@all", "+@connection")
    values = {
        "redis": redis_url,
        "server": redis_url.removeprefix("redis://"),
        "database": database_url,
        "postgres": make_url(database_url).port,
        "directory": tmp_path,
        "silent": silent,
        "free": free_port(),
    }
    of_redis, of_database = SITUATIONS[situation]
    return of_redis.format(**values), of_database and of_database.format(**values)


# -- what is called --

CALLS: Final[dict[str, Callable[[Any], Any]]] = {
    "enqueue": lambda client: client.enqueue(REQUEST),
    "follow": lambda client: client.follow("job-1", timeout=0.5, not_found_after=0),
    "cancel": lambda client: client.cancel("job-1"),
    "get": lambda client: client.get("job-1"),
    "list": lambda client: client.list(),
    "wait": lambda client: client.wait("job-1", timeout=0.5, not_found_after=0),
    "retry": lambda client: client.retry("job-1"),
    "waiting_for": lambda client: client.waiting_for("job-1"),
    "follow_raw": lambda client: client.follow_raw("job-1", timeout=0.5, not_found_after=0),
    "check_follow": lambda client: client.check_follow("job-1"),
    "delete": lambda client: client.delete("job-1"),
    "last_numbered": lambda client: client.last_numbered("job"),
}


def sync_outcome(client: Client, call: Callable[[Any], Any]) -> Any:
    """Return what a call gave or raised."""
    try:
        answer = call(client)
        return list(answer) if hasattr(answer, "__next__") else answer
    except Exception as error:  # noqa: BLE001
        return error


async def async_outcome(client: AsyncClient, call: Callable[[Any], Any]) -> Any:
    try:
        answer = call(client)
        return [event async for event in answer] if hasattr(answer, "__anext__") else await answer
    except Exception as error:  # noqa: BLE001
        return error


async def outcomes_of_sync(urls: Urls) -> dict[str, Any]:
    with Client(urls[0], database_url=urls[1]) as client, ThreadPoolExecutor(len(CALLS)) as threads:
        return dict(zip(CALLS, threads.map(lambda call: sync_outcome(client, call), CALLS.values()), strict=True))


async def outcomes_of_async(urls: Urls) -> dict[str, Any]:
    async with AsyncClient(urls[0], database_url=urls[1]) as client:
        found = await asyncio.gather(*(async_outcome(client, call) for call in CALLS.values()))
        return dict(zip(CALLS, found, strict=True))


def check_ours(outcomes: dict[str, Any]) -> None:
    errors = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, BaseException)}
    for name, error in errors.items():
        assert isinstance(error, KeepstreamError), f"{name}: {error!r}"
        assert not isinstance(error, UnexpectedError), f"{name}: {error.__cause__!r}"
        assert str(error), name
        assert PASSWORD not in str(error)
        assert "secret" not in str(error)


def test_the_calls_are_all_that_there_are() -> None:
    methods = {name for name in dir(Client) if not name.startswith("_") and callable(getattr(Client, name))}
    hooks = {"before_fork", "after_fork_in_parent", "after_fork_in_child"}
    assert methods - hooks - {"close", "from_env", "for_tenant"} == CALLS.keys()


FORMS = pytest.mark.parametrize("outcomes", [outcomes_of_sync, outcomes_of_async], ids=["sync", "async"])


@pytest.mark.slow
@FORMS
async def test_an_error_is_ours_whatever_is_wrong(
    situation: str, urls: Urls, outcomes: Callable[[Urls], Awaitable[dict[str, Any]]]
) -> None:
    found = await outcomes(urls)
    check_ours(found)
    if urls[1] is None:
        assert isinstance(found["enqueue"], BrokerUnavailableError)
        assert isinstance(found["cancel"], BrokerUnavailableError)
        assert isinstance(found["get"], NotConfiguredError)
    elif situation.startswith("Redis") or situation == "all is well":
        assert isinstance(found["enqueue"], str), "the job is stored, so it is accepted"
    else:
        assert isinstance(found["enqueue"], StoreUnavailableError)


@FORMS
async def test_a_closed_client_says_so(
    redis_url: str, tmp_path: Path, outcomes: Callable[[Urls], Awaitable[dict[str, Any]]]
) -> None:
    urls = redis_url, sqlite_url(tmp_path / "db")
    closed: Any
    if outcomes is outcomes_of_sync:
        closed = Client(urls[0], database_url=urls[1])
        closed.close()
        closed.close()  # may be repeated
        found = {name: sync_outcome(closed, call) for name, call in CALLS.items()}
    else:
        closed = AsyncClient(urls[0], database_url=urls[1])
        await closed.close()
        await closed.close()
        found = {name: await async_outcome(closed, call) for name, call in CALLS.items()}
    for name, error in found.items():
        assert isinstance(error, ClientClosedError), f"{name}: {error!r}"


# -- arguments --

WRONG: Final[list[Callable[[Any], Any]]] = [
    lambda client: client.enqueue(None),
    lambda client: client.enqueue(5),
    lambda client: client.enqueue({}),
    lambda client: client.enqueue(model=1, messages=[]),
    lambda client: client.enqueue(REQUEST, metadata=5),
    lambda client: client.enqueue(REQUEST, metadata={1: 2}),
    lambda client: client.enqueue(REQUEST, metadata={"a": object()}),
    lambda client: client.enqueue({"model": object(), "messages": object()}),
    lambda client: client.enqueue(REQUEST | {"x": object()}),
    lambda client: client.enqueue(REQUEST, expires_at="tomorrow"),
    lambda client: client.follow(5),
    lambda client: client.follow(None),
    lambda client: client.follow(""),
    lambda client: client.follow("job-1", 5),
    lambda client: client.follow("job-1", b"1-1"),
    lambda client: client.follow("job-1", "first"),
    lambda client: client.follow("job-1", timeout="1"),
    lambda client: client.follow("job-1", timeout=None),
    lambda client: client.follow("job-1", timeout=-1),
    lambda client: client.follow("job-1", timeout=float("nan")),
    lambda client: client.follow("job-1", not_found_after="1"),
    lambda client: client.cancel(None),
    lambda client: client.cancel(b"job-1"),
    lambda client: client.cancel(""),
    lambda client: client.get(None),
    lambda client: client.get(5),
    lambda client: client.get(b"job-1"),
    lambda client: client.list(status="compelted"),
    lambda client: client.list(status=5),
    lambda client: client.list(status=["completed", "compelted"]),
    lambda client: client.list(status=""),
    lambda client: client.list(model=5),
    lambda client: client.list(provider=b"groq"),
    lambda client: client.list(metadata="user"),
    lambda client: client.list(metadata={5: "x"}),
    lambda client: client.list(since="yesterday"),
    lambda client: client.list(until=datetime(2030, 1, 1)),  # noqa: DTZ001  # without its time zone
    lambda client: client.list(before=5),
    lambda client: client.list(limit=0),
    lambda client: client.list(limit=-1),
    lambda client: client.list(limit="10"),
    lambda client: client.list(limit=1.5),
    lambda client: client.list(limit=10**30),
    lambda client: client.wait(None),
    lambda client: client.wait("job-1", timeout="1"),
    lambda client: client.wait("job-1", not_found_after=None),
    lambda client: client.retry(None),
    lambda client: client.waiting_for(5),
]


async def test_an_argument_that_cannot_be_used_is_an_error_of_ours(good: tuple[str, str]) -> None:
    redis_url, database_url = good
    with Client(redis_url, database_url=database_url) as client:
        sync = [sync_outcome(client, call) for call in WRONG]
    async with AsyncClient(redis_url, database_url=database_url) as async_client:
        answers = [await async_outcome(async_client, call) for call in WRONG]
    for call, one, other in zip(WRONG, sync, answers, strict=True):
        where = f"line {call.__code__.co_firstlineno}"
        assert isinstance(one, KeepstreamError), f"{where}: {one!r}"
        assert not isinstance(one, UnexpectedError), f"{where}: {one.__cause__!r}"
        assert (type(one), str(one)) == (type(other), str(other)), where
        assert "secret" not in str(one)


def test_a_misspelt_status_is_answered_with_the_right_one(redis_url: str, tmp_path: Path) -> None:
    with Client(redis_url, database_url=sqlite_url(tmp_path / "db")) as client:
        with pytest.raises(InvalidArgumentError, match="did you mean 'completed'"):
            client.list(status="compelted")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="there are queued, running"):
            client.list(status="x")  # type: ignore[arg-type]


# -- after the commit --


class FaultError(Exception):
    """Something that nobody foresaw."""


@pytest.mark.parametrize(
    "fault",
    [FaultError(), RuntimeError("can't start new thread"), MemoryError(), UnicodeError("label too long"), OSError()],
)
def test_a_stored_job_is_accepted_whatever_happens_to_its_message(
    good: tuple[str, str], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The one place where something of ours is replaced: nothing on the network raises what nobody foresaw."""

    def fail(*_: object) -> None:
        raise fault

    redis_url, database_url = good
    with Client(redis_url, database_url=database_url) as client:
        monkeypatch.setattr(client._sender, "send", fail)
        job_id = client.enqueue(REQUEST)
        stored = client.get(job_id)
        assert stored is not None
        assert stored.status is JobStatus.QUEUED
    with Client(redis_url) as bare:
        monkeypatch.setattr(bare._sender, "send", fail)
        with pytest.raises(UnexpectedError) as caught:
            bare.enqueue(REQUEST)
        assert caught.value.__cause__ is fault


def test_a_job_is_accepted_though_the_database_leaves_right_after(redis_url: str) -> None:
    with PostgresServer() as server:
        engine = create_engine(server.url())
        tables.metadata.create_all(engine)
        engine.dispose()
        with Client(f"redis://127.0.0.1:{free_port()}", database_url=server.url()) as client:
            sender = client._sender.send

            def send(job: dict[str, Any]) -> None:
                server.kill()
                sender(job)

            client._sender.send = send  # type: ignore[method-assign]
            job_id = client.enqueue(REQUEST)
            server.start()
            assert client.get(job_id) is not None


# -- making a client --


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"redis_url": "redis+cluster://h"}, "Cluster"),
        ({"redis_url": "amqp://h"}, "amqp"),
        ({"redis_url": f"redis://{'x' * 64}.example"}, "host"),
        ({"redis_url": "redis://a..b"}, "host"),
        ({"redis_url": 5}, "redis_url"),
        ({"redis_url": None}, "redis_url"),
        ({"redis_url": ""}, "redis_url"),
        ({"redis_url": "redis://h", "broker_url": "amqp://guest:hunter2@h//"}, "broker_url.*amqp"),
        ({"redis_url": "redis://h", "broker_url": "rediss+cluster://h"}, "broker_url.*Cluster"),
        ({"redis_url": "redis://h", "broker_url": "sqs://"}, "broker_url.*sqs"),
        ({"redis_url": "redis://h", "broker_url": 5}, "broker_url"),
        ({"redis_url": "redis://h", "database_url": 5}, "database_url"),
        ({"redis_url": "redis://h", "database_url": "mysql://h/d"}, "database_url"),
        ({"redis_url": "redis://h", "tenant": 5}, "tenant"),
        ({"redis_url": "redis://h", "tenant": "a b"}, "tenant"),
        ({"redis_url": "redis://h", "prefix": 5}, "prefix"),
        ({"redis_url": "redis://h", "prefix": ""}, "prefix"),
        ({"redis_url": "redis://h", "queue": ""}, "queue"),
        ({"redis_url": "redis://h", "queue": None}, "queue"),
    ],
)
def test_a_client_that_cannot_work_is_not_made(client_class: type, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettingError, match=said) as caught:
        client_class(**arguments)
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_closing_a_client_in_use_gives_its_threads_an_error_of_ours_or_their_answer(good: tuple[str, str]) -> None:
    redis_url, database_url = good
    for _ in range(2):
        client = Client(redis_url, database_url=database_url)
        job_id = client.enqueue(REQUEST)

        def use(client: Client, job_id: str) -> Any:
            with contextlib.suppress(ClientClosedError):
                while True:
                    for call in CALLS.values():
                        outcome = sync_outcome(client, call)
                        check_ours({"": outcome})
                        if isinstance(outcome, ClientClosedError):
                            raise outcome
            return None

        with ThreadPoolExecutor(50) as threads:
            users = [threads.submit(use, client, job_id) for _ in range(50)]
            client.list()
            client.close()
            for user in users:
                user.result()
