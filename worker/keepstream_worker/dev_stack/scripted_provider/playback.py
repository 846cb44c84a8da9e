"""Playback: sends the response to a request, faults included, in the order in which the client sees it.

In: a script, this attempt's fault and the encoded answer, from the server.
Out: writes, pauses and faults on the ``Connection``.
"""

import time
from http import HTTPStatus
from typing import Any, Final

from keepstream_worker.dev_stack.scripted_provider.connection import NEVER, NOW, Connection, Playback, send_json
from keepstream_worker.dev_stack.scripted_provider.encoding import EncodedStream, error_body, sse_event
from keepstream_worker.dev_stack.scripted_provider.script import (
    CommentsFault,
    EndFault,
    ErrorEventFault,
    Fault,
    MidwayFault,
    RawResponse,
    Script,
    SilentFault,
    SlowFault,
    StatusFault,
)

BATCH: Final = 256  #: Deltas written at once when unpaced: about as much as the transport buffers before it pauses us.
COMMENT_EVERY: Final = 0.05  #: Seconds between two SSE comments.
LOOK_EVERY: Final = 0.05  #: Seconds after which a stream that waits for others looks again.

_STREAM_HEADERS: Final = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_GARBAGE: Final = b'data: {"id":"chatcmpl-garbage","choices":[{"del\xff\xfe\n\n'


def play(connection: Connection, script: Script, fault: Fault | None, answer: Playback) -> Playback:
    """Play ``answer``, or what the script or the fault puts in its place."""
    if script.delay:
        yield connection.later(script.delay)
    match fault:
        case StatusFault():
            body = fault.body or error_body(f"Scripted HTTP status {fault.status}.", "scripted_error")
            yield from send_json(connection, fault.status, body, fault.headers)
        case SilentFault(kind="refuse"):
            connection.drop()
        case SilentFault():
            yield NEVER
        case None if script.raw is not None:
            yield from _play_raw(connection, script.raw)
        case _:
            yield from answer


def complete(connection: Connection, script: Script, completion: dict[str, Any]) -> Playback:
    """Send a completion that is not streamed."""
    if script.first_token_delay:
        yield connection.later(script.first_token_delay)
    yield from send_json(connection, HTTPStatus.OK, completion)


def stream(connection: Connection, script: Script, fault: Fault | None, encoded: EncodedStream) -> Playback:
    """Stream an answer, with the fault in it."""
    connection.begin(HTTPStatus.OK, _STREAM_HEADERS)
    if isinstance(fault, SlowFault):
        script = script.model_copy(update={"rate": fault.rate})
    while connection.peak_streams < script.at_once:
        yield connection.later(LOOK_EVERY)
    if script.first_token_delay:
        yield connection.later(script.first_token_delay)

    sent = 0
    if isinstance(fault, MidwayFault | ErrorEventFault | CommentsFault):
        sent = min(fault.after, len(encoded.deltas))
        yield from _send_deltas(connection, script, encoded, 0, sent)
        if not isinstance(fault, CommentsFault):
            yield from _break_off(connection, fault)
            return
        yield from _send_comments(connection, fault.seconds)
    yield from _send_deltas(connection, script, encoded, sent, len(encoded.deltas))

    connection.send(encoded.finish)
    if isinstance(fault, EndFault) and fault.kind == "cut_after_finish":
        yield from connection.reset()
        return
    if not isinstance(fault, EndFault):
        connection.send(encoded.usage)
    connection.send(encoded.done)
    connection.end()


def _send_deltas(connection: Connection, script: Script, encoded: EncodedStream, start: int, stop: int) -> Playback:
    writes = encoded.writes(start, stop, script.chunk_size)
    # Unpaced, many chunks go out in one write before the loop continues; paced, one at a time.
    batch_size = 1 if script.rate else BATCH
    interval = script.chunk_size / script.rate if script.rate else 0
    due = connection.later(0)
    for position in range(0, len(writes), batch_size):
        batch = writes[position : position + batch_size]
        stamp = b"%020d " % time.monotonic_ns()
        connection.send(b"".join([stamp.join(segments) for segments in batch]))
        deltas = min(len(batch) * script.chunk_size, stop - start)
        connection.count(deltas)
        start += deltas
        due += interval  # from the first delta on, so that late wake-ups do not add up
        yield due


def _send_comments(connection: Connection, seconds: float) -> Playback:
    until = connection.later(seconds)
    while (due := connection.later(COMMENT_EVERY)) < until:
        connection.send_chunk(b": keep-alive\n\n")
        yield due
    yield until


def _break_off(connection: Connection, fault: MidwayFault | ErrorEventFault) -> Playback:
    match fault:
        case MidwayFault(kind="cut"):
            yield from connection.reset()
        case MidwayFault(kind="stall"):
            yield NEVER
        case MidwayFault(kind="garbage"):
            connection.send_chunk(_GARBAGE)
            connection.end()
        case ErrorEventFault():
            connection.send_chunk(sse_event({"error": fault.error}))
            connection.end()
        case MidwayFault():
            connection.end()


def _play_raw(connection: Connection, raw: RawResponse) -> Playback:
    if raw.status == 0:
        connection.drop()
        return
    connection.begin(raw.status, raw.headers)
    for chunk in raw.chunk_bytes():
        yield NOW  # the next iteration of the loop makes a separate write to the socket
        connection.send_chunk(chunk)
    yield NOW
    match raw.close:
        case "clean":
            connection.end()
        case "reset":
            yield from connection.reset()
        case "stall":
            yield NEVER
