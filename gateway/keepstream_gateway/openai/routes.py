"""The addresses of this room.

In: the context.  Out: routes, to the composition.
"""

from starlette.routing import BaseRoute

from keepstream_gateway.context import Context
from keepstream_gateway.openai.chat_routes import ChatCompletions
from keepstream_gateway.openai.models_routes import Models
from keepstream_gateway.openai.responses_routes import Responses


def routes(context: Context) -> list[BaseRoute]:
    """Return them."""
    return [*Responses(context).routes(), *ChatCompletions(context).routes(), *Models(context).routes()]
