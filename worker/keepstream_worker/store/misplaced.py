"""Misplaced jobs: they wait in a pool that has no row, or one that cannot be read.

In: the seqs of their arrivals, which turns leave where they are.  Out: the pool's row, made anew from what the job was
enqueued with; or, where that says something else, the job ended as failed.

A pool's row may be swept just before a job that was stored with it becomes visible, and whoever writes to the database
may write anything: neither must keep other jobs waiting, nor this one for ever.
"""

import json
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, delete, exists, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client.endings import end_unclaimed
from keepstream.client.queries import pool_values
from keepstream.errors import ErrorCode
from keepstream.jobs import parse_job
from keepstream.results import JobStatus
from keepstream.tables import arrivals, jobs, pools, requests, waiting
from keepstream_worker.store.conditions import is_job, of_job
from keepstream_worker.store.waiting import drop_waiting
from keepstream_worker.values import JobKey

_MESSAGE: Final = "the job waits in a place that is not its own: its rows were changed"


class PutRight(NamedTuple):
    """What became of a misplaced job."""

    key: JobKey
    ended: bool  #: It has ended as failed; else its pool has a row now.


def put_right(connection: Connection, seqs: list[int]) -> list[PutRight | None]:
    """Give misplaced jobs their pool, or end them; None: it does not wait there any more, or is no job."""
    found = {seq: _put_right(connection, seq) for seq in sorted(set(seqs))}
    return [found[seq] for seq in seqs]


_WAITS: Final = exists().where(waiting.c.seq == arrivals.c.seq)


def _put_right(connection: Connection, seq: int) -> PutRight | None:
    named = connection.execute(select(waiting.c.tenant, waiting.c.job_id).where(waiting.c.seq == seq)).one_or_none()
    if named is None:
        connection.execute(delete(arrivals).where(arrivals.c.seq == seq, ~_WAITS))
        return None
    key = JobKey(*named)
    columns = jobs.c.attempt, jobs.c.queue, jobs.c["class"].label("job_class")
    row = connection.execute(select(*columns).where(is_job(key)).with_for_update(key_share=True)).one_or_none()
    if row is None:
        drop_waiting(connection, {key})
        connection.execute(delete(arrivals).where(arrivals.c.seq == seq, ~_WAITS))
        return None
    pool = connection.scalar(select(waiting.c.pool).where(of_job(waiting, key), waiting.c.seq == seq))
    if pool is None:
        return None  # it has gone on meanwhile
    values = _values_of(connection, key, row, pool)
    if values is None:
        end_unclaimed(connection, *key, row.attempt, JobStatus.FAILED, ErrorCode.INTERNAL, _MESSAGE)
        return PutRight(key, ended=True)
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(pools).values(values)
    connection.execute(insert.on_conflict_do_update(index_elements=[pools.c.id], set_=values))
    return PutRight(key, ended=False)


def _values_of(connection: Connection, key: JobKey, row: Any, pool: int) -> dict[str, Any] | None:
    """Return the row of a job's pool, as the job says it; None: the job says that it is another pool."""
    text = connection.scalar(select(requests.c.job).where(of_job(requests, key)))
    try:
        chain = parse_job(json.loads(text or "")).chain
    except ValueError:  # also if it is no valid job
        return None
    # Targets that refused it for good were cut off.
    found = (pool_values(row.queue, row.job_class, chain[start:]) for start in range(len(chain)))
    return next((values for values in found if values["id"] == pool), None)
