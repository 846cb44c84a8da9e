"""How single values look to people: statuses, usage, errors, and text that a model wrote.

In: values from events, results and settings.
Out: texts for a console, to `live_view`, `tables`, `demo` and `doctor`.

Whatever comes from outside is shown without control characters, so that it cannot steer the console.
"""

from datetime import UTC, datetime
from typing import Final

from rich.text import Text

from keepstream.errors import ErrorInfo
from keepstream.results import JobStatus, Usage

INDENT: Final = 2  #: Columns before what a model wrote.

STATUS_STYLES: Final = {
    JobStatus.QUEUED: "yellow",
    JobStatus.RUNNING: "cyan",
    JobStatus.RETRYING: "yellow",
    JobStatus.COMPLETED: "green",
    JobStatus.FAILED: "red",
    JobStatus.CANCELLED: "magenta",
    JobStatus.EXPIRED: "red",
}
#: Control characters and their visible stand-ins; a carriage return adds nothing to a line feed.
_CONTROLS: Final[dict[int, str | int | None]] = {
    **{code: 0x2400 + code for code in range(0x20)},
    **dict.fromkeys(range(0x7F, 0xA0), "\ufffd"),
    ord("\n"): "\n",
    ord("\t"): "    ",
    ord("\r"): None,
}


def printable(text: str) -> str:
    """Return ``text`` without the characters that would steer a console."""
    return text.translate(_CONTROLS)


def status_text(status: JobStatus) -> Text:
    """Return a status in its colour."""
    return Text(status.value, style=STATUS_STYLES[status])


def count(number: int, singular: str, plural: str) -> str:
    """Return a number with what is counted, in the right form."""
    return f"{number} {singular if number == 1 else plural}"


def usage_line(usage: Usage | None) -> str:
    """Return tokens in words; what is unknown is said to be unknown."""
    if usage is None or (usage.total_tokens is None and usage.completion_tokens is None):
        return "usage unknown"

    def known(value: int | None) -> str:
        return "?" if value is None else str(value)

    source = "" if usage.source == "provider" else f", {usage.source.value}"
    return (
        f"{known(usage.total_tokens)} tokens ({known(usage.prompt_tokens)} in,"
        f" {known(usage.completion_tokens)} out{source})"
    )


def error_line(error: ErrorInfo) -> str:
    """Return an error's code and, if there is one, its message."""
    return f"{error.code}: {error.message}" if error.message else error.code


def seconds_between(start: datetime, end: datetime) -> str:
    """Return the time from ``start`` to ``end``, in seconds with two decimals."""
    return f"{(end - start).total_seconds():.2f} s"


def clock_time(time: datetime) -> str:
    """Return the time of day in UTC, as people are shown it."""
    return f"{time.astimezone(UTC):%H:%M:%S} UTC"


def iso_time(time: datetime) -> str:
    """Return a time as all JSON has it: ISO 8601, in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
