"""Inspection: the operator's questions to the database.

In: a connection inside a transaction.  Out: who works, how much waits, what was rejected, what holds up the database;
to the doctor.  Nothing is written, and nothing is counted without end.
"""

from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Table, func, select, text

from keepstream.tables import jobs, rejected_messages, running, seconds_from_now, seconds_until, waiting, workers

COUNTED: Final = 10_000  #: Rows that are counted; one more means more than that.
LONG_TRANSACTION: Final = 300.0  #: Seconds; far more than any of ours takes.


class Backlog(NamedTuple):
    """Jobs that have not ended yet, of all tenants; each number is ``COUNTED`` + 1 at most."""

    queued: int  #: Waiting, and not started yet.
    running: int
    retrying: int  #: Waiting, and started before.
    oldest_wait: float | None  #: Seconds for which the oldest due job waits; None: none waits.


class LongTransaction(NamedTuple):
    """A transaction in this database that has been open for long, whoever's it is."""

    pid: int  #: Of the server's process.
    application: str  #: As it calls itself; may be empty.
    state: str  #: ``active``, ``idle in transaction`` …
    age: float  #: Seconds since it began.


class Overview(NamedTuple):
    """What goes on, in all tenants."""

    workers: list[str]  #: Ids of the workers that are alive; an id begins with the name of the worker's host.
    backlog: Backlog
    rejected: int  #: Messages of the last 24 hours that were no valid jobs; ``COUNTED`` + 1 at most.
    long_transactions: list[LongTransaction] | None  #: The oldest first; None: it is SQLite, which lists none.


def overview(connection: Connection, lease: float) -> Overview:
    """Return what goes on; a worker is alive that gave a sign of life within ``lease`` seconds."""
    alive = select(workers.c.id).where(workers.c.heartbeat_at > seconds_from_now(-lease)).order_by(workers.c.id)
    recent = rejected_messages.c.rejected_at > seconds_from_now(-86_400.0)
    return Overview(
        workers=list(connection.scalars(alive)),
        backlog=_backlog(connection),
        rejected=_count(connection, rejected_messages, recent),
        long_transactions=_long_transactions(connection),
    )


def _backlog(connection: Connection) -> Backlog:
    return Backlog(
        queued=_count(connection, waiting, waiting.c.restarted_due.is_(None)),
        running=_count(connection, running),
        retrying=_count(connection, waiting, waiting.c.restarted_due.is_not(None)),
        oldest_wait=_oldest_wait(connection),
    )


def _count(connection: Connection, table: Table, *conditions: ColumnElement[bool]) -> int:
    some = select(table.primary_key.columns[0]).where(*conditions).limit(COUNTED + 1).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def _oldest_wait(connection: Connection) -> float | None:
    oldest = (
        select(waiting.c.tenant, waiting.c.job_id)
        .where(waiting.c.restarted_due.is_(None))
        .order_by(waiting.c.seq)
        .limit(1)
        .subquery()
    )
    here = (jobs.c.tenant == oldest.c.tenant) & (jobs.c.id == oldest.c.job_id)
    restarted = (
        select(waiting.c.restarted_due).where(waiting.c.restarted_due.is_not(None)).limit(COUNTED + 1).subquery()
    )
    untils = [
        connection.scalar(select(seconds_until(jobs.c.created_at)).join(oldest, here)),
        connection.scalar(select(seconds_until(func.min(restarted.c.restarted_due)))),
    ]
    waits = [max(0.0, -until) for until in untils if until is not None]
    return max(waits, default=None)


def _long_transactions(connection: Connection) -> list[LongTransaction] | None:
    if connection.dialect.name != "postgresql":
        return None
    rows = connection.execute(_OPEN_FOR_LONG, {"seconds": LONG_TRANSACTION, "most": COUNTED})
    return [LongTransaction(row.pid, row.application_name, row.state or "", row.age) for row in rows]


#: Those of another database hold up nothing here. Of other roles' a member of ``pg_read_all_stats`` is shown the age.
_OPEN_FOR_LONG: Final = text(
    """
    SELECT pid, application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::float AS age
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
      AND xact_start <= clock_timestamp() - make_interval(secs => :seconds)
    ORDER BY xact_start LIMIT :most
    """
)
