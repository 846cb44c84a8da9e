"""Stored jobs on consoles of usual widths: what matters is whole, and ends up on a line."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from keepstream.client.waiting import closed_reason
from keepstream.errors import ErrorInfo
from keepstream.results import AttemptResult, CompletionResult, JobStatus, JobSummary, Target, Usage, UsageSource
from keepstream_worker.commands.tables import show_list, show_result

AT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
LATER = AT.timestamp() + 5
MODEL = "gpt-6-large-2026-06-01"
OWN = f"openai/{MODEL}"
REASONS: dict[str, dict[str, Any]] = {
    "200 of 200 streams": {OWN: {"why": "concurrency", "running": 200, "most": 200}},
    "cool-down until 12:00:05 UTC": {OWN: {"why": "cooling", "until": LATER}},
    "broken; next try at 12:00:05 UTC": {OWN: {"why": "broken", "until": LATER}},
    "broken; one job is trying it": {OWN: {"why": "probing", "until": None}},
    "tokens per minute; next at 12:00:05 UTC": {OWN: {"why": "tokens_per_minute", "until": LATER}},
    "provider openai: 200 of 200 streams": {"openai": {"why": "concurrency", "running": 200, "most": 200}},
    "tenant default: 3 of 3 at once": {"tenant:default": {"why": "tenant", "running": 3, "most": 3}},
    "other/a-model: cool-down until 12:00:05 UTC": {
        OWN: {"why": "broken", "until": LATER + 1},
        "other/a-model": {"why": "cooling", "until": LATER},
    },
}


def rendered(show: Any, what: Any, width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        show(console, what)
    return [line.rstrip() for line in captured.get().splitlines()]


def waiting(closed: Mapping[str, Any]) -> JobSummary:
    reason = closed_reason(closed, "default", [("openai", MODEL), ("other", "a-model")], AT)
    assert reason is not None
    return JobSummary(
        id="3f2a9c7e3f2a9c7e3f2a9c7e3f2a9c7e",
        tenant="default",
        status=JobStatus.QUEUED,
        model=MODEL,
        provider="openai",
        prompt_start="Why is the sky blue? " * 7,
        waiting_for=reason,
        created_at=AT,
        attempt=0,
    )


@pytest.mark.parametrize("words", REASONS)
def test_what_a_job_waits_for_is_a_whole_line_of_a_listing(words: str) -> None:
    lines = rendered(show_list, [waiting(REASONS[words])], 80)
    assert f"  waits for {words}" in lines
    assert lines[-1].startswith("  Why is the sky blue?")  # and the prompt has its own
    assert lines[-1].endswith("…")


@pytest.mark.parametrize("words", REASONS)
def test_on_a_wide_console_the_reason_is_broken_between_words_rather_than_cut(words: str) -> None:
    lines = rendered(show_list, [waiting(REASONS[words])], 120)
    column = lines[0].index("waits for, error")
    assert f"waits for {words} Why is" in " ".join(" ".join(line[column:] for line in lines[1:]).split())
    assert max(map(len, lines)) <= 120


def test_each_attempt_says_whom_it_asked_and_what_went_wrong() -> None:
    refused = AttemptResult(
        number=1,
        reason="first",
        outcome="failed",
        provider="openai",
        model=MODEL,
        started_at=AT,
        finished_at=AT,
        error=ErrorInfo(code="not_found", message="the provider does not know this model"),
    )
    usage = Usage(total_tokens=123_456, source=UsageSource.ESTIMATED)
    answered = refused.model_copy(
        update={"number": 2, "reason": "fallback", "outcome": "finished", "provider": "other", "model": "a/b"}
        | {"error": None, "usage": usage, "first_token_ms": 12_345.0}
    )
    result = CompletionResult(
        id="job-1",
        tenant="default",
        status=JobStatus.COMPLETED,
        model=MODEL,
        provider="openai",
        fallbacks=[Target(provider="other", model="a/b")],
        job_class="bulk",
        created_at=AT,
        attempt=2,
        attempts=[refused, answered],
    )
    lines = rendered(show_result, result, 80)
    assert "fallbacks  other/a/b" in lines
    assert "class      bulk" in lines
    asked = [" ".join(line.split()) for line in lines if line.startswith(("1 ", "2 "))]
    assert asked[0].startswith("1 first failed openai/gpt-6")
    assert asked[1] == "2 fallback finished other/a/b 12345 ms 0.00 s 123456 estimated"
    assert "attempt 1: not_found: the provider does not know this model" in lines
