"""Bad input: wrong jobs, messages, keys and provider names give one clear line each, and affect nothing else."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from keepstream.errors import ErrorCode
from keepstream.jobs import parse_job
from keepstream.names import QUEUE, TASK
from keepstream.results import CompletionResult, JobStatus
from keepstream.tables import rejected_messages
from keepstream_worker.dev_stack.embedded import EmbeddedProvider, free_port
from keepstream_worker.dev_stack.scripted_provider.__main__ import ENV_API_KEY
from tests.cluster import PATIENCE, Cluster, WorkerProcess, wait_until

RIGHT_KEY = "sk-right-4b1d0f7c2a"
WRONG_KEY = "sk-wrong-9e8d7c6b5a"
MESSAGES = [{"role": "user", "content": "a prompt that belongs in no log"}]


@pytest.fixture
def strict_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedProvider]:
    """A provider that accepts only one key."""
    monkeypatch.setenv(ENV_API_KEY, RIGHT_KEY)
    with EmbeddedProvider() as provider:
        monkeypatch.delenv(ENV_API_KEY)
        yield provider


@pytest.fixture
def providers_file(strict_provider: EmbeddedProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four named providers: one that works, one with a wrong key, one without its key, one that does not exist."""
    monkeypatch.setenv("RIGHT_KEY", RIGHT_KEY)
    monkeypatch.setenv("WRONG_KEY", WRONG_KEY)
    tables = {
        "good": (strict_provider.base_url, "RIGHT_KEY"),
        "refused": (strict_provider.base_url, "WRONG_KEY"),
        "keyless": (strict_provider.base_url, "NOT_SET_KEY"),
        "gone": (f"http://127.0.0.1:{free_port()}/v1", "RIGHT_KEY"),
    }
    file = tmp_path / "providers.toml"
    file.write_text(
        "\n".join(
            f'[providers.{name}]\nbase_url = "{url}"\napi_key_env = "{variable}"\n'
            for name, (url, variable) in tables.items()
        )
    )
    return file


def messages(cluster: Cluster) -> list[dict[str, Any]]:
    """What is recorded as rejected."""
    with cluster.database() as connection:
        return [dict(row._mapping) for row in connection.execute(select(rejected_messages))]


def wait_for_records(cluster: Cluster, count: int) -> list[dict[str, Any]]:
    """Wait until exactly this many messages are recorded as rejected."""
    wait_until(lambda: len(messages(cluster)) >= count, f"{count} messages to be recorded as rejected")
    check_goes_on(cluster)
    found = messages(cluster)
    assert len(found) == count
    return found


def check_failed(cluster: Cluster, job_id: str, code: ErrorCode, *words: str) -> CompletionResult:
    """Check that a job failed for this reason, without a retry, and that a follower saw the same."""
    following = cluster.follow(job_id)
    following.to_the_end()
    end = following.transcript.terminal
    result = cluster.result(job_id)
    assert end is not None
    assert (end.type, result.status) == ("job.failed", JobStatus.FAILED)
    assert result.error is not None
    assert end.error == result.error
    assert result.error.code == code
    assert [word for word in words if word not in result.error.message] == []
    assert "\n" not in result.error.message
    return result


def check_goes_on(cluster: Cluster) -> None:
    """Check that the worker still works."""
    assert cluster.wait_for(cluster.enqueue(deltas=2)).status is JobStatus.COMPLETED


def check_kept_secret(cluster: Cluster, worker: WorkerProcess, *job_ids: str) -> None:
    """Check that no key or prompt is in the worker's log, in events, or in what is stored besides the request."""
    said = "".join(log.read_text() for log in cluster.directory.glob("worker-*.log"))
    said += "".join(cluster.result(job_id).model_dump_json(exclude={"request"}) for job_id in job_ids)
    said += "".join(event.model_dump_json() for job_id in job_ids for event in cluster.log(job_id))
    assert worker.running
    assert "worker_started" in said
    assert [secret for secret in (RIGHT_KEY, WRONG_KEY, MESSAGES[0]["content"]) if secret in said] == []


# -- providers --


def test_doctor_tries_each_named_provider_and_says_what_is_wrong(cluster: Cluster, providers_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "keepstream_worker.commands", "doctor", "--json"],
        cwd=Path(__file__).parents[2],
        env=cluster.environment(providers_file=providers_file),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    names = ("default", "good", "refused", "keyless", "gone")
    found = {name: (checks[f"provider {name}"]["severity"], checks[f"provider {name}"]["found"]) for name in names}

    assert done.returncode == 1
    assert found["default"] == ("ok", f"{cluster.provider.base_url} answers and lists 1 model")
    assert found["good"][0] == "ok"
    assert [found[name][0] for name in ("refused", "keyless", "gone")] == ["fail"] * 3
    assert "did not accept the key" in found["refused"][1]
    assert "NOT_SET_KEY" in found["keyless"][1]
    assert RIGHT_KEY not in done.stdout + done.stderr
    assert WRONG_KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_jobs_whose_provider_refuses_the_key_or_has_none_fail_at_once(cluster: Cluster, providers_file: Path) -> None:
    worker = cluster.start_worker(providers_file=providers_file)
    refused = cluster.client.enqueue(model="m", messages=MESSAGES, provider="refused")
    keyless = cluster.client.enqueue(model="m", messages=MESSAGES, provider="keyless")
    good = cluster.client.enqueue(model="m", messages=MESSAGES, provider="good")

    (attempt,) = check_failed(cluster, refused, ErrorCode.AUTH, "did not accept the key").attempts
    assert (attempt.http_status, attempt.retryable) == (401, False)
    (attempt,) = check_failed(cluster, keyless, ErrorCode.AUTH, "NOT_SET_KEY").attempts
    assert (attempt.http_status, attempt.retryable) == (None, False)
    assert cluster.wait_for(good).status is JobStatus.COMPLETED
    check_kept_secret(cluster, worker, refused, keyless, good)


def test_job_that_names_an_unknown_provider_fails_at_once_and_is_told_the_known_ones(
    cluster: Cluster, providers_file: Path
) -> None:
    cluster.start_worker(providers_file=providers_file)
    job_id = cluster.client.enqueue(model="m", messages=MESSAGES, provider="elsewhere")
    result = check_failed(cluster, job_id, ErrorCode.UNKNOWN_PROVIDER, "elsewhere", "default, gone, good")
    assert len(result.attempts) == 1


def test_worker_that_lacks_a_provider_leaves_its_jobs_to_one_that_has_it(
    cluster: Cluster, providers_file: Path, tmp_path: Path
) -> None:
    """As in a deployment whose workers get a new providers file one after the other."""
    old_file = tmp_path / "old.toml"
    old_file.write_text("")
    new = cluster.start_worker(providers_file=providers_file, concurrency=1)
    slow = cluster.enqueue(deltas=3, first_token_delay=600)
    cluster.wait_for(slow, "running")
    old = cluster.start_worker(providers_file=old_file)
    job_id = cluster.client.enqueue(model="m", messages=MESSAGES, provider="good")
    plain = cluster.enqueue()
    assert cluster.wait_for(plain).attempts[0].worker == old.id, "it has places"
    assert cluster.result(job_id).status is JobStatus.QUEUED
    cluster.client.cancel(slow)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    assert cluster.result(job_id).attempts[0].worker == new.id


# -- jobs over the queue --


def without_model(job: dict[str, Any]) -> None:
    del job["request"]["model"]


def without_a_version(job: dict[str, Any]) -> None:
    del job["v"]


def with_an_unknown_field(job: dict[str, Any]) -> None:
    job["max_attempt"] = 3


def with_a_url(job: dict[str, Any]) -> None:
    job["request"]["base_url"] = "http://169.254.169.254/"


def with_a_time_beyond_utc(job: dict[str, Any]) -> None:
    job["expires_at"] = "9999-12-31T23:59:59-01:00"


def with_a_limit_out_of_bounds(job: dict[str, Any]) -> None:
    job["max_attempts"] = 0


def with_no_messages(job: dict[str, Any]) -> None:
    job["request"]["messages"] = []


def too_deep(job: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for _ in range(300):
        nested = {"in": nested}
    job["metadata"] = nested


def too_large(job: dict[str, Any]) -> None:
    job["metadata"] = {"filler": "x" * (8 * 1024 * 1024 + 1)}


SPOILERS: dict[Callable[[dict[str, Any]], None], str] = {
    without_model: "'model' is missing",
    without_a_version: 'add "v": 2',
    with_an_unknown_field: "did you mean 'max_attempts'?",
    with_a_url: "'base_url' cannot be part of a job",
    with_a_time_beyond_utc: "expires_at: must be a time",
    with_a_limit_out_of_bounds: "max_attempts",
    with_no_messages: "messages",
    too_deep: "JSON",
    too_large: "bytes",
}


def test_invalid_jobs_from_the_queue_are_recorded_and_end_as_failed(any_cluster: Cluster) -> None:
    cluster = any_cluster
    worker = cluster.start_worker()
    jobs = {}
    for spoil, word in SPOILERS.items():
        job = cluster.job()
        job["request"]["messages"] = MESSAGES
        spoil(job)
        cluster.send(job)
        result = check_failed(cluster, job["id"], ErrorCode.INVALID_JOB, word)
        assert result.attempts == []
        assert result.error is not None
        jobs[job["id"]] = (json.dumps(job), result.error.message)

    for record in wait_for_records(cluster, len(SPOILERS)):
        text, reason = jobs[record["job_id"]]
        assert (record["tenant"], record["reason"], record["size"]) == ("default", reason, len(text))
        assert text.startswith(base64.b64decode(record["payload"]).decode())
    check_kept_secret(cluster, worker, *jobs)


def test_invalid_job_does_not_touch_a_valid_one_of_the_same_id(cluster: Cluster) -> None:
    cluster.start_worker()
    job = cluster.job(deltas=40, rate=20)
    cluster.client.enqueue(parse_job(job))
    following = cluster.follow(job["id"])
    following.wait_for("delta", count=3)
    cluster.send(job | {"request": job["request"] | {"messages": "none"}})

    (record,) = wait_for_records(cluster, 1)
    assert record["job_id"] == job["id"]
    assert following.to_the_end().text == "word " * 40
    assert cluster.result(job["id"]).status is JobStatus.COMPLETED
    assert following.types.count("attempt.started") == 1


# -- messages over the queue --


def message(body: str) -> bytes:
    """Return a message with a valid envelope."""
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": TASK, "id": "a:task"},
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": "tag-1",
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
            },
        }
    ).encode()


def job_with(value: str) -> str:
    """Return the body of a message whose job contains this JSON text."""
    request = f'{{"model": "m", "messages": [{{"role": "user", "content": "Hello"}}], "extra": {value}}}'
    return f'[[{{"v": 2, "request": {request}}}], {{}}, {{}}]'


def test_invalid_jobs_whose_ids_name_none_are_recorded_with_their_payload(cluster: Cluster) -> None:
    cluster.start_worker()
    jobs = [cluster.job() | {"id": job_id} for job_id in ("a:b", "{x}", "", " ", "x" * 129, 7, None)]
    cluster.push(*(message(json.dumps([[job], {}, {}])) for job in jobs))
    records = wait_for_records(cluster, len(jobs))
    assert {(record["job_id"], record["reason"].partition(":")[0]) for record in records} == {(None, "id")}
    kept = [json.loads(base64.b64decode(record["payload"])) for record in records]
    assert all(job in kept for job in jobs)


UNREADABLE = {
    b"\xff\xfe not JSON": "not JSON",
    b"[1, 2]": "not a JSON object",
    b'{"headers": {"id": "x", "task": "other.task"}, "properties": {}}': "'headers.task'",
    b'{"headers": {"id": "x", "task": "completions.run"}, "properties": {}}': "delivery_tag",
    message("[[], {}, {}]"): "exactly one argument",
    # JSON that one decoder accepts and another does not must not get lost between them.
    message(job_with("[" * 400 + "]" * 400)): "nested deeper",
    message(job_with("[" * 980 + "]" * 980)): "nested",
    message(job_with("[" * 2000 + "]" * 2000)): "nested",
    message(job_with("7" * 5000)): "not JSON",
}


def test_items_that_are_no_readable_messages_are_kept_and_recorded_and_harm_no_job(any_cluster: Cluster) -> None:
    cluster = any_cluster
    jobs = [cluster.job(deltas=2) for _ in range(5)]
    for job in jobs:
        cluster.push(*UNREADABLE)
        cluster.send(job)
    worker = cluster.start_worker()
    assert {cluster.wait_for(job["id"]).status for job in jobs} == {JobStatus.COMPLETED}

    for record in wait_for_records(cluster, len(jobs) * len(UNREADABLE)):
        item = base64.b64decode(record["payload"])
        assert UNREADABLE[item] in record["reason"]
        assert record["size"] == len(item)
        assert record["job_id"] == ("x" if b'"id": "x"' in item else None)  # the id in its headers, if it is valid
    check_kept_secret(cluster, worker, *(job["id"] for job in jobs))
