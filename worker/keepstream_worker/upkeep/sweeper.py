"""The sweeper: signs of life, and care for what nobody takes care of.

In: the clock.  Out: this worker's heartbeat; messages for jobs that wait without one; jobs of dead
workers released; terminal events announced; unreadable messages recorded.  Exists so that nothing
depends on one process: every worker sweeps, the statements are atomic, and any survivor heals the rest.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
import redis.asyncio
from redis.exceptions import RedisError

from keepstream.client.sender import Sender
from keepstream.errors import BrokerUnavailableError, StoreUnavailableError
from keepstream.jobs import Job, parse_job
from keepstream.names import ID_PATTERN, rejected_list
from keepstream_worker import store
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.settings import Settings
from keepstream_worker.store import Heartbeat, Rejection, Sweep
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.values import JobKey

log = get_logger()

#: Rows of each kind that one sweep takes; the next one follows soon.
_LIMIT: Final = 200
_ANNOUNCEMENTS_AT_ONCE: Final = 20


class Sweeper:
    """Heartbeat and sweeps of one worker process. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        database: WorkerDatabase,
        engine: Engine,
        announcer: Announcer,
        sender: Sender,
        client: redis.asyncio.Redis,
        broker: redis.asyncio.Redis,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._engine = engine
        self._announcer = announcer
        self._sender = sender
        self._client = client
        self._broker = broker
        self._steady_since: float | None = None  #: Since when this worker's own signs of life had no gap.
        self._beaten_at = 0.0  #: When the last of them was confirmed.
        self._orphans: frozenset[tuple[JobKey, int]] = frozenset()
        self._tasks: list[asyncio.Task[None]] = []
        self._sweeping = True

    async def start(self) -> None:
        """Give the first sign of life, then go on in the background."""
        await self._heartbeat()
        self._tasks = [
            asyncio.create_task(self._repeat(self._heartbeat, self._settings.heartbeat_interval), name="heartbeat"),
            asyncio.create_task(self._repeat(self._sweep, self._settings.sweep_interval), name="sweeper"),
        ]

    def pause(self) -> None:
        """Sweep no more; the heartbeat goes on while jobs still run."""
        self._sweeping = False

    async def stop(self) -> None:
        """End the heartbeat and tell the others that this worker is gone."""
        for task in self._tasks:
            task.cancel()
        # Bounded: before Python 3.12 a cancellation may get lost in redis-py's time-outs.
        await asyncio.wait(self._tasks, timeout=2.0)
        try:
            async with asyncio.timeout(3):
                await self._database.run(store.retire, self._worker_id)
        except (StoreUnavailableError, TimeoutError):
            log.warning("retirement_unwritten", consequence="others wait for the lease to run out")

    async def _repeat(self, action: Callable[[], Awaitable[None]], interval: float) -> None:
        while True:
            # Jitter keeps the sweeps of many workers apart.
            await asyncio.sleep(interval * random.uniform(0.8, 1.2))  # noqa: S311  # no secret
            try:
                await action()
            except StoreUnavailableError as error:
                self._steady_since = None
                log.warning("database_unavailable", waiting_to=action.__name__.strip("_"), reason=str(error))
            except Exception:  # one bad sweep must not end all later ones
                log.exception("sweep_defect")

    # -- signs of life --

    async def _heartbeat(self) -> None:
        before = {(key, active.attempt) for key, active in self._engine.active.items() if active.attempt}
        result = await self._database.run(store.record_heartbeat, Heartbeat(self._worker_id, self._settings.lease))
        now = time.monotonic()
        # Half a lease: a stall that is shorter makes nobody look dead, since a lease is three heartbeats at least.
        if result.lapsed or self._steady_since is None or now - self._beaten_at > self._settings.lease / 2:
            self._steady_since = now
        self._beaten_at = now
        for key in result.cancels:
            self._engine.request_stop(key, Stop.CANCELLED)
        runs = self._engine.active
        for key, attempt in before - result.owned:
            # Claimed before the beat and not ours any more: it has ended meanwhile, or was taken over.
            active = runs.get(key)
            if active is not None and active.attempt == attempt and active.interruptible:
                log.warning("job_taken_over", tenant=key.tenant, job_id=key.id, attempt=attempt)
                active.request_stop(Stop.SUPERSEDED)
        orphans = frozenset(held for held in result.owned if held[0] not in runs)
        for key, attempt in orphans & self._orphans:
            # Ours in the database for two beats, but not running here: a claim whose answer was lost.
            log.warning("job_orphaned", tenant=key.tenant, job_id=key.id, attempt=attempt)
            await self._database.run(store.release, store.OwnedJob(key, attempt, self._worker_id))
        self._orphans = orphans

    def _may_reap(self) -> bool:
        """Whether others' silence proves anything: after an outage or a stall of the database everybody was silent."""
        return self._steady_since is not None and time.monotonic() - self._steady_since > self._settings.lease

    # -- sweeps --

    async def _sweep(self) -> None:
        if not self._sweeping:
            return
        settings = self._settings
        found = await self._database.run(
            store.sweep,
            Sweep(
                lease=settings.lease,
                reap=self._may_reap(),
                asked_at=time.monotonic(),
                resend_after=settings.resend_after,
                queue=settings.queue,
                queue_length=await self._queue_length(),
                max_attempts=settings.max_attempts,
                limit=_LIMIT,
            ),
        )
        for key in found.lost:
            log.warning("worker_lost", tenant=key.tenant, job_id=key.id)
        if found.to_send:
            # By the decoder that the job came through: pydantic's own refuses lone surrogates, and deep nesting.
            await self._send([parse_job(json.loads(request)) for request in found.to_send])
        for start in range(0, len(found.unannounced), _ANNOUNCEMENTS_AT_ONCE):
            keys = found.unannounced[start : start + _ANNOUNCEMENTS_AT_ONCE]
            announced = await asyncio.gather(*(self._announcer.announce(key) for key in keys))
            if not any(announced):
                break  # Redis is away; the next sweep tries again
        await self._record_unreadable()

    async def _queue_length(self) -> int | None:
        try:
            return int(await self._broker.llen(self._settings.queue))
        except (RedisError, OSError):
            return None

    async def _send(self, jobs: list[Job]) -> None:
        try:
            await asyncio.to_thread(self._sender.send_many, [job.to_wire() for job in jobs])
            log.info("jobs_sent_again", count=len(jobs))
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", waiting_to="send jobs again", reason=str(error))
            for job in jobs:
                await self._database.run(store.schedule_resend, JobKey(job.tenant, job.id))

    async def _record_unreadable(self) -> None:
        """Move what the transport kept aside into the database."""
        name = rejected_list(self._settings.prefix)
        try:
            records: list[Any] = await self._client.lrange(name, -_LIMIT, -1)
            for raw in records:
                await self._database.run(store.reject, _rejection(raw))
                # Removed only when recorded; two sweepers that record the same one write one row.
                await self._client.lrem(name, -1, raw)
        except (RedisError, OSError) as error:
            log.warning("redis_unavailable", waiting_to="record unreadable messages", reason=type(error).__name__)


def _rejection(raw: bytes) -> Rejection:
    record = orjson.loads(raw)
    task_id = record["task_id"]
    return Rejection(
        id=record["id"],
        reason=record["reason"],
        size=record["size"],
        payload=record["payload"],
        job_id=task_id if task_id and re.fullmatch(ID_PATTERN, task_id) else None,  # the task id is the job id
    )
