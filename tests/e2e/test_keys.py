"""Keys that change under a running worker: the next job has the new one, the doctor knows, and no log does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstream.errors import ErrorCode
from keepstream.results import JobStatus
from keepstream_worker.dev_stack.embedded import EmbeddedProvider
from keepstream_worker.dev_stack.scripted_provider.__main__ import ENV_API_KEY
from tests.cluster import PATIENCE, Cluster

RIGHT_KEY = "sk-right-4b1d0f7c2a"
FORMER_KEY = "sk-former-9e8d7c6b5a"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def strict_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedProvider]:
    """A provider that accepts only one key."""
    monkeypatch.setenv(ENV_API_KEY, RIGHT_KEY)
    with EmbeddedProvider() as provider:
        monkeypatch.delenv(ENV_API_KEY)
        yield provider


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Where the key is, once there is one."""
    return tmp_path / "key"


@pytest.fixture
def providers_file(strict_provider: EmbeddedProvider, tmp_path: Path, key_file: Path) -> Path:
    """Two providers with one key: by a file, and by a command that prints the file."""
    tables = {"file": f'api_key_file = "{key_file}"', "command": f'api_key_command = ["cat", "{key_file}"]'}
    lines = [f'[providers.{name}]\nbase_url = "{strict_provider.base_url}"\n{key}' for name, key in tables.items()]
    file = tmp_path / "providers.toml"
    file.write_text("\n".join(lines))
    return file


def test_a_worker_uses_a_new_key_without_a_restart(cluster: Cluster, providers_file: Path, key_file: Path) -> None:
    key_file.write_text(FORMER_KEY)
    worker = cluster.start_worker(providers_file=providers_file)
    refused = cluster.wait_for(cluster.client.enqueue(model="m", messages=MESSAGES, provider="file"))
    assert refused.error is not None
    assert (refused.error.code, len(refused.attempts)) == (ErrorCode.AUTH, 1)

    key_file.write_text(RIGHT_KEY)
    done = cluster.wait_for(cluster.client.enqueue(model="m", messages=MESSAGES, provider="file"))
    assert (done.status, len(done.attempts)) == (JobStatus.COMPLETED, 1)
    worker.wait_to_say("key_changed", provider="file")
    said = "".join(log.read_text() for log in cluster.directory.glob("worker-*.log"))
    assert not [key for key in (RIGHT_KEY, FORMER_KEY) if key in said]


def test_a_job_waits_for_a_key_that_cannot_be_read_yet(cluster: Cluster, providers_file: Path, key_file: Path) -> None:
    worker = cluster.start_worker(providers_file=providers_file)
    job_id = cluster.client.enqueue(model="m", messages=MESSAGES, provider="file")
    worker.wait_to_say("key_unreadable", provider="file", meanwhile="jobs for this provider wait")
    key_file.write_text(RIGHT_KEY)
    done = cluster.wait_for(job_id)
    assert done.status is JobStatus.COMPLETED
    assert [attempt.error.code for attempt in done.attempts if attempt.error] == [ErrorCode.AUTH] * (
        len(done.attempts) - 1
    )
    worker.wait_to_say("key_readable", provider="file")


def test_the_doctor_reads_keys_as_a_worker_does(cluster: Cluster, providers_file: Path, key_file: Path) -> None:
    def found() -> dict[str, tuple[str, str, str]]:
        done = subprocess.run(
            [sys.executable, "-m", "keepstream_worker.commands", "doctor", "--json"],
            cwd=Path(__file__).parents[2],
            env=cluster.environment(providers_file=providers_file),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert not [key for key in (RIGHT_KEY, FORMER_KEY) if key in done.stdout + done.stderr]
        checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
        return {
            name: (
                checks[f"provider {name}"]["severity"],
                checks[f"provider {name}"]["found"],
                checks[f"provider {name}"]["advice"],
            )
            for name in ("file", "command")
        }

    severity, words, advice = found()["file"]
    assert severity == "fail"
    assert words.endswith(
        f"provider 'file' has no key: its key file {key_file} cannot be read (No such file or directory)"
    )
    assert advice == "put the key there, readable for the worker's user; until then, jobs for this provider fail"
    severity, words, advice = found()["command"]
    assert severity == "fail"
    assert words.endswith("provider 'command' has no key: its key command 'cat' failed (exit code 1)")
    assert advice.startswith("run it as the worker's user, with the worker's environment, to see why; ")

    key_file.write_text(FORMER_KEY)
    severity, words, _ = found()["command"]
    assert severity == "fail"
    assert "did not accept the key" in words
    assert words.endswith("of its command 'cat'")

    key_file.write_text(RIGHT_KEY)
    severity, words, _ = found()["file"]
    assert severity == "ok"
    assert words.endswith(f"; its key is that of file {key_file}")
