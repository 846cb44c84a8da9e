"""The migrations lead to exactly the tables of the contract, on each database."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from alembic import command
from sqlalchemy import Engine, create_engine, select, text

from keepstream.client.database import ClientDatabase, make_engine
from keepstream.errors import StoreUnavailableError
from keepstream.tables import workers
from keepstream_worker.store import schema
from tests.services import PostgresServer


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on an empty database."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def test_migrated_tables_are_the_published_ones(engine: Engine) -> None:
    """If this fails, a migration or a column of the tables is missing."""
    schema.migrate(engine)
    with engine.begin() as connection:
        command.check(schema._config(connection))


def test_a_database_without_tables_is_told_apart_from_a_migrated_one(engine: Engine) -> None:
    with pytest.raises(schema.SchemaError, match="keepstream migrate"):
        schema.check(engine)
    schema.migrate(engine)
    schema.check(engine)


@pytest.mark.parametrize("action", [schema.current, schema.check, schema.migrate])
def test_database_that_does_not_answer_is_one_line_without_the_password(action: Callable[[Engine], Any]) -> None:
    engine = make_engine("postgresql://someone:hunter2@127.0.0.1:1/keepstream")
    with pytest.raises(
        schema.SchemaError, match=r"does not answer \(.*refused.*\); start it, or set KEEPSTREAM_"
    ) as caught:
        action(engine)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sqlite_file_that_is_not_there_is_made_by_a_migration_alone(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/new.db")
    assert schema.current(engine) is None
    with pytest.raises(schema.SchemaError, match=r"does not exist .*; run `keepstream migrate`, or set KEEPSTREAM_DAT"):
        schema.check(engine)
    database = ClientDatabase(f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(StoreUnavailableError, match="does not exist"), database.transaction():
        pass
    assert list(tmp_path.iterdir()) == []
    schema.migrate(engine)
    schema.check(engine)
    with database.transaction() as connection:
        connection.exec_driver_sql("SELECT * FROM keepstream_jobs")
    database.close()
    engine.dispose()


def test_sqlite_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/nowhere/keepstream.db")
    with pytest.raises(schema.SchemaError, match=r"cannot be created \(No such .*a file that can be written"):
        schema.migrate(engine)


@pytest.fixture
def powerless(postgres_url: str) -> Iterator[Engine]:
    """An engine whose user may connect and look, and nothing else."""
    role = f"powerless_{postgres_url.rpartition('/')[2]}"
    execute(postgres_url, f"CREATE ROLE {role} LOGIN")
    engine = make_engine(postgres_url.replace("postgres@", f"{role}@"))
    yield engine
    engine.dispose()


def execute(url: str, *statements: str) -> None:
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    connection.engine.dispose()


def test_user_that_may_not_create_tables_is_told_which_right_is_missing(powerless: Engine) -> None:
    with pytest.raises(
        schema.SchemaError, match=r"lacks a right \(.*permission denied for schema public.*\); grant it"
    ):
        schema.migrate(powerless)


def test_user_that_may_not_read_the_version_is_told_which_right_is_missing(
    postgres_url: str, powerless: Engine
) -> None:
    engine = make_engine(postgres_url)
    schema.migrate(engine)
    engine.dispose()
    with pytest.raises(schema.SchemaError, match=r"lacks a right \(.*permission denied for table keepstream_version"):
        schema.check(powerless)


def test_a_database_that_can_be_written_is_left_as_it_was(engine: Engine) -> None:
    schema.migrate(engine)
    schema.check_writing(engine)
    with engine.begin() as connection:
        assert connection.execute(select(workers.c.id)).all() == []


def test_user_that_may_not_write_is_told_which_right_is_missing(postgres_url: str, powerless: Engine) -> None:
    engine = make_engine(postgres_url)
    schema.migrate(engine)
    engine.dispose()
    with pytest.raises(schema.SchemaError, match=r"lacks a right \(.*denied for table keepstream_workers") as caught:
        schema.check_writing(powerless)
    assert not isinstance(caught.value, schema.DatabaseAwayError)


@pytest.mark.parametrize(
    ("check", "option", "reason"),
    [
        (schema.check_writing, "default_transaction_read_only=on", "ReadOnlySqlTransaction"),
        (schema.check_writing, "lock_timeout=100", "LockNotAvailable"),
        (schema.check, "lock_timeout=100", "LockNotAvailable"),
        (schema.check, "statement_timeout=100", "QueryCanceled"),
    ],
)
def test_what_keeps_a_database_from_its_work_may_pass(
    postgres_url: str, check: Callable[[Engine], None], option: str, reason: str
) -> None:
    engine, harmed = make_engine(postgres_url), make_engine(f"{postgres_url}?options=-c{quote(option)}")
    schema.migrate(engine)
    with engine.begin() as connection:
        if "timeout" in option:
            connection.execute(text("LOCK TABLE keepstream_workers, keepstream_version"))
        with pytest.raises(schema.DatabaseAwayError, match=rf"does not do its work now \({reason}"):
            check(harmed)
    for used in (engine, harmed):
        used.dispose()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
@pytest.mark.parametrize("action", [schema.current, schema.check, schema.migrate])
def test_database_that_cannot_hold_every_text_is_refused(
    postgres: PostgresServer, encoding: str, action: Callable[[Engine], Any]
) -> None:
    name = f"encoded_{encoding.lower()}"
    locale = "LC_COLLATE 'C' LC_CTYPE 'C'"
    execute(
        postgres.url(), f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy ENCODING '{encoding}' {locale}"
    )
    engine = make_engine(postgres.url(name))
    try:
        with pytest.raises(schema.SchemaError, match=f"encoding is {encoding}, .*; create it with ENCODING 'UTF8'"):
            action(engine)
    finally:
        engine.dispose()
        postgres.drop_database(name)


def test_migrating_again_changes_nothing(engine: Engine) -> None:
    assert schema.migrate(engine) == schema.migrate(engine) == schema.current(engine)
