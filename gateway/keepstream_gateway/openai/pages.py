"""Pages of lists, as OpenAI's API has them.

In: all entries, oldest first, and a query.  Out: the list object of one page.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keepstream_gateway.openai.refusals import refused

_MOST: Final = 100
_USUAL: Final = 20


def page(entries: Sequence[dict[str, Any]], query: Mapping[str, str], *, usual_order: str = "desc") -> dict[str, Any]:
    """Return the page that ``after``, ``limit`` and ``order`` of a query ask for.

    Raises:
        ApiError: one of them cannot be used.
    """
    ordered = list(entries) if order_of(query, usual_order) == "asc" else list(reversed(entries))
    after = query.get("after")
    if after is not None:
        places = [place for place, entry in enumerate(ordered) if entry["id"] == after]
        if not places:
            raise refused("'after' is the id of no entry of this list", "after")
        ordered = ordered[places[0] + 1 :]
    limit = limit_of(query)
    return list_object(ordered[:limit], has_more=len(ordered) > limit)


def list_object(entries: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a list object."""
    return {
        "object": "list",
        "data": list(entries),
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
        "has_more": has_more,
    }


def limit_of(query: Mapping[str, str]) -> int:
    """Return how many entries are asked for.

    Raises:
        ApiError: it is no number from 1 to 100.
    """
    text = query.get("limit", str(_USUAL))
    if not text.isascii() or not text.isdecimal() or not 1 <= len(text) <= 3 or not 1 <= int(text) <= _MOST:
        raise refused(f"'limit' must be a number from 1 to {_MOST}", "limit")
    return int(text)


def order_of(query: Mapping[str, str], usual: str) -> str:
    """Return the order that is asked for, asc or desc.

    Raises:
        ApiError: it is another one.
    """
    order = query.get("order", usual)
    if order not in {"asc", "desc"}:
        raise refused("'order' must be asc or desc", "order")
    return order
