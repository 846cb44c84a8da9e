"""Parameters in a request's address: known ones only.

In: a request.  Out: nothing, or an ``ApiError`` that names the parameter and the one that was meant.
"""

from collections.abc import Collection

from starlette.requests import Request

from keepstream import names
from keepstream_gateway.errors import invalid


def check_names(request: Request, known: Collection[str]) -> None:
    """Make sure that a request has no parameter but ``known`` ones.

    A known name that ends in ``[]`` stands for any with a name in the brackets: ``metadata[user]``.

    Raises:
        ApiError: it has.
    """
    for name in request.query_params:
        pattern = f"{name.partition('[')[0]}[]" if name.endswith("]") else name
        if pattern not in known:
            nearest = names.nearest(name, known)
            advice = f"did you mean '{nearest}'?" if nearest else f"there are {', '.join(sorted(known)) or 'none'}"
            shown = names.shown(name)
            raise invalid(f"there is no parameter '{shown}'; {advice}", shown, "unknown_parameter")
