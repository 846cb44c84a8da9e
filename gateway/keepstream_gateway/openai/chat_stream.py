"""Tells a job's events as the chunks of a chat completion.

In: a job's events from the first one on.  Out: server-sent events as bytes.

**A retry.** A chunk cannot be taken back. As long as nothing of an attempt's output was sent, the next attempt goes on
unnoticed. If something was, and the job's output does not begin with it any more, the stream ends with an error chunk,
at which OpenAI's libraries raise: better than an answer with two beginnings. The job goes on, and its completion can
be had by its id.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from keepstream import next_turn
from keepstream.events import (
    AttemptFailed,
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
from keepstream.results import CompletionResult
from keepstream.transcript import Transcript
from keepstream_gateway.openai.attempts import leaves_open
from keepstream_gateway.openai.chat_object import NOT_TOLD, REASONING, chat_usage, finish_reason
from keepstream_gateway.openai.ids import chat_id

DONE: Final = b"data: [DONE]\n\n"
_TEXTS: Final[Mapping[str, str]] = {"reasoning": REASONING, "content": "content", "refusal": "refusal"}

_Head = tuple[str, str, str]  # of a call: id, name, type


class ChatChunks:
    """The stream of one client. Not thread-safe.

    Args:
        job: The job, as it is known when the stream begins.
        with_usage: Whether the usage is to be told at the end.
    """

    def __init__(self, job: CompletionResult, *, with_usage: bool = False) -> None:
        self._job = job
        self._with_usage = with_usage
        self._transcript = Transcript()
        self._provider = job.provider
        self._texts: dict[tuple[int, str], list[str]] = {}  # what was sent, by choice and name
        self._calls: dict[tuple[int, int], tuple[_Head, list[str]]] = {}
        self._begun: set[int] = set()  # choices
        self._extras_sent = False
        self._entries: Counter[tuple[int, str]] = Counter()  # of lists among the extras
        self.ended = False  #: Whether nothing more is to be sent.

    def feed(self, event: Event) -> list[bytes]:
        """Return what ``event`` becomes."""
        return [] if self.ended else list(self._told(event))

    def _told(self, event: Event) -> Iterator[bytes]:
        last = self._transcript.last
        if not self._transcript.apply(event):
            return
        new_attempt = last is not None and event.attempt > last.attempt
        if new_attempt and not leaves_open(event) and self._has_sent:
            yield from self._break_off()
            return
        match event:
            case DeltaEvent():
                yield from self._add(event.choice, event.delta)
            case Snapshot():
                yield from self._replace()
            case AttemptStarted():
                self._provider = event.provider
            case AttemptFailed() if event.retry_in is not None and self._has_sent:
                yield from self._break_off()
            case JobCompleted():
                yield from self._finish(event)
            case JobFailed() | JobCancelled() | JobExpired():
                error = event.error
                yield from self._fail(
                    error.message if error else "the job failed", error.code if error else str(event.status)
                )
            case _:
                pass

    @property
    def _has_sent(self) -> bool:
        return bool(self._texts or self._calls or self._extras_sent)

    # -- chunks -----------------------------------------------------------------------------------

    def _chunks(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> Iterator[bytes]:
        """Yield the chunk of a choice, after first ones of all choices up to it, which clients expect in order."""
        for index in range(choice + 1):
            if index not in self._begun:
                self._begun.add(index)
                yield self._chunk(index, {"role": "assistant", "content": ""})
        yield self._chunk(choice, delta, reason, logprobs)

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]
        return self._frame({"choices": choices, **({"usage": None} if self._with_usage else {})})

    def _frame(self, fields: dict[str, Any]) -> bytes:
        head = {
            "id": chat_id(self._job.id),
            "object": "chat.completion.chunk",
            "created": int(self._job.created_at.timestamp()),
            "model": self._job.model,
        }
        return _data(head | fields)

    def _add(self, choice: int, delta: Delta) -> Iterator[bytes]:
        fields: dict[str, Any] = {}
        for name, told_as in _TEXTS.items():
            if piece := getattr(delta, name):
                self._texts.setdefault((choice, name), []).append(piece)
                fields[told_as] = piece
        if delta.tool_calls:
            fields["tool_calls"] = []
            for fragment in delta.tool_calls:
                if (told := self._call(choice, fragment)) is None:
                    yield from self._break_off()
                    return
                fields["tool_calls"].append(told)
        extra = delta.extra or {}
        for name, value in extra.items():
            if name not in NOT_TOLD:
                self._extras_sent = True
                fields[name] = self._numbered(choice, name, value)
        if fields or "logprobs" in extra:
            yield from self._chunks(choice, fields, logprobs=extra.get("logprobs"))

    def _numbered(self, choice: int, name: str, value: Any) -> Any:
        """Return a list with an index in each entry that has none: OpenAI's library joins lists by that, or raises."""
        if not isinstance(value, list):
            return value
        first = self._entries[choice, name]
        self._entries[choice, name] += len(value)
        return [
            {"index": number, **entry} if isinstance(entry, dict) else entry
            for number, entry in enumerate(value, first)
        ]

    def _call(self, choice: int, fragment: ToolCallDelta) -> dict[str, Any] | None:
        """Return a fragment of a call as a chunk has it; None: it changes what was sent."""
        key = (choice, fragment.index)
        known = self._calls.get(key)
        old = known[0] if known else ("", "", "function")
        head = (fragment.id or old[0], fragment.name or old[1], fragment.type or old[2])
        pieces = known[1] if known else []
        if known is not None and any(before and before != now for before, now in zip(old, head, strict=True)):
            return None
        if fragment.arguments:
            pieces.append(fragment.arguments)
        self._calls[key] = (head, pieces)
        body: dict[str, Any] = {"arguments": fragment.arguments or ""}
        if head[1] != old[1]:
            body["name"] = head[1]
        told: dict[str, Any] = {"index": fragment.index}
        if known is None or head[0] != old[0]:
            told |= {"id": head[0], "type": head[2]}
        kind = "custom" if head[2] == "custom" else "function"
        if kind == "custom":
            body["input"] = body.pop("arguments")
        return told | {kind: body} | (fragment.extra or {})

    def _replace(self) -> Iterator[bytes]:
        """Tell what a snapshot has beyond what was sent, or break off if it is another output."""
        rest = self._rest()
        if rest is None:
            yield from self._break_off()
            return
        for choice, delta in rest:
            yield from self._add(choice, delta)

    def _rest(self) -> list[tuple[int, Delta]] | None:
        """Return what the output has beyond what was sent, or None if it does not begin with that."""
        rest = []
        known = 0
        for choice in self._transcript.choices:
            texts = {}
            for name in _TEXTS:
                sent = "".join(self._texts.get((choice.index, name), ()))
                known += bool(sent)
                whole: str = getattr(choice, name)
                if not whole.startswith(sent):
                    return None
                texts[name] = whole[len(sent) :] or None
            calls = []
            for index, call in enumerate(choice.tool_calls):
                head, pieces = self._calls.get((choice.index, index), (None, []))
                known += head is not None
                sent = "".join(pieces)
                if not call.arguments.startswith(sent) or head not in (None, (call.id, call.name, call.type)):
                    return None
                piece = ToolCallDelta(index=index, arguments=call.arguments[len(sent) :])
                begun = {"id": call.id, "name": call.name, "type": call.type}
                calls.append(piece.model_copy(update=begun) if head is None else piece)
            extra = None if self._extras_sent else choice.extra
            rest.append((choice.index, Delta(**texts, tool_calls=calls or None, extra=extra)))
        return rest if known == len(self._texts) + len(self._calls) else None

    # -- the end ----------------------------------------------------------------------------------

    def _finish(self, event: TerminalEvent) -> Iterator[bytes]:
        if self._rest() is None:
            yield from self._break_off()
            return
        choices = {choice.index: choice for choice in self._transcript.choices} or {0: ChoiceSnapshot(index=0)}
        for index, choice in choices.items():
            message = next_turn.assistant_message(choice.to_choice(), self._provider)
            if (items := message.get(next_turn.ITEMS_FIELD)) is not None:
                yield from self._chunks(index, {next_turn.ITEMS_FIELD: items})
            reason = event.finish_reasons.get(index) or choice.finish_reason
            yield from self._chunks(index, {}, finish_reason(reason, has_calls=bool(choice.tool_calls)))
        if self._with_usage:
            yield self._frame({"choices": [], "usage": chat_usage(event.usage)})
        self.ended = True
        yield DONE

    def _break_off(self) -> Iterator[bytes]:
        completion = chat_id(self._job.id)
        yield from self._fail(
            "the provider failed after a part of its answer was sent, and the job goes on from the beginning; its"
            f" answer will be at /v1/chat/completions/{completion}",
            "answer_restarted",
        )

    def _fail(self, message: str, code: str) -> Iterator[bytes]:
        self.ended = True
        yield error_frame(message, code)


def error_frame(message: str, code: str) -> bytes:
    """Return the event at which OpenAI's libraries raise."""
    return _data({"error": {"message": message, "type": "server_error", "param": None, "code": code}})


def _data(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
