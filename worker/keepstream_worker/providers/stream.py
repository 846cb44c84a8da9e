"""The stream reader: turns a response body into deltas, and decides whether the answer is complete.

In: the body's bytes, from the engine, which gets them from the provider module; at the end, why the transport ended.
Out: deltas while the stream lasts; then the output, and None or a ``Failure``.

How the connection ends does not settle the question: one that closes cleanly may have lost the rest of the answer,
and one that breaks after the last finish reason has lost nothing.

A body that is not an event stream is recognised by its first character, whatever its content type says: JSON is read
once it has ended, HTML is refused at once.
"""

import json
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

import orjson

from keepstream.errors import ErrorCode
from keepstream_worker.providers.accumulator import Accumulator, Limits, Output
from keepstream_worker.providers.dialects.responses_answer import ResponsesAccumulator, is_response
from keepstream_worker.providers.failures import failure_from_stream_error
from keepstream_worker.providers.sse import ERROR_FIELD, ServerSentEvent, SSEDecoder
from keepstream_worker.values import Delta, Failure

__all__ = ["Delta", "Limits", "Output", "StreamReader"]

_DONE: Final = b"[DONE]"
_KEEP_ALIVE_EVENTS: Final = frozenset({"ping", "heartbeat", "keepalive", "keep-alive"})
_BLANK: Final = b"\xef\xbb\xbf \t\r\n"  #: A byte order mark and white space, which may precede a body.
_MEDIA_TYPE: Final = re.compile(r"[a-z]{1,20}/[a-z0-9.+\-]{1,40}")


class _Framing(Enum):
    UNKNOWN = auto()  # nothing but white space so far
    EVENTS = auto()
    JSON = auto()


class StreamReader:
    """Reads the body of one successful response. Not thread-safe.

    Args:
        limits: Bounds on what the stream may use.
        done_completes: Whether ``[DONE]`` after output completes an answer that has no finish reason.
        content_type: The response's content type, quoted in the error if the body is not an event stream.
        expected_choices: The request's ``n``; ``complete`` stays False until that many choices have been seen.
        call_seed: The job's id, from which tool-call ids are generated for providers that send none.
        responses: Whether the answer is one of the Responses API, and not of chat completions.
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
        "_is_json_answer",
        "_named",
        "_responses",
        "_saw_done",
        "data_events",
        "done",
        "final_deltas",
        "limits",
    )

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        done_completes: bool = True,
        content_type: str | None = None,
        expected_choices: int = 1,
        call_seed: str = "",
        responses: bool = False,
    ) -> None:
        self.data_events = 0  #: Events so far that show progress: no comments, no pings.
        self.done = False  #: True once nothing that follows can matter: stop reading.
        self.final_deltas: list[Delta] = []  #: Set by ``finish``: deltas that were held back until then.
        self.limits = limits or Limits()  #: Bounds on what the stream may use.
        self._done_completes = done_completes
        self._content_type = content_type
        self._expected_choices = expected_choices
        self._framing = _Framing.UNKNOWN
        self._body = bytearray()  # of a body that is not an event stream, or not yet known to be one
        self._decoder = SSEDecoder(self.limits.max_event_bytes)
        self._responses = responses
        self._accumulator: Accumulator | ResponsesAccumulator
        self._named: Callable[[dict[str, Any], str], dict[str, Any]] | None = None  # gives an event its type
        if responses:
            self._accumulator = ResponsesAccumulator(self.limits, call_seed)
            self._named = self._accumulator.name
        else:
            self._accumulator = Accumulator(self.limits, call_seed)
        self._saw_done = False
        # Whether the body was one JSON answer, which needs no finish reason to be complete.
        self._is_json_answer = False
        self._ending = False
        self._error_field: bytes | None = None  # outside any event, so it counts only if nothing else explains the end
        self._failure: Failure | None = None

    @property
    def saw_data(self) -> bool:
        """Whether anything other than comments and pings has arrived."""
        return self.data_events > 0

    @property
    def complete(self) -> bool:
        """Whether every expected choice has ended; only usage can still follow."""
        return self._accumulator.complete and self._accumulator.choice_count >= self._expected_choices

    def output(self) -> Output:
        """Return the output so far, which equals the deltas returned so far, joined."""
        return self._accumulator.output()

    def feed(self, data: bytes) -> list[Delta]:
        """Read the next bytes of the body and return the deltas they contain."""
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
        """End the stream; return None if the answer is complete, otherwise why the attempt failed.

        Args:
            cause: Why the transport failed; None if it ended normally or the reader was ``done``.
        """
        self._ending = True
        if not self.done:
            if self._framing is _Framing.JSON:
                self._read_body(cut=cause is not None)
            self._read_events(self._decoder.finish(), self.final_deltas)
        self.done = True
        self._accumulator.flush(self.final_deltas)
        failure = self._failure_at_end(cause)
        if failure is None:
            self._accumulator.fill_empty_arguments(self.final_deltas)
        return failure

    def _failure_at_end(self, cause: Failure | None) -> Failure | None:
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
            if self._is_json_answer or (self._saw_done and self._done_completes and answer.closed):
                return None
        elif self._is_json_answer or self._saw_done:
            return Failure(ErrorCode.EMPTY_STREAM, "The provider's stream ended without any output.")
        if cause is not None:
            return cause
        if self.saw_data or answer.begun:
            return Failure(ErrorCode.TRUNCATED_STREAM, "The provider's stream ended without a finish reason.")
        if self._decoder.has_unknown_fields:
            return self._not_a_stream()
        return Failure(ErrorCode.EMPTY_STREAM, "The provider's stream ended without any data.")

    # -- events ---------------------------------------------------------------------------------------

    def _read_events(self, events: list[ServerSentEvent], deltas: list[Delta]) -> None:
        for payload, name in events:
            if self.done:
                break
            self._read_event(payload, name, deltas)

    def _read_event(self, payload: bytes, name: str, deltas: list[Delta]) -> None:
        if name:  # most events of chat completions have none
            if name in _KEEP_ALIVE_EVENTS and not self._responses:  # there the data's own type counts
                return
            if name == ERROR_FIELD:
                self._error_field = payload
                return
        lenient = False
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError:
            payload = payload.strip()
            if not payload:
                return
            if payload == _DONE:
                self._saw_done = self.done = True
                return
            lenient = True
            try:
                value = _loads_tolerantly(payload)
            except (ValueError, RecursionError):
                self._read_unreadable(payload, name)
                return
        if name == "error" and not (self._responses and type(value) is dict and value):  # its objects have a type
            self.data_events += 1
            self._report(value)
            return
        # Only objects carry anything; they may come in a list.
        if type(value) is dict:
            self._read_object(value, name, deltas, len(payload), lenient)
        elif type(value) is list:
            for item in value:
                if self.done:
                    break
                if type(item) is dict:
                    self._read_object(item, name, deltas, len(payload), lenient)

    def _read_object(self, chunk: dict[str, Any], name: str, deltas: list[Delta], size: int, lenient: bool) -> None:  # noqa: FBT001 -- a keyword costs time here
        if not chunk:
            return
        if self._named is not None:
            chunk = self._named(chunk, name)
            self.data_events += ResponsesAccumulator.is_progress(chunk)
        else:
            self.data_events += 1
        self._read_chunk(chunk, deltas, size, lenient)

    def _read_chunk(self, chunk: dict[str, Any], deltas: list[Delta], size: int, lenient: bool) -> None:  # noqa: FBT001 -- the same
        answer = self._accumulator
        try:
            error = answer.apply(chunk, deltas, size, lenient)
        except RecursionError:
            self._stop(Failure(ErrorCode.INVALID_STREAM, "The provider's stream has an event nested too deeply."))
            return
        # Both happened before this chunk's finish reason, which may make the answer look complete.
        if error is not None:
            self._failure = failure_from_stream_error(error)
        elif answer.too_large:
            self._failure = Failure(ErrorCode.OUTPUT_TOO_LARGE, "The provider's output passed the limit.")
        elif answer.foreign:
            self._failure = Failure(
                ErrorCode.INVALID_RESPONSE, "The provider answers as if asked for a chat completion."
            )
        elif not answer.ended:  # nearly every chunk
            return
        self.done = True

    def _read_unreadable(self, payload: bytes, name: str) -> None:
        if name in _KEEP_ALIVE_EVENTS:
            return
        self.data_events += 1
        if name == "error":
            self._report(payload.decode(errors="replace"))
        elif not (self._ending or self._accumulator.succeeded):  # an unreadable last event was probably cut off
            self._stop(Failure(ErrorCode.INVALID_STREAM, "The provider's stream has an event that is no valid JSON."))

    def _report(self, error: object) -> None:
        if not self._accumulator.succeeded:
            self._stop(failure_from_stream_error(error))

    def _stop(self, failure: Failure) -> None:
        """Stop reading. ``failure`` counts unless reading had already stopped or the answer was already complete."""
        if not self.done and not self._accumulator.succeeded:
            self._failure = failure
        self.done = True

    # -- bodies that are not an event stream ------------------------------------------------------------

    def _sniff(self, data: bytes) -> bytes:
        """Buffer ``data`` until the kind of body is known; return the bytes that belong to an event stream."""
        self._body += data
        if self._framing is _Framing.UNKNOWN:
            self._body = self._body.lstrip(_BLANK)
            if not self._body:
                return b""
            if self._body.startswith((b"{", b"[")):
                self._framing = _Framing.JSON
            elif self._body.startswith(b"<"):
                self._stop(self._not_a_stream())
            else:
                self._framing = _Framing.EVENTS
                data = bytes(self._body)
                self._body.clear()
                return data
        self.data_events += 1
        if len(self._body) > self.limits.max_event_bytes:
            self._stop(Failure(ErrorCode.OUTPUT_TOO_LARGE, "The provider's answer is above the limit."))
        return b""

    def _read_body(self, *, cut: bool) -> None:
        """Read a JSON body; ``cut`` says whether its end may be missing."""
        payload = bytes(self._body)
        lenient = False
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError:
            lenient = True
            try:
                value = _loads_tolerantly(payload)
            except (ValueError, RecursionError):
                if not cut:
                    self._failure = Failure(ErrorCode.INVALID_STREAM, "The provider's answer is no valid JSON.")
                return
        for chunk in value if type(value) is list else (value,):
            if type(chunk) is dict:
                self._is_json_answer = self._is_json_answer or self._is_answer(chunk)
                self._read_chunk(chunk, self.final_deltas, len(payload), lenient)
        if not (self._is_json_answer or self._accumulator.ended or self._failure):
            self._failure = self._not_a_stream()

    def _is_answer(self, value: dict[str, Any]) -> bool:
        return is_response(value) if self._responses else type(value.get("choices")) is list

    def _not_a_stream(self) -> Failure:
        media_type = (self._content_type or "").partition(";")[0].strip().lower()
        named = media_type if _MEDIA_TYPE.fullmatch(media_type) and media_type != "text/event-stream" else "something"
        return Failure(ErrorCode.INVALID_RESPONSE, f"The provider answered with {named} instead of an event stream.")


def _loads_tolerantly(payload: bytes) -> Any:
    """Decode JSON that may contain raw control characters or lone surrogates.

    Raises:
        ValueError: it is not JSON, not UTF-8, or contains a number with thousands of digits.
        RecursionError: it is nested too deeply.
    """
    return json.loads(payload.decode(), strict=False)
