"""The command line as users see it: real processes, their output, their exit codes.

Most of them are forked off, for starting Python and importing what they need takes longer than all that they do.
"""

import ast
import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from keepstream import parse_event
from keepstream.client.database import make_engine
from keepstream.events import UnknownEvent
from keepstream.jobs import parse_job
from keepstream.names import QUEUE, control_channel
from keepstream.tables import rejected_messages, seconds_from_now
from keepstream.transcript import Transcript
from keepstream_worker.commands.main import main
from keepstream_worker.dev_stack.embedded import EmbeddedProvider, free_port, sqlite_url
from keepstream_worker.store import inspection, schema
from keepstream_worker.supervisor import python_module
from tests.cluster import Cluster, wait_until
from tests.fork_server import ForkServer
from tests.stored_jobs import stored_job

OK, UNSUCCESSFUL, INVALID, UNAVAILABLE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130
COMMANDS = (
    *("demo", "dev", "submit", "follow", "get", "list", "cancel", "retry"),
    *("worker", "alive", "migrate", "top", "limits", "doctor", "rejected", "purge", "schema"),
)
TEXT = "Grüße, ¡saludos!, 你好 🌊 - a text for the tests of the command line."
SECRET = "hunter2-secret"  # part of URLs; must never be printed
COMMAND = python_module("keepstream_worker.commands")


FORKS: list[ForkServer] = []  #: The one that runs the commands.


@pytest.fixture(scope="session", autouse=True)
def _forked(forks: ForkServer) -> None:
    FORKS[:] = [forks]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """One cluster with one worker for all tests that do no harm."""
    directory = tmp_path_factory.mktemp("cli")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks) as cluster:
        cluster.start_worker()
        yield cluster


Done = subprocess.CompletedProcess[str]


def environment(**settings: str) -> dict[str, str]:
    """An environment with these Keepstream variables and no others."""
    names = ("KEEPSTREAM_", "OPENAI_", "COLUMNS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return inherited | settings


def run(env: dict[str, str], *args: str, stdin: str = "", cwd: Path | None = None) -> Done:
    """Run `keepstream` to its end; it must never show a traceback or a secret."""
    (forks,) = FORKS
    done = forks.run("keepstream_worker.commands", args, env, given=stdin, directory=cwd, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done


def keepstream(cluster: Cluster, *args: str, stdin: str = "") -> Done:
    return run(cluster.environment(), *args, stdin=stdin)


def one_line(done: Done) -> str:
    """The message of an expected failure."""
    assert done.stdout == ""
    assert done.stderr.startswith("keepstream: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`keepstream` in this process, for what depends on arguments only; starting Python is slow."""

    def run_here(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["keepstream", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as end:
            main()
        return Done(args, int(end.value.code or 0), *capsys.readouterr())

    return run_here


def scripted(cluster: Cluster, **script: Any) -> str:
    """A job file with a scripted stream."""
    return json.dumps(cluster.job(**{"text": TEXT, **script}))


@contextlib.contextmanager
def started(env: dict[str, str], *args: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start `keepstream` in a session of its own; kill whatever is left of it at the end."""
    process = subprocess.Popen(
        [*COMMAND, *args], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for member in family:  # before the pipes are read to their end, which the family holds open
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.communicate()


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example_and_the_exit_codes(here: Callable[..., Done], command: str):
    done = here(command, "--help")
    assert done.returncode == OK
    assert f"keepstream {command}" in done.stdout
    assert "Exit codes: 0 done" in done.stdout


def test_the_help_lists_every_command_and_needs_no_heavy_library(here: Callable[..., Done]):
    script = (
        "import sys, keepstream_worker.commands.main; "
        "print(sorted({'celery', 'openai', 'redis', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(loaded.stdout) == []
    done = here("--help")
    assert all(re.search(rf"^│ {command} ", done.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--limit", "0"], "invalid value for '--limit': must be at least 1 (see: keepstream list --help)"),
        (["list", "--limit", "2000"], "invalid value for '--limit': must be at most 1000 (see"),
        (["worker", "--processes", "many"], "invalid value for '--processes': must be a whole number (see"),
        (["follow", "x", "--timeout", "never"], "invalid value for '--timeout': must be a number (see"),
        (["demo", "--provider", "mine"], "invalid value for '--provider': 'mine' is not one of 'scripted', 'own' (see"),
        (["dev", "--port", "99"], "there is no option --port (see: keepstream dev --help)"),
        (["list", "--limit"], "'--limit' requires an argument"),
        (["list", "--limt", "1"], "there is no option --limt; did you mean --limit? (see: keepstream list --help)"),
        (["sumbit"], "there is no command 'sumbit'; did you mean 'submit'? (see: keepstream --help)"),
        (["follow"], "missing argument 'JOB_ID'"),
        (["cancel", "one", "two"], "unexpected argument (two)"),
    ],
)
def test_a_usage_error_is_one_line_like_all_others(here: Callable[..., Done], arguments: list[str], message: str):
    done = here(*arguments)
    assert done.returncode == INVALID
    assert message.lower() in one_line(done).lower()


def test_without_the_extra_the_command_line_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; import keepstream_worker.commands.main"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == UNSUCCESSFUL
    assert "pip install 'keepstream[worker]' (in a checkout: pip install '.[worker]')" in one_line(done)


def test_without_a_command_the_help_is_shown(here: Callable[..., Done]):
    done = here()
    assert done.returncode == INVALID
    assert "keepstream demo" in done.stdout


def test_an_installed_distribution_names_its_version(here: Callable[..., Done]):
    assert re.fullmatch(r"keepstream \d+\.\d+\.\d+\n", here("--version").stdout)


# -- the way of a job -----------------------------------------------------------------------------


def test_a_submitted_job_is_followed_queried_and_listed(cluster: Cluster):
    metadata = ["--metadata", '{"order": 4711}']
    submitted = keepstream(
        cluster, "submit", "--file", "-", *metadata, "--json", stdin=scripted(cluster, reasoning="Well.")
    )
    assert submitted.returncode == OK
    job_id = json.loads(submitted.stdout)["job_id"]

    followed = keepstream(cluster, "follow", job_id)
    assert followed.returncode == OK
    assert f"  {TEXT}\n" in followed.stdout
    assert "✓ completed · stop · " in followed.stdout
    assert followed.stdout.endswith("sha256 matches\n")
    assert followed.stderr == ""

    result = json.loads(keepstream(cluster, "get", job_id, "--json").stdout)
    assert (result["status"], result["metadata"]) == ("completed", {"order": 4711})
    assert (result["choices"][0]["content"], result["choices"][0]["reasoning"]) == (TEXT, "Well.")
    assert result["usage"]["source"] == "provider"
    assert keepstream(cluster, "get", job_id, "--text").stdout == TEXT + "\n"
    shown = keepstream(cluster, "get", job_id).stdout
    assert all(part in shown for part in (job_id, "completed", TEXT, "4711", "1 first", result["output_sha256"] + " ✓"))

    lines = keepstream(cluster, "list", "--status", "completed", "--json").stdout.splitlines()
    assert job_id in [json.loads(line)["id"] for line in lines]
    assert job_id in keepstream(cluster, "list").stdout


def test_follow_prints_events_as_json_lines_that_make_the_stored_text(cluster: Cluster):
    done = keepstream(cluster, "submit", "--file", "-", "--follow", "--json", stdin=scripted(cluster, rate=20))
    assert done.returncode == OK
    events = [parse_event(line) for line in done.stdout.splitlines()]
    transcript = Transcript()
    assert all(transcript.apply(event) for event in events)
    assert not any(isinstance(event, UnknownEvent) for event in events)
    assert transcript.text == TEXT
    assert transcript.terminal is not None
    assert transcript.sha256() == transcript.terminal.output_sha256

    later = keepstream(cluster, "follow", events[0].job_id, "--after", events[2].id, "--json")
    assert later.stdout.splitlines() == done.stdout.splitlines()[3:]


def test_options_make_a_job(cluster: Cluster, tmp_path: Path):
    tool = tmp_path / "tool.json"
    tool.write_text('{"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}}')
    options = ["--model", "m-1", "--message", "Hi", "--system", "Be brief.", "--param", "temperature=0.2", "--param"]
    done = keepstream(
        cluster, "submit", *options, "user=me", "--tool", str(tool), "--id", "options-1", "--expires-in", "1h"
    )
    assert done.stdout == "options-1\n"
    cluster.wait_for("options-1")
    with urllib.request.urlopen(cluster.provider.base_url.removesuffix("/v1") + "/_requests") as answer:
        body = json.load(answer)[-1]["body"]
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Hi"]
    assert (body["model"], body["temperature"], body["user"]) == ("m-1", 0.2, "me")
    assert body["tools"][0]["function"]["name"] == "get_weather"
    assert "calls get_weather {" in keepstream(cluster, "follow", "options-1").stdout


def test_a_message_comes_from_standard_input(cluster: Cluster):
    done = keepstream(cluster, "submit", "--model", "m-1", "-m", "-", "--id", "stdin-1", stdin="Grüße!\nTwo lines.\n")
    assert (done.returncode, done.stdout) == (OK, "stdin-1\n")
    cluster.wait_for("stdin-1")
    with urllib.request.urlopen(cluster.provider.base_url.removesuffix("/v1") + "/_requests") as answer:
        body = json.load(answer)[-1]["body"]
    assert body["messages"] == [{"role": "user", "content": "Grüße!\nTwo lines."}]


def test_a_file_holds_a_request_or_a_whole_job_and_options_win_over_it(cluster: Cluster, tmp_path: Path):
    request = {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "metadata": {"theirs": 1}, "seed": 1}
    files = {"request": request, "job": {"v": 2, "request": request, "metadata": {"ours": 1}, "provider": "nope"}}
    options = ["--metadata", '{"ours": 2}', "--provider", "default", "--model", "m-2", "--param", "seed=2"]
    for name, content in files.items():
        file = tmp_path / name
        file.write_text(json.dumps(content))
        done = keepstream(cluster, "submit", "--file", str(file), *options, "--id", f"file-{name}")
        assert done.stdout == f"file-{name}\n"
        assert cluster.wait_for(f"file-{name}").metadata == {"ours": 2}
        with urllib.request.urlopen(cluster.provider.base_url.removesuffix("/v1") + "/_requests") as answer:
            body = json.load(answer)[-1]["body"]
        assert {part: body[part] for part in request} == request | {"model": "m-2", "seed": 2}


def test_a_request_in_a_file_with_a_field_of_the_job_in_it_is_refused(cluster: Cluster):
    request = {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "max_attempts": 3}
    done = keepstream(cluster, "submit", "--file", "-", stdin=json.dumps(request))
    assert done.returncode == INVALID
    assert "'max_attempts' belongs beside the request" in one_line(done)


def test_a_retry_is_a_visible_line_and_the_text_starts_over(cluster: Cluster):
    job = scripted(cluster, faults=[{"kind": "cut", "after": 4}])
    done = keepstream(cluster, "submit", "--file", "-", "--follow", stdin=job)
    assert done.returncode == OK
    assert re.search(r"✗ attempt 1 failed: connection: .*; the text above is void; next attempt in \d", done.stdout)
    assert "2 attempts" in done.stdout
    assert "sha256 matches" in done.stdout


def test_what_a_model_writes_cannot_steer_the_console(cluster: Cluster):
    job = scripted(
        cluster, text="harmless \x1b[31m\x07red\x9b", tool_calls=[{"name": "f", "arguments": "\x1b]0;title"}]
    )
    done = keepstream(cluster, "submit", "--file", "-", "--follow", stdin=job)
    shown = done.stdout + keepstream(cluster, "get", done.stdout.split()[1]).stdout
    assert "harmless ␛[31m␇red" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_on_a_terminal_lines_are_broken_between_words(cluster: Cluster):
    words = " ".join(f"word{number}" for number in range(60))
    job_id = cluster.enqueue(text=words, delta_chars=3)
    cluster.wait_for(job_id)
    parent, child = pty.openpty()
    env = cluster.environment() | {"COLUMNS": "60", "TERM": "xterm"}
    with subprocess.Popen([*COMMAND, "follow", job_id], env=env, stdout=child, stderr=child) as process:
        os.close(child)
        shown = b""
        while chunk := _read(parent):
            shown += chunk
        assert process.wait() == OK
    os.close(parent)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 60
    assert {word for line in lines for word in line.split()} >= set(words.split())


def test_cancelling_a_running_job_keeps_what_it_wrote(cluster: Cluster):
    job_id = cluster.enqueue(deltas=2000, rate=50)
    cluster.wait_for_deltas(job_id, 5)
    assert keepstream(cluster, "cancel", job_id).returncode == OK
    followed = keepstream(cluster, "follow", job_id)
    assert followed.returncode == UNSUCCESSFUL
    assert "✗ cancelled" in followed.stdout
    assert "(the output is partial)" in keepstream(cluster, "get", job_id).stdout
    again = keepstream(cluster, "cancel", job_id, "--json")
    assert (again.returncode, json.loads(again.stdout)) == (OK, {"job_id": job_id, "status": "cancelled"})


def test_ctrl_c_ends_following_but_not_the_job(cluster: Cluster):
    job_id = cluster.enqueue(deltas=2000, rate=50)
    with started(cluster.environment(), "follow", job_id) as process:
        assert process.stdout is not None
        assert "attempt 1" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED
    assert re.search(rf"keepstream follow {job_id} --after 1-\d+\n$", errors)
    assert "Traceback" not in errors
    assert cluster.result(job_id).status == "running"
    cluster.client.cancel(job_id)


def test_get_shows_the_request_with_long_messages_cut(cluster: Cluster):
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(8)]
    messages = [*turns, {"role": "user", "content": "Hello \x1b[31m" + "long " * 1000}]
    job = cluster.job(text="Hi")
    job["request"] |= {"messages": messages, "temperature": 0.25}
    job_id = cluster.client.enqueue(parse_job(job))
    cluster.wait_for(job_id)
    shown = keepstream(cluster, "get", job_id).stdout
    assert "temperature  0.25" in shown
    assert "3 earlier messages (all: --json)" in shown
    assert "turn 3" in shown
    assert "turn 2" not in shown
    assert "Hello ␛[31mlong" in shown
    assert shown.count("long ") < 100
    whole = json.loads(keepstream(cluster, "get", job_id, "--json").stdout)
    assert whole["request"]["messages"] == messages


def test_list_shows_prompts_and_finds_jobs_by_metadata_and_time(cluster: Cluster):
    messages = [{"role": "user", "content": "Why is the sky\nblue?"}]
    job = cluster.job(limits={"metadata": {"conversation": 4711}}, text="Hi")
    job["request"]["messages"] = messages
    job_id = cluster.client.enqueue(parse_job(job))
    cluster.wait_for(job_id)
    wanted = ["--metadata", "conversation=4711", "--since", "1h", "--status", "ended"]
    shown = keepstream(cluster, "list", *wanted).stdout
    assert job_id in shown
    assert "Why is the sky blue?" in shown
    (line,) = keepstream(cluster, "list", *wanted, "--json").stdout.splitlines()
    assert json.loads(line)["prompt_start"] == "Why is the sky blue?"
    for other in (["--metadata", "conversation=1"], ["--until", "1h"], ["--status", "active", *wanted[:2]]):
        assert keepstream(cluster, "list", *other).stdout == "No such jobs.\n"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_ids_are_whole_however_narrow_the_terminal(cluster: Cluster, columns: str):
    job_id = cluster.enqueue(limits={"id": f"{columns:x<128}"}, text="Hi")
    cluster.wait_for(job_id)
    env = cluster.environment() | {"COLUMNS": columns}
    for command in (["list"], ["get", job_id]):
        assert job_id in run(env, *command).stdout.split()
    ordinary = cluster.enqueue(text="Hi")
    shown = run(env, "list", "--limit", "1").stdout
    assert ordinary in shown.split()
    assert max(map(len, shown.splitlines())) <= int(columns)


def test_a_failed_job_is_run_again(cluster: Cluster):
    job = scripted(cluster, faults=[{"kind": "status", "status": 400}])
    job_id = keepstream(cluster, "submit", "--file", "-", stdin=job).stdout.strip()
    assert cluster.wait_for(job_id).status == "failed"
    again = keepstream(cluster, "retry", job_id).stdout.strip()
    assert cluster.wait_for(again).retry_of == job_id
    assert f"retry of   {job_id}" in keepstream(cluster, "get", again).stdout
    cluster.wait_for(other := cluster.enqueue(text=TEXT))
    done = keepstream(cluster, "retry", other)
    assert done.returncode == INVALID
    assert "force" in one_line(done)
    done = keepstream(cluster, "retry", other, "--force", "--follow")
    assert done.returncode == OK
    assert TEXT in done.stdout


def test_whoever_follows_a_job_that_no_worker_takes_is_told_so(cluster: Cluster):
    env = cluster.environment() | {"KEEPSTREAM_QUEUE": "nobody"}
    with started(env, "submit", "--model", "m", "-m", "Hi", "--follow") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "waits for a worker: none is alive for the queue 'nobody'" in line
    done = run(env, "submit", "--model", "m", "-m", "Hi")
    done = run(env, "follow", done.stdout.strip(), "--timeout", "1", "--json")
    assert done.returncode == UNAVAILABLE
    told, error = done.stderr.splitlines()
    assert "waits for a worker" in told
    assert "no event of job" in error
    assert "it waits for a worker: none is alive" in error
    assert "waits for  a worker: none is alive" in keepstream(cluster, "get", told.split()[1]).stdout
    for waiting in (line, told):  # the doctor would wonder why they wait for so long
        assert keepstream(cluster, "cancel", waiting.split()[1]).returncode == OK


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_listing_says_of_each_waiting_job_what_it_waits_for(cluster: Cluster, columns: str):
    env = cluster.environment() | {"KEEPSTREAM_QUEUE": "a-queue-without-workers", "COLUMNS": columns}
    job_id = run(env, "submit", "--model", "m", "-m", "Hi " * 100).stdout.strip()
    shown = " ".join(run(env, "list", "--limit", "1").stdout.split())
    assert job_id in shown
    assert "waits for a worker: none is alive for the queue 'a-queue-without-workers'" in shown
    assert run(env, "cancel", job_id).returncode == OK  # the doctor would wonder why it waits for so long


@pytest.mark.parametrize("timeout", ["1", "600"])
def test_following_an_unknown_job_is_not_found_even_without_redis(cluster: Cluster, timeout: str):
    env = cluster.environment() | {"KEEPSTREAM_REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
    done = run(env, "follow", "nope", "--timeout", timeout)
    assert done.returncode == NOT_FOUND
    assert "waits for Redis: it does not answer" in done.stderr
    assert "there is no job nope" in done.stderr.splitlines()[-1]


# -- jobs that do not complete, and wrong input ---------------------------------------------------


def test_a_refused_key_fails_the_job_with_one_clear_line(cluster: Cluster):
    body = {"error": {"message": "Incorrect API key provided: " + SECRET, "code": "invalid_api_key"}}
    job = scripted(cluster, faults=[{"kind": "status", "status": 401, "body": body}])
    done = keepstream(cluster, "submit", "--file", "-", "--follow", stdin=job)
    assert done.returncode == UNSUCCESSFUL
    assert "✗ attempt 1 failed: auth: " in done.stdout
    assert "✗ failed" in done.stdout


def test_an_unknown_provider_fails_the_job_and_names_those_there_are(cluster: Cluster):
    done = keepstream(cluster, "submit", "--model", "m", "-m", "Hi", "--provider", "nope", "--follow")
    assert done.returncode == UNSUCCESSFUL
    assert "unknown_provider: no provider 'nope' is configured; there is: default" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "-m", "Hi"], "--model"),
        (["submit", "--model", "m"], "--message"),
        (["submit", "--model", "m", "-m", "A", "-m", "B"], "--message was given 2 times; "),
        (["submit", "--model", "m", "-m", "-"], "standard input is empty"),
        (["submit", "--file", "-", "-m", "-"], "only one of them"),
        (["submit", "--model", "m", "-m", "Hi", "--param", "stream=true"], "'stream' is set by the worker"),
        (["submit", "--model", "m", "-m", "Hi", "--param", "temperature"], "write NAME=VALUE"),
        (["submit", "--model", "m", "-m", "Hi", "--max-attempts", "0"], "max_attempts: must be at least 1"),
        (["submit", "--model", "m", "-m", "Hi", "--metadata", "{a"], "--metadata: this is not valid JSON"),
        (["submit", "--model", "m", "-m", "Hi", "--expires-in", "soon"], "no duration"),
        (["submit", "--model", "m", "-m", "Hi", "--fallback", "other"], "--fallback other: write PROVIDER/MODEL"),
        (["submit", "--model", "m", "-m", "Hi", "--fallback", "default/m"], "fallbacks: each must be another"),
        (["submit", "--model", "m", "-m", "Hi", "--tool", "/nowhere.json"], "cannot be read"),
        (["submit", "--file", "/nowhere.json"], "cannot be read"),
        (["submit", "--file", "-"], "not valid JSON"),
        (["list", "--status", "done"], "choose one of queued, running"),
        (["list", "--metadata", "order"], "--metadata order: write NAME=VALUE"),
        (["list", "--since", "yesterday"], "--since yesterday: write how long ago"),
        (["follow", "job", "--after", "seventeen"], "event ids look like 2-17"),
        (["purge", "--older-than", "long", "--all-tenants"], "no duration"),
        (["purge", "--older-than", "30", "--all-tenants"], "write a number and its unit"),
        (["purge", "--older-than", "99999999d", "--all-tenants"], "too long"),
        (["purge", "--older-than", "30d"], "--tenant NAME or --all-tenants"),
        (["purge", "--older-than", "30d", "--tenant", "a", "--all-tenants"], "--tenant NAME or --all-tenants"),
        (["submit", "--model", "m", "-m", "Hi", "--expires-in", "99999999d"], "too long"),
        (["schema", "nope"], "choose one of job, event, result, asyncapi"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_write(
    here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, cluster: Cluster, arguments: list[str], message: str
):
    monkeypatch.setenv("KEEPSTREAM_DATABASE_URL", cluster.database_url)
    done = here(*arguments)
    assert done.returncode == INVALID
    assert message in one_line(done)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": "m", "mesages": [{}]}', "'messages' is missing; is 'mesages' a typo?"),
        ('{"messages": [{}]}', "'model' is missing"),
        ('{"v": 2, "request": {"model": "m", "messages": [{}]}, "max_attempt": 3}', "did you mean 'max_attempts'?"),
        ('{"request": {"model": "m", "messages": [{}]}}', 'add "v": 2'),
        ('{"v": 2, "model": "m", "messages": [{}]}', "'model' belongs in 'request'"),
        ('{"v": 2, "request": []}', "request: must be an object"),
        ("[]", "a job is a JSON object"),
    ],
)
def test_a_wrong_job_file_is_one_line_that_names_the_mistake(
    here: Callable[..., Done], tmp_path: Path, text: str, message: str
):
    file = tmp_path / "job.json"
    file.write_text(text)
    done = here("submit", "--file", str(file))
    assert done.returncode == INVALID
    assert message in one_line(done)


def test_a_key_that_belongs_to_another_request_is_refused(cluster: Cluster):
    options = ["submit", "--model", "m", "--idempotency-key", "order-1", "-m"]
    assert keepstream(cluster, *options, "Hi").stdout == keepstream(cluster, *options, "Hi").stdout
    done = keepstream(cluster, *options, "Bye")
    assert done.returncode == INVALID
    assert "use a new key" in one_line(done)


@pytest.mark.parametrize("command", ["get", "cancel", "retry"])
def test_an_unknown_job_is_not_found(cluster: Cluster, command: str):
    done = keepstream(cluster, command, "no-such-job")
    assert done.returncode == NOT_FOUND
    assert "no job no-such-job" in one_line(done)


# -- a deployment that is not as it must be -------------------------------------------------------


def test_an_unmigrated_database_is_named_with_what_to_type(cluster: Cluster, tmp_path: Path):
    env = environment(KEEPSTREAM_REDIS_URL=cluster.valkey.url, KEEPSTREAM_DATABASE_URL=sqlite_url(tmp_path / "new.db"))
    for command in (["list"], ["worker"], ["worker", "--processes", "2"]):
        done = run(env, *command)
        assert done.returncode == UNAVAILABLE
        assert "keepstream migrate" in one_line(done)
    assert run(env, "migrate", "--check").returncode == UNSUCCESSFUL
    first, second = run(env, "migrate", "--json"), run(env, "migrate")
    assert json.loads(first.stdout)["before"] is None
    assert first.returncode == second.returncode == run(env, "migrate", "--check").returncode == OK
    assert run(env, "list").stdout == "No such jobs.\n"


LOOKING = (
    "get x",
    "list",
    "top",
    "top --json",
    "limits",
    "rejected",
    "cancel x",
    "retry x",
    "doctor",
    "migrate --check",
)


@pytest.mark.parametrize("command", [*LOOKING, "worker", "purge --older-than 1d --all-tenants --yes", "follow x"])
def test_where_there_is_no_database_none_is_made(tmp_path: Path, command: str):
    done = run(environment(KEEPSTREAM_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0"), *command.split(), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    if command in ("doctor", "migrate --check"):
        assert done.returncode == UNSUCCESSFUL
        return
    assert done.returncode == UNAVAILABLE
    said = one_line(done)
    assert re.search("there is no (database|file)", said)
    assert said.endswith("run `keepstream migrate`, or set KEEPSTREAM_DATABASE_URL\n")


@pytest.mark.parametrize("command", ["get x", "list", "top", "limits", "rejected", "keys list", "retry x"])
def test_a_database_without_tables_is_named_with_what_to_type(tmp_path: Path, command: str):
    (tmp_path / "keepstream.db").touch()
    env = environment(KEEPSTREAM_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    done = run(env, *command.split(), cwd=tmp_path)
    assert done.returncode == UNAVAILABLE
    assert "the database has no Keepstream tables" in one_line(done)
    assert done.stderr.endswith("run `keepstream migrate`, or set KEEPSTREAM_DATABASE_URL\n")


@pytest.mark.parametrize("command", ["worker", "list", "migrate"])
def test_a_wrong_setting_is_named_without_its_value(command: str):
    done = run(environment(KEEPSTREAM_CONCURRENCY=SECRET), command)
    assert done.returncode == INVALID
    assert "KEEPSTREAM_CONCURRENCY" in one_line(done)


@pytest.mark.parametrize("command", ["worker", "worker --processes 2", "list", "migrate", "demo", "dev"])
def test_a_misspelt_setting_stops_the_start_with_the_nearest_name(tmp_path: Path, command: str):
    done = run(environment(KEEPSTREAM_CONCURENCY=SECRET), *command.split(), cwd=tmp_path)
    assert done.returncode == INVALID
    assert "KEEPSTREAM_CONCURENCY: there is no such setting; did you mean KEEPSTREAM_CONCURRENCY?" in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_providers_file_is_named(cluster: Cluster, tmp_path: Path):
    env = cluster.environment(providers_file=tmp_path / "nowhere.toml")
    done = run(env, "worker")
    assert done.returncode == INVALID
    assert "nowhere.toml" in one_line(done)


@pytest.mark.parametrize("command", [["list"], ["migrate"]])
def test_an_unreachable_database_is_one_line_without_its_password(cluster: Cluster, command: list[str]):
    url = f"postgresql://user:{SECRET}@127.0.0.1:{free_port()}/db"
    done = run(environment(KEEPSTREAM_REDIS_URL=cluster.valkey.url, KEEPSTREAM_DATABASE_URL=url), *command)
    assert done.returncode == UNAVAILABLE
    assert re.search("KEEPSTREAM_DATABASE_URL|keepstream doctor", one_line(done))


def test_a_worker_process_says_in_one_line_that_its_database_url_cannot_be_used():
    done = subprocess.run(
        python_module("keepstream_worker.app"),
        env=environment(KEEPSTREAM_DATABASE_URL=f"postgresql://user:{SECRET}@host:port/name"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert SECRET not in done.stderr
    assert "the database URL cannot be used" in one_line(done)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_unreachable_redis_stops_the_start_of_a_worker(cluster: Cluster, processes: str):
    env = cluster.environment(redis_url=f"redis://:{SECRET}@127.0.0.1:{free_port()}/0")
    done = run(env, "worker", "--processes", processes)
    assert done.returncode == UNAVAILABLE
    assert "KEEPSTREAM_REDIS_URL" in one_line(done)


def test_a_job_submitted_while_redis_is_away_is_kept(cluster: Cluster):
    env = cluster.environment(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    done = run(env, "submit", "--model", "m", "-m", "Hi")
    assert done.returncode == OK
    assert cluster.wait_for(done.stdout.strip()).status == "completed"  # sent by the sweeper of the cluster's worker


# -- doctor ---------------------------------------------------------------------------------------


def findings(done: Done) -> dict[str, str]:
    return {check["check"]: check["severity"] for check in json.loads(done.stdout)["checks"]}


def test_the_doctor_finds_a_healthy_deployment_healthy(cluster: Cluster):
    done = keepstream(cluster, "doctor", "--json")
    assert done.returncode == OK
    expected = dict.fromkeys(("settings", "redis", "database", "workers", "jobs", "provider default"), "ok")
    assert expected.items() <= findings(done).items()
    quick = keepstream(cluster, "doctor", "--quick", "--json")
    assert (quick.returncode, findings(quick)) == (
        OK,
        dict.fromkeys(("settings", "redis", "database", "worker"), "ok"),
    )


def test_the_doctor_says_what_is_wrong_and_what_to_do(tmp_path: Path):
    env = environment(
        KEEPSTREAM_REDIS_URL=f"redis://:{SECRET}@127.0.0.1:{free_port()}/0",
        KEEPSTREAM_DATABASE_URL=sqlite_url(tmp_path / "new.db"),
    )
    done = run(env, "doctor")
    assert done.returncode == UNSUCCESSFUL
    assert all(advice in done.stdout for advice in ("KEEPSTREAM_REDIS_URL", "keepstream migrate", "OPENAI_API_KEY"))
    run(env, "migrate")
    checks = findings(run(env, "doctor", "--json"))
    assert {"redis": "fail", "database": "ok", "workers": "warn"}.items() <= checks.items()
    assert findings(run(env, "doctor", "--quick", "--json"))["worker"] == "fail"


def test_the_doctor_names_a_misspelt_setting(cluster: Cluster):
    done = run(cluster.environment() | {"KEEPSTREAM_CONCURENCY": "7"}, "doctor")
    assert done.returncode == UNSUCCESSFUL
    assert "did you mean KEEPSTREAM_CONCURRENCY?" in " ".join(done.stdout.split())


def test_the_doctor_meets_a_provider_that_refuses_the_key(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEEPSTREAM_SCRIPTED_API_KEY", "the right one")
    with EmbeddedProvider() as provider:
        env = cluster.environment() | {
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_API_KEY": SECRET,
        }
        done = run(env, "doctor", "--json")
    assert (done.returncode, findings(done)["provider default"]) == (UNSUCCESSFUL, "fail")


def test_the_doctor_warns_of_a_limit_that_is_hardly_meant(cluster: Cluster, tmp_path: Path):
    file = tmp_path / "providers.toml"
    file.write_text("[providers.default]\ntokens_per_minute = 10\n")
    done = run(cluster.environment() | {"KEEPSTREAM_PROVIDERS_FILE": str(file)}, "doctor", "--json")
    assert (done.returncode, findings(done)["limits"]) == (OK, "warn")


def test_the_doctor_names_a_transaction_that_stays_open(
    here: Callable[..., Done], cluster: Cluster, postgres_url: str, monkeypatch: pytest.MonkeyPatch
):
    engine = make_engine(postgres_url, "nightly-report")
    schema.migrate(engine)
    for name, value in (cluster.environment() | {"KEEPSTREAM_DATABASE_URL": postgres_url}).items():
        monkeypatch.setenv(name, value)

    def transactions() -> dict[str, Any]:
        checks = json.loads(here("doctor", "--json").stdout)["checks"]
        (check,) = (check for check in checks if check["check"] == "transactions")
        return dict(check)

    with engine.begin() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        assert transactions()["severity"] == "ok"  # it has just begun
        monkeypatch.setattr(inspection, "LONG_TRANSACTION", 0.0)
        found = transactions()
        assert found["severity"] == "warn"
        assert re.search(
            rf"1 open for long; the oldest for \d+ s: pid {pid}, application 'nightly-report', idle in transaction",
            found["found"],
        )
        assert f"pg_terminate_backend({pid})" in found["advice"]
    assert transactions()["severity"] == "ok"
    engine.dispose()


def test_the_doctor_warns_of_a_redis_that_forgets(cluster: Cluster):
    with redis.Redis.from_url(cluster.valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            done = keepstream(cluster, "doctor", "--quick", "--json")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert (done.returncode, findings(done)["redis"]) == (OK, "warn")


def test_a_rejected_message_is_listed_with_its_reason_and_the_doctor_warns(cluster: Cluster):
    with redis.Redis.from_url(cluster.valkey.url) as client:
        client.lpush(QUEUE, b"no message at all")

    def listed() -> list[dict[str, Any]]:
        return [json.loads(line) for line in keepstream(cluster, "rejected", "--json").stdout.splitlines()]

    assert "not JSON" in wait_until(listed, "the rejected message")[0]["reason"]
    assert "not JSON" in keepstream(cluster, "rejected").stdout
    done = keepstream(cluster, "doctor", "--json")
    assert (done.returncode, findings(done)["rejected"]) == (OK, "warn")


def test_a_job_may_be_for_bulk_and_have_fallbacks(cluster: Cluster):
    options = ["--model", "m", "-m", "Hi", "--bulk", "--fallback", "other/a/b", "--fallback", "default/c"]
    job_id = keepstream(cluster, "submit", *options).stdout.strip()
    assert keepstream(cluster, "follow", job_id).returncode == OK
    with cluster.database() as connection:
        job = stored_job(connection, job_id)
    assert (job.job_class, job.chain) == ("bulk", (("default", "m"), ("other", "a/b"), ("default", "c")))
    document = json.loads(keepstream(cluster, "get", job_id, "--json").stdout)
    assert (document["class"], document["fallbacks"]) == (
        "bulk",
        [{"provider": "other", "model": "a/b"}, {"provider": "default", "model": "c"}],
    )
    shown = run(cluster.environment() | {"COLUMNS": "80"}, "get", job_id).stdout
    assert "class      bulk" in shown
    assert "fallbacks  other/a/b, default/c" in shown
    assert re.search(r"1 first +finished +default/m", shown)
    (listed,) = (json.loads(line) for line in keepstream(cluster, "list", "--json", "--limit", "1").stdout.splitlines())
    assert (listed["id"], listed["class"]) == (job_id, "bulk")


def test_purge_deletes_old_jobs_of_one_tenant(cluster: Cluster):
    job_id = keepstream(cluster, "submit", "--model", "m", "-m", "Hi", "--tenant", "t1").stdout.strip()
    assert keepstream(cluster, "follow", job_id, "--tenant", "t1").returncode == OK
    done = keepstream(cluster, "purge", "--older-than", "1h", "--tenant", "t1")
    assert done.stdout == "deleted 0 jobs and 0 rejected messages\n"

    def deleted() -> bool:  # the job is announced a moment after its end
        done = keepstream(cluster, "purge", "--older-than", "0s", "--tenant", "t1", "--json")
        return bool(json.loads(done.stdout) == {"jobs": 1, "rejected_messages": 0})

    def would_delete() -> bool:
        done = keepstream(cluster, "purge", "--older-than", "0s", "--tenant", "t1", "--dry-run", "--json")
        return bool(json.loads(done.stdout) == {"jobs": 1, "rejected_messages": 0})

    wait_until(would_delete, "the job to be announced")
    assert keepstream(cluster, "get", job_id, "--tenant", "t1").returncode == OK
    wait_until(deleted, "the job to be deleted")
    assert keepstream(cluster, "get", job_id, "--tenant", "t1").returncode == NOT_FOUND


def test_purge_counts_all_that_it_deleted_in_its_many_steps(cluster: Cluster):
    with cluster.database() as connection:
        old = {"tenant": "t2", "rejected_at": seconds_from_now(-7200), "reason": "not JSON", "size": 3}
        for number in range(1201):
            connection.execute(rejected_messages.insert().values(id=f"t2-{number}", **old))
    purge = ["purge", "--older-than", "1h", "--tenant", "t2", "--json"]
    assert json.loads(keepstream(cluster, *purge, "--dry-run").stdout) == {"jobs": 0, "rejected_messages": 1201}
    assert json.loads(keepstream(cluster, *purge).stdout) == {"jobs": 0, "rejected_messages": 1201}
    assert json.loads(keepstream(cluster, *purge).stdout) == {"jobs": 0, "rejected_messages": 0}


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", UNSUCCESSFUL, OK), ("y\n", OK, NOT_FOUND)])
def test_purge_asks_first_where_somebody_can_answer(cluster: Cluster, answer: str, code: int, left: int):
    tenant = f"asked-{code}"
    job_id = keepstream(cluster, "submit", "--model", "m", "-m", "Hi", "--tenant", tenant).stdout.strip()
    keepstream(cluster, "follow", job_id, "--tenant", tenant)
    options = ["purge", "--older-than", "0s", "--tenant", tenant]
    wait_until(
        lambda: "would delete 1 job and" in keepstream(cluster, *options, "--dry-run").stdout, "the announcement"
    )
    parent, child = pty.openpty()
    os.write(parent, answer.encode())
    done = subprocess.run(
        [*COMMAND, *options], env=cluster.environment(), stdin=child, capture_output=True, text=True, check=False
    )
    os.close(child)
    os.close(parent)
    assert done.returncode == code
    assert "Delete 1 job and 0 rejected messages?" in done.stderr
    assert keepstream(cluster, "get", job_id, "--tenant", tenant).returncode == left


def test_a_repeated_purge_goes_on_until_it_is_told_to_stop(tmp_path: Path):
    url = sqlite_url(tmp_path / "purged.db")
    env = environment(KEEPSTREAM_DATABASE_URL=url)
    assert run(env, "migrate").returncode == OK
    with started(env, "purge", "--older-than", "1h", "--all-tenants", "--yes", "--every", "1s") as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == "deleted 0 jobs and 0 rejected messages\n"
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == OK


def test_a_repeated_purge_outlasts_an_outage(tmp_path: Path):
    env = environment(KEEPSTREAM_DATABASE_URL=f"postgresql://user:{SECRET}@127.0.0.1:{free_port()}/db")
    with started(env, "purge", "--older-than", "1h", "--all-tenants", "--yes", "--every", "1d") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "the next try is in 60 s" in line
        assert SECRET not in line
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == OK


@pytest.mark.parametrize("options", [[], ["--yes", "--dry-run"]])
def test_a_purge_is_not_repeated_where_somebody_would_be_asked(here: Callable[..., Done], options: list[str]):
    done = here("purge", "--older-than", "1h", "--all-tenants", "--every", "1d", *options)
    assert done.returncode == INVALID
    assert "--every goes with --yes" in one_line(done)


def test_the_schemas_are_printed(here: Callable[..., Done]):
    assert json.loads(here("schema", "job").stdout)["title"] == "Job"
    assert json.loads(here("schema", "asyncapi").stdout)["asyncapi"].startswith("3.")
    assert here("schema", "--check").returncode == OK


# -- processes ------------------------------------------------------------------------------------


def test_several_worker_processes_are_kept_alive_and_end_with_the_supervisor(tmp_path: Path):
    with (
        Cluster(tmp_path, sqlite_url(tmp_path / "keepstream.db")) as cluster,
        redis.Redis.from_url(cluster.valkey.url) as client,
        started(cluster.environment(), "worker", "--processes", "2", "--concurrency", "7") as process,
    ):
        supervisor = psutil.Process(process.pid)

        def at_work() -> list[psutil.Process]:
            listening = client.pubsub_numsub(control_channel())[0][1]
            return supervisor.children() if listening == 2 else []

        victim, survivor = wait_until(at_work, "two workers that listen")
        assert victim.environ()["KEEPSTREAM_CONCURRENCY"] == "7"
        victim.kill()
        replaced = wait_until(
            lambda: [child for child in at_work() if child not in (victim, survivor)], "a new worker process"
        )
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == OK
        assert '"worker_process_ended"' in errors
        assert not any(child.is_running() for child in (survivor, *replaced))


def _read(descriptor: int) -> bytes:
    """Read from a pseudo-terminal, whose end is an error."""
    try:
        return os.read(descriptor, 65_536)
    except OSError:
        return b""
