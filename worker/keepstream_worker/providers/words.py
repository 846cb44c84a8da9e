"""The provider's own words about a refusal, made fit to be stored.

In: the layers of an error, from ``failures``; secrets of the configuration, from the provider module.
Out: a ``ProviderError``, which goes into the attempt's row and nowhere else: it may quote the prompt.

Nobody can mend a request without knowing what was wrong with it, and only the provider's sentence says that. But
providers also quote keys, ours or their own, so whatever looks like one is removed before anything is kept.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from keepstream.results import ProviderError
from keepstream_worker.providers.accumulator.json_values import safe

_REMOVED: Final = "[removed]"
_MAX_MESSAGE: Final = 1000  #: Characters.
_MAX_WORD: Final = 200  #: Characters of a type, code or param.
_MAX_EXAMINED: Final = 20_000  #: Characters of a message that are examined at all.
_SHORTEST_SECRET: Final = 6  #: Characters; a shorter value of a header is no secret, and may be part of any word.

_MARKUP: Final = re.compile(r"<[^<>]{0,500}>")
_SPACES: Final = re.compile(r"\s+")
_KEYS: Final = re.compile(
    # What a known prefix or a name announces …
    r"\b(?:sk|pk|rk|gsk|xai|hf|r8|nvapi|pplx|csk|tgp|fw|dapi|ghp|glpat)[-_][A-Za-z0-9_\-*.]{4,}"
    r"|\bAIza[A-Za-z0-9_\-]{6,}|\beyJ[A-Za-z0-9_\-]{6,}(?:\.[A-Za-z0-9_\-]*)*"
    r"|\b(?:bearer|basic)\s+(?=[^\s]*[0-9_=])[^\s\"',;]{4,}"
    r"|\b(?:x-)?(?:api[-_ ]?key|access[-_ ]?token|authorization|password|secret)[\"']?\s*[:=]\s*"
    r"[\"']?(?:(?:bearer|basic)\s+)?[^\s\"',;}]+"
    r"|(?<=[?&])(?:key|api[-_]?key|token|sig|signature|code)=[^&\s\"']+"
    r"|(?<=://)[^/\s@]+@"
    # … what was masked by the provider itself, and what is too long and mixed to be a word.
    r"|\b[A-Za-z0-9_\-]{0,64}\*{3,}[A-Za-z0-9_\-]{0,64}"
    r"|\b(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9+/]{20,}={0,2}",
    re.IGNORECASE,
)


def provider_error(layers: Sequence[Mapping[str, Any]]) -> ProviderError | None:
    """Return what an error says, or None if it says nothing.

    Args:
        layers: The nested objects of the error, outermost first; the innermost one that says something counts.
    """
    words = ProviderError(
        message=_cleaned(_innermost(layers, ("message", "msg", "detail")), _MAX_MESSAGE),
        type=_cleaned(_innermost(layers, ("type", "error_type")), _MAX_WORD),
        code=_cleaned(_innermost(layers, ("code", "error_code", "status")), _MAX_WORD),
        param=_cleaned(_innermost(layers, ("param", "loc")), _MAX_WORD),
    )
    return words if any(words.model_dump().values()) else None


def without(words: ProviderError, secrets: Iterable[str]) -> ProviderError:
    """Return ``words`` without ``secrets``, in whatever field they stand."""
    known = sorted((secret for secret in secrets if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)
    if not known:
        return words
    pattern = re.compile("|".join(map(re.escape, known)))
    return ProviderError.model_validate(
        {name: text and pattern.sub(_REMOVED, text) for name, text in words.model_dump().items()}
    )


def _innermost(layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    for layer in reversed(layers):
        for name in names:
            value = layer.get(name)
            if isinstance(value, list) and name == "loc":  # FastAPI: the path to the field
                value = ".".join(str(part) for part in value[:8] if isinstance(part, str | int))
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**9:
                value = str(value)
            if isinstance(value, str) and value.strip():
                return value
    return None


def _cleaned(text: str | None, limit: int) -> str | None:
    if text is None:
        return None
    text = _MARKUP.sub(" ", safe(text[:_MAX_EXAMINED]))
    text = _KEYS.sub(_REMOVED, _SPACES.sub(" ", text).strip())
    return (text if len(text) <= limit else text[: limit - 1] + "…") or None
