"""The stream reader: a provider's answer, from its bytes to the verdict whether it is whole.

In: the response body as it comes, from the provider module, and at the end why it ended.  Out: deltas
to the engine while it lasts, then the verdict, None or a ``Failure``, and the output.  Exists so that
"the answer is whole" is decided in one place, without a socket: a connection that ends in good order
proves nothing, and one that breaks after the last finish reason spoils nothing.

A body that is no event stream is recognised by its first character, whatever its content type says:
JSON is read when it has ended, HTML is refused at once.
"""

import json
import re
from enum import Enum, auto
from typing import Any, Final

import orjson

from keepstream.errors import ErrorCode
from keepstream_worker.providers.accumulator import Accumulator, Limits, Output
from keepstream_worker.providers.failures import failure_from_stream_error
from keepstream_worker.providers.sse import ERROR_FIELD, ServerSentEvent, SSEDecoder
from keepstream_worker.values import Delta, Failure

__all__ = ["Delta", "Limits", "Output", "StreamReader"]

_DONE: Final = b"[DONE]"
_KEEP_ALIVE_EVENTS: Final = frozenset({"ping", "heartbeat", "keepalive", "keep-alive"})
_BLANK: Final = b"\xef\xbb\xbf \t\r\n"  #: A byte order mark and white space: what may stand before a body.
_MEDIA_TYPE: Final = re.compile(r"[a-z]{1,20}/[a-z0-9.+\-]{1,40}")


class _Framing(Enum):
    UNKNOWN = auto()  # nothing but white space so far
    EVENTS = auto()
    JSON = auto()


class StreamReader:
    """Reads one response with status 200. Not thread-safe.

    Args:
        limits: What the stream may use.
        done_completes: Whether ``[DONE]`` after output completes an answer without a finish reason.
        content_type: The response's, for the message if the body turns out to be something else.
        expected_choices: The request's ``n``; until so many were seen, ``complete`` does not hold.
        call_seed: What made-up tool-call ids are derived from: the job's id.
    """

    __slots__ = (
        "_accumulator",
        "_body",
        "_content_type",
        "_decoder",
        "_done_completes",
        "_ending",
        "_error_field",
        "_expected_choices",
        "_failure",
        "_framing",
        "_limits",
        "_saw_done",
        "_whole",
        "data_events",
        "done",
        "final_deltas",
    )

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        done_completes: bool = True,
        content_type: str | None = None,
        expected_choices: int = 1,
        call_seed: str = "",
    ) -> None:
        self.data_events = 0  #: Events with data so far; comments and pings do not count.
        self.done = False  #: Whether nothing that may still come can matter: stop reading.
        self.final_deltas: list[Delta] = []  #: After ``finish``: what was held back until then.
        self._limits = limits or Limits()
        self._done_completes = done_completes
        self._content_type = content_type
        self._expected_choices = expected_choices
        self._framing = _Framing.UNKNOWN
        self._body = bytearray()  # of an answer that is not, or not yet known to be, an event stream
        self._decoder = SSEDecoder(self._limits.max_event_bytes)
        self._accumulator = Accumulator(self._limits, call_seed)
        self._saw_done = False
        self._whole = False  # whether the body was one JSON answer, which has no end but its own
        self._ending = False
        self._error_field: bytes | None = None  # outside of any event, so it counts only if nothing else does
        self._failure: Failure | None = None

    @property
    def saw_data(self) -> bool:
        """Whether anything but comments and pings has come."""
        return self.data_events > 0

    @property
    def complete(self) -> bool:
        """Whether every choice has ended, and only usage may still come."""
        return self._accumulator.complete and self._accumulator.choice_count >= self._expected_choices

    def output(self) -> Output:
        """Return the output so far; joining the deltas given out so far gives the same."""
        return self._accumulator.output()

    def feed(self, data: bytes) -> list[Delta]:
        """Take the next bytes of the body and return what they add to the output."""
        deltas: list[Delta] = []
        if self.done:
            return deltas
        if self._framing is not _Framing.EVENTS:
            data = self._sniff(data)
        self._read_events(self._decoder.feed(data), deltas)
        if self._decoder.oversized:
            self._stop(Failure(ErrorCode.OUTPUT_TOO_LARGE, "The provider's stream has an event above the limit."))
        return deltas

    def finish(self, cause: Failure | None = None) -> Failure | None:
        """End the reading and return None if the answer is whole, else why the attempt failed.

        Args:
            cause: Why the transport ended; None: in good order, or the reader said ``done``.
        """
        self._ending = True
        if not self.done:
            if self._framing is _Framing.JSON:
                self._read_body(cut=cause is not None)
            self._read_events(self._decoder.finish(), self.final_deltas)
        self.done = True
        self._accumulator.flush(self.final_deltas)
        failure = self._verdict(cause)
        if failure is None:
            self._accumulator.fill_empty_arguments(self.final_deltas)
        return failure

    def _verdict(self, cause: Failure | None) -> Failure | None:
        answer = self._accumulator
        if self._failure is not None:
            return self._failure
        if answer.failed:
            return Failure(ErrorCode.PROVIDER_ERROR, "The provider gave a failure as the finish reason.")
        if answer.complete:
            return None
        if answer.has_output:
            if self._error_field is not None:
                return failure_from_stream_error(self._error_field)
            if self._whole or (self._saw_done and self._done_completes):
                return None
        elif self._whole or self._saw_done:
            return Failure(ErrorCode.EMPTY_STREAM, "The provider's stream ended without any output.")
        if cause is not None:
            return cause
        if self.saw_data:
            return Failure(ErrorCode.TRUNCATED_STREAM, "The provider's stream ended without a finish reason.")
        if self._decoder.foreign_lines:
            return self._no_stream()
        return Failure(ErrorCode.EMPTY_STREAM, "The provider's stream ended without any data.")

    # -- events ---------------------------------------------------------------------------------------

    def _read_events(self, events: list[ServerSentEvent], deltas: list[Delta]) -> None:
        for payload, name in events:
            if self.done:
                break
            self._read_event(payload, name, deltas)

    def _read_event(self, payload: bytes, name: str, deltas: list[Delta]) -> None:
        if name in _KEEP_ALIVE_EVENTS:
            return
        if name == ERROR_FIELD:
            self._error_field = payload
            return
        torn = False
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError:
            payload = payload.strip()
            if not payload:
                return
            if payload == _DONE:
                self._saw_done = self.done = True
                return
            torn = True
            try:
                value = _loads_tolerantly(payload)
            except (ValueError, RecursionError):
                self._read_unreadable(payload, name)
                return
        if name == "error":
            self.data_events += 1
            self._report(value)
            return
        # Whatever is no object carries nothing; objects may come in a list.
        for chunk in value if type(value) is list else (value,):
            if self.done:
                break
            if chunk and type(chunk) is dict:
                self.data_events += 1
                self._read_chunk(chunk, deltas, len(payload), torn=torn)

    def _read_chunk(self, chunk: dict[str, Any], deltas: list[Delta], size: int, *, torn: bool) -> None:
        try:
            error = self._accumulator.apply(chunk, deltas, size, torn)
        except RecursionError:
            self._stop(Failure(ErrorCode.INVALID_STREAM, "The provider's stream has an event nested too deeply."))
            return
        # Both speak of the time before this chunk's finish reason, which may have made the answer look whole.
        if error is not None:
            self._failure = failure_from_stream_error(error)
        elif self._accumulator.too_large:
            self._failure = Failure(ErrorCode.OUTPUT_TOO_LARGE, "The provider's output passed the limit.")
        self.done = self._failure is not None

    def _read_unreadable(self, payload: bytes, name: str) -> None:
        self.data_events += 1
        if name == "error":
            self._report(payload.decode(errors="replace"))
        elif not (self._ending or self._accumulator.succeeded):  # the last event may just be cut
            self._stop(Failure(ErrorCode.INVALID_STREAM, "The provider's stream has an event that is no valid JSON."))

    def _report(self, error: object) -> None:
        if not self._accumulator.succeeded:
            self._stop(failure_from_stream_error(error))

    def _stop(self, failure: Failure) -> None:
        """Read no further; the failure counts unless the reading had stopped or the answer was whole before."""
        if not self.done and not self._accumulator.succeeded:
            self._failure = failure
        self.done = True

    # -- bodies that are no event stream --------------------------------------------------------------

    def _sniff(self, data: bytes) -> bytes:
        """Keep ``data`` until it is known what the body is; return what belongs to an event stream."""
        self._body += data
        if self._framing is _Framing.UNKNOWN:
            self._body = self._body.lstrip(_BLANK)
            if not self._body:
                return b""
            if self._body.startswith((b"{", b"[")):
                self._framing = _Framing.JSON
            elif self._body.startswith(b"<"):
                self._stop(self._no_stream())
            else:
                self._framing = _Framing.EVENTS
                data = bytes(self._body)
                self._body.clear()
                return data
        self.data_events += 1
        if len(self._body) > self._limits.max_event_bytes:
            self._stop(Failure(ErrorCode.OUTPUT_TOO_LARGE, "The provider's answer is above the limit."))
        return b""

    def _read_body(self, *, cut: bool) -> None:
        """Read a body that is JSON; ``cut`` tells whether its end may be missing."""
        payload = bytes(self._body)
        torn = False
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError:
            torn = True
            try:
                value = _loads_tolerantly(payload)
            except (ValueError, RecursionError):
                if not cut:
                    self._failure = Failure(ErrorCode.INVALID_STREAM, "The provider's answer is no valid JSON.")
                return
        for chunk in value if type(value) is list else (value,):
            if type(chunk) is dict:
                self._whole = self._whole or type(chunk.get("choices")) is list
                self._read_chunk(chunk, self.final_deltas, len(payload), torn=torn)
        if not self._whole and self._failure is None:
            self._failure = self._no_stream()

    def _no_stream(self) -> Failure:
        media_type = (self._content_type or "").partition(";")[0].strip().lower()
        named = media_type if _MEDIA_TYPE.fullmatch(media_type) and media_type != "text/event-stream" else "something"
        return Failure(ErrorCode.INVALID_RESPONSE, f"The provider answered with {named} instead of an event stream.")


def _loads_tolerantly(payload: bytes) -> Any:
    """Return the JSON value of a text that may hold raw control characters or halves of surrogate pairs.

    Raises:
        ValueError: It is no JSON, no UTF-8, or has a number of thousands of digits.
        RecursionError: It is nested too deeply.
    """
    return json.loads(payload.decode(), strict=False)
