"""Tables: stored jobs, their attempts and tool calls, and rejected messages.

In: results, summaries and API keys, from the client; rejected messages, from the store.
Out: tables on a console.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from keepstream.client.api_keys import StoredKey
from keepstream.client.overview import RejectedMessage
from keepstream.results import AttemptResult, CompletionResult, JobSummary, Target, UsageSource, output_sha256
from keepstream_worker.commands.formats import INDENT, error_line, printable, seconds_between, status_text, usage_line

_WIDE_LIST: Final = 110  #: Columns from which a job of a list fits on one line.
_LONG_ID: Final = 40  #: Characters; ids are never cut, so longer ones get a line of their own.
_SHOWN_MESSAGES: Final = 6  #: The last ones of a request.
_SHOWN_CHARACTERS: Final = 400  #: Of each message, and of each parameter.
_LABELS: Final = 9  #: Columns.


def show_result(console: Console, result: CompletionResult) -> None:
    """Show a job with everything stored about it."""
    # On a line of its own: an id that is cut or broken cannot be copied.
    console.print(Text.assemble((f"{'job':<{_LABELS}}  ", "dim"), (result.id, "bold")), soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, min_width=_LABELS)
    facts.add_column(overflow="fold")
    status = status_text(result.status)
    if result.partial:
        status.append("  (the output is partial)", "yellow")
    facts.add_row("status", status)
    if result.error is not None:
        facts.add_row("error", Text(printable(error_line(result.error)), "red"))
    if result.waiting_for is not None:
        facts.add_row("waits for", Text(result.waiting_for.text, "yellow"))
    if result.retry_of is not None:
        facts.add_row("retry of", Text(result.retry_of))
    facts.add_row("model", Text(printable(f"{result.model}, provider {result.provider}, tenant {result.tenant}")))
    if result.fallbacks:
        facts.add_row("fallbacks", Text(printable(", ".join(_target(each) for each in result.fallbacks))))
    facts.add_row("class", Text(printable(result.job_class)))
    facts.add_row("times", _times(result))
    facts.add_row("usage", usage_line(result.usage) if result.usage or result.status.terminal else "not known yet")
    if result.metadata:
        facts.add_row("metadata", Text(printable(json.dumps(result.metadata, ensure_ascii=False))))
    if result.output_sha256:
        right = result.output_sha256 == output_sha256(choice.content for choice in result.choices)
        facts.add_row("sha256", f"{result.output_sha256} {'✓' if right else '✗ differs from the text'}")
    console.print(facts)
    if result.request is not None:
        _show_request(console, result.request)
    for choice in result.choices:
        title = "text" if len(result.choices) == 1 else f"choice {choice.index}"
        console.print()
        console.print(Text.assemble((title, "bold"), (f"  finish reason {choice.finish_reason or 'unknown'}", "dim")))
        for text, style in ((choice.reasoning, "dim italic"), (choice.content, ""), (choice.refusal, "magenta")):
            if text:
                console.print(Padding(Text(printable(text).rstrip(), style), (0, INDENT)))
        for name, reason in choice.left_out.items():
            console.print(Padding(Text(printable(f"{name}: {reason}"), "yellow"), (0, INDENT)))
    show_tool_calls(console, result)
    if result.attempts:
        console.print()
        show_attempts(console, result)


def _show_request(console: Console, request: Mapping[str, Any]) -> None:
    """Show the parameters and the last messages, long ones cut."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=_LABELS)
    table.add_column(overflow="fold")
    for name, value in request.items():
        if name not in ("model", "messages"):
            table.add_row(printable(name), _cut(json.dumps(value, ensure_ascii=False)))
    messages = list(request.get("messages", ()))
    if len(messages) > _SHOWN_MESSAGES:
        table.add_row("…", Text(f"{len(messages) - _SHOWN_MESSAGES} earlier messages (all: --json)", "dim"))
    for message in messages[-_SHOWN_MESSAGES:]:
        table.add_row(printable(str(message.get("role", "?"))), _cut(_message_text(message)))
    console.print()
    console.print(Text("request", "bold"))
    console.print(Padding(table, (0, 0, 0, INDENT), expand=False))


def _message_text(message: Mapping[str, Any]) -> str:
    """Return a message's text, or all of it as JSON if it is more than a text."""
    content = message.get("content")
    if isinstance(content, str) and message.keys() <= {"role", "content", "name", "tool_call_id"}:
        return content
    return json.dumps({name: value for name, value in message.items() if name != "role"}, ensure_ascii=False)


def _cut(text: str) -> Text:
    shown = Text(printable(text[:_SHOWN_CHARACTERS]).rstrip())
    if len(text) > _SHOWN_CHARACTERS:
        shown.append(f" … ({len(text)} characters)", "dim")
    return shown


def show_tool_calls(console: Console, result: CompletionResult) -> None:
    """Show the tool calls of all choices, if there are any."""
    rows = [(choice.index, call) for choice in result.choices for call in choice.tool_calls]
    if not rows:
        return
    table = _plain_table()
    several = len(result.choices) > 1
    for title in (["choice"] if several else []) + ["tool call", "id"]:
        table.add_column(title, overflow="fold")
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
    """Show each attempt with whom it asked, its outcome, times and usage; below, what went wrong in words."""
    table = _plain_table()
    for title in ("attempt", "outcome"):
        table.add_column(title, no_wrap=True)
    table.add_column("asked", overflow="fold")
    for title in ("first token", "whole", "tokens"):
        table.add_column(title, no_wrap=True)
    for attempt in result.attempts:
        table.add_row(
            f"{attempt.number} {attempt.reason}",
            Text(attempt.outcome or "running", "green" if attempt.outcome == "finished" else "yellow"),
            Text(printable(_target(attempt))),
            "-" if attempt.first_token_ms is None else f"{attempt.first_token_ms:.0f} ms",
            "-" if attempt.finished_at is None else seconds_between(attempt.started_at, attempt.finished_at),
            _attempt_tokens(attempt),
        )
    console.print(table)
    for attempt in result.attempts:
        if attempt.error is not None:
            console.print(Text(printable(f"attempt {attempt.number}: {error_line(attempt.error)}"), "red"))
        if attempt.provider_error is not None:
            said = attempt.provider_error.model_dump(exclude_none=True)
            words = "; ".join(f"{name}: {text}" for name, text in said.items())
            console.print(Text(printable(f"attempt {attempt.number}, the provider said: {words}"), "dim"))


def _target(target: Target | AttemptResult | JobSummary) -> str:
    return f"{target.provider}/{target.model}"


def _attempt_tokens(attempt: AttemptResult) -> str:
    if attempt.usage is None or attempt.usage.total_tokens is None:
        return "-"
    source = attempt.usage.source
    return f"{attempt.usage.total_tokens}{'' if source is UsageSource.PROVIDER else f' {source.value}'}"


def show_list(console: Console, summaries: Sequence[JobSummary]) -> None:
    """Show jobs: one a line if there is room, else each with its id on a line of its own."""
    longest = max((len(job.id) for job in summaries), default=0)
    if console.width < _WIDE_LIST or longest > _LONG_ID:
        for job in summaries:
            _show_in_lines(console, job)
        return
    table = _plain_table()
    for title in ("job", "status", "created (UTC)", "took", "tokens"):
        table.add_column(title, no_wrap=True)
    table.add_column("model", overflow="fold", ratio=1)
    table.add_column("waits for, error, prompt", ratio=2)
    table.expand = True
    for job in summaries:
        table.add_row(
            Text(job.id),
            status_text(job.status),
            f"{job.created_at:%m-%d %H:%M:%S}",
            _took(job),
            _tokens(job),
            Text(printable(job.model)),
            Group(*_about(job)),
        )
    console.print(table)


def _show_in_lines(console: Console, job: JobSummary) -> None:
    console.print(Text(job.id), soft_wrap=True)
    facts = [f"{job.created_at:%m-%d %H:%M:%S}", _took(job), printable(job.model)]
    line = Text("  ").join([status_text(job.status), *(Text(fact) for fact in facts if fact != "-")])
    console.print(Padding(Group(line, *_about(job)), (0, 0, 0, INDENT), expand=False))


def _about(job: JobSummary) -> list[Text]:
    """Return what the job waits for, which is never cut, and on a line its error and the beginning of its prompt.

    The job's own target need not be named.
    """
    lines = []
    if (reason := job.waiting_for) is not None:
        text = reason.text.removeprefix(f"{_target(job)}: ")
        lines.append(Text(printable(f"waits for {text}"), "yellow" if reason.passes else "red"))
    error = Text("" if job.error is None else job.error.code, "red")
    if beginning := Text("  ").join(part for part in (error, Text(printable(job.prompt_start))) if part):
        beginning.no_wrap, beginning.overflow = True, "ellipsis"
        lines.append(beginning)
    return lines


def _took(job: JobSummary) -> str:
    return "-" if job.finished_at is None else seconds_between(job.created_at, job.finished_at)


def _tokens(job: JobSummary) -> str:
    return "-" if job.usage is None or job.usage.total_tokens is None else str(job.usage.total_tokens)


def show_rejected(console: Console, messages: Sequence[RejectedMessage]) -> None:
    """Show messages that were not valid jobs."""
    if not messages:
        console.print("No message was rejected.", style="dim")
        return
    table = _plain_table()
    for title in ("rejected (UTC)", "tenant", "job", "bytes"):
        table.add_column(title, overflow="fold")
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


def show_keys(console: Console, keys: Sequence[StoredKey]) -> None:
    """Show API keys by how they begin."""
    if not keys:
        console.print("There is no API key; to make one: keepstream keys create", style="dim")
        return
    table = _plain_table()
    for title in ("key", "tenant", "rights", "created (UTC)", "revoked (UTC)", "name"):
        table.add_column(title, overflow="fold")
    for key in keys:
        table.add_row(
            f"{key.prefix}…",
            key.tenant,
            ", ".join(sorted(key.rights)),
            f"{key.created_at:%Y-%m-%d %H:%M:%S}",
            "-" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M:%S}",
            Text(printable(key.name)),
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
