"""Writes a job as a chat completion.

In: a stored job.  Out: JSON-ready objects: the completion with its messages, as a client appends them to its next
request: with everything that the provider wants back, under its own names.  Pure.
"""

from collections.abc import Mapping
from typing import Any, Final

from keepstream import next_turn
from keepstream.extras import LEFT_OUT, REASONING_FIELDS
from keepstream.results import Choice, CompletionResult, Usage
from keepstream_gateway.openai.ids import chat_id
from keepstream_gateway.openai.origin import response_metadata

REASONING: Final = "reasoning_content"  #: The name that most providers and clients have for it.
#: Extras that are not told under their own names.
NOT_TOLD: Final = frozenset({"logprobs", "reasoning_parts", next_turn.ITEMS_FIELD, REASONING_FIELDS, LEFT_OUT})


def chat_completion(result: CompletionResult) -> dict[str, Any]:
    """Return the chat completion of a job that is completed."""
    provider = result.attempts[-1].provider if result.attempts else result.provider
    details = result.provider_details or {}
    return {
        "id": chat_id(result.id),
        "object": "chat.completion",
        "created": int(result.created_at.timestamp()),
        "model": details.get("model") or result.model,
        "choices": [_choice(choice, provider) for choice in result.choices],
        "usage": chat_usage(result.usage),
        "service_tier": details.get("service_tier"),
        "system_fingerprint": details.get("system_fingerprint"),
        "metadata": response_metadata(result.metadata),
    }


def _choice(choice: Choice, provider: str) -> dict[str, Any]:
    extra = choice.extra or {}
    message = next_turn.assistant_message(choice, provider)
    told = {name: value for name, value in extra.items() if name not in NOT_TOLD and name not in message}
    if "audio" in extra:
        told["audio"] = extra["audio"]  # whole: what goes back is its id only
    reasoning = {REASONING: choice.reasoning} if choice.reasoning else {}
    return {
        "index": choice.index,
        "message": {"refusal": None, **reasoning, **message, **told},
        "finish_reason": finish_reason(choice.finish_reason, has_calls=bool(choice.tool_calls)),
        "logprobs": extra.get("logprobs"),
    }


def finish_reason(given: str | None, *, has_calls: bool) -> str:
    """Return the reason why a choice has ended; clients need one, and some providers give none."""
    return given or ("tool_calls" if has_calls else "stop")


def chat_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Return a usage as chat completions have it, or None if it is not known."""
    if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    total = usage.total_tokens
    return {
        **(usage.details or {}),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens if total is None else total,
    }


def stored_messages(request: Mapping[str, Any] | None, job_id: str) -> list[dict[str, Any]]:
    """Return the messages of a stored request, each with an id."""
    messages = (request or {}).get("messages") or []
    return [{"id": f"{chat_id(job_id)}-{number}", **message} for number, message in enumerate(messages)]
