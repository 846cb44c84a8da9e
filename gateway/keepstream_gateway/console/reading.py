"""Reading: what the console asks the database, and how often.

In: calls from the pages.  Out: what the client's statements return.

What all look at is read once for all: everybody who looks within a second sees the same reading.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from keepstream.client import overview
from keepstream.client.database import ClientDatabase
from keepstream.client.listing import Place, Wanted, list_all_jobs, list_jobs
from keepstream.client.overview import Activity, History, RejectedMessage
from keepstream.errors import JobNotFoundError
from keepstream.results import JobPage
from keepstream_gateway.console.overview_view import RECENT, Span

_THREADS: Final = 4
_FRESH: Final = {"now": 1.0, "1h": 5.0, "6h": 15.0, "24h": 30.0, "7d": 60.0}  #: Seconds for which a reading is shown.
_TENANTS_SHOWN: Final = 200
_TENANTS_FRESH: Final = 30.0
PAGE: Final = 50  #: Jobs of a page.

T = TypeVar("T")
Connection: TypeAlias = Any  #: What the client's statements take; what it is, they know.


class Now(NamedTuple):
    """What goes on."""

    activity: Activity
    recent: History


class Found(NamedTuple):
    """Jobs of a list."""

    page: JobPage
    older: Place | None
    is_place_gone: bool = False  #: The job has been deleted after which the page was to begin.


class Reading:
    """What the pages read. ``close`` lets go of the database."""

    def __init__(self, database_url: str) -> None:
        self._database = ClientDatabase(database_url)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keepstream-console")
        self._kept: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def now(self) -> Now:
        """Return what goes on.

        Raises:
            StoreUnavailableError: the database did not answer; so do all others.
        """

        def read(connection: Connection) -> Now:
            return Now(overview.look(connection), overview.history(connection, RECENT.length, RECENT.step))

        return await self._once("now", _FRESH["now"], lambda: self._read(read))

    async def history(self, span: Span) -> History:
        """Return what a time brought."""
        read = lambda connection: overview.history(connection, span.length, span.step)  # noqa: E731
        return await self._once(span.name, _FRESH[span.name], lambda: self._read(read))

    async def tenants(self) -> list[str]:
        """Return the names of tenants to choose from."""
        read = lambda connection: overview.tenants(connection, _TENANTS_SHOWN)  # noqa: E731
        return await self._once("tenants", _TENANTS_FRESH, lambda: self._read(read))

    async def owners(self, job_id: str) -> list[str]:
        """Return the tenants that have a job of this id."""
        return await self._read(lambda connection: overview.owners(connection, job_id))

    async def jobs(self, tenant: str, wanted: Wanted, before: Place | None) -> Found:
        """Return jobs of a tenant, or of all if it is empty."""

        def read(connection: Connection) -> Found:
            if not tenant:
                return Found(*list_all_jobs(connection, wanted, before=before, limit=PAGE))
            page = list_jobs(connection, tenant, wanted, before=None if before is None else before.job_id, limit=PAGE)
            return Found(page, None if page.next_before is None else Place(tenant, page.next_before))

        try:
            return await self._read(read)
        except JobNotFoundError:
            return Found(JobPage(), None, is_place_gone=True)

    async def rejected(self, limit: int, before: str | None) -> list[RejectedMessage]:
        """Return rejected messages, newest first."""
        return await self._read(lambda connection: overview.rejected(connection, limit, before=before))

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False)
        self._database.close()

    async def _read(self, read: Callable[[Connection], T]) -> T:
        def call() -> T:
            with self._database.transaction() as connection:
                return read(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _once(self, name: str, seconds: float, read: Callable[[], Awaitable[T]]) -> T:
        """Return a reading that is not older than so many seconds; who comes while it is read waits for the same."""
        kept = self._kept.get(name)
        if kept is None or (kept[1].done() and (time.monotonic() - kept[0] > seconds or kept[1].exception())):
            kept = self._kept[name] = (time.monotonic(), asyncio.ensure_future(read()))
        answer: T = await asyncio.shield(kept[1])
        return answer
