"""Fixtures that more than one test module uses: real servers, started once, and a clean place on them for each test.

In: requests of tests.  Out: URLs.  Exists so that a test needs to name what it wants and nothing else.
"""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from keepstream_worker.dev_stack.embedded import EmbeddedValkey, sqlite_url
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from tests.services import PostgresServer

# A shell that runs us in the background has Ctrl-C ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """A Valkey server; a test that harms its server starts one of its own."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    """The URL of an empty Redis database."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test that harms its server starts one of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once on each of the databases we support."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "keepstream.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
async def scripted_provider() -> AsyncIterator[ScriptedProvider]:
    """A scripted provider on the test's own event loop."""
    async with ScriptedProvider() as provider:
        yield provider
