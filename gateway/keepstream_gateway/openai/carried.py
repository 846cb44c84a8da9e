"""What an answer carries besides text and calls, as one opaque text that a client gives back in its next request.

In: an assistant's message, as the next turn wants it.  Out: a text for ``encrypted_content`` of a reasoning item, and
the message again from it.

A provider may want its reasoning back, under its own field names, or signatures, or whole items. Clients of the
Responses API know one place for such things: they return a reasoning item as it was. The text is not secret: who may
read it has the answer anyway. A message that was changed on the way is told by what stands beside it.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

_MARK: Final = "ks1."
#: Of the messages of one request; small texts can be made to inflate to gigabytes.
MAX_BYTES: Final = 16 * 1024 * 1024
_PLAIN: Final = frozenset({"role", "content", "refusal", "tool_calls"})
_PLAIN_CALL: Final = frozenset({"id", "type", "function", "custom"})


def pack(message: Mapping[str, Any]) -> str | None:
    """Return the text that stands for an assistant's message, or None if text and calls are all there is to it."""
    calls = message.get("tool_calls") or ()
    is_plain = message.keys() <= _PLAIN and isinstance(calls, list | tuple) and all(map(_is_plain_call, calls))
    if is_plain and not isinstance(message.get("content"), list):
        return None
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()
    return _MARK + base64.b64encode(zlib.compress(body)).decode()


def _is_plain_call(call: object) -> bool:
    return isinstance(call, Mapping) and call.keys() <= _PLAIN_CALL


class TooLargeError(Exception):
    """A text stands for a larger message than is accepted."""


def unpack(text: object, most: int = MAX_BYTES) -> tuple[dict[str, Any], int] | None:
    """Return the message that ``pack`` was given, and its size in bytes; None: the text is not one of ours.

    Raises:
        TooLargeError: the message has more than ``most`` bytes.
    """
    if not isinstance(text, str) or not text.startswith(_MARK):
        return None
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(base64.b64decode(text.removeprefix(_MARK), validate=True), most + 1)
        message = json.loads(body) if inflater.eof and len(body) <= most else None
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        return None
    if len(body) > most:
        raise TooLargeError
    return (message, len(body)) if isinstance(message, dict) and message.get("role") == "assistant" else None
