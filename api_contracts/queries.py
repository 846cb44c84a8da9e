"""The questions and statements the client puts to the database; the only SQL outside the worker.

In: an open connection of a sync engine, a job or its id.  Out: stored results and the rows of new
and cancelled jobs, to the client and (``queued_values``) to the worker's store.  Exists so that a
producer and a worker write one and the same row for a job.

Nothing here commits: the caller's ``engine.begin()`` decides what belongs together.
"""

import json
from typing import Any

from api_contracts import names, tables
from api_contracts.jobs import Job
from api_contracts.results import JobStatus


def queued_values(job: Job) -> dict[str, Any]:
    """Return the column values of a new ``queued`` row; its times are the database's own clock."""
    return {
        "tenant": job.tenant,
        "id": job.id,
        "status": JobStatus.QUEUED.value,
        "model": job.model,
        "provider": job.provider,
        "request": json.dumps(job.to_wire(), ensure_ascii=True),
        "request_hash": job.request_hash(),
        "metadata": job.metadata,
        "created_at": tables.now(),
        "due_at": tables.now(),
        # The message is on its way; if no worker has claimed the job by then, it was lost.
        "resend_at": tables.seconds_from_now(names.RESEND_AFTER),
        "expires_at": job.expires_at,
        "attempt": 0,
        "tries": 0,
        "max_attempts": job.max_attempts,
        "next_reason": "first",
        "partial": False,
        "announced": False,
    }
