"""The first things that people run, demo and dev: real terminals, real signals, and nothing left behind."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import redis

from keepstream_worker.dev_stack.embedded import EmbeddedProvider, free_port
from keepstream_worker.supervisor import python_module
from tests.cluster import wait_until
from tests.terminal import CTRL_C, Terminal

OK, UNSUCCESSFUL, INVALID, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130
COMMAND = python_module("keepstream_worker.commands")
MARK = "TRY_IT_TEST"  # finds every process that a test has started, whoever is its parent by now
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SHOWN_IN_README = README.partition("```text\n")[2].partition("\n```")[0]
CELERYS_WORDS = re.compile("hitting|shutdown|terminate|celery", re.IGNORECASE)


class Place:
    """Where a test runs: a directory, one for temporary files, and an environment that marks its processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "here"
        self.temporary = directory / "tmp"
        self.directory.mkdir()
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KEEPSTREAM_", "OPENAI_", "COLUMNS", "LINES", "NO_COLOR", "PYTHONDONTWRITE"))
        }
        # Two that look for the usual port at the same time both find it free.
        port = {"KEEPSTREAM_GATEWAY_PORT": str(free_port())}
        self.environment = kept | port | {"TMPDIR": str(self.temporary), MARK: self.mark}

    def processes(self) -> list[psutil.Process]:
        """All processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until_clean(self) -> None:
        """Wait until no process and no temporary file is left."""
        wait_until(lambda: not self.processes(), "all processes to end")
        wait_until(lambda: not list(self.temporary.iterdir()), "all temporary files to be removed")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `keepstream` to its end, without a terminal."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment | environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def terminal(self, *arguments: str, columns: int = 80, environment: Mapping[str, str] | None = None) -> Terminal:
        """Run `keepstream` on a terminal."""
        environment = self.environment | dict(environment or {})
        return Terminal([*COMMAND, *arguments], environment, columns=columns, cwd=self.directory)

    @property
    def env_file(self) -> Path:
        """What `dev` writes for other shells."""
        return self.directory / ".keepstream" / "env"

    def sourced(self) -> dict[str, str]:
        """The variables that a shell has after sourcing it."""
        done = subprocess.run(
            ["/bin/sh", "-c", f". {self.env_file}; env"],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        pairs = (line.split("=", 1) for line in done.stdout.splitlines())
        return {name: value for name, value in pairs if name.startswith(("KEEPSTREAM_", "OPENAI_"))}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for process in place.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()


# -- demo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
def test_the_demo_fits_on_one_screen(place: Place, columns: int, rows: int):
    shell = ["/bin/sh", "-c", 'echo "$ make demo"; echo "Installing ..."; "$@"; code=$?; printf "$ "; exit $code', "sh"]
    with Terminal([*shell, *COMMAND, "demo"], place.environment, columns=columns, rows=rows) as terminal:
        assert terminal.wait() == OK
        lines = terminal.lines
        assert terminal.scrolled_off == []
    assert lines[0] == "$ make demo"
    assert "$" in lines  # the prompt
    for part in (
        r"Keepstream demo: .*scripted provider, no cost",
        r"1  A job goes in, and its answer comes live",
        r'  calls get_weather \{"city":"Zürich"\}',
        r"  ✓ completed · \d+ tokens .* · sha256 matches",
        r"2  Forty more at once on two workers, and one worker is killed",
        r"  worker \d+  ✗ killed \(SIGKILL\) in the middle of \d+ streams",
        r"  worker \d+  ✓ took them over \d+\.\d s later \(lease 1\.5 s\); 40 of 40 completed",
        r"  ✓ median delay beyond the provider's: first delta \d+\.\d ms, later ones \d+\.\d ms",
        r"  ✓ a follower that joined late, \d+ events behind, holds exactly the same text",
        r"    JOIN keepstream_choices ON job_id = id WHERE id = 'demo-1'",
        r"  completed \| [2-9] \| This answer was begun twice.*… \| [0-9a-f]{6}…",
        r"Next: keepstream dev +runs all this and an HTTP API",
    ):
        assert any(re.fullmatch(part, line) for line in lines), (part, lines)
    if columns == 80:
        shown = SHOWN_IN_README.replace(".venv/bin/keepstream", "keepstream")  # which is on the path here
        assert without_numbers("\n".join(lines)).count(without_numbers(shown)) == 1
    place.wait_until_clean()


def without_numbers(text: str) -> str:
    """What is the same in every run; of the second part, which of the workers is killed differs in digits only."""
    return re.sub(r"\d+(\.\d+)?", "#", text)


def test_the_demo_with_a_retry_fits_on_one_screen_too(place: Place):
    with place.terminal("demo", "--cut") as terminal:
        assert terminal.wait() == OK
        assert terminal.scrolled_off == []
        shown = " ".join(" ".join(terminal.lines).split())
    assert "✗ attempt 1 failed: connection: " in shown
    assert "the text above is void; next attempt in" in shown
    assert "holds exactly the same text" in shown


def test_two_demos_at_once_where_everything_is_missing(place: Place):
    """No terminal, no home, no locale, a directory that nobody can write, and a provider that nobody asked for."""
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict", "OPENAI_API_KEY": "sk-mine"}
    environment = place.environment | poor | {"OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"}
    del environment["HOME"]
    demos = [
        subprocess.Popen(
            [*COMMAND, "demo"],
            env=environment,
            cwd="/proc" if sys.platform == "linux" else "/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for demo in demos:
        output, errors = demo.communicate(timeout=180)
        assert (demo.returncode, errors) == (OK, "")
        assert "+ took them over" in output
        assert "\x1b" not in output
        assert "--provider own" in output
    place.wait_until_clean()


def test_the_demo_on_a_narrow_terminal_without_abilities_breaks_no_word(place: Place):
    with place.terminal("demo", columns=44, environment={"TERM": "dumb", "NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == OK
        assert b"\x1b" not in terminal.written
        words = terminal.text.split()
    assert max(map(len, terminal.text.splitlines())) <= 44
    for word in ("completed", "keepstream_choices", "beyond", "exactly", "database"):
        assert any(word in shown for shown in words), word


@pytest.mark.parametrize(
    "moment", ["Starting Valkey", "1  A job goes in", "calls get_weather", "2  Forty more", "killed (SIGKILL)"]
)
def test_ctrl_c_ends_the_demo_and_leaves_nothing(place: Place, moment: str):
    with place.terminal("demo") as terminal:
        terminal.wait_for(moment)
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
        assert "Traceback" not in terminal.text
    place.wait_until_clean()


def test_ctrl_c_before_the_program_is_loaded_is_no_traceback(place: Place):
    script = (
        "import os, signal, sys, threading\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from keepstream_worker.commands.entry import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "demo"], env=place.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (INTERRUPTED, "")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_ended_leaves_nothing(place: Place, signum: signal.Signals):
    with place.terminal("demo") as terminal:
        terminal.wait_for("2  Forty more")
        os.kill(terminal.process.pid, signum)
        assert terminal.wait() == 128 + signum
    place.wait_until_clean()


def test_the_demo_calls_the_users_provider_only_after_a_yes(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEEPSTREAM_SCRIPTED_API_KEY", "sk-mine")
    own = ("demo", "--provider", "own")
    refused = {
        (*own,): "set OPENAI_API_KEY",
        (*own, "--cut"): "--cut needs the scripted provider",
        ("demo", "--model", "m"): "add --provider own",
    }
    for arguments, message in refused.items():
        done = place.run(*arguments)
        assert (done.returncode, done.stdout) == (INVALID, "")
        assert message in done.stderr
    with EmbeddedProvider() as provider:
        mine = {"OPENAI_API_KEY": "sk-mine", "OPENAI_BASE_URL": provider.base_url}
        unasked = place.run(*own, **mine)
        assert (unasked.returncode, unasked.stdout) == (INVALID, "")
        assert "add --yes" in unasked.stderr
        with place.terminal(*own, environment=mine) as terminal:
            terminal.wait_for("[y/N]")
            terminal.press(b"\n")
            assert terminal.wait() == UNSUCCESSFUL
            assert f"Send one short job to {provider.base_url}, model gpt-5-mini?" in terminal.text
        assert _requests(provider) == 0
        done = place.run(*own, "--yes", "--model", "theirs", **mine)
        assert done.returncode == OK, done.stdout
        assert "your provider, theirs" in done.stdout
        assert _requests(provider) == 1


def test_a_demo_that_fails_shows_the_workers_logs(place: Place):
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    done = place.run("demo", "--provider", "own", "--yes", OPENAI_API_KEY="sk-mine", OPENAI_BASE_URL=nowhere)
    assert done.returncode == UNSUCCESSFUL
    assert "✗ attempt 1 failed: connection" in done.stdout
    assert "name one of its models with --model" in done.stdout
    assert '"attempt_ended"' in done.stdout
    assert "sk-mine" not in done.stdout
    place.wait_until_clean()


def _requests(provider: EmbeddedProvider) -> int:
    with urllib.request.urlopen(provider.base_url.removesuffix("/v1") + "/_stats") as answer:
        return int(re.findall(rb'"requests":\s*(\d+)', answer.read())[0])


# -- dev ------------------------------------------------------------------------------------------


def test_dev_is_used_stopped_and_started_again_in_a_shell_that_has_its_settings(place: Place):
    with place.terminal("dev") as terminal:
        terminal.wait_for("worker_started")
        assert "kept, and unfinished jobs go on" in terminal.text
        assert not any("\x1b" in line for line in place.env_file.read_text().splitlines())
        forgotten = place.run("list")
        assert forgotten.returncode == UNAVAILABLE
        assert "source its settings: . .keepstream/env" in forgotten.stderr
        settings = place.sourced()
        assert all(name.startswith("KEEPSTREAM_") for name in settings)
        submitted = place.run("submit", "--model", "scripted-1", "-m", "Hello!", "--follow", **settings)
        assert submitted.returncode == OK, submitted.stderr
        terminal.wait_for("gateway_started")
        assert settings["KEEPSTREAM_API_KEY"] in terminal.text
        assert submitted.stdout.split()[1] in ask_the_gateway(settings)
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
        output = terminal.text
    assert "worker_stopped" in output
    assert not CELERYS_WORDS.search(output), output
    assert not place.env_file.exists()
    place.wait_until_clean()

    hint = f"the settings of a `keepstream dev` that has ended: start it again, then source {place.env_file}"
    stale = place.run("worker", **settings)
    assert stale.returncode == UNAVAILABLE
    assert hint in stale.stderr
    with place.terminal("submit", "--model", "m", "-m", "Hi", "--follow", environment=settings) as terminal:
        terminal.wait_for("waits for Redis")
        assert hint in terminal.text.replace("\n", "")
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED

    with place.terminal("dev", environment=settings | {"NO_COLOR": "1", "TERM": "dumb"}) as terminal:
        terminal.wait_for("worker_started")
        assert b"\x1b" not in terminal.written
        listed = place.run("list", "--json", **place.sourced())
        assert submitted.stdout.split()[1] in listed.stdout  # the first run's job
        assert place.sourced()["KEEPSTREAM_API_KEY"] == settings["KEEPSTREAM_API_KEY"]
        again = place.run("submit", "--model", "scripted-1", "-m", "Hello!", "--follow", **place.sourced())
        assert again.returncode == OK, again.stdout
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED


def ask_the_gateway(settings: Mapping[str, str]) -> str:
    """What the command that `dev` prints answers."""
    key = f"Authorization: Bearer {settings['KEEPSTREAM_API_KEY']}"
    request = urllib.request.Request(f"{settings['KEEPSTREAM_API_URL']}/api/jobs", headers=dict([key.split(": ")]))
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return str(answer.read(), "utf-8")


def test_dev_fits_on_one_screen(place: Place):
    with place.terminal("dev") as terminal:
        terminal.wait_for("What worker and gateway log:")
        assert terminal.scrolled_off == []
        assert max(map(len, terminal.lines)) <= 80
        terminal.wait_for("worker_started")
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED


def test_a_second_dev_in_the_same_directory_is_refused_and_named_the_first(place: Place):
    with place.terminal("dev") as terminal:
        terminal.wait_for("worker_started")
        before = place.env_file.read_text()
        second = place.run("dev")
        assert (second.returncode, second.stdout) == (INVALID, "")
        address = place.sourced()["KEEPSTREAM_REDIS_URL"]
        assert f"(process {terminal.process.pid}, {address}); to use it: . .keepstream/env;" in second.stderr
        assert place.env_file.read_text() == before
        with place.terminal("dev", "--directory", "other") as other:
            other.wait_for("worker_started")
            other.press(CTRL_C)
            assert other.wait() == INTERRUPTED
        with redis.Redis.from_url(address) as client:
            assert client.ping()
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
    place.wait_until_clean()


def test_a_killed_dev_leaves_no_process_and_no_settings_and_can_be_started_again(place: Place):
    with place.terminal("dev") as terminal:
        terminal.wait_for("worker_started")
        assert len(place.processes()) >= 4
        os.kill(terminal.process.pid, signal.SIGKILL)
        terminal.process.wait()
        place.wait_until_clean()
        wait_until(lambda: not place.env_file.exists(), "the settings to be removed")
    with place.terminal("dev") as terminal:
        terminal.wait_for("worker_started")
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
    place.wait_until_clean()


def test_dev_stops_at_once_when_asked_a_second_time(place: Place):
    # Without the second time it would let the stream finish for longer than anybody waits here.
    with place.terminal("dev", environment={"KEEPSTREAM_SHUTDOWN_GRACE": "600"}) as terminal:
        terminal.wait_for("worker_started")
        submit = ["submit", "--model", "scripted-1", "-m", "Hi", "--param"]
        place.run(*submit, 'script={"deltas": 100000, "rate": 20}', "--id", "long-1", **place.sourced())
        with Terminal([*COMMAND, "follow", "long-1"], place.environment | place.sourced()) as follower:
            follower.wait_for("word word")
            terminal.press(CTRL_C)
            terminal.wait_for("worker_draining")
            terminal.press(CTRL_C)
            assert terminal.wait() == INTERRUPTED
        assert "interrupted=1" in terminal.text
    place.wait_until_clean()


def test_dev_says_in_one_line_that_a_directory_cannot_be_used(place: Place):
    (place.directory / "file").write_text("")
    for directory in ("/proc/keepstream", "file/below", "file"):
        done = place.run("dev", "--directory", directory)
        assert (done.returncode, done.stdout) == (INVALID, "")
        assert done.stderr.startswith("keepstream: ")
        assert done.stderr.count("\n") == 1
        assert directory in done.stderr


def test_dev_with_a_provider_of_ones_own(place: Place):
    done = place.run("dev", "--provider", "own")
    assert done.returncode == INVALID
    assert "set OPENAI_API_KEY" in done.stderr
    with EmbeddedProvider() as provider:
        mine = {"OPENAI_API_KEY": "sk-mine", "OPENAI_BASE_URL": provider.base_url}
        with place.terminal("dev", "--provider", "own", environment=mine) as terminal:
            terminal.wait_for("worker_started")
            submit = ["submit", "--model", "theirs", "-m", "Hi", "--follow"]
            assert place.run(*submit, **place.sourced()).returncode == OK
            assert _requests(provider) == 1
            terminal.press(CTRL_C)
            assert terminal.wait() == INTERRUPTED


def test_dev_says_which_providers_it_uses_and_which_file_it_does_not(place: Place):
    with EmbeddedProvider() as provider:
        file = place.directory / "mine.toml"
        file.write_text(f'[providers.default]\nbase_url = "{provider.base_url}"\n')
        mine = {"KEEPSTREAM_PROVIDERS_FILE": str(file)}
        for arguments, line in (
            ((), f"not used {file} KEEPSTREAM_PROVIDERS_FILE; with it: --provider own"),
            (("--provider", "own"), f"provider yours those of {file}"),
        ):
            with place.terminal("dev", *arguments, columns=200, environment=mine) as terminal:
                terminal.wait_for("worker_started")
                assert line in " ".join(terminal.text.split())
                assert ("scripted" in terminal.text.partition("a scripted provider")[2]) is (arguments == ())
                job = place.run("submit", "--model", "scripted-1", "-m", "Hi", "--follow", **place.sourced())
                assert job.returncode == OK
                assert _requests(provider) == len(arguments) // 2  # it was asked only where it is to be used
                terminal.press(CTRL_C)
                assert terminal.wait() == INTERRUPTED


def test_limits_are_tried_as_the_guide_says(place: Place):
    guide = (Path(__file__).parents[2] / "docs/operations/running.md").read_text(encoding="utf-8")
    recipe = guide.partition("<!-- try limits -->")[2].partition("<!-- /try limits -->")[0]
    start, look = re.findall(r"^```sh\n(.*?)^```$", recipe, re.MULTILINE | re.DOTALL)
    commands = place.directory / "bin"
    commands.mkdir()
    for name, command in (("keepstream", COMMAND), ("python", [sys.executable])):
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (commands / name).chmod(0o755)
    environment = place.environment | {"PATH": f"{commands}:{os.environ['PATH']}"}
    start = start.replace("8099", str(free_port()))
    with Terminal(["/bin/sh", "-c", start], environment, columns=200, cwd=place.directory) as terminal:
        terminal.wait_for("worker_started")
        shown = subprocess.run(
            ["/bin/sh", "-c", look], env=environment, cwd=place.directory, capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r"default +[1-4] of 4 streams", shown)
        assert re.search(r"shop +[12] of 2 jobs", shown)
        assert re.search(r"shop .* tenant shop: 2 of 2 at once|default/m .* provider default: 4 of 4 streams", shown)
        terminal.press(CTRL_C)
        terminal.wait_for("worker_draining")
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
    place.wait_until_clean()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_worker_that_is_told_to_stop_prints_nothing_but_its_log(place: Place, signum: signal.Signals):
    with place.terminal("dev") as terminal:
        terminal.wait_for("worker_started")
        worker = subprocess.Popen(
            [*COMMAND, "worker"],
            env=place.environment | place.sourced(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert worker.stderr is not None
        errors = ""
        while '"worker_started"' not in errors:
            line = worker.stderr.readline()
            assert line, errors
            errors += line
        wait_until(lambda: len(_alive(place)) == 2, "both workers")
        worker.send_signal(signum)
        output, rest = worker.communicate(timeout=60)
        assert (worker.returncode, output) == (OK, "")
        assert all(line.startswith("{") for line in rest.splitlines()), rest
        assert '"worker_stopped"' in rest


def _alive(place: Place) -> list[str]:
    with redis.Redis.from_url(place.sourced()["KEEPSTREAM_REDIS_URL"]) as client:
        return [""] * int(client.pubsub_numsub("keepstream:control")[0][1])
