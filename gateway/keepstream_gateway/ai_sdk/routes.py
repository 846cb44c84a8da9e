"""The addresses of chats: send a message, resume, stop, and a token for a browser.

In: requests of ``useChat``, and the context.  Out: jobs, and their events as UI message streams.

The id of a chat may have any character, a slash for instance, so it may span parts of an address.
"""

import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream import AsyncClient, names
from keepstream.errors import IdempotencyConflictError, JobNotFoundError
from keepstream.jobs import make_job
from keepstream.results import CompletionResult, JobStatus, JobSummary
from keepstream_gateway.access.rights import Access, May
from keepstream_gateway.ai_sdk import chats, chunks, messages, requests
from keepstream_gateway.ai_sdk.chunks import Chunk, Step
from keepstream_gateway.bodies import read_object
from keepstream_gateway.context import Context
from keepstream_gateway.errors import ApiError, api_error, invalid, unforeseen
from keepstream_gateway.json_answers import JsonResponse
from keepstream_gateway.parameters import check_names

_API: Final = "/api/chat"
_CHAT: Final = f"{_API}/{{chat:path}}"
_MOST_STEPS: Final = 32  #: Of one message that are looked up, each with a query.
_MOST_NUMBERS: Final = 10  #: That are tried for a new job, while others take them.
_SECONDS: Final = 900  #: Life of a token, if none is asked for.


def routes(context: Context) -> list[BaseRoute]:
    """Return them."""
    room = _Chats(context)
    return [
        Route(_API, room.send, methods=["POST"]),
        Route(f"{_CHAT}/stream", room.resume, methods=["GET"]),
        Route(f"{_CHAT}/stop", room.stop, methods=["POST"]),
        Route(f"{_CHAT}/token", room.token, methods=["POST"]),
    ]


class _Chats:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._common: dict[str, Any] = json.loads(context.settings.chat_request)

    async def send(self, request: Request) -> Response:
        """Take a message, and stream the answer."""
        access = await self._context.gatekeeper.identify(request)
        check_names(request, ("token",))
        body = await read_object(request, self._context.settings.max_body_bytes)
        chat = chats.check_id(body.get("id"))
        self._context.gatekeeper.confine(access, chats.scope(chat), May.READ)
        client = self._context.clients.of(access.tenant)
        again = requests.trigger(body) == requests.REGENERATE
        last = await client.last_numbered(chats.prefix(chat))
        message_id = messages.continued(body.get("messages"))
        answers = [] if message_id is None else await _answers(client, chats.prefix(chat), last, message_id)
        asked = requests.to_request(
            body,
            messages.to_chat(body.get("messages"), answers),
            self._common,
            parameters=access.job_id is None,
        )
        metadata = {"chat": chat, **({} if message_id is None else {"message": message_id})}
        fields = {"tenant": access.tenant, "request": asked, "metadata": metadata}

        async def begin() -> tuple[Step, list[Chunk]]:
            job_id = await _enqueue(client, chats.prefix(chat), last, fields, again=again)
            return Step(job_id, resets=self._resets), [chunks.start(message_id or job_id, job_id)]

        return await self._answer(access, _Answer(client, begin))

    async def resume(self, request: Request) -> Response:
        """Stream the chat's present answer, from its beginning."""
        chat, access = await self._chat(request)
        client = self._context.clients.of(access.tenant)
        last = await client.last_numbered(chats.prefix(chat))
        if last is None or self._is_long_ended(last):
            return Response(status_code=204)
        message_id = last.metadata.get("message")
        opening = [chunks.start(message_id or last.id, last.id)]
        if message_id is not None:
            opening += await _earlier_steps(client, chats.prefix(chat), last, message_id)
        # What has failed already is not shown; while it waits for the next attempt, that is all there is.
        first_attempt = last.attempt + (last.status is JobStatus.RETRYING)
        step = Step(last.id, resets=self._resets, first_attempt=first_attempt)

        async def begin() -> tuple[Step, list[Chunk]]:
            return step, opening

        return await self._answer(access, _Answer(client, begin))

    async def stop(self, request: Request) -> Response:
        """Cancel the chat's present answer; what has come of it is kept."""
        chat, access = await self._chat(request, May.CANCEL)
        client = self._context.clients.of(access.tenant)
        last = await client.last_numbered(chats.prefix(chat))
        status = None if last is None or last.status.terminal else await client.cancel(last.id)
        if last is None or status is None:
            return Response(status_code=204)
        return JsonResponse({"job": last.id, "status": status})

    async def token(self, request: Request) -> Response:
        """Return a token by which a browser may send, resume and stop in this chat, and nothing else."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, ())
        chat = chats.check_id(request.path_params["chat"])
        most = self._context.settings.token_seconds
        body = await read_object(request, self._context.settings.max_body_bytes, optional=True)
        for name in map(names.shown, body.keys() - {"seconds"}):
            raise invalid(f"there is no option '{name}'; there is seconds", name, "unknown_parameter")
        seconds = body.get("seconds", min(_SECONDS, most))
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= most:
            raise invalid(f"seconds: must be a number from 1 to {most:g}", "seconds")
        token, expires_at = await self._context.gatekeeper.make_token(
            access, chats.scope(chat), seconds, frozenset({May.READ, May.CANCEL})
        )
        return JsonResponse({"token": token, "expires_at": expires_at}, 201, {"Cache-Control": "no-store"})

    @property
    def _resets(self) -> bool:
        return self._context.settings.chat_retry == "reset-step"

    async def _chat(self, request: Request, may: May = May.READ) -> tuple[str, Access]:
        """Return the chat that a request names, and the access to it."""
        access = await self._context.gatekeeper.identify(request)
        check_names(request, ("token",))
        chat = chats.check_id(request.path_params["chat"])
        self._context.gatekeeper.confine(access, chats.scope(chat), may)
        return chat, access

    def _is_long_ended(self, job: JobSummary) -> bool:
        if not job.status.terminal:
            return False
        ended = job.finished_at or job.created_at
        return datetime.now(UTC) - ended > timedelta(seconds=self._context.settings.chat_replay)

    async def _answer(self, access: Access, answer: "_Answer") -> Response:
        return await self._context.streams.answer(
            access, answer.frames(), farewell=answer.farewell, headers=chunks.HEADERS
        )


class _Answer:
    """The stream of a job that ``begin`` enqueues, or finds.

    That is done when the stream has its place: what is refused for want of one is not stored, and after the commit
    nothing is answered with an error.
    """

    def __init__(self, client: AsyncClient, begin: Callable[[], Awaitable[tuple[Step, list[Chunk]]]]) -> None:
        self._client = client
        self._begin: Callable[[], Awaitable[tuple[Step, list[Chunk]]]] | None = begin

    async def frames(self) -> AsyncGenerator[bytes]:
        """Yield the chunks of the whole answer."""
        assert self._begin is not None
        step, opening = await self._begin()
        self._begin = None  # and with it the request, which may have megabytes of images
        yield chunks.encode([*opening, *step.begin()])
        del opening
        events = self._client.follow(step.job_id, timeout=math.inf, not_found_after=0)
        try:
            async for event in events:
                found = step.apply(event)
                if found:
                    yield chunks.encode(found) + (chunks.DONE if step.ended else b"")
                if step.ended:
                    return
        finally:
            await events.aclose()

    def farewell(self, error: Exception | None) -> bytes | None:
        """Break the connection off, so that the page resumes; a clean end would be taken for the answer's.

        Where there is nothing to resume, the page is told what is wrong.
        """
        if error is None or (self._begin is None and not isinstance(error, JobNotFoundError)):
            return None
        told = api_error(error) or unforeseen()
        return chunks.encode([chunks.error(told.message)]) + chunks.DONE


async def _enqueue(
    client: AsyncClient, prefix: str, last: JobSummary | None, fields: dict[str, Any], *, again: bool
) -> str:
    """Enqueue a chat's next job and return its id.

    The same question, asked again while it is being answered, is the same job: a request may come twice.
    """
    number = 0 if last is None else names.number_in(last.id)
    if last is not None and (again or last.status.terminal):
        number += 1
    for taken in range(_MOST_NUMBERS):
        job = make_job({**fields, "id": names.numbered_id(prefix, number + taken)})
        try:
            return await client.enqueue(job)
        except IdempotencyConflictError:
            continue  # another question of the chat has this number
    raise ApiError(409, "too many messages are sent to this chat at once", "chat_is_busy")


async def _answers(
    client: AsyncClient, prefix: str, last: JobSummary | None, message_id: str
) -> list[CompletionResult]:
    """Return the stored answers that a message shows, the oldest first."""
    found: list[CompletionResult] = []
    number = -1 if last is None else names.number_in(last.id)
    while number >= 0 and len(found) < _MOST_STEPS:
        result = await client.get(names.numbered_id(prefix, number))
        if result is None or message_id not in {result.id, result.metadata.get("message")}:
            break
        found.append(result)
        number -= 1
    return [result for result in reversed(found) if result.status is JobStatus.COMPLETED]


async def _earlier_steps(client: AsyncClient, prefix: str, last: JobSummary, message_id: str) -> list[Chunk]:
    """Return the chunks of the steps that a message had before its last one began."""
    answers = await _answers(client, prefix, last, message_id)
    now = await client.get(last.id)
    asked = now.request if now is not None else None
    outputs = messages.tool_outputs((asked or {}).get("messages", []))
    find = partial(chunks.stored_step, outputs=outputs)
    return [
        chunk
        for answer in answers
        if answer.id != last.id and answer.choices
        for chunk in find(answer.id, answer.choices[0])
    ]
