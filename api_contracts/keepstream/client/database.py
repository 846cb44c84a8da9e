"""The client's way to the database: an engine with time-outs, and transactions with clear errors.

In: a database URL.  Out: connections inside a transaction, to ``keepstream.client.base``; engines to the worker.

A database that is down, slow or not migrated becomes one error that says so and holds no password, no statement
and no values.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, ResourceClosedError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from keepstream.client.forks import PerProcess
from keepstream.client.postgresql import MIGRATE_OR_SET, explain_failure, plan_session
from keepstream.errors import InvalidSettingError, StoreUnavailableError
from keepstream.names import install_hint

_READ_ONLY: Final = "25006"  #: SQLSTATE of a write in a transaction that may only read.
_NOT_MIGRATED: Final = frozenset({"42P01", "42703"})  #: SQLSTATEs of a table and of a column that there is not.
_NOT_MIGRATED_ON_SQLITE: Final = ("OperationalError: no such table", "OperationalError: no such column")
#: Per backend, the one driver that Keepstream uses: time-outs, pragmas and errors are this driver's.
_DRIVERS: Final = {"sqlite": "pysqlite", "postgresql": "psycopg"}


class ClientDatabase:
    """The database of one client. Thread-safe; connects when it is first used, and anew after a fork."""

    def __init__(self, url: str) -> None:
        self._engine = PerProcess(partial(make_engine, url, "keepstream-client"))
        #: Whether it is SQLite, which must not be open across a fork.
        self.is_file = self._engine.get().dialect.name == "sqlite"

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Give a connection whose work is committed at the end, or rolled back by an exception.

        Raises:
            StoreUnavailableError: the database did not answer, or has not got our tables.
        """
        connection = None
        try:
            with self._engine.get().begin() as connection, _no_session_that_only_reads(connection):
                yield connection
        except DBAPIError as error:
            cause = describe_error(error.orig)
            if connection is None:
                failure = explain_failure(str(error.orig))
                raise StoreUnavailableError(f"the database {failure.what} ({cause}); {failure.advice}") from None
            if getattr(error.orig, "sqlstate", None) in _NOT_MIGRATED or cause.startswith(_NOT_MIGRATED_ON_SQLITE):
                what = "has no Keepstream tables, or not those of this version"
                raise StoreUnavailableError(f"the database {what} ({cause}); {MIGRATE_OR_SET}") from None
            raise StoreUnavailableError(f"the database did not do its work: {cause}") from None
        except (PoolTimeoutError, ResourceClosedError):
            raise StoreUnavailableError("no database connection was free in time") from None

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._engine.get().dispose()


@contextmanager
def _no_session_that_only_reads(connection: Connection) -> Iterator[None]:
    """Give up a connection that may not write: its session stays so; a new one may write, or lead to the primary."""
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _READ_ONLY:
            connection.invalidate()
        raise


def make_engine(url: str, application: str = "keepstream", *, pool_size: int = 5, writer: bool = False) -> Engine:
    """Return an engine for ``url`` with the time-outs and pragmas that Keepstream relies on.

    Args:
        url: SQLAlchemy URL of a SQLite or PostgreSQL database, without a driver or with ours. A file that does not
            exist is not created. What the URL sets itself, in its query or by ``options``, wins over our time-outs
            and is otherwise kept: a search path, for instance.
            ``prepare_threshold=5`` has PostgreSQL prepare what is executed for the fifth time, which no pooler allows.
        application: Name under which PostgreSQL lists the connections.
        pool_size: Connections that are kept.
        writer: For a worker. Each transaction takes SQLite's write lock at its beginning: one that reads
            first and writes then fails if somebody else writes in between. On PostgreSQL statements go by indexes.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """
    if url.startswith("postgres://"):  # as many hosts of databases write it
        url = url.replace("postgres", "postgresql", 1)
    mistake = "the database URL cannot be used; it looks like sqlite:///jobs.db or postgresql://user:password@host/name"
    try:
        parsed = make_url(url)
        backend, _, driver = parsed.drivername.partition("+")
        ours = _DRIVERS.get(backend, driver)
        if driver not in ("", ours):
            mistake = (
                f"the database URL names a driver other than '{ours}';"
                f" leave the driver out: begin the URL with {backend}://"
            )
        elif backend == "sqlite":
            return _sqlite(parsed, writer=writer)
        elif backend == "postgresql" and "@" in (parsed.host or ""):
            # The driver would show it as the name of a host, and with it the end of the password.
            mistake = "the database URL has more than one @; in a user's name or password, write %40 for it"
        elif backend == "postgresql":
            return _postgresql(parsed, application, pool_size, writer=writer)
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        raise InvalidSettingError(
            f"PostgreSQL needs 'psycopg', which is not installed; {install_hint('postgres')}"
        ) from error
    except (ArgumentError, NoSuchModuleError, ValueError):  # ValueError: the port is no number
        pass  # raised below, so that no cause repeats the URL
    raise InvalidSettingError(mistake)


def database_file(url: str | URL) -> Path | None:
    """Return the file of a SQLite database; None: it is another one, or in memory, or its URL is none."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    name = parsed.database
    if parsed.get_backend_name() != "sqlite" or not name or name.startswith((":", "file:")):
        return None
    return Path(name)


def missing_file(url: str | URL) -> Path | None:
    """Return the file of a SQLite database that does not exist; None: it does, or the database is no file."""
    file = database_file(url)
    return file if file is not None and not file.exists() else None


def _sqlite(url: URL, *, writer: bool) -> Engine:
    engine = create_engine(
        url,
        hide_parameters=True,  # they are prompts and outputs
        pool_timeout=5,
        connect_args={"timeout": 10, "check_same_thread": False},  # waits that long for another writer
    )

    @event.listens_for(engine, "do_connect")
    def _create_nothing(*_arguments: Any) -> None:
        # SQLite would: an empty database, in whatever directory this is. Whoever migrates has made the file before.
        if (file := missing_file(url)) is not None:
            raise sqlite3.OperationalError(f'there is no file "{file}"')

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the event below opens the transactions
        # Readers and the writer do not wait for each other, and a commit costs no fsync of the whole file.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


def _postgresql(url: URL, application: str, pool_size: int, *, writer: bool) -> Engine:
    given = url.query.get("options", os.environ.get("PGOPTIONS", ""))  # as libpq reads it
    session = plan_session(given if isinstance(given, str) else " ".join(given), by_index=writer)
    defaults: dict[str, Any] = {
        "connect_timeout": 5,
        "application_name": application,
        # Without it psycopg would return bytes from a database in SQL_ASCII.
        "client_encoding": "utf8",
        # A connection that died silently is noticed within seconds.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    ours: dict[str, Any] = {
        "options": session.options,  # if empty, it keeps libpq from reading PGOPTIONS once more
        "autocommit": True,  # the event below opens the transactions
        # What one session has prepared, a pooler's next one does not know; whether there is a pooler, the URL may say.
        "prepare_threshold": int(str(url.query["prepare_threshold"])) if "prepare_threshold" in url.query else None,
    }
    engine = create_engine(
        url,
        hide_parameters=True,  # they are prompts and outputs
        pool_pre_ping=True,
        pool_timeout=5,
        pool_size=pool_size,
        connect_args={name: value for name, value in defaults.items() if name not in url.query} | ours,
    )
    begin = session.begin.replace("%", "%%")  # psycopg's sign for a parameter

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


#: Most characters of a driver's words that are shown.
_SHOWN: Final = 300

#: SQLSTATE classes whose sentences may hold a value: of data that does not fit, and of a user's own trigger.
_WITH_VALUES: Final = frozenset({"22", "P0"})


def describe_error(error: BaseException | None) -> str:
    """Return the error's type and what the driver says, without the details, which may hold values."""
    name = type(error).__name__
    state = getattr(error, "sqlstate", None)
    if state is None:  # no answer to a statement: the lines, if there are several, tell of the connection
        return f"{name}: {' '.join(str(error).split())[:_SHOWN]}"
    if state[:2] in _WITH_VALUES:
        return f"{name}, SQLSTATE {state}"
    return f"{name}: {(str(error).splitlines() or [''])[0][:_SHOWN]}"
