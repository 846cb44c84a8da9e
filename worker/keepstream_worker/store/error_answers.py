"""Error answers of the database: does it refuse what it was given, or is something wrong with the database itself?

In: what a statement raised.  Out: the error that the worker acts on, an outage or a refusal, and what an operator must
do about an outage that does not pass by itself.

The refusals are listed, not the outages: what is no fault of a value or a statement is waited for, whatever it is.
Waiting loses nothing; a refused result is lost.  Pure.
"""

from typing import Final

from sqlalchemy.exc import DBAPIError, PendingRollbackError, ResourceClosedError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from keepstream.client.database import describe_error
from keepstream.errors import KeepstreamError, StoreUnavailableError

#: SQLSTATE classes in which PostgreSQL refuses a value or a statement: cardinality, data, constraints, triggers,
#: syntax, check options, limits, functions of the host application.
_REFUSALS: Final = frozenset({"21", "22", "23", "27", "42", "44", "54", "P0"})
#: Of these classes: a missing right, table or column is no fault of the statement, because the start has found all.
_NOT_OURS: Final = frozenset({"42501", "42703", "42P01"})

#: Conflicts between transactions and time-outs of one statement: no fault of the connection.
_CONFLICTS: Final = frozenset({"40", "55P03", "57014", "SQLITE_BUSY"})

_TABLES: Final = "a table or column is missing: run `keepstream migrate`, or restore what was removed"
_ADVICE: Final[dict[str, str]] = {
    "25006": "it is read-only: the address must lead to the primary",
    "28000": "it refuses this role: see pg_hba.conf",
    "28P01": "it refuses the password: set the right one in the URL or PGPASSWORD, and restart the worker",
    "42501": "this role lacks a right: see docs/operations/running.md",
    "42703": _TABLES,
    "42P01": _TABLES,
    "53100": "its disk is full",
    "53300": "it has no connection left: raise max_connections or the role's limit",
    "SQLITE_CORRUPT": "the file is damaged: restore it",
    "SQLITE_FULL": "its disk is full",
    "SQLITE_READONLY": "the file or its directory cannot be written",
}


class StoreRefusedError(KeepstreamError):
    """The database answers and refuses a statement or a value; repeating it would change nothing."""


class DatabaseOutageError(StoreUnavailableError):
    """The database does not do its work; the text holds no statement and no values.

    Args:
        reason: What the driver says.
        advice: What an operator must do; None if it passes by itself.
        answered: Whether it answered the statement with an error, so that it may serve others meanwhile.
        conflict: Whether another transaction was in the way.
    """

    def __init__(
        self, reason: str, advice: str | None = None, *, answered: bool = False, conflict: bool = False
    ) -> None:
        super().__init__(f"the database is not available ({reason})")
        self.reason = reason
        self.advice = advice
        self.answered = answered
        self.conflict = conflict


def translate(error: Exception) -> Exception:
    """Return the outage or refusal that ``error`` means, or ``error`` itself, if it is neither: a defect."""
    if isinstance(error, DBAPIError):
        cause = error.orig
        state = state_of(cause)
        if not error.connection_invalidated and _is_refusal(cause, state):
            return _refusal(error, type(cause).__name__)
        answered = bool(state) and not error.connection_invalidated
        conflict = answered and (state[:2] in _CONFLICTS or state in _CONFLICTS)
        return DatabaseOutageError(describe_error(cause), _advice(state), answered=answered, conflict=conflict)
    if isinstance(error, PoolTimeoutError):
        return DatabaseOutageError("no connection was free in time")
    if isinstance(error, OSError | PendingRollbackError | ResourceClosedError):  # the connection broke
        return DatabaseOutageError(type(error).__name__)
    if isinstance(error, SQLAlchemyError):
        return _refusal(error, type(error).__name__)
    return error


def _refusal(error: Exception, name: str) -> StoreRefusedError:
    refusal = StoreRefusedError(f"the database refused it ({name})")
    refusal.__cause__ = error
    return refusal


def state_of(cause: BaseException | None) -> str:
    """Return PostgreSQL's SQLSTATE or SQLite's name of the error; empty if there was no answer."""
    return str(getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None) or "")


def _advice(state: str) -> str | None:
    # SQLite's names go into detail: SQLITE_READONLY_DIRECTORY.
    return next((advice for name, advice in _ADVICE.items() if state == name or state.startswith(f"{name}_")), None)


def _is_refusal(cause: BaseException | None, state: str) -> bool:
    if state and not state.startswith("SQLITE_"):
        return state[:2] in _REFUSALS and state not in _NOT_OURS
    # A driver's own word.  SQLite's "operational errors" are locks, full disks, input and output, and missing tables;
    # psycopg's "interface errors" are lost connections, SQLite's are values that it cannot take.
    kinds = {base.__name__ for base in type(cause).__mro__}
    if "InterfaceError" in kinds:
        return type(cause).__module__.startswith("sqlite3")
    return bool(kinds & {"DataError", "IntegrityError", "NotSupportedError", "ProgrammingError"})
