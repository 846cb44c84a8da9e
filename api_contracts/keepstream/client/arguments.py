"""The arguments of the client's methods: checked, so that a mistake is told where it is made.

In: what a caller gave.  Out: the same, in the form that the client uses; or what it may be instead.

A message never repeats a text that could be a prompt.
"""

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from keepstream import names
from keepstream.errors import InvalidArgumentError
from keepstream.results import JobStatus

MAX_LIMIT: Final = 10_000  #: Jobs that one call lists at most; the next page comes by ``before``.


def check_text(name: str, value: object) -> None:
    """Raise ``InvalidArgumentError`` if ``value`` is no text."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} is a text, not {_kind(value)}")


def check_seconds(name: str, value: object) -> None:
    """Raise ``InvalidArgumentError`` if ``value`` is no number of seconds from 0 on; it may be infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
        raise InvalidArgumentError(f"{name} is a number of seconds, 0 or more (math.inf for no limit)")


def check_limit(value: object) -> None:
    """Raise ``InvalidArgumentError`` if ``value`` is no number of jobs."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
        raise InvalidArgumentError(f"limit is a number of jobs from 1 to {MAX_LIMIT}; go on with 'before'")


def check_time(name: str, value: object) -> None:
    """Raise ``InvalidArgumentError`` if ``value`` is neither None nor a time with its offset, which UTC has, too."""
    if value is None:
        return
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidArgumentError(f"{name} is a datetime with its time zone, datetime.now(UTC) for instance")
    try:
        value.astimezone(UTC)
    except OverflowError:
        raise InvalidArgumentError(f"{name}: must be a time that is in the years 1 to 9999 in UTC as well") from None


def check_metadata(value: object) -> None:
    """Raise ``InvalidArgumentError`` if ``value`` are neither None nor names with values."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise InvalidArgumentError("metadata is a mapping of names to values, {'user': 'u-17'} for instance")


def read_statuses(value: JobStatus | Collection[JobStatus] | None) -> tuple[JobStatus, ...]:
    """Return the statuses that a caller named, by the enum or by their words.

    Raises:
        InvalidArgumentError: there is no such status.
    """
    if value is None:
        return ()
    given: Any = (value,) if isinstance(value, str) else value
    if not isinstance(given, Collection):
        raise InvalidArgumentError(f"status is a JobStatus or several, not {_kind(value)}")
    return tuple(map(_read_status, given))


def _read_status(value: object) -> JobStatus:
    if isinstance(value, str) and value in set(JobStatus):
        return JobStatus(value)
    words = [str(status) for status in JobStatus]
    similar = names.nearest(value, words) if isinstance(value, str) else None
    advice = f"did you mean '{similar}'?" if similar else f"there are {', '.join(words)}"
    raise InvalidArgumentError(f"status: there is no such status; {advice}")


def _kind(value: object) -> str:
    return type(value).__name__
