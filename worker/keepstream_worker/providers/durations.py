"""Durations: the seconds that a text in a header or an error means, in all forms in which providers write them.

In: texts, from ``failures`` and ``rate_headers``.
Out: seconds, or None for what is none. Pure.
"""

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

#: Seconds of a unit.
UNIT_SECONDS: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

_MAX_WAIT: Final = 30 * 86_400.0  #: Seconds; anything longer is a mistake.
_LEAST_DATE: Final = 1e9  #: From here on a number is a time since 1970 rather than a wait, in seconds …
_LEAST_DATE_IN_MS: Final = 1e12  #: … or in milliseconds.
_DURATION: Final = re.compile(
    r"(?:(?P<d>[0-9]+)d)?(?:(?P<h>[0-9]+)h)?(?:(?P<m>[0-9]+)m(?!s))?"
    r"(?:(?P<s>[0-9]+(?:\.[0-9]+)?)s)?(?:(?P<ms>[0-9]+(?:\.[0-9]+)?)ms)?"
)
_LONGEST_DURATION: Final = 64  #: Characters; a body may hold a text of megabytes in its place.


def plausible(seconds: float) -> float | None:
    """Return ``seconds`` if somebody could mean them as a wait."""
    return seconds if math.isfinite(seconds) and 0 < seconds <= _MAX_WAIT else None


def of_number(text: str, unit: float = 1.0) -> float | None:
    """Parse a number of units; ``unit`` is in seconds."""
    try:
        value = float(text) * unit
    except ValueError:
        return None
    return plausible(value)


def of_units(text: str) -> float | None:
    """Parse a duration such as ``6m0s``, ``2m59.56s`` or ``20ms``."""
    if len(text) > _LONGEST_DURATION:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    return plausible(sum(float(value) * UNIT_SECONDS[unit] for unit, value in match.groupdict().items() if value))


def until_date(text: str, now: float) -> float | None:
    """Parse a date as HTTP and mail write it; return the seconds from ``now``, since 1970, until then."""
    try:
        return _until(parsedate_to_datetime(text), now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def until_reset(text: str, now: float) -> float | None:
    """Parse a moment or a wait of any form but HTTP's date; return the seconds from ``now``, since 1970, until then."""
    try:
        number = float(text)
    except ValueError:
        return of_units(text) or _until_iso_date(text, now)
    if number >= _LEAST_DATE_IN_MS:
        return plausible(number / 1000 - now)
    if number >= _LEAST_DATE:
        return plausible(number - now)
    return plausible(number)


def _until_iso_date(text: str, now: float) -> float | None:
    if len(text) > _LONGEST_DURATION:
        return None
    try:
        return _until(datetime.fromisoformat(text.strip()), now)
    except (ValueError, OverflowError):
        return None


def _until(date: datetime, now: float) -> float | None:
    # A date without a zone is in UTC; `timestamp` would take it for local time.
    return plausible((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
