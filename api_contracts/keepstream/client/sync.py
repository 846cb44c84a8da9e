"""The sync client: how a service submits jobs, follows and cancels them, and queries their results.

In: calls of a service, from any thread.  Out: typed events and results to the caller; jobs on the queue and
in the database::

    with Client.from_env() as client:
        job_id = client.enqueue(model="gpt-5-mini", messages=[{"role": "user", "content": "Hello"}])
        for event in client.follow(job_id):
            print(event)
        print(client.get(job_id).text)
"""

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any, Self

from keepstream.client.base import FOLLOW_TIMEOUT, NOT_FOUND_AFTER, BaseClient
from keepstream.events import Event
from keepstream.jobs import Job
from keepstream.results import CompletionResult, JobStatus, JobSummary

JobSummaries = list[JobSummary]  # inside the class, "list" is the method


class Client(BaseClient):
    """Submits, follows, cancels and queries the jobs of one tenant. Thread-safe.

    Args:
        redis_url: Redis server with the events.
        broker_url: Redis server with the queue; by default ``redis_url``.
        database_url: SQLAlchemy URL of the database with the results.  With it, ``enqueue`` writes the job's
            row first, so that a job survives a broker that is down at that moment.  Without it there is no
            ``get`` and no ``list``, and ``follow`` knows nothing of a job whose log has expired.
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
        return self._enqueue(request, fields)

    def follow(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        not_found_after: float = NOT_FOUND_AFTER,
    ) -> Generator[Event]:
        """Iterate over a job's events, past and live, each once and in order, to the terminal event.

        Reconnects by itself.  Ending the iteration early releases the connection.

        Args:
            job_id: The job.
            after: Id of the last event the reader has; the iteration begins with the next one.
            timeout: Seconds without any event after which to give up.
            not_found_after: Seconds to wait for a job that is unknown, because it may still be on its way.

        Raises:
            InvalidCursorError: ``after`` is no event id of this job.
            JobNotFoundError: there is no such job; only a client with a database can know.
            FollowTimeoutError: no event came in time; to wait longer, follow again after the last event.
            EventsLostError: the log has lost events of an ended job, and there is no database to ask.
            InvalidSettingError: Redis does not accept the URL's user, or cannot be used to follow this job.
        """
        return self._redis.follow(
            self._run_follower(job_id, after, timeout, not_found_after),
            self._keys(job_id),
            partial(self._read_for_follower, job_id),
        )

    def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job, whatever its state, and return its status after that. May be repeated.

        ``running`` means that its worker has been told and stops within moments.  None means that the job is
        unknown, or that there is no database to ask; it is cancelled when a worker receives it.

        Raises:
            JobNotFoundError: no job can have this id.
            StoreUnavailableError: the database did not answer.
            BrokerUnavailableError: Redis did not answer, and the database does not know the job or is not configured.
        """
        return self._cancel(job_id)

    def get(self, job_id: str) -> CompletionResult | None:
        """Return a job with everything stored about it, or None if there is no such job.

        Raises:
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        return self._get(job_id)

    def list(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        provider: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> JobSummaries:
        """Return the tenant's jobs, newest first.

        Args:
            status: Only jobs in this state.
            model: Only jobs for this model.
            provider: Only jobs for this provider.
            before: Id of the last job of the page before.
            limit: Number of jobs at most.

        Raises:
            JobNotFoundError: there is no job ``before``.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        return self._list(status=status, model=model, provider=provider, before=before, limit=limit)

    def close(self) -> None:
        """Close all connections."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
