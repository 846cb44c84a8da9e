"""Chooses the dialect in which a model is asked, where the configuration leaves it open.

In: a request; the refusal of a provider that was asked by chat completions.
Out: whether the Responses API is needed, to the provider module.

Most providers have chat completions only, and OpenAI's newer models refuse some requests there, function tools above
all, or all of them. Which model refuses what changes with every release, so the provider's own refusal decides, not a
list of names. Its wording changes as well: what all have in common is that they name the other endpoint.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from keepstream_worker.values import Failure

#: Parameters that OpenAI has on the Responses API only.
_ONLY_RESPONSES: Final = frozenset({"reasoning", "text", "include", "truncation", "context_management"})
_CHAT_TOOLS: Final = frozenset({"function", "custom"})

_REFUSED: Final = frozenset({400, 404})
_NAMES_THE_ENDPOINT: Final = re.compile(r"\bv1/responses\b", re.IGNORECASE)
_CODES: Final = frozenset(
    {
        "unsupported_api_for_model",  # GitHub Copilot
        "OperationNotSupported",  # Azure
    }
)
#: OpenAI says this of models without chat completions, but of embeddings and the like, too.
_NOT_A_CHAT_MODEL: Final = re.compile(r"not a chat model", re.IGNORECASE)
_LIKELY_MODEL: Final = re.compile(r"codex|deep-research|-pro\b|\bgpt-([5-9]|\d\d)|\bo\d", re.IGNORECASE)


def only_by_responses(request: Mapping[str, Any]) -> bool:
    """Whether a request uses what only OpenAI's Responses API has: one of its parameters, or a hosted tool.

    Others have parameters and tools of these names on chat completions: OpenRouter's ``reasoning``, for instance.
    """
    if any(request.get(name) is not None for name in _ONLY_RESPONSES):
        return True
    tools = request.get("tools")
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind not in _CHAT_TOOLS
        for tool in tools
    )


def wants_responses(request: Mapping[str, Any], refusal: Failure) -> bool:
    """Whether a refusal by chat completions says that this model wants to be asked by the Responses API."""
    said = refusal.provider_error
    if refusal.http_status not in _REFUSED or said is None:
        return False
    if said.code in _CODES or any(_NAMES_THE_ENDPOINT.search(text) for text in (said.message, said.param) if text):
        return True
    likely = bool(request.get("tools")) or _LIKELY_MODEL.search(str(request.get("model"))) is not None
    return likely and said.message is not None and _NOT_A_CHAT_MODEL.search(said.message) is not None


def refuses_encrypted_reasoning(refusal: Failure) -> bool:
    """Whether a provider refuses to be asked for encrypted reasoning: the model has none."""
    said = refusal.provider_error
    if refusal.http_status not in _REFUSED or said is None:
        return False
    return (said.param or "").startswith("include") or "ncrypted content is not supported" in (said.message or "")


def refuses_returned_items(refusal: Failure) -> bool:
    """Whether a provider cannot read the reasoning that is given back: it is another key's, or another region's."""
    said = refusal.provider_error
    if refusal.http_status not in _REFUSED or said is None:
        return False
    return said.code == "invalid_encrypted_content" or "encrypted_content was not issued" in (said.message or "")
