"""The addresses of jobs: create, list, get, cancel, run again, delete, follow, and a token for a browser.

In: requests, and the context.  Out: results and summaries of the contract as JSON; events as server-sent ones.

What was committed is answered without asking any server again, so nothing that is accepted is answered with a 5xx.
"""

import math
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream import names
from keepstream.jobs import make_job
from keepstream_gateway.access.rights import May
from keepstream_gateway.bodies import read_object
from keepstream_gateway.context import Context
from keepstream_gateway.errors import invalid, not_found
from keepstream_gateway.json_answers import JsonResponse
from keepstream_gateway.native import listing, openapi
from keepstream_gateway.native.events import FAREWELL, Silence, frame, frames
from keepstream_gateway.parameters import check_names
from keepstream_gateway.streaming import Shortcut

_JOBS: Final = "/api/jobs"
_JOB: Final = f"{_JOBS}/{{job_id}}"
_KEY_HEADER: Final = "Idempotency-Key"
_SECONDS: Final = 900  #: Life of a token, if none is asked for.


def routes(context: Context) -> list[BaseRoute]:
    """Return them."""
    native = _Native(context)
    return [
        Route(_JOBS, native.create, methods=["POST"]),
        Route(_JOBS, native.list_jobs, methods=["GET"]),
        Route(_JOB, native.get, methods=["GET"]),
        Route(_JOB, native.delete, methods=["DELETE"]),
        Route(f"{_JOB}/cancel", native.cancel, methods=["POST"]),
        Route(f"{_JOB}/retry", native.retry, methods=["POST"]),
        Route(f"{_JOB}/token", native.token, methods=["POST"]),
        Route(f"{_JOB}/events", native.events, methods=["GET"]),
        Route("/api/openapi.json", native.openapi, methods=["GET"]),
    ]


class _Native:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._document = openapi.document()

    async def create(self, request: Request) -> Response:
        """Accept a job."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, ())
        fields = await read_object(request, self._context.settings.max_body_bytes)
        key = request.headers.get(_KEY_HEADER)
        if key is not None and fields.setdefault("idempotency_key", key) != key:
            raise invalid(f"the body has another idempotency_key than the header {_KEY_HEADER}", "idempotency_key")
        job = make_job({"tenant": access.tenant, **fields})
        job_id = await self._context.clients.of(access.tenant).enqueue(job)
        return _accepted(job_id)

    async def list_jobs(self, request: Request) -> Response:
        """Return the tenant's jobs, newest first."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, listing.NAMES)
        page = await self._context.clients.of(access.tenant).list(**listing.read_filters(request.query_params))
        return JsonResponse(
            {
                "jobs": [summary.model_dump(mode="json") for summary in page],
                "next_before": page.next_before,
                "looked_back_to": None if page.looked_back_to is None else page.looked_back_to.isoformat(),
            }
        )

    async def get(self, request: Request) -> Response:
        """Return a job with everything stored about it."""
        job_id = request.path_params["job_id"]
        access = await self._context.gatekeeper.require_job(request, job_id)
        check_names(request, ("token",))
        result = await self._context.clients.of(access.tenant).get(job_id)
        if result is None:
            raise not_found()
        return JsonResponse(result.model_dump(mode="json"))

    async def delete(self, request: Request) -> Response:
        """Delete a job that has ended."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, ())
        if not await self._context.clients.of(access.tenant).delete(request.path_params["job_id"]):
            raise not_found()
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        """Cancel a job, in any state."""
        job_id = request.path_params["job_id"]
        access = await self._context.gatekeeper.require_job(request, job_id, May.CANCEL)
        check_names(request, ("token",))
        status = await self._context.clients.of(access.tenant).cancel(job_id)
        if status is None:
            raise not_found()
        return JsonResponse({"id": job_id, "status": status})

    async def retry(self, request: Request) -> Response:
        """Run an ended job again, as a new one."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, ())
        body = await self._options(request, {"force": False})
        if not isinstance(body["force"], bool):
            raise invalid("force: must be true or false", "force")
        job_id = request.path_params["job_id"]
        again = await self._context.clients.of(access.tenant).retry(job_id, force=body["force"])
        return _accepted(again, retry_of=job_id)

    async def token(self, request: Request) -> Response:
        """Return a token for one job, to be given to a browser."""
        access = await self._context.gatekeeper.require(request)
        check_names(request, ())
        most = self._context.settings.token_seconds
        body = await self._options(request, {"seconds": min(_SECONDS, most), "may": [May.READ]})
        seconds, may = body["seconds"], body["may"]
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= most:
            raise invalid(f"seconds: must be a number from 1 to {most:g}", "seconds")
        if not isinstance(may, list) or not may or not all(item in list(May) for item in may):
            raise invalid(f"may: must be a list of {' and '.join(May)}", "may")
        job_id = request.path_params["job_id"]
        await self._context.clients.of(access.tenant).check_follow(job_id)
        token, expires_at = await self._context.gatekeeper.make_token(access, job_id, seconds, frozenset(map(May, may)))
        events = f"{_JOBS}/{job_id}/events?token={token}"
        return JsonResponse({"token": token, "expires_at": expires_at, "events": events}, 201, _PRIVATE)

    async def events(self, request: Request) -> Response:
        """Send a job's events, past and live, from a cursor to the end."""
        job_id = request.path_params["job_id"]
        access = await self._context.gatekeeper.require_job(request, job_id)
        check_names(request, ("after", "token"))
        # The header comes from a browser that resumes, whose address still has the cursor it began with.
        after = request.headers.get("last-event-id") or request.query_params.get("after") or None
        client = self._context.clients.of(access.tenant)
        if not await client.check_follow(job_id, after):
            return Response(status_code=204)  # the reader has everything; this stops an EventSource
        silence = Silence()
        shortcut = Shortcut()
        raw = client.follow_raw(
            job_id,
            after,
            timeout=math.inf,
            not_found_after=0,
            on_waiting=silence.note,
            offer=lambda event: shortcut.write(frame(event)),
        )
        return await self._context.streams.answer(
            access, frames(raw), farewell=lambda _: FAREWELL, comment=silence.comment, shortcut=shortcut
        )

    async def openapi(self, _request: Request) -> Response:
        """Return the description of these addresses."""
        return Response(self._document, media_type="application/json")

    async def _options(self, request: Request, known: dict[str, Any]) -> dict[str, Any]:
        """Return the options in an optional body, with what is left out from ``known``."""
        body = await read_object(request, self._context.settings.max_body_bytes, optional=True)
        for name in body:
            if name not in known:
                shown = names.shown(name)
                raise invalid(f"there is no option '{shown}'; there are {', '.join(known)}", shown, "unknown_parameter")
        return known | body


_PRIVATE: Final = {"Cache-Control": "no-store"}


def _accepted(job_id: str, **further: str) -> Response:
    links = {"job": f"{_JOBS}/{job_id}", "events": f"{_JOBS}/{job_id}/events"}
    return JsonResponse({"id": job_id, **further, "links": links}, 202, {"Location": links["job"]})
