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
from keepstream_worker.scheduling.observations import lost_of
from keepstream_worker.settings import Settings
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.upkeep.limits_report import LimitsReport
from keepstream_worker.upkeep.periodic import PeriodicTask
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import JobKey

log = get_logger()

#: Rows of each kind that one sweep takes; the next one follows soon.
_LIMIT: Final = 200
#: Rows of the table of minutes that one sweep in many deletes; they are small, and each minute brings as many anew.
_MINUTES_LIMIT: Final = 5000
#: Each of them may read an output of megabytes.
_ANNOUNCEMENTS_AT_ONCE: Final = 4
#: Sweeps for which a lease lasts: a worker that dies is followed soon, one that is slow is not replaced.
_LEASE_SWEEPS: Final = 4.0
#: Sweeps of which one looks at everything, however old; the others know what was there.
_WHOLE_EVERY: Final = 60
#: Tenants with parked lanes that one sweep has looked at.
_PARKED_AT_ONCE: Final = 100
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
        limits_report: LimitsReport,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._heartbeat = heartbeat
        self._chooser = chooser
        self._announcer = announcer
        self._unreadable_messages = unreadable_messages
        self._limits_report = limits_report
        self._leads = False
        self._turns_from = 0  #: Turns below are deleted.
        self._pools_from = 0  #: Where the walk through the pools goes on.
        self._standings_from = 0  #: Where the one through their standings does.
        self._arrivals_from = 0  #: Where the one through arrivals does that turns have passed by.
        self._parked_after = ""  #: Where the walk through tenants with parked lanes goes on.
        self._until_whole = 0  #: Sweeps until the next one that looks at everything.
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
            self._until_whole = 0
            return
        whole = self._until_whole <= 0
        self._until_whole = _WHOLE_EVERY if whole else self._until_whole - 1
        await self._release_lost(self._request(whole=whole))
        await self._apart("end expired", self._end_expired(self._request(whole=whole)))
        await self._apart("announce", self._announce_missed(self._request(whole=whole)))
        tidying = store.Tidying(
            _LIMIT,
            whole,
            turns_from=self._turns_from,
            pools_from=self._pools_from,
            standings_from=self._standings_from,
            arrivals_from=self._arrivals_from,
            idle_times=self._chooser.idle_times(),
        )
        await self._apart("find late arrivals", self._find_late_arrivals(tidying))
        await self._apart("delete old turns", self._delete_old_turns(tidying))
        await self._apart("delete idle standings", self._delete_idle_standings(tidying))
        if self._chooser.parks_beyond:
            await self._apart("find parked", self._find_parked())
        # The walk goes to its end without a pause: tenants may make pools quicker than one step of it a minute takes.
        if whole or self._pools_from or self._chooser.parks_beyond:
            await self._apart("find waiting pools", self._find_waiting_pools(tidying))
            await self._apart("delete idle pools", self._delete_idle_pools(tidying))
        if whole:
            expiry = store.Expiry(_MINUTES_LIMIT)
            await self._apart("delete old minutes", self._database.run(store.delete_old_minutes, expiry))
        await self._apart("tell limits", self._limits_report.tell())
        await self._apart("record unreadable messages", self._unreadable_messages.record(limit=_LIMIT))

    def _request(self, *, whole: bool) -> store.Sweep:
        return store.Sweep(
            lease=self._settings.lease,
            reap=self._heartbeat.unbroken_for_a_lease,
            asked_at=time.monotonic(),
            max_attempts=self._settings.max_attempts,
            limit=_LIMIT,
            whole=whole,
        )

    async def _release_lost(self, request: store.Sweep) -> None:
        """Let jobs of dead workers go on; not apart: an outage here is one of the heartbeats, too."""
        lost = await self._database.run(store.release_lost, request)
        for released in lost:
            log.warning("worker_lost", tenant=released.key.tenant, job_id=released.key.id)
            self._chooser.observe(lost_of(released))
        if lost:
            self._chooser.wake()

    async def _end_expired(self, request: store.Sweep) -> None:
        ended = await self._database.run(store.end_expired, request)
        self._look_again_if_any(ended)
        await self._announce(ended)

    async def _announce_missed(self, request: store.Sweep) -> None:
        missed = await self._database.run(store.find_unannounced, request)
        self._look_again_if_any(missed)
        await self._announce(missed)

    def _look_again_if_any(self, found: list[JobKey]) -> None:
        """Let the next sweep look at everything, too: more may be there, and what Redis did not take stays."""
        if found:
            self._until_whole = 0

    async def _find_parked(self) -> None:
        step = store.Parked(self._parked_after, _PARKED_AT_ONCE)
        tenants = await self._database.run(store.find_parked, step)
        self._parked_after = tenants[-1] if len(tenants) == _PARKED_AT_ONCE else ""
        self._chooser.look_at(tenants)

    async def _find_late_arrivals(self, tidying: store.Tidying) -> None:
        self._arrivals_from = await self._database.run(store.find_late_arrivals, tidying)

    async def _delete_idle_standings(self, tidying: store.Tidying) -> None:
        self._standings_from = await self._database.run(store.delete_idle_standings, tidying)

    async def _find_waiting_pools(self, tidying: store.Tidying) -> None:
        """See whether turns know where jobs wait: they do, unless what one of them left could not be read."""
        found = await self._database.run(store.find_waiting_pools, tidying)
        self._chooser.find(found)

    async def _delete_idle_pools(self, tidying: store.Tidying) -> None:
        self._pools_from = await self._database.run(store.delete_idle_pools, tidying)

    async def _delete_old_turns(self, tidying: store.Tidying) -> None:
        self._turns_from = await self._database.run(store.delete_old_turns, tidying)

    async def _apart(self, name: str, step: Coroutine[Any, Any, object]) -> None:
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
