"""The sandbox: where an item of the suite runs.

In: a directory and the kind of database.
Out: clusters with servers of their own, which may be harmed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import Cluster
from tests.services import PostgresServer


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Where logs go, and which database is used: ``postgresql`` or ``sqlite``."""

    directory: Path
    database: str = "postgresql"

    @contextmanager
    def cluster(self, item: str, *, persistent: bool = False, **settings: Any) -> Iterator[Cluster]:
        """Yield a cluster with servers of its own and no worker."""
        directory = self.directory / item
        directory.mkdir(parents=True)
        if self.database == "sqlite":
            with Cluster(
                directory, sqlite_url(directory / "keepstream.db"), persistent=persistent, **settings
            ) as cluster:
                yield cluster
            return
        with PostgresServer() as postgres:
            url = postgres.url(postgres.create_database())
            with Cluster(directory, url, postgres=postgres, persistent=persistent, **settings) as cluster:
                yield cluster
