"""Logs: one line per event on standard error, for machines or for people.

In: level and format, from the settings; static event names with data as keywords, from every room.  Out:
lines of one form, the libraries' warnings included.  Log ids, codes and counts, never content: no prompt,
output or key belongs in a log.
"""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import FilteringBoundLogger, Processor

#: Libraries that log what we log ourselves, or log each request; only their errors are shown.
_QUIET = ("celery.worker.strategy", "celery.app.trace", "httpx2", "httpcore2", "openai", "aiohttp", "kombu")


def configure_logging(level: str, style: Literal["json", "console"]) -> None:
    """Send our events and the libraries' warnings to standard error in one style.

    Args:
        level: The least severity of our own events: debug, info, warning or error.
        style: ``json`` for machines, ``console`` for people.
    """
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    severity = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
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


def get_logger() -> FilteringBoundLogger:
    """Return a logger whose methods take a static event name and keywords."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger
