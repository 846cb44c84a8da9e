"""Tells a job's events as the stream events of OpenAI's Responses API.

In: a job's events from the first one on, from the log or made from its row; the stored job.
Out: server-sent events as bytes: those beyond the client's cursor.

``response.created`` comes first, which the stateful helpers of OpenAI's libraries need. A client that resumes has a
cursor, and what lies before it is told again only to this translation, which needs to know which items are open.

**A retry.** Followers of a job are told to drop what a failed attempt sent. Here the items of that attempt are closed
as incomplete; when the next attempt begins, ``response.in_progress`` comes again, whose snapshot contains them, and
the new attempt gets items with new indexes and ids; the final response holds only these. Of six ways to say it this
is the one that neither library's helper breaks at, and a reader sees that something was dropped.

**A snapshot** mostly continues what was sent; then only the rest is told. If it does not, it is told like a retry.

**A client that knows more.** If Redis lost a part of the log, or all of it, a client may hold what nobody can tell any
more. Then the output is told anew, under new ids, after another ``response.in_progress``.

**Tool calls in a retry.** OpenAI's libraries want one item for each call id, and ids come again in another attempt
where a provider counts from 0. So a dropped call is not closed before it is sure that its id does not come again; a
call that has the id of a dropped one takes over its item when it is complete, and ``response.in_progress`` shows it.

A job that was cancelled ends with ``response.incomplete``, since the libraries know no other event for it; its
response has the status ``cancelled``.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from keepstream.events import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    ChoiceSnapshot,
    Delta,
    DeltaEvent,
    Event,
    JobCancelled,
    JobCompleted,
    JobExpired,
    JobFailed,
    Snapshot,
    TerminalEvent,
    ToolCallDelta,
)
from keepstream.names import EventId
from keepstream.results import CompletionResult, ToolCall
from keepstream.transcript import Transcript
from keepstream_gateway.openai.attempts import leaves_open
from keepstream_gateway.openai.ids import LAST, ItemIds, position, sequence_number
from keepstream_gateway.openai.responses_items import (
    OPEN,
    TEXT_DELTA,
    CallItem,
    Fields,
    MessageItem,
    ReasoningItem,
    StreamedItem,
)
from keepstream_gateway.openai.responses_object import (
    annotation,
    carried_by,
    item_status,
    response_head,
    response_object,
)

_MAX_ANNOTATIONS: Final = 30  #: Of a choice, told live by one event; the rest comes with the part when it is done.
_ENDS: Final = {
    "completed": "response.completed",
    "failed": "response.failed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",
}
_PARTS: Final = ("output_text", "refusal")
_START: Final = EventId(0, 0)  #: Of what comes before the job's first event.

_Key = tuple[int, str, int]  # choice, kind of item, number of the call


@dataclass(slots=True)
class _Call:
    """What is known of a tool call, and what came before it could be told."""

    id: str = ""
    name: str = ""
    type: str = "function"
    held: list[str] = field(default_factory=list)

    def value(self, arguments: str = "") -> ToolCall:
        return ToolCall(id=self.id, type=self.type, name=self.name, arguments=arguments, arguments_valid=False)


class ResponseEvents:
    """The stream of one client. Not thread-safe.

    Args:
        job: The job, as it is known when the stream begins; of its state and output nothing is used.
        after: The last sequence number that the client has; -1: none.
    """

    def __init__(self, job: CompletionResult, after: int = -1) -> None:
        self._job = job
        self._head = response_head(job)
        self._after = after
        self._client_at = EventId(*position(max(after, 0))[:2])
        self._transcript = Transcript()
        self._before: Event | None = None  # the last event applied
        self._provider = job.provider
        self._ids = ItemIds(job.id, 1)
        self._items: list[StreamedItem] = []  # all that were ever opened; their place is their index
        self._live: dict[_Key, StreamedItem] = {}  # those of the output that counts
        self._calls: dict[tuple[int, int], _Call] = {}
        self._annotated: dict[int, int] = {}  # by choice: how many annotations were told
        self._closed = False  # whether the live items have been closed
        self._must_tell_drop = False  # whether items were dropped that no response.in_progress has shown yet
        self._is_lost = False  # whether the client holds something that is not known here
        self._found_at: EventId | None = None  # the event with which it was told anew
        self._void: dict[str, CallItem] = {}  # by item id: calls that were dropped

    def begin(self) -> list[bytes]:
        """Return what comes before the job's first event."""
        return self._frames(_START, ({"type": kind} for kind in ("response.created", "response.queued")))

    def feed(self, event: Event) -> list[bytes]:
        """Return what ``event`` becomes; of the terminal one, all but the very end."""
        if isinstance(event, DeltaEvent) and (frames := self._go_on(event)) is not None:
            return frames
        return self._frames(event.event_id, self._told(event))

    def end(self, event: TerminalEvent, stored: CompletionResult | None = None) -> list[bytes]:
        """Return what the terminal event becomes.

        Args:
            event: The terminal event.
            stored: The job as it is stored by now; None: what events have told has to do.
        """
        frames = self.feed(event)
        sequence = sequence_number(event.attempt, event.event_id.n, LAST)
        if sequence > self._after:
            response = response_object(stored or self._result(event))
            frames.append(_frame(sequence, {"type": _ENDS[response["status"]], "response": response}))
        return frames

    def _go_on(self, event: DeltaEvent) -> list[bytes] | None:
        """Return what a delta becomes that only goes on with an open text, as nearly all do; None: it is another.

        It says what ``_told`` would say, at a third of the cost.
        """
        delta = event.delta
        if not delta.content or delta.reasoning or delta.refusal or delta.tool_calls or delta.extra:
            return None
        item = self._live.get((event.choice, "message", 0))
        last = self._transcript.last
        if not isinstance(item, MessageItem) or last is None or event.attempt != last.attempt or self._must_tell_drop:
            return None
        head = item.delta_head
        if head is None or self._is_lost or event.event_id.n != last.n + 1:
            return None
        self._transcript.apply(event)
        self._before = event
        item.go_on(delta.content)
        sequence = sequence_number(event.attempt, last.n + 1, 0)
        if sequence <= self._after:
            return []
        kind, text = TEXT_DELTA, json.dumps(delta.content)
        data = f'{{"type":"{kind}","sequence_number":{sequence},{head}{text},"logprobs":[]}}'
        return [f"event: {kind}\ndata: {data}\n\n".encode()]

    # -- numbers ----------------------------------------------------------------------------------

    def _frames(self, event_id: EventId, told: Iterable[Fields]) -> list[bytes]:
        frames = []
        sequence = sequence_number(*event_id, 0) - 1
        end = sequence_number(*event_id, LAST)
        for fields in told:
            sequence += 1
            if self._found_at == event_id:
                sequence = max(sequence, self._after + 1)  # the client has had a part of what this event became
            if self._after < sequence < end:
                if fields["type"] == "response.in_progress":
                    fields["response"] = self._head | {"status": "in_progress", "output": self._shown()}
                elif event_id == _START:
                    fields["response"] = self._head
                frames.append(_frame(sequence, fields))
        return frames

    def _shown(self) -> list[dict[str, Any]]:
        """Return all items so far; those that are incomplete do not count any more."""
        counting = {id(item) for item in self._live.values()}
        return [
            item.value() | ({"status": OPEN} if id(item) in counting and item.status == "incomplete" else {})
            for item in self._items
        ]

    # -- events -----------------------------------------------------------------------------------

    def _told(self, event: Event) -> Iterator[Fields]:
        before = self._before
        if not self._transcript.apply(event):
            return
        self._before = event
        yield from self._turn_to(event, before)
        match event:
            case DeltaEvent():
                # If the client was lost, this is part of what it has just been told.
                if self._found_at != event.event_id:
                    yield from self._add(event.choice, event.delta)
            case Snapshot():
                yield from self._replace(event.event_id)
            case AttemptStarted():
                self._provider = event.provider
                yield self._in_progress()
            case AttemptFailed() if event.retry_in is not None:
                yield from self._drop()
            case AttemptFinished():
                yield from self._close(complete=True)
            case JobCompleted() | JobFailed() | JobCancelled() | JobExpired():
                yield from self._settle(event.attempt, complete=isinstance(event, JobCompleted))
            case _:  # a failed attempt that is the last one: what comes next says what counts; or an unknown type
                pass

    def _turn_to(self, event: Event, before: Event | None) -> Iterator[Fields]:
        """Tell what changes because ``event`` is of a new attempt, or because events before it are not known."""
        here = event.event_id
        last = _START if before is None else before.event_id
        if self._client_at > last and (here > self._client_at or not _follows(event, before)):
            self._is_lost = True  # there are events that the client has had, and that were not told here
        found = self._is_lost and here >= self._client_at
        if found:
            self._is_lost = False
            self._found_at = here
            self._must_tell_drop = True
        if here.attempt > last.attempt:
            if found or not leaves_open(event):
                yield from self._drop()
            if not self._live:
                self._ids = ItemIds(self._job.id, here.attempt)
        if found and here.attempt == self._client_at.attempt:
            yield from self._tell_anew(here)

    def _in_progress(self) -> Fields:
        self._must_tell_drop = False
        return {"type": "response.in_progress"}

    def _drop(self) -> Iterator[Fields]:
        """Close what was sent, which does not count any more."""
        for item in self._live.values():
            yield from self._drop_item(item)
        self._live = {}
        self._calls = {}
        self._annotated = {}
        self._closed = False

    def _drop_item(self, item: StreamedItem) -> Iterator[Fields]:
        self._must_tell_drop = True
        if not isinstance(item, CallItem):
            yield from item.close("incomplete")
        else:
            self._void[item.id] = item
        item.void()

    def _tell_anew(self, event_id: EventId) -> Iterator[Fields]:
        """Tell the output so far to a client of which nobody knows what it holds."""
        self._items = []
        self._live = {}
        self._void = {}
        self._closed = False
        self._annotated = {}
        self._ids = ItemIds(self._job.id, event_id.attempt)
        yield self._in_progress()  # which shows nothing: what the client holds does not count any more
        yield from self._add_missing()

    def _replace(self, event_id: EventId) -> Iterator[Fields]:
        """Tell a snapshot: the rest of what was sent, or all of it if it is another output."""
        if self._live and not self._is_continued():
            yield from self._drop()
            self._ids = ItemIds(self._job.id, *event_id)
        yield from self._add_missing()

    def _is_continued(self) -> bool:
        """Whether the output begins with what was sent, and nothing is missing of items that are closed."""
        known = 0
        for choice in self._transcript.choices:
            for (kind, number), texts in _texts(choice).items():
                item = self._live.get((choice.index, kind, number))
                if item is None:
                    continue
                known += 1
                if isinstance(item, CallItem) and not item.is_of(choice.tool_calls[number]):
                    return False
                if not all(whole.startswith(sent) for whole, sent in zip(texts, item.texts(), strict=True)):
                    return False
        return known == len(self._live) and not (self._closed and any(True for _ in self._missing()))

    def _missing(self) -> Iterator[tuple[_Key, int, str]]:
        """Yield what the output has beyond what was sent: whose it is, the number of the text, and the text."""
        for choice in self._transcript.choices:
            for (kind, number), texts in _texts(choice).items():
                item = self._live.get((choice.index, kind, number))
                sent = item.texts() if item is not None else ("",) * len(texts)
                for place, (whole, known) in enumerate(zip(texts, sent, strict=True)):
                    if len(whole) > len(known) or (kind == "call" and item is None):
                        yield (choice.index, kind, number), place, whole[len(known) :]

    def _add_missing(self, *, whole: bool = False) -> Iterator[Fields]:
        """Tell what the output has beyond what was sent; ``whole``: nothing more will come."""
        choices = {choice.index: choice for choice in self._transcript.choices}
        for (choice, kind, number), place, text in list(self._missing()):
            if kind == "reasoning":
                yield from self._reason(choice, text)
            elif kind == "message":
                yield from self._say(choice, _PARTS[place], text)
            else:
                call = choices[choice].tool_calls[number]
                self._calls[choice, number] = begun = _Call(call.id, call.name, call.type)
                if (choice, kind, number) not in self._live and self._is_used(call):
                    if whole:
                        self._take_over(choice, number, call)
                    else:
                        begun.held.append(text)
                    continue
                yield from self._call(choice, number, call, text)
        for index, snapshot in choices.items():
            known = (snapshot.extra or {}).get("annotations")
            if isinstance(known, list):
                yield from self._annotate(index, known[self._annotated.get(index, 0) :])

    def _add(self, choice: int, delta: Delta) -> Iterator[Fields]:
        if delta.reasoning:
            yield from self._reason(choice, delta.reasoning)
        if delta.content:
            yield from self._say(choice, "output_text", delta.content)
        if delta.refusal:
            yield from self._say(choice, "refusal", delta.refusal)
        for fragment in delta.tool_calls or ():
            yield from self._grow(choice, fragment)
        annotations = delta.extra.get("annotations") if delta.extra else None
        if isinstance(annotations, list):
            yield from self._annotate(choice, annotations)

    # -- items ------------------------------------------------------------------------------------

    def _open(self, key: _Key, item: StreamedItem) -> Iterator[Fields]:
        if self._must_tell_drop:
            yield self._in_progress()
        self._items.append(item)
        self._live[key] = item
        yield from item.begin()

    def _reason(self, choice: int, piece: str) -> Iterator[Fields]:
        key = (choice, "reasoning", 0)
        item = self._live.get(key)
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(self._ids.reasoning(choice), len(self._items))
            yield from self._open(key, item)
        if piece:
            yield from item.append(piece)

    def _say(self, choice: int, part: str, piece: str) -> Iterator[Fields]:
        key = (choice, "message", 0)
        item = self._live.get(key)
        if not isinstance(item, MessageItem):
            item = MessageItem(self._ids.message(choice), len(self._items))
            yield from self._open(key, item)
        yield from item.append(part, piece)

    def _annotate(self, choice: int, added: list[Any]) -> Iterator[Fields]:
        told = self._annotated.get(choice, 0)
        item = self._live.get((choice, "message", 0))
        if isinstance(item, MessageItem) and item.is_open:
            for number, value in enumerate(added[:_MAX_ANNOTATIONS], told):
                if isinstance(value, dict):
                    yield from item.annotate(annotation(value), number)
        self._annotated[choice] = told + len(added)

    def _grow(self, choice: int, fragment: ToolCallDelta) -> Iterator[Fields]:
        """Tell what a call has gained; it is opened once its name and id are known."""
        call = self._calls.setdefault((choice, fragment.index), _Call())
        call.id = fragment.id or call.id
        call.name = fragment.name or call.name
        call.type = fragment.type or call.type
        if fragment.arguments:
            call.held.append(fragment.arguments)
        key = (choice, "call", fragment.index)
        item = self._live.get(key)
        if isinstance(item, CallItem) and not item.is_of(call.value()):
            # Its name or id has changed, which no event can say: what was sent of it does not count any more.
            call.held.insert(0, item.arguments)
            yield from self._drop_item(item)
            del self._live[key]
            item = None
        if item is not None or (call.id and call.name and not self._is_used(call.value())):
            piece = "".join(call.held)
            call.held = []
            yield from self._call(choice, fragment.index, call.value(), piece)

    def _is_used(self, call: ToolCall) -> bool:
        """Whether a dropped call has the id of this one."""
        return self._ids.call(call.id, call.type) in self._void

    def _take_over(self, choice: int, number: int, call: ToolCall) -> None:
        item = self._void.pop(self._ids.call(call.id, call.type))
        item.revive(call)
        self._live[choice, "call", number] = item
        self._must_tell_drop = True  # the client is to see that it counts again

    def _call(self, choice: int, number: int, call: ToolCall, piece: str) -> Iterator[Fields]:
        key = (choice, "call", number)
        item = self._live.get(key)
        if not isinstance(item, CallItem):
            item = CallItem(self._ids.call(call.id, call.type), len(self._items), call)
            yield from self._open(key, item)
        if piece:
            yield from item.append(piece)

    # -- the end ----------------------------------------------------------------------------------

    def _settle(self, attempt: int, *, complete: bool) -> Iterator[Fields]:
        """Close what is open when the job ends with this attempt; drop what its row does not have."""
        if not self._is_continued():
            yield from self._drop()
        yield from self._drop_renamed(attempt)
        if not self._closed:
            yield from self._close(complete=complete)
        for dropped in self._void.values():
            yield from dropped.end_void()
        if self._must_tell_drop:
            yield self._in_progress()

    def _drop_renamed(self, attempt: int) -> Iterator[Fields]:
        """Drop items that have other ids in the final response, so that they are told again under these.

        The final response is made of the row, which knows of one attempt only. What was told may have come from an
        earlier one, whose output this one carries over, or from a snapshot.
        """
        self._ids = ItemIds(self._job.id, attempt)
        for key, item in list(self._live.items()):
            choice, kind, _ = key
            if kind == "call":  # whose id is the call's
                continue
            if item.id != (self._ids.reasoning(choice) if kind == "reasoning" else self._ids.message(choice)):
                yield from self._drop_item(item)
                del self._live[key]
                self._closed = False
                if kind == "message":
                    self._annotated.pop(choice, None)

    def _close(self, *, complete: bool) -> Iterator[Fields]:
        """Close the output's items, now that nothing more will come."""
        yield from self._add_missing(whole=True)  # also calls that never got a name or an id
        choices = {choice.index: choice for choice in self._transcript.choices}
        for index, choice in choices.items():
            carries = carried_by(choice, self._provider)
            if carries:
                yield from self._reason(index, "")
                item = self._live[index, "reasoning", 0]
                assert isinstance(item, ReasoningItem)
                item.carries = carries
        if self._must_tell_drop:
            yield self._in_progress()
        for (index, _, _), item in self._live.items():
            if isinstance(item, MessageItem):
                item.extra = choices[index].extra
            yield from item.close(item_status(choices[index].finish_reason, complete=complete))
        self._closed = True

    def _result(self, event: TerminalEvent) -> CompletionResult:
        """Return the job as events have told it."""
        return self._job.model_copy(
            update={
                "status": event.status,
                "attempt": event.attempt,
                "provider": self._provider,
                "attempts": [],
                "choices": [choice.to_choice() for choice in self._transcript.choices],
                "usage": event.usage,
                "error": event.error,
                "output_sha256": event.output_sha256,
                "terminal_event_id": event.id,
                "provider_details": self._transcript.provider_details,
                "finished_at": datetime.fromtimestamp(event.ts / 1000, UTC),
            }
        )


def _follows(event: Event, before: Event | None) -> bool:
    """Whether no event is missing between these two; of an attempt that is over, the end may be missing unnoticed."""
    here = event.event_id
    if before is not None and here.attempt == before.attempt:
        # Any other snapshot stands for what was lost.
        is_due = not isinstance(event, Snapshot) or isinstance(before, AttemptStarted | AttemptFailed)
        return is_due and here.n == before.event_id.n + 1
    return here.n == 1 and not isinstance(event, Snapshot) and (before is not None or here.attempt == 1)


def _texts(choice: ChoiceSnapshot) -> dict[tuple[str, int], tuple[str, ...]]:
    """Return the texts of a choice by the kind of their item and its number, as items have them."""
    calls = {("call", number): (call.arguments,) for number, call in enumerate(choice.tool_calls)}
    return {("reasoning", 0): (choice.reasoning,), ("message", 0): (choice.content, choice.refusal), **calls}


def _frame(sequence: int, fields: Fields) -> bytes:
    """Return an event as it is sent."""
    kind = fields["type"]
    data = json.dumps({"type": kind, "sequence_number": sequence, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()
