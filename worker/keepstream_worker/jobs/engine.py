"""The engine: the life of one attempt, from its claim to the end of its job or back into the table.

In: claims, from whoever stored or chose the job; requests to stop, from cancels, shutdown and the fences.  Out: rows to
the store, events to the publisher, in the order on which every promise rests:

    claim → attempt.started → stream → attempt.finished → commit → terminal event

Whatever happens in between ends in exactly one ``Ending``, which names the attempt's number: if another
worker has taken the job over, the database refuses it and this worker stops.  What an attempt has taken is told to
whoever counts it.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from keepstream.errors import InvalidJobError
from keepstream.jobs import Job, parse_job
from keepstream.results import JobStatus, Usage
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
from keepstream_worker.store import Claim, NotEnded
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.store.error_answers import StoreRefusedError
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import AttemptReason, Ended, Ending, Failure, JobKey, Target

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
        max_cooldown: Callable[[str], float],
        on_accepted: Callable[[Claim], None] = lambda _claim: None,
        on_end: Callable[[Claim, Ending], None] = lambda _claim, _ending: None,
    ) -> None:
        self.active: dict[JobKey, ActiveJob] = {}  #: What runs or is being ended here.
        self.streams: Counter[Target] = Counter()  #: How many of them, by target.
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._publisher = publisher
        self._streams = streams
        self._recovery = recovery
        self._max_cooldown = max_cooldown
        self._on_accepted = on_accepted
        self._on_end = on_end
        self._backoff = BackoffPolicy(base=settings.backoff_base, cap=settings.backoff_cap)
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcements: set[asyncio.Task[None]] = set()

    def start(self, claim: Claim) -> bool:
        """Run the attempt that was claimed, in the background; return whether it is new here.

        A turn and a message may bring the same claim: the one that comes second finds the job given to this worker.
        """
        earlier = self.active.get(claim.key)
        if earlier is not None and earlier.attempt == claim.attempt:
            return False
        task = asyncio.get_running_loop().create_task(self._run(claim))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if earlier is not None:  # taken from this very worker, while the database had not heard of it for long
            earlier.request_stop(Stop.SUPERSEDED)
        active = self.active[claim.key] = ActiveJob(task)
        active.attempt = claim.attempt
        self.streams[claim.target] += 1
        if claim.cancel_requested:
            active.request_stop(Stop.CANCELLED)
        return True

    async def _run(self, claim: Claim) -> None:
        """Make one attempt; at its end the job is stored, ended or waiting again."""
        active = self.active[claim.key]
        try:
            job = self._read(claim)
            ending: Ending | None = None
            if job is None:
                ending = verdict.unreadable(claim, self._worker_id)
                await self._database.persist(store.end, ending)
            else:
                with self._streams.figures.flow(*claim.target) as flow:
                    attempt = Attempt(job, claim, self._publisher, active, self._streams.prompts, flow)
                    ending = await self._attempt(active, attempt)
                attempt.close()
            self._on_end(claim, ending)
        except StoreRefusedError:
            # No outage, for which it would wait, and not the fault of a value: the sweep finds the job.
            log.exception("job_unstorable", tenant=claim.key.tenant, job_id=claim.key.id)
        except Exception:  # the last resort: the sweep finds the job
            log.exception("job_defect", tenant=claim.key.tenant, job_id=claim.key.id)
        finally:
            self.streams[claim.target] -= 1
            if not self.streams[claim.target]:
                del self.streams[claim.target]
            if self.active.get(claim.key) is active:
                del self.active[claim.key]

    def _read(self, claim: Claim) -> Job | None:
        """Return the job; None if it is of a newer version, whose workers will read it."""
        if isinstance(claim.job, Job):
            return claim.job
        try:
            return parse_job(json.loads(claim.job))
        except (InvalidJobError, ValueError) as error:
            log.warning("job_unreadable", tenant=claim.key.tenant, job_id=claim.key.id, reason=str(error))
            return None

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

    async def _attempt(self, active: ActiveJob, attempt: Attempt) -> Ending:
        """Make one attempt; a defect of ours, which would be met again, ends its job as failed."""
        try:
            return await self._run_attempt(active, attempt)
        except StoreRefusedError:
            raise
        except Exception as error:
            log.exception("attempt_defect", **_ids(attempt))
            ending = verdict.defective(attempt.key, attempt.claim.attempt, self._worker_id, type(error).__name__)
            return await self._commit(attempt, ending)

    async def _run_attempt(self, active: ActiveJob, attempt: Attempt) -> Ending:
        """Make one attempt; return how it ended, whether that could be stored or not."""
        claim = attempt.claim
        failure = verdict.failure_before_start(expired=claim.expired, remaining_seconds=claim.remaining_seconds)
        if failure is None and claim.reason is AttemptReason.WORKER_LOST:
            ending = await self._recover(attempt)
            if ending is not None:
                return await self._commit(attempt, ending)
        if failure is None:
            attempt.publish_started()
            failure = await self._streams.run(active, attempt, lambda: self._on_accepted(claim))
            if active.stop is Stop.SUPERSEDED:
                return await self._abandon(attempt, failure)
        report = attempt.report(self._worker_id, failure, active.stop)
        if failure is None:
            attempt.publish_finished(report)
        policy = verdict.RetryPolicy(
            self._max_attempts(attempt), self._backoff, claim.chain, self._max_cooldown(claim.target.provider)
        )
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

    async def _commit(self, attempt: Attempt, ending: Ending) -> Ending:
        """Store the ending, then publish it; return it as it was stored."""
        publication = attempt.publication
        ending, answer = await self._store(attempt, ending)
        if isinstance(answer, NotEnded):
            log.warning("attempt_superseded", **_ids(attempt))
            await self._record_spent(attempt, ending.usage)
            return ending
        code = ending.failure.code if ending.failure else None
        log.info("attempt_ended", **_ids(attempt), outcome=ending.outcome, status=ending.status, error=code)
        for type_, fields in closing_events(ending, announced=publication.last_n > 0):
            publication.send(type_, fields)
        if ending.status is JobStatus.RETRYING:
            return ending
        publication.send(f"job.{ending.status}", terminal_fields(ending, answer))
        task = asyncio.get_running_loop().create_task(self._announce(publication, ending.key))
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)
        return ending

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

    async def _abandon(self, attempt: Attempt, failure: Failure | None) -> Ending:
        """Leave the job to the worker that has taken it over; what this attempt cost is stored all the same."""
        log.warning("attempt_superseded", **_ids(attempt))
        spent = attempt.usage_of(attempt.reader.output())
        await self._record_spent(attempt, spent)
        return verdict.superseded(attempt.key, attempt.claim.attempt, self._worker_id, spent, failure)

    async def _record_spent(self, attempt: Attempt, spent: Usage) -> None:
        late_usage = store.LateUsage(attempt.key, attempt.claim.attempt, spent)
        await self._database.persist(store.record_usage, late_usage)

    def _max_attempts(self, attempt: Attempt) -> int:
        return attempt.claim.max_attempts or self._settings.max_attempts


def _ids(attempt: Attempt) -> dict[str, Any]:
    return {"tenant": attempt.key.tenant, "job_id": attempt.key.id, "attempt": attempt.claim.attempt}
