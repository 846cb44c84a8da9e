"""Conditions that the store's statements share: which rows are a job's, and which jobs wait.

In: a job's key.  Out: SQL conditions, to the other modules of the store.
"""

from typing import Final

from sqlalchemy import ColumnElement, Table, and_

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
