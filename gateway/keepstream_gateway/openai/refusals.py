"""Refusals of what cannot be expressed: all a 400 in OpenAI's shape, which names the parameter.

In: what is wrong, from the translations.  Out: errors to raise; their messages say what to do, and repeat no value.
"""

from collections.abc import Iterable

from keepstream import names
from keepstream_gateway.errors import ApiError, invalid


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the refusal of a value."""
    return invalid(message, param, code)


def unsupported(param: str, remedy: str = "leave it out") -> ApiError:
    """Return the refusal of something that a job cannot express."""
    return invalid(f"'{param}' is not supported here; {remedy}", param, "unsupported_parameter")


def unknown(name: object, known: Iterable[str]) -> ApiError:
    """Return the refusal of a parameter that is not known; a long or odd name may be a text, and is not shown."""
    shown = names.shown(name)
    if shown != name:
        return invalid("there is a parameter that is not known", code="unknown_parameter")
    nearest = names.nearest(shown, known)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return invalid(f"unknown parameter: '{shown}'{hint}", shown, "unknown_parameter")


def wrong_type(param: str, wanted: str) -> ApiError:
    """Return the refusal of a value of another kind than ``wanted``, 'a string' for instance."""
    return invalid(f"'{param}' must be {wanted}", param, "invalid_type")
