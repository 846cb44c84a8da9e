"""Conditions that the store's statements share: which rows are a job's.

In: keys of jobs.  Out: SQL conditions and parameters, to the other modules of the store.

Whoever changes a job locks its row in ``jobs`` first, several in the order of their keys, and then those in the other
tables; only a turn, which locks no job's row, takes from ``waiting`` what nobody has locked.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Table, and_, bindparam, func, select, tuple_

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


def among(table: Table) -> Mapping[str, ColumnElement[bool]]:
    """Select a table's rows of the jobs that are named when ``each`` executes the statement; by dialect."""
    return within(table.c.tenant, table.c.id if table is jobs else table.c.job_id)


def within(*columns: ColumnElement[Any]) -> Mapping[str, ColumnElement[bool]]:
    """Select the rows whose ``columns`` have the values that ``each`` is given; by dialect.

    SQLite would read a whole table for a list of values, but looks for each that a query brings.
    """
    value = func.json_each(bindparam("keys")).table_valued("value").c.value
    brought = select(*(func.json_extract(value, f"$[{place}]") for place in range(len(columns))))
    row = tuple_(*columns)
    return {"postgresql": row.in_(bindparam("keys", expanding=True)), "sqlite": row.in_(brought)}


def each(connection: Connection, statements: Mapping[str, Any], keys: Collection[Any]) -> list[Any]:
    """Execute a statement, given by dialect, for the rows ``among`` these keys; return what it returns."""
    ordered = sorted(set(keys))
    if not ordered:
        return []
    dialect = connection.dialect.name
    return list(
        connection.execute(statements[dialect], {"keys": json.dumps(ordered) if dialect == "sqlite" else ordered})
    )


def is_named(table: Table) -> ColumnElement[bool]:
    """Select a table's rows of the job that the parameters of ``name`` name."""
    name = table.c.id if table is jobs else table.c.job_id
    return and_(table.c.tenant == bindparam("of_tenant"), name == bindparam("of_job"))


def name(key: JobKey) -> dict[str, Any]:
    """Return the parameters that ``is_named`` needs."""
    return {"of_tenant": key.tenant, "of_job": key.id}
