"""The sweeper: finds the jobs and events that nobody takes care of.

In: the clock; rows that another worker, a client or a lost message left behind.  Out: messages for jobs
that wait without one; jobs of dead workers, released; terminal events, by way of the announcer.  Nothing
depends on one process: every worker sweeps, the statements are atomic, and any survivor does for the rest.
"""

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any, Final

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.client.sender import Sender
from keepstream.errors import BrokerUnavailableError, StoreUnavailableError
from keepstream_worker import store
from keepstream_worker.settings import Settings
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.upkeep.periodic import PeriodicTask
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import JobKey

log = get_logger()

#: Rows of each kind that one sweep takes; the next one follows soon.
_LIMIT: Final = 200
_ANNOUNCEMENTS_AT_ONCE: Final = 20


class Sweeper:
    """Sweeps of one worker process. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        database: WorkerDatabase,
        heartbeat: WorkerHeartbeat,
        announcer: Announcer,
        unreadable_messages: UnreadableMessages,
        sender: Sender,
        broker: redis.asyncio.Redis,
    ) -> None:
        self._settings = settings
        self._database = database
        self._heartbeat = heartbeat
        self._announcer = announcer
        self._unreadable_messages = unreadable_messages
        self._sender = sender
        self._broker = broker
        self._sending = Outage(Server.BROKER, "send jobs again")
        self._paused = False
        self._task: PeriodicTask | None = None

    def start(self) -> None:
        """Sweep in the background."""
        self._task = PeriodicTask(
            "sweep", self._sweep, self._settings.sweep_interval, on_outage=self._heartbeat.note_outage
        )

    def pause(self) -> None:
        """Sweep no more; a sweep that is under way comes to its end."""
        self._paused = True

    async def stop(self) -> None:
        """Stop, in the middle of a sweep if need be."""
        if self._task is not None:
            await self._task.stop()

    async def _sweep(self) -> None:
        if self._paused:
            return
        settings = self._settings
        found = await self._database.run(
            store.sweep,
            store.Sweep(
                lease=settings.lease,
                reap=self._heartbeat.unbroken_for_a_lease,
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
            await self._apart("send jobs again", self._send(found.to_send))
        await self._apart("announce", self._announce(found.unannounced))
        await self._apart("record unreadable messages", self._unreadable_messages.record(limit=_LIMIT))

    async def _apart(self, name: str, step: Coroutine[Any, Any, None]) -> None:
        """Await one step of the sweep; a defect in it must not keep the next from being made."""
        try:
            await step
        except StoreUnavailableError:
            raise
        except Exception:
            log.exception("upkeep_defect", task=name)

    async def _queue_length(self) -> int | None:
        try:
            return int(await self._broker.llen(self._settings.queue))
        except (RedisError, OSError):
            return None

    async def _send(self, texts: list[str]) -> None:
        # As they were stored: a job of a newer version, which this one would refuse, must not hold up the others.
        jobs = [json.loads(text) for text in texts]
        try:
            await asyncio.to_thread(self._sender.send_many, jobs)
            self._sending.worked()
            log.info("jobs_sent_again", count=len(jobs))
        except BrokerUnavailableError as error:
            self._sending.failed(str(error))
            for job in jobs:
                await self._database.run(store.schedule_resend, JobKey(job["tenant"], job["id"]))

    async def _announce(self, keys: list[JobKey]) -> None:
        for start in range(0, len(keys), _ANNOUNCEMENTS_AT_ONCE):
            group = keys[start : start + _ANNOUNCEMENTS_AT_ONCE]
            if not any(await asyncio.gather(*(self._announce_one(key) for key in group))):
                break  # Redis is away; the next sweep tries again

    async def _announce_one(self, key: JobKey) -> bool:
        try:
            return await self._announcer.announce(key)
        except StoreUnavailableError:
            raise
        except Exception:  # a row that cannot be announced must not hold up the others
            log.exception("announcement_defect", tenant=key.tenant, job_id=key.id)
            return True
