"""The event decoder: bytes in, events out, however the bytes were split."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream_worker.providers.sse import ERROR_FIELD, ServerSentEvent, SSEDecoder


def decode(*pieces: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)] + decoder.finish()


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\n", [(b"a", "")]),
        (b"data:a\n\n", [(b"a", "")]),
        (b"data:  a \n\n", [(b" a ", "")]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"a", ""), (b"b", "")]),
        (b"data: a\r\rdata: b\r\r", [(b"a", ""), (b"b", "")]),
        (b"data: a\n\rdata: b\r\n\n", [(b"a", ""), (b"b", "")]),
        (b"data: a\r\n\ndata: b\n\n", [(b"a", ""), (b"b", "")]),
        (b"data: a\ndata: b\n\n", [(b"a\nb", "")]),
        (b"data: a\ndata\ndata:\n\n", [(b"a\n\n", "")]),
        (b"\n\n\n\ndata: a\n\n\n\n\ndata: b\n\n", [(b"a", ""), (b"b", "")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"a", "")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [(b"b", "")]),
        (b": a comment\n\n:\n\ndata: a\n\n", [(b"a", "")]),
        (b": a comment\ndata: a\n: another\n\n", [(b"a", "")]),
        (b"event: ping\n\ndata: a\n\n", [(b"a", "")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [(b"a", "error"), (b"b", "")]),
        (b"data: a\nevent: late\n\n", [(b"a", "late")]),
        (b"event: caf\xe9\ndata: a\n\n", [(b"a", "caf\ufffd")]),
        (b"id: 1\n\nretry: 10\n\ndata: a\n\n", [(b"a", "")]),
        (b"data\n\ndata:\n\ndata: \n\n", []),
        (b"colour: red\nDATA: a\n data: b\n\n", []),
        (b"data: a\n\ndata: b", [(b"a", ""), (b"b", "")]),
        (b"data: a\n", [(b"a", "")]),
        (b"data: a\r", [(b"a", "")]),
        (b"data: \xe2\x80\xa8\xc2\x85\x0b\x0c\x1c\n\n", [(b"\xe2\x80\xa8\xc2\x85\x0b\x0c\x1c", "")]),
        (b"", []),
        (b"\xef\xbb", []),
    ],
)
def test_events_are_read_by_the_rules_at_every_cut(body: bytes, events: list[ServerSentEvent]):
    assert decode(body) == events
    assert decode(*(body[i : i + 1] for i in range(len(body)))) == events
    for cut in range(len(body)):
        assert decode(body[:cut], body[cut:]) == events


LINES = st.sampled_from(
    [
        b"data: x",
        b"data:y",
        b"data",
        b"",
        b"",
        b":",
        b": c",
        b"event: e",
        b"id: 1",
        b"error: e",
        b"junk",
        b"\xff",
        b"a\0",
    ]
)
BODIES = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=30)


@given(lines=BODIES, seed=st.integers(0, 2**32))
def test_cuts_change_nothing(lines: list[tuple[bytes, bytes]], seed: int):
    body = b"".join(line + end for line, end in lines)
    cuts = random.Random(seed)
    pieces = []
    rest = body
    while rest:
        size = cuts.randint(1, 9)
        pieces.append(rest[:size])
        rest = rest[size:]
    assert decode(*pieces) == decode(body)


@given(st.binary(max_size=200))
def test_any_bytes_can_be_read(body: bytes):
    assert all(data for data, _ in decode(body))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_event_above_the_limit_ends_the_decoding_after_the_events_before_it(step: int):
    body = b"data: a\n\n" + b"data: " + b"x" * 95 + b"\n\n" + b"data: b\n\n"
    decoder = SSEDecoder(max_event_bytes=100)
    events = [event for i in range(0, len(body), step) for event in decoder.feed(body[i : i + step])]
    assert events + decoder.finish() == [(b"a", "")]
    assert decoder.oversized


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\n", b""])
def test_an_event_of_just_the_limit_is_read(step: int, end: bytes):
    body = b"data: " + b"x" * 94 + end
    decoder = SSEDecoder(max_event_bytes=100)
    events = [event for i in range(0, len(body), step) for event in decoder.feed(body[i : i + step])]
    assert events + decoder.finish() == [(b"x" * 94, "")]
    assert not decoder.oversized


def test_an_error_field_is_told_apart_from_an_event():
    decoder = SSEDecoder()
    assert decoder.feed(b'error: {"code":500}\n\nerror: x\ndata: a\n\n') == [(b'{"code":500}', ERROR_FIELD), (b"a", "")]
    assert not decoder.has_unknown_fields


def test_lines_that_belong_to_no_event_stream_are_noticed():
    decoder = SSEDecoder()
    assert decoder.feed(b"Service unavailable\n") + decoder.finish() == []
    assert decoder.has_unknown_fields


def test_a_large_event_in_small_pieces_takes_time_in_proportion():
    def seconds(size: int) -> float:
        decoder = SSEDecoder()
        start = time.process_time()
        for _ in range(size):
            decoder.feed(b"x" * 16)
        return time.process_time() - start

    base = min(seconds(4_000) for _ in range(3))
    assert min(seconds(64_000) for _ in range(3)) < 100 * base  # 16 times the bytes; the square would be 256
