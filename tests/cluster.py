"""The test cluster: a whole Keepstream on real servers, every part of which can be harmed.

In: what a test wants: a database, settings, scripted jobs, faults.
Out: worker processes, clients, followers in threads, and afterwards what the provider, the database, the log and
the workers say.

End-to-end tests and the chaos suite share it, and wait for states instead of sleeping.
"""

import itertools
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar

import redis
from sqlalchemy import Connection, create_engine
from typing_extensions import override

from keepstream import Client
from keepstream.client.database import make_engine
from keepstream.client.redis_connections import make_pool
from keepstream.client.redis_url import parse_redis_url
from keepstream.client.sender import Sender
from keepstream.events import Event, parse_event
from keepstream.jobs import parse_job
from keepstream.names import QUEUE, job_keys
from keepstream.results import CompletionResult
from keepstream.transcript import Transcript
from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedValkey
from keepstream_worker.store import schema
from tests.fork_server import ForkServer
from tests.recording_provider import RecordingProviderProcess
from tests.redis_servers import SentinelSet
from tests.services import PostgresServer

T = TypeVar("T")

PATIENCE: Final = 60.0  #: Seconds; how long a busy machine may take for what takes a second elsewhere.
_POLL: Final = 0.02  #: Seconds between two looks at what is waited for, and more of them the longer it takes.
_LONGEST_POLL: Final = 0.1
_HELD_RATE: Final = 100.0  #: Deltas a second of a stream that is held: a pace, so that it can stop, and no time lost.
_LOG_SHOWN: Final = 3000  #: Characters of each worker's log that are shown with a test that failed.

BRIEF: Final = 3.0  #: Seconds; the lease of workers that have to notice that another one has died.

#: Faster than in production, except for what would call a worker dead, or a provider silent, that a busy machine only
#: keeps from its turn. Tests in which one dies, or is silent, set what they need.
FAST: Final[dict[str, Any]] = {
    "heartbeat_interval": 0.5,
    "lease": 30.0,
    "sweep_interval": 0.4,
    "shutdown_grace": 10.0,
    "connect_timeout": PATIENCE,
    "first_token_timeout": PATIENCE,
    "idle_timeout": PATIENCE,
    "backoff_base": 0.1,
    "backoff_cap": 0.5,
}


def wait_until(condition: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
    """Return the first true value of ``condition``; fail, naming ``what`` was waited for, after ``timeout`` seconds."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > timeout:
            raise AssertionError(f"waited {timeout:g} s in vain for: {what}")
        time.sleep(min(max(waited / 20, _POLL), _LONGEST_POLL))


class WorkerProcess(EmbeddedProcess):
    """One worker, started as in production, or forked off if there is a server for that."""

    module: ClassVar[str] = "keepstream_worker.app"
    started: ClassVar[str] = "worker_started"  #: What its log says when it is at work.

    def __init__(self, environment: dict[str, str], log: Path, forks: ForkServer | None = None) -> None:
        super().__init__("worker")
        self._forks = forks
        self._environment = environment
        self.log = self._log = log

    @override
    def _command(self) -> list[str]:
        return [sys.executable, "-m", self.module]

    @override
    def _options(self) -> dict[str, Any]:
        return {"cwd": Path(__file__).parents[1], "env": self._environment}

    @override
    def _is_ready(self) -> bool:
        return bool(self.said(self.started))

    @override
    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._forks is None:
            return super()._spawn()
        return self._forks.start(self.module, [], self._environment, self._log)

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def at_work(self) -> bool:
        """Whether the worker has started."""
        return self._log.exists() and self._is_ready()

    @property
    def id(self) -> str:
        """The worker's id in the database."""
        return str(self.said("worker_started")[-1]["worker"])

    def terminate(self) -> None:
        """Ask the worker to end, and do not wait."""
        self._signal(self.stop_signal)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code of a worker that was asked to end, or that ends by itself."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker did not end within {timeout:g} s: {self._log_tail()}") from None

    def log_lines(self) -> list[str]:
        """The worker's log, once it has begun one."""
        if not self._log.exists():
            return []
        return self._log.read_text(errors="replace").splitlines()

    def said(self, event: str, **known: Any) -> list[dict[str, Any]]:
        """Return the lines of the worker's log that report ``event`` with these data."""
        lines = []
        for line in self.log_lines():
            if f'"{event}"' in line:
                try:
                    record = json.loads(line)
                except ValueError:  # the last line is not written to its end yet
                    continue
                if record.get("event") == event and known.items() <= record.items():
                    lines.append(record)
        return lines

    def wait_to_say(self, event: str, times: int = 1, **known: Any) -> None:
        """Wait until the worker's log has reported ``event`` with these data so many times."""
        wait_until(lambda: len(self.said(event, **known)) >= times, f"{times} times {event} in the worker's log")


class Following(threading.Thread):
    """A follower in a thread, which keeps the events it gets."""

    def __init__(self, client: Client, job_id: str, after: str | None = None, timeout: float = PATIENCE) -> None:
        super().__init__(name=f"follower-{job_id}", daemon=True)
        self.events: list[Event] = []
        self.transcript = Transcript()
        self.error: Exception | None = None
        self._events = client.follow(job_id, after, timeout=timeout, not_found_after=timeout)
        self.start()

    @override
    def run(self) -> None:
        try:
            for event in self._events:
                self.transcript.apply(event)
                self.events.append(event)
        except Exception as error:  # noqa: BLE001  # raised again in the test's thread
            self.error = error

    @property
    def ids(self) -> list[str]:
        """The ids of the events so far."""
        return [event.id for event in self.events]

    @property
    def types(self) -> list[str]:
        """The types of the events so far."""
        return [event.type for event in self.events]

    def wait_for(self, type_: str, count: int = 1, attempt: int | None = None) -> None:
        """Wait until ``count`` events of a type (of an attempt) have come."""

        def came() -> bool:
            if self.error is not None:
                raise self.error
            found = [event for event in list(self.events) if event.type == type_ and attempt in (None, event.attempt)]
            return len(found) >= count

        wait_until(came, f"{count} {type_} of {self.name}")

    def to_the_end(self) -> Transcript:
        """Wait for the terminal event, check that it is the only one, and return the follower's transcript."""
        self.join(PATIENCE)
        if self.error is not None:
            raise self.error
        assert not self.is_alive(), f"{self.name} did not get the end; its last event is {self.events[-1:]}"
        ends = [event.id for event in self.events if event.type.startswith("job.")]
        assert ends == [self.events[-1].id]
        return self.transcript


class Cluster:
    """A Redis, a database, a provider, and workers.

    Args:
        directory: For logs.
        database_url: An empty database; it is migrated.
        persistent: Whether Redis keeps its data when it is killed.
        valkey: The Redis, not started yet, if it is to be a special one.
        postgres: The server behind ``database_url``, if it may be harmed.
        sentinels: Started servers to use instead of a Valkey of the cluster's own.
        base: The workers' settings; what is in neither has its default.
        redis_url: Of the Redis to be used instead of a Valkey of its own.
        forks: Starts the workers and the provider quickly; without it they are started as in production.
        settings: The workers' settings, over ``base``.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str,
        *,
        persistent: bool = False,
        valkey: EmbeddedValkey | None = None,
        postgres: PostgresServer | None = None,
        sentinels: SentinelSet | None = None,
        base: Mapping[str, Any] = FAST,
        redis_url: str | None = None,
        forks: ForkServer | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.database_url = database_url
        self._postgres = postgres
        self.forks = forks
        self.settings = {**base, **settings}
        self._valkey = valkey or EmbeddedValkey(persistent=persistent)
        self._sentinels = sentinels
        self._has_own_valkey = redis_url is None and sentinels is None
        self.redis_url = sentinels.url if sentinels else redis_url or self._valkey.url
        self.provider = RecordingProviderProcess(forks=forks)
        self.workers: list[WorkerProcess] = []
        self.gateways: list[WorkerProcess] = []
        self._numbers = itertools.count(1)
        self._clients: list[Client] = []
        self._engine = create_engine(database_url, pool_pre_ping=True)

    def __enter__(self) -> Self:
        try:
            if self._has_own_valkey:
                self._valkey.start()
            self.provider.start()
            engine = make_engine(self.database_url)
            schema.migrate(engine)
            engine.dispose()
        except BaseException:
            self.close()
            raise
        self.client = self.make_client()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for process in (*self.workers, *self.gateways):
            process.kill()
            process.close()
        for client in self._clients:
            client.close()
        self._engine.dispose()
        self.provider.close()
        self._valkey.close()

    # -- workers --

    def environment(self, **settings: Any) -> dict[str, str]:
        """Return a worker's environment."""
        own = {f"KEEPSTREAM_{name.upper()}": str(value) for name, value in (self.settings | settings).items()}
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("KEEPSTREAM_", "OPENAI_"))
        }
        return inherited | {
            "KEEPSTREAM_REDIS_URL": self.redis_url,
            "KEEPSTREAM_DATABASE_URL": self.database_url,
            "OPENAI_BASE_URL": self.provider.base_url,
            "OPENAI_API_KEY": "scripted",
            **own,
        }

    def new_worker(self, **settings: Any) -> WorkerProcess:
        """Return a worker that is not started yet."""
        log = self.directory / f"worker-{next(self._numbers)}.log"
        worker = WorkerProcess(self.environment(**settings), log, self.forks)
        self.workers.append(worker)
        return worker

    def start_worker(self, **settings: Any) -> WorkerProcess:
        """Start a worker and wait until it is at work."""
        worker = self.new_worker(**settings)
        worker.start()
        return worker

    def start_workers(self, count: int, **settings: Any) -> list[WorkerProcess]:
        """Start some workers at the same time and wait until they are at work."""
        workers = [self.new_worker(**settings) for _ in range(count)]
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(WorkerProcess.start, workers))
        return workers

    def freeze(self, worker: WorkerProcess) -> None:
        """Freeze a worker, but not while it writes to SQLite, which would lock out everybody else as well."""
        while True:
            worker.freeze()
            if not self._is_locked():
                return
            worker.thaw()

    def _is_locked(self) -> bool:
        if self._engine.dialect.name != "sqlite":
            return False
        with closing(sqlite3.connect(str(self._engine.url.database), timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
        return False

    def worker_of(self, job_id: str) -> WorkerProcess:
        """Wait until a worker runs the job, and return it."""

        def holder() -> WorkerProcess | None:
            attempts = self.result(job_id).attempts
            last = attempts[-1] if attempts else None
            if last is None or last.outcome is not None:
                return None
            return next((worker for worker in self.workers if worker.running and worker.id == last.worker), None)

        return wait_until(holder, f"a worker that runs job {job_id}")

    def worker_logs(self) -> list[tuple[str, str]]:
        """Return the name and the end of each worker's log."""
        return [
            (str(worker.log), worker.log.read_text(errors="replace")[-_LOG_SHOWN:])
            for worker in (*self.workers, *self.gateways)
        ]

    # -- jobs --

    def make_client(self, *, database: bool = True, tenant: str = "default") -> Client:
        """Return a client, which is closed with the cluster."""
        database_url = self.database_url if database else None
        broker_url = self.settings.get("broker_url")
        client = Client(self.redis_url, broker_url=broker_url, database_url=database_url, tenant=tenant)
        self._clients.append(client)
        return client

    def job(self, *, limits: dict[str, Any] | None = None, hold: int | None = None, **script: Any) -> dict[str, Any]:
        """Return a job, as it is sent, whose stream is scripted; its id is the key under which the provider counts it.

        ``limits`` are further fields of the job. With ``hold`` the stream, which is then a quick one, stops after so
        many deltas until it is released.
        """
        job_id = f"job-{next(self._numbers)}"
        held = {} if hold is None else {"hold": hold}
        if held:
            script = {"rate": _HELD_RATE, **script}
        return {
            "v": 2,
            "id": job_id,
            "request": {
                "model": "scripted-1",
                "messages": [{"role": "user", "content": "Tell me something."}],
                "script": {"key": job_id, **script},
                **held,
            },
            **(limits or {}),
        }

    def enqueue(self, *, limits: dict[str, Any] | None = None, hold: int | None = None, **script: Any) -> str:
        """Enqueue a scripted job, which may be held, and return its id."""
        return self.client.enqueue(parse_job(self.job(limits=limits, hold=hold, **script)))

    def release(self, *job_ids: str, until: int | None = None) -> None:
        """Let held streams go on, up to a delta or to their end."""
        self.provider.release(*job_ids, until=until)

    def follow(self, job_id: str, after: str | None = None) -> Following:
        """Follow a job in a thread."""
        return Following(self.client, job_id, after)

    def result(self, job_id: str) -> CompletionResult:
        """Return what is stored of a job that exists."""
        result = self.client.get(job_id)
        assert result is not None, f"there is no job {job_id}"
        return result

    def wait_for(self, job_id: str, *statuses: str, timeout: float = PATIENCE) -> CompletionResult:
        """Wait until a job has one of these statuses (by default: until it is terminal)."""

        def reached() -> CompletionResult | None:
            result = self.client.get(job_id)
            if result is None:
                return None
            return result if (result.status in statuses if statuses else result.status.terminal) else None

        return wait_until(reached, f"job {job_id} to be {' or '.join(statuses) or 'terminal'}", timeout)

    def wait_for_deltas(self, job_id: str, deltas: int = 1, attempt: int = 1) -> None:
        """Wait until the provider has sent some deltas of an attempt."""

        def sent() -> bool:
            attempts = self.provider.attempts(job_id)
            return len(attempts) >= attempt and attempts[attempt - 1].deltas >= deltas

        wait_until(sent, f"{deltas} deltas of attempt {attempt} at {job_id}")

    def log(self, job_id: str, tenant: str = "default") -> list[Event]:
        """Return the events in a job's log."""
        with self.redis() as client:
            entries: Any = client.xrange(job_keys(tenant, job_id).log)
        return [parse_event(fields[b"event"]) for _, fields in entries]

    # -- the servers --

    @contextmanager
    def database(self) -> Iterator[Connection]:
        """Give a connection inside a transaction, for what no client can ask or do."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def redis(self) -> Iterator["redis.Redis"]:
        """Give a connection to Redis."""
        with redis.Redis.from_pool(make_pool(parse_redis_url(self.redis_url), retries=1)) as client:
            yield client

    @property
    def valkey(self) -> EmbeddedValkey:
        """The Redis server; with Sentinels, their master."""
        return self._valkey if self._sentinels is None else self._sentinels.master

    @property
    def sentinels(self) -> SentinelSet:
        """The servers that can fail over."""
        assert self._sentinels is not None
        return self._sentinels

    @property
    def postgres(self) -> PostgresServer:
        """The PostgreSQL server, to be harmed."""
        assert self._postgres is not None
        return self._postgres

    def send(self, *jobs: dict[str, Any]) -> None:
        """Put the message of each job on the queue, and write no row."""
        sender = Sender(self.settings.get("broker_url") or self.redis_url)
        try:
            for job in jobs:
                sender.send(job)
        finally:
            sender.close()

    def push(self, *items: bytes) -> None:
        """Put raw items on the queue."""
        with self.redis() as client:
            for item in items:
                client.lpush(QUEUE, item)
