"""CPU to read one delta of a provider's answer, in both dialects, without any server.

In: a ``Bench``.
Out: samples ``reading``, one for each dialect and way of arriving.

This is the part of the CPU per delta in which the dialects differ. It is short, so the least of many runs counts: the
others were disturbed.
"""

import json
import time
from typing import Any, Final

from benchmarks.bench import Bench, Sample
from keepstream_worker.providers.stream import StreamReader

_DELTAS: Final = 2000
_RUNS: Final = 60  #: Of each repetition.
_READ_BYTES: Final = 16 * 1024  #: What arrives at once when the provider is faster than the reader.
_TEXT: Final = " token"


def reading(bench: Bench) -> None:
    """Measure CPU per delta of the stream reader."""
    streams = {"chat": _chunks(), "responses": _events()}
    for repetition in range(bench.repeat):
        for dialect, events in streams.items():
            body = b"".join(events)
            together = [body[place : place + _READ_BYTES] for place in range(0, len(body), _READ_BYTES)]
            for arriving, pieces in (("one by one", events), ("together", together)):
                seconds = min(_seconds(pieces, responses=dialect == "responses") for _ in range(_RUNS))
                metrics = {"cpu_us_per_delta": seconds / _DELTAS * 1e6}
                bench.record(Sample("reading", dialect, metrics, {"arriving": arriving}, repetition))


def _seconds(pieces: list[bytes], *, responses: bool) -> float:
    reader = StreamReader(responses=responses)
    begin = time.thread_time()
    for piece in pieces:
        reader.feed(piece)
    taken = time.thread_time() - begin
    assert reader.finish() is None
    assert reader.output().choices[0].content == _TEXT * _DELTAS
    return taken


def _chunks() -> list[bytes]:
    """Return the events of a chat completion."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        head = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1767225600, "model": "m-1"}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice], "usage": None})

    return [chunk({"content": _TEXT})] * _DELTAS + [chunk({}, "stop"), b"data: [DONE]\n\n"]


def _events() -> list[bytes]:
    """Return the events of a response."""
    item_id = "msg_0123456789abcdef"
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": _TEXT * _DELTAS, "annotations": []}
    item = {"type": "message", "id": item_id, "status": "completed", "role": "assistant", "content": [part]}
    values: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}},
        {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}},
        *[{"type": "response.output_text.delta", **place, "delta": _TEXT, "logprobs": []}] * _DELTAS,
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": [item]}},
    ]
    return [
        b"event: %b\n" % value["type"].encode() + _event(value | {"sequence_number": number})
        for number, value in enumerate(values)
    ]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(value, separators=(",", ":")).encode()
