"""Fixtures of the tests against real servers.

In: the databases of the common fixtures.
Out: engines on migrated databases, as a worker has them.
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from keepstream.client.database import make_engine
from keepstream_worker.store import schema


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database, as a worker sees it."""
    engine = make_engine(database_url, writer=True)
    schema.migrate(engine)
    yield engine
    engine.dispose()
