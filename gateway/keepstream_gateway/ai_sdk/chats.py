"""Chats: which jobs belong to one, by their ids alone.

In: the id that the AI SDK gave a chat, any text.  Out: ids of its jobs, numbered in their order; what a token for it is
bound to.  Pure.

A chat's jobs are found by their ids, because those have an index: nothing else is stored, so nothing can be lost,
outlive the jobs, or disagree with them.  The chat's own id may be long and have any characters, so its hash stands in.
"""

import hashlib
from typing import Any, Final

from keepstream_gateway.errors import invalid

_LONGEST: Final = 256  #: Characters of a chat's id.
_HASH: Final = 32  #: Hexadecimal digits, 128 bits: no two chats of a tenant share their jobs.


def check_id(chat: Any) -> str:
    """Return the id of a chat.

    Raises:
        ApiError: it is no text, empty, too long or cannot be stored.
    """
    if not isinstance(chat, str) or not 1 <= len(chat) <= _LONGEST or not _is_storable(chat):
        raise invalid(f"id: must be a text of 1 to {_LONGEST} characters, the id of the chat", "id")
    return chat


def prefix(chat: str) -> str:
    """Return how the ids of a chat's jobs begin; a number follows (``names.numbered_id``)."""
    return f"chat{_hash(chat)}"


def scope(chat: str) -> str:
    """Return what a token for a chat is bound to; the colon keeps it apart from every job's id."""
    return f"chat:{_hash(chat)}"


def _hash(chat: str) -> str:
    return hashlib.sha256(chat.encode()).hexdigest()[:_HASH]


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        return False
    return "\0" not in text
