"""The live view: a job's events as they come, on a console.

In: typed events, from `follow`, `submit --follow` and `demo`.
Out: text on the console, and whether it equals the stored text.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
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
from keepstream.results import JobStatus
from keepstream.transcript import Transcript
from keepstream_worker.commands.formats import INDENT, STATUS_STYLES, count, error_line, printable, usage_line

_WIDE: Final = "\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
#: A line feed, spaces, a character after which any line may end, or a word.
_PART: Final = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")


class _WordWrap:
    """Text broken into lines between words while it is still being written.

    The last word is held back until the next piece shows that it is whole.
    """

    def __init__(self, console: Console, width: int | None) -> None:
        self._console = console
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""
        self._style = ""

    def write(self, text: str, style: str = "") -> None:
        """Write ``text`` behind what was written before."""
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
        """End the current line, unless it is empty."""
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
    """Shows a job's events as they come, and checks at the end that the text shown is the stored one.

    Args:
        console: Where to.
        after: Show only what comes after this event; None: everything.
        wrap: Whether to break lines between words; by default only if people see them at once, so that a file gets the
            text as it is.
        output_only: Leave out where attempts run and how the job ends; whoever asks for that says it in its own words.
    """

    def __init__(
        self, console: Console, after: EventId | None = None, *, wrap: bool | None = None, output_only: bool = False
    ) -> None:
        self.transcript = Transcript()
        self.transcript.last = after
        self._from_start = after is None
        self._output_only = output_only
        self._console = console
        self._wrap = console.is_terminal if wrap is None else wrap
        self._output = _WordWrap(console, console.width if self._wrap else None)
        self._section = ""  #: The kind of output being written: reasoning, content, a call, ...
        self._content = ""  #: The first choice's text, as far as it has been shown.
        self._calls_shown = False  #: Whether its tool calls have been shown.
        self._started_at: int | None = None
        self._error: ErrorInfo | None = None  #: The last error shown.

    def show(self, event: Event) -> None:
        """Show one event."""
        if not self.transcript.apply(event):
            return
        match event:
            case AttemptStarted():
                self._from_start = True
                self._attempt_started(event)
            case DeltaEvent():
                if event.choice == 0:  # the others are shown at the end; live they would be interleaved
                    self._delta(event.delta)
            case Snapshot():
                self._from_start = True
                self._snapshot(event)
            case AttemptFailed():
                self._attempt_failed(event)
            case JobCompleted() | JobFailed() | JobCancelled() | JobExpired():
                self._ended(event)
            case _:
                pass

    @property
    def matches(self) -> bool | None:
        """Whether the text shown equals the stored one; None: not known, as the job goes on or was joined late."""
        end = self.transcript.terminal
        return self.transcript.sha256() == end.output_sha256 if end and self._from_start else None

    def end_line(self) -> None:
        """End the current line, because something else is about to be written."""
        self._output.end_line()
        self._section = ""

    def _note(self, *parts: str | tuple[str, str]) -> None:
        self.end_line()
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
        self._calls_shown = False
        if not self._output_only:
            self._note((f"attempt {event.attempt}, {where}", "dim"))

    def _delta(self, delta: Delta) -> None:
        if delta.reasoning:
            self._enter("reasoning")
            self._output.write(delta.reasoning, "dim italic")
        if delta.content:
            self._enter("content")
            self._content += delta.content
            self._output.write(delta.content)
        if delta.refusal:
            self._enter("refusal")
            self._output.write(delta.refusal, "magenta")
        for call in delta.tool_calls or ():
            self._calls_shown = True
            self._enter(f"call {call.index}")
            if call.name:
                self._output.write(f"calls {call.name} ", "cyan")
            if call.arguments:
                self._output.write(call.arguments, "cyan")

    def _enter(self, section: str) -> None:
        if section != self._section:
            if self._section:
                self._output.end_line()
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
        if choice and not self._calls_shown:
            self._show_calls(choice.tool_calls)

    def _show_calls(self, calls: Iterable[Any]) -> None:
        for call in calls:
            self._output.end_line()
            self._output.write(f"calls {call.name} {call.arguments}", "cyan")
            self._output.end_line()

    def _attempt_failed(self, event: AttemptFailed) -> None:
        last = event.retry_in is None  # the text stays: a snapshot repeats it, as the job's partial output
        dropped = "; the text above is void" if (self._content or self._section) and not last else ""
        retry = "" if last else f"; next attempt in {event.retry_in:.1f} s"
        self._note(
            (f"✗ attempt {event.attempt} failed: ", "red"),
            printable(error_line(event.error)),
            (dropped + retry, "yellow"),
        )
        self._error = event.error
        if not last:
            self._content = ""

    def _ended(self, event: TerminalEvent) -> None:
        for choice in self.transcript.choices[1:]:
            self._note((f"choice {choice.index}", "dim"))
            self._output.write(choice.content)
            self._show_calls(choice.tool_calls)
        if self._output_only:
            self._output.end_line()
            return
        status = JobStatus(event.status)
        facts = [", ".join(str(reason) for reason in dict.fromkeys(event.finish_reasons.values()) if reason)]
        facts.append(usage_line(event.usage))
        facts.append(count(event.attempts, "attempt", "attempts"))
        if self._started_at is not None:
            facts.append(f"{(event.ts - self._started_at) / 1000:.2f} s")
        if self.matches and (
            status is JobStatus.COMPLETED or any(choice.content for choice in self.transcript.choices)
        ):
            facts.append("sha256 matches")
        mark = "✓" if status is JobStatus.COMPLETED else "✗"
        self._note((f"{mark} {status.value}", f"bold {STATUS_STYLES[status]}"), " · ", " · ".join(filter(None, facts)))
        if event.error is not None and event.error != self._error:
            self._note(("  " + printable(error_line(event.error)), "red"))
        if self.matches is False:
            self._note(("  the text above is NOT the stored text: its sha256 differs", "bold red"))
