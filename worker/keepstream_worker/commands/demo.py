"""The demo: one job from the queue to the database, through a real worker process.

In: nothing, or the user's own provider from OPENAI_API_KEY and OPENAI_BASE_URL.
Out: what happens, on a console, and whether the stored text is the one that was streamed.
"""

import os
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepstream import Client
from keepstream.errors import KeepstreamError
from keepstream.names import QUEUE, job_keys
from keepstream.results import CompletionResult, JobStatus, output_sha256
from keepstream_worker.commands.formats import printable, usage_line
from keepstream_worker.commands.live_view import LiveView
from keepstream_worker.dev_stack.scripted_provider.script import DEFAULT_TEXT
from keepstream_worker.dev_stack.stack import DevStack, WorkerProcess, dev_stack
from keepstream_worker.providers.config import OPENAI_URL

MODEL_VARIABLE: Final = "KEEPSTREAM_DEMO_MODEL"
DEFAULT_MODEL: Final = "gpt-5-mini"  #: For a provider of the user's own.
WIDTH: Final = 100
_SILENCE_TIMEOUT: Final = 120.0  #: Seconds without an event; a model that thinks may need them.

_PROMPT: Final = "Greet the reader in a few languages, then look up the weather in Zürich. ☀"
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "examples": ["Zürich"]}, "days": {"type": "integer"}},
        },
    },
}
_CUT: Final[dict[str, Any]] = {
    "key": "demo",
    "text": DEFAULT_TEXT,
    "rate": 40,
    "tool_calls": [{"name": "get_weather", "arguments": {"city": "Zürich", "days": 1}}],
    "faults": [{"kind": "cut", "after": 25}],
}
_SQL: Final = """\
  SELECT status, output_sha256, content, name, arguments FROM keepstream_jobs
    JOIN keepstream_choices c ON c.job_id = id LEFT JOIN keepstream_tool_calls t ON t.job_id = id
   WHERE id = ?"""


def run_demo(console: Console, *, cut: bool = False) -> bool:
    """Run one job and show what happens; return whether the stored text is the one that was streamed.

    ``cut`` breaks the stream of the first attempt in the middle, if the provider is the scripted one.

    Raises:
        EmbeddedServiceError: a service or the worker did not start.
        SchemaError: the database could not be migrated.
    """
    console.print(Text.assemble(("Keepstream demo", "bold"), ": a job goes through a real queue and a real worker."))
    console.print("Starting the services and a worker ...", style="dim")
    with tempfile.TemporaryDirectory(prefix="keepstream-demo-") as directory, dev_stack(Path(directory)) as stack:
        # No settings but those of the dev stack, so that the demo is the same everywhere.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTREAM_")}
        with WorkerProcess(stack.environment(inherited)) as worker:
            try:
                if _show(console, stack, worker, cut=cut):
                    return True
            except (KeepstreamError, sqlite3.Error) as error:
                console.print(Text(f"The demo failed: {printable(str(error))}", "bold red"), soft_wrap=True)
            console.print(Text("The end of the worker's log:", "bold"))
            console.print(Text(printable(worker.log_tail()), "dim"), soft_wrap=True)
            return False


def _show(console: Console, stack: DevStack, worker: WorkerProcess, *, cut: bool) -> bool:
    _show_services(console, stack, worker)
    request = _request(stack, cut=cut)
    view = LiveView(console, wrap=True)
    with Client(stack.redis_url, database_url=stack.settings["KEEPSTREAM_DATABASE_URL"]) as client:
        enqueued_at = time.time()
        job_id = client.enqueue(request)
        _title(console, "1  A job goes in", f"as a row of the database and a message on the Celery queue '{QUEUE}'")
        _show_facts(
            console,
            {
                "model": request["model"],
                "messages": f"user: {_PROMPT}",
                "tools": "get_weather(city, days)",
                "job id": job_id,
            },
        )
        _title(console, "2  Its events arrive live", f"on {job_keys('default', job_id).channel}")
        for event in client.follow(job_id, timeout=_SILENCE_TIMEOUT):
            view.show(event)
        result = client.get(job_id)
    _title(console, "3  The result is stored", "and read here with plain SQL")
    with closing(sqlite3.connect(stack.database)) as connection:
        row = connection.execute(_SQL, (job_id,)).fetchone()
    console.print(Text(_SQL.replace("?", f"'{job_id}'"), "cyan"), soft_wrap=True)
    if result is None or row is None or result.status is not JobStatus.COMPLETED:
        console.print(Text("The job has no completed result.", "bold red"))
        _advise(console, stack, result)
        return False
    status, stored_sha256, content, tool, arguments = row
    streamed_sha256 = view.transcript.sha256()
    same: bool = streamed_sha256 == output_sha256([content]) and streamed_sha256 == stored_sha256
    _show_row(console, result, status, content, tool and f"{tool} {arguments}")
    first = None if view.first_output_at is None else view.first_output_at - enqueued_at * 1000
    console.print()
    _show_comparison(console, same=same, sha256=streamed_sha256, deltas=view.deltas, first_delta_ms=first)
    return same


def _request(stack: DevStack, *, cut: bool) -> dict[str, Any]:
    if stack.provider_url is not None and cut:
        return {**_request(stack, cut=False), "script": _CUT}
    model = "scripted-1" if stack.provider_url else os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    return {"model": model, "messages": [{"role": "user", "content": _PROMPT}], "tools": [_TOOL]}


def _show_services(console: Console, stack: DevStack, worker: WorkerProcess) -> None:
    provider = f"scripted (no model, no key, no cost) at {stack.provider_url}"
    if stack.provider_url is None:
        model = os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
        provider = f"yours, at {os.environ.get('OPENAI_BASE_URL') or OPENAI_URL}, model {model} ({MODEL_VARIABLE})"
    _show_facts(
        console,
        {
            "Redis": f"Valkey, embedded, at {stack.redis_url}",
            "database": f"SQLite, {stack.database}",
            "provider": provider,
            "worker": f"process {worker.pid}",
        },
    )


def _title(console: Console, title: str, explanation: str) -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), ("  " + explanation, "dim")))


def _show_row(console: Console, result: CompletionResult, status: str, content: str, call: str | None) -> None:
    excerpt = printable(content).replace("\n", " ")
    room = console.width - 40
    last = result.attempts[-1]
    duration = (last.finished_at or last.started_at) - last.started_at
    facts = {
        "status": status,
        "text": f"{excerpt[:room]}{'…' if len(excerpt) > room else ''} ({len(content)} characters)",
        "tool call": call,
        "usage": usage_line(result.usage),
        "timings": f"first token after {last.first_token_ms or 0:.0f} ms, whole after {duration.total_seconds():.2f} s",
        "attempts": ", ".join(f"{attempt.number} {attempt.outcome}" for attempt in result.attempts),
    }
    _show_facts(console, facts)


def _show_facts(console: Console, facts: dict[str, str | None]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value is not None:
            table.add_row(Text(f"  {name}", "dim"), Text(printable(value)))
    console.print(table)


def _show_comparison(console: Console, *, same: bool, sha256: str, deltas: int, first_delta_ms: float | None) -> None:
    if not same:
        console.print(Text("✗ The stored text is NOT the text that was streamed.", "bold red"))
        return
    console.print(
        Text.assemble(
            ("✓ The stored text is the text that was streamed", "bold green"), f": sha256 {sha256[:16]}… on both sides."
        )
    )
    since = "" if first_delta_ms is None else f", the first {first_delta_ms:.0f} ms after the job went in"
    console.print(f"  {deltas} deltas came one by one{since}.")
    console.print(
        "  Next: [cyan]keepstream dev[/] keeps a set-up like this running; [cyan]keepstream --help[/] shows the rest."
    )


def _advise(console: Console, stack: DevStack, result: CompletionResult | None) -> None:
    if stack.provider_url is None and result is not None and result.error is not None:
        console.print(f"This was your own provider: set {MODEL_VARIABLE} to a model that it has, or unset")
        console.print("OPENAI_API_KEY and OPENAI_BASE_URL to see the demo with the scripted one.")
