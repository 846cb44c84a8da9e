"""Stores the job that a request asks for, once, however often the request comes.

In: the fields of a job, the request's headers and body.  Out: the stored job.

A client's library repeats a request whose answer was lost, or was an error of a server. With an idempotency key, in
the header ``Idempotency-Key`` or as ``idempotency_key`` in the metadata, the same job is found by the key. Without one
a repetition is known by the library's count of tries: then the job that the same body made with the same API key is
taken for it, if it goes on or has ended lately.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request

from keepstream import AsyncClient
from keepstream.errors import InvalidJobError, StoreUnavailableError
from keepstream.jobs import Job, make_job
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.access.rights import Access
from keepstream_gateway.errors import ApiError
from keepstream_gateway.openai.origin import BODY_ENTRY
from keepstream_gateway.openai.refusals import refused
from keepstream_gateway.openai.responses_request import ENVELOPE

_KEY_HEADER: Final = "idempotency-key"
_KEY_ENTRY: Final = "idempotency_key"  #: Of the metadata, for libraries that send no header of one's own.
_TRIES_HEADER: Final = "x-stainless-retry-count"
_LOST: Final = timedelta(minutes=2)  #: How long after a job was stored, or has ended, its request may be repeated.
_LONGEST: Final = timedelta(hours=1)  #: For which a request that waits for its answer may last, to be found again.


async def submit(
    client: AsyncClient, access: Access, request: Request, body: Mapping[str, Any], fields: Mapping[str, Any]
) -> CompletionResult:
    """Store a job and return it; the row is committed by then.

    Args:
        client: The tenant's.
        access: Who asks.
        request: Its headers and address count.
        body: The request's, as it came.
        fields: The job's.

    Raises:
        ApiError: it is no job.
        InvalidJobError: it is too large, or cannot be written as JSON.
        IdempotencyConflictError: the key belongs to another request.
        StoreUnavailableError: the database did not take it.
    """
    key = request.headers.get(_KEY_HEADER) or fields["metadata"].get(_KEY_ENTRY)
    digest = _digest(access.key_id, request.url.path, body)
    if key is None and request.headers.get(_TRIES_HEADER, "0") != "0":
        now = datetime.now(UTC)
        again = await client.list(metadata={BODY_ENTRY: digest}, since=now - _LONGEST, limit=1)
        # While the job goes on, its request may still be under way, and its connection may break.
        if again and now - (again[0].finished_at or now) < _LOST:
            return await _stored(client, again[0].id)
    metadata = {**fields["metadata"], BODY_ENTRY: digest}
    try:
        job = make_job({**fields, "metadata": metadata, "tenant": access.tenant, "idempotency_key": key})
    except InvalidJobError as error:
        raise refusal_of(str(error)) from None
    job_id = await client.enqueue(job)
    try:
        return await _stored(client, job_id)
    except StoreUnavailableError:  # it is committed: an error now would have the request sent again
        return _new(job)


def refusal_of(message: str) -> ApiError:
    """Return the refusal of a job, with the name of the parameter as the client knows it.

    ``message`` is the contract's; it begins with the field of the job, or names one that there is not.
    """
    field = re.match(r"(\w+): ", message)
    quoted = re.search(r"'([\w.\-]+)'", message)
    if field is not None and field[1] == "request":
        return refused(message.removeprefix(field[0]), quoted[1] if quoted else None, "invalid_value")
    name = field or quoted
    return refused(message, f"{ENVELOPE}.{name[1]}" if name else None, "invalid_value")


def _new(job: Job) -> CompletionResult:
    """Return a job as it was stored just now."""
    return CompletionResult.model_validate(
        {
            "id": job.id,
            "tenant": job.tenant,
            "status": JobStatus.QUEUED,
            "model": job.model,
            "provider": job.provider,
            "class": job.job_class,
            "request": job.request,
            "metadata": job.metadata,
            "created_at": datetime.now(UTC),
            "attempt": 0,
        }
    )


async def _stored(client: AsyncClient, job_id: str) -> CompletionResult:
    job = await client.get(job_id)
    if job is None:  # purged at once, or a database that is not the one that took it
        raise StoreUnavailableError("the database has lost a job that it took")
    return job


def _digest(key_id: str, path: str, body: Mapping[str, Any]) -> str:
    text = json.dumps([key_id, path, body], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
