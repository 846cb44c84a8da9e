"""How Keepstream connects to PostgreSQL, directly or through a pooler, and what it means if it cannot.

In: the start-up options of a database URL, and what the driver says.  Out: what is to be sent at the start of a
connection and of a transaction, and advice, to ``keepstream.client.database``.

A pooler such as PgBouncer gives each transaction another session, and refuses start-up options. So nothing that a
session would have to remember is relied upon: what holds for a transaction is said at its beginning.
"""

import re
from typing import Final, NamedTuple

#: Milliseconds, where the URL does not say otherwise: a lock or statement that hangs is an outage too. Whoever falls
#: silent within a transaction, because its machine is lost or stands still, holds its locks until the server hears of
#: it, which may take hours; so it is cut off before those who wait for them give up.
_TIMEOUTS: Final = {
    "lock_timeout": "10000",
    "statement_timeout": "30000",
    "idle_in_transaction_session_timeout": "8000",
}

#: An option as ``-c name=value``, ``-cname=value`` or ``--name=value``; a backslash takes the next character as it is.
_OPTION: Final = re.compile(r"(?<!\S)(?:-c\s*|--)([A-Za-z][\w-]*)=((?:\\.|[^\s\\])*)(?=\s|$)", re.DOTALL)


class Session(NamedTuple):
    """What the options of a URL come to."""

    options: str  #: Sent at the start of a connection, as they came; empty unless the URL has such.
    begin: str  #: Begins a transaction, in one round trip: statements without parameters.


#: For whoever looks up little in tables that may be large, or hold few rows and very many dead ones, which the planner
#: does not know of: it would read them as a whole. What has no index then counts as dear, before PostgreSQL 18, and
#: would be compiled first, which takes long.
_BY_INDEX: Final = ("SET LOCAL enable_seqscan = off", "SET LOCAL jit = off")


def plan_session(options: str, *, by_index: bool = False) -> Session:
    """Return how the start-up options of a URL take effect.

    The search path and the time-outs are set in each transaction, so that they also hold behind a pooler; all others
    are left to the start of the connection, which PgBouncer refuses.

    Args:
        options: As ``-c name=value``.
        by_index: Whether statements are to go by indexes, whatever the tables' statistics say.
    """
    ours: dict[str, str] = dict(_TIMEOUTS)

    def take(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_").lower()
        if name not in {"search_path", *_TIMEOUTS}:
            return option[0]
        ours[name] = re.sub(r"\\(.)", r"\1", option[2], flags=re.DOTALL)  # the last one wins, as PostgreSQL has it
        return ""

    others = " ".join(_OPTION.sub(take, options).split())
    statements = ["BEGIN", *(f"SET LOCAL {name} = {_quote(ours[name])}" for name in _TIMEOUTS)]
    if by_index:
        statements += _BY_INDEX
    if "search_path" in ours:  # a list, which SET would take for one name
        statements.append(f"SELECT set_config('search_path', {_quote(ours['search_path'])}, true)")
    return Session(others, "; ".join(statements))


def _quote(value: str) -> str:
    """Return a literal that means the same whatever ``standard_conforming_strings`` is."""
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


class Failure(NamedTuple):
    """Why there is no connection to a database."""

    passes: bool  #: Whether waiting may mend it.
    what: str  #: What the database does, without its name.
    advice: str  #: What to do.


_AWAY: Final = Failure(True, "does not answer", "start it, or set KEEPSTREAM_DATABASE_URL to where it is")
_SILENT: Final = Failure(
    True,
    "does not answer in time",
    "start it, or set KEEPSTREAM_DATABASE_URL to where it is; a pooler that cannot reach its server is silent too:"
    " see its log",
)
_BUSY: Final = Failure(True, "takes no connection now", "if that does not pass by itself, see its log and its limits")
_REFUSED: Final = Failure(
    False,
    "refuses the connection",
    "correct the user, password or database in KEEPSTREAM_DATABASE_URL or PGPASSWORD, or what the server allows them",
)
_OPTION_REFUSED: Final = Failure(
    False,
    "refuses an option of the connection",
    "a pooler takes only search_path, lock_timeout, statement_timeout and idle_in_transaction_session_timeout from the"
    " URL's options: set others by"
    " ALTER ROLE ... SET, and leave them out of the URL",
)
_TLS: Final = Failure(
    False,
    "cannot be reached by TLS as the URL demands",
    "correct sslmode or sslrootcert in KEEPSTREAM_DATABASE_URL, or the server's certificate",
)
_SETTING: Final = Failure(False, "cannot be reached in the way the URL says", "correct KEEPSTREAM_DATABASE_URL")
#: What to do about a database that is not there, or has not got our tables.
MIGRATE_OR_SET: Final = "run `keepstream migrate`, or set KEEPSTREAM_DATABASE_URL"
_MISSING: Final = Failure(False, "does not exist", MIGRATE_OR_SET)
_FILE: Final = Failure(False, "cannot be opened", "set KEEPSTREAM_DATABASE_URL to a file that can be written")

#: Words of libpq, PostgreSQL, PgBouncer and SQLite; what comes first decides. A server that speaks another language is
#: believed to be away, which costs a wait at most: its sentence is shown all the same.
_FAILURES: Final = (
    ("^there is no file", _MISSING),
    ("unsupported startup parameter", _OPTION_REFUSED),
    ("timeout expired", _SILENT),
    ("starting up|shutting down|recovery|not (yet )?accepting|too many|connection slots|no more connections", _BUSY),
    ("login has been failing|cannot connect to server|query_wait_timeout|terminating connection|locked", _BUSY),
    ("FATAL|password|authentication|no such user|no such database", _REFUSED),
    ("SSL|TLS|certificate", _TLS),
    ("^invalid |^bad value|^connection is bad: invalid", _SETTING),
    ("unable to open database|not a database|malformed|readonly", _FILE),
)


def explain_failure(sentence: str) -> Failure:
    """Return what it means that a connection was not made, by the driver's words about it."""
    # Names come before or stand in quotes, and may contain any word.
    reason = re.sub(r".* failed: |^failed to resolve .*|\"[^\"]*\"", "", sentence)
    return next((failure for words, failure in _FAILURES if re.search(words, reason)), _AWAY)
