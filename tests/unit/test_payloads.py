"""An event's head is read cheaply where a worker wrote it, and rightly whoever did."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.client import payloads
from keepstream.client.payloads import RAW, TYPED, Payload
from keepstream.events import RawEvent, parse_event, parse_head
from keepstream.names import EventId
from keepstream_worker.events.publication import Publication
from keepstream_worker.values import Delta
from tests.event_texts import delta, ended, snapshot, started


class Outbox:
    """The publisher's part."""

    prefix = "keepstream"
    epoch = 1
    merge_above = 100

    def mark_dirty(self, publication: Publication) -> None:
        """Nothing is sent."""

    def discard(self, publication: Publication) -> None:
        """Nothing is sent."""


def written_by_a_worker() -> list[bytes]:
    publication = Publication(
        Outbox(), "default", "job-1.a_B", 12, dict, on_fenced=lambda: None, on_cancel=lambda: None
    )
    publication.send("attempt.started", {"model": "m", "provider": "p", "reason": "retry"})
    publication.send_deltas([Delta(0, {"content": '"type":"job.completed","id":"99-1",'})])
    publication.send("snapshot", {"choices": [], "finished": False})
    publication.send("job.completed", {"status": "completed", "attempts": 1, "output_sha256": "0"})
    return publication._next_events()


@pytest.mark.parametrize("data", written_by_a_worker(), ids=["started", "delta", "snapshot", "ended"])
def test_what_a_worker_writes_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    event = parse_event(data)
    monkeypatch.setattr(payloads, "parse_head", None)
    payload = Payload(data)
    assert payload.raw == RawEvent(event.id, event.type, data)
    assert payload.event_id == event.event_id
    assert RAW.of_payload(payload).payload is data


@pytest.mark.parametrize("text", [started("1-1"), delta("2-17", "x"), snapshot("1-3", "y"), ended("3-1", "failed", "")])
def test_an_event_that_is_written_otherwise_is_the_same_event(text: str) -> None:
    event = parse_event(text)
    payload = Payload(text.encode())
    assert payload.event_id == event.event_id
    assert payload.raw == RawEvent(event.id, event.type, text.encode())
    assert payload.event == event
    assert TYPED.of_payload(payload) is TYPED.of_payload(payload), "it is parsed once"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"v":2,"job_id":"j","attempt":1,"type":"delta","id":"1-1","ts":1}',
        '{"v":1,"job_id":"j","attempt":1,"type":"delta","id":"0-1","ts":1}',
        '{"v":1,"job_id":"j","attempt":1,"type":"delta","id":"1-0","ts":1}',
        '{"v":1,"job_id":"j","attempt":1,"id":"1-1","ts":1}',
    ],
)
def test_what_is_no_event_is_an_error_that_does_not_repeat_it(text: str) -> None:
    for read in (lambda: Payload(text.encode()).raw, lambda: Payload(text.encode()).event_id, lambda: parse_head(text)):
        with pytest.raises(ValueError, match="not a Keepstream event") as caught:
            read()
        assert caught.value.__context__ is None


@given(st.integers(1, 999_999_999), st.integers(1, 9_999_999_999), st.from_regex(r"[a-z_.]{1,20}", fullmatch=True))
def test_the_cheap_way_and_the_long_way_read_the_same(attempt: int, n: int, kind: str) -> None:
    head = {"v": 1, "job_id": "j", "attempt": attempt, "type": kind, "id": f"{attempt}-{n}", "ts": 1}
    cheap, long = Payload(json.dumps(head, separators=(",", ":")).encode()), Payload(json.dumps(head).encode())
    assert (cheap.event_id, cheap.raw[:2]) == (long.event_id, long.raw[:2])
    assert cheap.event_id == EventId(attempt, n)


def test_an_event_from_the_row_is_written_as_it_can_be_read() -> None:
    event = parse_event(ended("1-2", "completed", "x"))
    raw = RAW.of_event(event)
    assert (raw.id, raw.type) == ("1-2", "job.completed")
    assert parse_event(raw.payload) == event
