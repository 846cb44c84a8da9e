"""Fixtures of the tests against real servers.

In: the databases of the common fixtures.
Out: engines on migrated databases, as a worker has them; Sentinels.
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from keepstream.client.database import make_engine
from keepstream_worker.store import schema
from tests.redis_servers import SentinelSet


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database, as a worker sees it."""
    engine = make_engine(database_url, writer=True)
    schema.migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelSet]:
    """Sentinels and servers, both with passwords; a test may hand the master over."""
    with SentinelSet(password="server-word", sentinel_password="sentinel-word") as servers:
        yield servers
