"""Words: how the console writes numbers, times and statuses.

In: values.  Out: texts for people, and the tone in which they are shown.  Pure.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from keepstream.results import JobStatus, Usage, UsageSource

NOTHING: Final = "\N{EN DASH}"  #: Stands where there is no figure.

_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Tone:
    """A word with a tone: good, busy, warn, bad, or none of them."""

    word: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time."""

    iso: str
    full: str
    ago: str


_STATUSES: Final = {
    JobStatus.QUEUED: "",
    JobStatus.RUNNING: "busy",
    JobStatus.RETRYING: "warn",
    JobStatus.COMPLETED: "good",
    JobStatus.FAILED: "bad",
    JobStatus.CANCELLED: "",
    JobStatus.EXPIRED: "warn",
}
_OUTCOMES: Final = {
    None: Tone("running", "busy"),
    "finished": Tone("finished", "good"),
    "recovered": Tone("recovered", "good"),
    "failed": Tone("failed", "bad"),
    "lost": Tone("worker lost", "bad"),
    "interrupted": Tone("interrupted", "warn"),
}


def status(value: JobStatus) -> Tone:
    """Return a job's status."""
    return Tone(value.value, _STATUSES[value])


def outcome(value: str | None) -> Tone:
    """Return how an attempt ended."""
    return _OUTCOMES.get(value, Tone(str(value)))


def moment(at: datetime, now: datetime) -> Moment:
    """Return a point in time, seen from ``now``."""
    utc = at.astimezone(UTC)
    return Moment(utc.isoformat(timespec="milliseconds"), f"{utc:%Y-%m-%d %H:%M:%S} UTC", _ago(at, now))


def _ago(at: datetime, now: datetime) -> str:
    seconds = (now - at).total_seconds()
    if seconds < 5:
        return "just now"
    if seconds < _MINUTE:
        return f"{seconds:.0f} s ago"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min ago"
    if seconds < _DAY:
        return f"{seconds // _HOUR:.0f} h ago"
    if seconds < 30 * _DAY:
        return f"{seconds // _DAY:.0f} d ago"
    return f"{at.astimezone(UTC):%Y-%m-%d}"


def count(number: int) -> str:
    """Return a number in groups of three digits."""
    return f"{number:,}"


def plural(number: int, one: str, many: str | None = None) -> str:
    """Return a number of things."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def about(number: float) -> str:
    """Return a number with two or three digits that count."""
    if number == 0:
        return "0"
    if number < 10:
        return f"{number:.1f}"
    if number < 10_000:
        return f"{number:,.0f}"
    if number < 1_000_000:
        return f"{number / 1000:,.0f} k"
    return f"{number / 1_000_000:,.1f} M"


def amount(money: float) -> str:
    """Return an amount of money, whose unit is the provider's, with three digits that count below one."""
    return f"{money:,.2f}" if money >= 1 else f"{float(f'{money:.3g}'):.10f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """Return a duration, given in seconds."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds // _MINUTE:.0f} min {seconds % _MINUTE:.0f} s"
    if seconds < 2 * _DAY:
        return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"
    return f"{seconds // _DAY:.0f} d"


def size(number: int) -> str:
    """Return a size, given in bytes."""
    if number < 1000:
        return f"{number} B"
    return f"{number / 1000:,.1f} kB" if number < 1_000_000 else f"{number / 1_000_000:,.1f} MB"


def tokens(usage: Usage | None) -> str:
    """Return in brief what was used; empty: nothing is known."""
    if usage is None or usage.total_tokens is None:
        return ""
    about_it = "≈ " if usage.source is UsageSource.ESTIMATED else ""
    return f"{about_it}{plural(usage.total_tokens, 'token')}"


def pretty(value: Any, most: int) -> str:
    """Return a JSON value, indented, or the first ``most`` characters of that, and a sign that there are more.

    Indented, what is nested has a thousand times as many characters, so it is written no further than it is shown.
    """
    pieces, length = [], 0
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(value):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            return f"{''.join(pieces)[:most]}\n\n[more; the JSON has all of it]"
    return "".join(pieces)
