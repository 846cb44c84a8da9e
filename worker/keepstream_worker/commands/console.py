"""The terminal: how jobs look to people.

In: typed events and results.  Out: text on a console.  Exists so that following, querying and the
demo show one thing in one way.  What a model wrote is shown without control characters, so that it
cannot steer the terminal.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from keepstream.errors import ErrorInfo
from keepstream.events import (
    AttemptFailed,
    AttemptStarted,
    Delta,
    DeltaEvent,
    Event,
    JobCancelled,
    JobCompleted,
    JobExpired,
    JobFailed,
    Snapshot,
    TerminalEvent,
)
from keepstream.names import EventId
from keepstream.results import CompletionResult, JobStatus, JobSummary, Usage, output_sha256
from keepstream.transcript import Transcript
from keepstream_worker.store.inspection import RejectedMessage

INDENT: Final = 2
_WIDE_LIST: Final = 100  #: Columns from which a listing says more.

_STATUS_STYLES: Final = {
    JobStatus.QUEUED: "yellow",
    JobStatus.RUNNING: "cyan",
    JobStatus.RETRYING: "yellow",
    JobStatus.COMPLETED: "green",
    JobStatus.FAILED: "red",
    JobStatus.CANCELLED: "magenta",
    JobStatus.EXPIRED: "red",
}
#: Control characters and their visible stand-ins; a carriage return adds nothing to a line feed.
_CONTROLS: Final[dict[int, str | int | None]] = {
    **{code: 0x2400 + code for code in range(0x20)},
    **dict.fromkeys(range(0x7F, 0xA0), "\ufffd"),
    ord("\n"): "\n",
    ord("\t"): "    ",
    ord("\r"): None,
}
_WIDE: Final = "\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
#: A line feed, spaces, a character after which any line may end, or a word.
_PART: Final = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")


def printable(text: str) -> str:
    """Return ``text`` without the characters that steer a terminal."""
    return text.translate(_CONTROLS)


def status_text(status: JobStatus) -> Text:
    """Return a status in its colour."""
    return Text(status.value, style=_STATUS_STYLES[status])


class _Flow:
    """Running text: lines are broken between words while the text is still being written.

    The last word is held back until it is whole, which is when the next piece comes.
    """

    def __init__(self, console: Console, width: int | None) -> None:
        self._console = console
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""
        self._style = ""

    def write(self, text: str, style: str = "") -> None:
        """Write ``text`` where the last one ended."""
        if style != self._style:
            self._flush()
            self._style = style
        parts = _PART.findall(self._word + printable(text))
        self._word = ""
        if parts and not parts[-1].isspace() and cell_len(parts[-1]) < 40:
            self._word = parts.pop()
        for part in parts:
            self._put(part)

    def end_line(self) -> None:
        """Begin a new line, unless one has just begun."""
        self._flush()
        self._space = ""
        if self._column:
            self._console.print()
            self._column = 0

    def _flush(self) -> None:
        word, self._word = self._word, ""
        if word:
            self._put(word)

    def _put(self, part: str) -> None:
        if part == "\n":
            self._console.print()
            self._column, self._space = 0, ""
        elif part.isspace():
            self._space += part
        else:
            width = cell_len(self._space) + cell_len(part)
            if self._width is not None and self._column > INDENT and self._column + width > self._width:
                self._console.print()
                self._column, self._space = 0, ""
            if self._column == 0:
                self._space = " " * INDENT + self._space
            piece = self._space + part
            self._console.print(Text(piece, self._style), end="", soft_wrap=True)
            self._column += cell_len(piece)
            self._space = ""


class LiveView:
    """Shows a job's events as they come, and checks at the end that nothing is missing.

    Args:
        console: Where to.
        after: The event after which the showing begins; None: the job's first.
        wrap: Whether to break lines; by default on a terminal only, so that a file gets the text as it is.
    """

    def __init__(self, console: Console, after: EventId | None = None, *, wrap: bool | None = None) -> None:
        self.transcript = Transcript()
        self.transcript.last = after
        self.first_output_at: int | None = None  #: Time of the first delta, in ms since 1970 by the worker's clock.
        self.deltas = 0
        self._whole = after is None
        self._console = console
        self._wrap = console.is_terminal if wrap is None else wrap
        self._flow = _Flow(console, console.width if self._wrap else None)
        self._section = ""  #: What the last delta was part of.
        self._content = ""  #: The first choice's text, as far as it stands on the screen.
        self._started_at: int | None = None
        self._error: ErrorInfo | None = None  #: The last one shown.

    def show(self, event: Event) -> None:
        """Show one event."""
        if not self.transcript.apply(event):
            return
        match event:
            case AttemptStarted():
                self._whole = True
                self._attempt_started(event)
            case DeltaEvent():
                self.deltas += 1
                if self.first_output_at is None:
                    self.first_output_at = event.ts
                if event.choice == 0:  # the others are shown whole at the end; word by word they would mix
                    self._delta(event.delta)
            case Snapshot():
                self._whole = True
                self._snapshot(event)
            case AttemptFailed():
                self._attempt_failed(event)
            case JobCompleted() | JobFailed() | JobCancelled() | JobExpired():
                self._ended(event)
            case _:
                pass

    @property
    def matches(self) -> bool | None:
        """Whether the text held equals the stored one; None: its beginning was not asked for, or it has no end yet."""
        terminal = self.transcript.terminal
        return self.transcript.sha256() == terminal.output_sha256 if terminal and self._whole else None

    def _note(self, *parts: str | tuple[str, str]) -> None:
        self._flow.end_line()
        self._section = ""
        self._console.print(Text.assemble(*parts), soft_wrap=not self._wrap)

    def _attempt_started(self, event: AttemptStarted) -> None:
        where = f"{event.model}, provider {event.provider}"
        if self._started_at is None:
            self._started_at = event.ts
        if event.continues:
            self._note((f"attempt {event.attempt} goes on from there ({event.reason}, {where})", "dim"))
            return
        if self._content or self._section:
            self._note((f"- the text starts over: {event.reason}", "yellow"))
        self._content = ""
        self._note((f"attempt {event.attempt}, {where}", "dim"))

    def _delta(self, delta: Delta) -> None:
        if delta.reasoning:
            self._enter("reasoning")
            self._flow.write(delta.reasoning, "dim italic")
        if delta.content:
            self._enter("content")
            self._content += delta.content
            self._flow.write(delta.content)
        if delta.refusal:
            self._enter("refusal")
            self._flow.write(delta.refusal, "magenta")
        for call in delta.tool_calls or ():
            self._enter(f"call {call.index}")
            if call.name:
                self._flow.write(f"calls {call.name} ", "cyan")
            if call.arguments:
                self._flow.write(call.arguments, "cyan")

    def _enter(self, section: str) -> None:
        if section != self._section:
            if self._section:
                self._flow.end_line()
            self._section = section

    def _snapshot(self, event: Snapshot) -> None:
        choice = next((choice for choice in event.choices if choice.index == 0), None)
        content = choice.content if choice else ""
        if self._content and content.startswith(self._content):
            self._delta(Delta(content=content[len(self._content) :]))
        elif content != self._content:
            if self._content:
                self._note(("- the whole text so far:", "yellow"))
            self._content = ""
            self._delta(Delta(reasoning=choice.reasoning if choice else None, content=content))
        if choice and not self._section.startswith("call"):
            self._show_calls(choice.tool_calls)

    def _show_calls(self, calls: Iterable[Any]) -> None:
        for call in calls:
            self._flow.end_line()
            self._flow.write(f"calls {call.name} {call.arguments}", "cyan")
            self._flow.end_line()

    def _attempt_failed(self, event: AttemptFailed) -> None:
        dropped = "; the text above is void" if self._content or self._section else ""
        retry = "" if event.retry_in is None else f"; next attempt in {event.retry_in:.1f} s"
        self._note(
            (f"✗ attempt {event.attempt} failed: ", "red"), printable(_error(event.error)), (dropped + retry, "yellow")
        )
        self._error = event.error
        self._content = ""

    def _ended(self, event: TerminalEvent) -> None:
        for choice in self.transcript.choices[1:]:
            self._note((f"choice {choice.index}", "dim"))
            self._flow.write(choice.content)
            self._show_calls(choice.tool_calls)
        status = JobStatus(event.status)
        facts = [", ".join(str(reason) for reason in dict.fromkeys(event.finish_reasons.values()) if reason)]
        facts.append(usage_line(event.usage))
        facts.append(f"{event.attempts} attempt{'s' * (event.attempts != 1)}")
        if self._started_at is not None:
            facts.append(f"{(event.ts - self._started_at) / 1000:.2f} s")
        if self.matches:
            facts.append("sha256 matches")
        mark = "✓" if status is JobStatus.COMPLETED else "✗"
        self._note((f"{mark} {status.value}", f"bold {_STATUS_STYLES[status]}"), " · ", " · ".join(filter(None, facts)))
        if event.error is not None and event.error != self._error:
            self._note(("  " + printable(_error(event.error)), "red"))
        if self.matches is False:
            self._note(("  the text above is NOT the stored text: its sha256 differs", "bold red"))


def usage_line(usage: Usage | None) -> str:
    """Return tokens in words; what is unknown is said to be unknown."""
    if usage is None or (usage.total_tokens is None and usage.completion_tokens is None):
        return "usage unknown"

    def shown(value: int | None) -> str:
        return "?" if value is None else str(value)

    source = "" if usage.source == "provider" else f", {usage.source.value}"
    return (
        f"{shown(usage.total_tokens)} tokens ({shown(usage.prompt_tokens)} in,"
        f" {shown(usage.completion_tokens)} out{source})"
    )


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
        facts.add_row("error", Text(printable(_error(result.error)), "red"))
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
    table = plain_table()
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
    """Show what was tried and what it cost."""
    table = plain_table()
    for title in ("attempt", "outcome", "first token", "whole", "tokens", "usage from"):
        table.add_column(title, no_wrap=True)
    table.add_column("error", overflow="fold")
    for one in result.attempts:
        usage = one.usage
        table.add_row(
            f"{one.number} {one.reason}",
            Text(one.outcome or "running", "green" if one.outcome == "finished" else "yellow"),
            "-" if one.first_token_ms is None else f"{one.first_token_ms:.0f} ms",
            "-" if one.finished_at is None else _seconds(one.started_at, one.finished_at),
            "-" if usage is None or usage.total_tokens is None else str(usage.total_tokens),
            "-" if usage is None else usage.source.value,
            Text("" if one.error is None else printable(_error(one.error)), "red"),
        )
    console.print(table)


def show_list(console: Console, summaries: list[JobSummary]) -> None:
    """Show jobs, one a line."""
    wide = console.width >= _WIDE_LIST
    table = plain_table()
    for title in ("job", "status", "created (UTC)", *(("took", "tokens") if wide else ())):
        table.add_column(title, no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("error", overflow="fold")
    for one in summaries:
        tokens = one.usage.total_tokens if one.usage else None
        took = "-" if one.finished_at is None else _seconds(one.created_at, one.finished_at)
        table.add_row(
            Text(one.id),
            status_text(one.status),
            f"{one.created_at:%m-%d %H:%M:%S}",
            *((took, "-" if tokens is None else str(tokens)) if wide else ()),
            Text(one.model),
            Text("" if one.error is None else one.error.code, "red"),
        )
    console.print(table)


def plain_table() -> Table:
    """Return an empty table in our style."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def _error(error: ErrorInfo) -> str:
    return f"{error.code}: {error.message}" if error.message else error.code


def _times(result: CompletionResult) -> str:
    parts = [f"created {result.created_at:%Y-%m-%d %H:%M:%S} UTC"]
    if result.started_at is not None:
        parts.append(f"started +{_seconds(result.created_at, result.started_at)}")
    if result.finished_at is not None:
        parts.append(f"finished +{_seconds(result.created_at, result.finished_at)}")
    return ", ".join(parts)


def _seconds(start: datetime, end: datetime) -> str:
    return f"{(end - start).total_seconds():.2f} s"


def show_rejected(console: Console, messages: Sequence[RejectedMessage]) -> None:
    """Show messages that were no valid jobs."""
    if not messages:
        console.print("No message was rejected.", style="dim")
        return
    table = plain_table()
    for title in ("rejected (UTC)", "tenant", "job", "bytes"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for one in messages:
        table.add_row(
            one.rejected_at.strftime("%Y-%m-%d %H:%M:%S"),
            one.tenant or "-",
            one.job_id or "-",
            str(one.size or "-"),
            Text(printable(one.reason)),
        )
    console.print(table)
