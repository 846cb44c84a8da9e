"""Jobs for tests that care for a part of them only."""

from typing import Any

from keepstream.jobs import Job, parse_job


def make_job(**given: Any) -> Job:
    """Return a valid job; names that are no fields of a job become parameters of its request."""
    fields = {name: value for name, value in given.items() if name in Job.model_fields}
    parameters = {name: value for name, value in given.items() if name not in fields}
    request = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **parameters}
    return parse_job({"v": 2, "request": request, **fields})
