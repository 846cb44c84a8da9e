"""The calls in which events go to Redis: bounded in events and bytes; pressure merges texts, and nothing else."""

from typing import Any

import pytest

from keepstream_worker.events.publication import Publication, merge
from keepstream_worker.values import Delta


class Outbox:
    """A publisher that sends nothing by itself."""

    prefix = "keepstream"
    epoch = 1
    merge_above = 1000

    def mark_dirty(self, publication: Publication) -> None:
        """Nothing is sent but by the test."""

    def discard(self, publication: Publication) -> None:
        """Nothing is queued here."""


def publication() -> Publication:
    return Publication(Outbox(), "default", "job-1", 1, dict, on_fenced=lambda: None, on_cancel=lambda: None)


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [([10] * 600, [256, 256, 88]), ([400_000] * 5, [2, 2, 1]), ([3_000_000, 10, 3_000_000], [1, 1, 1]), ([10], [1])],
)
def test_a_call_is_bounded_in_events_and_bytes(sizes: list[int], calls: list[int]) -> None:
    events = publication()
    for size in sizes:
        events.send_deltas([Delta(0, {"extra": {"images": ["x" * size]}})])
    made = []
    while events.has_pending:
        command, covered = events.next_call(1, b"1000")
        assert len(command) < 3_100_000
        events.handle_answer(b"OK", covered, 1)
        made.append(covered)
    assert made == calls


def test_only_texts_are_merged() -> None:
    extra: dict[str, Any] = {"extra": {"audio": {"data": "AA=="}}}
    call: dict[str, Any] = {"tool_calls": [{"index": 0, "arguments": "{"}]}
    deltas = [Delta(0, fields) for fields in ({"content": "a"}, {"content": "b"}, extra, extra, call, call)]
    assert merge(deltas) == [Delta(0, {"content": "ab"}), *deltas[2:]]
