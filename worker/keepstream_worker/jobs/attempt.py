"""One attempt: its provider stream, read to the end, and everything known about it meanwhile.

In: a job and its claim, from the engine; requests to stop; the provider's bytes.  Out: deltas to the
publisher while the stream lasts; then the failure that ended it, or None, and a report, to the engine.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import Choice, Usage
from keepstream_worker.events.closing_events import finished_fields, snapshot_fields
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.jobs import usage
from keepstream_worker.jobs.active_job import ActiveJob, Stop
from keepstream_worker.jobs.verdict import AttemptReport
from keepstream_worker.limits import RateLimits
from keepstream_worker.providers.config import ProviderConfig
from keepstream_worker.providers.provider import ProviderFailure, Providers, ProviderStream, Timeouts
from keepstream_worker.providers.stream import Limits, Output, StreamReader
from keepstream_worker.settings import Settings
from keepstream_worker.store import Claim
from keepstream_worker.telemetry.figures import Figures, Flow
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import Delta, Failure, JobKey

log = get_logger()

#: Seconds within which a provider refuses what it has no room for; what it answers takes longer, if the model thinks.
_REFUSED_WITHIN: Final = 0.5
_MOST_DOUBLINGS: Final = 32  #: Keeps the power finite; the total time is used up long before.


class Attempt:
    """One attempt, as far as it has come."""

    __slots__ = (
        "_first_output_at",
        "_flow",
        "_prompts",
        "_requested_at",
        "carried",
        "claim",
        "finished",
        "job",
        "key",
        "provider_request_id",
        "publication",
        "rate_limits",
        "reader",
        "target",
    )

    def __init__(
        self,
        job: Job,
        claim: Claim,
        publisher: Publisher,
        active: ActiveJob,
        prompts: usage.PromptSizes,
        flow: Flow,
    ) -> None:
        self.job = job
        self.claim = claim
        self.key = JobKey(job.tenant, job.id)
        self.target = claim.target
        self.publication = publisher.open(
            job.tenant,
            job.id,
            claim.attempt,
            self._snapshot,
            on_fenced=lambda: active.request_stop(Stop.SUPERSEDED),
            on_cancel=lambda: active.request_stop(Stop.CANCELLED),
        )
        self.reader = StreamReader()
        self.finished = False  #: Whether the answer is whole.
        self._prompts = prompts
        self._flow = flow
        self.carried: list[Choice] | None = None  #: Output of an earlier attempt, whose worker died.
        self.provider_request_id: str | None = None
        self.rate_limits: RateLimits | None = None  #: As the answer's head says.
        self._requested_at = time.monotonic()
        self._first_output_at: float | None = None

    def close(self) -> None:
        """Let go of the publication, which holds on to this attempt while it has something to send.

        Two that hold each other would stay until the garbage collector looks for such, and it stops the process.
        """
        del self.publication

    @property
    def request(self) -> dict[str, Any]:
        """The request as it goes to the target: a fallback names its own model."""
        if self.job.model == self.target.model:
            return self.job.request
        return self.job.request | {"model": self.target.model}

    def begin_request(self) -> None:
        """Note that the request goes out now."""
        self._requested_at = time.monotonic()

    def publish_output(self, deltas: list[Delta]) -> None:
        """Publish what the provider has added to the output."""
        if deltas:
            if self._first_output_at is None:
                self._first_output_at = time.monotonic()
                self._flow.note_first_output(self._first_output_at - self._requested_at)
            self._flow.deltas += len(deltas)
            self.publication.send_deltas(deltas)

    def publish_started(self, **fields: bool) -> None:
        """Publish ``attempt.started``."""
        about = {"model": self.target.model, "provider": self.target.provider, "reason": self.claim.reason}
        self.publication.send("attempt.started", about | fields)

    def publish_finished(self, report: AttemptReport) -> None:
        """Publish ``attempt.finished``: the answer is whole."""
        self.finished = True
        self.publication.send(
            "attempt.finished", finished_fields(report.choices, report.usage, report.provider_details)
        )

    def publish_carried(self, choices: list[Choice], spent: Usage, details: dict[str, Any] | None) -> None:
        """Publish the whole answer of an earlier attempt as this one's."""
        self.carried = choices
        self.finished = True
        self.publish_started(continues=True)
        self.publication.send("snapshot", self._snapshot_of(choices, spent, details))
        self.publication.send("attempt.finished", finished_fields(choices, spent, details))

    def report(self, worker_id: str, failure: Failure | None, stop: Stop | None) -> AttemptReport:
        """Return what the verdict is to be based on."""
        output = self.reader.output()
        if output.usage is not None:
            self._prompts.learn(self.target.provider, self.request, output.usage["prompt_tokens"])
        first_token_ms = None
        if self._first_output_at is not None:
            first_token_ms = round((self._first_output_at - self._requested_at) * 1000, 3)
        return AttemptReport(
            key=self.key,
            attempt=self.claim.attempt,
            worker_id=worker_id,
            tries=self.claim.tries,
            announced=self.publication.last_n > 0,
            remaining_seconds=self.claim.remaining_seconds - (time.monotonic() - self._requested_at),
            failure=failure,
            stop=stop,
            choices=output.choices,
            usage=self.usage_of(output),
            first_token_ms=first_token_ms,
            provider_request_id=self.provider_request_id,
            provider_details=output.provider_details,
            rate_limits=self.rate_limits,
        )

    def usage_of(self, output: Output) -> Usage:
        """Return what the output cost: as reported, else as estimated."""
        return usage.reported(output.usage) if output.usage is not None else self.estimated_usage(output.choices)

    def estimated_usage(self, choices: list[Choice]) -> Usage:
        """Return the estimated cost of ``choices`` and of this job's prompt."""
        return usage.estimated(self._prompts.tokens(self.target.provider, self.request), choices)

    def _snapshot(self) -> dict[str, Any]:
        if self.carried is not None:
            return self._snapshot_of(self.carried, Usage(), None)
        output = self.reader.output()
        return self._snapshot_of(output.choices, self.usage_of(output), output.provider_details)

    def _snapshot_of(self, choices: list[Choice], spent: Usage, details: dict[str, Any] | None) -> dict[str, Any]:
        return snapshot_fields(
            choices, spent, finished=self.finished, details=details, live_bytes=self.reader.limits.live_extra_bytes
        )


def first_token_timeout(first: float, *, tries: int, remaining_seconds: float) -> float:
    """Return an attempt's first-token time-out: a model that thinks long will think as long again.

    Args:
        first: The first attempt's, in seconds.
        tries: Attempts that count against the job's limit, this one included; each doubles the time-out.
        remaining_seconds: Until the job's total time is used up; a longer time-out means nothing.
    """
    doublings = min(max(tries - 1, 0), _MOST_DOUBLINGS)
    return max(min(first * 2.0**doublings, remaining_seconds), min(first, 1.0))


class AttemptStreams:
    """Makes the provider streams of attempts. Used on the event loop."""

    def __init__(self, settings: Settings, providers: Providers, figures: Figures) -> None:
        self.prompts = usage.PromptSizes()
        self.figures = figures
        self._settings = settings
        self._providers = providers

    async def run(self, active: ActiveJob, attempt: Attempt, on_accepted: Callable[[], None]) -> Failure | None:
        """Stream until the answer ends, fails or is stopped; return why it is not whole, or None if it is.

        ``on_accepted`` is called once, when the provider has taken the request: it begins to answer, or refuses not.
        """
        timer = asyncio.get_running_loop().call_later(
            max(attempt.claim.remaining_seconds, 0.0), active.request_stop, Stop.TOTAL_TIMEOUT
        )
        try:
            failure = await active.interruptibly(self._read(active, attempt, on_accepted))
        finally:
            timer.cancel()
        failure = attempt.reader.finish(failure)
        attempt.publish_output(attempt.reader.final_deltas)
        return failure and self._scrubbed(attempt.target.provider, failure)

    def _scrubbed(self, provider: str, failure: Failure) -> Failure:
        if failure.provider_error is None:
            return failure
        return self._providers.get(provider).scrubbed(failure)

    async def _read(self, active: ActiveJob, attempt: Attempt, on_accepted: Callable[[], None]) -> Failure | None:
        """Read the provider's answer to its end; return why it broke off, or None."""
        job = attempt.job
        loop = asyncio.get_running_loop()
        usage_timer: asyncio.TimerHandle | None = None
        taken_timer: asyncio.TimerHandle | None = None

        def note_taken() -> None:
            nonlocal taken_timer
            if taken_timer is not None:
                taken_timer.cancel()
                taken_timer = None
                on_accepted()

        try:
            provider = self._providers.get(attempt.target.provider)
            timeouts = self._timeouts(job, provider.config, attempt.claim)
            attempt.begin_request()
            taken_timer = loop.call_later(_REFUSED_WITHIN, note_taken)
            async with provider.stream(attempt.request, timeouts) as response:
                attempt.provider_request_id = response.provider_request_id
                attempt.rate_limits = response.rate_limits
                note_taken()
                reader = attempt.reader = self._make_reader(job, provider.config, response)
                data_events = 0
                async for data in response:
                    deltas = reader.feed(data)
                    if reader.data_events != data_events:
                        data_events = reader.data_events
                        response.note_data()
                    if deltas:
                        attempt.publish_output(deltas)
                    if reader.done:
                        break
                    if usage_timer is None and reader.complete:
                        usage_timer = loop.call_later(self._settings.usage_wait, active.request_stop, Stop.USAGE_LATE)
        except ProviderFailure as error:
            return error.failure
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a defect of ours must not leave the job hanging
            log.exception("attempt_defect", tenant=job.tenant, job_id=job.id, attempt=attempt.claim.attempt)
            return Failure(code=ErrorCode.INTERNAL, message=f"internal error ({type(error).__name__})")
        finally:
            for timer in (usage_timer, taken_timer):
                if timer is not None:
                    timer.cancel()
        return None

    def _timeouts(self, job: Job, config: ProviderConfig, claim: Claim) -> Timeouts:
        """The job's own limits come first, then the provider's, then the worker's."""
        given, settings = config.timeouts, self._settings
        chosen = job.first_token_timeout or given.first_token

        def first_token(default: float) -> float:
            return first_token_timeout(chosen or default, tries=claim.tries, remaining_seconds=claim.remaining_seconds)

        return Timeouts(
            connect=given.connect or settings.connect_timeout,
            first_token=first_token(settings.first_token_timeout),
            first_token_by_responses=first_token(settings.responses_first_token_timeout),
            idle=job.idle_timeout or given.idle or settings.idle_timeout,
        )

    def _make_reader(self, job: Job, config: ProviderConfig, response: ProviderStream) -> StreamReader:
        expected = job.request.get("n")
        return StreamReader(
            Limits(
                max_event_bytes=config.limits.max_event_bytes or self._settings.max_event_bytes,
                max_output_bytes=config.limits.max_output_bytes or self._settings.max_output_bytes,
                max_extra_bytes=config.limits.max_extra_bytes or self._settings.max_extra_bytes,
                live_extra_bytes=self._settings.live_extra_bytes,
            ),
            done_completes=config.done_completes,
            content_type=response.content_type,
            expected_choices=expected if isinstance(expected, int) else 1,
            call_seed=job.id,
            responses=response.by_responses,
        )
