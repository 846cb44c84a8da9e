"""The async client: ``Client`` for asyncio.

In: calls of a service, on its event loop.  Out: typed events and results to the caller; jobs on the queue and
in the database.  Events arrive over the event loop; database and broker have blocking drivers and are called
in threads.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar

from keepstream import names
from keepstream.client.base import FOLLOW_TIMEOUT, NOT_FOUND_AFTER, WAIT_TIMEOUT, BaseClient
from keepstream.client.follower import FollowerRun, ReadSummary
from keepstream.client.forks import PerProcess
from keepstream.client.listing import make_wanted
from keepstream.client.payloads import RAW, TYPED
from keepstream.client.redis import DatabaseRead
from keepstream.client.redis_aio import AsyncRedisConnections
from keepstream.errors import BrokerUnavailableError, InvalidSettingError, StoreUnavailableError, UnexpectedError
from keepstream.events import Event, RawEvent
from keepstream.jobs import Job
from keepstream.results import CompletionResult, JobPage, JobStatus, JobSummary, WaitingFor

_MAX_THREADS: Final = 8  #: Database and broker calls of one client at the same time.
_FREE_THREAD: Final = 30.0  #: Seconds that a call waits for one; a statement that hangs is given up as soon.

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E")


class AsyncClient(BaseClient):
    """``Client`` for asyncio: the same arguments, and the same methods to be awaited.

    It may be used by several event loops, in turn or at once, and has connections of their own for each.
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
        patched = sys.modules.get("gevent.monkey")
        if patched is not None and patched.is_module_patched("select"):
            raise InvalidSettingError(
                "AsyncClient needs asyncio, and gevent has patched this process: use Client in greenlets"
            )
        super().__init__(
            redis_url, broker_url=broker_url, database_url=database_url, tenant=tenant, prefix=prefix, queue=queue
        )
        self._async_redis = AsyncRedisConnections(redis_url, self._gate.check)
        self._threads = PerProcess(partial(ThreadPoolExecutor, _MAX_THREADS, thread_name_prefix="keepstream-client"))

    async def enqueue(self, request: Job | Mapping[str, Any] | None = None, /, **fields: Any) -> str:
        """Accept a job; see ``Client.enqueue``."""
        return await self._in_thread(self._enqueue, request, fields)

    def follow(
        self,
        job_id: str,
        after: str | None = None,
        *,
        timeout: float = FOLLOW_TIMEOUT,
        not_found_after: float = NOT_FOUND_AFTER,
    ) -> AsyncGenerator[Event]:
        """Iterate over a job's events; see ``Client.follow``."""
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
    ) -> AsyncGenerator[RawEvent]:
        """Iterate over a job's events, passing on their bytes; see ``Client.follow_raw``.

        ``on_waiting`` and ``offer`` are called on the event loop.  What ``offer`` takes wakes no task, and that is most
        of what a live event costs.
        """
        return self._events(self._run_follower, job_id, after, timeout, not_found_after, RAW, on_waiting, offer)

    async def check_follow(self, job_id: str, after: str | None = None) -> bool:
        """Tell at once whether a job can be followed from a cursor; see ``Client.check_follow``."""
        return await self._in_thread(self._check_follow, job_id, after)

    async def cancel(self, job_id: str) -> JobStatus | None:
        """Cancel a job; see ``Client.cancel``."""
        return await self._in_thread(self._cancel, job_id)

    async def get(self, job_id: str) -> CompletionResult | None:
        """Return a job with everything stored about it; see ``Client.get``."""
        return await self._in_thread(self._get, job_id)

    async def list(
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
        """Return the tenant's jobs, newest first; see ``Client.list``."""
        wanted = self._perform(make_wanted, status, model, provider, metadata, since, until)
        return await self._in_thread(self._list, wanted, before, limit)

    async def last_numbered(self, prefix: str) -> JobSummary | None:
        """Return the last of some numbered jobs; see ``Client.last_numbered``."""
        return await self._in_thread(self._last_numbered, prefix)

    async def wait(
        self, job_id: str, *, timeout: float = WAIT_TIMEOUT, not_found_after: float = NOT_FOUND_AFTER
    ) -> CompletionResult:
        """Wait until a job has ended, and return its result; see ``Client.wait``."""
        async for _ in self._events(self._run_waiting, job_id, timeout, not_found_after):
            pass
        return await self._in_thread(self._get_ended, job_id)

    async def waiting_for(self, job_id: str) -> WaitingFor | None:
        """Return what keeps a job waiting; see ``Client.waiting_for``."""
        return await self._in_thread(self._waiting_for, job_id)

    async def retry(self, job_id: str, *, force: bool = False) -> str:
        """Run an ended job again; see ``Client.retry``."""
        return await self._in_thread(self._retry, job_id, force=force)

    async def delete(self, job_id: str) -> bool:
        """Delete an ended job; see ``Client.delete``."""
        return await self._in_thread(self._delete, job_id)

    async def close(self) -> None:
        """Close all connections; see ``Client.close``."""
        if self._origin is not None:
            return
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:  # one of its own, because the others may all be busy
            await loop.run_in_executor(thread, self._close)
        await self._async_redis.close()
        threads = self._threads.take()
        if threads is not None:
            threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _events(self, make_run: Callable[..., FollowerRun[E]], job_id: str, *arguments: Any) -> AsyncGenerator[E]:
        keys = self._perform(self._keys, job_id)
        run = self._perform(make_run, job_id, *arguments)
        question = self._summaries.join((self.tenant, job_id))

        async def read(operation: DatabaseRead) -> JobSummary | CompletionResult | None:
            if isinstance(operation, ReadSummary):
                return await asyncio.wrap_future(question.ask())
            return await self._in_thread(self._read_result, job_id)

        return self._async_redis.follow(run, keys, read)

    async def _in_thread(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._gate.check()
        try:
            work = self._threads.get().submit(partial(self._perform, call, *args, **kwargs))
        except RuntimeError as error:  # no thread can be started
            self._gate.check()
            raise UnexpectedError("no thread could be started for the call") from error
        result = asyncio.wrap_future(work)
        try:
            await asyncio.wait([result], timeout=_FREE_THREAD)
        except asyncio.CancelledError:
            result.cancel()
            raise
        # What has not begun then is not begun any more: whoever asked may have left long ago.
        if not result.done() and work.cancel():
            slow = "no thread was free in time, because calls hang"
            raise BrokerUnavailableError(slow) if self._database is None else StoreUnavailableError(slow)
        return await result
