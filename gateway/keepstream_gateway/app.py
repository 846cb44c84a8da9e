"""The composition: from settings to an ASGI application.

In: settings.  Out: the application, which owns one family of clients for as long as it runs.

Each room is a folder with ``routes(context)`` in its module ``routes``; the rooms do not know each other.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream_gateway import health
from keepstream_gateway.ai_sdk import routes as ai_sdk
from keepstream_gateway.console import routes as console
from keepstream_gateway.context import Context, make_context
from keepstream_gateway.envelope import Envelope
from keepstream_gateway.native import routes as native
from keepstream_gateway.openai import routes as openai
from keepstream_gateway.settings import Settings

_ROOMS: Final[tuple[Callable[[Context], list[BaseRoute]], ...]] = (
    openai.routes,
    native.routes,
    ai_sdk.routes,
    console.routes,
)
_CLOSING: Final = 5.0  #: Seconds that closing the connections may take.


def make_app(settings: Settings) -> tuple[Starlette, Context]:
    """Return the application and its context; it connects when it is used.

    Raises:
        InvalidSettingError: a URL cannot be used.
    """
    context = make_context(settings)
    routes: list[BaseRoute] = [*health.routes(context), *context.metrics.routes()]
    for room in _ROOMS:
        routes += room(context)
    paths = {route.endpoint: route.path for route in routes if isinstance(route, Route)}

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
        context.streams.start()
        try:
            yield
        finally:
            await context.streams.stop()
            for close in context.at_the_end:
                close()
            async with asyncio.timeout(_CLOSING):
                await context.clients.close()
                await context.keyring.close()

    middleware = [Middleware(Envelope, context.metrics, paths)]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "Retry-After"],
            max_age=600,
        )
        middleware.insert(0, cors)  # around all else, because a page is to be able to read errors as well
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _leave_to_envelope}
    )
    # It would lead to an address without TLS, for it does not know of the proxy, and a client would send its key there.
    app.router.redirect_slashes = False
    return app, context


async def _leave_to_envelope(_request: Request, error: Exception) -> Response:
    """Keep the framework from answering: all errors have one shape."""
    raise error
