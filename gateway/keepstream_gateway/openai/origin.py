"""What a job remembers of the request to OpenAI's shapes that made it, among its metadata.

In: facts that a chat-completions body has no place for: whether it was a background response, what it continues.
Out: one entry of the job's metadata, and the same facts again from a stored job.

The entry has a name that no client may use, so the other metadata are the client's, unchanged.
"""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from keepstream_gateway.openai.refusals import refused

ENTRY: Final = "keepstream.gateway"
#: The SHA-256 of the body, by which a client's second try without a key is known; an entry of its own, to be listed by.
BODY_ENTRY: Final = "keepstream.body"
_OURS: Final = frozenset({ENTRY, BODY_ENTRY})


class Origin(BaseModel):
    """How a job came here. For a job that came another way the defaults hold."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    background: bool = False
    previous_response_id: str | None = None
    instructions: int = 0  #: Leading messages that were ``instructions``, 0 or 1: the next turn does not repeat them.
    summary: str | None = None  #: The ``reasoning.summary`` that was asked for.


def read_origin(metadata: Mapping[str, Any]) -> Origin:
    """Return what a stored job's metadata remember."""
    try:
        return Origin.model_validate(metadata.get(ENTRY) or {})
    except ValidationError:
        return Origin()


def client_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that the client gave."""
    return {name: value for name, value in metadata.items() if name not in _OURS}


def response_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the client's metadata as OpenAI has them: texts only."""
    return {name: value for name, value in client_metadata(metadata).items() if isinstance(value, str)}


def checked_metadata(value: Any) -> dict[str, Any]:
    """Return the metadata of a request.

    Raises:
        ApiError: they are no texts by name, or use a name of ours.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise refused("'metadata' must be an object of strings", "metadata", "invalid_type")
    for name in value.keys() & _OURS:
        raise refused(f"the name '{name}' in 'metadata' is reserved", "metadata")
    return dict(value)
