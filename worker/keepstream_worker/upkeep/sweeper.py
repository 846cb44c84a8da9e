"""The sweeper: finds the jobs and events that nobody takes care of.

In: the clock; rows that another worker or a client left behind.  Out: jobs of dead workers, waiting again or ended;
terminal events, by way of the announcer; rows that nobody needs any more, deleted.  One worker sweeps for all, as long
as it renews its lease; when it does not, any other one goes on.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

from keepstream.errors import StoreUnavailableError
from keepstream_worker import store
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.settings import Settings
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.upkeep.periodic import PeriodicTask
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import JobKey

log = get_logger()

#: Rows of each kind that one sweep takes; the next one follows soon.
_LIMIT: Final = 200
#: Each of them may read an output of megabytes.
_ANNOUNCEMENTS_AT_ONCE: Final = 4
#: Sweeps for which a lease lasts: a worker that dies is followed soon, one that is slow is not replaced.
_LEASE_SWEEPS: Final = 4.0
#: Seconds to give the lease up at the end.
_RELEASE_TIMEOUT: Final = 2.0


class Sweeper:
    """Sweeps of one worker process, if it is the one to sweep. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        database: WorkerDatabase,
        heartbeat: WorkerHeartbeat,
        chooser: Chooser,
        announcer: Announcer,
        unreadable_messages: UnreadableMessages,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._heartbeat = heartbeat
        self._chooser = chooser
        self._announcer = announcer
        self._unreadable_messages = unreadable_messages
        self._leads = False
        self._turns_from = 0  #: Turns below are deleted.
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
        """Stop, in the middle of a sweep if need be, and let another worker sweep."""
        if self._task is not None:
            await self._task.stop()
        if self._leads:
            try:
                async with asyncio.timeout(_RELEASE_TIMEOUT):
                    await self._database.run(store.lead, store.Candidacy(self._worker_id, 0.0))
            except (StoreUnavailableError, TimeoutError):
                pass  # the lease runs out

    async def _sweep(self) -> None:
        if self._paused or not (self._leads or self._heartbeat.sweeper_free):
            return
        settings = self._settings
        candidacy = store.Candidacy(self._worker_id, _LEASE_SWEEPS * settings.sweep_interval)
        self._leads = await self._database.run(store.lead, candidacy)
        if not self._leads:
            return
        found = await self._database.run(
            store.sweep,
            store.Sweep(
                lease=settings.lease,
                reap=self._heartbeat.unbroken_for_a_lease,
                asked_at=time.monotonic(),
                max_attempts=settings.max_attempts,
                limit=_LIMIT,
            ),
        )
        for key in found.lost:
            log.warning("worker_lost", tenant=key.tenant, job_id=key.id)
        if found.lost:
            self._chooser.wake()
        await self._apart("announce", self._announce(found.unannounced))
        await self._apart("tidy", self._tidy())
        await self._apart("record unreadable messages", self._unreadable_messages.record(limit=_LIMIT))

    async def _tidy(self) -> None:
        """Delete rows that nobody needs any more, apart from the sweep, whose work a time-out here must not undo."""
        tidying = store.Tidying(_LIMIT, self._turns_from, self._chooser.idle_times())
        self._turns_from = await self._database.run(store.tidy, tidying)

    async def _apart(self, name: str, step: Coroutine[Any, Any, None]) -> None:
        """Await one step of the sweep; whatever it meets must not keep the next from being made.

        Nor is an outage here one of the heartbeats: that one step ran out of time says nothing of other workers.
        """
        try:
            await step
        except StoreUnavailableError:
            pass  # it is said; the next sweep tries again
        except Exception:
            log.exception("upkeep_defect", task=name)

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
