"""The announcer: terminal events from stored rows.

In: keys of jobs that ended without this process running them, from the sweeper, the cancel listener and
the service.  Out: their terminal event, by way of the publisher, and the note in the row that it is out.
A row may be committed by somebody who cannot publish (a client that cancels a queued job), or by a worker
that died before it could.
"""

from keepstream.events import snapshot_event, terminal_event
from keepstream.names import parse_event_id
from keepstream_worker import store
from keepstream_worker.events.publication import FlushResult
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.values import JobKey


class Announcer:
    """Publishes terminal events of stored jobs. Used on the event loop."""

    def __init__(self, database: WorkerDatabase, publisher: Publisher) -> None:
        self._database = database
        self._publisher = publisher

    async def announce(self, key: JobKey, timeout: float = 5.0) -> bool:
        """Make sure that the terminal event of a terminal job is in its log; return whether nothing is left to be done.

        A copy of one that is there already is refused by its id. Where the log lacks what led to it,
        a snapshot of the stored output goes first.

        Args:
            key: The job; if it is not terminal, nothing happens.
            timeout: Seconds to wait for Redis.

        Raises:
            StoreUnavailableError: the database is away.
        """
        result = await self._database.run(store.load_results, key)
        if result is None:  # somebody has deleted the job, and perhaps left the note that it is to be announced
            await self._database.run(store.mark_announced, key)
            return True
        if not result.status.terminal or result.terminal_event_id is None:
            return False
        last = parse_event_id(result.terminal_event_id)
        exclude = {"v", "id", "job_id", "attempt", "type", "ts"}
        publication = self._publisher.resume(
            key.tenant,
            key.id,
            last.attempt,
            last.n - 1,
            lambda: snapshot_event(result, f"{last.attempt}-{last.n - 1}").model_dump(mode="json", exclude=exclude),
        )
        event = terminal_event(result)
        publication.send(event.type, event.model_dump(mode="json", exclude=exclude))
        if await publication.wait_flushed(timeout) is FlushResult.PENDING:
            publication.discard()  # the next sweep makes another one, and Redis may be away for many sweeps
            return False
        await self._database.run(store.mark_announced, key)
        return True
