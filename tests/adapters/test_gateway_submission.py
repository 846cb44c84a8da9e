"""A request that has been stored is answered, whatever becomes of the servers then, and is stored once."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from starlette.requests import Request

from keepstream import AsyncClient, tables
from keepstream.errors import StoreUnavailableError
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.access.rights import Access
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_request import job_fields
from keepstream_gateway.openai.submission import submit
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
