"""The demo: jobs from the queue to the database through real worker processes, one of which is killed, on one screen.

In: nothing, or a model of the user's own provider.
Out: what happens, on a console, and whether everything ended as it must.
"""

import asyncio
import json
import logging
import math
import os
import sqlite3
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from keepstream import Client
from keepstream.errors import KeepstreamError
from keepstream.results import CompletionResult, JobStatus, output_sha256
from keepstream_worker.commands.demo_crowd import JOBS, ROW_SQL, Crowd, CrowdError, run_crowd
from keepstream_worker.commands.formats import printable, usage_line
from keepstream_worker.commands.live_view import LiveView
from keepstream_worker.commands.output import own_command
from keepstream_worker.dev_stack.guard import Guard
from keepstream_worker.dev_stack.stack import SCRIPTED, DevStack, WorkerProcess, dev_stack

WIDTH: Final = 100  #: Columns, of a wider terminal and of a pipe.

_LEASE: Final = 1.5  #: Seconds; the default is 6, in which a demo would look frozen.
_SETTINGS: Final = {
    "KEEPSTREAM_LEASE": str(_LEASE),
    "KEEPSTREAM_HEARTBEAT_INTERVAL": "0.5",
    "KEEPSTREAM_SWEEP_INTERVAL": "0.2",
}
_PATIENCE: Final = 120.0  #: Seconds without an event; a model that thinks may need them.
_WARM_UP: Final = 4  #: Small jobs before those that are timed: the first of a process imports and connects.
_TIMED: Final = 9
_ROWS: Final = 23  #: Rows of the whole screen with blank lines between its parts, and with what the shell wrote before.
_ROWS_OF_A_RETRY: Final = 4
_FRAMES: Final = 8  #: Updates a second of what moves.

_PROMPT: Final = "Greet the reader in two short sentences, then look up the weather in Zürich."
_TEXT: Final = (
    "Hello! No model is thinking here and nothing is spent: a script comes to you piece by piece, as a model's words "
    "would. Grüße, 你好 and 🌊."
)
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_SCRIPT: Final[dict[str, Any]] = {
    "key": "demo",
    "text": _TEXT,
    "rate": 25,
    "tool_calls": [{"name": "get_weather", "arguments": {"city": "Zürich"}}],
}
_CUT: Final[dict[str, Any]] = {"faults": [{"kind": "cut", "after": 9}]}


def run_demo(console: Console, *, own_model: str | None = None, cut: bool = False) -> bool:
    """Show everything; return whether all jobs ended as they must.

    Args:
        console: Where to.
        own_model: A model of the user's provider, for the first job; None: the scripted provider, which costs nothing.
        cut: Whether the scripted provider breaks off the first job's stream once.

    Raises:
        EmbeddedServiceError: a service or a worker did not start.
        SchemaError: the database could not be migrated.
    """
    logging.getLogger("keepstream").addHandler(logging.NullHandler())  # a client that waits would write over the screen
    with ExitStack() as resources:
        starting = console.status("Starting Valkey, SQLite, a scripted provider and two workers ...", spinner="line")
        with starting if console.is_terminal else nullcontext():
            directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="keepstream-")))
            resources.callback(Guard(directory).release)
            stack = resources.enter_context(dev_stack(directory, own_provider=own_model is not None))
            # No settings but those of the dev stack, so that the demo is the same everywhere.
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTREAM_")}
            workers = [WorkerProcess(stack.environment(inherited) | _SETTINGS) for _ in range(2)]
            for worker in workers:
                resources.callback(worker.close)
                worker.launch()
            for worker in workers:
                worker.wait_until_ready()
            database_url = stack.settings["KEEPSTREAM_DATABASE_URL"]
            client = resources.enter_context(Client(stack.redis_url, database_url=database_url))
            first_delta = _time_first_delta(client, stack)
        demo = _Demo(console, stack, workers, client, own_model=own_model, cut=cut)
        try:
            if demo.show(first_delta):
                return True
        except (KeepstreamError, CrowdError, sqlite3.Error) as error:
            console.print(Text(f"The demo failed: {printable(str(error))}", "bold red"))
        console.print(Text("The end of the workers' logs:", "bold"))
        for worker in workers:
            console.print(Text(printable(worker.log_tail()), "dim"), soft_wrap=True)
        return False


class _Demo:
    """What is shown, part by part."""

    def __init__(
        self,
        console: Console,
        stack: DevStack,
        workers: Sequence[WorkerProcess],
        client: Client,
        *,
        own_model: str | None,
        cut: bool,
    ) -> None:
        self._console = console
        self._stack = stack
        self._workers = workers
        self._client = client
        self._own_model = own_model
        self._cut = cut
        rows = _ROWS + _ROWS_OF_A_RETRY * cut
        self._spacious = not console.is_terminal or console.height >= rows

    def show(self, first_delta: float) -> bool:
        """Show all parts; return whether everything ended as it must. ``first_delta`` is in milliseconds."""
        provider = "scripted provider, no cost" if self._own_model is None else f"your provider, {self._own_model}"
        self._print(("Keepstream demo", "bold"), f": real queue, database and workers; {provider}")
        if not self._show_one_job():
            return False
        crowd = self._show_crowd(first_delta)
        right = crowd.succeeded and self._show_row(crowd)
        self._space()
        command = own_command()
        dev, own = f"{command} dev", f"{command} demo --provider own"
        self._print("Next: ", (f"{dev:{len(own)}}", "cyan"), "  runs all this and an HTTP API")
        self._print("      ", (own, "cyan"), "  asks your own provider")
        return right

    def _show_one_job(self) -> bool:
        self._title("1  A job goes in, and its answer comes live")
        request: dict[str, Any] = {"messages": [{"role": "user", "content": _PROMPT}], "tools": [_TOOL]}
        if self._own_model is None:
            request |= {"model": "scripted-1", "script": _SCRIPT | (_CUT if self._cut else {})}
        else:
            request |= {"model": self._own_model}
        started = time.monotonic()
        job_id = self._client.enqueue(request, max_attempts=2)
        view = LiveView(self._console, wrap=True, output_only=True)
        first: float | None = None
        for event in self._client.follow(job_id, timeout=_PATIENCE):
            if event.type == "delta" and first is None:
                first = time.monotonic() - started
            view.show(event)
        result = self._client.get(job_id)
        if result is None or result.status is not JobStatus.COMPLETED:
            self._print(("  ✗ The job has no completed result.", "bold red"))
            self._advise(result)
            return False
        facts = [usage_line(result.usage), "sha256 matches" if view.matches else "sha256 DIFFERS"]
        if self._own_model is not None and first is not None:
            facts.insert(1, f"first delta after {first:.2f} s")
        self._print(("  ✓ completed", "bold green"), " · ", " · ".join(facts))
        return bool(view.matches)

    def _show_crowd(self, first_delta: float) -> Crowd:
        scripted = "" if self._own_model is None else " (scripted)"
        self._title(f"2  Forty more at once{scripted} on two workers, and one worker is killed")
        crowd = Crowd(running={worker.pid: 0 for worker in self._workers})
        moving = Live(
            console=self._console,
            get_renderable=lambda: Group(*_worker_lines(crowd)),
            refresh_per_second=_FRAMES,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with moving if self._console.is_terminal else nullcontext():
            asyncio.run(run_crowd(self._stack, self._workers, crowd))
        if not self._console.is_terminal:
            self._console.print(*_worker_lines(crowd), sep="\n")
        self._print(
            ("  ✓ median delay beyond the provider's", "green"),
            f": first delta {first_delta:.1f} ms, later ones {crowd.delay(0.5):.1f} ms",
        )
        mark, holds = ("✓", "exactly the same") if crowd.late_is_right else ("✗", "ANOTHER")
        self._print(
            (f"  {mark} a follower that joined late", "green" if crowd.late_is_right else "red"),
            f", {crowd.missed} events behind, holds {holds} text",
        )
        return crowd

    def _show_row(self, crowd: Crowd) -> bool:
        self._title("3  The row of a job whose worker was killed, read with plain SQL")
        for line in ROW_SQL.format(crowd.job_id).splitlines():
            self._print((f"  {line}", "cyan"))
        if crowd.row is None:
            self._print(("  ✗ there is no such row", "bold red"))
            return False
        status, attempt, content, sha256 = crowd.row
        row = Text(f"  {status} | {attempt} | {printable(content)}", no_wrap=True, overflow="ellipsis")
        end = f" | {sha256[:6]}…"
        row.truncate(self._console.width - len(end), overflow="ellipsis")
        self._console.print(row.append(end))
        return output_sha256([content]) == sha256

    def _advise(self, result: CompletionResult | None) -> None:
        if result is not None and result.error is not None and self._own_model is not None:
            self._print("This was your own provider: name one of its models with --model, or leave out --provider own.")

    def _title(self, text: str) -> None:
        self._space()
        self._print((text, "bold"))

    def _space(self) -> None:
        if self._spacious:
            self._console.print()

    def _print(self, *parts: str | tuple[str, str]) -> None:
        self._console.print(Text.assemble(*parts))


def _worker_lines(crowd: Crowd) -> list[Text]:
    lines = []
    for pid, streams in sorted(crowd.running.items(), key=lambda worker: worker[0] != crowd.victim):
        line = Text(f"  worker {pid}  ")
        if pid == crowd.victim:
            line.append("✗ killed", "bold red").append(f" (SIGKILL) in the middle of {crowd.interrupted} streams")
        elif crowd.results:
            after = "" if crowd.takeover is None else f" {crowd.takeover:.1f} s later (lease {_LEASE} s)"
            mark, style = ("✓", "green") if crowd.succeeded else ("✗", "bold red")
            line.append(f"{mark} took them over", style).append(f"{after}; {crowd.right} of {JOBS} completed")
        else:
            line.append(f"{streams} streams")
        lines.append(line)
    return lines


def _time_first_delta(client: Client, stack: DevStack) -> float:
    """Return the median of the milliseconds from enqueueing to the first delta that are not the provider's own."""
    samples = []
    for number in range(_WARM_UP + _TIMED):
        key = f"timed-{number}"
        request = {"model": "scripted-1", "messages": [{"role": "user", "content": "Hi"}]}
        script = {"key": key, "text": "Hello, world!", "rate": 100}
        started = time.monotonic_ns()
        job_id = client.enqueue({**request, "script": script}, provider=SCRIPTED)
        arrived = [time.monotonic_ns() for event in client.follow(job_id, timeout=_PATIENCE) if event.type == "delta"]
        own = _providers_own(stack, key)
        if number >= _WARM_UP and arrived and own is not None:
            samples.append((arrived[0] - started - own) / 1e6)
    return statistics.median(samples) if samples else math.nan


def _providers_own(stack: DevStack, key: str) -> int | None:
    """Return the nanoseconds from the request to the first delta, as the scripted provider itself has noted them."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(stack.provider_url.removesuffix("/v1") + "/_stats", timeout=_PATIENCE) as answer:
        attempt = json.load(answer)["keys"].get(key)
    return attempt["first_delta_ns"] - attempt["started_ns"] if attempt and attempt["first_delta_ns"] else None
