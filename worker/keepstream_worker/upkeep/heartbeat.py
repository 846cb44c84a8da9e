"""The heartbeat: this worker's signs of life, and what the database answers to them.

In: the clock.  Out: this worker's row in the database, renewed; requests to stop, to jobs that were
cancelled or taken over by another worker; claims that nothing here runs, released; what the same answer says of work
that waits and of the sweeper's lease, to whoever asked to hear it.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable

from keepstream.errors import StoreUnavailableError
from keepstream_worker import store
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.scheduling.observations import lost_of
from keepstream_worker.settings import Settings
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.upkeep.periodic import PeriodicTask
from keepstream_worker.values import JobKey

log = get_logger()

#: Seconds to tell the others that this worker is gone.
_RETIRE_TIMEOUT = 3.0


class WorkerHeartbeat:
    """Gives one worker process's signs of life. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        database: WorkerDatabase,
        work: WorkerDatabase,
        engine: Engine,
        chooser: Chooser,
        providers: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sweeper_free = False  #: Whether no worker sweeps, as far as is known.
        self._interval = settings.heartbeat_interval
        self._lease = settings.lease
        self._queue = settings.queue
        self._places = settings.concurrency
        self._worker_id = worker_id
        self._database = database
        self._work = work  # for what must not hold up heartbeats
        self._releasing: asyncio.Task[None] | None = None
        self._engine = engine
        self._chooser = chooser
        self._providers = None if providers is None else tuple(sorted(providers))
        self._clock = clock
        self._confirmed_at = 0.0  #: When the last heartbeat was confirmed.
        self._unbroken_since: float | None = None  #: When the first one after the last gap was.
        self._not_running: frozenset[tuple[JobKey, int]] = frozenset()
        self._task: PeriodicTask | None = None

    async def start(self) -> None:
        """Give the first sign of life, then go on in the background."""
        await self.beat()
        self._task = PeriodicTask("heartbeat", self.beat, self._interval, on_outage=self.note_outage)

    async def stop(self) -> None:
        """Stop, and tell the others that this worker is gone."""
        if self._task is not None:
            await self._task.stop()
        if self._releasing is not None:
            self._releasing.cancel()
        try:
            async with asyncio.timeout(_RETIRE_TIMEOUT):
                await self._database.run(store.retire, self._worker_id)
        except (StoreUnavailableError, TimeoutError):
            log.warning("retirement_not_written", consequence="others wait for the lease to run out")

    def note_outage(self) -> None:
        """Note that the database did not answer: it may not have answered the other workers either."""
        self._unbroken_since = None

    @property
    def unbroken_for_a_lease(self) -> bool:
        """Whether this worker's heartbeats have had no gap for a whole lease.

        If not, the silence of other workers proves nothing: in an outage or a stall of the database
        everybody is silent.
        """
        now = self._clock()
        # One that is under way for long may be the beginning of a gap: the answer has not come yet.
        recent = now - self._confirmed_at <= self._lease / 2
        return recent and self._unbroken_since is not None and now - self._unbroken_since > self._lease

    async def beat(self) -> None:
        """Give one sign of life, and act on the database's answer.

        Raises:
            StoreUnavailableError: the database is away.
        """
        active = self._engine.active
        claimed_before = {(key, job.attempt) for key, job in active.items() if job.attempt}
        sign_of_life = store.Heartbeat(
            self._worker_id,
            self._lease,
            self._queue,
            self._places,
            len(active),
            self._chooser.known_turn,
            self._providers,
        )
        result = await self._database.run(store.record_heartbeat, sign_of_life)
        self._note_confirmed(lapsed=result.lapsed)
        self.sweeper_free = result.sweeper_free
        for key in result.cancels:
            self._engine.request_stop(key, Stop.CANCELLED)
        for key, attempt in claimed_before - result.owned:
            # Claimed before the heartbeat and not ours any more: it has ended meanwhile, or was taken over.
            job = active.get(key)
            if job is not None and job.attempt == attempt and job.interruptible:
                log.warning("job_taken_over", tenant=key.tenant, job_id=key.id, attempt=attempt)
                job.request_stop(Stop.SUPERSEDED)
        self._release_unknown_claims(result.owned)
        self._chooser.hear(result.looked)  # last: a defect in it must keep nothing else from being done

    def _note_confirmed(self, *, lapsed: bool) -> None:
        now = self._clock()
        # Half a lease: a shorter stall makes nobody look dead, since a lease is at least three heartbeats.
        if lapsed or self._unbroken_since is None or now - self._confirmed_at > self._lease / 2:
            self._unbroken_since = now
        self._confirmed_at = now

    def _release_unknown_claims(self, owned: frozenset[tuple[JobKey, int]]) -> None:
        """Release claims whose answer was lost: ours in the database for two heartbeats, but not running here."""
        not_running = frozenset(
            claim for claim in owned if claim[0] not in self._engine.active and claim[0] not in self._chooser.expected
        )
        unknown = sorted(not_running & self._not_running)
        self._not_running = not_running
        if unknown and (self._releasing is None or self._releasing.done()):
            self._releasing = asyncio.get_running_loop().create_task(self._release(unknown), name="release")

    async def _release(self, claims: Iterable[tuple[JobKey, int]]) -> None:
        try:
            for key, attempt in claims:
                if key in self._engine.active or key in self._chooser.expected:
                    continue  # it has come meanwhile
                log.warning("unknown_claim_released", tenant=key.tenant, job_id=key.id, attempt=attempt)
                released = await self._work.run(store.release, store.OwnedJob(key, attempt, self._worker_id))
                if released is not None:
                    self._chooser.observe(lost_of(released))
                    self._chooser.wake()
        except StoreUnavailableError:
            pass  # the next heartbeat finds them again
        except Exception:
            log.exception("upkeep_defect", task="release")
