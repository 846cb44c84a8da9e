"""The listing: a tenant's jobs, newest first, at a cost that does not grow with their number.

In: a connection inside a transaction, and what the jobs are to be like, from ``keepstream.client.base``.
Out: pages of jobs.

A listing walks back through the tenant's jobs by the index on their age, a stretch at a time.  Whatever the filters
are, it looks at a limited number of rows, and says where it stopped.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, select, tuple_

from keepstream.client import waiting
from keepstream.client.arguments import check_metadata, check_text, check_time, read_statuses
from keepstream.client.results_from_rows import SUMMARY_COLUMNS, StoredRow, job_summary
from keepstream.errors import JobNotFoundError
from keepstream.results import JobPage, JobStatus
from keepstream.tables import jobs

STRETCH: Final = 1000  #: Jobs that are looked at in one go.
LOOKED_AT: Final = 10_000  #: Jobs that one listing looks at; by metadata that takes a few tenths of a second.


@dataclass(frozen=True, slots=True)
class Wanted:
    """What listed jobs are like; None or empty: whatever."""

    statuses: Collection[JobStatus] = ()
    model: str | None = None
    provider: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    since: datetime | None = None  #: Created then or later.
    until: datetime | None = None  #: Created before.

    @property
    def is_selective(self) -> bool:
        """Whether there are filters by something other than the time."""
        return bool(self.statuses or self.model is not None or self.provider is not None or self.metadata)

    def conditions(self, job: Any) -> list[ColumnElement[bool]]:
        """Return the filters that the database applies to the columns of ``job``."""
        conditions: list[ColumnElement[bool]] = []
        if self.statuses:
            conditions.append(job["status"].in_(self.statuses))
        if self.model is not None:
            conditions.append(job["model"] == self.model)
        if self.provider is not None:
            conditions.append(job["provider"] == self.provider)
        return conditions

    def fits(self, metadata: Mapping[str, Any]) -> bool:
        """Tell whether a job's metadata fit.

        Not in SQL: PostgreSQL refuses to look into a JSON text with a NUL in it.
        """
        return all(
            name in metadata and _as_text(metadata[name]) == _as_text(self.metadata[name]) for name in self.metadata
        )


def make_wanted(
    status: JobStatus | Collection[JobStatus] | None,
    model: str | None,
    provider: str | None,
    metadata: Mapping[str, Any] | None,
    since: datetime | None,
    until: datetime | None,
) -> Wanted:
    """Return what a client's caller asks for; a status may be given by its word.

    Raises:
        InvalidArgumentError: it cannot be asked for.
    """
    for name, text in (("model", model), ("provider", provider)):
        if text is not None:
            check_text(name, text)
    check_metadata(metadata)
    check_time("since", since)
    check_time("until", until)
    return Wanted(read_statuses(status), model, provider, metadata or {}, since, until)


def list_jobs(
    connection: Connection, tenant: str, wanted: Wanted | None = None, *, before: str | None = None, limit: int = 50
) -> JobPage:
    """Return a tenant's jobs, newest first; for the next page, ``before`` is the last page's ``next_before``.

    Raises:
        JobNotFoundError: there is no job ``before``.
    """
    wanted = wanted or Wanted()
    # A page begins and ends at a job, not at a number of rows: new jobs do not shift it.
    if before is not None and connection.execute(_place(tenant, before)).one_or_none() is None:
        raise JobNotFoundError(f"there is no job {before} to continue after")
    if not wanted.is_selective:
        rows = connection.execute(_walk(tenant, wanted, before, limit)).all()
        return _page(connection, tenant, rows, next_before=rows[-1].id if len(rows) == limit else None)
    found: list[StoredRow] = []
    end = None
    for _ in range(LOOKED_AT // STRETCH):
        # Where the stretch ends is read first: by the next statement PostgreSQL shows jobs that have come meanwhile.
        last = _walk(tenant, wanted, before, 1, columns=(jobs.c.id, jobs.c.created_at)).offset(STRETCH - 1)
        end = connection.execute(last).one_or_none()
        # Filtered around the walk, not in it: a planner that looks for rare jobs might read the whole table.
        stretch = _walk(tenant, wanted, before, 2 * STRETCH, down_to=None if end is None else end.id).subquery()
        fitting = (
            select(stretch)
            .where(*wanted.conditions(stretch.c))
            .order_by(stretch.c.created_at.desc(), stretch.c.id.desc())
        )
        if not wanted.metadata:
            fitting = fitting.limit(limit - len(found))
        found += [row for row in connection.execute(fitting) if wanted.fits(row.metadata)]
        if len(found) >= limit:
            return _page(connection, tenant, found[:limit], next_before=found[limit - 1].id)
        if end is None:
            return _page(connection, tenant, found)
        before = end.id
    return _page(connection, tenant, found, next_before=before, looked_back_to=None if end is None else end.created_at)


def _walk(
    tenant: str,
    wanted: Wanted,
    before: str | None,
    limit: int,
    *,
    down_to: str | None = None,
    columns: Sequence[ColumnElement[Any]] = (*SUMMARY_COLUMNS, *waiting.COLUMNS),
) -> Select[Any]:
    """Return the statement that reads so many jobs of the tenant and the time, from the job ``before`` backwards.

    It ends at the job ``down_to``, if there is one.
    """
    walk = select(*columns).where(jobs.c.tenant == tenant)
    if wanted.since is not None:
        walk = walk.where(jobs.c.created_at >= wanted.since)
    if wanted.until is not None:
        walk = walk.where(jobs.c.created_at < wanted.until)
    here = tuple_(jobs.c.created_at, jobs.c.id)
    # Places are read by the database: SQLite keeps times as texts, which differ from bound ones in their zeros.
    if before is not None:
        walk = walk.where(here < _place(tenant, before).scalar_subquery())
    if down_to is not None:
        walk = walk.where(here >= _place(tenant, down_to).scalar_subquery())
    return walk.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)


def _place(tenant: str, job_id: str) -> Select[Any]:
    return select(jobs.c.created_at, jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _page(
    connection: Connection,
    tenant: str,
    rows: Sequence[StoredRow],
    *,
    next_before: str | None = None,
    looked_back_to: datetime | None = None,
) -> JobPage:
    reasons = waiting.reasons(connection, tenant, rows)
    return JobPage(
        (job_summary(row, reasons.get(row.id)) for row in rows),
        next_before=next_before,
        looked_back_to=looked_back_to,
    )


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
