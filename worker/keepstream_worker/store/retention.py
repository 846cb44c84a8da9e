"""Retention: what is old enough to be deleted.

In: an age, from the command line.  Out: fewer rows; how many were deleted, or would be.

A purge walks through each tenant's jobs by age, by their index, and through the rejected messages by theirs.  A step
looks at so many rows and goes on where the one before ended, so what it costs does not grow with what there is.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.types import NullType

from keepstream.results import TERMINAL_STATUSES
from keepstream.tables import announcements, jobs, rejected_messages, seconds_from_now

Transaction = Callable[[], AbstractContextManager[Connection]]  #: Gives a connection whose work is then committed.

_STEP: Final = 500  #: Rows of one transaction, so that nobody has to wait for its locks.


class PurgeCounts(NamedTuple):
    """How much a purge deleted, or would delete."""

    jobs: int
    rejected_messages: int


class _Place(NamedTuple):
    """Where a step ended."""

    time: Any  #: As the driver has it: SQLite keeps times as texts, which differ from bound ones in their zeros.
    id: str


def purge(
    transaction: Transaction,
    older_than: float,
    tenant: str | None = None,
    *,
    count_only: bool = False,
    step: int = _STEP,
) -> PurgeCounts:
    """Delete jobs that ended that long ago and were announced, oldest first; return how much was deleted.

    Rejected messages of that age, which may hold prompts, are deleted too.

    Args:
        transaction: Called for each step.
        older_than: Seconds since a job's end, or since the rejection, by the database's clock.
        tenant: Whose jobs and messages; None: everybody's.
        count_only: Delete nothing, and return how much would be deleted.
        step: Rows that one transaction looks at.
    """
    counts = PurgeCounts(0, 0)
    for whose in [tenant] if tenant is not None else _tenants(transaction):
        for ids in _ended(transaction, whose, older_than, step):
            counts = counts._replace(jobs=counts.jobs + len(ids))
            if not count_only:
                _delete_jobs(transaction, whose, ids)
    for ids in _rejected(transaction, tenant, older_than, step):
        counts = counts._replace(rejected_messages=counts.rejected_messages + len(ids))
        if not count_only:
            with transaction() as connection:
                connection.execute(delete(rejected_messages).where(rejected_messages.c.id.in_(ids)))
    return counts


def _tenants(transaction: Transaction) -> Iterator[str]:
    """Yield the tenants that have jobs, each found by the index from the one before."""
    last = ""
    while True:
        with transaction() as connection:
            following = connection.scalar(select(func.min(jobs.c.tenant)).where(jobs.c.tenant > last))
        if following is None:
            return
        yield following
        last = following


def _ended(transaction: Transaction, tenant: str, older_than: float, step: int) -> Iterator[list[str]]:
    """Yield the ids of a tenant's jobs that may be deleted, a step's at a time."""
    # A job that ended before then was created before then.
    walk = (
        select(type_coerce(jobs.c.created_at, NullType()), jobs.c.id, _may_be_deleted(older_than))
        .where(jobs.c.tenant == tenant, jobs.c.created_at < seconds_from_now(-older_than))
        .order_by(jobs.c.created_at, jobs.c.id)
        .limit(step)
    )
    place: _Place | None = None
    while True:
        further = walk if place is None else walk.where(tuple_(jobs.c.created_at, jobs.c.id) > _bound(place))
        with transaction() as connection:
            rows = connection.execute(further).all()
        if ids := [job_id for _, job_id, may_be_deleted in rows if may_be_deleted]:
            yield ids
        if len(rows) < step:
            return
        place = _Place(rows[-1][0], rows[-1][1])


def _may_be_deleted(older_than: float) -> Any:
    announcement = exists().where(announcements.c.tenant == jobs.c.tenant, announcements.c.job_id == jobs.c.id)
    return and_(jobs.c.status.in_(TERMINAL_STATUSES), jobs.c.finished_at < seconds_from_now(-older_than), ~announcement)


def _delete_jobs(transaction: Transaction, tenant: str, ids: Collection[str]) -> None:
    """Delete jobs of a tenant; a job that has ended and was announced stays so."""
    with transaction() as connection:
        # The foreign keys delete what belongs to them.
        connection.execute(delete(jobs).where(jobs.c.tenant == tenant, jobs.c.id.in_(ids)))


def _rejected(transaction: Transaction, tenant: str | None, older_than: float, step: int) -> Iterator[list[str]]:
    """Yield the ids of rejected messages that may be deleted, a step's at a time."""
    message = rejected_messages.c
    walk = (
        select(type_coerce(message.rejected_at, NullType()), message.id, message.tenant)
        .where(message.rejected_at < seconds_from_now(-older_than))
        .order_by(message.rejected_at, message.id)
        .limit(step)
    )
    place: _Place | None = None
    while True:
        further = walk
        if place is not None:
            # The first condition is the index's.
            here = type_coerce(message.rejected_at, NullType()) >= place.time
            further = walk.where(here, tuple_(message.rejected_at, message.id) > _bound(place))
        with transaction() as connection:
            rows = connection.execute(further).all()
        if ids := [message_id for _, message_id, whose in rows if tenant in (None, whose)]:
            yield ids
        if len(rows) < step:
            return
        place = _Place(rows[-1][0], rows[-1][1])


def _bound(place: _Place) -> Any:
    return tuple_(bindparam(None, place.time, type_=NullType()), literal(place.id))
