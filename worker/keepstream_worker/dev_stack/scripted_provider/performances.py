"""The performances: what a client sees of a script, in the order in which it sees it.

In: a script, this attempt's fault and the encoded reply, from ``server``.  Out: writes, waits and
breaks on the ``Connection``.  Exists so that the course of a stream, faults included, can be read in
one place from top to bottom.
"""

import time
from http import HTTPStatus
from typing import Any, Final

from keepstream_worker.dev_stack.scripted_provider.connection import NEVER, NOW, Connection, Performance, send_json
from keepstream_worker.dev_stack.scripted_provider.replies import Reply, error_body, sse_event
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

BATCH: Final = 256  #: Deltas written at once when unpaced: about what the transport buffers before it pauses us.
COMMENT_EVERY: Final = 0.05  #: Seconds between two SSE comments.

_STREAM_HEADERS: Final = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_GARBAGE: Final = b'data: {"id":"chatcmpl-garbage","choices":[{"del\xff\xfe\n\n'


def play(connection: Connection, script: Script, fault: Fault | None, answer: Performance) -> Performance:
    """Play ``answer``, or what the script puts in its place."""
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


def complete(connection: Connection, script: Script, completion: dict[str, Any]) -> Performance:
    """Send a completion that does not stream."""
    if script.first_token_delay:
        yield connection.later(script.first_token_delay)
    yield from send_json(connection, HTTPStatus.OK, completion)


def stream(connection: Connection, script: Script, fault: Fault | None, reply: Reply) -> Performance:
    """Stream a reply, with the fault in it."""
    connection.begin(HTTPStatus.OK, _STREAM_HEADERS)
    if isinstance(fault, SlowFault):
        script = script.model_copy(update={"rate": fault.rate})
    if script.first_token_delay:
        yield connection.later(script.first_token_delay)

    sent = 0
    if isinstance(fault, MidwayFault | ErrorEventFault | CommentsFault):
        sent = min(fault.after, len(reply.deltas))
        yield from _send_deltas(connection, script, reply, 0, sent)
        if not isinstance(fault, CommentsFault):
            yield from _break_off(connection, fault)
            return
        yield from _send_comments(connection, fault.seconds)
    yield from _send_deltas(connection, script, reply, sent, len(reply.deltas))

    connection.send(reply.finish)
    if isinstance(fault, EndFault) and fault.kind == "cut_after_finish":
        yield from connection.reset()
        return
    if not isinstance(fault, EndFault):
        connection.send(reply.usage)
    connection.send(reply.done)
    connection.end()


def _send_deltas(connection: Connection, script: Script, reply: Reply, start: int, stop: int) -> Performance:
    writes = reply.writes(start, stop, script.chunk_size)
    # Unpaced, many chunks go out in one write and then the loop has its turn; paced, one at a time.
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
        due += interval  # Counted from the first delta, so that late wake-ups do not add up.
        yield due


def _send_comments(connection: Connection, seconds: float) -> Performance:
    until = connection.later(seconds)
    while (due := connection.later(COMMENT_EVERY)) < until:
        connection.send_chunk(b": keep-alive\n\n")
        yield due
    yield until


def _break_off(connection: Connection, fault: MidwayFault | ErrorEventFault) -> Performance:
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


def _play_raw(connection: Connection, raw: RawResponse) -> Performance:
    if raw.status == 0:
        connection.drop()
        return
    connection.begin(raw.status, raw.headers)
    for chunk in raw.chunk_bytes():
        yield NOW  # In another round of the loop it is another write to the socket.
        connection.send_chunk(chunk)
    yield NOW
    match raw.close:
        case "clean":
            connection.end()
        case "reset":
            yield from connection.reset()
        case "stall":
            yield NEVER
