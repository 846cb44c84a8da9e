"""Claims: who runs a job.

In: jobs that a worker has got a message for, from the engine.  Out: the job with a new attempt number, or the reason
why not.

A claim is one conditional statement, so two workers never run one job.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Float, Row, and_, bindparam, case, func, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client.queries import queued_values
from keepstream.jobs import Job
from keepstream.results import TERMINAL_STATUSES, JobStatus
from keepstream.tables import attempts, jobs, now, seconds_from_now, seconds_until
from keepstream_worker.store.conditions import WAITING, is_job
from keepstream_worker.values import AttemptReason, JobKey

_DATABASE_CLOCK: Final = {"created_at", "due_at", "resend_at"}


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A worker asks for a job."""

    job: Job
    worker_id: str
    queue: str  #: Where its message came from.
    total_timeout: float  #: Seconds, from the first claim.

    @property
    def key(self) -> JobKey:
        """The job asked for."""
        return JobKey(self.job.tenant, self.job.id)


@dataclass(frozen=True, slots=True)
class Claim:
    """The job is this worker's, under this attempt number."""

    attempt: int
    tries: int  #: Attempts that count against ``max_attempts``, this one included.
    max_attempts: int | None
    reason: AttemptReason
    remaining_seconds: float  #: Until the job's total time is used up.
    expired: bool  #: The job's ``expires_at`` had passed before its first attempt.


class Refusal(StrEnum):
    """Why a claim was not granted; there is nothing to do for its message."""

    TAKEN = "taken"  #: A worker runs it, or it is not due yet: the message is a duplicate.
    ENDED = "ended"  #: The job is terminal.
    OTHER_REQUEST = "other_request"  #: The id belongs to a different request.


_CLAIM_COLUMNS: Final = (
    jobs.c.tenant,
    jobs.c.id,
    jobs.c.attempt,
    jobs.c.tries,
    jobs.c.max_attempts,
    jobs.c.next_reason,
    seconds_until(jobs.c.deadline_at).label("remaining"),
    case((and_(jobs.c.attempt == 1, jobs.c.expires_at <= now()), true()), else_=False).label("expired"),
)


_OPEN_ATTEMPT: Final = attempts.insert().values(started_at=now())


def claim(connection: Connection, requests: list[ClaimRequest]) -> list[Claim | Refusal]:
    """Take each job that is due and that nobody owns; create its row if it is missing."""
    wanted: dict[JobKey, ClaimRequest] = {}
    for request in requests:
        wanted.setdefault(request.key, request)
    ordered = [wanted[key] for key in sorted(wanted)]  # one order of locks for all workers
    rows = connection.execute(
        _claim_statement(connection.dialect.name),
        [
            {
                name: value
                for name, value in queued_values(request.job, request.queue).items()
                if name not in _DATABASE_CLOCK
            }
            | {
                "status": JobStatus.RUNNING,
                "attempt": 1,
                "tries": 1,
                "worker_id": request.worker_id,
                "total_timeout": request.total_timeout,
            }
            for request in ordered
        ],
    )
    granted = {JobKey(row.tenant, row.id): row for row in rows}
    if granted:
        connection.execute(
            _OPEN_ATTEMPT,
            [
                {
                    "tenant": key.tenant,
                    "job_id": key.id,
                    "number": row.attempt,
                    "reason": row.next_reason,
                    "worker_id": wanted[key].worker_id,
                    "provider": wanted[key].job.provider,
                    "model": wanted[key].job.model,
                }
                for key, row in granted.items()
            ],
        )
    answers: list[Claim | Refusal] = []
    for request in requests:
        row = granted.pop(request.key, None)  # a second request for one job is a duplicate
        answers.append(_granted(row) if row is not None else _refused(connection, request))
    return answers


@cache
def _claim_statement(dialect: str) -> Any:
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(jobs)
    statement = insert.values(
        created_at=now(),
        due_at=now(),
        resend_at=now(),
        started_at=now(),
        deadline_at=seconds_from_now(bindparam("total_timeout", type_=Float)),
    )
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=[jobs.c.tenant, jobs.c.id],
        set_={
            "status": JobStatus.RUNNING,
            "attempt": jobs.c.attempt + 1,
            "tries": jobs.c.tries + 1,
            "worker_id": new.worker_id,
            "started_at": func.coalesce(jobs.c.started_at, new.started_at),
            "deadline_at": func.coalesce(jobs.c.deadline_at, new.deadline_at),
        },
        where=and_(
            # Not "in": SQLAlchemy expands that anew for each execution, which it cannot do for many rows at once.
            or_(*(jobs.c.status == waiting for waiting in WAITING)),
            jobs.c.due_at <= now(),
            jobs.c.request_hash == new.request_hash,
        ),
    ).returning(*_CLAIM_COLUMNS)


def _granted(row: Row[Any]) -> Claim:
    return Claim(
        attempt=row.attempt,
        tries=row.tries,
        max_attempts=row.max_attempts,
        reason=AttemptReason(row.next_reason),
        remaining_seconds=row.remaining,
        expired=bool(row.expired),
    )


def _refused(connection: Connection, request: ClaimRequest) -> Claim | Refusal:
    row = connection.execute(
        select(*_CLAIM_COLUMNS, jobs.c.status, jobs.c.request_hash, jobs.c.worker_id).where(is_job(request.key))
    ).one()
    if row.request_hash != request.job.request_hash():
        return Refusal.OTHER_REQUEST
    if row.status in TERMINAL_STATUSES:
        return Refusal.ENDED
    if row.status == JobStatus.RUNNING and row.worker_id == request.worker_id:
        # The engine asks only for jobs it does not run, so this is its own claim, whose commit was cut.
        return _granted(row)
    return Refusal.TAKEN
