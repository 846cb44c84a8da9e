"""Events are parsed leniently, and a stored job gives the same terminal event as its worker did."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from keepstream import names
from keepstream.errors import ErrorInfo
from keepstream.events import (
    KNOWN_EVENTS,
    TERMINAL_TYPES,
    ChoiceSnapshot,
    DeltaEvent,
    JobCancelled,
    JobCompleted,
    UnknownEvent,
    is_terminal,
    parse_event,
    snapshot_event,
    terminal_event,
)
from keepstream.extras import LIVE_BYTES
from keepstream.names import EventId, parse_event_id
from keepstream.results import AttemptResult, Choice, CompletionResult, JobStatus, ToolCall, Usage, output_sha256

HEAD = {"v": 1, "id": "2-17", "job_id": "j", "attempt": 2, "ts": 1}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def result(**fields: Any) -> CompletionResult:
    attempt = AttemptResult(number=1, reason="first", outcome="finished", provider="p", model="m", started_at=NOON)
    values: dict[str, Any] = {
        "id": "j",
        "tenant": "t",
        "status": JobStatus.COMPLETED,
        "model": "m",
        "provider": "p",
        "created_at": NOON,
        "finished_at": NOON,
        "attempt": 1,
        "choices": [
            Choice(
                index=0,
                content="Grüß ",
                finish_reason="tool_calls",
                tool_calls=[ToolCall(id="c1", name="f", arguments="{}", arguments_valid=True)],
            ),
            Choice(index=1, content="Gott", finish_reason="stop"),
        ],
        "usage": Usage(total_tokens=7),
        "output_sha256": output_sha256(["Grüß ", "Gott"]),
        "terminal_event_id": "1-9",
        "attempts": [attempt],
    }
    return CompletionResult(**values | fields)


def test_an_event_is_typed_by_its_type() -> None:
    event = parse_event(json.dumps({**HEAD, "type": "delta", "choice": 0, "delta": {"content": "x"}}))
    assert isinstance(event, DeltaEvent)
    assert event.event_id == EventId(2, 17)
    assert event.delta.content == "x"


def test_unknown_fields_are_ignored() -> None:
    event = parse_event(json.dumps({**HEAD, "type": "delta", "choice": 0, "new": 1, "delta": {"new": 1}}))
    assert isinstance(event, DeltaEvent)


def test_an_unknown_type_is_kept_as_it_came() -> None:
    event = parse_event(json.dumps({**HEAD, "type": "job.paused", "until": 5}))
    assert isinstance(event, UnknownEvent)
    assert event.model_extra == {"until": 5}
    assert not is_terminal(event)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "{}",
        b"\xff",
        json.dumps({**HEAD, "v": 2, "type": "delta", "choice": 0, "delta": {}}),
        json.dumps({**HEAD, "id": "0-1", "type": "delta", "choice": 0, "delta": {}}),
        json.dumps({**HEAD, "type": "delta"}),
        json.dumps({**HEAD, "type": ["delta"]}),
        "[" * 100_000,
    ],
)
def test_what_is_no_event_is_refused_without_being_repeated(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a Keepstream event of version 1$") as caught:
        parse_event(text)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "text", ["2", "2-", "-1", "0-1", "1-0", "01-1", "1-01", "1-1\n", " 1-1", "1-1-1", "x", "1-٣", ""]
)
def test_what_is_no_event_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="event ids look like 2-17"):
        parse_event_id(text)


def test_event_ids_are_ordered_as_pairs_of_numbers() -> None:
    assert parse_event_id("2-9") < parse_event_id("2-10") < parse_event_id("10-1")
    assert str(parse_event_id("2-10")) == "2-10"


def test_exactly_the_four_endings_are_terminal() -> None:
    assert {kind for kind in KNOWN_EVENTS if kind.startswith("job.")} == TERMINAL_TYPES
    assert {f"job.{status}" for status in JobStatus if status.terminal} == TERMINAL_TYPES


def test_a_stored_job_gives_its_terminal_event() -> None:
    event = terminal_event(result())
    assert isinstance(event, JobCompleted)
    assert (event.id, event.attempt, event.job_id, event.attempts) == ("1-9", 1, "j", 1)
    assert event.finish_reasons == {0: "tool_calls", 1: "stop"}
    assert event.tool_call_ids == ["c1"]
    assert event.usage == Usage(total_tokens=7)
    assert event.ts == int(NOON.timestamp() * 1000)
    assert event.output_sha256 == output_sha256(["Grüß Gott"])
    assert parse_event(event.model_dump_json()) == event


def test_a_job_cancelled_from_outside_ends_under_the_attempt_of_its_event() -> None:
    error = ErrorInfo(code="cancelled", message="the job was cancelled")
    event = terminal_event(
        result(status=JobStatus.CANCELLED, attempt=3, terminal_event_id="3-1", choices=[], error=error, attempts=[])
    )
    assert isinstance(event, JobCancelled)
    assert (event.attempt, event.attempts, event.error) == (3, 0, error)


@pytest.mark.parametrize("status", [status for status in JobStatus if not status.terminal])
def test_a_job_that_goes_on_has_no_terminal_event(status: JobStatus) -> None:
    with pytest.raises(ValueError, match=status):
        terminal_event(result(status=status, terminal_event_id=None))


def test_a_stored_job_gives_a_snapshot_of_its_output() -> None:
    event = snapshot_event(result(), "1-8")
    assert [choice.content for choice in event.choices] == ["Grüß ", "Gott"]
    assert event.choices[0].tool_calls == result().choices[0].tool_calls
    assert event.finished
    assert parse_event(event.model_dump_json()) == event


def test_a_snapshot_holds_all_of_a_choice_but_what_is_too_large() -> None:
    fields: dict[str, Any] = {
        "index": 1,
        "content": "c",
        "reasoning": "r",
        "refusal": "no",
        "finish_reason": "stop",
        "tool_calls": [ToolCall(id="t", name="f", arguments="{", arguments_valid=False, extra={"signature": "s"})],
    }
    image = {"type": "image_url", "image_url": {"url": "x" * LIVE_BYTES}}
    snapshot = ChoiceSnapshot.of(Choice(**fields, extra={"annotations": [1], "images": [image, 2]}))
    omitted = {"omitted": "image", "bytes": len(json.dumps(image, separators=(",", ":")))}
    fields["extra"] = {"annotations": [1], "images": [omitted, 2]}
    assert dict(snapshot) == fields
    assert dict(snapshot.to_choice()) == fields
    assert Choice.model_fields.keys() == fields.keys()  # a new field is to be added here


def test_a_jobs_redis_names_share_one_cluster_slot_and_name_the_tenant() -> None:
    assert names.job_keys("acme", "j1", "p") == (
        "p:acme:{j1}:events",
        "p:acme:{j1}:log",
        "p:acme:{j1}:cancel",
    )
