"""Endings: what an attempt brought, and what becomes of its job.

In: endings, from the engine.  Out: the job's row, its output, its usage and its attempt, written together or not at
all.

A superseded worker changes nothing, and a cancel that was accepted before wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from types import SimpleNamespace
from typing import Any, Final

from sqlalchemy import Connection, Integer, bindparam, delete, or_, select, update

from keepstream.client import queries
from keepstream.client.endings import JobEnd, end_jobs, sum_usage, usage_columns
from keepstream.client.groups import GroupUpdate, insert_group
from keepstream.client.lanes import pool_id
from keepstream.results import TERMINAL_STATUSES, JobStatus, Usage, UsageSource
from keepstream.tables import attempts, choices, jobs, now, running, tool_calls
from keepstream_worker.store.conditions import among, each, is_job, is_named, name, of_job, within
from keepstream_worker.store.pools import add_pools
from keepstream_worker.store.waiting import Restart, restart
from keepstream_worker.values import Ended, Ending, JobKey, Outcome


class NotEnded(StrEnum):
    """Why an ending was not written."""

    SUPERSEDED = "superseded"  #: Somebody else owns the job now.
    CANCEL_REQUESTED = "cancel_requested"  #: A cancel came first: end it as cancelled.


class _Standing(Enum):
    """How the job's row stands to an ending that is answered with ``Ended``."""

    OWNED = auto()  #: The attempt runs, and owns its job if it is among those that run: the ending is to be written.
    WRITTEN = auto()  #: By this very worker, whose commit was cut before it heard of it.


def end(connection: Connection, endings: list[Ending]) -> list[Ended | NotEnded]:
    """Write each ending whose attempt still owns its job: status, output, usage and attempt, or nothing."""
    rows = _lock(connection, [ending.key for ending in endings])
    standings = [_standing(rows.get(ending.key), ending) for ending in endings]
    places = _stop(
        connection,
        [ending for ending, standing in zip(endings, standings, strict=True) if standing is _Standing.OWNED],
    )
    standings = [
        NotEnded.SUPERSEDED if standing is _Standing.OWNED and ending.key not in places else standing
        for ending, standing in zip(endings, standings, strict=True)
    ]
    owned = [ending for ending, standing in zip(endings, standings, strict=True) if standing is _Standing.OWNED]
    if owned:
        _write_attempts(connection, owned)
        _write_outputs(connection, owned)
    totals = {ending.key: _total(connection, ending) for ending in endings}
    end_jobs(
        connection,
        [_job_end(ending, totals[ending.key]) for ending in owned if ending.status is not JobStatus.RETRYING],
    )
    pauses = [ending for ending in owned if ending.status is JobStatus.RETRYING]
    _write_pauses(connection, pauses, rows, places)
    return [
        standing if isinstance(standing, NotEnded) else totals[ending.key]
        for ending, standing in zip(endings, standings, strict=True)
    ]


#: The fence: whose attempt is not among those that run has lost its job. It is not to be found by its worker, of whose
#: dead rows there may be very many; PostgreSQL cannot know that.
_STOP: Final = {
    dialect: delete(running).where(owned).returning(running)
    for dialect, owned in within(
        running.c.tenant, running.c.job_id, running.c.attempt, running.c.worker_id.concat("")
    ).items()
}


def _stop(connection: Connection, endings: list[Ending]) -> dict[JobKey, Any]:
    """Take jobs, whose rows ``_lock`` holds, from those that run; return the rows of those that did so as said."""
    named = [(*ending.key, ending.attempt, ending.worker_id) for ending in endings]
    return {JobKey(row.tenant, row.job_id): row for row in each(connection, _STOP, named)}


_LOCK: Final = {
    dialect: select(
        jobs.c.tenant,
        jobs.c.id,
        jobs.c.status,
        jobs.c.attempt,
        jobs.c.terminal_event_id,
        jobs.c.next_reason,
        jobs.c.queue,
        jobs.c["class"].label("job_class"),
        jobs.c.cancel_requested_at,
    )
    .where(named)
    .order_by(jobs.c.tenant, jobs.c.id)  # one order of locks for all workers
    .with_for_update(key_share=True)
    for dialect, named in among(jobs).items()
}


def _lock(connection: Connection, keys: list[JobKey]) -> dict[JobKey, Any]:
    """Return the jobs' rows, which nobody else can change until the transaction ends."""
    return {JobKey(row.tenant, row.id): row for row in each(connection, _LOCK, keys)}


def _standing(row: Any, ending: Ending) -> NotEnded | _Standing:
    """Return how a job's row stands to an ending; whether the attempt still runs is for ``_stop`` to say."""
    if row is None or row.attempt != ending.attempt:
        return NotEnded.SUPERSEDED
    if row.status == JobStatus.RUNNING:
        if row.cancel_requested_at is not None and ending.status in (JobStatus.COMPLETED, JobStatus.RETRYING):
            return NotEnded.CANCEL_REQUESTED  # a cancel that was accepted wins over everything that comes after it
        return _Standing.OWNED
    written = row.status == ending.status and row.terminal_event_id == ending.terminal_event_id
    if ending.status is JobStatus.RETRYING:
        written = written and row.next_reason == ending.next_reason  # else a sweeper took it from us
    return _Standing.WRITTEN if written else NotEnded.SUPERSEDED


_WRITE_ATTEMPT: Final = GroupUpdate(
    attempts,
    key=("tenant", "job_id", "number"),
    columns=(
        "outcome",
        "first_token_ms",
        "error_code",
        "error_message",
        "http_status",
        "retryable",
        "provider_request_id",
        "provider_error",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "usage_source",
        "usage",
    ),
    also={"finished_at": now()},
)


def _write_attempts(connection: Connection, endings: list[Ending]) -> None:
    for ending in endings:
        if ending.outcome is Outcome.UNSTARTED:
            connection.execute(
                delete(attempts).where(of_job(attempts, ending.key), attempts.c.number == ending.attempt)
            )
    _WRITE_ATTEMPT.execute(connection, [((*ending.key, ending.attempt), _attempt_values(ending)) for ending in endings])


def _attempt_values(ending: Ending) -> dict[str, Any]:
    return {
        "outcome": ending.outcome,
        "first_token_ms": ending.first_token_ms,
        "error_code": ending.failure and ending.failure.code,
        "error_message": ending.failure and ending.failure.message,
        "http_status": ending.failure and ending.failure.http_status,
        "retryable": ending.retryable,
        "provider_request_id": ending.provider_request_id,
        "provider_error": _provider_error(ending),
        "usage": ending.usage.details,
        **usage_columns(ending.usage),
    }


def _provider_error(ending: Ending) -> dict[str, Any] | None:
    words = ending.failure and ending.failure.provider_error
    return words.model_dump(exclude_none=True) if words else None


_DELETE_CHOICES: Final = delete(choices).where(is_named(choices))
_DELETE_TOOL_CALLS: Final = delete(tool_calls).where(is_named(tool_calls))


def _write_outputs(connection: Connection, endings: list[Ending]) -> None:
    # The output of a job is that of its last attempt.
    with_output = [name(ending.key) for ending in endings if ending.attempt > 1]
    if with_output:
        connection.execute(_DELETE_TOOL_CALLS, with_output)
        connection.execute(_DELETE_CHOICES, with_output)
    choice_rows = [
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
    call_rows = [
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
    insert_group(connection, choices, choice_rows)
    insert_group(connection, tool_calls, call_rows)


def _total(connection: Connection, ending: Ending) -> Ended:
    """Sum the job's attempts, including the one that ends now; a first attempt needs no look at the table."""
    if ending.outcome is Outcome.UNSTARTED and ending.attempt == 1:
        rows: Sequence[Any] = []
    elif ending.attempt == 1:
        rows = [
            SimpleNamespace(
                **usage_columns(ending.usage),
                usage=ending.usage.details,
                outcome=ending.outcome,
                http_status=ending.failure and ending.failure.http_status,
            )
        ]
    else:
        rows = _attempts_of(connection, ending.key)
    return Ended(sum_usage(rows), len(rows))


def _attempts_of(connection: Connection, key: JobKey) -> Sequence[Any]:
    """Return the job's attempts, after an estimate of the prompt is replaced by what another attempt's report says."""
    rows = connection.execute(select(attempts).where(of_job(attempts, key)).order_by(attempts.c.number)).all()
    counts = {
        (row.provider, row.model): row.prompt_tokens
        for row in rows
        if row.usage_source == UsageSource.PROVIDER and row.prompt_tokens
    }
    wrong = [
        row
        for row in rows
        if row.usage_source == UsageSource.ESTIMATED
        and counts.get((row.provider, row.model), row.prompt_tokens) != row.prompt_tokens
    ]
    if not wrong:
        return rows
    for row in wrong:
        prompt = counts[row.provider, row.model]
        connection.execute(
            update(attempts)
            .where(of_job(attempts, key), attempts.c.number == row.number)
            .values(prompt_tokens=prompt, total_tokens=prompt + (row.completion_tokens or 0))
        )
    return connection.execute(select(attempts).where(of_job(attempts, key))).all()


def _job_end(ending: Ending, total: Ended) -> JobEnd:
    return JobEnd(
        tenant=ending.key.tenant,
        job_id=ending.key.id,
        held_attempt=ending.attempt,
        attempt=ending.attempt,
        status=ending.status,
        contents=[choice.content for choice in ending.choices],
        usage=total.usage,
        terminal_event_id=ending.terminal_event_id,
        error_code=ending.failure.code if ending.failure else None,
        error_message=ending.failure.message if ending.failure else None,
        provider_details=ending.provider_details,
    )


_WRITE_PAUSE: Final = (
    update(jobs)
    .where(is_named(jobs))
    .values(
        {column: bindparam(column) for column in ("status", "error_code", "error_message", "partial", "next_reason")}
        | {"tries": jobs.c.tries - bindparam("uncounted", type_=Integer)}
    )
)


def _write_pauses(
    connection: Connection, endings: list[Ending], rows: Mapping[JobKey, Any], places: Mapping[JobKey, Any]
) -> None:
    """Let jobs, whose rows ``_lock`` holds, wait for their next attempt."""
    if not endings:
        return
    connection.execute(
        _WRITE_PAUSE,
        [
            name(ending.key)
            | {
                "status": ending.status,
                "error_code": ending.failure and ending.failure.code,
                "error_message": ending.failure and ending.failure.message,
                "partial": bool(ending.choices),
                "next_reason": ending.next_reason,
                # A shutdown is not the job's fault.
                "uncounted": not ending.counted or ending.outcome in (Outcome.INTERRUPTED, Outcome.UNSTARTED),
            }
            for ending in endings
        ],
    )
    add_pools(
        connection,
        [
            queries.pool_values(rows[ending.key].queue, rows[ending.key].job_class, ending.chain)
            for ending in endings
            if ending.chain
        ],
    )
    restart(connection, [_restart(ending, rows[ending.key], places[ending.key]) for ending in endings])


def _restart(ending: Ending, row: Any, place: Any) -> Restart:
    unforeseen = max((ending.least_tokens or 0) - place.tokens, 0)
    return Restart(
        ending.key,
        ending.attempt,
        place.lane,
        pool_id(row.queue, row.job_class, ending.chain) if ending.chain else place.pool,
        place.prompt_tokens + unforeseen,
        place.max_tokens,
        due_in=ending.retry_in,
    )


@dataclass(frozen=True, slots=True)
class LateUsage:
    """What an attempt has cost that its worker could not write: it died, or was superseded."""

    key: JobKey
    attempt: int
    usage: Usage


def record_usage(connection: Connection, usages: list[LateUsage]) -> list[None]:
    """Write the usage of lost attempts that nobody has reported yet; if their job has ended, sum it up again.

    What the provider has reported replaces an estimate.
    """
    _lock(connection, [late.key for late in usages])  # so that no ending sums up between the two writes
    for late in usages:
        known_worse = attempts.c.total_tokens.is_(None)
        if late.usage.source is UsageSource.PROVIDER:
            known_worse = or_(known_worse, attempts.c.usage_source == UsageSource.ESTIMATED)
        written = connection.execute(
            update(attempts)
            .where(of_job(attempts, late.key), attempts.c.number == late.attempt, known_worse)
            .values(usage_columns(late.usage) | {"usage": late.usage.details})
        ).rowcount
        if not written:
            continue
        total = sum_usage(_attempts_of(connection, late.key))
        if total is not None:
            connection.execute(
                update(jobs)
                .where(is_job(late.key), jobs.c.status.in_(TERMINAL_STATUSES))
                .values(usage_columns(total) | {"usage": total.details})
            )
    return [None] * len(usages)
