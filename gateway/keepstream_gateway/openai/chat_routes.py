"""The addresses of chat completions, live and stored.

In: requests, and the context.  Out: completions, streams of chunks, lists.

Every job of the tenant that is completed is a stored completion, whichever way it came: nothing has to be asked to be
stored.
"""

import re
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream.results import CompletionResult, JobStatus
from keepstream_gateway.context import Context
from keepstream_gateway.errors import ApiError
from keepstream_gateway.json_answers import JsonResponse
from keepstream_gateway.openai.chat_object import chat_completion, stored_messages
from keepstream_gateway.openai.chat_request import job_fields, wants_usage
from keepstream_gateway.openai.following import chat_frames, ended
from keepstream_gateway.openai.ids import chat_id, job_of_chat
from keepstream_gateway.openai.jobs import Jobs, blame_request, broken_off
from keepstream_gateway.openai.pages import limit_of, list_object, order_of, page
from keepstream_gateway.openai.refusals import refused
from keepstream_gateway.openai.responses_request import flag
from keepstream_gateway.openai.submission import submit

_METADATA: Final = re.compile(r"metadata\[(.+)\]")


class ChatCompletions:
    """Their handlers.

    Args:
        context: The gateway's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs = Jobs(context, "completion", job_of_chat)

    def routes(self) -> list[BaseRoute]:
        """Return the addresses."""
        return [
            Route("/v1/chat/completions", self.create, methods=["POST"]),
            Route("/v1/chat/completions", self.stored, methods=["GET"]),
            Route("/v1/chat/completions/{id}", self.retrieve, methods=["GET"]),
            Route("/v1/chat/completions/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/chat/completions/{id}/messages", self.messages, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Store a job; answer when it has ended, or with its stream."""
        access, client, body = await self._jobs.asked(request)
        stream, with_usage = flag(body, "stream"), wants_usage(body)
        fields = job_fields(body)

        async def begin() -> CompletionResult:
            return await submit(client, access, request, body, fields)

        if stream:
            frames = chat_frames(client, begin, with_usage=with_usage)
            return await self._context.streams.answer(access, frames, farewell=broken_off)
        with self._context.streams.place(access):
            job = await ended(client, request, (await begin()).id)
        blame_request(job)
        return JsonResponse(chat_completion(_completed(job)))

    async def retrieve(self, request: Request) -> Response:
        """Return a stored completion."""
        found = await self._jobs.find(request)
        return JsonResponse(chat_completion(_completed(found.job)))

    async def stored(self, request: Request) -> Response:
        """Return a page of the stored completions, newest first."""
        access = await self._context.gatekeeper.require(request)
        client = self._context.clients.of(access.tenant)
        query = request.query_params
        if order_of(query, "desc") == "asc":
            raise refused("stored completions are listed newest first: order must be desc", "order")
        after = query.get("after")
        before = job_of_chat(after) if after is not None else None
        if after is not None and before is None:
            raise refused("'after' is the id of no stored completion", "after")
        wanted = {match[1]: value for name, value in query.items() if (match := _METADATA.fullmatch(name))}
        found = await client.list(
            status=JobStatus.COMPLETED,
            model=query.get("model"),
            metadata=wanted or None,
            before=before,
            limit=limit_of(query),
        )
        # One after the other: of each its answer is kept only, and not its request, which may have megabytes of images.
        completions = [chat_completion(job) for summary in found if (job := await client.get(summary.id)) is not None]
        return JsonResponse(list_object(completions, has_more=found.next_before is not None))

    async def messages(self, request: Request) -> Response:
        """Return the messages that a stored completion answers."""
        _, _, job = await self._jobs.find(request)
        return JsonResponse(page(stored_messages(job.request, job.id), request.query_params, usual_order="asc"))

    async def delete(self, request: Request) -> Response:
        """Delete a completion, with all that is stored of its job."""
        job_id = await self._jobs.delete(request)
        return JsonResponse({"id": chat_id(job_id), "object": "chat.completion.deleted", "deleted": True})


def _completed(job: CompletionResult) -> CompletionResult:
    """Return a job that is completed.

    Raises:
        ApiError: it is not: 409 while it goes on, 424 if it has ended otherwise. Never an error of the 5xx kind, at
            which a library would send the request again: the job is stored, and has been paid for.
    """
    if job.status is JobStatus.COMPLETED:
        return job
    if not job.status.terminal:
        raise ApiError(409, f"the completion is {job.status}; ask again when it has ended", "not_completed")
    message = job.error.message if job.error else f"the completion is {job.status}"
    code = job.error.code if job.error else str(job.status)
    raise ApiError(424, message, code)
