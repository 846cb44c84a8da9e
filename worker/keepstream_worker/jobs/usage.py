"""Usage: what an attempt cost, as well as it can be known.

In: what the provider reported, or the text that arrived.  Out: a ``Usage`` with its source, to the
engine and to recovery.  Reported figures are kept as they are, estimates are marked as such, and what
nobody knows is null.  Pure.
"""

from collections.abc import Sequence
from typing import Any, Final

from keepstream.results import Choice, Usage, UsageSource

#: UTF-8 bytes per token: the usual rule of thumb, for English; other languages have fewer.
_BYTES_PER_TOKEN: Final = 4


def reported(figures: dict[str, Any]) -> Usage:
    """Return what the provider reported; figures that it left out stay null."""

    def count(name: str) -> int | None:
        value = figures.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    return Usage(
        prompt_tokens=count("prompt_tokens"),
        completion_tokens=count("completion_tokens"),
        total_tokens=count("total_tokens"),
        source=UsageSource.PROVIDER,
        details=figures,
    )


def estimated(messages: Sequence[dict[str, Any]], choices: Sequence[Choice]) -> Usage:
    """Estimate an attempt that was cut off after output had arrived; without output nothing is known."""
    produced = sum(
        len(text.encode())
        for choice in choices
        for text in (
            choice.content,
            choice.reasoning,
            choice.refusal,
            *(call.name + call.arguments for call in choice.tool_calls),
        )
    )
    if not produced:
        return Usage()
    prompt = -(-sum(_text_bytes(message.get("content")) for message in messages) // _BYTES_PER_TOKEN)
    completion = -(-produced // _BYTES_PER_TOKEN)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        source=UsageSource.ESTIMATED,
    )


def _text_bytes(content: Any) -> int:
    """Bytes of text in a message's content; images and audio are priced by rules we cannot know."""
    if isinstance(content, str):
        return len(content.encode("utf-8", "surrogatepass"))
    if isinstance(content, list):
        return sum(_text_bytes(part.get("text")) for part in content if isinstance(part, dict))
    return 0
