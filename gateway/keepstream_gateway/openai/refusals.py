"""The one error of this room: a request that cannot be expressed, or is malformed.

In: what is wrong, from the translations.  Out: an exception that becomes OpenAI's error shape, with the status 400.
"""

import re
from collections.abc import Iterable

from keepstream import names


class RefusedError(ValueError):
    """The request cannot be taken; the message says what to do, and repeats no value.

    Args:
        message: For people.
        param: The parameter, as ``input[2].content``.
        code: A word for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def to_error(self) -> dict[str, str | None]:
        """Return the ``error`` object of the answer."""
        return {"message": self.message, "type": "invalid_request_error", "param": self.param, "code": self.code}


def unsupported(param: str, remedy: str = "leave it out") -> RefusedError:
    """Return the refusal of something that a job cannot express."""
    return RefusedError(f"'{param}' is not supported here; {remedy}", param, "unsupported_parameter")


def unknown(name: object, known: Iterable[str]) -> RefusedError:
    """Return the refusal of a parameter that is not known; a long or odd name may be a text, and is not shown."""
    if not isinstance(name, str) or re.fullmatch(r"[\w.\-]{1,64}", name, re.ASCII) is None:
        return RefusedError("there is a parameter that is not known", code="unknown_parameter")
    nearest = names.nearest(name, known)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return RefusedError(f"unknown parameter: '{name}'{hint}", name, "unknown_parameter")


def wrong_type(param: str, wanted: str) -> RefusedError:
    """Return the refusal of a value of another kind than ``wanted``, 'a string' for instance."""
    return RefusedError(f"'{param}' must be {wanted}", param, "invalid_type")
