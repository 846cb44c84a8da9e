"""The store: every statement the worker puts to the database.

In: groups of claims, endings and questions, by way of ``worker.database``.  Out: rows, and the answer
for each member of the group.  Exists so that the rules of ownership stand in one place:

* a claim raises the job's attempt number by one, and every later write names that number: whoever
  was superseded changes nothing (fencing);
* every time, and every comparison of times, is the database's own clock;
* a write may be repeated when its commit was cut: repeated, it answers the same and changes nothing.

Each plural function takes a connection inside a transaction and a list, and answers in its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Connection,
    Float,
    Integer,
    Row,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from api_contracts.errors import ErrorCode
from api_contracts.jobs import Job
from api_contracts.queries import end_from_outside, queued_values, sum_usage
from api_contracts.results import (
    TERMINAL_STATUSES,
    Choice,
    JobStatus,
    Usage,
    UsageSource,
    output_sha256,
)
from api_contracts.tables import (
    attempts,
    choices,
    jobs,
    now,
    rejected_messages,
    seconds_from_now,
    seconds_until,
    tool_calls,
    workers,
)
from worker.failures import Failure

WAITING: Final = (JobStatus.QUEUED, JobStatus.RETRYING)
_DATABASE_CLOCK: Final = {"created_at", "due_at", "resend_at"}
#: Claims beyond a job's max_attempts, each of which may still recover a finished stream from the log.
_SPARE_CLAIMS: Final = 3
#: Seconds for which a worker that is gone stays in the table, for `millrace doctor` and for people.
_REMEMBERED: Final = 172_800.0


#: What becomes of a job whose worker does not run it any more.
_RELEASED: Final[dict[str, Any]] = {
    "status": JobStatus.RETRYING,
    "worker_id": None,
    "next_reason": "worker_lost",
    "due_at": now(),
    "resend_at": now(),
    "sends": 0,
}


class JobKey(NamedTuple):
    """What identifies a job."""

    tenant: str
    id: str


class Reason(StrEnum):
    """Why an attempt is made."""

    FIRST = "first"
    RETRY = "retry"  #: The attempt before failed.
    WORKER_LOST = "worker_lost"  #: The worker of the attempt before died.
    INTERRUPTED = "interrupted"  #: The worker of the attempt before was shut down.


class Outcome(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    RECOVERED = "recovered"  #: Made no stream: carried over what the attempt before had finished.
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    UNSTARTED = "unstarted"  #: There was no time or no try left; such an attempt leaves no row.


# -- claiming -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A worker asks for a job."""

    job: Job
    worker_id: str
    queue: str  #: Where its message came from.
    total_timeout: float  #: Seconds; counts from the first claim.

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
    reason: Reason
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
    """Take each job that is due and that nobody holds; create its row if it is missing."""
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
        reason=Reason(row.next_reason),
        remaining_seconds=row.remaining,
        expired=bool(row.expired),
    )


def _refused(connection: Connection, request: ClaimRequest) -> Claim | Refusal:
    row = connection.execute(
        select(*_CLAIM_COLUMNS, jobs.c.status, jobs.c.request_hash, jobs.c.worker_id).where(_is(request.key))
    ).one()
    if row.request_hash != request.job.request_hash():
        return Refusal.OTHER_REQUEST
    if row.status in TERMINAL_STATUSES:
        return Refusal.ENDED
    if row.status == JobStatus.RUNNING and row.worker_id == request.worker_id:
        # The engine asks only for jobs it does not run, so this is its own claim, whose commit was cut.
        return _granted(row)
    return Refusal.TAKEN


# -- ending attempts ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, what it brought, and what becomes of its job."""

    key: JobKey
    attempt: int
    worker_id: str
    outcome: Outcome
    status: JobStatus  #: A terminal status, or RETRYING.
    choices: Sequence[Choice] = ()
    usage: Usage = Usage()
    failure: Failure | None = None
    retryable: bool | None = None
    retry_in: float = 0.0  #: Seconds until the job is due again; only with RETRYING.
    resend_in: float = 0.0  #: Seconds until a sweeper takes care of it; only with RETRYING.
    next_reason: Reason = Reason.RETRY
    first_token_ms: float | None = None
    provider_request_id: str | None = None
    provider_details: dict[str, Any] | None = None
    terminal_event_id: str | None = None


class Ended(NamedTuple):
    """The ending is written."""

    usage: Usage | None  #: Summed over the job's attempts; None if none of them cost anything.
    attempts: int


class NotEnded(StrEnum):
    """Why an ending was not written."""

    SUPERSEDED = "superseded"  #: Somebody else holds the job now.
    CANCEL_REQUESTED = "cancel_requested"  #: A cancel came first: end it as cancelled.


def end(connection: Connection, endings: list[Ending]) -> list[Ended | NotEnded]:
    """Write each ending whose attempt still holds its job: status, output, usage and attempt, or nothing."""
    rows = _lock(connection, [ending.key for ending in endings])
    verdicts = [_verdict(rows.get(ending.key), ending) for ending in endings]
    held = [ending for ending, verdict in zip(endings, verdicts, strict=True) if verdict is _HELD]
    if held:
        _write_attempts(connection, held)
        _write_outputs(connection, held)
    books = {ending.key: _close_books(connection, ending) for ending in endings}
    _write_jobs(connection, held, books)
    return [
        verdict if isinstance(verdict, NotEnded) else books[ending.key]
        for ending, verdict in zip(endings, verdicts, strict=True)
    ]


_HELD: Final = "held"
_WRITTEN: Final = "written"  #: Our own write, whose commit was cut before we heard of it.


_LOCK: Final = (
    select(
        jobs.c.tenant,
        jobs.c.id,
        jobs.c.status,
        jobs.c.attempt,
        jobs.c.worker_id,
        jobs.c.terminal_event_id,
        jobs.c.cancel_requested_at,
    )
    .where(tuple_(jobs.c.tenant, jobs.c.id).in_(bindparam("keys", expanding=True)))
    .order_by(jobs.c.tenant, jobs.c.id)  # one order of locks for all workers
    .with_for_update()
)


def _lock(connection: Connection, keys: list[JobKey]) -> dict[JobKey, Any]:
    """Return the jobs' rows, which nobody else can change until the transaction ends."""
    return {JobKey(row.tenant, row.id): row for row in connection.execute(_LOCK, {"keys": keys})}


def _verdict(row: Any, ending: Ending) -> NotEnded | str:
    if row is None or row.attempt != ending.attempt:
        return NotEnded.SUPERSEDED
    if row.status != JobStatus.RUNNING or row.worker_id != ending.worker_id:
        ours = row.status == ending.status and row.terminal_event_id == ending.terminal_event_id
        return _WRITTEN if ours and row.worker_id is None else NotEnded.SUPERSEDED
    if row.cancel_requested_at is not None and ending.status in (JobStatus.COMPLETED, JobStatus.RETRYING):
        return NotEnded.CANCEL_REQUESTED  # a cancel that was accepted wins over everything that comes after it
    return _HELD


_WRITE_ATTEMPT: Final = (
    update(attempts)
    .where(
        attempts.c.tenant == bindparam("of_tenant"),
        attempts.c.job_id == bindparam("of_job"),
        attempts.c.number == bindparam("of_number"),
    )
    .values(
        {
            column: bindparam(column)
            for column in (
                "outcome",
                "first_token_ms",
                "error_code",
                "error_message",
                "http_status",
                "retryable",
                "provider_request_id",
                "prompt_tokens",
                "completion_tokens",
                "total_tokens",
                "usage_source",
                "usage",
            )
        }
        | {"finished_at": now()}
    )
)


def _write_attempts(connection: Connection, endings: list[Ending]) -> None:
    for ending in endings:
        if ending.outcome is Outcome.UNSTARTED:
            connection.execute(delete(attempts).where(_of(attempts, ending.key), attempts.c.number == ending.attempt))
    connection.execute(
        _WRITE_ATTEMPT,
        [
            {
                "of_tenant": ending.key.tenant,
                "of_job": ending.key.id,
                "of_number": ending.attempt,
                "outcome": ending.outcome,
                "first_token_ms": ending.first_token_ms,
                "error_code": ending.failure and ending.failure.code,
                "error_message": ending.failure and ending.failure.message,
                "http_status": ending.failure and ending.failure.http_status,
                "retryable": ending.retryable,
                "provider_request_id": ending.provider_request_id,
                **_usage_values(ending.usage),
            }
            for ending in endings
        ],
    )


def _write_outputs(connection: Connection, endings: list[Ending]) -> None:
    # The output of a job is that of its last attempt.
    again = [ending.key for ending in endings if ending.attempt > 1]
    if again:
        for table in (tool_calls, choices):
            connection.execute(delete(table).where(tuple_(table.c.tenant, table.c.job_id).in_(again)))
    rows = [
        {
            "tenant": ending.key.tenant,
            "job_id": ending.key.id,
            "index": choice.index,
            "content": choice.content,
            "reasoning": choice.reasoning,
            "refusal": choice.refusal,
            "finish_reason": choice.finish_reason,
            "extra": choice.extra,
        }
        for ending in endings
        for choice in ending.choices
    ]
    calls = [
        {
            "tenant": ending.key.tenant,
            "job_id": ending.key.id,
            "choice_index": choice.index,
            "position": position,
            "call_id": call.id,
            "type": call.type,
            "name": call.name,
            "arguments": call.arguments,
            "arguments_valid": call.arguments_valid,
            "extra": call.extra,
        }
        for ending in endings
        for choice in ending.choices
        for position, call in enumerate(choice.tool_calls)
    ]
    if rows:
        connection.execute(choices.insert(), rows)
    if calls:
        connection.execute(tool_calls.insert(), calls)


def _close_books(connection: Connection, ending: Ending) -> Ended:
    """Sum the job's attempts, the one that ends now included; a first attempt needs no look at the table."""
    if ending.outcome is Outcome.UNSTARTED and ending.attempt == 1:
        rows: Sequence[Any] = []
    elif ending.attempt == 1:
        rows = [
            SimpleNamespace(
                **_usage_values(ending.usage),
                outcome=ending.outcome,
                http_status=ending.failure and ending.failure.http_status,
            )
        ]
    else:
        rows = connection.execute(select(attempts).where(_of(attempts, ending.key))).all()
    return Ended(sum_usage(rows), len(rows))


_TERMINAL_COLUMNS: Final = (
    "status",
    "error_code",
    "error_message",
    "partial",
    "output_sha256",
    "terminal_event_id",
    "provider_details",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "usage_source",
)
_THIS_JOB: Final = and_(jobs.c.tenant == bindparam("of_tenant"), jobs.c.id == bindparam("of_job"))
_WRITE_END: Final = (
    update(jobs)
    .where(_THIS_JOB)
    .values({column: bindparam(column) for column in _TERMINAL_COLUMNS} | {"finished_at": now(), "worker_id": None})
)
_WRITE_PAUSE: Final = (
    update(jobs)
    .where(_THIS_JOB)
    .values(
        {column: bindparam(column) for column in ("status", "error_code", "error_message", "partial", "next_reason")}
        | {
            "worker_id": None,
            "due_at": seconds_from_now(bindparam("retry_in", type_=Float)),
            "resend_at": seconds_from_now(bindparam("resend_in", type_=Float)),
            "sends": 0,
            "tries": jobs.c.tries - bindparam("uncounted", type_=Integer),
        }
    )
)


def _write_jobs(connection: Connection, endings: list[Ending], books: dict[JobKey, Ended]) -> None:
    """Write the jobs' rows, which ``_lock`` holds."""
    ends, pauses = [], []
    for ending in endings:
        values: dict[str, Any] = {
            "of_tenant": ending.key.tenant,
            "of_job": ending.key.id,
            "status": ending.status,
            "error_code": ending.failure and ending.failure.code,
            "error_message": ending.failure and ending.failure.message,
            "partial": bool(ending.choices) and ending.status is not JobStatus.COMPLETED,
        }
        if ending.status is JobStatus.RETRYING:
            values |= {
                "next_reason": ending.next_reason,
                "retry_in": ending.retry_in,
                "resend_in": ending.resend_in,
                # A shutdown is not the job's fault.
                "uncounted": int(ending.outcome is Outcome.INTERRUPTED),
            }
            pauses.append(values)
            continue
        total = _usage_values(books[ending.key].usage or Usage())
        if books[ending.key].usage is None:
            total["usage_source"] = None
        del total["usage"]
        values |= total | {
            "output_sha256": output_sha256(choice.content for choice in ending.choices),
            "terminal_event_id": ending.terminal_event_id,
            "provider_details": ending.provider_details,
        }
        ends.append(values)
    if ends:
        connection.execute(_WRITE_END, ends)
    if pauses:
        connection.execute(_WRITE_PAUSE, pauses)


def _usage_values(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "usage_source": usage.source,
        "usage": usage.details,
    }


@dataclass(frozen=True, slots=True)
class LateUsage:
    """What is learned from the log about an attempt whose worker died."""

    key: JobKey
    attempt: int
    usage: Usage


def record_usage(connection: Connection, usages: list[LateUsage]) -> list[None]:
    """Write usage of lost attempts that nobody has reported yet; a job that has ended meanwhile is summed up again."""
    _lock(connection, [late.key for late in usages])  # so that no ending sums up between the two writes
    for late in usages:
        written = connection.execute(
            update(attempts)
            .where(_of(attempts, late.key), attempts.c.number == late.attempt, attempts.c.total_tokens.is_(None))
            .values(_usage_values(late.usage))
        ).rowcount
        if not written:
            continue
        total = sum_usage(connection.execute(select(attempts).where(_of(attempts, late.key))).all())
        if total is not None:
            sums = _usage_values(total)
            del sums["usage"]
            connection.execute(update(jobs).where(_is(late.key), jobs.c.status.in_(TERMINAL_STATUSES)).values(sums))
    return [None] * len(usages)


# -- the worker's own life ------------------------------------------------------------------------


class Beat(NamedTuple):
    """A sign of life."""

    worker_id: str
    lease: float


class Pulse(NamedTuple):
    """What a worker learns when it gives a sign of life."""

    lapsed: bool  #: It was silent for longer than its lease: others may have taken its jobs.
    held: frozenset[tuple[JobKey, int]]  #: The jobs it holds, with their attempt.
    cancels: frozenset[JobKey]  #: Those of them that are to be cancelled.


def beat(connection: Connection, beats: list[Beat]) -> list[Pulse]:
    """Renew each worker's row, or create it."""
    return [_beat(connection, one) for one in beats]


def _beat(connection: Connection, one: Beat) -> Pulse:
    alive = connection.execute(
        update(workers)
        .where(workers.c.id == one.worker_id, workers.c.heartbeat_at > seconds_from_now(-one.lease))
        .values(heartbeat_at=now())
    ).rowcount
    if not alive:
        renewed = connection.execute(
            update(workers).where(workers.c.id == one.worker_id).values(heartbeat_at=now())
        ).rowcount
        if not renewed:
            connection.execute(workers.insert().values(id=one.worker_id, started_at=now(), heartbeat_at=now()))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested_at).where(
            jobs.c.worker_id == one.worker_id
        )
    ).all()
    return Pulse(
        lapsed=not alive,
        held=frozenset((JobKey(row.tenant, row.id), row.attempt) for row in rows),
        cancels=frozenset(JobKey(row.tenant, row.id) for row in rows if row.cancel_requested_at is not None),
    )


def retire(connection: Connection, worker_ids: list[str]) -> list[None]:
    """Mark workers as gone at once, so that nobody waits for their lease."""
    connection.execute(
        update(workers).where(workers.c.id.in_(worker_ids)).values(heartbeat_at=seconds_from_now(-86_400.0))
    )
    return [None] * len(worker_ids)


# -- sweeping -------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What a sweeper asks for."""

    lease: float
    bury: bool  #: Whether the silence of other workers counts as death.
    resend_after: float
    queue: str  #: The only one that this worker sends to.
    queue_length: int | None  #: Messages that wait on the queue; None: the broker is away, so nothing can be sent.
    max_attempts: int  #: For jobs that do not say.
    limit: int  #: Rows of each kind at most.


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found, and has already changed in the rows."""

    lost: list[JobKey]  #: Their worker died; they are waiting again, or ended.
    to_send: list[str]  #: Jobs (JSON) whose message is to be sent.
    unannounced: list[JobKey]  #: Ended, but their terminal event may be missing.


def sweep(connection: Connection, sweeps: list[Sweep]) -> list[Swept]:
    """Find what nobody takes care of. Several sweepers at once do no harm: each row goes to one."""
    return [
        Swept(
            lost=_release_lost(connection, one) if one.bury else [],
            to_send=_take_due(connection, one),
            unannounced=_find_unannounced(connection, one) + _end_expired(connection, one),
        )
        for one in sweeps
    ]


def _release_lost(connection: Connection, one: Sweep) -> list[JobKey]:
    dead = select(workers.c.id).where(workers.c.heartbeat_at < seconds_from_now(-one.lease))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.tries, jobs.c.max_attempts, jobs.c.cancel_requested_at)
        .where(jobs.c.worker_id.in_(dead), jobs.c.status == JobStatus.RUNNING)
        .limit(one.limit)
        .with_for_update(skip_locked=True)
    ).all()
    lost = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        _mark_lost(connection, key, row.attempt)
        if row.cancel_requested_at is not None:
            end_from_outside(connection, *key, row.attempt, JobStatus.CANCELLED, ErrorCode.CANCELLED, "cancelled")
        elif row.tries > (row.max_attempts or one.max_attempts) + _SPARE_CLAIMS:
            message = "its workers died, each time"
            end_from_outside(connection, *key, row.attempt, JobStatus.FAILED, ErrorCode.WORKER_LOST, message)
        else:
            connection.execute(update(jobs).where(_is(key), jobs.c.attempt == row.attempt).values(_RELEASED))
        lost.append(key)
    _forget_workers(connection)
    return lost


class Held(NamedTuple):
    """A job as one worker holds it."""

    key: JobKey
    attempt: int
    worker_id: str


def release(connection: Connection, held: list[Held]) -> list[None]:
    """Let go of jobs that their own worker does not run, so that they are sent again."""
    for one in held:
        released = connection.execute(
            update(jobs)
            .where(_is(one.key), jobs.c.attempt == one.attempt, jobs.c.worker_id == one.worker_id)
            .values(_RELEASED)
        ).rowcount
        if released:
            _mark_lost(connection, one.key, one.attempt)
    return [None] * len(held)


def hand_back(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Leave the next attempt of waiting jobs to any worker, as soon as it is due."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=jobs.c.due_at)
    )
    return [None] * len(keys)


def resend_soon(connection: Connection, keys: list[JobKey]) -> list[None]:
    """The broker was away: let the next sweeps try again."""
    connection.execute(
        update(jobs)
        .where(tuple_(jobs.c.tenant, jobs.c.id).in_(sorted(set(keys))), jobs.c.status.in_(WAITING))
        .values(resend_at=seconds_from_now(2.0), sends=0)
    )
    return [None] * len(keys)


def _mark_lost(connection: Connection, key: JobKey, attempt: int) -> None:
    connection.execute(
        update(attempts)
        .where(_of(attempts, key), attempts.c.number == attempt)
        .values(
            outcome=Outcome.LOST,
            finished_at=now(),
            error_code=ErrorCode.WORKER_LOST,
            error_message="the worker died",
            retryable=True,
            usage_source=UsageSource.UNKNOWN,
        )
    )


def _forget_workers(connection: Connection) -> None:
    """Delete workers that have been gone for two days and hold nothing."""
    holding = select(jobs.c.worker_id).where(jobs.c.worker_id.is_not(None))
    connection.execute(
        delete(workers).where(workers.c.heartbeat_at < seconds_from_now(-_REMEMBERED), workers.c.id.not_in(holding))
    )


def _take_due(connection: Connection, one: Sweep) -> list[str]:
    """Take the jobs whose message is to be sent: those that have none, and those whose message must be lost."""
    if one.queue_length is None:
        return []
    waiting = and_(jobs.c.status.in_(WAITING), jobs.c.queue == one.queue)
    overdue = and_(waiting, jobs.c.resend_at <= now())
    to_send = _note_sent(connection, and_(overdue, jobs.c.sends == 0), one.resend_after, one.limit)
    if connection.scalar(select(jobs.c.id).where(overdue, jobs.c.sends > 0).limit(1)) is None:
        return to_send
    # These have a message, or had one. In a backlog all are still in the queue, and sending them again would
    # fill it without end; a message is missing only if more jobs are due than messages wait.
    due = connection.scalar(select(func.count()).select_from(jobs).where(waiting, jobs.c.due_at <= now()))
    missing = (due or 0) - one.queue_length - len(to_send)
    if missing > 0:
        to_send += _note_sent(connection, and_(overdue, jobs.c.sends > 0), one.resend_after, min(missing, one.limit))
    else:
        connection.execute(
            update(jobs).where(overdue, jobs.c.sends > 0).values(resend_at=seconds_from_now(one.resend_after))
        )
    return to_send


def _note_sent(connection: Connection, condition: Any, resend_after: float, limit: int) -> list[str]:
    """Note a message for each of the jobs, oldest first; return the jobs."""
    chosen = (
        select(jobs.c.tenant, jobs.c.id)
        .where(condition)
        .order_by(jobs.c.resend_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return list(
        connection.scalars(
            update(jobs)
            .where(tuple_(jobs.c.tenant, jobs.c.id).in_(chosen), condition)
            .values(sends=jobs.c.sends + 1, resend_at=seconds_from_now(resend_after))
            .returning(jobs.c.request)
        )
    )


def _end_expired(connection: Connection, one: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt)
        .where(jobs.c.status.in_(WAITING), jobs.c.expires_at <= now(), jobs.c.attempt == 0)
        .limit(one.limit)
        .with_for_update(skip_locked=True)
    ).all()
    ended = []
    for row in rows:
        key = JobKey(row.tenant, row.id)
        message = "the job waited past its expires_at"
        if end_from_outside(connection, *key, row.attempt, JobStatus.EXPIRED, ErrorCode.EXPIRED, message):
            ended.append(key)
    return ended


def _find_unannounced(connection: Connection, one: Sweep) -> list[JobKey]:
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id)
        .where(
            jobs.c.announced.is_(False),
            # The worker that ended it gets the time to announce it itself.
            jobs.c.finished_at <= seconds_from_now(-2.0),
        )
        .order_by(jobs.c.finished_at)
        .limit(one.limit)
    )
    return [JobKey(row.tenant, row.id) for row in rows]


_MARK_ANNOUNCED: Final = (
    update(jobs).where(tuple_(jobs.c.tenant, jobs.c.id).in_(bindparam("keys", expanding=True))).values(announced=True)
)


def mark_announced(connection: Connection, keys: list[JobKey]) -> list[None]:
    """Note that the terminal events of these jobs are in the log."""
    connection.execute(_MARK_ANNOUNCED, {"keys": sorted(set(keys))})
    return [None] * len(keys)


# -- messages that are no jobs --------------------------------------------------------------------


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


def _is(key: JobKey) -> Any:
    return and_(jobs.c.tenant == key.tenant, jobs.c.id == key.id)


def _of(table: Any, key: JobKey) -> Any:
    return and_(table.c.tenant == key.tenant, table.c.job_id == key.id)
