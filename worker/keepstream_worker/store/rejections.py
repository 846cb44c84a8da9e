"""Rejections: messages that are no jobs.

In: what the message filter, the task and the engine could not take.  Out: rows for people, and a failed job
where the message named one.  Exists so that nothing vanishes.
"""

from dataclasses import dataclass

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client.queries import queued_values
from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import JobStatus, output_sha256
from keepstream.tables import jobs, now, rejected_messages


@dataclass(frozen=True, slots=True)
class Rejection:
    """A message that could not be run, and why."""

    id: str
    reason: str
    size: int
    payload: str | None = None
    tenant: str | None = None
    job_id: str | None = None


def reject(connection: Connection, rejections: list[Rejection]) -> list[None]:
    """Record messages that are no valid jobs; recording one twice changes nothing."""
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(rejected_messages)
    connection.execute(
        insert.values(rejected_at=now()).on_conflict_do_nothing(),
        [
            {
                "id": one.id,
                "reason": one.reason,
                "size": one.size,
                "payload": one.payload,
                "tenant": one.tenant,
                "job_id": one.job_id,
            }
            for one in rejections
        ],
    )
    return [None] * len(rejections)


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that ends before it began; ``job`` lends its names only."""

    job: Job
    code: ErrorCode
    message: str


def refuse(connection: Connection, refusals: list[Refused]) -> list[None]:
    """Record jobs that are none as failed, so that whoever waits for them hears of it."""
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(jobs)
    for one in refusals:
        values = queued_values(one.job) | {
            "status": JobStatus.FAILED,
            "attempt": 1,
            "finished_at": now(),
            "error_code": one.code,
            "error_message": one.message,
            "output_sha256": output_sha256(()),
            "terminal_event_id": "1-1",
        }
        connection.execute(insert.values(values).on_conflict_do_nothing())
    return [None] * len(refusals)
