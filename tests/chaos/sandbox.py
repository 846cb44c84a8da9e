"""The sandbox: where an item of the suite runs.

In: a directory and the kind of database.
Out: clusters with servers of their own, which may be harmed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import Cluster
from tests.redis_servers import SentinelSet
from tests.services import PostgresServer


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Where logs go, and which database is used: ``postgresql`` or ``sqlite``."""

    directory: Path
    database: str = "postgresql"

    @contextmanager
    def cluster(self, item: str, *, sentinels: bool = False, **settings: Any) -> Iterator[Cluster]:
        """Yield a cluster with servers of its own and no worker; with ``sentinels``, its Redis can fail over."""
        directory = self.directory / item
        directory.mkdir(parents=True)
        with ExitStack() as servers:
            postgres = None
            url = sqlite_url(directory / "keepstream.db")
            if self.database == "postgresql":
                postgres = servers.enter_context(PostgresServer())
                url = postgres.url(postgres.create_database())
            redis = servers.enter_context(SentinelSet(persistent=True, dead_after=2.0)) if sentinels else None
            with Cluster(directory, url, postgres=postgres, sentinels=redis, **settings) as cluster:
                yield cluster
