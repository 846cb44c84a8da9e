"""The schema: brings a database to the tables this version needs, and tells whether it has them.

In: an engine.  Out: migrated tables, or a clear line.  Exists so that Alembic is met in one place.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

import keepstream_worker


class SchemaError(Exception):
    """The database does not answer or has not got our tables; the message says what to do."""


def _migrations() -> Path:
    """Where the migrations are: inside the installed package, or beside it in a checkout."""
    package = Path(keepstream_worker.__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parents[1] / "migrations"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("path_separator", "os")
    return config


def head() -> str:
    """Return the revision this version needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def current(engine: Engine) -> str | None:
    """Return the database's revision, or None if it was never migrated.

    Raises:
        SchemaError: the database does not answer.
    """
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        raise SchemaError(
            f"the database does not answer ({type(getattr(error, 'orig', None) or error).__name__}); "
            "start it, or set KEEPSTREAM_DATABASE_URL to where it is"
        ) from None


def check(engine: Engine) -> None:
    """Raise ``SchemaError`` unless the database has the tables of this version, or newer ones."""
    revision = current(engine)
    if revision is None:
        raise SchemaError("the database has no Keepstream tables yet: run `keepstream migrate`")
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    # A revision we do not know is a newer one; migrations are additive, so the old code goes on working.
    if revision in known and revision != head():
        raise SchemaError("the database's tables are of an older version: run `keepstream migrate`")


def migrate(engine: Engine) -> str:
    """Bring the database up to date; returns the revision reached.

    Raises:
        SchemaError: the database does not answer or refuses the change.
    """
    config = _config()
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise SchemaError(f"the database could not be migrated ({type(cause).__name__})") from None
    return head()
