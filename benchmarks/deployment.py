"""Deployments: some workers on one database and one queue, and what the outside sees of their jobs.

In: a ``Bench``, a database, a providers file, settings.
Out: running workers, which can be stopped and killed; when each job's first attempt, first delta and end were heard of;
how old heartbeats were, to the measures of choice, size and limits.

The measures of streams give one worker a core of its own; here several workers share the machine, as in production.
"""

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import orjson
import redis
import sqlalchemy as sa
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.bench import Bench, percentile
from benchmarks.harness import BenchmarkError, Process, python
from benchmarks.wire import celery_message, completion_body
from keepstream import names, tables
from keepstream.client.database import make_engine
from keepstream_worker.store import schema

T = TypeVar("T")

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02
_SAMPLE_SECONDS: Final = 0.1
_SEND_AT_ONCE: Final = 1000
_ALIVE_SECONDS: Final = 60.0  #: A worker that was silent for longer is not one of this run any more.


def wait_until(condition: Callable[[], T | None], what: str, timeout: float) -> T:
    """Return the first true value of ``condition``; raise ``BenchmarkError`` if there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(_POLL_SECONDS)
    return value


class Order(NamedTuple):
    """A job to be submitted."""

    id: str
    script: Mapping[str, Any]
    tenant: str = names.DEFAULT_TENANT
    fields: Mapping[str, Any] = {}  #: Further ones of the job.


@dataclass(slots=True)
class Seen:
    """What was heard of a job; moments of the monotonic clock."""

    started: dict[int, float] = field(default_factory=dict)  #: By attempt: its start.
    first_delta: dict[int, float] = field(default_factory=dict)
    ended: float | None = None
    how: str = ""  #: Type of the terminal event.


class Watcher(threading.Thread):
    """Hears all events of one prefix."""

    def __init__(self, redis_url: str, prefix: str) -> None:
        """Subscribe; events from now on are heard."""
        super().__init__(name=f"watcher-{prefix}", daemon=True)
        self.jobs: dict[str, Seen] = {}
        self._stopping = False
        self._follower = redis.Redis.from_url(redis_url).pubsub()
        self._follower.psubscribe(f"{prefix}:*:events")
        self._follower.get_message(timeout=_START_SECONDS)
        self.start()

    def run(self) -> None:
        """Note when what happens."""
        while not self._stopping:
            try:
                message = self._follower.get_message(timeout=0.5)
            except (RedisError, OSError, ValueError):
                return
            if message is not None and message["type"] == "pmessage":
                self._note(orjson.loads(message["data"]), time.monotonic())

    def _note(self, event: dict[str, Any], now: float) -> None:
        seen = self.jobs.setdefault(event["job_id"], Seen())
        type_, attempt = event["type"], event["attempt"]
        if type_ == "delta":
            seen.first_delta.setdefault(attempt, now)
        elif type_ == "attempt.started":
            seen.started.setdefault(attempt, now)
        elif type_.startswith("job."):
            seen.ended, seen.how = now, type_

    def ended(self, jobs: Iterable[str]) -> int:
        """Return how many of the jobs have ended."""
        return sum(1 for job in jobs if (seen := self.jobs.get(job)) is not None and seen.ended is not None)

    def close(self) -> None:
        """Hear no more."""
        self._stopping = True
        self.join(timeout=5)
        self._follower.close()


class HeartbeatAges(threading.Thread):
    """Samples how old the oldest living worker's heartbeat is, by the database's clock."""

    def __init__(self, engine: sa.Engine) -> None:
        """Begin."""
        super().__init__(name="heartbeat-ages", daemon=True)
        self.ages: list[float] = []
        self._engine = engine
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until the end."""
        age = -tables.seconds_until(tables.workers.c.heartbeat_at)
        oldest = sa.select(sa.func.max(age)).where(age < _ALIVE_SECONDS)
        while not self._stopping.wait(_SAMPLE_SECONDS):
            try:
                with self._engine.connect() as connection:
                    value = connection.scalar(oldest)
            except SQLAlchemyError:
                continue
            if value is not None:
                self.ages.append(float(value))

    def take(self) -> dict[str, float]:
        """Return what was seen since the last call, as metrics."""
        ages, self.ages = self.ages, []
        if not ages:
            return {}
        return {"heartbeat_p50_s": statistics.median(ages), "heartbeat_most_s": max(ages)}

    def close(self) -> None:
        """Sample no more."""
        self._stopping.set()
        self.join(timeout=10)


class Worker:
    """A worker process."""

    def __init__(self, process: Process, log: Path) -> None:
        """Take over a process that was started."""
        self.process = process
        self._log = log

    def said(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of its log that report ``event``."""
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            if f'"{event}"' in line and line.endswith("}"):
                record = json.loads(line)
                if record.get("event") == event:
                    found.append(record)
        return found

    @property
    def id(self) -> str:
        """Its id in the database."""
        return str(self.said("worker_started")[-1]["worker"])

    def wait_until_at_work(self) -> None:
        """Wait until it has started."""

        def started() -> bool:
            if not self.process.is_running():
                raise self.process.failure("ended")
            return bool(self.said("worker_started"))

        wait_until(started, "a worker to start", _START_SECONDS)

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait."""
        os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.process.pid, signal.SIGKILL)


class Deployment:
    """Workers on one database and one queue; a context manager that ends them.

    Args:
        bench: The run.
        database_url: A database; it is migrated.
        name: Of the queue, the prefix of channels, and the logs.
        provider_url: Of the default provider; by default the run's own scripted one.
        providers: The providers file, as TOML.
        settings: Of the workers, by their names without ``KEEPSTREAM_``.
    """

    def __init__(
        self,
        bench: Bench,
        database_url: str,
        name: str,
        *,
        provider_url: str | None = None,
        providers: str = "",
        **settings: object,
    ) -> None:
        """Prepare everything; no worker runs yet."""
        self.bench = bench
        self.name = name
        self.database_url = database_url
        self.engine = sa.create_engine(database_url, isolation_level="AUTOCOMMIT", pool_size=2)
        self.workers: list[Worker] = []
        self._settings = settings
        self._provider_url = provider_url or bench.services.base_url
        self._providers = providers
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Migrate the database, and listen."""
        migrated = make_engine(self.database_url)
        schema.migrate(migrated)
        migrated.dispose()
        self.bench.services.redis.delete(self.name)
        self.watcher = Watcher(self.bench.services.redis_url, self.name)
        self._stack.callback(self.watcher.close)
        self.heartbeats = HeartbeatAges(self.engine)
        self._stack.callback(self.engine.dispose)
        self._stack.callback(self.heartbeats.close)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.process.close()
        self._stack.close()

    def start_worker(self, *, queue: str | None = None, **settings: object) -> Worker:
        """Start a worker and wait until it is at work; ``queue`` if it is not the deployment's own."""
        worker = self.launch_worker(queue=queue, **settings)
        worker.wait_until_at_work()
        return worker

    def start_workers(self, count: int) -> list[Worker]:
        """Start several at the same time."""
        started = [self.launch_worker() for _ in range(count)]
        for worker in started:
            worker.wait_until_at_work()
        return started

    def launch_worker(self, *, queue: str | None = None, **settings: object) -> Worker:
        """Start a worker and do not wait."""
        log = self.bench.new_file(f"{self.name}.log")
        providers = self.bench.new_file(f"{self.name}.toml")
        providers.write_text(self._providers)
        chosen = self._settings | settings
        environment = {f"KEEPSTREAM_{name.upper()}": str(value) for name, value in chosen.items()}
        environment |= {
            names.ENV_DATABASE_URL: self.database_url,
            names.ENV_REDIS_URL: self.bench.services.redis_url,
            names.ENV_BROKER_URL: self.bench.services.redis_url,
            names.ENV_QUEUE: queue or self.name,
            "KEEPSTREAM_PREFIX": self.name,
            "KEEPSTREAM_PROVIDERS_FILE": str(providers),
            "OPENAI_BASE_URL": self._provider_url,
            "OPENAI_API_KEY": "none",
        }
        cores = self.bench.cores.worker | self.bench.cores.rest
        process = Process("worker", python("keepstream_worker.app"), cores, log, environment)
        worker = Worker(process, log)
        self.workers.append(worker)
        return worker

    def submit(self, orders: Iterable[Order], *, queue: str | None = None) -> None:
        """Put jobs on the queue, as any other service would."""
        queue = queue or self.name
        messages = []
        for order in orders:
            wire = {
                "v": 2,
                "id": order.id,
                "tenant": order.tenant,
                "request": completion_body(dict(order.script)),
                **order.fields,
            }
            messages.append(celery_message(names.TASK, order.id, queue, wire))
        for first in range(0, len(messages), _SEND_AT_ONCE):
            self.bench.services.redis.lpush(queue, *messages[first : first + _SEND_AT_ONCE])

    def wait_for_ends(self, jobs: list[str], timeout: float) -> None:
        """Wait until all these jobs have ended."""
        wait_until(lambda: self.watcher.ended(jobs) >= len(jobs), f"{len(jobs)} jobs to end", timeout)

    def query(self, statement: Any) -> list[Any]:
        """Return the rows of a statement."""
        with self.engine.connect() as connection:
            return list(connection.execute(statement).all())


def times_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Return percentiles of times, as metrics in milliseconds."""
    ascending = sorted(value * 1e3 for value in seconds)
    return {
        "p50_ms": percentile(ascending, 0.5),
        "p90_ms": percentile(ascending, 0.9),
        "p99_ms": percentile(ascending, 0.99),
        "most_ms": ascending[-1] if ascending else float("nan"),
    }
