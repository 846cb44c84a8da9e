"""The engine: the life of a job, attempt by attempt.

In: valid jobs, from the task; requests to stop, from cancel, shutdown and the fences.  Out: rows by way
of the database, events by way of the publisher.  Exists so that the order of things, on which every
promise rests, can be read in one place:

    claim → acknowledge → attempt.started → stream → attempt.finished → commit → terminal event

Whatever happens in between ends in exactly one ``Ending``, which names the attempt's number: if another
worker has taken the job over, the database refuses it and this worker stops.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import Choice, JobStatus, Usage
from keepstream_worker import store
from keepstream_worker.events.payloads import failure_fields, finish_reasons, snapshot_fields, terminal_fields
from keepstream_worker.events.publisher import Flushed, Publication, Publisher
from keepstream_worker.jobs import retry, usage
from keepstream_worker.jobs.active_job import STOP_FAILURES, ActiveJob, Stop
from keepstream_worker.jobs.recovery import LogReader
from keepstream_worker.providers.config import ProviderConfig
from keepstream_worker.providers.provider import ProviderFailure, Providers, Timeouts
from keepstream_worker.providers.stream import Limits, Output, StreamReader
from keepstream_worker.settings import Settings
from keepstream_worker.store import Claim, ClaimRequest, NotEnded, Refusal
from keepstream_worker.store.database import StoreRefusedError, WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import AttemptReason, Delta, Ending, Failure, JobKey, Outcome

log = get_logger()

#: Seconds that a sweeper leaves a short retry to the worker that sleeps through it.
_SWEEPER_COURTESY: Final = 5.0
#: Seconds to wait for Redis to take a terminal event before leaving it to the sweepers.
_ANNOUNCE_TIMEOUT: Final = 10.0
#: Attempts before this one whose partial are looked at: a recovery may itself have died.
_LOOK_BACK: Final = 3


@dataclass(slots=True)
class Attempt:
    """One attempt, as far as it has come."""

    job: Job
    claim: Claim
    key: JobKey
    publication: Publication
    reader: StreamReader
    started: float  #: ``time.monotonic()`` of the request.
    first_output: float | None = None
    finished: bool = False
    carried: list[Choice] | None = None  #: Output of an attempt before, whose worker died.
    provider_request_id: str | None = None

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds from the request to the first output."""
        return None if self.first_output is None else round((self.first_output - self.started) * 1000, 3)


class Engine:
    """Runs jobs. Made and used on the event loop."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        database: WorkerDatabase,
        publisher: Publisher,
        providers: Providers,
        log_reader: LogReader,
    ) -> None:
        self.active: dict[JobKey, ActiveJob] = {}  #: What runs, waits or is being ended here.
        self._settings = settings
        self._worker_id = worker_id
        self._database = database
        self._publisher = publisher
        self._providers = providers
        self._log_reader = log_reader
        self._backoff = retry.BackoffPolicy(base=settings.backoff_base, cap=settings.backoff_cap)
        self._background: set[asyncio.Task[None]] = set()

    async def run(self, job: Job, accept: Callable[[], None]) -> None:
        """Run ``job`` until it needs no more of this process.

        ``accept`` is called as soon as the job is safe in the database, or is none of ours.
        """
        key = JobKey(job.tenant, job.id)
        if key in self.active:
            accept()  # a duplicate of what is running here
            return
        task = asyncio.current_task()
        assert task is not None
        active = self.active[key] = ActiveJob(task)
        try:
            while True:
                request = ClaimRequest(
                    job, self._worker_id, self._settings.queue, job.total_timeout or self._settings.total_timeout
                )
                claim = await self._database.persist(store.claim, request, "claim")
                accept()
                if isinstance(claim, Refusal):
                    await self._refused(job, claim)
                    return
                active.attempt = claim.attempt
                wait = await self._attempt(active, job, claim)
                if wait is None or wait > self._settings.sleep_limit:
                    return
                active.attempt = 0
                await active.interruptibly(_sleep(wait))
                if active.stop is Stop.INTERRUPTED:
                    await self._database.persist(store.requeue, key, "hand back")
                if active.stopping:
                    return
        finally:
            del self.active[key]

    def request_stop(self, key: JobKey, stop: Stop) -> bool:
        """Ask the run of a job to stop; returns whether it runs here."""
        active = self.active.get(key)
        if active is not None:
            active.request_stop(stop)
        return active is not None

    async def settle(self, timeout: float) -> None:
        """Wait for announcements that are under way, at most ``timeout`` seconds."""
        if self._background:
            await asyncio.wait(self._background, timeout=timeout)

    # -- one attempt --

    async def _attempt(self, active: ActiveJob, job: Job, claim: Claim) -> float | None:
        """Make one attempt; returns the seconds to the next one, or None if there is none to make here."""
        attempt = self._begin(active, job, claim)
        failure = self._not_to_be_started(attempt)
        if failure is None and claim.reason is AttemptReason.WORKER_LOST:
            recovered = await self._recover(attempt)
            if recovered is not None:
                return await self._commit(active, attempt, recovered)
            if claim.tries > self._max_attempts(attempt):
                return await self._commit(active, attempt, self._attempts_exhausted(attempt))
        if failure is None:
            attempt.carried = None
            attempt.publication.send(
                "attempt.started", {"model": job.model, "provider": job.provider, "reason": claim.reason}
            )
            timer = asyncio.get_running_loop().call_later(
                max(claim.remaining_seconds, 0.0), active.request_stop, Stop.TOTAL_TIMEOUT
            )
            try:
                failure = await active.interruptibly(self._stream(active, attempt))
            finally:
                timer.cancel()
            failure = attempt.reader.finish(failure)
            self._publish_output(attempt, attempt.reader.final_deltas)
            if active.stop is Stop.SUPERSEDED:
                await self._abandon(attempt)
                return None
        return await self._commit(active, attempt, self._conclude(active, attempt, failure))

    def _begin(self, active: ActiveJob, job: Job, claim: Claim) -> Attempt:
        key = JobKey(job.tenant, job.id)

        def snapshot() -> dict[str, Any]:
            if attempt.carried is not None:
                return snapshot_fields(attempt.carried, Usage(), finished=attempt.finished)
            output = attempt.reader.output()
            return snapshot_fields(output.choices, self._usage_of(attempt, output), finished=attempt.finished)

        publication = self._publisher.open(
            job.tenant,
            job.id,
            claim.attempt,
            snapshot,
            on_fenced=lambda: active.request_stop(Stop.SUPERSEDED),
            on_cancel=lambda: active.request_stop(Stop.CANCELLED),
        )
        attempt = Attempt(job, claim, key, publication, StreamReader(), started=time.monotonic())
        return attempt

    def _attempts_exhausted(self, attempt: Attempt) -> Ending:
        """The job has killed as many workers as it may have attempts; keep what the last one produced."""
        return Ending(
            key=attempt.key,
            attempt=attempt.claim.attempt,
            worker_id=self._worker_id,
            outcome=Outcome.UNSTARTED,
            status=JobStatus.FAILED,
            choices=attempt.carried or (),
            failure=Failure(code=ErrorCode.WORKER_LOST, message="its workers died, each time"),
            retryable=False,
        )

    def _not_to_be_started(self, attempt: Attempt) -> Failure | None:
        if attempt.claim.expired:
            return Failure(code=ErrorCode.EXPIRED, message="the job waited past its expires_at")
        if attempt.claim.remaining_seconds <= 0:
            return STOP_FAILURES[Stop.TOTAL_TIMEOUT]
        return None

    async def _stream(self, active: ActiveJob, attempt: Attempt) -> Failure | None:
        """Read the provider's answer to its end; returns why it broke off, or None."""
        job = attempt.job
        usage_timer: asyncio.TimerHandle | None = None
        try:
            provider = self._providers.get(job.provider)
            timeouts = self._timeouts(job, provider.config)
            attempt.started = time.monotonic()
            async with provider.stream(job.request, timeouts) as response:
                attempt.provider_request_id = response.provider_request_id
                reader = attempt.reader = self._make_reader(job, provider.config, response.content_type)
                data_events = 0
                async for data in response:
                    deltas = reader.feed(data)
                    if reader.data_events != data_events:
                        data_events = reader.data_events
                        response.note_data()
                    if deltas:
                        self._publish_output(attempt, deltas)
                    if reader.done:
                        break
                    if usage_timer is None and reader.complete:
                        usage_timer = asyncio.get_running_loop().call_later(
                            self._settings.usage_wait, active.request_stop, Stop.USAGE_LATE
                        )
        except ProviderFailure as error:
            return error.failure
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a defect of ours must not leave the job hanging
            log.exception("attempt_defect", tenant=job.tenant, job_id=job.id, attempt=attempt.claim.attempt)
            return Failure(code=ErrorCode.INTERNAL, message=f"internal error ({type(error).__name__})")
        finally:
            if usage_timer is not None:
                usage_timer.cancel()
        return None

    def _timeouts(self, job: Job, config: ProviderConfig) -> Timeouts:
        """The job's own limits go first, then the provider's, then the worker's."""
        given, settings = config.timeouts, self._settings
        return Timeouts(
            connect=given.connect or settings.connect_timeout,
            first_token=job.first_token_timeout or given.first_token or settings.first_token_timeout,
            idle=job.idle_timeout or given.idle or settings.idle_timeout,
        )

    def _make_reader(self, job: Job, config: ProviderConfig, content_type: str | None) -> StreamReader:
        expected = job.request.get("n")
        return StreamReader(
            Limits(
                max_event_bytes=config.limits.max_event_bytes or self._settings.max_event_bytes,
                max_output_bytes=config.limits.max_output_bytes or self._settings.max_output_bytes,
            ),
            done_completes=config.done_completes,
            content_type=content_type,
            expected_choices=expected if isinstance(expected, int) else 1,
            call_seed=job.id,
        )

    def _publish_output(self, attempt: Attempt, deltas: list[Delta]) -> None:
        if deltas:
            if attempt.first_output is None:
                attempt.first_output = time.monotonic()
            attempt.publication.send_deltas(deltas)

    # -- how it ends --

    def _conclude(self, active: ActiveJob, attempt: Attempt, failure: Failure | None) -> Ending:
        """Turn what happened into what becomes of the job."""
        output = attempt.reader.output()
        spent = self._usage_of(attempt, output)
        ending = Ending(
            key=attempt.key,
            attempt=attempt.claim.attempt,
            worker_id=self._worker_id,
            outcome=Outcome.FINISHED,
            status=JobStatus.COMPLETED,
            choices=output.choices,
            usage=spent,
            first_token_ms=attempt.first_token_ms,
            provider_request_id=attempt.provider_request_id,
            provider_details=output.provider_details,
        )
        if failure is None:
            attempt.finished = True
            attempt.publication.send(
                "attempt.finished",
                {"finish_reasons": finish_reasons(output.choices), "usage": spent.model_dump(mode="json")},
            )
            return replace(ending, status=JobStatus.CANCELLED) if active.stop is Stop.CANCELLED else ending
        ending = replace(
            ending,
            failure=failure,
            retryable=retry.is_retryable(failure.code),
            provider_request_id=failure.provider_request_id or attempt.provider_request_id,
        )
        if active.stop is Stop.CANCELLED or failure.code is ErrorCode.CANCELLED:
            return _cancelled(ending)
        if failure.code is ErrorCode.EXPIRED:
            return replace(ending, outcome=Outcome.UNSTARTED, status=JobStatus.EXPIRED)
        failed = Outcome.FAILED if attempt.publication.last_n else Outcome.UNSTARTED
        decision = retry.decide(
            failure,
            attempt=attempt.claim.tries,
            max_attempts=self._max_attempts(attempt),
            remaining_seconds=attempt.claim.remaining_seconds - (time.monotonic() - attempt.started),
            policy=self._backoff,
            random=random.random,
        )
        if not decision.retry:
            return replace(ending, outcome=failed, status=JobStatus.FAILED)
        interrupted = failure.code is ErrorCode.INTERRUPTED
        sleeps_here = not interrupted and decision.delay <= self._settings.sleep_limit
        return replace(
            ending,
            outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
            status=JobStatus.RETRYING,
            retry_in=decision.delay,
            resend_in=decision.delay + (_SWEEPER_COURTESY if sleeps_here else 0.0),
            next_reason=AttemptReason.INTERRUPTED if interrupted else AttemptReason.RETRY,
        )

    async def _commit(self, active: ActiveJob, attempt: Attempt, ending: Ending) -> float | None:
        """Write the ending, then tell; returns the seconds to the next attempt, or None."""
        publication = attempt.publication
        while True:
            closing_events = [] if ending.status is JobStatus.RETRYING else self._closing_events(attempt, ending)
            if ending.status is not JobStatus.RETRYING:
                ending = replace(ending, terminal_event_id=publication.next_id(len(closing_events) + 1))
            try:
                answer = await self._database.persist(store.end, ending, "result")
            except StoreRefusedError as error:
                if not ending.choices:
                    raise
                # A value that the database refuses must not leave the job hanging; what it cost is kept.
                log.exception("result_unstorable", tenant=ending.key.tenant, job_id=ending.key.id)
                ending = _unstorable(ending, error)
                continue
            if answer is not NotEnded.CANCEL_REQUESTED:
                break
            ending = _cancelled(ending)
        known = {"tenant": ending.key.tenant, "job_id": ending.key.id, "attempt": ending.attempt}
        if isinstance(answer, NotEnded):
            log.warning("attempt_superseded", **known)
            return None
        code = ending.failure.code if ending.failure else None
        log.info("attempt_ended", **known, outcome=ending.outcome, status=ending.status, error=code)
        if ending.status is JobStatus.RETRYING:
            publication.send("attempt.failed", failure_fields(ending))
            return None if ending.outcome is Outcome.INTERRUPTED else ending.retry_in
        for type_, fields in closing_events:
            publication.send(type_, fields)
        publication.send(f"job.{ending.status}", terminal_fields(ending, answer))
        self._in_background(self._announce(publication, ending.key))
        return None

    def _closing_events(self, attempt: Attempt, ending: Ending) -> list[tuple[str, dict[str, Any]]]:
        """Events before the terminal one, after which followers hold what the row holds."""
        words = []
        void = ending.status is JobStatus.FAILED
        if void and attempt.publication.last_n:
            words.append(("attempt.failed", failure_fields(ending)))
        if ending.choices and (void or not attempt.publication.last_n):
            words.append(("snapshot", snapshot_fields(ending.choices, ending.usage, finished=False)))
        return words

    async def _abandon(self, attempt: Attempt) -> None:
        """The job is another worker's; what this attempt cost is noted all the same."""
        key, number = attempt.key, attempt.claim.attempt
        log.warning("attempt_superseded", tenant=key.tenant, job_id=key.id, attempt=number)
        spent = self._usage_of(attempt, attempt.reader.output())
        await self._database.persist(store.record_usage, store.LateUsage(key, number, spent), "usage")

    async def _announce(self, publication: Publication, key: JobKey) -> None:
        """Note that the terminal event is out; if it cannot go out now, the sweepers see to it."""
        if await publication.flushed(_ANNOUNCE_TIMEOUT) is Flushed.WAITING:
            publication.forget()  # a long outage must not fill the memory with outputs that are stored anyway
        else:
            await self._database.persist(store.mark_announced, key, "announcement")

    async def _recover(self, attempt: Attempt) -> Ending | None:
        """If the attempt before had finished when its worker died, return its output as this one's."""
        key, number = attempt.key, attempt.claim.attempt
        for before in range(number - 1, max(number - 1 - _LOOK_BACK, 0), -1):
            partial = await self._log_reader.read(key.tenant, key.id, before)
            if partial is None:
                continue
            spent = partial.usage or usage.estimated(attempt.job.messages, partial.choices)
            await self._database.persist(store.record_usage, store.LateUsage(key, before, spent), "usage")
            attempt.carried = partial.choices
            if not partial.finished:
                return None
            attempt.finished = True
            publication = attempt.publication
            publication.send(
                "attempt.started",
                {
                    "model": attempt.job.model,
                    "provider": attempt.job.provider,
                    "reason": attempt.claim.reason,
                    "continues": True,
                },
            )
            publication.send("snapshot", snapshot_fields(partial.choices, spent, finished=True))
            publication.send(
                "attempt.finished",
                {"finish_reasons": finish_reasons(partial.choices), "usage": spent.model_dump(mode="json")},
            )
            log.info("attempt_recovered", tenant=key.tenant, job_id=key.id, attempt=number, of=before)
            return Ending(
                key=key,
                attempt=number,
                worker_id=self._worker_id,
                outcome=Outcome.RECOVERED,
                status=JobStatus.COMPLETED,
                choices=partial.choices,
            )
        return None

    async def _refused(self, job: Job, refusal: Refusal) -> None:
        if refusal is Refusal.OTHER_REQUEST:
            rejection = store.Rejection(
                id=uuid.uuid4().hex,
                reason="the job id is already used for a different request",
                size=0,
                tenant=job.tenant,
                job_id=job.id,
            )
            await self._database.persist(store.reject, rejection, "rejection")
        log.info("claim_refused", tenant=job.tenant, job_id=job.id, reason=refusal)

    def _usage_of(self, attempt: Attempt, output: Output) -> Usage:
        if output.usage is not None:
            return usage.reported(output.usage)
        return usage.estimated(attempt.job.messages, output.choices)

    def _max_attempts(self, attempt: Attempt) -> int:
        return attempt.claim.max_attempts or self._settings.max_attempts

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _sleep(seconds: float) -> Failure | None:
    await asyncio.sleep(seconds)
    return None


def _unstorable(ending: Ending, error: StoreRefusedError) -> Ending:
    return replace(
        ending,
        outcome=Outcome.FAILED,
        status=JobStatus.FAILED,
        choices=(),
        provider_details=None,
        failure=Failure(code=ErrorCode.INTERNAL, message=f"the output could not be stored: {error}"),
        retryable=False,
    )


def _cancelled(ending: Ending) -> Ending:
    return replace(
        ending,
        outcome=ending.outcome if ending.failure is None else Outcome.CANCELLED,
        status=JobStatus.CANCELLED,
        failure=STOP_FAILURES[Stop.CANCELLED],
        retryable=False,
    )
