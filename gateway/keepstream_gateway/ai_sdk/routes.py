"""The addresses of this room.

In: the context.  Out: routes, to the composition.
"""

from starlette.routing import BaseRoute

from keepstream_gateway.context import Context


def routes(_context: Context) -> list[BaseRoute]:
    """Return them; there are none yet."""
    return []
