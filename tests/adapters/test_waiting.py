"""Who waits is told what for; and what else a client does with jobs that wait or have ended: wait, retry, cancel."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from sqlalchemy import Engine, create_engine, event, func, insert, select

from keepstream import AsyncClient, Client, WaitingFor, names, tables
from keepstream.client import overview
from keepstream.client.listing import list_all_jobs, list_jobs
from keepstream.errors import (
    FollowTimeoutError,
    InvalidSettingError,
    JobNotFoundError,
    JobStateError,
    NotConfiguredError,
)
from keepstream.results import CompletionResult, JobStatus
from keepstream.tables import now, seconds_from_now, turns, workers
from keepstream_worker.dev_stack.embedded import EmbeddedValkey, free_port
from keepstream_worker.scheduling.gates import Closed
from tests import stored_jobs
from tests.cluster import PATIENCE
from tests.redis_servers import HANDSHAKES_BREAK, Certificates, RedisTls

MESSAGES = [{"role": "user", "content": "Hello"}]
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def client(redis_url: str, database_url: str, engine: Engine) -> Iterator[Client]:
    with Client(redis_url, database_url=database_url) as client:
        yield client


@pytest.fixture
def away(database_url: str, engine: Engine) -> Iterator[Client]:
    """A client whose Redis is away."""
    with Client(NOWHERE, database_url=database_url) as client:
        yield client


def end(engine: Engine, job_id: str, status: str = "completed", **values: Any) -> None:
    with engine.begin() as connection:
        stored_jobs.finish(connection, job_id, JobStatus(status))
        if values:
            stored_jobs.change(connection, job_id, **values)


def run(engine: Engine, job_id: str, worker_id: str = "w") -> None:
    with engine.begin() as connection:
        stored_jobs.start(connection, job_id, worker_id=worker_id)


def pause(engine: Engine, job_id: str, seconds: float) -> None:
    """Let a job wait for its next attempt."""
    run(engine, job_id)
    with engine.begin() as connection:
        stored_jobs.pause(connection, job_id, seconds=seconds)


def close(engine: Engine, closed: dict[str, Any]) -> None:
    """Let the newest turn have found something closed."""
    with engine.begin() as connection:
        newest = connection.scalar(select(func.max(turns.c.n))) or 0
        values = {"n": newest + 1, "arrivals_low": 0, "ready": "{}", "closed": json.dumps(closed), "state": "{}"}
        connection.execute(insert(turns).values(values))


def row(engine: Engine, job_id: str) -> Any:
    with engine.begin() as connection:
        return stored_jobs.row(connection, job_id)


def request_of(engine: Engine, job_id: str) -> Any:
    """Return a job's JSON as it was enqueued."""
    with engine.begin() as connection:
        return stored_jobs.stored_job(connection, job_id).to_wire()


def work(
    engine: Engine,
    worker: str = "w",
    silent_for: float = 0.0,
    queue: str = names.QUEUE,
    running: int = 0,
    providers: list[str] | None = None,
) -> None:
    """Let there be a worker with three places."""
    values = {"lease": 30.0, "queue": queue, "places": 3, "running": running, "providers": providers}
    with engine.begin() as connection:
        connection.execute(
            insert(workers).values(id=worker, started_at=now(), heartbeat_at=seconds_from_now(-silent_for), **values)
        )


def enqueue(client: Client, **fields: Any) -> str:
    return client.enqueue(model="m", messages=MESSAGES, **fields)


# -- what a job waits for --


def test_a_job_waits_for_a_worker_of_its_queue_that_is_alive(client: Client, engine: Engine) -> None:
    work(engine, "of another queue", queue="other")
    work(engine, "dead", silent_for=60)
    job_id = enqueue(client)
    reason = client.waiting_for(job_id)
    assert reason == WaitingFor(cause="worker", text="a worker: none is alive for the queue 'completions'")
    assert not reason.passes
    stored = client.get(job_id)
    assert stored is not None
    assert stored.waiting_for == reason
    assert [job.waiting_for for job in client.list()] == [reason]


def test_a_job_waits_for_a_free_place(client: Client, engine: Engine) -> None:
    work(engine, "w1", running=3)
    work(engine, "w2", running=4)
    ids = [enqueue(client) for _ in range(3)]
    reason = client.waiting_for(ids[0])
    assert reason is not None
    assert (reason.cause, reason.passes) == ("place", True)
    assert reason.text == "a free place: all 2 workers are busy, and 3 jobs wait"


def test_a_job_waits_for_a_worker_that_has_its_provider(client: Client, engine: Engine) -> None:
    work(engine, "one", providers=["default"])
    job_id = enqueue(client, provider="other")
    text = "a worker that has the provider 'other': none that is alive does"
    assert client.waiting_for(job_id) == WaitingFor(cause="worker", text=text)
    work(engine, "two", providers=["other", "default"], running=3)
    reason = client.waiting_for(job_id)
    assert reason is not None
    assert reason.cause == "place", "the worker with places is not asked"
    work(engine, "of another version")
    assert client.waiting_for(job_id) == WaitingFor(cause="pickup", text="a worker to take it")


def test_a_backlog_is_not_counted_to_its_end(client: Client, engine: Engine) -> None:
    work(engine, running=3)
    ids = [enqueue(client) for _ in range(102)]
    assert "more than 100 jobs wait" in str(client.waiting_for(ids[-1]))


def test_a_job_waits_for_its_next_attempt(client: Client, engine: Engine) -> None:
    work(engine)
    job_id = enqueue(client)
    pause(engine, job_id, 3600.0)
    reason = client.waiting_for(job_id)
    assert reason is not None
    assert reason.cause == "retry"
    assert re.fullmatch(r"its next attempt, due at \d\d:\d\d:\d\d UTC", reason.text)


def test_a_job_whose_worker_died_waits_for_another(client: Client, engine: Engine) -> None:
    work(engine, "dead", silent_for=60)
    job_id = enqueue(client)
    run(engine, job_id, "dead")
    assert str(client.waiting_for(job_id)) == "another worker to take it over: its own gives no sign of life"


# -- what the newest turn has found closed --

FULL = {"why": "concurrency", "running": 200, "most": 200}
LATER = 4_102_444_805.0  # seconds since the epoch: 2100-01-01 00:00:05 UTC
COOLING = {"why": "cooling", "until": LATER}
BROKEN = {"why": "broken", "until": LATER}
FALLBACKS = {"provider": "a", "fallbacks": [{"provider": "b", "model": "n"}]}


@pytest.mark.parametrize(
    ("closed", "cause", "text"),
    [
        ({"a": FULL}, "concurrency", "provider a: 200 of 200 streams"),
        ({"a/m": FULL}, "concurrency", "a/m: 200 of 200 streams"),
        (
            {"a": {"why": "tokens_per_minute", "until": LATER}},
            "tokens_per_minute",
            "provider a: tokens per minute; next at 00:00:05 UTC",
        ),
        ({"a/m": {"why": "requests_per_minute"}}, "requests_per_minute", "a/m: requests per minute"),
        ({"a/m": COOLING}, "cooling", "a/m: cool-down until 00:00:05 UTC"),
        ({"a/m": COOLING | {"until": None}}, "cooling", "a/m: cool-down"),
        ({"a/m": COOLING, "b": FULL}, "concurrency", "provider b: 200 of 200 streams"),
        # All targets are closed: the one that opens soonest, the first of those that open together.
        ({"a/m": BROKEN, "b/n": COOLING}, "broken", "a/m: broken; next try at 00:00:05 UTC"),
        ({"a/m": BROKEN | {"until": LATER + 1}, "b/n": COOLING}, "cooling", "b/n: cool-down until 00:00:05 UTC"),
        ({"a/m": COOLING, "b/n": BROKEN | {"until": LATER + 1}}, "cooling", "a/m: cool-down until 00:00:05 UTC"),
        (
            {"a/m": {"why": "probing", "until": None}, "b": BROKEN},
            "broken",
            "provider b: broken; next try at 00:00:05 UTC",
        ),
        ({"a/m": {"why": "probing", "until": None}}, "broken", "a/m: broken; one job is trying it"),
    ],
)
def test_a_job_waits_for_what_is_closed(
    client: Client, engine: Engine, closed: dict[str, Any], cause: str, text: str
) -> None:
    work(engine)
    job_id = enqueue(client, **FALLBACKS)
    assert str(client.waiting_for(job_id)) == "a worker to take it"
    close(engine, closed)
    reason = client.waiting_for(job_id)
    assert reason == WaitingFor(cause=cause, text=text)
    assert reason.passes is (cause != "broken")
    assert [job.waiting_for for job in client.list()] == [reason]


@pytest.mark.parametrize(
    "closed",
    [
        {"a/m": COOLING | {"until": 1.0}},  # that was long ago
        {"b": FULL, "a/other": FULL},  # not its own target
        {"tenant:somebody else": {"why": "tenant", "running": 1, "most": 1}},
        {},
    ],
)
def test_what_is_closed_for_others_is_no_reason(client: Client, engine: Engine, closed: dict[str, Any]) -> None:
    work(engine)
    job_id = enqueue(client, **FALLBACKS)
    close(engine, {"a": FULL})
    close(engine, closed)  # the newest turn counts
    assert str(client.waiting_for(job_id)) == "a worker to take it"


def test_a_job_of_a_tenant_at_its_limit_waits_for_the_tenants_own_jobs(client: Client, engine: Engine) -> None:
    work(engine, running=3)
    job_id = enqueue(client)
    close(engine, {"tenant:default": {"why": "tenant", "running": 2, "most": 2}})
    assert client.waiting_for(job_id) == WaitingFor(cause="tenant", text="tenant default: 2 of 2 at once")


def test_what_a_turn_finds_closed_is_what_a_waiting_job_is_told(client: Client, engine: Engine) -> None:
    """The words of the turn are those that are read here."""
    work(engine)
    job_id = enqueue(client)
    for key, shut in {
        "default": Closed("default", "concurrency", None, 5, 5),
        "default/m": Closed("default/m", "broken", LATER),
    }.items():
        close(engine, {key: shut.as_json()})
        reason = client.waiting_for(job_id)
        assert reason is not None
        assert reason.cause == shut.why


def test_a_page_of_waiting_jobs_costs_as_many_statements_as_one_job(client: Client, engine: Engine) -> None:
    work(engine)
    close(engine, {"a": FULL})
    ids = [enqueue(client, provider=provider) for provider in ("a", "b") * 25]
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    def cost(limit: int) -> int:
        del statements[:]
        with engine.begin() as connection:
            assert len(list_jobs(connection, "default", limit=limit)) == limit
        return len(statements)

    event.listen(engine, "before_cursor_execute", note)
    assert cost(50) == cost(1) <= 10
    assert len(ids) == 50


# -- who tells it --


def no_worker(engine: Engine) -> None:
    work(engine, queue="other")


def no_worker_with_the_provider(engine: Engine) -> None:
    work(engine, providers=["default"])


def only_others_have_places(engine: Engine) -> None:
    work(engine, "w1", providers=["a"], running=3)
    work(engine, "w2", providers=["default"])


def all_are_busy(engine: Engine) -> None:
    work(engine, running=3)


def a_provider_rests(engine: Engine) -> None:
    work(engine)
    close(engine, {"a": FULL})


def nothing_is_in_the_way(engine: Engine) -> None:
    work(engine)


@pytest.mark.parametrize(
    "surround",
    [
        no_worker,
        no_worker_with_the_provider,
        only_others_have_places,
        all_are_busy,
        a_provider_rests,
        nothing_is_in_the_way,
    ],
)
def test_who_counts_what_waits_says_the_same_as_who_looks_at_one_job(
    client: Client, engine: Engine, surround: Callable[[Engine], None]
) -> None:
    surround(engine)
    ids = [enqueue(client, provider="a") for _ in range(3)]
    pause(engine, ids[0], seconds=0.3)  # it is due: as good as now
    for job_id in ids:
        stored = client.get(job_id)
        assert stored is not None
        assert stored.waiting_for is not None
        with engine.begin() as connection:
            counted = overview.what_waits(overview.look(connection))
            listed, _ = list_all_jobs(connection)
        assert [each.why for each in counted] == [stored.waiting_for]
        assert [each.jobs for each in counted] == [3]
        assert {job.waiting_for for job in [*listed, *client.list()]} == {stored.waiting_for}


def test_jobs_that_are_not_due_and_jobs_whose_worker_is_gone_are_counted_apart(client: Client, engine: Engine) -> None:
    work(engine)
    work(engine, "dead", silent_for=60)
    new, later, lost, runs = (enqueue(client) for _ in range(4))
    pause(engine, later, seconds=3600)
    run(engine, lost, "dead")
    run(engine, runs)
    with engine.begin() as connection:
        seen = overview.look(connection)
    found = {(each.why.cause, each.jobs) for each in overview.what_waits(seen)}
    stored = [client.get(job_id) for job_id in (new, later, lost, runs)]
    causes = [job and job.waiting_for and job.waiting_for.cause for job in stored]
    assert causes == ["pickup", "retry", "worker", None]
    assert found == {("pickup", 1), ("retry", 1), ("worker", 1)}
    assert sum(seen.running.values()) == 2


# -- what runs --


def test_a_job_that_runs_or_has_ended_waits_for_nothing(client: Client, engine: Engine) -> None:
    work(engine)
    job_id = enqueue(client)
    assert str(client.waiting_for(job_id)) == "a worker to take it"
    with engine.begin() as connection:
        stored_jobs.take(connection, job_id)
    assert client.waiting_for(job_id) is None  # a turn has chosen it; its attempt is about to begin
    with engine.begin() as connection:
        stored_jobs.change(connection, job_id, status="running", attempt=1)
    assert client.waiting_for(job_id) is None
    end(engine, job_id)
    assert client.waiting_for(job_id) is None


def test_a_job_waits_for_redis_and_for_the_database(client: Client, away: Client, engine: Engine) -> None:
    work(engine)
    reason = away.waiting_for(enqueue(client))
    assert reason == WaitingFor(cause="redis", text="Redis: it does not answer (Connection refused)")
    with Client(NOWHERE, database_url="postgresql://u:hunter2@127.0.0.1:1/x") as lost:
        reason = lost.waiting_for("x")
    assert reason is not None
    assert reason.cause == "database"
    assert "hunter2" not in reason.text


def test_what_an_unknown_job_waits_for_is_not_known(client: Client) -> None:
    with pytest.raises(JobNotFoundError):
        client.waiting_for("nope")
    with Client(NOWHERE) as bare, pytest.raises(NotConfiguredError):
        bare.waiting_for("nope")


# -- followers are told --


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "keepstream"]


def test_a_follower_without_a_worker_is_told_once_and_in_the_end(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = enqueue(client)
    with pytest.raises(FollowTimeoutError, match="it waits for a worker: none is alive"):
        next(client.follow(job_id, timeout=0.5))
    assert told(caplog) == [("WARNING", f"job {job_id} waits for a worker: none is alive for the queue 'completions'")]


async def test_an_async_follower_is_told_as_well(
    redis_url: str, database_url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncClient(redis_url, database_url=database_url) as client:
        job_id = await client.enqueue(model="m", messages=MESSAGES)
        with pytest.raises(FollowTimeoutError, match="none is alive"):
            await anext(client.follow(job_id, timeout=0.5))
    assert len(told(caplog)) == 1


@pytest.mark.slow
def test_a_follower_of_a_job_whose_workers_are_busy_is_told_after_some_seconds(
    client: Client, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    work(engine, running=3)
    with pytest.raises(FollowTimeoutError, match="the only worker is busy, and 1 job waits"):
        next(client.follow(enqueue(client), timeout=4))
    assert [level for level, _ in told(caplog)] == ["INFO"]


def test_a_follower_is_told_what_redis_answers(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as admin, Client(server.url) as client:
        admin.replicaof("127.0.0.1", str(free_port()))
        admin.config_set("replica-serve-stale-data", "no")
        with pytest.raises(FollowTimeoutError, match=r"waits for Redis: it answers with an error \(MasterDownError"):
            next(client.follow("some-job", timeout=1))
    assert "MasterDownError" in told(caplog)[0][1]


@pytest.mark.parametrize("timeout", [0.5, 600])
@pytest.mark.parametrize("redis_is_there", [True, False])
def test_an_unknown_job_is_not_found_even_if_redis_is_away(
    client: Client,
    away: Client,
    timeout: float,
    redis_is_there: bool,  # noqa: FBT001
) -> None:
    with pytest.raises(JobNotFoundError):
        next((client if redis_is_there else away).follow("nope", timeout=timeout, not_found_after=0.6))


@HANDSHAKES_BREAK
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_certificate_that_is_not_trusted_is_an_error_at_once(
    kind: type[Client | AsyncClient], redis_url: str, tmp_path: Path
) -> None:
    context = Certificates(tmp_path).server_context("localhost")
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    with RedisTls(port, context) as server:
        check_is_an_error(kind, server.url(), "certificate is not trusted.*ssl_ca_certs")


@HANDSHAKES_BREAK
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_certificate_of_another_host_is_an_error_at_once(
    kind: type[Client | AsyncClient], redis_url: str, tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    with RedisTls(port, certificates.server_context("elsewhere.example")) as server:
        url = server.url(ssl_ca_certs=str(certificates.authority_file))
        check_is_an_error(kind, url, "certificate is not trusted.*localhost")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_server_without_tls_is_an_error_at_once(kind: type[Client | AsyncClient], redis_url: str) -> None:
    # A server that answers the greeting of TLS with something else; Redis itself just closes the connection.
    with PlainServer() as listener:
        check_is_an_error(kind, f"rediss://localhost:{listener.port}", "does not speak TLS")


class PlainServer:
    """Answers whatever is sent with a line of text."""

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the wait for a connection
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.recv(1024)
                    connection.sendall(b"-ERR unknown command\r\n")


def check_is_an_error(kind: type[Client | AsyncClient], url: str, said: str) -> None:
    began = time.monotonic()
    if kind is Client:
        with Client(url) as client, pytest.raises(InvalidSettingError, match=said):
            next(client.follow("some-job"))
    else:

        async def follow() -> None:
            async with AsyncClient(url) as client:
                await anext(client.follow("some-job"))

        with pytest.raises(InvalidSettingError, match=said):
            asyncio.run(follow())
    assert time.monotonic() - began < PATIENCE  # not the follower's ten minutes


# -- wait --


def test_waiting_ends_with_the_result(client: Client, engine: Engine) -> None:
    job_id = enqueue(client)
    results: list[CompletionResult] = []
    waiting = threading.Thread(target=lambda: results.append(client.wait(job_id, timeout=PATIENCE)))
    waiting.start()
    end(engine, job_id)
    waiting.join(PATIENCE)
    assert [result.status for result in results] == [JobStatus.COMPLETED]
    assert client.wait(job_id, timeout=0.1).id == job_id  # again, and at once


def test_waiting_needs_no_redis(client: Client, away: Client, engine: Engine) -> None:
    job_id = enqueue(client)
    threading.Timer(0.3, end, (engine, job_id)).start()
    assert away.wait(job_id, timeout=PATIENCE).status is JobStatus.COMPLETED


def test_waiting_has_an_end_of_its_own(client: Client) -> None:
    with pytest.raises(FollowTimeoutError, match=r"did not end within 0.3 s; it waits for a worker"):
        client.wait(enqueue(client), timeout=0.3)
    with pytest.raises(JobNotFoundError):
        client.wait("nope", not_found_after=0)
    with Client(NOWHERE) as bare, pytest.raises(NotConfiguredError):
        bare.wait("nope")


async def test_the_async_client_waits_and_retries_too(redis_url: str, database_url: str, engine: Engine) -> None:
    async with AsyncClient(redis_url, database_url=database_url) as client:
        job_id = await client.enqueue(model="m", messages=MESSAGES)
        reason = await client.waiting_for(job_id)
        assert reason is not None
        assert reason.cause == "worker"
        waiting = asyncio.create_task(client.wait(job_id, timeout=PATIENCE))
        await asyncio.to_thread(end, engine, job_id, "failed")
        assert (await waiting).status is JobStatus.FAILED
        again = await client.get(await client.retry(job_id))
    assert again is not None
    assert (again.retry_of, again.status) == (job_id, JobStatus.QUEUED)


# -- get and retry --


def test_get_returns_the_request_as_it_was_enqueued(client: Client) -> None:
    request = {"model": "m", "messages": MESSAGES, "temperature": 0.2, "metadata": {"theirs": 1}}
    stored = client.get(client.enqueue(request, metadata={"ours": 1}))
    assert stored is not None
    assert (stored.request, stored.metadata) == (request, {"ours": 1})


@pytest.mark.parametrize("status", ["failed", "cancelled", "expired"])
def test_an_ended_job_is_run_again_as_a_new_one(client: Client, engine: Engine, redis_url: str, status: str) -> None:
    limits = {"max_attempts": 2, "total_timeout": 9.0, "metadata": {"a": 1}}
    job_id = enqueue(client, idempotency_key="k", expires_at="2990-01-01T00:00:00Z", **limits)
    end(engine, job_id, status)
    again = client.retry(job_id)
    assert again not in (job_id, client.retry(job_id))
    stored, original = request_of(engine, again), request_of(engine, job_id)
    assert stored == {name: original[name] for name in original.keys() - {"idempotency_key", "expires_at"}} | {
        "id": again
    }
    new = client.get(again)
    assert new is not None
    assert (new.retry_of, new.status, new.metadata) == (job_id, JobStatus.QUEUED, {"a": 1})
    assert row(engine, job_id).status == status
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.llen(names.QUEUE) == 3


def test_a_completed_job_is_run_again_only_by_force(client: Client, engine: Engine) -> None:
    job_id = enqueue(client)
    end(engine, job_id)
    with pytest.raises(JobStateError, match="use force=True or --force"):
        client.retry(job_id)
    assert client.retry(job_id, force=True) != job_id


def test_what_cannot_be_run_again_says_why(client: Client, engine: Engine) -> None:
    job_id = enqueue(client)
    with pytest.raises(JobStateError, match=r"queued.*cancel it first"):
        client.retry(job_id, force=True)
    end(engine, job_id, "failed", error_code="invalid_job")
    with pytest.raises(JobStateError, match="not valid"):
        client.retry(job_id, force=True)
    with pytest.raises(JobNotFoundError):
        client.retry("nope")


def test_a_job_of_another_queue_is_run_again_there(client: Client, engine: Engine, redis_url: str) -> None:
    job_id = enqueue(client)
    end(engine, job_id, "failed", queue="other")
    again = row(engine, client.retry(job_id))
    assert again.queue == "other"  # whose workers find it in the table
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.llen(names.QUEUE) == 1


# -- cancels leave nothing behind --


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
def test_cancelling_a_job_that_has_ended_leaves_nothing_on_redis(
    client: Client, engine: Engine, redis_url: str, status: str
) -> None:
    job_id = enqueue(client)
    end(engine, job_id, status)
    assert client.cancel(job_id) == status
    with redis.Redis.from_url(redis_url) as connection:
        assert not connection.exists(names.job_keys("default", job_id).cancel)


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_request_that_the_database_has_stays_on_redis_for_a_minute(
    client: Client, engine: Engine, redis_url: str, status: str
) -> None:
    job_id = enqueue(client)
    if status == "running":
        run(engine, job_id)
    client.cancel(job_id)
    with redis.Redis.from_url(redis_url) as connection:
        assert 0 < connection.ttl(names.job_keys("default", job_id).cancel) <= 60


def test_a_request_that_only_redis_has_stays_for_a_day(redis_url: str) -> None:
    with Client(redis_url) as bare, redis.Redis.from_url(redis_url) as connection:
        bare.cancel("some-job")
        assert connection.ttl(names.job_keys("default", "some-job").cancel) > 86_000
