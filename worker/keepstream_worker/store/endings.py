"""Endings: what an attempt brought, and what becomes of its job.

In: endings, from the engine.  Out: the job's row, its output, its usage and its attempt, written together
or not at all.  Exists so that a superseded worker changes nothing, and a cancel that came first wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace
from typing import Any, Final

from sqlalchemy import Connection, Float, Integer, and_, bindparam, delete, select, tuple_, update

from keepstream.client.queries import sum_usage
from keepstream.results import TERMINAL_STATUSES, JobStatus, Usage, output_sha256
from keepstream.tables import attempts, choices, jobs, now, seconds_from_now, tool_calls
from keepstream_worker.store.values import is_job, of_job
from keepstream_worker.values import Ended, Ending, JobKey, Outcome


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
    books = {ending.key: _total_usage(connection, ending) for ending in endings}
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
        jobs.c.next_reason,
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
        if ending.status is JobStatus.RETRYING:
            ours = ours and row.next_reason == ending.next_reason  # else a sweeper took it from us
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
            connection.execute(
                delete(attempts).where(of_job(attempts, ending.key), attempts.c.number == ending.attempt)
            )
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


def _total_usage(connection: Connection, ending: Ending) -> Ended:
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
        rows = connection.execute(select(attempts).where(of_job(attempts, ending.key))).all()
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
            .where(of_job(attempts, late.key), attempts.c.number == late.attempt, attempts.c.total_tokens.is_(None))
            .values(_usage_values(late.usage))
        ).rowcount
        if not written:
            continue
        total = sum_usage(connection.execute(select(attempts).where(of_job(attempts, late.key))).all())
        if total is not None:
            sums = _usage_values(total)
            del sums["usage"]
            connection.execute(update(jobs).where(is_job(late.key), jobs.c.status.in_(TERMINAL_STATUSES)).values(sums))
    return [None] * len(usages)
