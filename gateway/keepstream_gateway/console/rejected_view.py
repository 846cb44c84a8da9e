"""The rejected messages as people see them.

In: rejected messages.  Out: a ``RejectedView`` to the page.  Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from keepstream.client.overview import RejectedMessage
from keepstream_gateway.console.jobs_view import address_of
from keepstream_gateway.console.words import NOTHING, Moment, moment, size

PAGE: Final = 50  #: Messages of a page.


@dataclass(frozen=True, slots=True)
class MessageRow:
    """One message."""

    at: Moment
    reason: str
    job: str
    address: str
    size: str


@dataclass(frozen=True, slots=True)
class RejectedView:
    """The page."""

    messages: Sequence[MessageRow]
    is_first: bool
    older: str


def show(messages: Sequence[RejectedMessage], now: datetime, *, is_first: bool) -> RejectedView:
    """Return the page."""
    more = len(messages) == PAGE
    return RejectedView(
        messages=[_row(message, now) for message in messages],
        is_first=is_first,
        older=f"/rejected?{urlencode({'before': messages[-1].id})}" if more else "",
    )


def _row(message: RejectedMessage, now: datetime) -> MessageRow:
    has_job = message.tenant is not None and message.job_id is not None
    return MessageRow(
        at=moment(message.rejected_at, now),
        reason=message.reason,
        job=" / ".join(filter(None, (message.tenant, message.job_id))) or "not named",
        address=address_of(message.tenant or "", message.job_id or "") if has_job else "",
        size=size(message.size) if message.size else NOTHING,
    )
