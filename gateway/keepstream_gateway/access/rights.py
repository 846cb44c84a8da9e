"""What a request may do, and for whom.

In: nothing.  Out: the values ``Right`` and ``Access``, to the rooms.
"""

from dataclasses import dataclass
from enum import StrEnum

from keepstream.names import Right

__all__ = ["Access", "May", "Right"]


class May(StrEnum):
    """What a token for one job allows."""

    READ = "read"  #: To see and follow the job.
    CANCEL = "cancel"  #: To cancel it as well.


@dataclass(frozen=True, slots=True)
class Access:
    """Whose jobs a request may touch, and which."""

    tenant: str
    key_id: str  #: Of the API key, or of the one that made the token; followers are counted by it.
    rights: frozenset[Right] = frozenset()
    job_id: str | None = None  #: Of a token: the only job that it is for.
    may: frozenset[May] = frozenset()  #: Of a token: what with that job.
