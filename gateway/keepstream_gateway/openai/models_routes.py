"""The addresses of models: those that the tenant has used.

In: requests, and the context.  Out: model objects.

Only the workers know their providers, and most of those cannot say which models they have. So the list is of what was
asked for: the models of the tenant's newest jobs, each with the provider that it was asked from. A model that is not
in it can be used all the same.
"""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from keepstream_gateway.context import Context
from keepstream_gateway.errors import not_found
from keepstream_gateway.json_answers import JsonResponse

_NEWEST: Final = 500  #: Jobs that are looked at.


class Models:
    """Their handlers.

    Args:
        context: The gateway's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def routes(self) -> list[BaseRoute]:
        """Return the addresses."""
        return [
            Route("/v1/models", self.index, methods=["GET"]),
            Route("/v1/models/{model:path}", self.retrieve, methods=["GET"]),
        ]

    async def index(self, request: Request) -> Response:
        """Return the models."""
        return JsonResponse({"object": "list", "data": await self._models(request)})

    async def retrieve(self, request: Request) -> Response:
        """Return one model."""
        for model in await self._models(request):
            if model["id"] == request.path_params["model"]:
                return JsonResponse(model)
        raise not_found("model")

    async def _models(self, request: Request) -> list[dict[str, Any]]:
        access = await self._context.gatekeeper.require(request)
        found: dict[str, dict[str, Any]] = {}
        for job in await self._context.clients.of(access.tenant).list(limit=_NEWEST):  # newest first
            created = int(job.created_at.timestamp())
            found[job.model] = {"id": job.model, "object": "model", "created": created, "owned_by": job.provider}
        return sorted(found.values(), key=lambda model: str(model["id"]))
