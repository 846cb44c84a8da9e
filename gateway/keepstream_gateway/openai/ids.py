"""The ids and sequence numbers of OpenAI's shapes, all of them functions of the job and its events.

In: a job's id, an event's id.  Out: ``resp_…``, ``chatcmpl-…``, item ids and sequence numbers, and back.

A **sequence number** is made of three numbers with fixed strides: the attempt, the event's n within it, and the
position among the events of the Responses API that this one event became. So every gateway process gives the same
number to the same event, from the log or from the row alone, and numbers have gaps, which clients allow: they compare
only. It stays below 2^53, the largest whole number that JavaScript counts exactly, up to attempt 9,006. A single
event of a job becomes fewer than ``LAST`` others: it has 256 tool calls and 128 choices at most.
"""

import hashlib
import re
from typing import Final, NamedTuple

from keepstream import names

_RESPONSE: Final = "resp_"
_CHAT: Final = "chatcmpl-"

LAST: Final = 9_999  #: Position of the event that ends a response, whatever comes before it.
_EVENT_STRIDE: Final = LAST + 1
_ATTEMPT_STRIDE: Final = _EVENT_STRIDE * 100_000_000
_MAX_SEQUENCE: Final = 2**53 - 1


class Position(NamedTuple):
    """The place of an event of the Responses API."""

    attempt: int  #: 0 for those that come before any event of the job.
    n: int
    sub: int


def sequence_number(attempt: int, n: int, sub: int) -> int:
    """Return the sequence number of the event at this place."""
    return attempt * _ATTEMPT_STRIDE + n * _EVENT_STRIDE + sub


def position(sequence: int) -> Position:
    """Return the place that a sequence number, of at least 0, names."""
    attempt, rest = divmod(sequence, _ATTEMPT_STRIDE)
    n, sub = divmod(rest, _EVENT_STRIDE)
    return Position(attempt, n, sub)


def parse_cursor(text: str) -> int:
    """Return the sequence number that ``starting_after`` spells.

    Raises:
        ValueError: it spells none.
    """
    if re.fullmatch(r"[0-9]{1,16}", text, re.ASCII) is None or int(text) > _MAX_SEQUENCE:
        raise ValueError("not a sequence number")
    return int(text)


def response_id(job_id: str) -> str:
    """Return the id of a job's response object."""
    return _RESPONSE + job_id


def chat_id(job_id: str) -> str:
    """Return the id of a job's chat completion."""
    return _CHAT + job_id


def job_of_response(text: str) -> str | None:
    """Return the id of the job that a response's id names, or None if it names none."""
    return _job(text, _RESPONSE)


def job_of_chat(text: str) -> str | None:
    """Return the id of the job that a chat completion's id names, or None if it names none."""
    return _job(text, _CHAT)


def _job(text: str, prefix: str) -> str | None:
    job_id = text.removeprefix(prefix)
    return job_id if job_id != text and re.fullmatch(names.ID_PATTERN, job_id) else None


class ItemIds:
    """The ids of the items of one attempt's output.

    Args:
        job_id: The job.
        attempt: Whose output it is.
        n: The event with which the output began anew within the attempt; 0: it did not.
    """

    def __init__(self, job_id: str, attempt: int, n: int = 0) -> None:
        self._job_id = job_id
        self._end = f"{job_id}_{attempt}" + (f"_{n}" if n else "")

    def reasoning(self, choice: int) -> str:
        """Return the id of a choice's reasoning."""
        return f"rs_{self._end}{_suffix(choice)}"

    def message(self, choice: int) -> str:
        """Return the id of a choice's message."""
        return f"msg_{self._end}{_suffix(choice)}"

    def call(self, call_id: str, kind: str) -> str:
        """Return the id of the item of a tool call.

        It follows from the call's own id: OpenAI's library tells calls apart by that, and wants one item for each.
        """
        if re.fullmatch(r"[\w\-]{1,64}", call_id, re.ASCII) is None:
            call_id = hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:32]
        return f"{'ctc' if kind == 'custom' else 'fc'}_{self._job_id}_{call_id}"

    def other(self, choice: int, number: int, kind: str) -> str:
        """Return the id of an item of another kind that came without one."""
        return f"{kind}_{self._end}{_suffix(choice)}_{number}"


def _suffix(choice: int) -> str:
    return f"_c{choice}" if choice else ""
