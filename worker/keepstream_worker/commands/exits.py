"""Exit codes, and how a command ends early: with one line on standard error that says what to do.

In: messages and exceptions, from the commands.
Out: an exit code, to the shell.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import typer

OK, UNSUCCESSFUL, INVALID, UNAVAILABLE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES: Final = (
    "Exit codes: 0 done · 1 the job did not complete, or a check failed · 2 wrong input or setting · "
    "3 a service is not available · 4 no such job · 130 Ctrl-C"
)


def print_error(message: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(message + "\n")


def fail(message: str, code: int) -> NoReturn:
    """End the command with ``code`` and one line on standard error."""
    hint = stale_settings_hint() if code == UNAVAILABLE else ""
    print_error(f"keepstream: {message}{'; ' if hint else ''}{hint}")
    raise typer.Exit(code)


def stale_settings_hint() -> str:
    """Return what to do if this shell has the settings of a `keepstream dev` that has ended; else an empty text."""
    from keepstream_worker.commands.dev_directory import DEV_VARIABLE, has_ended

    if not has_ended(os.environ):
        return ""
    file = Path(os.environ[DEV_VARIABLE], "env")
    return f"this shell has the settings of a `keepstream dev` that has ended: start it again, then source {file}"


@contextmanager
def start_errors() -> Iterator[None]:
    """End the command with one line if a service does not start or the database cannot be migrated."""
    from keepstream_worker.dev_stack.embedded import EmbeddedServiceError
    from keepstream_worker.store.schema import SchemaError

    try:
        yield
    except (SchemaError, EmbeddedServiceError) as error:
        fail(str(error), UNAVAILABLE)


def exit_code_of(error: Exception) -> int | None:
    """Return the exit code for an error that the client raises on purpose; None: it is a defect."""
    from keepstream import errors

    match error:
        case errors.JobNotFoundError():
            return NOT_FOUND
        case (
            errors.BrokerUnavailableError()
            | errors.StoreUnavailableError()
            | errors.FollowTimeoutError()
            | errors.EventsLostError()
        ):
            return UNAVAILABLE
        case errors.KeepstreamError():
            return INVALID
    return None
