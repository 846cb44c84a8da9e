"""The jobs behind OpenAI's addresses: what all of them do first, and what a waiting client is told last.

In: requests, and the context.  Out: who asks, with a body; the stored job that an address names; errors.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from starlette.requests import Request

from keepstream import AsyncClient
from keepstream.errors import ErrorCode
from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.access.rights import Access, May
from keepstream_gateway.bodies import read_object
from keepstream_gateway.context import Context
from keepstream_gateway.errors import invalid, not_found

#: Ends for which the request is to blame; a client that waits for the answer gets a 400, as OpenAI has it.
_BLAMED_ON_REQUEST: Final = frozenset(
    {
        ErrorCode.BAD_REQUEST,
        ErrorCode.CONTENT_FILTER,
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        ErrorCode.INVALID_JOB,
        ErrorCode.NOT_FOUND,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.UNKNOWN_PROVIDER,
        ErrorCode.UNPROCESSABLE,
    }
)


class Asked(NamedTuple):
    """Who asks for a new job, and with what."""

    access: Access
    client: AsyncClient  #: The tenant's.
    body: dict[str, Any]


class Found(NamedTuple):
    """The job that an address names."""

    access: Access
    client: AsyncClient  #: The tenant's.
    job: CompletionResult


class Jobs:
    """The jobs of one kind of object.

    Args:
        context: The gateway's.
        kind: What the object is called: response, completion.
        job_of: Returns the id of the job that an object's id names, or None if it names none.
    """

    def __init__(self, context: Context, kind: str, job_of: Callable[[str], str | None]) -> None:
        self._context = context
        self._kind = kind
        self._job_of = job_of

    async def asked(self, request: Request) -> Asked:
        """Return who asks for a new job, and with what.

        Raises:
            ApiError: nobody who may, or no JSON object.
            StoreUnavailableError: the database did not answer; so do all others.
        """
        access = await self._context.gatekeeper.require(request)
        body = await read_object(request, self._context.settings.max_body_bytes)
        return Asked(access, self._context.clients.of(access.tenant), body)

    async def find(self, request: Request, may: May = May.READ) -> Found:
        """Return the job that the address names.

        Raises:
            ApiError: there is none, or it is nobody's who asks.
        """
        job_id = self._named(request)
        access = await self._context.gatekeeper.require_job(request, job_id, may)
        client = self._context.clients.of(access.tenant)
        job = await client.get(job_id)
        if job is None:
            raise not_found(self._kind)
        return Found(access, client, job)

    async def delete(self, request: Request) -> str:
        """Delete the job that the address names, with all that is stored of it, and return its id.

        Raises:
            ApiError: there is none, or it is nobody's who asks.
            JobStateError: it has not ended.
        """
        access = await self._context.gatekeeper.require(request)
        job_id = self._named(request)
        if not await self._context.clients.of(access.tenant).delete(job_id):
            raise not_found(self._kind)
        return job_id

    def _named(self, request: Request) -> str:
        job_id = self._job_of(request.path_params["id"])
        if job_id is None:
            raise not_found(self._kind)
        return job_id


def blame_request(job: CompletionResult) -> None:
    """Raise the error of a job that failed because of what was asked.

    Raises:
        ApiError: 400; the provider's word for the parameter is told.
    """
    if job.status is not JobStatus.FAILED or job.error is None or job.error.code not in _BLAMED_ON_REQUEST:
        return
    said = job.attempts[-1].provider_error if job.attempts else None
    param = (said.param if said else None) or ("model" if job.error.code == ErrorCode.NOT_FOUND else None)
    raise invalid(job.error.message, param, job.error.code)


def broken_off(_error: Exception | None) -> bytes | None:
    """Let a stream that cannot go on break off: a clean end would be taken for the answer's, and a client resumes."""
    return None
