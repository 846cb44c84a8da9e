"""The addresses of jobs: create, list, get, cancel, run again, follow.

In: requests, and the context.  Out: results and summaries of the contract as JSON; events as server-sent ones.
"""

from starlette.routing import BaseRoute

from keepstream_gateway.context import Context


def routes(_context: Context) -> list[BaseRoute]:
    """Return them."""
    return []
