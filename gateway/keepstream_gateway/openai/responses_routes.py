"""The addresses of OpenAI's Responses API.

In: requests, and the context.  Out: response objects, streams, lists of input items.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream import AsyncClient
from keepstream.errors import BrokerUnavailableError, FollowTimeoutError, StoreUnavailableError
from keepstream.names import parse_event_id
from keepstream.results import CompletionResult
from keepstream_gateway.access.rights import May
from keepstream_gateway.context import Context
from keepstream_gateway.errors import ApiError, invalid
from keepstream_gateway.json_answers import JsonResponse
from keepstream_gateway.openai.following import ended, response_frames
from keepstream_gateway.openai.ids import job_of_response, parse_cursor, position, response_id
from keepstream_gateway.openai.jobs import Jobs, blame_request, broken_off
from keepstream_gateway.openai.origin import read_origin
from keepstream_gateway.openai.pages import page
from keepstream_gateway.openai.refusals import refused
from keepstream_gateway.openai.responses_input import items_of
from keepstream_gateway.openai.responses_object import response_object
from keepstream_gateway.openai.responses_request import flag, job_fields
from keepstream_gateway.openai.submission import submit

_CANCEL_WAIT: Final = 5.0  #: Seconds for which a cancellation waits until the worker has ended the job.


class Responses:
    """Their handlers.

    Args:
        context: The gateway's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs = Jobs(context, "response", job_of_response)

    def routes(self) -> list[BaseRoute]:
        """Return the addresses."""
        return [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route("/v1/responses/{id}", self.retrieve, methods=["GET"]),
            Route("/v1/responses/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/v1/responses/{id}/input_items", self.input_items, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Store a job; answer at once (background), when it has ended, or with its stream."""
        access, client, body = await self._jobs.asked(request)
        background, stream = flag(body, "background"), flag(body, "stream")
        fields = job_fields(body, await _previous(client, body.get("previous_response_id")))

        async def begin() -> CompletionResult:
            return await submit(client, access, request, body, fields)

        if stream:
            # The job is stored within the stream, so that nothing that can refuse the stream comes after the commit.
            frames = response_frames(client, begin)
            return await self._context.streams.answer(access, frames, farewell=broken_off)
        if background:
            return JsonResponse(response_object(await begin()))
        with self._context.streams.place(access):
            job = await ended(client, request, (await begin()).id)
        blame_request(job)
        return JsonResponse(response_object(job))

    async def retrieve(self, request: Request) -> Response:
        """Return a response, or its stream from a cursor on."""
        access, client, job = await self._jobs.find(request)
        if request.query_params.get("stream") not in {"true", "True", "1"}:
            return JsonResponse(response_object(job))
        after = _cursor(request.query_params.get("starting_after"), job)

        async def begin() -> CompletionResult:
            return job

        frames = response_frames(client, begin, after)
        return await self._context.streams.answer(access, frames, farewell=broken_off)

    async def cancel(self, request: Request) -> Response:
        """Cancel a response; one that has ended stays as it is."""
        _, client, job = await self._jobs.find(request, May.CANCEL)
        if not job.status.terminal:
            await client.cancel(job.id)
            # Its worker is not heard of, and the job ends when that is found out; or a server is away by now, and the
            # job is cancelled all the same.
            with suppress(FollowTimeoutError, BrokerUnavailableError, StoreUnavailableError):
                job = await client.wait(job.id, timeout=_CANCEL_WAIT)
        return JsonResponse(response_object(job))

    async def delete(self, request: Request) -> Response:
        """Delete a response that has ended, with all that is stored of its job."""
        job_id = await self._jobs.delete(request)
        return JsonResponse({"id": response_id(job_id), "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """Return the items that a response answers."""
        _, _, job = await self._jobs.find(request)
        messages: Sequence[Any] = (job.request or {}).get("messages") or []
        items = items_of(messages[read_origin(job.metadata).instructions :], job.id)
        return JsonResponse(page(items, request.query_params))


async def _previous(client: AsyncClient, given: object) -> CompletionResult | None:
    if given is None:
        return None
    job_id = job_of_response(given) if isinstance(given, str) else None
    job = await client.get(job_id) if job_id is not None else None
    if job is None:
        raise refused("there is no such previous response", "previous_response_id", "previous_response_not_found")
    return job


def _cursor(text: str | None, job: CompletionResult) -> int:
    """Return the sequence number after which to go on.

    Raises:
        ApiError: it is none, or none that this response can have given.
    """
    if text is None:
        return -1
    try:
        after = parse_cursor(text)
    except ValueError as error:
        raise _bad_cursor(f"'starting_after' is {error}") from None
    here = position(after)
    if job.terminal_event_id is not None:
        end = parse_event_id(job.terminal_event_id)
        if (here.attempt, here.n) > end:
            raise _bad_cursor("'starting_after' is beyond the end of this response")
    elif here.attempt > job.attempt + 1:
        raise _bad_cursor("'starting_after' is beyond what this response has come to")
    return after


def _bad_cursor(message: str) -> ApiError:
    return invalid(message, "starting_after", "invalid_cursor")
