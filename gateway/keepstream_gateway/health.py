"""Health: whether the process lives, and whether it should get requests.

In: the context.  Out: `/healthz`, which asks nobody; `/readyz`, which asks Redis and the database, however often it is
asked itself once a second at most.
"""

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from keepstream_gateway.context import Context
from keepstream_gateway.json_answers import JsonResponse

_REMEMBERED: Final = 1.0  #: Seconds.


def routes(context: Context) -> list[Route]:
    """Return the addresses of the health checks."""
    readiness = _Readiness(context)

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        found = await readiness.look()
        return JsonResponse(found, 200 if all(state == "ok" for state in found.values()) else 503)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


class _Readiness:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self._found: dict[str, str] = {}
        self._until = 0.0

    async def look(self) -> dict[str, str]:
        """Return what answers and what does not."""
        if self._context.streams.stopping:
            return {"gateway": "stopping"}
        loop = asyncio.get_running_loop()
        async with self._lock:
            if loop.time() >= self._until:
                redis, database = await asyncio.gather(
                    self._context.clients.redis_answers(), self._context.keyring.database_answers()
                )
                self._found = {"redis": _word(answers=redis), "database": _word(answers=database)}
                self._until = loop.time() + _REMEMBERED
        return self._found


def _word(*, answers: bool) -> str:
    return "ok" if answers else "away"
