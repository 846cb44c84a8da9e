"""Choosers: the database's side of many worker processes, without their streams.

In: a database, a queue, a number of workers; a line on standard input as the word to go.
Out: JSON lines ``ready`` and, at the end, ``ended`` with what was chosen in each second, and how long turns took.

Heartbeats, sweeps, turns, claims and endings are the worker's own code; only the stream between a claim and its ending
is left out.  So one process can be many workers, and choice is measured and not the provider.
"""

import argparse
import asyncio
import json
import math
import os
import socket
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Final

import uvloop

from keepstream import names
from keepstream.client.database import make_engine
from keepstream.results import Choice, JobStatus, Usage, UsageSource
from keepstream_worker import store
from keepstream_worker.jobs.active_job import ActiveJob
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.limits import Policy
from keepstream_worker.providers.config import load_policy
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.scheduling.observations import accepted_of, observation_of
from keepstream_worker.settings import Settings, load_settings
from keepstream_worker.store import Claim
from keepstream_worker.store.database import Health, WorkerDatabase
from keepstream_worker.store.one_writer import OneWriter
from keepstream_worker.telemetry.logs import configure_logging
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.upkeep.limits_report import LimitsReport
from keepstream_worker.upkeep.sweeper import Sweeper
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import Ending, JobKey, Outcome, worker_id

_ANSWER: Final = [Choice(index=0, content="word " * 20, finish_reason="stop")]
_USAGE: Final = Usage(prompt_tokens=8, completion_tokens=20, total_tokens=28, source=UsageSource.PROVIDER)
_END_SECONDS: Final = 30.0
_MOST_TIMES: Final = 20_000  #: Turns of which the times are reported.


class _Turns(WorkerDatabase):
    """The way to the turn, which notes how long each takes."""

    seconds: list[float]

    async def run(self, operation: Any, argument: Any) -> Any:
        begin = time.perf_counter()
        result = await super().run(operation, argument)
        if operation is store.take_turn:
            self.seconds.append(time.perf_counter() - begin)
        return result


class _Instant(Engine):
    """An engine whose streams take no time: what it starts, it ends."""

    def __init__(self, worker: str, database: WorkerDatabase) -> None:
        self.active = {}
        self.streams = Counter()
        self.chosen: list[float] = []  #: When each claim came.
        self.keys: list[JobKey] = []
        self.chooser: Chooser
        self.running: set[asyncio.Task[None]] = set()
        self._worker = worker
        self._work = database

    def start(self, claim: Claim) -> bool:
        """End the job that was claimed."""
        self.chosen.append(time.monotonic())
        self.keys.append(claim.key)
        task = asyncio.get_running_loop().create_task(self._end(claim))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        active = self.active[claim.key] = ActiveJob(task)
        active.attempt = claim.attempt
        self.chooser.observe(accepted_of(claim))
        return True

    async def _end(self, claim: Claim) -> None:
        ending = Ending(
            key=claim.key,
            attempt=claim.attempt,
            worker_id=self._worker,
            outcome=Outcome.FINISHED,
            status=JobStatus.COMPLETED,
            choices=_ANSWER,
            usage=_USAGE,
            first_token_ms=1.0,
            terminal_event_id=f"{claim.attempt}-3",
        )
        await self._work.persist(store.end, ending)
        await self._work.persist(store.mark_announced, claim.key)
        del self.active[claim.key]
        self.chooser.observe(observation_of(claim, ending))


class _Announcer(Announcer):
    """Marks what ended as announced; nobody follows."""

    def __init__(self, database: WorkerDatabase) -> None:
        self._work = database

    async def announce(self, key: JobKey, timeout: float = 5.0) -> bool:
        await self._work.run(store.mark_announced, key)
        return True


class _NoMessages(UnreadableMessages):
    """There is no queue, so no message is unreadable."""

    def __init__(self) -> None:
        """Have none."""

    async def record(self, limit: int) -> None:
        pass


class _Worker:
    """One worker, put together as the service does."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self.id = worker_id(socket.gethostname(), os.getpid(), uuid.uuid4().hex[:8])
        health = Health()
        engines = [make_engine(settings.database_url, "keepstream-worker", pool_size=1, writer=True) for _ in range(4)]
        one_writer = OneWriter.of(engines[0])
        beats, work, sweeps = (WorkerDatabase(engine, health, one_writer) for engine in engines[:3])
        self.turns = _Turns(engines[3], health, one_writer, max_group=1)
        self.turns.seconds = []
        self.databases = (beats, work, sweeps, self.turns)
        self.engine = _Instant(self.id, work)
        self.chooser = self.engine.chooser = Chooser(
            policy,
            self.id,
            settings.queue,
            settings.concurrency,
            settings.total_timeout,
            self.turns,
            work,
            self.engine.active.keys(),
            self.engine.streams,
            self.engine.start,
            lambda _queues: None,
        )
        self.heartbeat = WorkerHeartbeat(settings, self.id, beats, sweeps, self.engine, self.chooser)
        self.sweeper = Sweeper(
            settings,
            self.id,
            sweeps,
            self.heartbeat,
            self.chooser,
            _Announcer(sweeps),
            _NoMessages(),
            LimitsReport(policy, sweeps),
        )

    async def start(self) -> None:
        await self.heartbeat.start()
        self.chooser.start()
        self.sweeper.start()

    async def stop(self) -> None:
        self.chooser.pause()
        self.sweeper.pause()
        await self.chooser.settle()
        async with asyncio.timeout(_END_SECONDS):
            while self.chooser.expected or self.engine.running:  # noqa: ASYNC110  # nothing is measured any more
                await asyncio.sleep(0.02)
        await self.sweeper.stop()
        await self.chooser.stop()
        await self.heartbeat.stop()
        for database in self.databases:
            await asyncio.to_thread(database.close)


async def _main(arguments: argparse.Namespace) -> None:
    os.environ[names.ENV_DATABASE_URL] = arguments.url
    os.environ[names.ENV_QUEUE] = arguments.queue
    os.environ["KEEPSTREAM_CONCURRENCY"] = str(arguments.places)
    settings = load_settings()
    policy = load_policy(arguments.providers, {}) if arguments.providers else Policy()
    workers = [_Worker(settings, policy) for _ in range(arguments.workers)]
    _say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    cpu = time.process_time()
    for worker in workers:
        await worker.start()
    await asyncio.sleep(arguments.seconds)
    await asyncio.gather(*(worker.stop() for worker in workers))
    chosen = Counter(math.floor(at) for worker in workers for at in worker.engine.chosen)
    keys = Counter(key for worker in workers for key in worker.engine.keys)
    turns = sorted(seconds for worker in workers for seconds in worker.turns.seconds)
    _say(
        "ended",
        chosen=dict(chosen),  # by the second of the clock that all processes share
        cpu_seconds=time.process_time() - cpu,
        jobs=keys.total(),
        doubles=keys.total() - len(keys),
        turns=len(turns),
        turn_seconds=turns[:: max(1, len(turns) // _MOST_TIMES)],
    )


def _say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosers")
    parser.add_argument("--url", required=True)
    parser.add_argument("--queue", required=True)
    parser.add_argument("--workers", type=int, default=1, help="in this process")
    parser.add_argument("--places", type=int, default=10, help="of each")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--providers", type=Path, help="the providers file, for its limits")
    configure_logging("warning", "json")
    uvloop.run(_main(parser.parse_args()))
