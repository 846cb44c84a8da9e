"""The end of a job: the one place that writes what its row says once nothing more will happen to it.

In: jobs that end, from ``queries`` (a cancel) and from the worker's store (an attempt ended, nobody may make another
one, the job expired or is refused).  Out: their rows, and their ends to be announced.

Everybody locks a job's row before those in the narrow tables, but for a turn, which locks nothing else.  It is part of
the client because a client that cancels a waiting job ends it itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from keepstream import tables
from keepstream.client.groups import GroupUpdate
from keepstream.errors import ErrorCode
from keepstream.results import TERMINAL_STATUSES, JobStatus, Usage, UsageSource, output_sha256
from keepstream.tables import announcements, arrivals, attempts, choices, jobs, running, waiting

# Why a job ended, where more than one place can end it so.
CANCELLED_MESSAGE: Final = "the job was cancelled"
EXPIRED_MESSAGE: Final = "the job waited past its expires_at"
TOTAL_TIMEOUT_MESSAGE: Final = "the job's total time is used up"
WORKERS_LOST_MESSAGE: Final = "its workers died, each time"


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ends."""

    tenant: str
    job_id: str
    held_attempt: int  #: The row's attempt number as the caller knows it; if it is another one, nothing is written.
    attempt: int  #: The number under which the job ends.
    status: JobStatus  #: A terminal one.
    contents: Sequence[str]  #: Of the stored choices, in the order of their index.
    usage: Usage | None  #: Summed over the attempts; None: none of them cost anything.
    terminal_event_id: str | None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    provider_details: dict[str, Any] | None = None


_COLUMNS: Final = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
_TOP: Final = 3  #: Levels of a report that are summed.

_END: Final = GroupUpdate(
    jobs,
    key=("tenant", "id", "attempt"),
    columns=(
        "status",
        "attempt",
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
        "usage",
    ),
    also={"finished_at": tables.now()},
    only=[jobs.c.status != status for status in sorted(TERMINAL_STATUSES)],
)

_ENDED: Final = select(jobs.c.tenant, jobs.c.id, jobs.c.finished_at)
_ENDED_AS: Final = (jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.status)
_NAMES: Final = ("of_tenant", "of_job", "attempt", "status")


def _to_announce(dialect: Any, *ended: ColumnElement[bool]) -> Any:
    insert = dialect.insert(announcements).from_select(["tenant", "job_id", "ended_at"], _ENDED.where(*ended))
    return insert.on_conflict_do_nothing()


#: For one after the other, or for all at once where each costs a plan.
_ANNOUNCE: Final = _to_announce(
    sqlite, *(column == bindparam(name) for column, name in zip(_ENDED_AS, _NAMES, strict=True))
)
_ANNOUNCE_ALL: Final = _to_announce(postgresql, tuple_(*_ENDED_AS).in_(bindparam("ended", expanding=True)))


def end_jobs(connection: Connection, ends: Sequence[JobEnd]) -> None:
    """Write the ends of jobs whose rows the caller's transaction has locked; their ends are to be announced.

    What waits or runs for them is for the caller to delete, in the same transaction.
    """
    if not ends:
        return
    _END.execute(connection, [((end.tenant, end.job_id, end.held_attempt), _values(end)) for end in ends])
    named = [(end.tenant, end.job_id, end.attempt, end.status) for end in ends]
    if connection.dialect.name == "postgresql":
        connection.execute(_ANNOUNCE_ALL, {"ended": named})
    else:
        connection.execute(_ANNOUNCE, [dict(zip(_NAMES, values, strict=True)) for values in named])


def _values(end: JobEnd) -> dict[str, Any]:
    return {
        "status": end.status,
        "attempt": end.attempt,
        "error_code": end.error_code,
        "error_message": end.error_message,
        "partial": bool(end.contents) and end.status is not JobStatus.COMPLETED,
        "output_sha256": output_sha256(end.contents),
        "terminal_event_id": end.terminal_event_id,
        "provider_details": end.provider_details,
        "usage": end.usage and end.usage.details,
        **usage_columns(end.usage),
    }


def stop_waiting(connection: Connection, tenant: str, job_id: str) -> bool:
    """Take a job, whose row the caller's transaction has locked, from those that wait; return whether it did.

    If not, a turn has just taken it, or it did not wait: what runs then is seen by the next statement.
    """
    mine = and_(waiting.c.tenant == tenant, waiting.c.job_id == job_id)
    seq = connection.scalar(delete(waiting).where(mine).returning(waiting.c.seq))
    if seq is not None:
        connection.execute(delete(arrivals).where(arrivals.c.seq == seq))
    return seq is not None


def end_unclaimed(
    connection: Connection, tenant: str, job_id: str, attempt: int, status: JobStatus, code: ErrorCode, message: str
) -> None:
    """End a job that no living worker runs, and whose row the caller's transaction has locked.

    It ends under the number after ``attempt``, the row's, so that its last event is fenced like any other.  The
    output that an earlier attempt stored stays.
    """
    stop_waiting(connection, tenant, job_id)
    connection.execute(delete(running).where(running.c.tenant == tenant, running.c.job_id == job_id))
    contents = connection.scalars(
        select(choices.c.content)
        .where(choices.c.tenant == tenant, choices.c.job_id == job_id)
        .order_by(choices.c.index)
    ).all()
    tries = connection.execute(select(attempts).where(attempts.c.tenant == tenant, attempts.c.job_id == job_id)).all()
    end = JobEnd(
        tenant,
        job_id,
        held_attempt=attempt,
        attempt=attempt + 1,
        status=status,
        contents=contents,
        usage=sum_usage(tries),
        # A snapshot of the stored output goes first, so that followers hold what the row holds.
        terminal_event_id=f"{attempt + 1}-{2 if contents else 1}",
        error_code=code,
        error_message=message,
    )
    end_jobs(connection, [end])


def sum_usage(tries: Sequence[Any]) -> Usage | None:
    """Return the sum over a job's attempts (rows), with the weakest of their sources; None if none cost anything.

    A figure that no attempt reported is null.
    """
    # Attempts that were refused before the model saw them, or carried over another's output, cost nothing.
    paid = [attempt for attempt in tries if (attempt.http_status or 200) < 400 and attempt.outcome != "recovered"]
    if not paid:
        return None

    def total(column: str) -> int | None:
        known = [getattr(attempt, column) for attempt in paid if getattr(attempt, column) is not None]
        return sum(known) if known else None

    sources = {attempt.usage_source or UsageSource.UNKNOWN for attempt in paid}
    weakest = next(
        source for source in (UsageSource.UNKNOWN, UsageSource.ESTIMATED, UsageSource.PROVIDER) if source in sources
    )
    return Usage(
        prompt_tokens=total("prompt_tokens"),
        completion_tokens=total("completion_tokens"),
        total_tokens=total("total_tokens"),
        source=weakest,
        details=_summed([attempt.usage for attempt in paid if attempt.usage]) or None,
    )


def _summed(reports: Sequence[dict[str, Any]], depth: int = _TOP) -> dict[str, Any]:
    """Return the sums of all figures in ``reports`` but the token counts that have columns of their own.

    Only amounts can be added: neither texts and flags nor rates, whose names say ``per``.
    """
    sums: dict[str, Any] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report[name] for report in reports if report.get(name) is not None]
        if (name in _COLUMNS and depth == _TOP) or "_per_" in name:
            continue
        if all(isinstance(value, dict) for value in values) and depth:
            if inner := _summed(values, depth - 1):
                sums[name] = inner
        elif values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            total = sum(values)
            sums[name] = round(total, 12) if isinstance(total, float) else total  # 0.1 + 0.2 is 0.3
    return sums


def usage_columns(usage: Usage | None) -> dict[str, Any]:
    """Return the columns of a job or an attempt that hold its usage; all null for None."""
    return {
        "prompt_tokens": usage and usage.prompt_tokens,
        "completion_tokens": usage and usage.completion_tokens,
        "total_tokens": usage and usage.total_tokens,
        "usage_source": usage and usage.source,
    }
