"""The migrations lead to exactly the tables of the contract, on each database."""

from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine

from keepstream.client.database import make_engine
from keepstream.tables import metadata
from keepstream_worker.store import schema


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on an empty database."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def test_migrated_tables_are_the_published_ones(engine: Engine) -> None:
    """If this fails, a migration or a column of the tables is missing."""
    schema.migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_database_without_tables_is_told_apart_from_a_migrated_one(engine: Engine) -> None:
    with pytest.raises(schema.SchemaError, match="keepstream migrate"):
        schema.check(engine)
    schema.migrate(engine)
    schema.check(engine)


def test_migrating_again_changes_nothing(engine: Engine) -> None:
    assert schema.migrate(engine) == schema.migrate(engine) == schema.current(engine)
