"""Logs: one line per event on standard error, for machines or for people.

In: level and format, from the settings; static event names with data as keywords.  Out: lines of the worker's form, the
libraries' warnings included.  Log ids, codes and counts, never content: no prompt, output or key belongs in a log.

An error is shown as where it was met and of what kind it is, never by its own text, which often quotes values.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Final, Literal

#: Errors of one chain that are shown.
_CHAIN: Final = 8
_DATA: Final = "keepstream_data"  #: The attribute of a record that holds an event's keywords.
_logger: Final = logging.getLogger("keepstream_gateway")


def configure_logging(level: str, style: Literal["json", "console"]) -> None:
    """Send our events and the libraries' warnings to standard error in one style.

    Args:
        level: The least severity of our own events: debug, info, warning or error.
        style: ``json`` for machines, ``console`` for people.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(style))
    logging.raiseExceptions = False  # a log that cannot be written (a full disk, a closed pipe) disturbs nobody
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _logger.setLevel(logging.getLevelNamesMapping()[level.upper()])


class EventLogger:
    """Takes a static event name and keywords; ``error=`` takes an exception, of which only the kind is shown."""

    def info(self, event: str, **data: Any) -> None:
        """Log what is as it should be."""
        _logger.info(event, extra={_DATA: data})

    def warning(self, event: str, **data: Any) -> None:
        """Log what somebody should look at."""
        _logger.warning(event, extra={_DATA: data})

    def error(self, event: str, **data: Any) -> None:
        """Log a defect, or what stopped us."""
        _logger.error(event, extra={_DATA: data})

    def exception(self, event: str, **data: Any) -> None:
        """Log a defect that is being handled."""
        _logger.error(event, extra={_DATA: {**data, "error": sys.exception()}})


def get_logger() -> EventLogger:
    """Return the logger of our events."""
    return EventLogger()


class _Lines(logging.Formatter):
    def __init__(self, style: Literal["json", "console"]) -> None:
        super().__init__()
        self._is_json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        data: dict[str, Any] = dict(getattr(record, _DATA, {}))
        error = data.get("error") or (record.exc_info[1] if record.exc_info else None)
        if isinstance(error, BaseException):
            data |= {"error": kind_of(error), "exception": _stack(error)}
        if record.name != _logger.name:
            data["logger"] = record.name
        level = record.levelname.lower()
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        if self._is_json:
            line = {**data, "event": record.getMessage(), "level": level}
            return json.dumps({**line, "timestamp": moment}, default=str)
        stack = f"\n{data.pop('exception')}" if "exception" in data else ""
        words = "".join(f" {name}={value}" for name, value in data.items())
        return f"{moment} [{level:<9}] {record.getMessage():<30}{words}{stack}"


def kind_of(error: BaseException) -> str:
    """Return what kind of error it is."""
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _stack(error: BaseException) -> str:
    """Return where an error comes from, and the kinds of the errors that led to it, without their texts."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < _CHAIN:
        parts.append("".join(traceback.format_list(traceback.extract_tb(current.__traceback__))) + kind_of(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n\nThe above was caused by this:\n\n".join(parts)
