"""One run: starts contenders on demand and runs the rounds that measures are made of.

In: the command line's choices.
Out: ``Outcome`` values of rounds, to the measures; ``Sample`` values, to the report.

Every round goes the same way: followers ready, read the counters, submit all jobs, wait for the last end mark, read the
counters again.
"""

import importlib.util
import itertools
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.contenders import FLOOR, KEEPSTREAM, TUTORIALS, Contender, Floor, Keepstream, Tutorial
from benchmarks.harness import BenchmarkError, Cores, Process, python
from benchmarks.services import Services

_START_SECONDS: Final = 60.0
_ROUND_SECONDS: Final = 180.0
_TEXT: Final = " token"  #: One delta, about the length of a token of English.
_STAMP_CHARACTERS: Final = 21


@dataclass(frozen=True, slots=True)
class Load:
    """The jobs of a round: identical, and submitted all at once."""

    streams: int
    deltas: int  #: Per stream.
    rate: float = 0.0  #: Deltas per second and stream; 0: as fast as they are read.
    stamped: bool = False  #: Whether each delta carries the time at which it was sent.

    @property
    def total(self) -> int:
        """Deltas of all streams."""
        return self.streams * self.deltas

    @property
    def characters(self) -> int:
        """Characters of output of all streams."""
        return self.total * (_STAMP_CHARACTERS if self.stamped else len(_TEXT))

    def script(self) -> dict[str, Any]:
        """Return the script for the provider."""
        usage = {"prompt_tokens": 8, "completion_tokens": self.deltas, "total_tokens": self.deltas + 8}
        return {
            "deltas": self.deltas,
            "delta_text": _TEXT,
            "rate": self.rate,
            "stamp": self.stamped,
            "usage": usage,
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment, or their increase between two."""

    wall: float  #: Seconds.
    cpu: float  #: Seconds of the measured process tree.
    redis_cpu: float
    provider_cpu: float
    redis_commands: dict[str, int]
    stolen: float  #: Seconds, over all cores, that the host gave to other machines (steal).

    def since(self, earlier: "Reading") -> "Reading":
        """Return the increase."""
        commands = {name: n - earlier.redis_commands.get(name, 0) for name, n in self.redis_commands.items()}
        return Reading(
            self.wall - earlier.wall,
            self.cpu - earlier.cpu,
            self.redis_cpu - earlier.redis_cpu,
            self.provider_cpu - earlier.provider_cpu,
            {name: n for name, n in commands.items() if n},
            self.stolen - earlier.stolen,
        )


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Stamped deltas: when each was received and sent, in nanoseconds of CLOCK_MONOTONIC."""

    pairs: "array[int]"  #: received, sent, received, sent, …
    first_end_ns: int  #: When the first stream ended.

    def count(self, begin_ns: int, end_ns: int) -> int:
        """Return how many deltas arrived between two moments."""
        return sum(begin_ns <= received < end_ns for received in self.pairs[::2])

    def latencies_ms(self, begin_ns: int = 0, end_ns: int = sys.maxsize) -> list[float]:
        """Return the latencies of what arrived between two moments, in ascending order."""
        pairs = zip(self.pairs[::2], self.pairs[1::2], strict=True)
        return sorted((received - sent) / 1e6 for received, sent in pairs if begin_ns <= received < end_ns)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a round."""

    load: Load
    used: Reading  #: From just before the jobs were submitted to the last end mark.
    failed: int
    messages: int  #: Received by the follower; merged deltas are one message.
    arrivals: Arrivals  #: Empty unless the load is stamped.


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured point, as stored in ``results.json``."""

    measure: str
    contender: str
    metrics: Mapping[str, float]
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    repetition: int = 0


class Bench:
    """Runs contenders and rounds for the measures."""

    def __init__(self, services: Services, cores: Cores, directory: Path, *, quick: bool, repeat: int) -> None:
        """Keep the run's choices; nothing is started yet."""
        self.services = services
        self.cores = cores
        self.quick = quick
        self.repeat = repeat
        self.samples: list[Sample] = []
        self.valkey_version = str(services.redis.info("server").get("valkey_version", "unknown"))
        self.all_pools = tuple(pool for pool in TUTORIALS if pool != "gevent" or importlib.util.find_spec("gevent"))
        self.pools = ("threads",) if quick else self.all_pools
        self.concurrency = {"prefork": 2, "threads": 16, "gevent": 64, "asyncio": 16}  #: Tuned by ``tune``.
        self._directory = directory
        self._numbers = itertools.count(1)
        self._began = time.monotonic()
        self._stolen_before = stolen_seconds()

    @property
    def stolen_share(self) -> float:
        """The share of a core that the host has given to other machines since the run began."""
        return (stolen_seconds() - self._stolen_before) / (time.monotonic() - self._began)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{time.monotonic() - self._began:6.0f} s] {text}", file=sys.stderr, flush=True)

    def record(self, sample: Sample) -> None:
        """Keep a sample and show it."""
        self.samples.append(sample)
        parameters = " ".join(f"{name}={value}" for name, value in sample.parameters.items())
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in sample.metrics.items())
        self.say(f"{sample.measure:<13} {sample.contender:<17} {parameters}: {metrics}")

    @contextmanager
    def keepstream(
        self,
        name: str = KEEPSTREAM,
        *,
        database: str = "sqlite",
        events_url: str | None = None,
        warm: bool = True,
    ) -> Iterator[Contender]:
        """Run this project's worker, or the variant of it that has this name."""
        number, log = self._number_and_log(KEEPSTREAM)
        url = self.services.new_database(database, f"keepstream-{number}")
        worker = Keepstream(name, self.services, url, self.cores.worker, log, events_url)
        yield from self._running(worker, warm=warm)

    @contextmanager
    def tutorial(
        self,
        pool: str,
        *,
        concurrency: int | None = None,
        database: str = "sqlite",
        events_url: str | None = None,
        warm: bool = True,
    ) -> Iterator[Contender]:
        """Run the tutorial's worker, by default at the pool's best concurrency."""
        number, log = self._number_and_log(pool)
        url = self.services.new_database(database, f"tutorial-{number}")
        slots = concurrency or self.concurrency[pool]
        worker = Tutorial(pool, slots, self.services, url, self.cores.worker, log, events_url)
        yield from self._running(worker, warm=warm)

    @contextmanager
    def floor(self) -> Iterator[Contender]:
        """Run the floor."""
        _, log = self._number_and_log(FLOOR)
        yield from self._running(Floor(self.services, self.cores.worker, log), warm=True)

    def _running(self, contender: Contender, *, warm: bool) -> Iterator[Contender]:
        try:
            if warm:  # imports, connections and first allocations are not measured
                self.round(contender, Load(streams=20, deltas=20), timeout=_START_SECONDS)
            yield contender
        finally:
            contender.process.close()

    def round(self, contender: Contender, load: Load, *, timeout: float = _ROUND_SECONDS) -> Outcome:
        """Run a load to its end.

        Raises:
            BenchmarkError: the worker or the follower ended, the round took too long, or the database does not hold
                every character that the provider sent.
        """
        with self.started_round(contender, load, timeout=timeout, wait_for_start=False) as running:
            pass
        return running.outcome()

    @contextmanager
    def started_round(
        self, contender: Contender, load: Load, *, timeout: float = _ROUND_SECONDS, wait_for_start: bool = True
    ) -> Iterator["Round"]:
        """Submit a stamped load; enter once every stream has delivered a delta; on leaving, wait for the end."""
        jobs = [f"{contender.name}-{next(self._numbers)}" for _ in range(load.streams)]
        stored = contender.stored_characters()
        order = {
            "channels": [contender.channel(job) for job in jobs],
            "ended": contender.ended,
            "failed": contender.failed,
        }
        with self._follower(order, load, "--redis-port", str(self.services.redis_port)) as (follower, file):
            running = Round(self, contender, load, follower)
            contender.submit(jobs, load.script())
            try:
                if wait_for_start:
                    follower.expect("started", timeout, contender.process)
                    running.started_ns = time.monotonic_ns()
                yield running
                running.finish(follower.expect("ended", timeout, contender.process), file)
            except TimeoutError as error:
                raise contender.process.failure(f"did not finish {load} in {timeout:.0f} s") from error
        if failed := running.outcome().failed:
            self.say(f"{contender.name}: {failed} jobs failed: {contender.explain_failures()}")
        elif stored is not None:
            missing = load.characters - ((contender.stored_characters() or 0) - stored)
            if missing:
                raise BenchmarkError(f"{contender.name} stored {missing} characters less than it was sent")

    def read_directly(self, load: Load) -> Arrivals:
        """Read a stamped load directly from the provider, on the worker's core."""
        order = {"streams": load.streams, "script": load.script()}
        with self._follower(order, load, "--base-url", self.services.base_url) as (reader, file):
            return _arrivals(reader.expect("ended", _ROUND_SECONDS), file)

    def read(self, process: Process) -> Reading:
        """Return the counters now."""
        services = self.services.read()
        return Reading(time.monotonic(), process.cpu_seconds(), *services, stolen_seconds())

    def start(self, name: str, command: list[str], cores: frozenset[int] | None = None) -> Process:
        """Start a process of the harness; the caller stops it."""
        return Process(name, command, cores or self.cores.rest, self._directory / f"{name}.log", speaks=True)

    @contextmanager
    def _follower(self, order: dict[str, Any], load: Load, *arguments: str) -> Iterator[tuple[Process, Path]]:
        file = self._directory / f"stamps-{next(self._numbers)}"
        stamps = ("--stamps", str(file)) if load.stamped else ()
        cores = self.cores.worker if "streams" in order else self.cores.rest
        follower = self.start("follower", python("benchmarks.followers", *arguments, *stamps), cores)
        try:
            follower.send(order)
            follower.expect("ready", _START_SECONDS)
            yield follower, file
            with suppress(subprocess.TimeoutExpired):
                follower.wait(1)
        finally:
            follower.close()
            file.unlink(missing_ok=True)

    def new_file(self, name: str) -> Path:
        """Return a path that no other file of the run has."""
        return self._directory / f"{next(self._numbers)}-{name}"

    def _number_and_log(self, name: str) -> tuple[int, Path]:
        number = next(self._numbers)
        return number, self._directory / f"{name}-{number}.log"


class Round:
    """A load in progress."""

    def __init__(self, bench: Bench, contender: Contender, load: Load, follower: Process) -> None:
        """Read the counters; the jobs are submitted next."""
        self._bench = bench
        self._contender = contender
        self._load = load
        self._follower = follower
        self._outcome: Outcome | None = None
        self.started_ns = 0  #: When every stream had delivered a delta.
        self.before = bench.read(contender.process)

    def read(self) -> Reading:
        """Return the counters now."""
        return self._bench.read(self._contender.process)

    def finish(self, result: dict[str, Any], file: Path) -> None:
        """Take in the follower's last line."""
        used = self.read().since(self.before)
        self._outcome = Outcome(
            self._load, used, int(result["failed"]), int(result["messages"]), _arrivals(result, file)
        )

    def outcome(self) -> Outcome:
        """Return the result of the round, once it is over."""
        assert self._outcome is not None
        return self._outcome


def _arrivals(result: dict[str, Any], file: Path) -> Arrivals:
    pairs = array("q")
    if file.exists():
        pairs.frombytes(file.read_bytes())
    return Arrivals(pairs, int(result["first_end_ns"]))


def stolen_seconds() -> float:
    """Return the seconds, over all cores, in which this machine was ready to run but its host ran others."""
    return float(psutil.cpu_times().steal)


def percentile(ascending: list[float], share: float) -> float:
    """Return the value below which ``share`` of an ascending list lies; nan if it is empty."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))] if ascending else float("nan")
