"""Play provider streams to a real worker, and compare what it stored and published with what is expected.

In: files of cases, one JSON object per line (default: those beside this one; the ``hard`` ones are made up, each to
be as awkward as a rule allows).
Out: each failing case with expected and actual values, then ``N passed, N failed``; exit code 0 if all passed, 1 if
not, 2 if the cases cannot be played.

This covers the whole path: HTTP, decoder, accumulator, events, database, retry decision.

A case may have ``api``, the dialect in which the provider is asked (default: ``chat``). It has ``http_status`` (0: the
connection drops before the headers), ``headers``, ``chunks`` (the writes of the body; ``{"b64": …}`` holds bytes that
are not UTF-8), ``close`` (``clean``, ``reset`` or ``stall``) and ``expect``: the ``outcome`` of the only attempt
(``completed``, ``retry``, ``fail``) and, if given, ``error_code``, ``content``, ``reasoning``, ``refusal``,
``finish_reason``, ``tool_calls`` of the lowest choice (a call without ``id`` accepts any), and ``usage`` as a subset.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keepstream import AsyncClient
from keepstream.client.database import make_engine
from keepstream.errors import KeepstreamError
from keepstream.events import AttemptFailed, AttemptStarted, ChoiceSnapshot
from keepstream.results import Choice, CompletionResult, JobStatus, ToolCall, Usage, output_sha256
from keepstream.transcript import Transcript
from keepstream_worker.dev_stack.embedded import EmbeddedProvider, EmbeddedServiceError, EmbeddedValkey, sqlite_url
from keepstream_worker.store import schema

CASES: Final = tuple(
    Path(__file__).with_name(f"{prefix}{name}_cases.jsonl") for prefix in ("", "hard_") for name in ("sse", "responses")
)
_APIS: Final = ("chat", "responses")
OUTCOMES: Final = ("completed", "retry", "fail")

_STALL_SECONDS: Final = 2.0  #: What a stream gets that stalls.
_SILENCE_SECONDS: Final = 30.0  #: What all others get; more than the machine ever stalls by itself.
_USAGE_SECONDS: Final = 1.0
_CASE_SECONDS: Final = 60.0  #: Seconds after which a case counts as hung.
_AT_ONCE: Final = 40
_STOP_SECONDS: Final = 15.0
_SHOWN: Final = 300  #: Characters of a value in a report.
_RESPONSE_KEYS: Final = ("http_status", "headers", "chunks", "close")
_TEXTS: Final = ("content", "reasoning", "refusal")
_TOKENS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")


class CasesError(Exception):
    """The file of cases is invalid; the message names file and line."""


class WorkerError(Exception):
    """The worker did not start, or died."""


@dataclass(frozen=True, slots=True)
class Case:
    """One stream and its expected result."""

    name: str
    response: dict[str, Any]
    expect: dict[str, Any]
    api: str = "chat"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the worker made of a case."""

    result: CompletionResult
    transcript: Transcript  #: Its state at the end.
    streamed: list[ChoiceSnapshot]  #: The attempt's output according to its events, before a failure made it void.


def load_cases(file: Path) -> list[Case]:
    """Return the cases in ``file``.

    Raises:
        CasesError: the file cannot be read, or a line is no case.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CasesError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    cases = [_parse_case(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not cases:
        raise CasesError(f"{file}: holds no cases")
    return cases


def _parse_case(line: str, where: str) -> Case:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise CasesError(f"{where}: not a JSON object") from None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise CasesError(f"{where}: a case is a JSON object with a 'name'")
    expect = data.get("expect")
    if not isinstance(expect, dict) or expect.get("outcome") not in OUTCOMES:
        raise CasesError(f"{where}: 'expect' needs an 'outcome': {', '.join(OUTCOMES)}")
    if not isinstance(data.get("chunks"), list):
        raise CasesError(f"{where}: 'chunks' must be a list of writes")
    api = data.get("api", "chat")
    if api not in _APIS:
        raise CasesError(f"{where}: 'api' is one of {', '.join(_APIS)}")
    return Case(data["name"], {key: data[key] for key in _RESPONSE_KEYS if key in data}, expect, api)


# -- comparing ------------------------------------------------------------------------------------


def compare(expect: Mapping[str, Any], seen: Seen) -> list[str]:
    """Return a line for each difference between what was expected and what the worker stored and published."""
    result = seen.result
    choice = min(result.choices, key=lambda choice: choice.index, default=Choice(index=0))
    got: dict[str, Any] = {
        "outcome": _outcome(result),
        "error_code": result.attempts[0].error.code if result.attempts and result.attempts[0].error else None,
        "finish_reason": choice.finish_reason,
        **{key: getattr(choice, key) for key in _TEXTS},
    }
    problems = []
    for key, value in expect.items():
        if key == "tool_calls":
            problems += _compare_calls(value, choice.tool_calls)
        elif key == "usage":
            problems += _compare_usage(value, result.usage)
        elif key not in got:
            problems.append(f"expect.{key}: the runner knows no such thing")
        elif got[key] != value:
            problems.append(_difference(key, value, got[key]))
    return problems + _compare_events(seen)


def _outcome(result: CompletionResult) -> str:
    if result.status is JobStatus.COMPLETED:
        return "completed"
    if result.status is JobStatus.FAILED and len(result.attempts) == 1:
        return "retry" if result.attempts[0].retryable else "fail"
    if result.status is JobStatus.CANCELLED and result.attempts and result.attempts[0].retryable:
        return "retry"
    return f"{result.status} after {len(result.attempts)} attempts"


def _compare_calls(expected: Sequence[Mapping[str, Any]], calls: Sequence[ToolCall]) -> list[str]:
    problems = []
    if len(expected) != len(calls):
        problems.append(_difference("number of tool calls", len(expected), len(calls)))
    for position, (want, call) in enumerate(zip(expected, calls, strict=False)):
        got = {"index": position, **call.model_dump()}
        problems += [
            _difference(f"tool_calls[{position}].{key}", value, got.get(key))
            for key, value in want.items()
            if got.get(key) != value
        ]
        if not call.id:
            problems.append(_difference(f"tool_calls[{position}].id", "any", call.id))
    return problems


def _compare_usage(expected: Mapping[str, Any] | None, usage: Usage | None) -> list[str]:
    got = {key: getattr(usage, key) for key in _TOKENS} if usage else {}
    if expected is None:
        return [_difference("usage", None, got)] if any(value is not None for value in got.values()) else []
    reported = {**(usage.details or {}), **got} if usage else {}
    return [] if _is_subset(expected, reported) else [_difference("usage", expected, reported)]


def _is_subset(expected: object, got: object) -> bool:
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        return all(key in got and _is_subset(value, got[key]) for key, value in expected.items())
    return expected == got


def _compare_events(seen: Seen) -> list[str]:
    """The events must agree with the row, and end with its status."""
    result, terminal = seen.result, seen.transcript.terminal
    if terminal is None:
        return ["events: there is no terminal event"]
    problems = []
    if terminal.status is not result.status:
        problems.append(_difference("events: status", result.status, terminal.status))
    if terminal.id != result.terminal_event_id:
        problems.append(_difference("events: terminal event", result.terminal_event_id, terminal.id))
    stored = {choice.index: _output(choice) for choice in result.choices if any(_output(choice))}
    streamed = {choice.index: _output(choice) for choice in seen.streamed if any(_output(choice))}
    if stored != streamed:
        problems.append(_difference("events: output", stored, streamed))
    digest = output_sha256(choice.content for choice in sorted(result.choices, key=lambda choice: choice.index))
    if terminal.output_sha256 != digest:
        problems.append(_difference("events: output_sha256", digest, terminal.output_sha256))
    return problems


def _output(choice: Choice | ChoiceSnapshot) -> tuple[object, ...]:
    calls = tuple((call.id, call.name, call.arguments) for call in choice.tool_calls)
    return (*(getattr(choice, key) for key in _TEXTS), calls)


def _difference(what: str, expected: object, got: object) -> str:
    return f"{what}: expected {_short(expected)}, got {_short(got)}"


def _short(value: object) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


# -- playing --------------------------------------------------------------------------------------


async def play(client: AsyncClient, case: Case) -> Seen:
    """Enqueue ``case`` as a job with one attempt, follow it to its end and return the result.

    What costs no attempt, such as a 429, would be tried for as long as the job may live: it is cancelled then.
    """
    silence = _STALL_SECONDS if case.response.get("close") == "stall" else _SILENCE_SECONDS
    job_id = await client.enqueue(
        {
            "model": case.name,  # a target of its own: what a provider refuses or breaks closes its target for a while
            "messages": [{"role": "user", "content": case.name}],
            "script": {"raw": case.response},
        },
        provider=case.api,
        max_attempts=1,
        first_token_timeout=silence,
        idle_timeout=silence,
    )
    transcript = Transcript()
    streamed: list[ChoiceSnapshot] | None = None
    async for event in client.follow(job_id, timeout=_CASE_SECONDS):
        if isinstance(event, AttemptStarted):
            streamed = None  # begun before it could be cancelled: what was streamed before it is in no row
        if isinstance(event, AttemptFailed):
            streamed = transcript.choices
            if event.retry_in is not None:
                await client.cancel(job_id)
        transcript.apply(event)
    result = await client.get(job_id)
    if result is None:
        raise WorkerError(f"{case.name}: there is no row")
    return Seen(result, transcript, transcript.choices if streamed is None else streamed)


async def run(cases: Sequence[Case], client: AsyncClient) -> int:
    """Play all cases, report on standard output, and return how many failed."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def problems_of(case: Case) -> list[str]:
        async with gate:
            try:
                async with asyncio.timeout(_CASE_SECONDS):
                    return compare(case.expect, await play(client, case))
            except (KeepstreamError, WorkerError, TimeoutError) as error:
                return [f"not played to its end: {type(error).__name__} {error}"]

    failed = 0
    for case, problems in zip(cases, await asyncio.gather(*map(problems_of, cases)), strict=True):
        if problems:
            failed += 1
            sys.stdout.write("\n  ".join([f"FAILED {case.name}", *problems]) + "\n")
    sys.stdout.write(f"{len(cases) - failed} passed, {failed} failed\n")
    return failed


@contextlib.contextmanager
def worker_process(environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run a real worker process meanwhile; raise ``WorkerError`` with the end of its log if it dies."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KEEPSTREAM_", "OPENAI_", "AZURE_")) and not name.lower().endswith("_proxy")
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "keepstream_worker.app"],
            cwd=Path(__file__).parents[2],
            env={**inherited, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
            if process.poll() is not None:
                raise WorkerError(f"the worker ended: {log.read_text(errors='replace').strip()[-2000:]}")
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.asynccontextmanager
async def everything_running() -> AsyncIterator[AsyncClient]:
    """Start Valkey, a SQLite database, the scripted provider and a worker; yield a client."""
    with tempfile.TemporaryDirectory(prefix="keepstream-") as directory, EmbeddedValkey() as valkey:
        database_url = sqlite_url(Path(directory, "keepstream.db"))
        engine = make_engine(database_url)
        schema.migrate(engine)
        engine.dispose()
        with EmbeddedProvider() as provider:
            providers = _providers_file(Path(directory), provider.base_url)
            environment = {
                "KEEPSTREAM_PROVIDERS_FILE": str(providers),
                "KEEPSTREAM_REDIS_URL": valkey.url,
                "KEEPSTREAM_DATABASE_URL": database_url,
                "KEEPSTREAM_USAGE_WAIT": str(_USAGE_SECONDS),
            }
            with worker_process(environment, Path(directory, "worker.log")):
                async with AsyncClient(valkey.url, database_url=database_url) as client:
                    yield client


def _providers_file(directory: Path, base_url: str) -> Path:
    """Write a file with one provider for each dialect, and return its path."""
    tables = (f'[providers.{api}]\nbase_url = "{base_url}"\napi = "{api}"\n' for api in _APIS)
    file = directory / "providers.toml"
    file.write_text("".join(tables), encoding="utf-8")
    return file


async def play_files(files: Sequence[Path]) -> int:
    """Play the cases of ``files``; return how many failed."""
    cases = [case for file in files for case in load_cases(file)]
    async with everything_running() as client:
        return await run(cases, client)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and play."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", type=Path, default=CASES, help="default: all of this folder")
    options = parser.parse_args(arguments)
    try:
        return 1 if asyncio.run(play_files(options.cases)) else 0
    except (CasesError, EmbeddedServiceError, WorkerError) as error:
        sys.stderr.write(f"conformance: {error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
