"""Jobs for tests that care for a part of them only."""

from typing import Any

from keepstream import jobs
from keepstream.jobs import Job


def make_job(**given: Any) -> Job:
    """Return a valid job; names that are no fields of a job become parameters of its request."""
    fields = {name: value for name, value in given.items() if name in Job.model_fields}
    parameters = {name: value for name, value in given.items() if name not in fields}
    request = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **parameters}
    return jobs.make_job({"request": request, **fields})
