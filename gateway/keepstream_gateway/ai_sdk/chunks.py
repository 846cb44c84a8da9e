"""Chunks: a job's events as the AI SDK's UI message stream.

In: typed events, each once and in order, as the client's follower gives them.  Out: chunks, JSON objects from which
``useChat`` builds its message; as server-sent events.  Pure.

The stream of a job is one step of a message.  Whatever happens, the message equals the stored answer in the end: a
failed attempt's output is dropped by ``reset-step``, which the AI SDK knows since version 7.  For older ones
(``resets`` is False) the stream ends with an error instead, and resuming it brings the attempt that goes on.  Tool
calls are complete only when the job is stored, so that a page which answers them finds everything there.
"""

import json
from collections.abc import Iterator, Sequence
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
    ToolCallDelta,
)
from keepstream.results import Choice, ToolCall

Chunk = dict[str, Any]

HEADERS: Final = {"x-vercel-ai-ui-message-stream": "v1"}
DONE: Final = b"data: [DONE]\n\n"
NAMESPACE: Final = "keepstream"  #: Under which our own data stand in metadata.

#: Why an answer ended, in the AI SDK's words, by the provider's.
_FINISH_REASONS: Final = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content-filter",
    "tool_calls": "tool-calls",
    "function_call": "tool-calls",
}
_STARTS_OVER: Final = "The answer broke off and is being written anew; resume the stream to follow it."


def encode(chunks: Sequence[Chunk]) -> bytes:
    """Return chunks as server-sent events."""
    return b"".join(b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks)


def error(text: str) -> Chunk:
    """Return the chunk that says that something failed; it ends the stream for the page."""
    return {"type": "error", "errorText": text}


def start(message_id: str, job_id: str) -> Chunk:
    """Return the chunk that begins a message."""
    return {"type": "start", "messageId": message_id, "messageMetadata": {NAMESPACE: {"job": job_id}}}


class Step:
    """One job as one step of a message.

    Args:
        job_id: The job.
        resets: Whether the reader knows ``reset-step``.
        first_attempt: The first attempt whose output is shown; older ones are known to have failed.
    """

    def __init__(self, job_id: str, *, resets: bool = True, first_attempt: int = 1) -> None:
        self.ended = False  #: Whether no chunk can follow.
        self.job_id = job_id
        self._resets = resets
        self._attempt = first_attempt
        self._output = _Output(job_id)

    def begin(self) -> list[Chunk]:
        """Return the chunks before the first event."""
        return [{"type": "start-step"}]

    def apply(self, event: Event) -> list[Chunk]:
        """Return the chunks that an event means."""
        if self.ended:
            return []
        chunks: list[Chunk] = []
        match event:
            case JobCompleted():
                chunks += self._output.finish()
                finish = {"type": "finish", "finishReason": _reason(event.finish_reasons.get(0))}
                chunks += [{"type": "finish-step"}, {**finish, "messageMetadata": _metadata(event)}]
            case JobCancelled():
                chunks += [*self._output.close(), {"type": "abort", "reason": "cancelled"}]
            case JobFailed() | JobExpired():
                text = event.error.message if event.error else f"the job is {event.status}"
                chunks += [*self._output.close(), error(text)]
            case _ if event.attempt < self._attempt:
                return []
            case AttemptStarted():
                if event.attempt > self._attempt and not event.continues:
                    chunks += self._drop()
                self._attempt = event.attempt
            case DeltaEvent() if event.choice == 0:
                chunks += self._output.add(event.delta)
            case Snapshot():
                self._attempt = event.attempt
                chunks += self._show([choice for choice in event.choices if choice.index == 0])
            case AttemptFailed() if event.retry_in is not None:  # else the row keeps what there is
                chunks += self._drop()
            case AttemptFinished():
                chunks += self._output.close()
            case _:
                pass
        if chunks and chunks[-1]["type"] in {"finish", "abort", "error"}:
            self.ended = True
        return chunks

    def _drop(self) -> list[Chunk]:
        """Take back what the attempt has sent."""
        if self._output.is_empty:
            return []
        self._output = _Output(self.job_id)
        return [{"type": "reset-step"} if self._resets else error(_STARTS_OVER)]

    def _show(self, choices: list[ChoiceSnapshot]) -> list[Chunk]:
        """Let the reader have exactly this output, by adding to what it has where that is enough."""
        whole = choices[0] if choices else ChoiceSnapshot(index=0)
        missing = self._output.missing(whole)
        if missing is not None:
            return self._output.add(missing)
        dropped = self._drop()
        if not self._resets:
            return dropped
        everything = self._output.missing(whole)
        assert everything is not None
        return dropped + self._output.add(everything)


def stored_step(job_id: str, choice: Choice, outputs: dict[str, Any]) -> list[Chunk]:
    """Return the chunks of a step that has ended: a stored answer, and what the page's tools gave for its calls.

    Args:
        job_id: The job.
        choice: Its answer.
        outputs: What came of each call, by the call's id.
    """
    output = _Output(job_id)
    whole = output.missing(ChoiceSnapshot.of(choice))
    assert whole is not None
    chunks = [{"type": "start-step"}, *output.add(whole), *output.finish()]
    chunks += [
        {"type": "tool-output-available", "toolCallId": call.id, "output": outputs[call.id]}
        for call in choice.tool_calls
        if call.id in outputs
    ]
    return [*chunks, {"type": "finish-step"}]


class _Output:
    """What the reader has of the present attempt."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": [], "refusal": []}
        self._calls: dict[int, _Call] = {}
        self._extras: dict[str, int] = {"images": 0, "annotations": 0}  # so many are sent
        self._open: tuple[str, Chunk] | None = None  # the field whose part is open, and the chunk that ends it
        self._parts = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been sent."""
        return not self._parts

    def add(self, delta: Delta) -> list[Chunk]:
        """Send more."""
        chunks: list[Chunk] = []
        for field in self._texts:
            piece = getattr(delta, field)
            if piece:
                chunks += self._text(field, piece)
        for fragment in delta.tool_calls or ():
            chunks += self._fragment(fragment)
        if delta.extra:
            chunks += self._extra(delta.extra)
        return chunks

    def missing(self, whole: ChoiceSnapshot) -> Delta | None:
        """Return what the reader lacks of a whole output; None: it has something that is not in it."""
        rest: dict[str, Any] = {}
        for field, pieces in self._texts.items():
            sent = "".join(pieces)
            if not getattr(whole, field).startswith(sent):
                return None
            rest[field] = getattr(whole, field)[len(sent) :]
        fragments = []
        for index, call in enumerate(whole.tool_calls):
            sent_call = self._calls.get(index, _Call())
            if not sent_call.is_beginning_of(call):
                return None
            fragments.append(
                ToolCallDelta(
                    index=index,
                    id=call.id,
                    name=call.name,
                    type=call.type,
                    arguments=call.arguments[len(sent_call.text) :],
                )
            )
        if any(index >= len(whole.tool_calls) for index in self._calls):
            return None
        extra = {name: (whole.extra or {}).get(name) for name in self._extras}
        new = {name: given[self._extras[name] :] for name, given in extra.items() if isinstance(given, list)}
        return Delta(**rest, tool_calls=fragments, extra=new)

    def close(self) -> list[Chunk]:
        """End the part that is open."""
        if self._open is None:
            return []
        _, end = self._open
        self._open = None
        return [end]

    def finish(self) -> list[Chunk]:
        """End everything; the calls are complete."""
        chunks = self.close()
        for index in sorted(self._calls):
            chunks += self._calls[index].finish(self._call_id(index))
            self._parts += 1
        return chunks

    def _text(self, field: str, piece: str) -> list[Chunk]:
        chunks: list[Chunk] = []
        kind = "reasoning" if field == "reasoning" else "text"
        if self._open is None or self._open[0] != field:
            chunks += self.close()
            self._parts += 1
            part = {"id": f"{kind[0]}{self._parts}"}
            self._open = field, {"type": f"{kind}-end", **part}
            ours = {"providerMetadata": {NAMESPACE: {"refusal": True}}} if field == "refusal" else {}
            chunks.append({"type": f"{kind}-start", **part, **ours})
        self._texts[field].append(piece)
        return [*chunks, {"type": f"{kind}-delta", "id": self._open[1]["id"], "delta": piece}]

    def _fragment(self, fragment: ToolCallDelta) -> Iterator[Chunk]:
        yield from self.close()
        self._parts += 1
        call = self._calls.setdefault(fragment.index, _Call())
        yield from call.add(fragment, self._call_id)

    def _call_id(self, index: int) -> str:
        return self._calls[index].id or f"{self._job_id}-{index}"  # some providers give none

    def _extra(self, extra: dict[str, Any]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for name, make in (("images", _file), ("annotations", _source)):
            given = extra.get(name)
            for item in given if isinstance(given, list) else ():
                self._extras[name] += 1
                chunk = make(item, f"{self._job_id}-{self._extras[name]}")
                if chunk is not None:
                    self._parts += 1
                    chunks.append(chunk)
        return [*self.close(), *chunks] if chunks else []


class _Call:
    """What the reader has of a tool call."""

    def __init__(self) -> None:
        self.id = ""
        self._name = ""
        self._type = "function"
        self._pieces: list[str] = []
        self._told = 0  # pieces that the reader has
        self._announced: tuple[str, str] | None = None  # under this id and name

    @property
    def text(self) -> str:
        """The arguments so far."""
        return "".join(self._pieces)

    def is_beginning_of(self, call: ToolCall) -> bool:
        """Whether what the reader has is the beginning of a call."""
        announced = self._announced in {None, (call.id or (self._announced or ("",))[0], call.name)}
        return announced and call.arguments.startswith(self.text)

    def add(self, fragment: ToolCallDelta, call_id: Any) -> Iterator[Chunk]:
        """Send more of it, once it has a name."""
        self.id = fragment.id or self.id
        self._name = fragment.name or self._name
        self._type = fragment.type or self._type
        if fragment.arguments:
            self._pieces.append(fragment.arguments)
        if not self._name or not self._pieces:
            return  # a name may come in pieces, but not after the arguments have begun
        if self._announced is None:
            self._announced = call_id(fragment.index), self._name
            yield {"type": "tool-input-start", "toolCallId": self._announced[0], "toolName": self._announced[1]}
        text = "".join(self._pieces[self._told :])
        self._told = len(self._pieces)
        if text:
            yield {"type": "tool-input-delta", "toolCallId": self._announced[0], "inputTextDelta": text}

    def finish(self, call_id: str) -> Iterator[Chunk]:
        """Send it whole."""
        id_, name = self._announced or (call_id, self._name)
        call: Chunk = {"toolCallId": id_, "toolName": name}
        if self._type != "function":  # what goes in is a text
            yield {"type": "tool-input-available", **call, "input": self.text}
            return
        try:
            value = json.loads(self.text or "{}")
        except (ValueError, RecursionError):
            text = "the model's arguments are no valid JSON"
            yield {"type": "tool-input-error", **call, "input": self.text, "errorText": text}
        else:
            yield {"type": "tool-input-available", **call, "input": value}


def _reason(reason: str | None) -> str:
    return _FINISH_REASONS.get(reason or "", "other")


def _metadata(event: JobCompleted) -> dict[str, Any]:
    usage = event.usage.model_dump(mode="json") if event.usage else None
    return {NAMESPACE: {"job": event.job_id, "attempts": event.attempts, "usage": usage}}


def _file(image: Any, _id: str) -> Chunk | None:
    """Return the chunk of a generated image; one that is too large for events is in the row only."""
    inner = image.get("image_url") if isinstance(image, dict) else None
    url = inner.get("url") if isinstance(inner, dict) else inner
    if not isinstance(url, str):
        return None
    kind = url[len("data:") :].partition(";")[0] if url.startswith("data:") else "image/*"
    return {"type": "file", "url": url, "mediaType": kind}


def _source(annotation: Any, id_: str) -> Chunk | None:
    """Return the chunk of a page that the answer cites."""
    cited = annotation.get("url_citation") if isinstance(annotation, dict) else None
    if not isinstance(cited, dict) or not isinstance(cited.get("url"), str):
        return None
    chunk: Chunk = {"type": "source-url", "sourceId": id_, "url": cited["url"]}
    return {**chunk, "title": cited["title"]} if isinstance(cited.get("title"), str) else chunk
