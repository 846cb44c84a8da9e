"""The events that close an attempt, by how it ended: after them followers hold what the row holds."""

import pytest

from keepstream.errors import ErrorCode
from keepstream.results import Choice, JobStatus, ToolCall, Usage, output_sha256
from keepstream_worker.events.closing_events import closing_events, terminal_fields
from keepstream_worker.values import Ended, Ending, Failure, JobKey, Outcome

FAILURE = Failure(code=ErrorCode.SERVER_ERROR, message="m")
CHOICES = [
    Choice(
        index=0,
        content="text",
        finish_reason="tool_calls",
        tool_calls=[ToolCall(id="call-1", name="look", arguments="{}", arguments_valid=True)],
    )
]


def end(status: JobStatus, *, failure: Failure | None = None, choices: list[Choice] | None = None) -> Ending:
    return Ending(
        key=JobKey("tenant-1", "job-1"),
        attempt=1,
        worker_id="worker-1",
        outcome=Outcome.FAILED if failure else Outcome.FINISHED,
        status=status,
        failure=failure,
        choices=CHOICES if choices is None else choices,
        retryable=True,
        retry_in=1.5,
    )


@pytest.mark.parametrize(
    ("status", "announced", "has_output", "types"),
    [
        # Followers have the output already.
        (JobStatus.COMPLETED, True, True, []),
        (JobStatus.CANCELLED, True, True, []),
        # They drop it with the attempt, and the row keeps it.
        (JobStatus.FAILED, True, True, ["attempt.failed", "snapshot"]),
        (JobStatus.FAILED, True, False, ["attempt.failed"]),
        # They have heard nothing of this attempt.
        (JobStatus.FAILED, False, True, ["snapshot"]),
        (JobStatus.FAILED, False, False, []),
        (JobStatus.COMPLETED, False, True, ["snapshot"]),
        (JobStatus.EXPIRED, False, False, []),
        # Another attempt follows.
        (JobStatus.RETRYING, True, True, ["attempt.failed"]),
        (JobStatus.RETRYING, True, False, ["attempt.failed"]),
    ],
)
def test_followers_hold_what_the_row_holds(
    status: JobStatus, *, announced: bool, has_output: bool, types: list[str]
) -> None:
    failure = FAILURE if status in (JobStatus.FAILED, JobStatus.RETRYING) else None
    ending = end(status, failure=failure, choices=CHOICES if has_output else [])
    assert [type_ for type_, _ in closing_events(ending, announced=announced)] == types


@pytest.mark.parametrize(("status", "retry_in"), [(JobStatus.RETRYING, 1.5), (JobStatus.FAILED, None)])
def test_failed_attempt_says_when_the_next_one_begins(status: JobStatus, retry_in: float | None) -> None:
    (_, fields), *_ = closing_events(end(status, failure=FAILURE), announced=True)
    assert fields == {
        "error": {"code": "server_error", "message": "m"},
        "retryable": True,
        "retry_in": retry_in,
        "usage": Usage().model_dump(mode="json"),
    }


def test_terminal_event_agrees_with_the_row() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    fields = terminal_fields(end(JobStatus.CANCELLED, failure=FAILURE), Ended(usage, attempts=2))
    assert fields == {
        "status": "cancelled",
        "finish_reasons": {"0": "tool_calls"},
        "tool_call_ids": ["call-1"],
        "usage": usage.model_dump(mode="json"),
        "attempts": 2,
        "error": {"code": "server_error", "message": "m"},
        "output_sha256": output_sha256(["text"]),
    }


def test_job_whose_attempts_cost_nothing_has_no_usage() -> None:
    fields = terminal_fields(end(JobStatus.EXPIRED, choices=[]), Ended(None, attempts=0))
    assert (fields["usage"], fields["error"], fields["attempts"]) == (None, None, 0)
