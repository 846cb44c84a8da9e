"""Fixtures of the tests with other people's clients.

In: Debian's Chromium and Node, and the packages that ``make test-clients`` installs; what is absent skips its tests.
Out: clusters with a worker, a browser, pages.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.chromium import Chromium, Page
from tests.cluster import Cluster
from tests.fork_server import ForkServer


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on SQLite with a worker, for the tests of a module that harm neither."""
    directory = tmp_path_factory.mktemp("clients")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks) as cluster:
        cluster.start_worker()
        yield cluster


@pytest.fixture
def any_cluster(tmp_path: Path, database_url: str, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster with a worker, once on each of the databases we support."""
    with Cluster(tmp_path, database_url, forks=forks) as cluster:
        cluster.start_worker()
        yield cluster


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """A browser, which the tests of a process share."""
    with Chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    """An empty page with storage of its own."""
    with chromium.page() as page:
        yield page
