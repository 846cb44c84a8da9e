"""Fixtures of the end-to-end tests: clusters without workers, and one with a worker.

In: the databases of the common fixtures.
Out: clusters. A test starts the workers it needs, harms what it wants, and leaves nothing behind; tests that do no
harm share a cluster.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import Cluster
from tests.fork_server import ForkServer
from tests.services import PostgresServer


@pytest.fixture
def cluster(tmp_path: Path, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on SQLite."""
    with Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db"), forks=forks) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on SQLite with a worker, for the tests of a module that harm neither."""
    directory = tmp_path_factory.mktemp("shared")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks) as cluster:
        cluster.start_worker()
        yield cluster


@pytest.fixture
def any_cluster(tmp_path: Path, database_url: str, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster, once on each of the databases we support."""
    with Cluster(tmp_path, database_url, forks=forks) as cluster:
        yield cluster


@pytest.fixture(params=[False, True], ids=["empty-restart", "persistent"])
def cluster_losing_redis(request: pytest.FixtureRequest, tmp_path: Path, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on SQLite, once with a Redis that loses its data when it is killed and once with one that keeps it."""
    with Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db"), persistent=request.param, forks=forks) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that tests may harm."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_cluster(tmp_path: Path, mortal_postgres: PostgresServer, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on a PostgreSQL server that the test may harm: ``cluster.postgres``."""
    url = mortal_postgres.url(mortal_postgres.create_database())
    with Cluster(tmp_path, url, postgres=mortal_postgres, forks=forks) as cluster:
        yield cluster
    mortal_postgres.restart()
