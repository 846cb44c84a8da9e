"""The place: where an item of the suite is played.

In: a directory and the name of a database.  Out: stands whose servers may be harmed.  Exists so that
each item begins with empty servers of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import Stand
from tests.services import PostgresServer
from worker.embedded import sqlite_url


@dataclass(frozen=True, slots=True)
class Place:
    """Where logs go, and on which database: ``postgresql`` or ``sqlite``."""

    directory: Path
    database: str = "postgresql"

    @contextmanager
    def stand(self, item: str, *, persistent: bool = False, **settings: Any) -> Iterator[Stand]:
        """Give a stand with servers of its own and no worker."""
        directory = self.directory / item
        directory.mkdir(parents=True)
        if self.database == "sqlite":
            with Stand(directory, sqlite_url(directory / "millrace.db"), persistent=persistent, **settings) as stand:
                yield stand
            return
        with PostgresServer() as postgres:
            url = postgres.url(postgres.create_database())
            with Stand(directory, url, postgres=postgres, persistent=persistent, **settings) as stand:
                yield stand
