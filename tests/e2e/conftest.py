"""Fixtures of the end-to-end tests: stands, without workers yet, and one with.

In: the databases of the common fixtures.  Out: stands.  Exists so that each test starts the workers it
needs, harms what it wants, and leaves nothing behind; tests that harm nothing share a stand that works.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Stand
from tests.services import PostgresServer
from worker.embedded import sqlite_url


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    """A stand on SQLite."""
    with Stand(tmp_path, sqlite_url(tmp_path / "millrace.db")) as stand:
        yield stand


@pytest.fixture(scope="module")
def shared_stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A stand on SQLite with a worker, for the tests of a module that harm neither."""
    directory = tmp_path_factory.mktemp("shared")
    with Stand(directory, sqlite_url(directory / "millrace.db")) as stand:
        stand.start_worker()
        yield stand


@pytest.fixture
def any_stand(tmp_path: Path, database_url: str) -> Iterator[Stand]:
    """A stand, once on each of the databases we support."""
    with Stand(tmp_path, database_url) as stand:
        yield stand


@pytest.fixture(params=[False, True], ids=["empty-restart", "persistent"])
def redis_stand(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    """A stand on SQLite, once with a Redis that loses its data when it is killed and once with one that keeps it."""
    with Stand(tmp_path, sqlite_url(tmp_path / "millrace.db"), persistent=request.param) as stand:
        yield stand


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that tests may harm."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_stand(tmp_path: Path, mortal_postgres: PostgresServer) -> Iterator[Stand]:
    """A stand on a PostgreSQL server that the test may harm: ``stand.postgres``."""
    url = mortal_postgres.url(mortal_postgres.create_database())
    with Stand(tmp_path, url, postgres=mortal_postgres) as stand:
        yield stand
    mortal_postgres.restart()
