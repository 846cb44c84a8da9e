"""The addresses of the console: pages for people, and what they do there.

In: requests of browsers, and the context.  Out: pages; a job's events as server-sent ones; cancels and repeats.

Whoever has signed in with a key that has the right ``console`` sees the jobs of all tenants.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from keepstream import names
from keepstream.errors import JobNotFoundError, JobStateError, KeepstreamError
from keepstream.events import parse_event
from keepstream.results import Choice, CompletionResult, JobPage, JobStatus
from keepstream.transcript import Transcript
from keepstream_gateway.access.rights import Access
from keepstream_gateway.console import job_view, jobs_view, overview_view, rejected_view
from keepstream_gateway.console.guard import Guard
from keepstream_gateway.console.pages import HEADERS, Pages, title_of
from keepstream_gateway.console.reading import Reading
from keepstream_gateway.console.session import Session
from keepstream_gateway.context import Context
from keepstream_gateway.errors import ApiError, api_error, not_found
from keepstream_gateway.json_answers import JsonResponse

Page = Callable[[Request, Session], Awaitable[Response]]
_SO_FAR: Final = 0.7  #: Seconds in which the log of a job is read for a page that does not follow it.
_ID: Final = re.compile(names.ID_PATTERN)


def routes(context: Context) -> list[BaseRoute]:
    """Return them."""
    return Console(context).routes()


class Console:
    """The pages of one gateway."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pages = Pages()
        self._guard = Guard(context, self._pages)
        self._reading = Reading(context.settings.database_url)
        context.at_the_end.append(self._reading.close)

    def routes(self) -> list[BaseRoute]:
        """Return the addresses."""
        job = "/jobs/{tenant}/{job_id}"
        return [
            Route("/", self._for_people(self._overview)),
            Route("/series", self._for_people(self._series)),
            Route("/jobs", self._for_people(self._jobs)),
            Route(job, self._for_people(self._job)),
            Route(f"{job}/events", self._for_people(self._events)),
            Route(f"{job}/request.json", self._for_people(self._request_json)),
            Route(f"{job}/result.json", self._for_people(self._result_json)),
            Route(f"{job}/cancel", self._for_people(self._cancel), methods=["POST"]),
            Route(f"{job}/retry", self._for_people(self._retry), methods=["POST"]),
            Route("/rejected", self._for_people(self._rejected)),
            Route("/login", self._open(self._guard.show_login)),
            Route("/login", self._open(self._guard.log_in), methods=["POST"]),
            Route("/logout", self._for_people(self._guard.log_out), methods=["POST"]),
            Route("/assets/{version}/{name:path}", self._open(self._pages.send_file)),
        ]

    # -- who may, and what an error looks like --

    def _for_people(self, page: Page) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            session = await self._guard.session_of(request)
            return self._guard.ask(request) if session is None else await page(request, session)

        return self._open(answer)

    def _open(self, page: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await page(request)
            except Exception as error:
                told = api_error(error)
                if told is None:
                    raise
                return self._problem(request, told)

        return answer

    def _problem(self, request: Request, error: ApiError) -> Response:
        message = f"{error.message[:1].upper()}{error.message[1:]}"
        headers = {"x-trouble": f"This page is not up to date: {error.message}.".encode("ascii", "replace").decode()}
        if error.retry_after is not None:
            headers["Retry-After"] = str(round(error.retry_after))
        again = request.url.path if request.method == "GET" else "/"
        if not message.endswith("."):
            message += "."
        return self._pages.render(
            "problem.html", error.status, headers, title=title_of(error), message=message, again=again
        )

    # -- pages --

    async def _overview(self, request: Request, session: Session) -> Response:
        span = overview_view.span_named(request.query_params.get("span", ""))
        now, past = await asyncio.gather(self._reading.now(), self._reading.history(span))
        view = overview_view.show(span, now.activity, past, now.recent)
        return self._pages.render("overview.html", session=session, here="/", view=view, spans=overview_view.SPANS)

    async def _series(self, request: Request, _session: Session) -> Response:
        span = overview_view.span_named(request.query_params.get("span", ""))
        return JsonResponse(overview_view.series(span, await self._reading.history(span)), headers=HEADERS)

    async def _jobs(self, request: Request, session: Session) -> Response:
        ask = jobs_view.asked(request.query_params)
        if _ID.fullmatch(ask.q) and not ask.before:
            owners = [ask.tenant] if ask.tenant else await self._reading.owners(ask.q)
            for tenant in owners[:1] if len(owners) == 1 else ():
                if ask.tenant == "" or await self._find(tenant, ask.q) is not None:
                    return self._go(request, jobs_view.address_of(tenant, ask.q))
        now, problem = datetime.now(UTC), ""
        page, older = JobPage(), None
        if ask.tenant and not _ID.fullmatch(ask.tenant):
            problem = "No tenant can have this name: it consists of letters, digits, '.', '_' and '-'."
        elif not all(text.isprintable() for text in (ask.q, ask.model, ask.provider, ask.error)):
            problem = "These words cannot be looked for: they hold characters that no text has."
        else:
            page, older, is_gone = await self._reading.jobs(ask.tenant, jobs_view.wanted(ask, now), ask.place)
            if is_gone:
                problem = "The job after which this page begins has been deleted; begin at the newest."
        view = jobs_view.show(ask, page, older, await self._reading.tenants(), now, problem)
        return self._pages.render("jobs.html", session=session, here="/jobs", view=view)

    async def _job(self, request: Request, session: Session) -> Response:
        job = await self._wanted(request)
        so_far = None
        if "still" in request.query_params and not job.status.terminal:
            so_far = await self._so_far(job)
        return self._job_page(job, session, so_far=so_far)

    def _job_page(
        self,
        job: CompletionResult,
        session: Session,
        code: int = 200,
        problem: str = "",
        so_far: Sequence[Choice] | None = None,
    ) -> Response:
        view = job_view.show(job, datetime.now(UTC), so_far)
        return self._pages.render("job.html", code, session=session, here="/jobs", view=view, problem=problem)

    async def _rejected(self, request: Request, session: Session) -> Response:
        before = request.query_params.get("before", "")
        known = before if _ID.fullmatch(before) else None
        messages = await self._reading.rejected(rejected_view.PAGE, known)
        view = rejected_view.show(messages, datetime.now(UTC), is_first=known is None)
        return self._pages.render("rejected.html", session=session, here="/rejected", view=view)

    # -- one job --

    async def _request_json(self, request: Request, _session: Session) -> Response:
        job = await self._wanted(request)
        return JsonResponse(job.request, headers=HEADERS)

    async def _result_json(self, request: Request, _session: Session) -> Response:
        job = await self._wanted(request)
        return JsonResponse(job.model_dump(mode="json", exclude={"request"}), headers=HEADERS)

    async def _events(self, request: Request, session: Session) -> Response:
        job = await self._wanted(request)
        after = request.headers.get("last-event-id") or None
        return await self._context.streams.answer(
            Access(job.tenant, session.key_id), self._frames(job, after), farewell=lambda _: b""
        )

    async def _frames(self, job: CompletionResult, after: str | None) -> AsyncGenerator[bytes]:
        client = self._context.clients.of(job.tenant)
        if not await client.check_follow(job.id, after):
            return
        async with aclosing(client.follow_raw(job.id, after)) as events:
            async for event in events:
                # JSON has line breaks only where they mean nothing; a frame of one line has none.
                yield b"id: %b\ndata: %b\n\n" % (event.id.encode(), b"".join(event.payload.splitlines()))

    async def _so_far(self, job: CompletionResult) -> list[Choice]:
        """Return what has come of a job's answer, as far as its log says so within a moment."""
        began, transcript = time.time() * 1000, Transcript()
        client = self._context.clients.of(job.tenant)
        events = client.follow_raw(job.id, on_waiting=lambda _: None)  # the page says what it waits for
        with suppress(KeepstreamError, TimeoutError):  # Redis is away, or there is no more for now
            async with aclosing(events), asyncio.timeout(_SO_FAR):
                async for raw in events:
                    event = parse_event(raw.payload)
                    transcript.apply(event)
                    if event.ts >= began or transcript.terminal is not None:
                        break
        return [choice.to_choice() for choice in transcript.choices]

    async def _cancel(self, request: Request, session: Session) -> Response:
        await self._guard.form_of(request, session)
        job = await self._wanted(request)
        await self._context.clients.of(job.tenant).cancel(job.id)
        return self._go(request, jobs_view.address_of(job.tenant, job.id))

    async def _retry(self, request: Request, session: Session) -> Response:
        await self._guard.form_of(request, session)
        job = await self._wanted(request)
        try:
            again = await self._context.clients.of(job.tenant).retry(job.id, force=job.status is JobStatus.COMPLETED)
        except JobStateError as error:
            return self._job_page(job, session, 409, str(error))
        return self._go(request, jobs_view.address_of(job.tenant, again))

    async def _wanted(self, request: Request) -> CompletionResult:
        """Return the job that an address names.

        Raises:
            ApiError: there is none.
        """
        job = await self._find(request.path_params["tenant"], request.path_params["job_id"])
        if job is None:
            raise not_found()
        return job

    async def _find(self, tenant: str, job_id: str) -> CompletionResult | None:
        if not (_ID.fullmatch(tenant) and _ID.fullmatch(job_id)):
            return None
        try:
            return await self._context.clients.of(tenant).get(job_id)
        except JobNotFoundError:
            return None

    def _go(self, request: Request, address: str) -> Response:
        """Lead a browser to another page, also where a script has asked."""
        if "hx-request" in request.headers:
            return Response(status_code=204, headers={**HEADERS, "HX-Redirect": address})
        return RedirectResponse(address, 303, HEADERS)
