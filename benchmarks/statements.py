"""Statements: how many a database has to do for workers.

In: PostgreSQL's own log, which is told to name every statement for as long as one looks.
Out: counts, to the measures of what many workers cost.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa

from benchmarks.services import Services

_ENTRY: Final = re.compile(r"^(?=\S*\|\S*\| [A-Z]+:  )", re.MULTILINE)
_STATEMENT: Final = re.compile(r"(\S*)\|(\S*)\| LOG:  (?:statement|execute [^:]*): (.*)", re.DOTALL)
_APPLICATION: Final = "keepstream-worker"
#: What begins, ends and sets up transactions, and the empty statement by which a connection is tried.
_AROUND: Final = re.compile(r"(?i)(begin|commit|rollback|set local|;|$)")
_SHOWN: Final = 90  #: Characters of a statement.


@dataclass(slots=True)
class Counted:
    """What was logged, filled in at the end."""

    statements: int = 0  #: Without those that begin, end and set up transactions, and try connections.
    round_trips: int = 0  #: With them.
    transactions: int = 0  #: Commits.
    by_text: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted_statements(services: Services, database: str) -> Iterator[Counted]:
    """Count the workers' statements in a database from now to the end of the block. It makes them slower."""
    assert services.postgres_url is not None
    engine = sa.create_engine(services.postgres_url, isolation_level="AUTOCOMMIT")
    counted = Counted()
    try:
        _configure(engine, "SET log_statement = 'all'", "SET log_line_prefix = '%d|%a| '")
        begin, commits = services.postgres_log.stat().st_size, _commits(engine, database)
        yield counted
        counted.transactions = _commits(engine, database) - commits
        with services.postgres_log.open("rb") as log:
            log.seek(begin)
            text = log.read().decode(errors="replace")
    finally:
        _configure(engine, "RESET log_statement", "RESET log_line_prefix")
        engine.dispose()
    for entry in _ENTRY.split(text):
        found = _STATEMENT.match(entry)
        if found is None or found[1] != database or found[2] != _APPLICATION:
            continue
        counted.round_trips += 1
        statement = " ".join(found[3].split())
        if not _AROUND.match(statement):
            counted.by_text[statement[:_SHOWN]] += 1
    counted.statements = counted.by_text.total()


def _configure(engine: sa.Engine, *changes: str) -> None:
    with engine.connect() as connection:
        for change in changes:
            connection.execute(sa.text(f"ALTER SYSTEM {change}"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))


def _commits(engine: sa.Engine, database: str) -> int:
    with engine.connect() as connection:
        found = connection.execute(
            sa.text("SELECT xact_commit FROM pg_stat_database WHERE datname = :name"), {"name": database}
        )
        return int(found.scalar() or 0)
