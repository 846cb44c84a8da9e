import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from keepstream.errors import ErrorInfo
from keepstream.events import AttemptStarted, ChoiceSnapshot, JobCompleted, JobFailed
from keepstream.results import (
    AttemptResult,
    Choice,
    CompletionResult,
    JobStatus,
    ToolCall,
    Usage,
    UsageSource,
    output_sha256,
)
from keepstream.transcript import Transcript
from tests.conformance.runner import CASES, CasesError, Seen, compare, load_cases, main

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALL = ToolCall(id="c1", name="f", arguments="{}", arguments_valid=True)
USAGE = Usage(prompt_tokens=3, completion_tokens=2, source=UsageSource.PROVIDER, details={"nested": {"a": 1, "b": 2}})


def seen(*, code: str | None = None, retryable: bool | None = None, content: str = "Hi", streamed: str = "Hi") -> Seen:
    status = JobStatus.FAILED if code else JobStatus.COMPLETED
    error = ErrorInfo(code=code, message="m") if code else None
    attempt = AttemptResult(
        number=1, reason="first", outcome="o", provider="p", model="m", started_at=NOW, error=error, retryable=retryable
    )
    result = CompletionResult(
        id="j",
        tenant="t",
        status=status,
        model="m",
        provider="p",
        created_at=NOW,
        attempt=1,
        choices=[Choice(index=0, content=content, finish_reason="stop", tool_calls=[CALL])],
        usage=USAGE,
        error=error,
        terminal_event_id="1-2",
        attempts=[attempt],
    )
    common: dict[str, Any] = {"id": "1-2", "job_id": "j", "attempt": 1, "ts": 0, "attempts": 1, "status": status}
    digest = output_sha256([content])
    transcript = Transcript()
    transcript.apply(AttemptStarted(id="1-1", job_id="j", attempt=1, ts=0, model="m", provider="p", reason="first"))
    terminal = JobFailed if code else JobCompleted
    transcript.apply(terminal(**common, output_sha256=digest))
    return Seen(result, transcript, [ChoiceSnapshot(index=0, content=streamed, tool_calls=[CALL])])


@pytest.mark.parametrize(
    "expect",
    [
        {"outcome": "completed", "content": "Hi", "finish_reason": "stop", "refusal": ""},
        {"outcome": "completed", "tool_calls": [{"index": 0, "id": "c1", "name": "f", "arguments": "{}"}]},
        {"outcome": "completed", "tool_calls": [{"name": "f"}]},
        {"outcome": "completed", "usage": {"prompt_tokens": 3, "total_tokens": None, "nested": {"a": 1}}},
    ],
)
def test_what_is_as_expected_makes_no_difference(expect: dict[str, Any]) -> None:
    assert compare(expect, seen()) == []


@pytest.mark.parametrize(
    ("expect", "difference"),
    [
        ({"outcome": "retry"}, "outcome: expected 'retry', got 'completed'"),
        ({"content": "Ho"}, "content: expected 'Ho', got 'Hi'"),
        ({"finish_reason": None}, "finish_reason: expected None, got 'stop'"),
        ({"tool_calls": []}, "number of tool calls: expected 0, got 1"),
        ({"tool_calls": [{"id": "c2"}]}, "tool_calls[0].id: expected 'c2', got 'c1'"),
        ({"contents": "Hi"}, "expect.contents: the runner knows no such thing"),
    ],
)
def test_each_difference_is_told_with_expected_and_got(expect: dict[str, Any], difference: str) -> None:
    assert compare({"outcome": "completed", **expect}, seen()) == [difference]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 4}, {"nested": {"a": 2}}, {"absent": 1}])
def test_usage_is_compared_as_a_subset(usage: dict[str, Any] | None) -> None:
    (difference,) = compare({"outcome": "completed", "usage": usage}, seen())
    assert difference.startswith("usage: expected ")


@pytest.mark.parametrize(("retryable", "outcome"), [(True, "retry"), (False, "fail")])
def test_a_failures_outcome_is_its_retry_decision(*, retryable: bool, outcome: str) -> None:
    assert compare({"outcome": outcome, "error_code": "auth"}, seen(code="auth", retryable=retryable)) == []


def test_events_that_tell_another_story_than_the_row_are_a_difference() -> None:
    (difference,) = compare({"outcome": "completed"}, seen(streamed="H"))
    assert difference.startswith("events: output: expected ")


def test_the_cases_that_come_with_the_project_are_readable() -> None:
    cases = [case for file in CASES for case in load_cases(file)]
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no cases"),
        ('{"name": "a", "chunks": []', ":1: not a JSON object"),
        ("\n[]", ":2: a case is a JSON object with a 'name'"),
        (json.dumps({"name": "a", "chunks": [], "expect": {"outcome": "done"}}), ":1: 'expect' needs an 'outcome'"),
        (json.dumps({"name": "a", "expect": {"outcome": "fail"}}), ":1: 'chunks' must be a list of writes"),
    ],
)
def test_a_file_that_holds_no_cases_is_refused_with_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(text)
    with pytest.raises(CasesError, match=r"cases\.jsonl"):
        load_cases(file)
    assert main([str(file)]) == 2
    assert message in capsys.readouterr().err
