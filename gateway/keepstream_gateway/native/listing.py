"""The filters of a listing, as the address has them.

In: the parameters of a request.  Out: the arguments of ``client.list``, or an ``ApiError`` that names the parameter.
"""

from datetime import datetime
from typing import Any, Final

from starlette.datastructures import QueryParams

from keepstream_gateway.errors import invalid

DEFAULT_LIMIT: Final = 50
MOST: Final = 1000  #: Jobs of one page.
_DIGITS: Final = 9
NAMES: Final = ("status", "model", "provider", "metadata[]", "since", "until", "before", "limit")


def read_filters(query: QueryParams) -> dict[str, Any]:
    """Return the arguments of ``client.list``.

    ``status`` may be given several times, or as several words with commas between them.

    Raises:
        ApiError: a value cannot be used.
    """
    statuses = [word for text in query.getlist("status") for word in text.split(",") if word]
    metadata = {name[len("metadata[") : -1]: value for name, value in query.items() if name.startswith("metadata[")}
    return {
        "status": statuses or None,
        "model": query.get("model"),
        "provider": query.get("provider"),
        "metadata": metadata or None,
        "since": _time(query, "since"),
        "until": _time(query, "until"),
        "before": query.get("before"),
        "limit": _limit(query.get("limit")),
    }


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    is_number = text.isascii() and text.isdecimal() and len(text) <= _DIGITS  # Python reads no number of thousands
    if not is_number or not 1 <= int(text) <= MOST:
        raise invalid(f"limit: must be a whole number from 1 to {MOST}", "limit")
    return int(text)


def _time(query: QueryParams, name: str) -> datetime | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text.upper().replace(" ", "+"))  # an unescaped + arrives as a space
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise invalid(f"{name}: must be a time with its offset, 2030-01-01T00:00:00Z for instance", name)
    return time
