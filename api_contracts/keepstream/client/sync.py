"""The sync client: how a service submits jobs, follows and cancels them, and queries their results.

In: calls of a service, from any thread.  Out: typed events and results to the caller; jobs on the queue and
in the database::

    with Client.from_env() as client:
        job_id = client.enqueue(model="gpt-5-mini", messages=[{"role": "user", "content": "Hello"}])
        for event in client.follow(job_id):
            print(event)
        print(client.get(job_id).text)
"""

from collections.abc import Callable, Collection, Generator, Mapping
from datetime import datetime
from typing import Any, Self, TypeVar

from keepstream.client.base import FOLLOW_TIMEOUT, NOT_FOUND_AFTER, WAIT_TIMEOUT, BaseClient
from keepstream.client.follower import FollowerRun, ReadSummary
from keepstream.client.listing import make_wanted
from keepstream.client.payloads import RAW, TYPED
from keepstream.client.redis import DatabaseRead
from keepstream.events import Event, RawEvent
from keepstream.jobs import Job
from keepstream.results import CompletionResult, JobPage, JobStatus, JobSummary, WaitingFor

E = TypeVar("E")


class Client(BaseClient):
    """Submits, follows, cancels and queries the jobs of one tenant. Thread-safe.

    Args:
        redis_url: Redis server with the events.
        broker_url: Redis server with the queue; by default ``redis_url``.
        database_url: SQLAlchemy URL of the database with the results.  With it, ``enqueue`` writes the job's
            row first, so that a job survives a broker that is down at that moment.  Without it there is no
            ``get``, ``list``, ``wait`` and ``retry``, and ``follow`` knows nothing of a job whose log has expired.
        tenant: Whose jobs.
        prefix: Prefix of the Redis names, as configured for the workers.
        queue: Queue of the workers.

    Raises:
        InvalidSettingError: a URL or name cannot be used.
    """

    def enqueue(self, request: Job | Mapping[str, Any] | None = None, /, **fields: Any) -> str:
        """Accept a job and return its id.

        The same id or ``idempotency_key`` may be enqueued again: it stays one job.

        Args:
            request: The chat-completions body, which goes to the provider as it is, or a whole ``Job``. For a request
                of nothing but a model and messages, ``model=`` and ``messages=`` will do instead. For one with a
                parameter called ``v`` or ``request``, give ``Job(request=...)``.
            fields: The job's other fields: ``metadata``, ``idempotency_key``, ``max_attempts`` and so on; see ``Job``.

        Raises:
            InvalidJobError: the job is not valid, or is another tenant's.
            IdempotencyConflictError: the id or key belongs to a different request.
            StoreUnavailableError: the database did not take it; it is not accepted.
            BrokerUnavailableError: there is no database, and the broker did not take it within seconds.
        """
        return self._perform(self._enqueue, request, fields)

    def follow(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        not_found_after: float = NOT_FOUND_AFTER,
    ) -> Generator[Event]:
        """Iterate over a job's events, past and live, each once and in order, to the terminal event.

        Reconnects by itself.  Ending the iteration early releases the connection.  What keeps the job waiting is
        logged once by the logger ``keepstream``: as a warning what somebody should mend, else as info.

        Args:
            job_id: The job.
            after: Id of the last event the reader has; the iteration begins with the next one.
            timeout: Seconds without any event after which to give up.
            not_found_after: Seconds to wait for a job that is unknown, because it may still be on its way.

        Raises:
            InvalidCursorError: ``after`` is no event id of this job.
            JobNotFoundError: there is no such job; only a client with a database can know.
            FollowTimeoutError: no event came in time, and what the job waits for; to wait longer, follow again after
                the last event.
            EventsLostError: the log has lost events of an ended job, and there is no database to ask.
            InvalidSettingError: Redis does not accept the URL's user, or cannot be used to follow this job.
        """
        return self._events(self._run_follower, job_id, after, timeout, not_found_after, TYPED)

    def follow_raw(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        not_found_after: float = NOT_FOUND_AFTER,
        on_waiting: Callable[[WaitingFor], None] | None = None,
        offer: Callable[[RawEvent], bool] | None = None,
    ) -> Generator[RawEvent]:
        """Iterate over a job's events as ``follow`` does, but pass each on as its bytes: for gateways.

        Nothing but an event's id and type is read of it, so it costs a fraction.  Which events come, and which errors
        are raised, is the same.  What is wrong with the arguments is raised at once, all else by the iteration.

        Args:
            job_id: The job.
            after: Id of the last event the reader has; the iteration begins with the next one.
            timeout: Seconds without any event after which to give up.
            not_found_after: Seconds to wait for a job that is unknown, because it may still be on its way.
            on_waiting: Called with what keeps the job waiting, instead of logging it: each cause once, until the next
                event.  It must not block, and what it raises ends the iteration.
            offer: Called with an event that arrives while the iteration waits for the next one; it returns whether it
                has taken it.  What it takes is not iterated over, what it does not take comes next, and the job's last
                event is not offered.  It must not block, and what it raises ends the iteration.

        Raises:
            KeepstreamError: as ``follow``.
        """
        return self._events(self._run_follower, job_id, after, timeout, not_found_after, RAW, on_waiting, offer)

    def check_follow(self, job_id: str, after: str | None = None) -> bool:
        """Tell at once whether a job can be followed from a cursor: for what must be known before the first event.

        It looks at the newest entry of the log and at the row, and waits for nothing.

        Args:
            job_id: The job.
            after: Id of the last event the reader has.

        Returns:
            True if events are to be expected, now or later; False if the reader already has the terminal event.

        Raises:
            InvalidCursorError: ``after`` is no event id of this job; a cursor that may become good, because a fail-over
                of Redis can take the newest events away for some seconds, is refused by ``follow`` alone.
            JobNotFoundError: there is no such job; only a client with a database can know.
            StoreUnavailableError: the database did not answer, and there is no log.
            BrokerUnavailableError: Redis did not answer, and there is no row.
            InvalidSettingError: Redis does not accept the URL's user, or cannot be used to follow this job.
        """
        return self._perform(self._check_follow, job_id, after)

    def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job, whatever its state, and return its status after that. May be repeated.

        ``running`` means that its worker has been told and stops within moments.  None means that the job is
        unknown, or that there is no database to ask; it is cancelled when a worker receives it.

        Raises:
            JobNotFoundError: no job can have this id.
            StoreUnavailableError: the database did not answer.
            BrokerUnavailableError: Redis did not answer, and the database does not know the job or is not configured.
        """
        return self._perform(self._cancel, job_id)

    def get(self, job_id: str) -> CompletionResult | None:
        """Return a job with everything stored about it, or None if there is no such job.

        Raises:
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        return self._perform(self._get, job_id)

    def list(
        self,
        *,
        status: JobStatus | Collection[JobStatus] | None = None,
        model: str | None = None,
        provider: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        """Return the tenant's jobs, newest first.

        With a filter other than the time it looks at 10,000 jobs at most: if the page's ``looked_back_to`` is set,
        older jobs may fit; its ``next_before`` is the ``before`` to go on with.

        Args:
            status: Only jobs in this state, or in one of these.
            model: Only jobs for this model.
            provider: Only jobs for this provider.
            metadata: Only jobs whose metadata have these values at these names, compared as text.
            since: Only jobs created then or later; an aware time.
            until: Only jobs created before; an aware time.
            before: ``next_before`` of the page before, or the id of its last job.
            limit: Number of jobs at most.

        Raises:
            JobNotFoundError: there is no job ``before``.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        wanted = self._perform(make_wanted, status, model, provider, metadata, since, until)
        return self._perform(self._list, wanted, before, limit)

    def last_numbered(self, prefix: str) -> JobSummary | None:
        """Return, of the jobs whose ids are ``prefix`` and a number (``names.numbered_id``), the one with the highest.

        For jobs that belong together, such as those of a conversation: the last one is found by an index, however many
        jobs are stored.  A prefix consists of small letters and digits.

        Raises:
            InvalidArgumentError: there is another character in the prefix.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        return self._perform(self._last_numbered, prefix)

    def wait(
        self, job_id: str, *, timeout: float = WAIT_TIMEOUT, not_found_after: float = NOT_FOUND_AFTER
    ) -> CompletionResult:
        """Wait until a job has ended, and return its result.

        Args:
            job_id: The job.
            timeout: Seconds to wait at most.
            not_found_after: Seconds to wait for a job that is unknown, because it may still be on its way.

        Raises:
            FollowTimeoutError: it has not ended by then; the message says what it waits for.
            JobNotFoundError: there is no such job.
            NotConfiguredError: the client has no database.
            InvalidSettingError: Redis does not accept the URL's user, or cannot be used to follow this job.
            StoreUnavailableError: the database did not answer when the job had ended.
        """
        for _ in self._events(self._run_waiting, job_id, timeout, not_found_after):
            pass
        return self._perform(self._get_ended, job_id)

    def waiting_for(self, job_id: str) -> WaitingFor | None:
        """Return what keeps a job waiting; None: it runs, or has ended.

        Raises:
            JobNotFoundError: there is no such job.
            NotConfiguredError: the client has no database.
        """
        return self._perform(self._waiting_for, job_id)

    def retry(self, job_id: str, *, force: bool = False) -> str:
        """Run an ended job again, as a new job with the same request, metadata and limits; return the new id.

        Each call makes a new job. The idempotency key and ``expires_at`` are not taken over.

        Args:
            job_id: The job, which stays as it is; the new one's ``retry_of`` names it.
            force: Whether a completed job is to be run again as well.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it has not ended, is completed, or was never valid.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not take it.
        """
        return self._perform(self._retry, job_id, force=force)

    def delete(self, job_id: str) -> bool:
        """Delete an ended job with everything stored about it, and its log; return whether there was such a job.

        A worker that is telling the job's end at this very moment may write its last events once more; they expire as
        every log does.

        Raises:
            JobNotFoundError: no job can have this id.
            JobStateError: it has not ended.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not do it; the job is still there.
            BrokerUnavailableError: Redis did not delete the log; the job is still there.
        """
        return self._perform(self._delete, job_id)

    def close(self) -> None:
        """Close all connections, after the calls under way. Iterations of ``follow`` end with ``ClientClosedError``.

        A client from ``for_tenant`` has none of its own, and closes nothing.
        """
        if self._origin is None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self, make_run: Callable[..., FollowerRun[E]], job_id: str, *arguments: Any) -> Generator[E]:
        keys = self._perform(self._keys, job_id)
        run = self._perform(make_run, job_id, *arguments)
        question = self._summaries.join((self.tenant, job_id))

        def read(operation: DatabaseRead) -> JobSummary | CompletionResult | None:
            if isinstance(operation, ReadSummary):
                return question.ask().result()
            return self._perform(self._read_result, job_id)

        return self._redis.follow(run, keys, read)
