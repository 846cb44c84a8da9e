"""Tables: stored jobs, their attempts and tool calls, and rejected messages.

In: results and summaries, from the client; rejected messages, from the store.
Out: tables on a console.
"""

import json
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from keepstream.results import CompletionResult, JobSummary, output_sha256
from keepstream_worker.commands.formats import INDENT, error_line, printable, seconds_between, status_text, usage_line
from keepstream_worker.store.inspection import RejectedMessage

_WIDE_LIST: Final = 100  #: Columns from which a list has more of them.


def show_result(console: Console, result: CompletionResult) -> None:
    """Show a job with everything stored about it."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("job", Text(result.id, "bold"))
    status = status_text(result.status)
    if result.partial:
        status.append("  (the output is partial)", "yellow")
    facts.add_row("status", status)
    if result.error is not None:
        facts.add_row("error", Text(printable(error_line(result.error)), "red"))
    facts.add_row("model", Text(f"{result.model}, provider {result.provider}, tenant {result.tenant}"))
    facts.add_row("times", _times(result))
    facts.add_row("usage", usage_line(result.usage) if result.usage or result.status.terminal else "not known yet")
    if result.metadata:
        facts.add_row("metadata", Text(printable(json.dumps(result.metadata, ensure_ascii=False))))
    if result.output_sha256:
        right = result.output_sha256 == output_sha256(choice.content for choice in result.choices)
        facts.add_row("sha256", f"{result.output_sha256} {'✓' if right else '✗ differs from the text'}")
    console.print(facts)
    for choice in result.choices:
        title = "text" if len(result.choices) == 1 else f"choice {choice.index}"
        console.print()
        console.print(Text.assemble((title, "bold"), (f"  finish reason {choice.finish_reason or 'unknown'}", "dim")))
        for text, style in ((choice.reasoning, "dim italic"), (choice.content, ""), (choice.refusal, "magenta")):
            if text:
                console.print(Padding(Text(printable(text).rstrip(), style), (0, INDENT)))
    show_tool_calls(console, result)
    if result.attempts:
        console.print()
        show_attempts(console, result)


def show_tool_calls(console: Console, result: CompletionResult) -> None:
    """Show the tool calls of all choices, if there are any."""
    rows = [(choice.index, call) for choice in result.choices for call in choice.tool_calls]
    if not rows:
        return
    table = _plain_table()
    several = len(result.choices) > 1
    for title in (["choice"] if several else []) + ["tool call", "id"]:
        table.add_column(title, no_wrap=True)
    table.add_column("arguments", overflow="fold")
    for index, call in rows:
        arguments = Text(printable(call.arguments), "cyan")
        if not call.arguments_valid:
            arguments.append("  (not valid JSON)", "red")
        table.add_row(
            *([str(index)] if several else []), Text(printable(call.name)), Text(printable(call.id)), arguments
        )
    console.print()
    console.print(table)


def show_attempts(console: Console, result: CompletionResult) -> None:
    """Show each attempt with its outcome, times, usage and error."""
    table = _plain_table()
    for title in ("attempt", "outcome", "first token", "whole", "tokens", "usage from"):
        table.add_column(title, no_wrap=True)
    table.add_column("error", overflow="fold")
    for attempt in result.attempts:
        usage = attempt.usage
        table.add_row(
            f"{attempt.number} {attempt.reason}",
            Text(attempt.outcome or "running", "green" if attempt.outcome == "finished" else "yellow"),
            "-" if attempt.first_token_ms is None else f"{attempt.first_token_ms:.0f} ms",
            "-" if attempt.finished_at is None else seconds_between(attempt.started_at, attempt.finished_at),
            "-" if usage is None or usage.total_tokens is None else str(usage.total_tokens),
            "-" if usage is None else usage.source.value,
            Text("" if attempt.error is None else printable(error_line(attempt.error)), "red"),
        )
    console.print(table)
    for attempt in result.attempts:
        if attempt.provider_error is not None:
            said = attempt.provider_error.model_dump(exclude_none=True)
            words = "; ".join(f"{name}: {text}" for name, text in said.items())
            console.print(Text(printable(f"attempt {attempt.number}, the provider said: {words}"), "dim"))


def show_list(console: Console, summaries: list[JobSummary]) -> None:
    """Show jobs, one a line."""
    wide = console.width >= _WIDE_LIST
    table = _plain_table()
    for title in ("job", "status", "created (UTC)", *(("took", "tokens") if wide else ())):
        table.add_column(title, no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("error", overflow="fold")
    for job in summaries:
        tokens = job.usage.total_tokens if job.usage else None
        took = "-" if job.finished_at is None else seconds_between(job.created_at, job.finished_at)
        table.add_row(
            Text(job.id),
            status_text(job.status),
            f"{job.created_at:%m-%d %H:%M:%S}",
            *((took, "-" if tokens is None else str(tokens)) if wide else ()),
            Text(job.model),
            Text("" if job.error is None else job.error.code, "red"),
        )
    console.print(table)


def show_rejected(console: Console, messages: Sequence[RejectedMessage]) -> None:
    """Show messages that were not valid jobs."""
    if not messages:
        console.print("No message was rejected.", style="dim")
        return
    table = _plain_table()
    for title in ("rejected (UTC)", "tenant", "job", "bytes"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for message in messages:
        table.add_row(
            message.rejected_at.strftime("%Y-%m-%d %H:%M:%S"),
            message.tenant or "-",
            message.job_id or "-",
            str(message.size or "-"),
            Text(printable(message.reason)),
        )
    console.print(table)


def _plain_table() -> Table:
    """Return an empty table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def _times(result: CompletionResult) -> str:
    parts = [f"created {result.created_at:%Y-%m-%d %H:%M:%S} UTC"]
    if result.started_at is not None:
        parts.append(f"started +{seconds_between(result.created_at, result.started_at)}")
    if result.finished_at is not None:
        parts.append(f"finished +{seconds_between(result.created_at, result.finished_at)}")
    return ", ".join(parts)
