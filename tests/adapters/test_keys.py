"""Keys that change while a worker runs, with real files, real programs and a server that accepts what it is told to."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from typing_extensions import override

from keepstream.errors import ErrorCode
from keepstream.results import ProviderError
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.providers import keys
from keepstream_worker.providers.config import ProviderConfig, parse_providers
from keepstream_worker.providers.keys import ChangingKey, key_of
from keepstream_worker.providers.provider import Provider, ProviderFailure, Providers, Timeouts
from keepstream_worker.values import Failure
from tests.cluster import PATIENCE

OLD, NEW = "sk-old-4b1d0f7c2a", "sk-new-9e8d7c6b5a"
PATIENT = Timeouts(connect=30.0, first_token=PATIENCE, idle=PATIENCE)
REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "script": {"text": "ok"}}


@pytest.fixture(autouse=True)
def _files_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of a busy machine may take longer to read a file than a request waits for it."""
    monkeypatch.setattr(keys, "_FILE_PATIENCE", PATIENCE)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate(ScriptedProvider):
    """A provider that accepts the keys it is told to, and remembers what it was sent."""

    def __init__(self, *accepted: str) -> None:
        super().__init__()
        self.accepted = set(accepted)
        self.sent: list[str] = []

    @override
    def _is_authorised(self, headers: Mapping[str, str]) -> bool:
        given = headers.get("authorization") or f"api-key {headers.get('api-key')}"
        self.sent.append(given)
        return given.partition(" ")[2] in self.accepted


def configured(lines: str, base_url: str = "http://127.0.0.1:1") -> ProviderConfig:
    where = f'base_url = "{base_url}"' if "kind" not in lines else f'endpoint = "{base_url.removesuffix("/v1")}"'
    return parse_providers(f"[providers.p]\n{where}\n{lines}", {})["p"]


def from_command(source: str, **settings: float) -> str:
    """Settings for a key that a Python program prints."""
    rest = "".join(f"\n{name} = {value}" for name, value in settings.items())
    return f"api_key_command = {json.dumps([sys.executable, '-c', source])}{rest}"


def printing(file: Path, runs: Path) -> str:
    """A program that notes that it runs, and prints what is in a file; it fails without the file."""
    return f'from pathlib import Path; open("{runs}", "a").write("x"); print(Path("{file}").read_text())'


@asynccontextmanager
async def provider_at(server: ScriptedProvider, lines: str) -> AsyncIterator[Provider]:
    providers = Providers({"p": configured(lines, server.base_url)})
    try:
        yield providers.get("p")
    finally:
        await providers.aclose()


@asynccontextmanager
async def changing_key(lines: str, clock: Clock) -> AsyncIterator[ChangingKey]:
    key = key_of(configured(lines), clock)
    assert isinstance(key, ChangingKey)
    try:
        yield key
    finally:
        await key.aclose()


async def ask(provider: Provider) -> None:
    async with provider.stream(REQUEST, PATIENT) as stream:
        async for _ in stream:
            stream.note_data()


async def failure_of(key: ChangingKey) -> Failure:
    with pytest.raises(ProviderFailure) as caught:
        await key.current()
    return caught.value.failure


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
            await asyncio.sleep(0.01)


def ended(pid: str) -> bool:
    """Whether a process has ended; one that was adopted may be left as a zombie."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def mount(directory: Path, key: str) -> Path:
    """Put a key into a directory as Kubernetes does, where the file never changes, but a link to its directory does."""
    version = directory / f"..{len(list(directory.iterdir()))}"
    version.mkdir()
    (version / "key").write_text(key + "\n")
    link, file = directory / "..data", directory / "key"
    (directory / "..data_tmp").symlink_to(version.name)
    (directory / "..data_tmp").rename(link)
    if not file.is_symlink():
        file.symlink_to("..data/key")
    return file


# -- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kubernetes", "renamed", "in place"])
async def test_a_key_file_that_changes_is_read_anew_however_it_was_changed(tmp_path: Path, way: str) -> None:
    file = mount(tmp_path, OLD)
    before = file.stat()
    clock = Clock()
    async with changing_key(f'api_key_file = "{file}"', clock) as key:
        assert await key.current() == OLD
        match way:
            case "kubernetes":
                mount(tmp_path, NEW)
            case "renamed":
                (tmp_path / "new").write_text(NEW)
                (tmp_path / "new").rename(file)
            case _:
                file.write_text(NEW + "\n")  # the same size, and perhaps the same time
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        clock.now += 1.0
        with structlog.testing.capture_logs() as said:
            assert await key.current() == NEW
    assert [(line["event"], line["provider"]) for line in said] == [("key_changed", "p")]
    assert NEW not in str(said)


async def test_a_refused_key_is_read_anew_and_the_request_repeated_if_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(OLD)
    async with Gate(OLD) as server, provider_at(server, f'api_key_file = "{file}"') as provider:
        await ask(provider)
        file.write_text(NEW)
        server.accepted = {NEW}
        await ask(provider)
        assert server.sent[0] == f"Bearer {OLD}"
        assert server.sent[-1] == f"Bearer {NEW}"

        server.accepted = set()
        asked = len(server.sent)
        with pytest.raises(ProviderFailure) as caught:
            await ask(provider)
    assert caught.value.failure.code is ErrorCode.AUTH
    assert caught.value.failure.http_status == 401
    assert len(server.sent) == asked + 1, "an unchanged key is not sent again"


async def test_the_responses_api_and_the_doctors_question_get_the_new_key_too(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(OLD)
    async with Gate(OLD) as server, provider_at(server, f'api_key_file = "{file}"\napi = "responses"') as provider:
        await ask(provider)
        file.write_text(NEW)
        server.accepted = {NEW}
        await ask(provider)
        file.write_text(OLD)
        server.accepted = {OLD}
        check = await provider.check()
    assert check.ok
    assert check.line.endswith(f"; its key is that of file {file}")


async def test_a_file_that_is_gone_is_told_once_and_the_old_key_used(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(OLD)
    clock = Clock()
    async with changing_key(f'api_key_file = "{file}"', clock) as key:
        assert await key.current() == OLD
        file.unlink()
        with structlog.testing.capture_logs() as said:
            for _ in range(3):
                clock.now += 100.0
                assert await key.current() == OLD
            file.write_text(NEW)
            clock.now += 100.0
            assert await key.current() == NEW
    assert [line["event"] for line in said] == ["key_unreadable", "key_readable"]
    assert said[0]["reason"] == f"its key file {file} cannot be read (No such file or directory)"
    assert said[0]["advice"] == "put the key there, readable for the worker's user"
    assert said[0]["meanwhile"] == "the key that was read before is used"
    assert said[1]["lasted"] == 300.0


async def test_without_any_key_a_job_may_try_again_and_is_told_why(tmp_path: Path) -> None:
    async with changing_key(f'api_key_file = "{tmp_path / "key"}"', Clock()) as key:
        failure = await failure_of(key)
        assert (failure.code, failure.should_retry) == (ErrorCode.AUTH, True)
        assert failure.message == (
            f"provider 'p' has no key: its key file {tmp_path / 'key'} cannot be read (No such file or directory); "
            "put the key there, readable for the worker's user"
        )
        (tmp_path / "key").write_text(NEW)
        assert await key.current() == NEW


async def test_a_file_server_that_hangs_holds_up_no_request_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_FILE_PATIENCE", 1.0)
    file = tmp_path / "key"
    file.write_text(OLD)
    clock = Clock()
    async with changing_key(f'api_key_file = "{file}"', clock) as key:
        assert await key.current() == OLD
        file.unlink()
        os.mkfifo(file)  # opening it waits for a writer
        clock.now += 1.0
        assert await asyncio.gather(*[key.current() for _ in range(20)]) == [OLD] * 20
        writer = await asyncio.to_thread(file.open, "w")  # opens only because a reader waits: a single one
        writer.write(NEW)
        writer.close()
        file.unlink()
        file.write_text(NEW)
        assert await key.other_than(OLD) == NEW


# -- commands -----------------------------------------------------------------------------------------


async def test_one_run_serves_all_streams_and_the_next_comes_before_the_time_is_over(tmp_path: Path) -> None:
    file, runs = tmp_path / "key", tmp_path / "runs"
    file.write_text(OLD)
    clock = Clock()
    async with changing_key(from_command(printing(file, runs), api_key_valid=1000), clock) as key:
        assert await asyncio.gather(*[key.current() for _ in range(50)]) == [OLD] * 50
        clock.now += 799.0
        assert await key.current() == OLD
        assert runs.read_text() == "x"

        file.write_text(NEW)
        clock.now += 2.0
        assert await asyncio.gather(*[key.current() for _ in range(50)]) == [OLD] * 50, "none waits for the run"
        reading = key._reading
        assert reading is not None
        await asyncio.wait({reading}, timeout=PATIENCE)
        assert await key.current() == NEW
        assert runs.read_text() == "xx"

        file.write_text(OLD)
        clock.now += 1000.0
        assert await key.current() == OLD, "a key whose time is over is used no more"


async def test_a_failing_command_is_told_once_and_its_key_used_until_its_time_is_over(tmp_path: Path) -> None:
    file, runs = tmp_path / "key", tmp_path / "runs"
    file.write_text(OLD)
    clock = Clock()
    async with changing_key(from_command(printing(file, runs), api_key_valid=1000), clock) as key:
        assert await key.current() == OLD
        file.unlink()
        with structlog.testing.capture_logs() as said:
            for _ in range(3):
                clock.now += 300.0
                assert await key.current() == OLD
                if key._reading is not None:
                    await asyncio.wait({key._reading}, timeout=PATIENCE)
            assert runs.read_text() == "xx"
            clock.now += 300.0
            failure = await failure_of(key)
            assert await failure_of(key) == failure
            assert runs.read_text() == "xxx", "it does not run for every request"
            file.write_text(NEW)
            clock.now += 10.0
            assert await key.current() == NEW
    name = Path(sys.executable).name
    assert failure.should_retry
    assert failure.message.startswith(
        f"provider 'p' has no key: its key command '{name}' failed (exit code 1); run it as"
    )
    assert [line["event"] for line in said] == ["key_unreadable", "key_readable"]
    assert not [word for word in (OLD, NEW, "import", str(tmp_path)) if word in str(said)]


async def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_COMMAND_SECONDS", 0.5)
    pids = tmp_path / "pids"
    lines = f"api_key_command = ['/bin/sh', '-c', 'sleep 600 & echo $$ $! > {pids}; wait']"
    async with changing_key(lines, Clock()) as key:
        failure = await failure_of(key)
    assert "its key command 'sh' did not end within 0.5 s" in failure.message
    if pids.exists():  # on a busy machine it may have been ended before
        await until(lambda: all(map(ended, pids.read_text().split())))


async def test_a_run_that_is_under_way_ends_with_the_worker(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    lines = f"api_key_command = ['/bin/sh', '-c', 'echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 600']"
    async with changing_key(lines, Clock()) as key:
        waiting = asyncio.create_task(key.current())
        await until(pid.exists)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert not ended(pid.read_text().strip()), "others may wait for it"
    await until(lambda: ended(pid.read_text().strip()))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "printed nothing"),
        ("print('two words')", "printed something that is no key"),
        ('print(\'{"accessToken":"eyJsecret"}\')', "printed something that is no key"),
        ("import os; os.write(1, b'\\xff\\x00secret')", "printed something that is no key"),
        # More at once than an event loop keeps: Linux's largest pipe, full.
        (
            "import fcntl, os; fcntl.fcntl(1, 1031, 1 << 20)\nwhile True: os.write(1, b'secret' * 200_000)",
            "printed something that is no key",
        ),
        ("print('secret'); raise SystemExit(3)", "failed (exit code 3)"),
        ("import os; os.kill(os.getpid(), 15)", "failed (signal 15)"),
    ],
)
async def test_what_a_command_prints_instead_of_a_key_is_never_repeated(source: str, words: str) -> None:
    with structlog.testing.capture_logs() as said:
        async with changing_key(from_command(source), Clock()) as key:
            failure = await failure_of(key)
    assert words in failure.message
    assert "secret" not in failure.message + str(said)


async def test_a_command_that_is_not_there_is_told_by_its_name() -> None:
    async with changing_key("api_key_command = ['/nowhere/print-key', '--tenant', 'x']", Clock()) as key:
        failure = await failure_of(key)
    assert "its key command 'print-key' cannot be run (No such file or directory)" in failure.message


async def test_a_refused_key_runs_the_command_again_once_for_all_streams(tmp_path: Path) -> None:
    file, runs = tmp_path / "key", tmp_path / "runs"
    file.write_text(OLD)
    clock = Clock()
    async with changing_key(from_command(printing(file, runs)), clock) as key:
        assert await key.current() == OLD
        file.write_text(NEW)
        clock.now += 10.0
        assert await asyncio.gather(*[key.other_than(OLD) for _ in range(50)]) == [NEW] * 50
        assert await key.other_than(NEW) is None, "it has only just run"
        assert runs.read_text() == "xx"


# -- what is sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "sent"),
    [
        ("", f"Bearer {OLD}"),
        ('api_key_header = "api-key"', f"api-key {OLD}"),
        ('kind = "azure"\napi_version = "v"', f"api-key {OLD}"),
        ('kind = "azure"\napi_version = "v"\napi_key_header = "authorization"', f"Bearer {OLD}"),
    ],
)
async def test_azure_gets_a_key_in_its_own_header_and_a_token_of_entra_as_a_bearer(
    tmp_path: Path, lines: str, sent: str
) -> None:
    (tmp_path / "key").write_text(OLD)
    async with Gate(OLD) as server, provider_at(server, f'{lines}\napi_key_file = "{tmp_path / "key"}"') as provider:
        await ask(provider)
    assert server.sent == [sent]
    names = {"authorization", "api-key", "x-api-key"} & server.requests[0].headers.keys()
    assert len(names) == 1


async def test_old_and_new_keys_are_removed_from_what_the_provider_says(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("plain-old-word")
    async with (
        Gate("plain-old-word") as server,
        provider_at(server, f'api_key_file = "{tmp_path / "key"}"') as provider,
    ):
        await ask(provider)
        (tmp_path / "key").write_text("plain-new-word")
        server.accepted = {"plain-new-word"}
        await ask(provider)
        words = ProviderError(message="not plain-old-word but plain-new-word")
        failure = provider.scrubbed(Failure(ErrorCode.AUTH, "refused", provider_error=words))
    assert failure.provider_error is not None
    assert failure.provider_error.message == "not [removed] but [removed]"
