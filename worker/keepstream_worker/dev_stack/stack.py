"""The dev stack: everything a worker needs, on this machine, for as long as we run.

In: a directory for the database, and the environment, from `demo`, `dev` and the tests.
Out: running servers, a migrated database and the settings that lead to them; for the demo a worker process as well.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

from typing_extensions import override

from keepstream.client.database import make_engine
from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedProvider, EmbeddedValkey, sqlite_url
from keepstream_worker.store import schema
from keepstream_worker.supervisor import python_module

_PROVIDER_VARIABLES: Final = ("OPENAI_API_KEY", "OPENAI_BASE_URL")


class DevStack(NamedTuple):
    """Running servers and how to reach them."""

    redis_url: str
    database: Path  #: The SQLite file.
    provider_url: str | None  #: The scripted provider; None: the user has one.
    settings: dict[str, str]  #: Environment variables for clients and workers.

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return ``base``, changed so that a process uses these servers."""
        kept = {name: value for name, value in base.items() if self.provider_url is None or not _is_proxy(name)}
        return kept | self.settings


@contextmanager
def dev_stack(directory: Path) -> Iterator[DevStack]:
    """Start the servers; stop them on leaving, which SIGTERM and SIGHUP bring about as well.

    Raises:
        EmbeddedServiceError: a server did not start.
        SchemaError: the database could not be migrated.
    """
    with ExitStack() as resources:
        resources.enter_context(_ended_by_sigterm())
        valkey = resources.enter_context(EmbeddedValkey())
        database = directory / "keepstream.db"
        settings = {
            "KEEPSTREAM_REDIS_URL": valkey.url,
            "KEEPSTREAM_BROKER_URL": valkey.url,  # the user's environment may name another
            "KEEPSTREAM_DATABASE_URL": sqlite_url(database),
        }
        provider_url = None
        if not any(os.environ.get(name) for name in _PROVIDER_VARIABLES):
            provider_url = resources.enter_context(EmbeddedProvider()).base_url
            settings |= {"OPENAI_BASE_URL": provider_url, "OPENAI_API_KEY": "scripted"}
        engine = make_engine(settings["KEEPSTREAM_DATABASE_URL"])
        schema.migrate(engine)
        engine.dispose()
        yield DevStack(valkey.url, database, provider_url, settings)


class WorkerProcess(EmbeddedProcess):
    """A worker in a process of its own; its log is kept for the case that something goes wrong."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__("worker")
        self._environment = dict(environment)

    def log_tail(self) -> str:
        """Return the end of the worker's log."""
        return self._log_tail()

    @override
    def _command(self) -> list[str]:
        return python_module("keepstream_worker.app")

    @override
    def _options(self) -> dict[str, Any]:
        return {"env": self._environment}

    @override
    def _is_ready(self) -> bool:
        return b"worker_started" in self._log.read_bytes()


def _is_proxy(name: str) -> bool:
    # A proxy would look for the scripted provider on its own machine.
    return name.lower() in {"http_proxy", "https_proxy", "all_proxy"}


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ``SystemExit``, so that no server is left behind."""

    def end(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
