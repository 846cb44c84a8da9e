"""A request that has been stored is answered, whatever becomes of the servers then, and is stored once."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from starlette.requests import Request

from keepstream import AsyncClient, tables
from keepstream.errors import StoreUnavailableError
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.access.rights import Access
from keepstream_gateway.ai_sdk import routes as ai_sdk
from keepstream_gateway.ai_sdk.chunks import Step
from keepstream_gateway.openai.following import chat_frames, response_frames
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_request import job_fields
from keepstream_gateway.openai.submission import submit
from tests.cluster import PATIENCE, wait_until
from tests.stored_jobs import change, finish, start

BODY = {"model": "m", "input": "Hi", "metadata": {"topic": "rivers"}, "background": True}
ACCESS = Access("default", "key")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
async def client(redis_url: str, database_url: str, engine: Engine) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(redis_url, database_url=database_url) as client:
        yield client


def request(tries: int = 0) -> Request:
    headers = [(b"x-stainless-retry-count", str(tries).encode())]
    return Request({"type": "http", "method": "POST", "path": "/v1/responses", "headers": headers, "query_string": b""})


async def send(client: AsyncClient, tries: int = 0) -> CompletionResult:
    return await submit(client, ACCESS, request(tries), BODY, job_fields(BODY, None))


def holds(prompt: str) -> bool:
    """Whether there is a message with this text."""
    gc.collect()
    lists = (each for each in gc.get_objects() if isinstance(each, list) and each and isinstance(each[0], dict))
    return any(each[0].get("content") == prompt for each in lists)


@pytest.mark.parametrize("shape", ["responses", "chat", "ai_sdk"])
async def test_a_stream_does_not_keep_what_was_asked(client: AsyncClient, shape: str) -> None:
    """A prompt may have megabytes of images, and streams last long."""
    prompt = f"A prompt for {shape}."
    begun = asyncio.Event()

    def begin_of(asked: dict[str, Any]) -> AsyncGenerator[bytes]:
        async def begin() -> CompletionResult:
            found = await client.get(await client.enqueue(asked))
            assert found is not None
            begun.set()
            return found

        async def begin_chat() -> tuple[Step, list[Any]]:
            return Step((await begin()).id, resets=True), []

        if shape == "responses":
            return response_frames(client, begin)
        if shape == "chat":
            return chat_frames(client, begin, with_usage=False)
        return ai_sdk._Answer(client, begin_chat).frames()

    frames = begin_of({"model": "m", "messages": [{"role": "user", "content": prompt}]})
    assert holds(prompt)
    first = asyncio.ensure_future(anext(frames))
    # Whoever looks at all objects keeps them for a moment, and SQLite's cursors are not to outlive their transaction.
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
    await asyncio.to_thread(wait_until, lambda: not holds(prompt), "the request to be let go")
    assert [summary.prompt_start for summary in await client.list()] == [prompt]
    first.cancel()
    await asyncio.wait([first])
    await frames.aclose()


class Forgetful(AsyncClient):
    """A client whose database goes away after it has taken a job."""

    async def get(self, job_id: str) -> CompletionResult | None:
        raise StoreUnavailableError("gone")


async def test_a_job_that_is_stored_and_cannot_be_read_is_answered_all_the_same(
    client: AsyncClient, redis_url: str, database_url: str
) -> None:
    async with Forgetful(redis_url, database_url=database_url) as forgetful:
        told = await send(forgetful)
    stored = await client.get(told.id)
    assert stored is not None

    def shown(job: CompletionResult) -> dict[str, Any]:
        return response_object(job) | {"created_at": 0}

    assert shown(told) == shown(stored)
    assert abs(told.created_at - stored.created_at) < timedelta(minutes=1)


async def test_a_repetition_finds_a_job_that_goes_on_and_one_that_has_just_ended(
    client: AsyncClient, engine: Engine
) -> None:
    first = await send(client)
    with engine.begin() as connection:
        change(connection, first.id, created_at=datetime.now(UTC) - timedelta(minutes=50))
        start(connection, first.id)
    assert (await send(client, tries=1)).id == first.id
    with engine.begin() as connection:
        finish(connection, first.id, JobStatus.COMPLETED)
    assert (await send(client, tries=2)).id == first.id
    with engine.begin() as connection:
        change(connection, first.id, finished_at=datetime.now(UTC) - timedelta(minutes=5))
    assert (await send(client, tries=1)).id != first.id, "that one had its answer long ago"
    assert (await send(client)).id != first.id, "this is no repetition"
