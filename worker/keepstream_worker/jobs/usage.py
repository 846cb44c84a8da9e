"""Usage: what an attempt cost, as well as it can be known.

In: what the provider reported, or the text that arrived.  Out: a ``Usage`` with its source, to the
engine and to recovery.  Reported figures are kept as they are, estimates are marked as such, and what
nobody knows is null.  Pure, but for what ``PromptSizes`` has learned.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

from keepstream import estimates
from keepstream.results import Choice, Usage, UsageSource

#: Tokens. No attempt takes more, whatever a provider has counted: believed, one such count would close its target for
#: years, and be the end of fairness, for everybody.
_MOST: Final = 20_000_000
_LEAST_BYTES: Final = 1000  #: Of prompts that must have been seen before their ratio counts.
_ENOUGH_BYTES: Final = 10_000_000  #: Of prompts, above which older ones count half.
_LEAST_RATIO: Final = 1 / 16  #: Tokens per byte; no tokenizer has longer tokens on average.
_MOST_TARGETS: Final = 1024


def reported(figures: dict[str, Any]) -> Usage:
    """Return what the provider reported; counts that it left out, or that cannot be, are null."""

    def count(name: str) -> int | None:
        value = figures.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None

    return Usage(
        prompt_tokens=count("prompt_tokens"),
        completion_tokens=count("completion_tokens"),
        total_tokens=count("total_tokens"),
        source=UsageSource.PROVIDER,
        details=figures,
    )


class PromptSizes:
    """Learns from reported prompts how many tokens a model makes of a text. One for a process."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}  # bytes and tokens, by provider and model

    def learn(self, provider: str, request: dict[str, Any], tokens: int | None) -> None:
        """Note that the provider counted ``tokens`` for the prompt of ``request``."""
        messages = request.get("messages")
        if not tokens or not isinstance(messages, list) or not _is_plain(request, messages):
            return
        target = (provider, str(request.get("model")))
        if target not in self._seen and len(self._seen) >= _MOST_TARGETS:
            return
        size, count = self._seen.get(target, (0.0, 0.0))
        if size > _ENOUGH_BYTES:  # so that a model that was changed behind its name is learned anew
            size, count = size / 2, count / 2
        self._seen[target] = (size + estimates.prompt_bytes(messages), count + tokens)

    def tokens(self, provider: str, request: dict[str, Any]) -> int:
        """Estimate the tokens of a prompt."""
        size = estimates.prompt_bytes(request.get("messages") or ())
        known_size, known_tokens = self._seen.get((provider, str(request.get("model"))), (0.0, 0.0))
        if known_size < _LEAST_BYTES:  # short prompts are mostly what the model adds to them
            return estimates.prompt_tokens(request)
        return math.ceil(size * min(max(known_tokens / known_size, _LEAST_RATIO), 1.0))


def _is_plain(request: dict[str, Any], messages: Sequence[Any]) -> bool:
    """Return whether a prompt is text alone; tools, images and audio cost tokens that say nothing of the text."""
    return not any(request.get(name) for name in ("tools", "functions")) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and not message.get("tool_calls")
        for message in messages
    )


def estimated(prompt_tokens: int, choices: Sequence[Choice]) -> Usage:
    """Estimate an attempt that was cut off after output had arrived; without output nothing is known.

    Args:
        prompt_tokens: Of the prompt, as estimated by ``PromptSizes``.
        choices: The output.
    """
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
    completion = -(-produced // estimates.BYTES_PER_TOKEN)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
        total_tokens=prompt_tokens + completion,
        source=UsageSource.ESTIMATED,
    )
