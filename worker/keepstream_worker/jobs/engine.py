"""The engine: the life of a job, attempt by attempt.

In: valid jobs, from the service; requests to stop, from cancels, shutdown and the fences.  Out: rows to
the store, events to the publisher, in the order on which every promise rests:

    claim → acknowledge → attempt.started → stream → attempt.finished → commit → terminal event

Whatever happens in between ends in exactly one ``Ending``, which names the attempt's number: if another
worker has taken the job over, the database refuses it and this worker stops.
"""

import asyncio
import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from keepstream.jobs import Job
from keepstream.results import JobStatus
from keepstream_worker import store
from keepstream_worker.events.closing_events import closing_events, terminal_fields
from keepstream_worker.events.publication import FlushResult, Publication
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.jobs import verdict
from keepstream_worker.jobs.active_job import ActiveJob, Stop
from keepstream_worker.jobs.attempt import Attempt, AttemptStreams
from keepstream_worker.jobs.recovery import Recovery
from keepstream_worker.jobs.retry import BackoffPolicy
from keepstream_worker.settings import Settings
from keepstream_worker.store import Claim, ClaimRequest, NotEnded, Refusal
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.store.error_answers import StoreRefusedError
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import AttemptReason, Ended, Ending, Failure, JobKey, Outcome

log = get_logger()

#: Seconds to wait for Redis to take a terminal event before leaving it to the sweepers.
_ANNOUNCE_TIMEOUT: Final = 10.0


class Engine:
    """Runs jobs. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        database: WorkerDatabase,
        publisher: Publisher,
        streams: AttemptStreams,
        recovery: Recovery,
    ) -> None:
        self.active: dict[JobKey, ActiveJob] = {}  #: What runs, waits or is being ended here.
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._publisher = publisher
        self._streams = streams
        self._recovery = recovery
        self._backoff = BackoffPolicy(base=settings.backoff_base, cap=settings.backoff_cap)
        self._announcements: set[asyncio.Task[None]] = set()

    async def run(self, job: Job, acknowledge: Callable[[], None]) -> None:
        """Run ``job`` until it needs no more of this process.

        Args:
            job: A job that was delivered to this worker.
            acknowledge: Called as soon as the job is safe in the database, or turns out to be nothing to
                do for this worker; perhaps more than once.
        """
        key = JobKey(job.tenant, job.id)
        if key in self.active:
            acknowledge()  # a duplicate of what is running here
            return
        task = asyncio.current_task()
        assert task is not None
        active = self.active[key] = ActiveJob(task)
        try:
            while True:
                claim = await self._claim(job)
                acknowledge()
                if isinstance(claim, Refusal):
                    await self._handle_refusal(job, claim)
                    return
                active.attempt = claim.attempt
                retry_in = await self._attempt(
                    active, Attempt(job, claim, self._publisher, active, self._streams.prompts)
                )
                if retry_in is None or retry_in > self._settings.sleep_limit:
                    return
                active.attempt = 0
                await active.interruptibly(_sleep(retry_in))
                if active.stop is Stop.INTERRUPTED:
                    await self._database.persist(store.requeue, key)
                if active.stopping:
                    return
        finally:
            del self.active[key]

    def request_stop(self, key: JobKey, stop: Stop) -> bool:
        """Ask a job to stop; return whether it runs here."""
        active = self.active.get(key)
        if active is not None:
            active.request_stop(stop)
        return active is not None

    async def wait_for_announcements(self, timeout: float) -> None:
        """Wait for announcements that are under way, at most ``timeout`` seconds."""
        if self._announcements:
            await asyncio.wait(self._announcements, timeout=timeout)

    # -- one attempt --

    async def _claim(self, job: Job) -> Claim | Refusal:
        settings = self._settings
        request = ClaimRequest(job, self._worker_id, settings.queue, job.total_timeout or settings.total_timeout)
        return await self._database.persist(store.claim, request)

    async def _attempt(self, active: ActiveJob, attempt: Attempt) -> float | None:
        """Make one attempt; a defect of ours, which would be met again, ends its job as failed."""
        try:
            return await self._run_attempt(active, attempt)
        except StoreRefusedError:
            raise
        except Exception as error:
            log.exception("attempt_defect", **_ids(attempt))
            ending = verdict.defective(attempt.key, attempt.claim.attempt, self._worker_id, type(error).__name__)
            return await self._commit(attempt, ending)

    async def _run_attempt(self, active: ActiveJob, attempt: Attempt) -> float | None:
        """Make one attempt; return the seconds to the next one, or None if there is none to make here."""
        claim = attempt.claim
        failure = verdict.failure_before_start(expired=claim.expired, remaining_seconds=claim.remaining_seconds)
        if failure is None and claim.reason is AttemptReason.WORKER_LOST:
            ending = await self._recover(attempt)
            if ending is not None:
                return await self._commit(attempt, ending)
        if failure is None:
            attempt.publish_started()
            failure = await self._streams.run(active, attempt)
            if active.stop is Stop.SUPERSEDED:
                await self._abandon(attempt)
                return None
        report = attempt.report(self._worker_id, failure, active.stop)
        if failure is None:
            attempt.publish_finished(report)
        policy = verdict.RetryPolicy(self._max_attempts(attempt), self._backoff, self._settings.sleep_limit)
        return await self._commit(attempt, verdict.decide(report, policy, random.random))

    async def _recover(self, attempt: Attempt) -> Ending | None:
        """Return the ending of a job whose worker died, if the log or the number of attempts decides it."""
        number = attempt.claim.attempt
        partial = await self._recovery.look_back(attempt)
        if partial is not None and partial.finished:
            attempt.publish_carried(partial.choices, partial.usage, partial.provider_details)
            log.info("attempt_recovered", **_ids(attempt), of=partial.attempt)
            return verdict.recovered(attempt.key, number, self._worker_id, partial.choices, partial.provider_details)
        if attempt.claim.tries > self._max_attempts(attempt):
            attempt.carried = partial.choices if partial is not None else []
            return verdict.attempts_exhausted(attempt.key, number, self._worker_id, attempt.carried)
        return None

    async def _commit(self, attempt: Attempt, ending: Ending) -> float | None:
        """Store the ending, then publish it; return the seconds to the next attempt, or None."""
        publication = attempt.publication
        ending, answer = await self._store(attempt, ending)
        if isinstance(answer, NotEnded):
            log.warning("attempt_superseded", **_ids(attempt))
            return None
        code = ending.failure.code if ending.failure else None
        log.info("attempt_ended", **_ids(attempt), outcome=ending.outcome, status=ending.status, error=code)
        for type_, fields in closing_events(ending, announced=publication.last_n > 0):
            publication.send(type_, fields)
        if ending.status is JobStatus.RETRYING:
            return None if ending.outcome is Outcome.INTERRUPTED else ending.retry_in
        publication.send(f"job.{ending.status}", terminal_fields(ending, answer))
        task = asyncio.get_running_loop().create_task(self._announce(publication, ending.key))
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)
        return None

    async def _store(self, attempt: Attempt, ending: Ending) -> tuple[Ending, Ended | NotEnded]:
        """Store the ending; return it as stored, and the database's answer."""
        publication = attempt.publication
        while True:
            if ending.status.terminal:
                ahead = len(closing_events(ending, announced=publication.last_n > 0)) + 1
                ending = replace(ending, terminal_event_id=publication.next_id(ahead))
            try:
                answer = await self._database.persist(store.end, ending)
            except StoreRefusedError as error:
                if not ending.choices:
                    raise
                # A value that the database refuses must not leave the job hanging.
                log.exception("result_unstorable", tenant=ending.key.tenant, job_id=ending.key.id)
                ending = verdict.unstorable(ending, str(error))
                continue
            if answer is not NotEnded.CANCEL_REQUESTED:
                return ending, answer
            ending = verdict.cancelled(ending)

    async def _announce(self, publication: Publication, key: JobKey) -> None:
        """Note that the terminal event is out; if it cannot go out now, the sweepers see to it."""
        if await publication.wait_flushed(_ANNOUNCE_TIMEOUT) is FlushResult.PENDING:
            publication.discard()  # a long outage must not fill the memory with outputs that are stored anyway
        else:
            await self._database.persist(store.mark_announced, key)

    async def _abandon(self, attempt: Attempt) -> None:
        """Leave the job to the worker that has taken it over; what this attempt cost is stored all the same."""
        log.warning("attempt_superseded", **_ids(attempt))
        spent = attempt.usage_of(attempt.reader.output())
        late_usage = store.LateUsage(attempt.key, attempt.claim.attempt, spent)
        await self._database.persist(store.record_usage, late_usage)

    async def _handle_refusal(self, job: Job, refusal: Refusal) -> None:
        if refusal is Refusal.OTHER_REQUEST:
            rejection = store.Rejection(
                id=uuid.uuid4().hex,
                reason="the job id is already used for a different request",
                size=0,
                tenant=job.tenant,
                job_id=job.id,
            )
            await self._database.persist(store.reject, rejection)
        log.info("claim_refused", tenant=job.tenant, job_id=job.id, reason=refusal)

    def _max_attempts(self, attempt: Attempt) -> int:
        return attempt.claim.max_attempts or self._settings.max_attempts


def _ids(attempt: Attempt) -> dict[str, Any]:
    return {"tenant": attempt.key.tenant, "job_id": attempt.key.id, "attempt": attempt.claim.attempt}


async def _sleep(seconds: float) -> Failure | None:
    await asyncio.sleep(seconds)
    return None
