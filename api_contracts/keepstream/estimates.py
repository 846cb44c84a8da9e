"""Estimates: what a request may cost in tokens, before anybody has counted.

In: a request's body.  Out: tokens of its prompt, and the bound that it sets its answer; to the client and the worker,
who charge a waiting job by them, and to the usage of streams whose provider reported nothing.  Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

#: UTF-8 bytes per token: the usual rule of thumb, for English; other languages have fewer.
BYTES_PER_TOKEN: Final = 4
_BOUNDS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MOST: Final = 1_000_000  #: Tokens; no model answers with more, so a bound beyond it bounds nothing.


def prompt_tokens(request: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request's prompt."""
    return -(-prompt_bytes(request.get("messages") or ()) // BYTES_PER_TOKEN)


def most_answer_tokens(request: Mapping[str, Any]) -> int | None:
    """Return how many tokens the request allows its answer; None: it does not say."""
    for name in _BOUNDS:
        bound = request.get(name)
        if isinstance(bound, int) and not isinstance(bound, bool) and 0 < bound <= _MOST:
            return bound
    return None


def prompt_bytes(messages: Sequence[Any]) -> int:
    """Return the UTF-8 bytes of text in ``messages``."""
    return sum(_text_bytes(message.get("content")) for message in messages if isinstance(message, dict))


def _text_bytes(content: Any) -> int:
    """Bytes of text in a message's content; images and audio are priced by rules we cannot know."""
    if isinstance(content, str):
        return len(content.encode("utf-8", "surrogatepass"))
    if isinstance(content, list | tuple):
        return sum(_text_bytes(part.get("text")) for part in content if isinstance(part, dict))
    return 0
