"""Requests: what ``useChat`` sends becomes the request of a job.

In: the body of a request, and what all chats ask for, from the settings.  Out: a chat-completions request.  Pure.
"""

from typing import Any, Final

from keepstream import names
from keepstream_gateway.ai_sdk.messages import Message
from keepstream_gateway.errors import ApiError, invalid

REGENERATE: Final = "regenerate-message"
_TRIGGERS: Final = ("submit-message", REGENERATE)
#: What ``useChat`` itself puts into a body; everything else in it is a parameter of the completion.
_OF_THE_SDK: Final = frozenset({"id", "messages", "trigger", "messageId"})
#: What decides how the answer comes, which is not the page's to say.
_OURS: Final = frozenset({"stream", "stream_options", "n"})


def trigger(body: dict[str, Any]) -> str:
    """Return why the page asks.

    Raises:
        ApiError: there is no such reason.
    """
    given = body.get("trigger", _TRIGGERS[0])
    if given not in _TRIGGERS:
        raise invalid(f"trigger: must be {' or '.join(_TRIGGERS)}", "trigger")
    return str(given)


def to_request(
    body: dict[str, Any], messages: list[Message], common: dict[str, Any], *, parameters: bool
) -> dict[str, Any]:
    """Return the request of a job.

    Args:
        body: What the page sent.
        messages: Its messages, as those of a chat completion.
        common: What all chats ask for; its messages come first.
        parameters: Whether the page may ask for more than an answer: for a model, for tools.

    Raises:
        ApiError: a parameter is not allowed, or no model is named.
    """
    own = {name: value for name, value in body.items() if name not in _OF_THE_SDK}
    for name in own:
        if name in _OURS:
            raise invalid(f"{name}: is the gateway's to choose", name)
        if not parameters:
            shown = names.shown(name)
            message = f"{shown}: a token allows messages only; the setting CHAT_REQUEST or an API key decide the rest"
            raise ApiError(403, message, "missing_right", param=shown)
    request = {**common, **own}
    if "model" not in request:
        raise invalid("model: must be named, in the body or by KEEPSTREAM_GATEWAY_CHAT_REQUEST", "model")
    return {**request, "messages": [*common.get("messages", []), *messages]}
