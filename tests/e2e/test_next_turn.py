"""Two turns of a tool loop against strict providers: what they want back is there, by the client and by SQL alone."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from keepstream.extras import merged_extra
from keepstream.results import JobStatus
from tests.cluster import BRIEF, Cluster
from tests.strict_provider import ANSWER, QUESTION, RESPONSES, STYLES, WANTED, StrictProvider

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "tool_call_id": "call_7", "content": "Rain."}


@pytest.fixture(scope="module")
def strict() -> Iterator[StrictProvider]:
    with StrictProvider() as provider:
        yield provider


@pytest.fixture
def loop_cluster(any_cluster: Cluster, strict: StrictProvider, tmp_path: Path) -> Cluster:
    """A cluster with a worker that knows the strict providers."""
    file = tmp_path / "providers.toml"
    file.write_text(strict.providers_toml())
    any_cluster.start_worker(providers_file=file)
    return any_cluster


def ask(cluster: Cluster, style: str, *turns: dict[str, Any]) -> str:
    request = {"model": "m-1", "messages": [QUESTION, *turns], "tools": [TOOL]}
    return cluster.client.enqueue(request, provider=style)


def message_by_sql(cluster: Cluster, job_id: str) -> dict[str, Any]:
    """Make the message of the next turn as the README's table says, from columns alone."""

    def value(stored: Any) -> Any:
        return json.loads(stored) if isinstance(stored, str) else stored  # SQLite gives JSON as text

    with cluster.database() as connection:
        of_job = {"job_id": job_id}
        choice = connection.execute(
            text("SELECT content, reasoning, refusal, extra FROM keepstream_choices WHERE job_id = :job_id"), of_job
        ).one()
        calls = connection.execute(
            text(
                "SELECT call_id, type, name, arguments, extra FROM keepstream_tool_calls WHERE job_id = :job_id"
                " ORDER BY position"
            ),
            of_job,
        ).all()
        provider = connection.scalar(text("SELECT provider FROM keepstream_jobs WHERE id = :job_id"), of_job)
    extra = value(choice.extra) or {}
    message: dict[str, Any] = {"role": "assistant", "content": choice.content or None}
    message |= dict.fromkeys(extra.get("reasoning_fields", ()), choice.reasoning)
    names = ("reasoning_details", "thinking_blocks", "extra_content", "provider_specific_fields")
    message |= {name: extra[name] for name in names if name in extra}
    if "responses_output" in extra:
        message["responses_output"] = {"provider": provider, "items": extra["responses_output"]}
    message["tool_calls"] = [
        {
            "id": call.call_id,
            "type": call.type,
            "function": {"name": call.name, "arguments": call.arguments},
            **(value(call.extra) or {}),
        }
        for call in calls
    ]
    return message


@pytest.mark.parametrize("style", STYLES)
def test_a_tool_loop_goes_on_with_all_that_the_provider_wants_back(
    loop_cluster: Cluster, strict: StrictProvider, style: str
) -> None:
    cluster = loop_cluster
    first = ask(cluster, style)
    transcript = cluster.follow(first).to_the_end()
    result = cluster.result(first)
    assert result.status is JobStatus.COMPLETED
    (choice,) = result.choices
    assert transcript.choices[0].to_choice() == choice, "followers hold what the row holds, extras as well"
    assert result.provider_details is not None
    assert transcript.provider_details == result.provider_details
    message = result.assistant_message()
    if style != RESPONSES:
        assert message == WANTED[style]
    assert message_by_sql(cluster, first) == message

    strict.refused.clear()
    second = cluster.wait_for(ask(cluster, style, message, RESULT))
    assert strict.refused == []
    assert (second.status, second.text) == (JobStatus.COMPLETED, ANSWER)


def without_each_part(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the message without each of the things that not every provider wants back, and with each one altered."""
    for name in message.keys() - {"role", "content", "tool_calls"}:
        yield {field: value for field, value in message.items() if field != name}
        altered = deepcopy(message)
        match altered[name]:
            case str(words):
                altered[name] = words + "!"
            case [*_, dict(last)]:
                last["signature"] = last["data"] = "altered"
            case {"items": [*items]}:
                items[0]["encrypted_content"] = "altered"
        yield altered
    (call,) = message["tool_calls"]
    for name in call.keys() - {"id", "type", "function"}:
        yield message | {"tool_calls": [{field: value for field, value in call.items() if field != name}]}
        altered = merged_extra(call, {name: {"google": {"thought_signature": "altered"}}})
        yield message | {"tool_calls": [altered]}


@pytest.mark.parametrize("style", [style for style in STYLES if style != "plain"])
def test_the_strict_providers_are_strict(loop_cluster: Cluster, strict: StrictProvider, style: str) -> None:
    """The test above proves something only if a second turn without any of this is refused."""
    cluster = loop_cluster
    message = cluster.wait_for(ask(cluster, style)).assistant_message()
    strict.refused.clear()
    refused = [ask(cluster, style, spoilt, RESULT) for spoilt in without_each_part(message)]
    assert refused
    for job_id in refused:
        result = cluster.wait_for(job_id)
        assert (result.status, result.attempts[-1].http_status) == (JobStatus.FAILED, 400)
    assert len(strict.refused) == len(refused)


@pytest.mark.parametrize("style", ["openrouter", "gemini", "claude", RESPONSES])
def test_an_answer_that_was_rebuilt_from_the_log_can_be_gone_on_from(
    postgres_cluster: Cluster, strict: StrictProvider, tmp_path: Path, style: str
) -> None:
    cluster = postgres_cluster
    file = tmp_path / "providers.toml"
    file.write_text(strict.providers_toml())
    worker = cluster.start_worker(providers_file=file, lease=BRIEF)
    with cluster.database() as connection:  # the ending waits for this lock, the claim does not
        connection.execute(text("LOCK TABLE keepstream_choices IN SHARE MODE"))
        job_id = ask(cluster, style)
        following = cluster.follow(job_id)
        following.wait_for("attempt.finished")
        worker.kill()
    cluster.start_worker(providers_file=file, lease=BRIEF)
    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert [attempt.outcome for attempt in result.attempts] == ["lost", "recovered"]
    assert transcript.choices[0].to_choice() == result.choices[0]
    assert result.provider_details is not None
    assert result.provider_details["model" if style != RESPONSES else "id"] == (
        "m-1-real" if style != RESPONSES else "resp_1"
    )
    second = cluster.wait_for(ask(cluster, style, result.assistant_message(), RESULT))
    assert (second.status, second.text) == (JobStatus.COMPLETED, ANSWER)
