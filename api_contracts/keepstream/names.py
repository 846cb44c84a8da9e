"""Every name that crosses a process boundary: task, queue, channels, keys, environment variables.

In: a prefix, a tenant and a job id.
Out: names of Redis keys and channels, to the worker, the client and the generated documents.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Final, NamedTuple

DISTRIBUTION: Final = "keepstream"  #: What pip installs.
TASK: Final = "completions.run"  #: Name of the Celery task; its one argument is the job.
QUEUE: Final = "completions"  #: Celery queue, and the Redis list that carries it.
PREFIX: Final = "keepstream"  #: Default prefix of every Redis key and channel of ours.
DEFAULT_TENANT: Final = "default"

ENVIRONMENT: Final = "KEEPSTREAM_"  #: How our environment variables begin.
GATEWAY_ENVIRONMENT: Final = "KEEPSTREAM_GATEWAY_"  #: How those begin that only a gateway has.
ENV_REDIS_URL: Final = "KEEPSTREAM_REDIS_URL"
ENV_BROKER_URL: Final = "KEEPSTREAM_BROKER_URL"
ENV_REDIS_PASSWORD: Final = "KEEPSTREAM_REDIS_PASSWORD"  # noqa: S105  # a name, not a password
ENV_DATABASE_URL: Final = "KEEPSTREAM_DATABASE_URL"
ENV_PREFIX: Final = "KEEPSTREAM_PREFIX"
ENV_QUEUE: Final = "KEEPSTREAM_QUEUE"

#: What Kubernetes sets in each container for a service whose name begins with "keepstream", and Docker for a link:
#: name and value, written as one. The value tells KEEPSTREAM_REDIS_PORT=6379 and KEEPSTREAM_QUEUE_NAME=mine from these.
_OF_A_SERVICE: Final = re.compile(
    r"\w+(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?|_ENV_\w+)=.*"
    r"|\w+_PORT=\w+://.*|\w+_NAME=/.*",
    re.DOTALL,
)

#: Of tenant and job ids: they are parts of key names, so braces, colons and spaces are not allowed.
ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$"
NUMBER_DIGITS: Final = 8  #: Of a job's number, where ids are numbered.
EVENT_ID_PATTERN: Final = r"^[1-9][0-9]{0,8}-[1-9][0-9]{0,9}$"


class Right(StrEnum):
    """What an API key of the gateway is for."""

    API = "api"  #: To enqueue, follow, cancel and read the tenant's jobs.
    CONSOLE = "console"  #: To look at the console.


class JobKeys(NamedTuple):
    """The Redis names of one job; the braces keep them in one cluster slot."""

    channel: str  #: Pub/sub channel of the live events.
    log: str  #: Redis stream of the replayable events; field ``event``.
    cancel: str  #: Key that asks for cancellation, for the worker that takes the job later.


def job_keys(tenant: str, job_id: str, prefix: str = PREFIX) -> JobKeys:
    """Return the Redis names of a job."""
    base = f"{prefix}:{tenant}:{{{job_id}}}"
    return JobKeys(f"{base}:events", f"{base}:log", f"{base}:cancel")


def control_channel(prefix: str = PREFIX) -> str:
    """Return the channel that tells workers to look at a job's cancellation at once."""
    return f"{prefix}:control"


def rejected_list(prefix: str = PREFIX) -> str:
    """Return the Redis list of queue items that could not be read as Celery messages."""
    return f"{prefix}:rejected"


def numbered_id(prefix: str, number: int) -> str:
    """Return the id of a job whose id is a prefix and a number; ids of one prefix sort by their numbers."""
    return f"{prefix}{number:0{NUMBER_DIGITS}d}"


def number_in(job_id: str) -> int:
    """Return the number in an id that ``numbered_id`` has made."""
    return int(job_id[-NUMBER_DIGITS:])


class EventId(NamedTuple):
    """An event's id, ``<attempt>-<n>``: a valid Redis stream id, ordered like a pair."""

    attempt: int
    n: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.n}"


def parse_event_id(text: str) -> EventId:
    """Return the event id that ``text`` spells.

    Raises:
        ValueError: it spells none.
    """
    # fullmatch: "$" alone would let a trailing line feed pass.
    if re.fullmatch(EVENT_ID_PATTERN, text) is None:
        raise ValueError("not an event id; event ids look like 2-17")
    attempt, n = text.split("-")
    return EventId(int(attempt), int(n))


def nearest(name: str, known: Iterable[str], similarity: float = 0.6) -> str | None:
    """Return the known name that ``name`` most likely was meant to be; None: it resembles none of them.

    ``similarity`` is the least ratio, from 0 to 1, as difflib computes it.
    """
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=similarity)), None)


def shown(name: object) -> str:
    """Return a caller's name as an error may show it: not if it could be a text that was put in the wrong place."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.\-]{1,64}", name, re.ASCII) else "…"


def is_set_by_the_platform(variable: str, value: str) -> bool:
    """Tell whether Kubernetes or Docker has set an environment variable, to describe a service that they run."""
    return _OF_A_SERVICE.fullmatch(f"{variable.upper()}={value}") is not None


def install_hint(extra: str) -> str:
    """Return how to install what an extra brings, for the message that says it is missing."""
    return (
        f"install the extra '{extra}': pip install '{DISTRIBUTION}[{extra}]' (in a checkout: pip install '.[{extra}]')"
    )
