"""The live view: what a person reads of a job that failed, and of one whose stream broke."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from keepstream.events import parse_event
from keepstream.results import output_sha256
from keepstream_worker.commands.live_view import LiveView

TEXT = "half an answer"
ERROR = {"code": "connection", "message": "the connection broke"}


def shown(*events: dict[str, Any], output_only: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200)
    view = LiveView(console, output_only=output_only)
    for number, fields in enumerate(events, 1):
        attempt = fields.get("attempt", 1)
        first = next(n for n, other in enumerate(events, 1) if other.get("attempt", 1) == attempt)
        event = {"v": 1, "id": f"{attempt}-{number - first + 1}", "job_id": "j", "ts": 0, "attempt": 1, **fields}
        view.show(parse_event(json.dumps(event)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def started(attempt: int = 1, reason: str = "first") -> dict[str, Any]:
    return {"type": "attempt.started", "attempt": attempt, "model": "m", "provider": "p", "reason": reason}


def delta(content: str, attempt: int = 1) -> dict[str, Any]:
    return {"type": "delta", "attempt": attempt, "choice": 0, "delta": {"content": content}}


def failed(retry_in: float | None) -> dict[str, Any]:
    return {"type": "attempt.failed", "error": ERROR, "retryable": True, "retry_in": retry_in}


def ended(status: str, text: str, attempt: int = 1) -> dict[str, Any]:
    error = None if status == "completed" else ERROR
    sha256 = output_sha256([text])
    fields = {"type": f"job.{status}", "status": status, "attempts": attempt, "error": error, "output_sha256": sha256}
    return {"attempt": attempt, **fields}


def test_the_text_of_a_failed_job_is_shown_once() -> None:
    snapshot = {"type": "snapshot", "choices": [{"index": 0, "content": TEXT}]}
    output = shown(started(), delta(TEXT), failed(None), snapshot, ended("failed", TEXT))
    assert output.count(TEXT) == 1
    assert "void" not in output
    assert output.count("the connection broke") == 1
    assert "sha256 matches" in output


def test_a_failed_job_without_a_text_boasts_of_no_match() -> None:
    assert "sha256" not in shown(started(), failed(None), ended("failed", ""))


@pytest.mark.parametrize("output_only", [False, True])
def test_a_retry_voids_the_text_and_shows_the_next_one(*, output_only: bool) -> None:
    again = started(2, "retry"), delta(TEXT, 2), ended("completed", TEXT, 2)
    output = shown(started(), delta(TEXT), failed(0.5), *again, output_only=output_only)
    assert output.count(TEXT) == 2
    assert "the text above is void; next attempt in 0.5 s" in output
    assert ("attempt 2, m, provider p" in output) is not output_only
    assert ("✓ completed" in output) is not output_only
