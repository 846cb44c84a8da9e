"""The announcer: terminal events from stored rows.

In: keys of jobs that ended without this process running them, from the sweeper, cancel and the task.
Out: their terminal event, by way of the publisher, and the note in the row that it is out.  Exists
because a row may be committed by somebody who cannot publish (a client that cancels a queued job), or
who died before he did.
"""

from sqlalchemy import Connection

from keepstream.client.queries import get
from keepstream.events import snapshot_event, terminal_event
from keepstream.names import parse_event_id
from keepstream.results import CompletionResult
from keepstream_worker import store
from keepstream_worker.events.publisher import Flushed, Publisher
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.values import JobKey


def load_results(connection: Connection, keys: list[JobKey]) -> list[CompletionResult | None]:
    """Return the stored jobs."""
    return [get(connection, key.tenant, key.id) for key in keys]


class Announcer:
    """Publishes terminal events for rows."""

    def __init__(self, database: WorkerDatabase, publisher: Publisher) -> None:
        self._database = database
        self._publisher = publisher

    async def announce(self, key: JobKey, timeout: float = 5.0) -> bool:
        """Make sure that the terminal event of a terminal job is in its log; returns whether it is.

        A copy of one that is there already is refused by its id. Where the log lacks what led to it,
        a snapshot of the stored output goes first.
        """
        result = await self._database.run(load_results, key)
        if result is None or not result.status.terminal or result.terminal_event_id is None:
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
        if await publication.flushed(timeout) is Flushed.WAITING:
            publication.forget()  # the next sweep makes another one, and Redis may be away for many sweeps
            return False
        await self._database.run(store.mark_announced, key)
        return True
