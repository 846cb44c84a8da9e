"""Outages: that a server does not do its work, said once when it begins and once when it is over.

In: what every call to Redis or the database came to, from whoever makes it.  Out: two lines in the log, with the
reason, what an operator must do if waiting alone does not mend it, and how long it lasted.

An answer that is an error (a fail-over, a full disk, a changed password) is an outage like a broken connection: the
server may do its work again a moment later, and nobody is helped by a worker that ends.
"""

import re
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

#: Redis' own words for what is wrong, and what an operator must do about it; None: it passes by itself.
REDIS_REASONS: Final[dict[str, str | None]] = {
    "READONLY": "it is a replica: the address must lead to the master",
    "UNBLOCKED": None,
    "MASTERDOWN": "it is a replica without its master: the address must lead to a master",
    "LOADING": None,
    "NOSCRIPT": None,
    "BUSY": "a script holds it up: SCRIPT KILL ends it",
    "OOM": "it is full: raise maxmemory, or remove what does not belong there",
    "MISCONF": "it cannot save its data: look at its disk and its log",
    "NOREPLICAS": "too few replicas are connected: see min-replicas-to-write",
    "CLUSTERDOWN": "it is a node of a cluster: name a single Redis",
    "MOVED": "it is a node of a cluster: name a single Redis",
    "CROSSSLOT": "it is a node of a cluster: name a single Redis",
    "NOPERM": "this user lacks a right: compare its ACL with docs/operations/running.md",
    "WRONGTYPE": "something else lies under a name that is ours: rename or delete it",
    "NOAUTH": "it wants a password: set it in the URL or KEEPSTREAM_REDIS_PASSWORD, and restart the worker",
    "WRONGPASS": "it refuses the user or password: correct URL or KEEPSTREAM_REDIS_PASSWORD, and restart the worker",
    "SSLCertVerificationError": "its certificate is not trusted, is for another host, or has run out",
    "MAXCLIENTS": "it has no connection left: raise maxclients, or find who holds them",
}
#: Those that may pass, or be mended, without a change of ours.
PASSING_REASONS: Final = frozenset(
    {"READONLY", "UNBLOCKED", "MASTERDOWN", "LOADING", "BUSY", "OOM", "MISCONF", "NOREPLICAS", "MAXCLIENTS"}
)
_CODE: Final = re.compile(r"\b(" + "|".join(REDIS_REASONS) + r")\b")


def redis_reason(error: BaseException) -> str:
    """Return Redis' word for what is wrong, else the kind of error; never its text, which may hold arguments."""
    root = error
    cause: BaseException | None = error
    while isinstance(cause, Exception):  # not what was under way meanwhile: a cancellation, the end of the worker
        root = cause
        given = getattr(cause, "status_code", None)  # redis-py takes the words that it knows out of the text
        if "max number of clients" in str(cause):
            return "MAXCLIENTS"
        # A script that was refused says so in the middle: "ERR Error running script …: -READONLY You can't …".
        found = _CODE.search(f"{given} {cause}")
        if found:
            return found[1]
        cause = cause.__cause__ or cause.__context__
    return type(root).__name__


class Server(StrEnum):
    """What a worker waits for."""

    BROKER = "broker"
    REDIS = "redis"
    DATABASE = "database"


class Outage:
    """What one kind of call to one server comes to. Used on one thread.

    Args:
        server: Who is called.
        waiting_to: What for, in a few static words.
        clock: Seconds.
    """

    def __init__(self, server: Server, waiting_to: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._waiting_to = waiting_to
        self._clock = clock
        self._since: float | None = None
        self._said: set[str] = set()

    @property
    def lasts(self) -> bool:
        """Whether the last call failed."""
        return self._since is not None

    def failed(self, reason: str, advice: str | None = None, **known: str) -> None:
        """Note that a call failed; each reason is said once in an outage.

        Args:
            reason: What the server said, without values.
            advice: What an operator must do; None if it passes by itself.
            known: More for the log.
        """
        if self._since is None:
            self._since = self._clock()
        if reason in self._said:
            return
        self._said.add(reason)
        known |= {"waiting_to": self._waiting_to, "reason": reason} | ({"advice": advice} if advice else {})
        match self._server:
            case Server.BROKER:
                log.warning("broker_unavailable", **known)
            case Server.REDIS:
                log.warning("redis_unavailable", **known)
            case Server.DATABASE:
                log.warning("database_unavailable", **known)

    def redis_failed(self, error: BaseException, **known: str) -> None:
        """Note that a call to Redis raised ``error``."""
        reason = redis_reason(error)
        self.failed(reason, REDIS_REASONS.get(reason), **known)

    def worked(self) -> None:
        """Note that a call succeeded: an outage is over."""
        if self._since is None:
            return
        known = {"waited_to": self._waiting_to, "lasted": round(self._clock() - self._since, 1)}
        self._since = None
        self._said.clear()
        match self._server:
            case Server.BROKER:
                log.info("broker_available", **known)
            case Server.REDIS:
                log.info("redis_available", **known)
            case Server.DATABASE:
                log.info("database_available", **known)
