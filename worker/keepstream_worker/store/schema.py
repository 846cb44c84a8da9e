"""The schema: brings a database to the tables that this version needs, and says whether it has them.

In: an engine, from the command line and the composition root.  Out: migrated tables, a revision, or a
``SchemaError`` of one line.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

import keepstream_worker
from keepstream.client.database import describe_error, missing_file
from keepstream.client.postgresql import explain_failure
from keepstream.tables import VERSION_TABLE, metadata
from keepstream_worker.store.error_answers import state_of
from keepstream_worker.store.heartbeats import Heartbeat, record_heartbeat


class SchemaError(Exception):
    """The database cannot be used as it is; the message is one line and says what to do."""


class DatabaseAwayError(SchemaError):
    """The database cannot be reached now, or cannot be written; waiting may mend it."""


#: SQLSTATEs of PostgreSQL.
_NO_RIGHT: Final = "42501"
_NO_COLUMN: Final = "42703"
#: How the SQLSTATEs, and SQLite's names, of what may pass begin: lost connections, conflicts, locks, a server that is
#: read-only, full or shutting down.
_PASSING: Final = ("08", "25006", "40", "53", "55P03", "57", "58", "SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR")
_NAME_TAKEN: Final = {"42P07", "42710"}  # by a table, index, sequence or view; by a type


def head() -> str:
    """Return the revision this version needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def current(engine: Engine) -> str | None:
    """Return the database's revision, or None if it was never migrated.

    Raises:
        SchemaError: the database does not answer, cannot store every text, or gives us no right to look.
    """
    if missing_file(engine.url) is not None:
        return None
    with _connected(engine) as connection:
        return _revision(connection)


def check(engine: Engine) -> None:
    """Make sure that the database has the tables of this version, or newer ones.

    Raises:
        SchemaError: it has not, or ``current`` would raise.
    """
    with _connected(engine) as connection:
        revision = _revision(connection)
        place = _place(connection)
    if revision is None:
        raise SchemaError(f"{place} has no Keepstream tables yet: run `keepstream migrate`")
    # A revision we do not know is a newer one; migrations are additive, so the old code goes on working.
    if revision in _known_revisions() and revision != head():
        raise SchemaError("the database's tables are of an older version: run `keepstream migrate`")


def check_writing(engine: Engine) -> None:
    """Make sure that a worker can write: it gives a sign of life, which is taken back.

    Raises:
        SchemaError: it cannot; a ``DatabaseAwayError`` if that may pass.
    """
    sign = Heartbeat(uuid.uuid4().hex, lease=0.0, queue="", places=0, running=0)
    try:
        with engine.connect() as connection:  # and no commit
            record_heartbeat(connection, [sign])
    except SQLAlchemyError as error:
        raise _explain(error, connected=True) from None


def migrate(engine: Engine) -> str:
    """Bring the database up to date, wholly or not at all; return the revision reached. SQLite's file is created.

    Raises:
        SchemaError: a name is taken, the tables are newer than this version, the database refuses the change,
            or ``current`` would raise.
    """
    _create_file(engine)
    with _connected(engine) as connection:
        revision = _revision(connection)
        if revision is not None and revision not in _known_revisions():
            raise SchemaError(
                f"the database's tables are at revision {revision}, which this version does not know; "
                "they are of a newer version of Keepstream: use that one"
            )
        command.upgrade(_config(connection), "head")
    return head()


def _create_file(engine: Engine) -> None:
    try:
        if (file := missing_file(engine.url)) is not None:
            file.touch()
    except OSError as error:
        raise SchemaError(
            f"the database cannot be created ({error.strerror or type(error).__name__}); "
            "set KEEPSTREAM_DATABASE_URL to a file that can be written"
        ) from None


def _known_revisions() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config(connection: Connection | None = None) -> Config:
    """Return what Alembic needs to know, with the connection its commands work on."""
    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _migrations() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout."""
    package = Path(keepstream_worker.__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parents[1] / "migrations"


@contextmanager
def _connected(engine: Engine) -> Iterator[Connection]:
    """Give a connection inside a transaction, to a database that we can use."""
    connection = None
    try:
        with engine.begin() as connection:
            _check_encoding(connection)
            yield connection
    except SQLAlchemyError as error:
        # Outside the transaction, which is rolled back by then.
        raise _explain(error, connected=connection is not None) from None


def _check_encoding(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        raise SchemaError(
            f"the database's encoding is {encoding}, which cannot hold every text; "
            "create it with ENCODING 'UTF8' TEMPLATE template0"
        )


def _schema(connection: Connection) -> str | None:
    """Return the PostgreSQL schema in which unqualified tables are created; None on SQLite."""
    if connection.dialect.name != "postgresql":
        return None
    schema: str | None = connection.exec_driver_sql("SELECT current_schema()").scalar()
    if schema is None:
        path = connection.exec_driver_sql("SHOW search_path").scalar()
        raise SchemaError(
            f"the search path '{path}' names no schema that exists and that the user may use; "
            "create one, or grant USAGE on it"
        )
    return schema


def _place(connection: Connection) -> str:
    schema = _schema(connection)
    return "the database" if schema in (None, "public") else f"the schema {schema}"


def _revision(connection: Connection) -> str | None:
    options = {"version_table": VERSION_TABLE, "version_table_schema": _schema(connection)}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _explain(error: SQLAlchemyError, *, connected: bool) -> SchemaError:
    """Say what is wrong and what to do, in one line without values."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    description = describe_error(cause)
    if not connected or (isinstance(error, DBAPIError) and error.connection_invalidated):
        failure = explain_failure(str(cause))
        kind = DatabaseAwayError if failure.passes else SchemaError
        return kind(f"the database {failure.what} ({description}); {failure.advice}")
    if state_of(cause).startswith(_PASSING):
        return DatabaseAwayError(f"the database does not do its work now ({description}); see its log if that lasts")
    return SchemaError(_explain_refusal(cause, description))


def _explain_refusal(cause: BaseException | None, description: str) -> str:
    state = getattr(cause, "sqlstate", None)
    if state == _NO_RIGHT:
        return f"the database's user lacks a right ({description}); grant it, or use a user that has it"
    if state in _NAME_TAKEN or (state is None and "already" in description):
        return _name_taken(_taken_name(description))
    if state == _NO_COLUMN or "no such column" in description:
        return _name_taken(VERSION_TABLE)
    return f"the database refuses ({description}); if that does not pass by itself, see its log"


def _taken_name(description: str) -> str:
    """Find the name in the database's words, which may be in any language."""
    names = [VERSION_TABLE, f"{VERSION_TABLE}_pkc"]
    for table in metadata.sorted_tables:
        names += [table.name, str(table.primary_key.name), *(str(index.name) for index in table.indexes)]
    return max((name for name in names if name in description), key=len, default=description)


def _name_taken(name: str) -> str:
    return (
        f"the database already has a {name} that is not Keepstream's; rename it, or give Keepstream a schema "
        "of its own (postgresql://…?options=-csearch_path%3Dkeepstream), on SQLite a file of its own"
    )
