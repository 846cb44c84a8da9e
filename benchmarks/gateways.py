"""Gateways under load: the gateway as shipped and the bare fan-out, their readers, and the source of events.

In: a ``Bench``, and how many readers of how many jobs.
Out: running processes with one interface, and what the readers saw, to the measures.
"""

import socket
import time
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from benchmarks.bench import Bench, Reading
from benchmarks.contenders import migrate
from benchmarks.event_source import Order
from benchmarks.harness import Process, python
from keepstream import Client, names
from keepstream.client import api_keys
from keepstream_worker.dev_stack.embedded import free_port

GATEWAY: Final = "gateway"
BARE: Final = "bare-sse"
_WAIT_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.05
_SETTLE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Fan:
    """A running process that brings events to readers."""

    name: str
    process: Process
    port: int
    headers: dict[str, str]
    database_url: str | None = None

    def path(self, job: str) -> str:
        """Return where a job is followed."""
        return f"/{names.job_keys(names.DEFAULT_TENANT, job).channel}" if self.name == BARE else events_path(job)


@dataclass(frozen=True, slots=True)
class Seen:
    """What readers saw of a load, between the beginning and the end: in which no reader came or left."""

    latencies_ms: list[float]  #: From the source to the reader's socket, in ascending order.
    lags_ms: list[float]  #: From the socket to the reader, who came late or was kept waiting; in ascending order.
    published: int  #: Deltas, from the first to the last.
    arrived: int  #: The same, at all readers.
    used: Reading
    waited: float  #: Seconds for which the process was ready to run, and something else ran on its core.
    others_cpu: float  #: Seconds that source, Redis and readers used together.


def events_path(job: str) -> str:
    """Return where the gateway lets a job be followed."""
    return f"/api/jobs/{job}/events"


@contextmanager
def gateway(
    bench: Bench,
    database_url: str | None = None,
    queue: str = GATEWAY,
    *,
    apart: bool = True,
    drain_seconds: float = 30.0,
) -> Iterator[Fan]:
    """Run a gateway, on the measured core if it is to be ``apart``; by default on a new SQLite database.

    A reader that reads nothing for ``drain_seconds`` is given up.
    """
    log = bench.new_file("gateway.log")
    if database_url is None:
        database_url = bench.services.new_database("sqlite", log.stem)
        migrate(database_url)
    port = free_port()
    environment = {
        names.ENV_DATABASE_URL: database_url,
        names.ENV_REDIS_URL: bench.services.redis_url,
        names.ENV_QUEUE: queue,
        "KEEPSTREAM_LOG_LEVEL": "warning",
        "KEEPSTREAM_GATEWAY_PORT": str(port),
        "KEEPSTREAM_GATEWAY_MAX_FOLLOWERS_PER_KEY": "20000",
        "KEEPSTREAM_GATEWAY_DRAIN_TIMEOUT": str(drain_seconds),
    }
    headers = {"Authorization": f"Bearer {_make_key(database_url)}"}
    cores = bench.cores.worker if apart else bench.cores.rest
    with closing(Process(GATEWAY, python("keepstream_gateway"), cores, log, environment)) as process:
        _wait_for_port(process, port)
        yield Fan(GATEWAY, process, port, headers, database_url)


@contextmanager
def bare(bench: Bench) -> Iterator[Fan]:
    """Run the bare fan-out, on the measured core."""
    command = python("benchmarks.bare_sse", "--redis-port", str(bench.services.redis_port))
    with closing(bench.start(BARE, command, bench.cores.worker)) as process:
        yield Fan(BARE, process, int(process.expect("ready", _WAIT_SECONDS)["port"]), {})


def enqueue(bench: Bench, fan: Fan, jobs: list[str]) -> None:
    """Store the jobs, which no worker runs; the bare fan-out knows nothing of them."""
    if fan.database_url is None:
        return
    with Client(bench.services.redis_url, database_url=fan.database_url, queue=GATEWAY) as client:
        for job in jobs:
            client.enqueue(model="scripted", messages=[{"role": "user", "content": "go"}], id=job)
    bench.services.redis.delete(GATEWAY)


@contextmanager
def source(bench: Bench, order: Order) -> Iterator[Process]:
    """Run a source of events, which has published the first of each job."""
    command = python("benchmarks.event_source", "--redis-port", str(bench.services.redis_port))
    with closing(bench.start("event-source", command)) as process:
        process.send(order.as_json())
        process.expect("ready", _WAIT_SECONDS)
        try:
            yield process
        finally:
            logs = [names.job_keys(names.DEFAULT_TENANT, job).log for job in [*order.jobs, *order.large_jobs]]
            bench.services.redis.delete(*logs)


class Readers:
    """The readers of a fan, in a process of their own."""

    def __init__(self, bench: Bench, fan: Fan, jobs: list[str], stalled: int = 0) -> None:
        """Connect one reader for each of ``jobs``, of which so many of the last stop reading."""
        self._bench = bench
        self._fan = fan
        self._file: Path = bench.new_file("stamps")
        self._process = bench.start("sse-readers", python("benchmarks.sse_readers", "--stamps", str(self._file)))
        self._process.expect("here", _WAIT_SECONDS)
        paths = [fan.path(job) for job in jobs]
        self._process.send({"port": fan.port, "paths": paths, "headers": fan.headers, "stalled": stalled})

    def wait_until_there(self) -> None:
        """Wait until each has its first event."""
        self._process.expect("started", _WAIT_SECONDS, self._fan.process)

    def run(self, events: Process) -> Seen:
        """Let the source begin, and wait until all have read to the end."""
        events.send({})
        events.expect("begun", _WAIT_SECONDS)
        time.sleep(_SETTLE_SECONDS)
        others, waited = events.cpu_seconds() + self._process.cpu_seconds(), self._fan.process.waited_seconds()
        before, begin = self._bench.read(self._fan.process), time.monotonic_ns()
        deltas = int(events.expect("ended", _WAIT_SECONDS)["deltas"])
        used, end = self._bench.read(self._fan.process).since(before), time.monotonic_ns()
        others = events.cpu_seconds() + self._process.cpu_seconds() + used.redis_cpu - others
        waited = self._fan.process.waited_seconds() - waited
        events.send({})
        self._process.expect("ended", _WAIT_SECONDS, self._fan.process)
        stamps = array("q")
        stamps.frombytes(self._file.read_bytes())
        self._file.unlink()
        moments = list(zip(stamps[::3], stamps[1::3], stamps[2::3], strict=True))
        within = [moment for moment in moments if begin <= moment[0] < end]
        latencies = sorted((here - sent) / 1e6 for here, sent, _ in within)
        lags = sorted((read - here) / 1e6 for here, _, read in within)
        return Seen(latencies, lags, deltas, len(moments), used, waited, others)

    def close(self) -> None:
        """Leave."""
        self._process.close()


def _make_key(database_url: str) -> str:
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        key = api_keys.create(connection, names.DEFAULT_TENANT, "benchmark", frozenset({names.Right.API}))[1]
    engine.dispose()
    return key


def _wait_for_port(process: Process, port: int) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if not process.is_running():
            raise process.failure("ended early")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(_POLL_SECONDS)
    raise process.failure("did not listen")
