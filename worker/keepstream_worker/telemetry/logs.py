"""Logs: one line per event on standard error, for machines or for people.

In: level and format, from the settings; static event names with data as keywords, from every room.  Out:
lines of one form, the libraries' warnings included.  Log ids, codes and counts, never content: no prompt,
output or key belongs in a log.

A stack shows where a defect was met and of what kind it is, but neither values nor the error's own text, which often
quotes them.  A log that cannot be written (a full disk, a closed pipe) disturbs nobody.
"""

import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import Final, Literal, TextIO, cast

import structlog
from structlog.typing import ExcInfo, FilteringBoundLogger, Processor

#: Libraries that log what we log ourselves, or log each request; only their errors are shown.
_QUIET = ("celery.worker.strategy", "celery.app.trace", "httpx2", "httpcore2", "openai", "aiohttp", "kombu")

#: Errors of one chain that are shown.
_CHAIN: Final = 8


def configure_logging(level: str, style: Literal["json", "console"]) -> None:
    """Send our events and the libraries' warnings to standard error in one style.

    Args:
        level: The least severity of our own events: debug, info, warning or error.
        style: ``json`` for machines, ``console`` for people.
    """
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_stack),
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=_shows_colours())
    )
    stream = cast("TextIO", _PatientStream(sys.stderr))
    severity = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(severity, logging.WARNING))
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def _shows_colours() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def get_logger() -> FilteringBoundLogger:
    """Return a logger whose methods take a static event name and keywords."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


class _PatientStream:
    """Writes to ``stream``, and drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _stack(exc_info: ExcInfo) -> str:
    """Return where an error comes from, and the kinds of the errors that led to it, without their texts."""
    lines: list[str] = []
    error: BaseException | None = exc_info[1]
    while error is not None and len(lines) < _CHAIN:
        frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
        lines.append(f"{frames}{_kind(error)}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nThe above was caused by this:\n\n".join(["Traceback (most recent call last):\n" + lines[0], *lines[1:]])


def _kind(error: BaseException) -> str:
    detail = getattr(error, "sqlstate", None) or (error.strerror if isinstance(error, OSError) else None)
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return f"{name}: {detail}" if detail else name
