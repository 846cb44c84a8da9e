"""The publisher: the events of all running attempts on their way to Redis.

In: publications that have something to send.  Out: each event into its job's log and onto its channel, in
one atomic step.  Publishing is off the read path: the engine hands events over and goes on reading; what
arrives while a flush is under way goes out together in the next one, for all jobs in one pipeline.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from keepstream.client.redis_url import RedisServer
from keepstream_worker.events.log_script import SCRIPT
from keepstream_worker.events.publication import Publication, PublishError
from keepstream_worker.events.redis_link import LinkError, RedisLink, pack
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server, redis_reason

log = get_logger()

_CALL_TIMEOUT: Final = 5.0
#: Bytes of one flush, more or less: after an outage each job may have a snapshot of megabytes to send, and until all
#: are encoded the event loop does nothing else.
_MOST_FLUSHED: Final = 1024 * 1024
#: Seconds after which events that Redis refused, while it took others, are sent again.
_REFUSED_PAUSE: Final = 1.0
#: Seconds without a failure after which an outage is over.
_SETTLED: Final = 3.0
#: What Redis says when it is not the master any more.
_MOVED: Final = frozenset({"READONLY", "MASTERDOWN"})


class Publisher:
    """Sends the events of all running attempts over one connection; the ``Outbox`` of their publications.

    Made on the event loop.

    Args:
        server: Where Redis is.
        prefix: Of every key and channel.
        log_ttl: Seconds that a log outlives its last event.
        buffer_bytes: Unsent events kept of one job while Redis is away.
        merge_above: Unsent events of one job above which neighbouring deltas are merged.
        on_moved: Called when Redis turns out not to be the master any more.
    """

    def __init__(
        self,
        server: RedisServer,
        *,
        prefix: str,
        log_ttl: float,
        buffer_bytes: int,
        merge_above: int,
        on_moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.prefix = prefix
        self.merge_above = merge_above
        self.epoch = 0
        self._server = server
        self._ttl_ms = b"%d" % int(log_ttl * 1000)
        self._buffer_bytes = buffer_bytes
        self._on_moved = on_moved
        self._outage = Outage(Server.REDIS, "publish events")
        self._link: RedisLink | None = None
        self._dirty: dict[Publication, None] = {}
        self._over: asyncio.TimerHandle | None = None
        self._in_flight = False  #: Whether Redis still owes the answer to a flush.
        self._wake: asyncio.Future[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="publisher")

    def open(
        self,
        tenant: str,
        job_id: str,
        attempt: int,
        snapshot: Callable[[], dict[str, Any]],
        on_fenced: Callable[[], None] = lambda: None,
        on_cancel: Callable[[], None] = lambda: None,
    ) -> Publication:
        """Begin the events of one attempt.

        Args:
            tenant: Whose job it is.
            job_id: The job.
            attempt: The attempt's number, which fences its events.
            snapshot: Gives the fields of a ``snapshot`` event of the output so far; called when the
                log has a hole.
            on_fenced: Called once, when Redis says that a newer attempt has written.
            on_cancel: Called when Redis holds a cancel request for the job.
        """
        return Publication(self, tenant, job_id, attempt, snapshot, on_fenced, on_cancel)

    def resume(
        self, tenant: str, job_id: str, attempt: int, last_n: int, snapshot: Callable[[], dict[str, Any]]
    ) -> Publication:
        """Go on with an attempt whose first ``last_n`` events somebody else may have sent, or not."""
        publication = self.open(tenant, job_id, attempt, snapshot)
        publication.last_n = last_n
        publication.verify_before_next()
        return publication

    def mark_dirty(self, publication: Publication) -> None:
        """Remember that ``publication`` has something to send."""
        self._dirty[publication] = None
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def discard(self, publication: Publication) -> None:
        """Forget that ``publication`` had something to send."""
        self._dirty.pop(publication, None)

    @property
    def connected(self) -> bool:
        """Whether the last flush found Redis."""
        return self._link is not None and self._link.alive

    async def close(self, timeout: float) -> None:
        """Send what is pending, at most ``timeout`` seconds, and close the connection."""
        deadline = time.monotonic() + timeout
        while (self._dirty or self._in_flight) and time.monotonic() < deadline:  # noqa: ASYNC110  # the end of the process is no hot path
            await asyncio.sleep(0.02)
        self._task.cancel()
        if self._over is not None:
            self._over.cancel()
        await asyncio.wait((self._task,), timeout=2.0)
        if self._link is not None:
            self._link.close()

    async def _run(self) -> None:
        delay = 0.05
        while True:
            if not self._dirty:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
                self._wake = None
            try:
                if self._link is None or not self._link.alive:
                    self._link = await self._connect()
                if await self._flush(self._link):
                    self._note_success()
                delay = 0.05
            except Exception as error:  # noqa: BLE001  # whatever it is, the events of all jobs depend on this loop
                self._note_failure(error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
                for publication in self._dirty:
                    publication.shed_buffer(self._buffer_bytes)

    def _note_success(self) -> None:
        """Say that an outage is over once nothing has failed for a while: a full Redis takes one flush of several."""
        if self._outage.lasts and self._over is None:
            self._over = asyncio.get_running_loop().call_later(_SETTLED, self._note_over)

    def _note_over(self) -> None:
        self._over = None
        self._outage.worked()

    def _note_failure(self, error: Exception) -> None:
        """Begin anew with another connection, and with snapshots after a defect."""
        if self._over is not None:
            self._over.cancel()
            self._over = None
        if self._link is not None:
            self._link.close()
            self._link = None
        if isinstance(error, LinkError | TimeoutError | PublishError):
            self._outage.redis_failed(error)
            if redis_reason(error) in _MOVED:
                self._tell_moved()
        else:
            log.error("publisher_defect", exc_info=error)
            for publication in self._dirty:
                publication.needs_snapshot = True
        for publication in self._dirty:
            publication.shed_buffer(self._buffer_bytes)

    def _tell_moved(self) -> None:
        try:
            self._on_moved()
        except Exception:
            log.exception("publisher_defect")

    async def _connect(self) -> RedisLink:
        link = await RedisLink.connect(self._server, timeout=2.0)
        async with asyncio.timeout(_CALL_TIMEOUT):
            (reply,) = await link.call([pack(b"SCRIPT", b"LOAD", SCRIPT)], 1)
        if isinstance(reply, Exception):
            link.close()
            raise PublishError(str(reply)[:120])
        self.epoch += 1
        return link

    async def _flush(self, link: RedisLink) -> bool:
        """Send one call for each publication that has something, in one pipeline; what is too much goes next time.

        Return whether Redis has taken something.
        """
        batch = [publication for publication in self._dirty if publication.has_pending]  # some were discarded
        self._dirty = {}
        if not batch:
            return False
        self._in_flight = True
        try:
            calls, left = self._next_calls(batch)
            self._dirty = dict.fromkeys(left) | self._dirty
            batch = list(calls)
            if not calls:
                return False
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
            async with asyncio.timeout(_CALL_TIMEOUT):
                answers = await link.call([command for command, _ in calls.values()], len(calls))
        except BaseException:
            self._dirty = dict.fromkeys(batch) | self._dirty
            raise
        finally:
            self._in_flight = False
        refused: dict[Publication, PublishError] = {}
        for (publication, (_, covered)), answer in zip(calls.items(), answers, strict=True):
            try:
                if publication.handle_answer(answer, covered, self.epoch):
                    self._dirty[publication] = None
            except PublishError as error:
                refused[publication] = error
        if len(refused) == len(calls):  # no job's own fault, as far as we can see
            self._dirty = dict.fromkeys(refused) | self._dirty
            raise next(iter(refused.values()))
        for publication, refusal in refused.items():
            if not publication.refused:
                publication.refused = True
                log.warning("events_refused", log_key=publication.keys[0].decode(), reason=redis_reason(refusal))
            publication.shed_buffer(self._buffer_bytes)
            self._mark_dirty_later(publication)
        return not refused

    def _next_calls(self, batch: list[Publication]) -> tuple[dict[Publication, tuple[bytes, int]], list[Publication]]:
        """Return the calls of one flush, and the publications that must wait for the next one."""
        calls: dict[Publication, tuple[bytes, int]] = {}
        size = 0
        for position, publication in enumerate(batch):
            call = self._next_call(publication)
            if call is not None:
                calls[publication] = call
                size += len(call[0])
            if size > _MOST_FLUSHED:
                return calls, batch[position + 1 :]
        return calls, []

    def _next_call(self, publication: Publication) -> tuple[bytes, int] | None:
        """Return a publication's call, or None after a defect, which must not hold up the events of other jobs."""
        try:
            return publication.next_call(self.epoch, self._ttl_ms)
        except Exception:
            log.exception("events_defect", log_key=publication.keys[0].decode())
            if publication.fall_back():
                self._mark_dirty_later(publication)
            return None

    def _mark_dirty_later(self, publication: Publication) -> None:
        asyncio.get_running_loop().call_later(_REFUSED_PAUSE, self.mark_dirty, publication)
