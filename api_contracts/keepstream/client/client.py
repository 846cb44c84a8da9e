"""The client: how a service hands over jobs, watches them, cancels them and queries their results.

In: calls of a service.  Out: jobs on the queue and in the database; typed events and results to the
caller.  Exists in a sync and an async form with the same names, each made for one tenant::

    with Client.from_env() as client:
        job_id = client.enqueue(model="gpt-5-mini", messages=[{"role": "user", "content": "Hello"}])
        for event in client.follow(job_id):
            print(event)
        print(client.get(job_id).text)
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar

from keepstream import names
from keepstream.client import queries
from keepstream.client.database import ClientDatabase
from keepstream.client.follower import Follower, Plan, ReadResult, ReadSummary, parse_cursor
from keepstream.client.redis import AsyncLive, Live
from keepstream.client.sender import Sender
from keepstream.errors import (
    BrokerUnavailableError,
    InvalidJobError,
    InvalidSettingError,
    JobNotFoundError,
    NotConfiguredError,
    StoreUnavailableError,
)
from keepstream.events import Event
from keepstream.jobs import Job, make_job
from keepstream.results import CompletionResult, JobStatus, JobSummary

FOLLOW_TIMEOUT: Final = 600.0  #: Seconds; a model that thinks may be silent for minutes.
FOLLOW_PATIENCE: Final = 10.0  #: Seconds; a job sent without a row is unknown until a worker claims it.
_THREADS: Final = 8  #: Database and broker calls of one async client at the same time.

P = ParamSpec("P")
T = TypeVar("T")
JobSummaries = list[JobSummary]  # inside the classes, "list" is the method


class Client:
    """Enqueues, follows, cancels and queries the jobs of one tenant. Thread-safe.

    Args:
        redis_url: Where the events are.
        broker_url: Where the queue is; by default ``redis_url``.
        database_url: Where the results are.  With it, ``enqueue`` writes the job's row first, so that
            a job survives a broker that is down at that moment.  Without it there is no ``get`` and no
            ``list``, and ``follow`` has no answer for a job whose log has expired.
        tenant: Whose jobs.
        prefix: Prefix of the Redis names, as the workers have it.
        queue: Queue of the workers.

    Raises:
        InvalidSettingError: a URL or name cannot be used.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        broker_url: str | None = None,
        database_url: str | None = None,
        tenant: str = names.DEFAULT_TENANT,
        prefix: str = names.PREFIX,
        queue: str = names.QUEUE,
    ) -> None:
        if re.fullmatch(names.ID_PATTERN, tenant) is None:
            raise InvalidSettingError("a tenant consists of letters, digits, '.', '_' and '-', at most 128 of them")
        self.tenant = tenant
        self._prefix = prefix
        self._queue = queue
        self._sender = Sender(broker_url or redis_url, queue)
        self._live = Live(redis_url)
        self._database = None if database_url is None else ClientDatabase(database_url)

    @classmethod
    def from_env(cls, tenant: str = names.DEFAULT_TENANT) -> Self:
        """Make a client from ``KEEPSTREAM_REDIS_URL`` and, if set, those for broker, database, prefix and queue.

        Raises:
            NotConfiguredError: ``KEEPSTREAM_REDIS_URL`` is not set.
        """
        return cls(**_settings_from_env(), tenant=tenant)

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
        accepted = self._own_job(request, fields)
        accepted.to_json()  # refuses what is no JSON or too large, before anything is written
        if self._database is None:
            self._sender.send(accepted.to_wire())
            return accepted.id
        with self._database.transaction() as connection:
            is_new = queries.enqueue(connection, accepted, self._queue)
        if is_new:
            try:
                self._sender.send(accepted.to_wire())
            except BrokerUnavailableError:
                # The row is what counts.  If this fails as well, a sweeper still finds it, half a minute later.
                with contextlib.suppress(StoreUnavailableError), self._database.transaction() as connection:
                    queries.send_again(connection, accepted.tenant, accepted.id)
        return accepted.id

    def follow(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        patience: float = FOLLOW_PATIENCE,
    ) -> Generator[Event]:
        """Iterate over a job's events, past and live, each once and in order, to the terminal event.

        Reconnects by itself.  Breaking off the iteration gives the connection back.

        Args:
            job_id: The job.
            after: Id of the last event the reader has; it gets what comes after that.
            timeout: Seconds without any event after which to give up.
            patience: Seconds for which a job that nobody knows may still be on its way.

        Raises:
            InvalidCursorError: ``after`` is no event id of this job.
            JobNotFoundError: there is no such job; only a client with a database can tell.
            FollowTimeoutError: no event came in time; to wait longer, follow again after the last event.
            EventsLostError: the log has lost events of an ended job, and there is no database to answer.
            InvalidSettingError: Redis does not accept the URL's user, or does not let it read this job.
        """
        keys = self._keys(job_id)
        return self._live.run(self._plan(job_id, after, timeout, patience), keys, partial(self._answer, job_id))

    def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job in whatever state it is, and return its status after that. May be repeated.

        ``running`` means that its worker is told and stops within moments.  None means that the job is
        not known, or that there is no database to ask; it is cancelled when a worker meets it.

        Raises:
            JobNotFoundError: no job can have this id.
            StoreUnavailableError: the database did not answer.
            BrokerUnavailableError: there is no database, and Redis did not answer.
        """
        keys = self._keys(job_id)
        status = None
        if self._database is not None:
            with self._database.transaction() as connection:
                status = queries.cancel(connection, self.tenant, job_id)
        try:
            message = json.dumps({"tenant": self.tenant, "job_id": job_id})
            self._live.request_cancel(keys, names.control_channel(self._prefix), message)
        except BrokerUnavailableError:
            if status is None:
                raise
        return status

    def get(self, job_id: str) -> CompletionResult | None:
        """Return a job with everything stored about it, or None if there is no such job.

        Raises:
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        with self._required_database().transaction() as connection:
            return queries.get(connection, self.tenant, job_id)

    def list(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        provider: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> JobSummaries:
        """Return the tenant's jobs, newest first; for the next page, ``before`` is the id of the last one seen.

        Raises:
            JobNotFoundError: there is no job ``before``.
            NotConfiguredError: the client has no database.
            StoreUnavailableError: the database did not answer.
        """
        with self._required_database().transaction() as connection:
            return queries.list_jobs(
                connection, self.tenant, status=status, model=model, provider=provider, before=before, limit=limit
            )

    def close(self) -> None:
        """Close all connections."""
        self._sender.close()
        self._live.close()
        if self._database is not None:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_job(self, request: Job | Mapping[str, Any] | None, fields: dict[str, Any]) -> Job:
        if isinstance(request, Job):
            if fields:
                raise InvalidJobError("a whole job takes no further arguments; set its fields when you make it")
            job = request
        else:
            job = make_job({"tenant": self.tenant, **_with_request(request, fields)})
        if job.tenant != self.tenant:
            raise InvalidJobError(f"tenant: the job is of '{job.tenant}', and this client is for '{self.tenant}'")
        return job

    def _keys(self, job_id: str) -> names.JobKeys:
        if re.fullmatch(names.ID_PATTERN, job_id) is None:
            raise JobNotFoundError("no job has such an id: ids consist of letters, digits, '.', '_' and '-'")
        return names.job_keys(self.tenant, job_id, self._prefix)

    def _plan(self, job_id: str, after: str | None, timeout: float, patience: float) -> Plan:
        has_database = self._database is not None
        return Follower(
            job_id, parse_cursor(after), has_database=has_database, timeout=timeout, patience=patience
        ).run()

    def _answer(self, job_id: str, step: ReadSummary | ReadResult) -> JobSummary | CompletionResult | None:
        with self._required_database().transaction() as connection:
            query = queries.get_summary if isinstance(step, ReadSummary) else queries.get
            return query(connection, self.tenant, job_id)

    def _required_database(self) -> ClientDatabase:
        if self._database is None:
            raise NotConfiguredError(f"this needs a database: give database_url or set {names.ENV_DATABASE_URL}")
        return self._database


class AsyncClient:
    """``Client`` for asyncio: events come over the event loop, database and broker are called in threads."""

    def __init__(
        self,
        redis_url: str,
        *,
        broker_url: str | None = None,
        database_url: str | None = None,
        tenant: str = names.DEFAULT_TENANT,
        prefix: str = names.PREFIX,
        queue: str = names.QUEUE,
    ) -> None:
        self._client = Client(
            redis_url, broker_url=broker_url, database_url=database_url, tenant=tenant, prefix=prefix, queue=queue
        )
        self.tenant = tenant
        self._live = AsyncLive(redis_url)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keepstream-client")

    @classmethod
    def from_env(cls, tenant: str = names.DEFAULT_TENANT) -> Self:
        """Make a client as ``Client.from_env`` does."""
        return cls(**_settings_from_env(), tenant=tenant)

    async def enqueue(self, request: Job | Mapping[str, Any] | None = None, /, **fields: Any) -> str:
        """Accept a job; see ``Client.enqueue``."""
        return await self._in_thread(self._client.enqueue, request, **fields)

    def follow(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        patience: float = FOLLOW_PATIENCE,
    ) -> AsyncGenerator[Event]:
        """Iterate over a job's events; see ``Client.follow``."""
        keys = self._client._keys(job_id)  # noqa: SLF001  # one class in two forms
        plan = self._client._plan(job_id, after, timeout, patience)  # noqa: SLF001
        answer = partial(self._client._answer, job_id)  # noqa: SLF001
        return self._live.run(plan, keys, partial(self._in_thread, answer))

    async def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job; see ``Client.cancel``."""
        return await self._in_thread(self._client.cancel, job_id)

    async def get(self, job_id: str) -> CompletionResult | None:
        """Return a job with everything stored about it; see ``Client.get``."""
        return await self._in_thread(self._client.get, job_id)

    async def list(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        provider: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> JobSummaries:
        """Return the tenant's jobs, newest first; see ``Client.list``."""
        return await self._in_thread(
            self._client.list, status=status, model=model, provider=provider, before=before, limit=limit
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._live.close()
        await self._in_thread(self._client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _in_thread(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))


def _with_request(request: object, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a job from the arguments of ``enqueue``."""
    parts = {name: fields.pop(name) for name in ("model", "messages") if name in fields}
    if request is None and not parts:
        return fields
    if "request" in fields or (parts and request is not None):
        raise InvalidJobError("give the request once: as the first argument, or as model= and messages=")
    if isinstance(request, Mapping) and request.keys() & {"v", "request"}:
        raise InvalidJobError("this looks like a whole job, not like a request: give parse_job(...) of it")
    return fields | {"request": parts if request is None else request}


def _settings_from_env() -> dict[str, Any]:
    redis_url = os.environ.get(names.ENV_REDIS_URL)
    if not redis_url:
        raise NotConfiguredError(f"{names.ENV_REDIS_URL} is not set; it looks like redis://host:6379/0")
    return {
        "redis_url": redis_url,
        "broker_url": os.environ.get(names.ENV_BROKER_URL) or None,
        "database_url": os.environ.get(names.ENV_DATABASE_URL) or None,
        "prefix": os.environ.get(names.ENV_PREFIX) or names.PREFIX,
        "queue": os.environ.get(names.ENV_QUEUE) or names.QUEUE,
    }
