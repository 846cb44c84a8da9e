"""The dev stack: everything a worker needs, on this machine, for as long as we run.

In: a directory for the database, from `demo`, `dev` and the tests.
Out: running servers, a migrated database and the settings that lead to them; workers and gateways for these settings.
"""

import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Final, NamedTuple

from typing_extensions import override

from keepstream.client.database import make_engine
from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedProvider, EmbeddedValkey, sqlite_url
from keepstream_worker.store import schema
from keepstream_worker.supervisor import python_module

SCRIPTED: Final = "scripted"  #: The scripted provider's name in jobs; it is also the default, unless the user has one.

_LOOK_UP: Final = 0.2  #: Seconds.


class DevStack(NamedTuple):
    """Running servers and how to reach them."""

    redis_url: str
    database: Path  #: The SQLite file.
    provider_url: str  #: The scripted provider.
    own_provider: bool  #: Whether jobs that name no provider go to the user's.
    settings: dict[str, str]  #: Environment variables for clients and workers; all begin with ``KEEPSTREAM_``.

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return ``base``, changed so that a process uses these servers."""
        kept = {name: value for name, value in base.items() if self.own_provider or not name.startswith("OPENAI_")}
        # A proxy would look for the scripted provider on its own machine.
        direct = ",".join(filter(None, (base.get("no_proxy") or base.get("NO_PROXY"), "127.0.0.1")))
        return {**kept, "no_proxy": direct, **self.settings}


@contextmanager
def dev_stack(directory: Path, *, own_provider: bool = False, providers_file: Path | None = None) -> Iterator[DevStack]:
    """Start the servers; stop them on leaving, which SIGTERM and SIGHUP bring about as well.

    Args:
        directory: Where the database is kept.
        own_provider: Whether the default provider is the user's, as the environment describes it.
        providers_file: The user's further providers, in place of the scripted one.

    Raises:
        EmbeddedServiceError: a server did not start.
        SchemaError: the database could not be migrated.
        OSError: the directory cannot be written.
    """
    with ExitStack() as resources:
        resources.enter_context(_ended_by_sigterm())
        valkey = resources.enter_context(closing(EmbeddedValkey()))
        provider = resources.enter_context(closing(EmbeddedProvider()))
        for server in (valkey, provider):
            server.launch()
        database = directory / "keepstream.db"
        if providers_file is None:
            providers_file = directory / "providers.toml"
            providers_file.write_text(_providers(provider.base_url, own_provider=own_provider), encoding="utf-8")
        settings = {
            "KEEPSTREAM_REDIS_URL": valkey.url,
            "KEEPSTREAM_BROKER_URL": valkey.url,  # the user's environment may name another
            "KEEPSTREAM_DATABASE_URL": sqlite_url(database),
            "KEEPSTREAM_PROVIDERS_FILE": str(providers_file.absolute()),
        }
        engine = make_engine(settings["KEEPSTREAM_DATABASE_URL"])
        schema.migrate(engine)
        engine.dispose()
        for server in (valkey, provider):
            server.wait_until_ready()
        yield DevStack(valkey.url, database, provider.base_url, own_provider, settings)


class OwnProcess(EmbeddedProcess):
    """A process of ours.

    Args:
        environment: Its settings.
        visible: Whether its log goes to our standard error; otherwise it is kept, in case something goes wrong.
    """

    module: ClassVar[str]
    started: ClassVar[bytes]  #: What its log says when it is at work.

    def __init__(self, environment: Mapping[str, str], *, visible: bool = False) -> None:
        super().__init__(self.module)
        self._environment = dict(environment)
        self._visible = visible

    def log_tail(self) -> str:
        """Return the end of its log."""
        return self._log_tail()

    def wait(self) -> int:
        """Wait until it ends; return its exit code."""
        while self._process is not None:
            # Python heeds a signal that comes just before it waits only afterwards; so this looks up.
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(_LOOK_UP)
        return 0

    def terminate(self) -> None:
        """Ask it to stop and do not wait; asked again, it does not let its streams finish."""
        self._signal(self.stop_signal)

    @override
    def _command(self) -> list[str]:
        return python_module(self.module)

    @override
    def _options(self) -> dict[str, Any]:
        return {"env": self._environment, **({"stdout": None, "stderr": None} if self._visible else {})}

    @override
    def _is_ready(self) -> bool:
        return self.started in self._log.read_bytes()


class WorkerProcess(OwnProcess):
    """A worker in a process of its own."""

    module = "keepstream_worker.app"
    started = b"worker_started"
    stop_timeout = 60.0


class GatewayProcess(OwnProcess):
    """A gateway in a process of its own."""

    module = "keepstream_gateway"
    started = b"gateway_started"


def _providers(url: str, *, own_provider: bool) -> str:
    names = [SCRIPTED] if own_provider else [SCRIPTED, "default"]
    tables = "".join(f'\n[providers.{name}]\nbase_url = "{url}"\n' for name in names)
    return f"# The scripted provider, which costs nothing. Written by Keepstream at each start.\n{tables}"


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
