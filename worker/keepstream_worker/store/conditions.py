"""Conditions that the store's statements share: which rows are a job's.

In: keys of jobs.  Out: SQL conditions and parameters, to the other modules of the store.

Whoever changes a job locks its row in ``jobs`` first, several in the order of their keys, and then those in the other
tables; only a turn, which locks no job's row, takes from ``waiting`` what nobody has locked.
"""

from collections.abc import Collection
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Table, and_, bindparam, tuple_

from keepstream.results import JobStatus
from keepstream.tables import jobs
from keepstream_worker.values import JobKey

WAITING: Final = (JobStatus.QUEUED, JobStatus.RETRYING)


def is_job(key: JobKey) -> ColumnElement[bool]:
    """Select a job's row."""
    return and_(jobs.c.tenant == key.tenant, jobs.c.id == key.id)


def of_job(table: Table, key: JobKey) -> ColumnElement[bool]:
    """Select a table's rows of a job."""
    return and_(table.c.tenant == key.tenant, table.c.job_id == key.id)


def among(table: Table) -> ColumnElement[bool]:
    """Select a table's rows of the jobs that the parameter ``keys`` names; for statements that ``each`` executes."""
    name = table.c.id if table is jobs else table.c.job_id
    return tuple_(table.c.tenant, name).in_(bindparam("keys", expanding=True))


def each(connection: Connection, statement: Any, keys: Collection[Any]) -> list[Any]:
    """Execute a statement with a parameter ``keys`` for these, in their order, each once; return its rows.

    SQLite, which has no statistics, would rather read a whole table than look for several keys, so there it is
    executed for one after the other.
    """
    ordered = sorted(set(keys))
    if not ordered:
        return []
    groups = [ordered] if connection.dialect.name == "postgresql" else [[key] for key in ordered]
    return [row for group in groups for row in connection.execute(statement, {"keys": group})]


def is_named(table: Table) -> ColumnElement[bool]:
    """Select a table's rows of the job that the parameters of ``name`` name."""
    name = table.c.id if table is jobs else table.c.job_id
    return and_(table.c.tenant == bindparam("of_tenant"), name == bindparam("of_job"))


def name(key: JobKey) -> dict[str, Any]:
    """Return the parameters that ``is_named`` needs."""
    return {"of_tenant": key.tenant, "of_job": key.id}
