"""The next turn: the message that stands for an answer in the request after it.

In: a stored choice, and the provider that gave it.  Out: an assistant's message, to be appended to ``messages``.

Providers want back more than the text: their reasoning under the name by which it came, signatures where they stood,
whole items of the Responses API. Strict ones refuse a request in which any of this is missing or altered, and most
refuse fields that they do not know, so what they did not send is not there either.  Pure.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from keepstream.extras import LEFT_OUT, REASONING_FIELDS, omissions

if TYPE_CHECKING:
    from keepstream.results import Choice, ToolCall

#: Where a message carries the items of an answer of the Responses API.
ITEMS_FIELD: Final = "responses_output"
#: Marks a call that came in the legacy field ``function_call``; its result goes back with the role ``function``.
LEGACY_CALL: Final = "legacy_function_call"

#: Extras that go back as they came; others, such as images, annotations and logprobs, are output only.
_GOES_BACK: Final = re.compile(
    r"reasoning|thinking|thought|signature|opaque|encrypted|^extra_content$|^provider_specific_fields$", re.IGNORECASE
)
_PARTS: Final = "reasoning_parts"  #: Reasoning that came among the parts of the content, and goes back there.
_OURS: Final = frozenset({REASONING_FIELDS, LEFT_OUT, _PARTS, ITEMS_FIELD})


def assistant_message(choice: "Choice", provider: str) -> dict[str, Any]:
    """Return the assistant's message that stands for ``choice``.

    Args:
        choice: The answer.
        provider: Name of the provider that gave it; items of the Responses API go back to no other.
    """
    extra = choice.extra or {}
    broken = {*omissions(extra), *(given if isinstance(given := extra.get(LEFT_OUT), dict) else ())}
    message: dict[str, Any] = {"role": "assistant", "content": _content(choice, extra, broken)}
    if choice.refusal:
        message["refusal"] = choice.refusal
    for name in _texts(extra.get(REASONING_FIELDS)):
        message[name] = choice.reasoning
    kept_back = _OURS | broken
    message |= {name: value for name, value in extra.items() if _GOES_BACK.search(name) and name not in kept_back}
    _add_calls(message, choice)
    audio = extra.get("audio")
    if isinstance(audio, dict) and audio.get("id"):
        message["audio"] = {"id": audio["id"]}
    items = extra.get(ITEMS_FIELD)
    if isinstance(items, list) and items and ITEMS_FIELD not in broken:
        message[ITEMS_FIELD] = {"provider": provider, "items": items}
    return message


def _content(choice: "Choice", extra: Mapping[str, Any], broken: set[str]) -> Any:
    """Return the text; null where there is something else instead; a list of parts if reasoning is one of them."""
    parts = extra.get(_PARTS)
    if isinstance(parts, list) and parts and _PARTS not in broken:
        return [*parts, *([{"type": "text", "text": choice.content}] if choice.content else [])]
    if choice.content:
        return choice.content
    return None if choice.tool_calls or choice.refusal or extra.get("audio") else ""


def _add_calls(message: dict[str, Any], choice: "Choice") -> None:
    calls = []
    for call in choice.tool_calls:
        if (call.extra or {}).get(LEGACY_CALL):
            message["function_call"] = {"name": call.name, "arguments": call.arguments}
        else:
            calls.append(_call(call))
    if calls:
        message["tool_calls"] = calls


def _call(call: "ToolCall") -> dict[str, Any]:
    body = (
        {"custom": {"name": call.name, "input": call.arguments}}
        if call.type == "custom"
        else {"function": {"name": call.name, "arguments": call.arguments}}
    )
    return {"id": call.id, "type": call.type, **body, **(call.extra or {})}


def _texts(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
