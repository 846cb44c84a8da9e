"""Numbered jobs: the last one of a prefix is found by its id, on both databases, whatever else is stored."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from keepstream import Client
from keepstream.client.database import make_engine
from keepstream.errors import InvalidArgumentError, NotConfiguredError
from keepstream.names import numbered_id
from keepstream_worker.dev_stack.embedded import sqlite_url
from keepstream_worker.store import schema
from tests.services import PostgresServer

PREFIX = "chat0123456789abcdef"


@pytest.fixture(params=["sqlite", "postgresql", "postgresql that sorts as people do"])
def sorting_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "keepstream.db")
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    if request.param == "postgresql":
        name = server.create_database()
    else:
        name = "sorted"
        with psycopg.connect(server.url().replace("+psycopg", ""), autocommit=True) as connection:
            try:
                connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")
            except psycopg.errors.FeatureNotSupported:
                pytest.skip("this PostgreSQL is built without ICU; Debian's is not")
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def client(sorting_url: str, redis_url: str) -> Iterator[Client]:
    engine = make_engine(sorting_url)
    schema.migrate(engine)
    engine.dispose()
    with Client(redis_url, database_url=sorting_url) as client:
        yield client


def store(client: Client, *job_ids: str) -> None:
    for job_id in job_ids:
        client.enqueue(
            {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}, id=job_id, metadata={"id": job_id}
        )


def last(client: Client, prefix: str = PREFIX) -> str | None:
    found = client.last_numbered(prefix)
    assert found is None or found.metadata == {"id": found.id}
    return None if found is None else found.id


def test_the_highest_number_is_the_last(client: Client) -> None:
    assert last(client) is None
    store(client, *(numbered_id(PREFIX, number) for number in (0, 9, 10, 2)))
    assert last(client) == numbered_id(PREFIX, 10)
    store(client, numbered_id(PREFIX, 99_999_999))
    assert last(client) == numbered_id(PREFIX, 99_999_999)


def test_other_ids_are_not_taken_for_one(client: Client) -> None:
    """Wherever they sort: some languages pass over signs and capitals."""
    mine = numbered_id(PREFIX, 5)
    store(client, mine)
    store(client, f"{mine}0", f"{mine}-1", PREFIX, f"{PREFIX}9", f"{PREFIX}-9999999", f"{PREFIX}99999999x")
    store(client, numbered_id(PREFIX.upper(), 7), numbered_id(f"{PREFIX[:-1]}e", 9), numbered_id(f"{PREFIX}0", 9))
    assert last(client) == mine


def test_another_tenants_are_not_seen(client: Client) -> None:
    store(client.for_tenant("other"), numbered_id(PREFIX, 8))
    assert last(client) is None
    assert last(client.for_tenant("other")) == numbered_id(PREFIX, 8)


def test_a_prefix_that_sorts_differently_somewhere_is_refused(redis_url: str) -> None:
    with Client(redis_url, database_url="sqlite:///nowhere/keepstream.db") as client:
        for prefix in ("", "A", "a-", "a%", "0a", "ä", "a" * 101):
            with pytest.raises(InvalidArgumentError):
                client.last_numbered(prefix)


def test_a_database_is_needed(redis_url: str) -> None:
    with Client(redis_url) as client, pytest.raises(NotConfiguredError):
        client.last_numbered(PREFIX)
