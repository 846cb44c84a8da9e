"""Very large answers: stored whole, followed, and rebuilt from the log after a worker died before the commit."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from keepstream.extras import abridged_fields, json_bytes
from keepstream.results import CompletionResult, JobStatus
from tests.cluster import BRIEF, Cluster, Following, WorkerProcess, wait_until
from tests.large_answers import KINDS, LargeAnswers, expected_extra

#: Seconds; a busy machine may take long for tens of megabytes.
PATIENCE = 300.0


@pytest.fixture(scope="module")
def provider() -> Iterator[LargeAnswers]:
    with LargeAnswers() as provider:
        yield provider


def start_worker(cluster: Cluster, provider: LargeAnswers, directory: Path, **settings: Any) -> WorkerProcess:
    file = directory / "providers.toml"
    file.write_text(f'[providers.large]\nbase_url = "{provider.url}"\napi = "chat"\n')
    return cluster.start_worker(providers_file=file, **settings)


def ask(cluster: Cluster, kind: str) -> tuple[str, Following]:
    request = {"model": kind, "messages": [{"role": "user", "content": "Go on."}]}
    job_id = cluster.client.enqueue(request, provider="large")
    return job_id, Following(cluster.client, job_id, timeout=PATIENCE)


def check(kind: str, result: CompletionResult) -> None:
    """Compare without showing megabytes."""
    assert result.status is JobStatus.COMPLETED, result.error
    (choice,) = result.choices
    assert choice.extra is not None
    expected = expected_extra(kind)
    assert choice.extra.keys() == expected.keys()
    for name, value in expected.items():
        whole = choice.extra[name] == value
        assert whole, f"{name} is not what was sent"
    assert choice.left_out == {}


def tell(kind: str, what: str, seconds: float, worker: WorkerProcess) -> None:
    """Report what it took; ``pytest -s`` shows it."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"\n{kind}: {what} in {seconds:.1f} s, worker at most {int(peak) // 1024} MiB\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_large_answer_is_stored_and_followed(
    any_cluster: Cluster, provider: LargeAnswers, tmp_path: Path, kind: str
) -> None:
    cluster = any_cluster
    worker = start_worker(cluster, provider, tmp_path)
    begin = time.monotonic()
    job_id, following = ask(cluster, kind)
    result = cluster.wait_for(job_id, timeout=PATIENCE)
    tell(kind, f"{json_bytes(result.choices[0].extra) >> 20} MiB of extras stored", time.monotonic() - begin, worker)
    check(kind, result)
    following.join(PATIENCE)
    tell(kind, "followed", time.monotonic() - begin, worker)
    held = following.transcript.choices[0]
    assert (held.content, held.reasoning) == (result.choices[0].content, result.choices[0].reasoning)
    told = held.extra if kind != "image" else abridged_fields(result.choices[0].extra)
    same = held.extra == told == (result.choices[0].extra if kind != "image" else told)
    assert same, "a follower holds something else than the row"


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_large_answer_is_rebuilt_from_the_log(
    postgres_cluster: Cluster, provider: LargeAnswers, tmp_path: Path, kind: str
) -> None:
    cluster = postgres_cluster
    # For an image, events have to be allowed to carry it; see the test below for what happens otherwise.
    settings = {"live_extra_bytes": 64 * 1024 * 1024} if kind == "image" else {}
    lost, following = die_before_the_commit(cluster, provider, tmp_path, kind, **settings)
    worker = start_worker(cluster, provider, tmp_path, lease=BRIEF, **settings)
    begin = time.monotonic()
    result = cluster.wait_for(lost, timeout=PATIENCE)
    tell(kind, "rebuilt", time.monotonic() - begin, worker)
    assert [attempt.outcome for attempt in result.attempts] == ["lost", "recovered"]
    check(kind, result)
    following.join(PATIENCE)
    assert following.transcript.terminal is not None
    assert following.transcript.sha256() == result.output_sha256


def test_an_image_that_is_not_in_the_log_is_told_by_its_size(
    postgres_cluster: Cluster, provider: LargeAnswers, tmp_path: Path
) -> None:
    cluster = postgres_cluster
    lost, _ = die_before_the_commit(cluster, provider, tmp_path, "image")
    start_worker(cluster, provider, tmp_path, lease=BRIEF)
    result = cluster.wait_for(lost, timeout=PATIENCE)
    assert (result.status, result.text) == (JobStatus.COMPLETED, "Here it is.")
    assert [attempt.outcome for attempt in result.attempts] == ["lost", "recovered"]
    (image,) = (result.choices[0].extra or {})["images"]
    assert image == {"omitted": "image", "bytes": json_bytes(expected_extra("image")["images"][0])}
    assert f"{image['bytes']} bytes are lost" in result.choices[0].left_out["images"]


def die_before_the_commit(
    cluster: Cluster, provider: LargeAnswers, directory: Path, kind: str, **settings: Any
) -> tuple[str, Following]:
    worker = start_worker(cluster, provider, directory, lease=BRIEF, **settings)
    with cluster.database() as connection:  # the ending waits for this lock, the claim does not
        connection.execute(text("LOCK TABLE keepstream_choices IN SHARE MODE"))
        job_id, following = ask(cluster, kind)
        wait_until(lambda: "attempt.finished" in following.types[-2:], "the end of the stream", PATIENCE)
        worker.kill()
    return job_id, following
