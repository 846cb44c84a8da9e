"""Follows a job for one client, and waits for its end.

In: a client of the tenant, a job.  Out: frames of the protocol that the client speaks; the ended job.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, TypeVar

from starlette.requests import ClientDisconnect, Request

from keepstream import AsyncClient
from keepstream.errors import BrokerUnavailableError, KeepstreamError, StoreUnavailableError
from keepstream.events import Event, JobCancelled, JobCompleted, JobExpired, JobFailed
from keepstream.results import CompletionResult
from keepstream_gateway.openai.chat_stream import ChatChunks
from keepstream_gateway.openai.origin import read_origin
from keepstream_gateway.openai.responses_stream import ResponseEvents

_AGAIN: Final = 1.0  #: Seconds after which a server is asked again that was away.
PATIENCE: Final = 30 * 86_400.0  #: Seconds without an event: a job may wait for days. A client may leave at any time.

T = TypeVar("T")
Begin = Callable[[], Awaitable[CompletionResult]]  #: Returns the job to be followed; may store it first.


async def response_frames(client: AsyncClient, begin: Begin, after: int = -1) -> AsyncGenerator[bytes]:
    """Yield the stream events of a response, those beyond the sequence number ``after``.

    The job's events are read from the first one on, whatever the client has: the translation needs to know them.
    """
    job = _needed_of(await begin())
    del begin  # and with it the request
    stream = ResponseEvents(job, after)
    for frame in stream.begin():
        yield frame
    async for event in _events(client, job.id):
        if isinstance(event, JobCompleted | JobFailed | JobCancelled | JobExpired):
            frames = stream.end(event, await _stored(client, job.id))
        else:
            frames = stream.feed(event)
        if frames:
            yield b"".join(frames)


async def chat_frames(client: AsyncClient, begin: Begin, *, with_usage: bool) -> AsyncGenerator[bytes]:
    """Yield the chunks of a chat completion."""
    job = _needed_of(await begin())
    del begin  # and with it the request
    chunks = ChatChunks(job, with_usage=with_usage)
    async for event in _events(client, job.id):
        if frames := chunks.feed(event):
            yield b"".join(frames)
        if chunks.ended:
            return


def _needed_of(job: CompletionResult) -> CompletionResult:
    """Return what a stream needs of a job as long as it lasts: not its messages, which may have megabytes of images."""
    request = job.request or {}
    kept = (request.get("messages") or [])[: read_origin(job.metadata).instructions]
    return job.model_copy(update={"request": request | {"messages": kept}, "choices": []})


async def ended(client: AsyncClient, request: Request, job_id: str) -> CompletionResult:
    """Return a job once it has ended.

    The job is stored: a server that is away is waited for, since an error would have a library send the request again.

    Raises:
        ClientDisconnect: whoever asked has left.
    """

    async def wait() -> CompletionResult:
        while True:
            try:
                return await client.wait(job_id, timeout=PATIENCE)
            except (BrokerUnavailableError, StoreUnavailableError):
                await asyncio.sleep(_AGAIN)

    return await _unless_gone(request, wait())


async def _events(client: AsyncClient, job_id: str) -> AsyncGenerator[Event]:
    events = client.follow(job_id, timeout=PATIENCE)
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()


async def _stored(client: AsyncClient, job_id: str) -> CompletionResult | None:
    """Return the job as it is stored, or None if the database does not say so now: events have told nearly all."""
    try:
        job = await client.get(job_id)
    except KeepstreamError:
        return None
    return job if job is not None and job.status.terminal else None


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    waiting = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        gone.cancel()
        await asyncio.wait([waiting, gone])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
