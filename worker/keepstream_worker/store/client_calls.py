"""Client calls: what a worker does with a job exactly as a client would.

In: keys of jobs, from upkeep.  Out: their stored results; their status after a cancel.
"""

from sqlalchemy import Connection

from keepstream.client import queries
from keepstream.results import CompletionResult, JobStatus
from keepstream_worker.values import JobKey


def load_results(connection: Connection, keys: list[JobKey]) -> list[CompletionResult | None]:
    """Return each job with its output as it is stored; None if it has no row."""
    return [queries.get(connection, key.tenant, key.id) for key in keys]


def cancel(connection: Connection, keys: list[JobKey]) -> list[JobStatus | None]:
    """Cancel each job; return its status after that, None if it has no row yet."""
    return [queries.cancel(connection, key.tenant, key.id) for key in keys]
