"""The listing: jobs of a tenant, or of all, newest first, at a cost that does not grow with their number.

In: a connection inside a transaction, and what the jobs are to be like, from ``keepstream.client.base``; from the
console also for all tenants at once.  Out: pages of jobs.

A listing walks back through the jobs by an index on their age, a stretch at a time.  Whatever the filters are, it looks
at a limited number of rows, and says where it stopped.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

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
    error_code: str | None = None  #: Of those that have failed, or ended in another way that has one.
    containing: str | None = None  #: In the beginning of the prompt; capital letters count as small ones.

    @property
    def is_selective(self) -> bool:
        """Whether there are filters by something other than the time."""
        named = (self.model, self.provider, self.error_code, self.containing)
        return bool(self.statuses or self.metadata or any(text is not None for text in named))

    def conditions(self, job: Any) -> list[ColumnElement[bool]]:
        """Return the filters that the database applies to the columns of ``job``."""
        conditions: list[ColumnElement[bool]] = []
        if self.statuses:
            conditions.append(job["status"].in_(self.statuses))
        if self.model is not None:
            conditions.append(job["model"] == self.model)
        if self.provider is not None:
            conditions.append(job["provider"] == self.provider)
        if self.error_code is not None:
            conditions.append(job["error_code"] == self.error_code)
        if self.containing is not None:
            conditions.append(job["prompt_start"].icontains(self.containing, autoescape=True))
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


class Place(NamedTuple):
    """A job of a listing, from which it goes on."""

    tenant: str
    job_id: str


def list_jobs(
    connection: Connection, tenant: str, wanted: Wanted | None = None, *, before: str | None = None, limit: int = 50
) -> JobPage:
    """Return a tenant's jobs, newest first; for the next page, ``before`` is the last page's ``next_before``.

    Raises:
        JobNotFoundError: there is no job ``before``.
    """
    page, last = _list(connection, tenant, wanted or Wanted(), None if before is None else Place(tenant, before), limit)
    page.next_before = None if last is None else last.job_id
    return page


def list_all_jobs(
    connection: Connection, wanted: Wanted | None = None, *, before: Place | None = None, limit: int = 50
) -> tuple[JobPage, Place | None]:
    """Return the jobs of all tenants, newest first, and from where the next page goes on; None: there are no more.

    Raises:
        JobNotFoundError: there is no job ``before``.
    """
    return _list(connection, None, wanted or Wanted(), before, limit)


def _list(
    connection: Connection, tenant: str | None, wanted: Wanted, before: Place | None, limit: int
) -> tuple[JobPage, Place | None]:
    # A page begins and ends at a job, not at a number of rows: new jobs do not shift it.
    if before is not None and connection.execute(_find(before)).one_or_none() is None:
        raise JobNotFoundError(f"there is no job {before.job_id} to continue after")
    if not wanted.is_selective:
        rows = connection.execute(_walk(tenant, wanted, before, limit)).all()
        return _page(connection, rows), _place(rows[-1]) if len(rows) == limit else None
    found: list[StoredRow] = []
    end = None
    for _ in range(LOOKED_AT // STRETCH):
        # Where the stretch ends is read first: by the next statement PostgreSQL shows jobs that have come meanwhile.
        last = _walk(tenant, wanted, before, 1, columns=(jobs.c.tenant, jobs.c.id, jobs.c.created_at))
        end = connection.execute(last.offset(STRETCH - 1)).one_or_none()
        # Filtered around the walk, not in it: a planner that looks for rare jobs might read the whole table.
        down_to = None if end is None else _place(end)
        stretch = _walk(tenant, wanted, before, 2 * STRETCH, down_to=down_to).subquery()
        order = [column.desc() for column in _age(stretch.c, tenant)]
        fitting = select(stretch).where(*wanted.conditions(stretch.c)).order_by(*order)
        if not wanted.metadata:
            fitting = fitting.limit(limit - len(found))
        found += [row for row in connection.execute(fitting) if wanted.fits(row.metadata)]
        if len(found) >= limit:
            return _page(connection, found[:limit]), _place(found[limit - 1])
        if end is None:
            return _page(connection, found), None
        before = down_to
    return _page(connection, found, looked_back_to=None if end is None else end.created_at), before


def _age(job: Any, tenant: str | None) -> list[ColumnElement[Any]]:
    """Return the columns by which jobs are in order: as the index has them for one tenant, and for all."""
    return [job.created_at, job.id] if tenant is not None else [job.created_at, job.tenant, job.id]


def _walk(
    tenant: str | None,
    wanted: Wanted,
    before: Place | None,
    limit: int,
    *,
    down_to: Place | None = None,
    columns: Sequence[ColumnElement[Any]] = (*SUMMARY_COLUMNS, *waiting.COLUMNS),
) -> Select[Any]:
    """Return the statement that reads so many jobs of the tenant and the time, from the job ``before`` backwards.

    It ends at the job ``down_to``, if there is one.
    """
    walk = select(*columns)
    if tenant is not None:
        walk = walk.where(jobs.c.tenant == tenant)
    if wanted.since is not None:
        walk = walk.where(jobs.c.created_at >= wanted.since)
    if wanted.until is not None:
        walk = walk.where(jobs.c.created_at < wanted.until)
    age = _age(jobs.c, tenant)
    here = tuple_(*age)
    # Places are read by the database: SQLite keeps times as texts, which differ from bound ones in their zeros.
    if before is not None:
        walk = walk.where(here < _find(before, age).scalar_subquery())
    if down_to is not None:
        walk = walk.where(here >= _find(down_to, age).scalar_subquery())
    return walk.order_by(*(column.desc() for column in age)).limit(limit)


def _find(place: Place, columns: Sequence[ColumnElement[Any]] = (jobs.c.id,)) -> Select[Any]:
    return select(*columns).where(jobs.c.tenant == place.tenant, jobs.c.id == place.job_id)


def _place(row: StoredRow) -> Place:
    return Place(row.tenant, row.id)


def _page(connection: Connection, rows: Sequence[StoredRow], *, looked_back_to: datetime | None = None) -> JobPage:
    reasons = waiting.reasons_of_all(connection, rows)
    return JobPage((job_summary(row, reasons.get((row.tenant, row.id))) for row in rows), looked_back_to=looked_back_to)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
