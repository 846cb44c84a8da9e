"""Stores the job that a request asks for, once, however often the request comes.

In: the fields of a job, the request's headers and body.  Out: the stored job.

A client's library repeats a request whose answer was lost, or was an error of a server. With an idempotency key, in
the header ``Idempotency-Key`` or as ``idempotency_key`` in the metadata, the same job is found by the key. Without one
a repetition is known by the library's count of tries: then the job that the same body made with the same API key within
the last two minutes is taken for it.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request

from keepstream import AsyncClient
from keepstream.errors import StoreUnavailableError
from keepstream.jobs import make_job
from keepstream.results import CompletionResult
from keepstream_gateway.access.rights import Access
from keepstream_gateway.openai.origin import BODY_ENTRY

_KEY_HEADER: Final = "idempotency-key"
_KEY_ENTRY: Final = "idempotency_key"  #: Of the metadata, for libraries that send no header of one's own.
_TRIES_HEADER: Final = "x-stainless-retry-count"
_SAME_REQUEST: Final = timedelta(minutes=2)  #: How long after a request its repetition may come.


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
        InvalidJobError: it is no job.
        IdempotencyConflictError: the key belongs to another request.
        StoreUnavailableError: the database did not take it.
    """
    key = request.headers.get(_KEY_HEADER) or fields["metadata"].get(_KEY_ENTRY)
    digest = _digest(access.key_id, request.url.path, body)
    if key is None and request.headers.get(_TRIES_HEADER, "0") != "0":
        again = await client.list(metadata={BODY_ENTRY: digest}, since=datetime.now(UTC) - _SAME_REQUEST, limit=1)
        if again:
            return await _stored(client, again[0].id)
    metadata = {**fields["metadata"], BODY_ENTRY: digest}
    job = make_job({**fields, "metadata": metadata, "tenant": access.tenant, "idempotency_key": key})
    return await _stored(client, await client.enqueue(job))


async def _stored(client: AsyncClient, job_id: str) -> CompletionResult:
    job = await client.get(job_id)
    if job is None:  # purged at once, or a database that is not the one that took it
        raise StoreUnavailableError("the database has lost a job that it took")
    return job


def _digest(key_id: str, path: str, body: Mapping[str, Any]) -> str:
    text = json.dumps([key_id, path, body], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
