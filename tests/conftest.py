"""Fixtures that more than one test module uses, and how the tests are spread over processes.

In: requests of tests. Out: URLs of clean databases on real servers, which are started once a process.
"""

import logging
import os
import signal
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Final

import hypothesis
import pytest
import redis
import structlog
from _pytest.nodeid import NodeId
from xdist.workermanage import NodeManager

from keepstream_worker.dev_stack.embedded import EmbeddedValkey, sqlite_url
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from tests.cluster import Cluster
from tests.fork_server import ForkServer
from tests.redis_servers import Certificates, RedisTls
from tests.services import PostgresServer

# A shell that runs us in the background has Ctrl-C ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes no example too slow, and runs at the same time do not share what they found.
hypothesis.settings.register_profile(
    "keepstream",
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("keepstream")

# After Ctrl-C a busy machine takes longer than xdist's ten seconds to stop the servers of all processes.
NodeManager.EXIT_TIMEOUT = 60

MOST_PROCESSES: Final = 8

#: Modules with long tests, or many in one process. These begin first, so that none of them is left over at the end.
LONGEST: Final = (
    "test_chaos",
    "test_error_answers",
    "test_services",
    "test_outages",
    "test_recovery",
    "test_shutdown",
    "test_zombie",
    "test_installed",
    "test_load",
    "test_waiting",
    "test_store",
    "test_forks",
    "test_client_plans",
)


@pytest.hookimpl(optionalhook=True)  # unknown with "-p no:xdist"
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes ``-n auto`` means: two a core, because a test waits half of its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2 * cores, MOST_PROCESSES)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long tests first, and group those that run in one process under ``--dist loadgroup``.

    Tests that share a fixture of their module are a group, so that it is set up once; quick tests are a group a module.
    """
    is_distributed = config.getoption("loadgroup", False)

    def place(item: pytest.Item) -> tuple[int, int]:
        room = ("e2e", "clients", "adapters", "unit").index(item.path.parent.name)
        if room == 0 and item.get_closest_marker("xdist_group"):
            return 0, 0
        return room, 1 + (LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))

    for item in items:
        shared = _shared_fixtures(item)
        if shared or item.path.parent.name not in {"e2e", "clients"}:
            group = " ".join([item.path.parent.name, item.path.stem, *shared])  # modules of two rooms may be namesakes
            item.add_marker(pytest.mark.xdist_group(group))
            if is_distributed:
                # The end of its id tells xdist the group. Where xdist 3.8 writes it, pytest 9.2 does not look any more.
                item._id = NodeId.parse(f"{item.nodeid}@{group}")
    items.sort(key=place)


def _shared_fixtures(item: pytest.Item) -> list[str]:
    """Return the names of the fixtures that a test shares with its module."""
    definitions = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    return sorted(name for name, found in definitions.items() if found[-1].scope == "module")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the workers' logs of a test that failed."""
    report = yield
    if report.failed:
        for fixture in getattr(item, "funcargs", {}).values():
            if isinstance(fixture, Cluster):
                report.sections += fixture.worker_logs()
    return report


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test's command did to the logging of this process, which the next test's logs pass through, too."""
    configure = structlog.configure
    # A logger that remembers this test's log would write the next test's there.
    monkeypatch.setattr(structlog, "configure", lambda **how: configure(**how | {"cache_logger_on_first_use": False}))
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {logger: logger.level for logger in (root, *map(logging.getLogger, root.manager.loggerDict))}
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    for logger, level in levels.items():
        logger.setLevel(level)


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Starts workers quickly."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """A Valkey server; a test that harms its server starts one of its own."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    """The URL of an empty Redis database."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that only the tests know."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def tls(valkey: EmbeddedValkey, certificates: Certificates) -> Iterator[RedisTls]:
    """A server whose certificate names localhost only."""
    with RedisTls(valkey.port, certificates.server_context("localhost")) as server:
        yield server


@pytest.fixture(scope="session")
def strict_tls(valkey: EmbeddedValkey, certificates: Certificates) -> Iterator[RedisTls]:
    """A server that asks for its clients' certificates."""
    with RedisTls(valkey.port, certificates.server_context("localhost", clients=True)) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test that harms its server starts one of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once on each of the databases we support."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "keepstream.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
async def scripted_provider() -> AsyncIterator[ScriptedProvider]:
    """A scripted provider on the test's own event loop."""
    async with ScriptedProvider() as provider:
        yield provider
