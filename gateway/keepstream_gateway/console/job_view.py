"""One job as people see it.

In: a stored job.  Out: a ``JobView`` to the page.  Pure.

What a model or a caller wrote is shown as text; an image or a sound only if its bytes are in the job: a page that
loaded something from elsewhere would tell that place who looks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from keepstream.errors import ErrorCode, ErrorInfo
from keepstream.extras import LEFT_OUT, REASONING_FIELDS
from keepstream.results import AttemptResult, Choice, CompletionResult, JobStatus, Usage, UsageSource
from keepstream_gateway.console.jobs_view import address_of
from keepstream_gateway.console.words import (
    Moment,
    Tone,
    amount,
    count,
    duration,
    moment,
    outcome,
    plural,
    pretty,
    size,
    status,
)

_SHOWN: Final = 200_000  #: Characters of one text that the page has; the JSON has all.
_EXTRA_SHOWN: Final = 20_000
_NAMES_SHOWN: Final = 300
#: Of a request that has very much.
_MESSAGES_SHOWN: Final = 500
_BLOCKS_SHOWN: Final = 1000
_REQUEST_SHOWN: Final = 2_000_000  #: Characters.
_TITLE: Final = 160
_PICTURE: Final = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")
_SOUNDS: Final = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
_WIDTH: Final = 1000.0  #: Of a time line.


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence, and its tone."""

    text: str
    tone: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """Something to go to."""

    address: str
    title: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Media:
    """An image or a sound, with its bytes in its address."""

    source: str
    words: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call."""

    name: str
    id: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the model."""

    heading: str
    content: str
    reasoning: str
    refusal: str
    calls: Sequence[Call]
    pictures: Sequence[Media]
    sounds: Sequence[Media]
    links: Sequence[Link]
    left_out: str
    extra: str
    extra_names: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a time line, from 0 to 1000."""

    start: float
    first: float | None  #: When the first output came.
    end: float
    tone: str
    words: str


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt."""

    number: str
    outcome: Tone
    took: str
    bar: Bar
    target: str
    first_token: str
    tokens: str
    cost: str
    code: str
    error: str
    http: int | None
    said: str
    reason: str
    worker: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a message: text, picture or data."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the request."""

    role: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and a value."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class JobView:
    """The page."""

    id: str
    tenant: str
    address: str
    title: str
    target: str
    status: Tone
    is_live: bool
    is_still: bool  #: Live, with what has come so far: for a browser without scripts.
    created: Moment
    retry_of: Link | None
    waiting: Said | None
    may_cancel: bool
    may_retry: bool
    retry_word: str
    retry_words: str
    error: Said | None
    state: str
    finish: str
    answers: Sequence[Answer]
    no_answer: str
    proof: str
    messages: Sequence[Message]
    parameters: str
    parameter_names: str
    attempts: Sequence[AttemptRow]
    axis: str
    facts: Sequence[Fact]
    usage: str
    metadata: str
    events_words: str


def show(job: CompletionResult, now: datetime, so_far: Sequence[Choice] | None = None) -> JobView:
    """Return the page; with ``so_far``, that of a job that goes on, and what has come of its answer."""
    is_live = not job.status.terminal
    choices = job.choices if so_far is None or not is_live else so_far
    request = job.request or {}
    parameters = {name: value for name, value in request.items() if name not in {"messages", "model"}}
    end = job.finished_at or now
    return JobView(
        id=job.id,
        tenant=job.tenant,
        address=address_of(job.tenant, job.id),
        title=_title(job),
        target=f"{job.provider}/{job.model}",
        status=status(job.status),
        is_live=is_live,
        is_still=is_live and so_far is not None,
        created=moment(job.created_at, now),
        retry_of=None if job.retry_of is None else Link(address_of(job.tenant, job.retry_of), id=job.retry_of),
        waiting=_waiting(job),
        may_cancel=is_live,
        may_retry=not is_live and (job.error is None or job.error.code != ErrorCode.INVALID_JOB),
        retry_word="Run again" if job.status is JobStatus.COMPLETED else "Retry",
        retry_words="The same request is made once more, as a new job, and paid for once more.",
        error=_error(job),
        state=_state(job),
        finish=_finish(job),
        answers=[_answer(choice, len(choices)) for choice in choices],
        no_answer="The job ended without an answer.",
        proof=job.output_sha256 or "" if job.choices else "",
        messages=_messages(_list(request.get("messages"))),
        parameters=pretty(parameters, _EXTRA_SHOWN) if parameters else "",
        parameter_names=_names(parameters),
        attempts=[_attempt(attempt, job.created_at, end, now) for attempt in job.attempts],
        axis=f"{'ended' if job.finished_at else 'now'}, {duration((end - job.created_at).total_seconds())} later",
        facts=_facts(job, now),
        usage=pretty(job.usage.details, _EXTRA_SHOWN) if job.usage is not None and job.usage.details else "",
        metadata=pretty(job.metadata, _EXTRA_SHOWN) if job.metadata else "",
        events_words="as they come" if is_live else "as the log has them; some time after the end it has them no more",
    )


def _title(job: CompletionResult) -> str:
    for message in reversed(_list((job.request or {}).get("messages"))):
        if isinstance(message, Mapping) and message.get("role") == "user":
            texts = [block.text for block in _blocks(message.get("content")) if block.kind == "text"]
            line = " ".join(" ".join(texts).split())
            return (line[: _TITLE - 1] + "…" if len(line) > _TITLE else line) or job.id
    return job.id


def _waiting(job: CompletionResult) -> Said | None:
    why = job.waiting_for
    return None if why is None else Said(why.text, "" if why.passes else "bad")


def _state(job: CompletionResult) -> str:
    return {
        JobStatus.QUEUED: "The job waits; its answer will come here.",
        JobStatus.RETRYING: "The next attempt is waited for; its answer will come here.",
    }.get(job.status, "The answer is on its way.")


def _error(job: CompletionResult) -> Said | None:
    error: ErrorInfo | None = job.error
    if error is None:
        return None
    return Said(error.message, "" if job.status is JobStatus.CANCELLED else "bad", error.code)


def _finish(job: CompletionResult) -> str:
    reasons = sorted({choice.finish_reason for choice in job.choices if choice.finish_reason})
    words = [f"finish reason: {', '.join(reasons)}"] if reasons else []
    if job.partial:
        words.append("not complete")
    return " · ".join(words)


# -- answers --------------------------------------------------------------------------------------

_SHOWN_OTHERWISE: Final = frozenset({"images", "audio", "annotations", LEFT_OUT, REASONING_FIELDS})


def _answer(choice: Choice, number: int) -> Answer:
    extra = choice.extra or {}
    other = {name: value for name, value in extra.items() if name not in _SHOWN_OTHERWISE}
    for name in ("images", "audio", "annotations"):  # what could not be shown is told at least
        if name in extra and not (_pictures(extra) or _sounds(extra) or _links(extra)):
            other[name] = extra[name]
    return Answer(
        heading=f"Answer {choice.index + 1}" if number > 1 else "",
        content=_cut(choice.content),
        reasoning=_cut(choice.reasoning),
        refusal=_cut(choice.refusal),
        calls=[Call(call.name, call.id, _cut(call.arguments)) for call in choice.tool_calls],
        pictures=_pictures(extra),
        sounds=_sounds(extra),
        links=_links(extra),
        left_out="; ".join(f"{name}: {why}" for name, why in choice.left_out.items()),
        extra=pretty(other, _EXTRA_SHOWN) if other else "",
        extra_names=_names(other),
    )


def _pictures(extra: Mapping[str, Any]) -> list[Media]:
    sources = [_picture(image) for image in _list(extra.get("images"))]
    found = [source for source in sources if source is not None]
    return [Media(source, f"Image {number} of the answer") for number, source in enumerate(found, 1)]


def _picture(part: Any) -> str | None:
    """Return the address of an image whose bytes are in it; None: they are not."""
    place = part.get("image_url") if isinstance(part, Mapping) else None
    address = place.get("url") if isinstance(place, Mapping) else place
    return address if isinstance(address, str) and _PICTURE.fullmatch(address) else None


def _sounds(extra: Mapping[str, Any]) -> list[Media]:
    audio = extra.get("audio")
    if not isinstance(audio, Mapping) or not isinstance(audio.get("data"), str):
        return []
    kind = _SOUNDS.get(str(audio.get("format", "wav")), "audio/wav")
    return [Media(f"data:{kind};base64,{audio['data']}", "The answer as speech")]


def _links(extra: Mapping[str, Any]) -> list[Link]:
    links: dict[str, Link] = {}
    for note in _list(extra.get("annotations")):
        cited = note.get("url_citation", note) if isinstance(note, Mapping) else None
        if not isinstance(cited, Mapping):
            continue
        address = cited.get("url")
        if isinstance(address, str) and address.startswith(("https://", "http://")):
            links.setdefault(address, Link(address, str(cited.get("title") or address)))
    return list(links.values())


# -- the request ----------------------------------------------------------------------------------


def _messages(messages: list[Any]) -> list[Message]:
    """Return the messages of a request; of many, the last ones, as far as the page has room for them."""
    shown: list[Message] = []
    blocks = characters = 0
    for message in reversed(messages):
        shown.append(_message(message))
        blocks += len(shown[-1].blocks)
        characters += sum(len(block.text) for block in shown[-1].blocks if block.kind != "picture")
        if len(shown) >= _MESSAGES_SHOWN or blocks >= _BLOCKS_SHOWN or characters >= _REQUEST_SHOWN:
            break
    if len(shown) < len(messages):
        earlier = plural(len(messages) - len(shown), "earlier message")
        shown.append(Message("…", [Block("text", f"[{earlier}; the JSON has all of them]")]))
    return shown[::-1]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        return Message("?", [Block("data", pretty(message, _EXTRA_SHOWN))])
    blocks = _blocks(message.get("content"))
    rest = {name: value for name, value in message.items() if name not in {"role", "content"}}
    if rest:
        blocks.append(Block("data", pretty(rest, _EXTRA_SHOWN)))
    return Message(str(message.get("role", "?")), blocks)


def _blocks(content: Any) -> list[Block]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Block("text", _cut(content))]
    blocks = []
    for part in (_list(content) or [content])[:_BLOCKS_SHOWN]:
        picture = _picture(part)
        if picture is not None:
            blocks.append(Block("picture", picture))
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            blocks.append(Block("text", _cut(part["text"])))
        else:
            blocks.append(Block("data", pretty(part, _EXTRA_SHOWN)))
    return blocks


# -- attempts and figures -------------------------------------------------------------------------

_REASONS: Final = {
    "first": "the first",
    "retry": "a retry",
    "worker_lost": "its worker before was lost",
    "interrupted": "its worker before stopped",
}


def _attempt(attempt: AttemptResult, begin: datetime, end: datetime, now: datetime) -> AttemptRow:
    ended = attempt.finished_at or now
    took = duration(max(0.0, (ended - attempt.started_at).total_seconds()))
    error, said = attempt.error, attempt.provider_error
    return AttemptRow(
        number=str(attempt.number),
        outcome=outcome(attempt.outcome),
        took=took,
        bar=_bar(attempt, begin, end, ended),
        target=f"{attempt.provider}/{attempt.model}",
        first_token="" if attempt.first_token_ms is None else duration(attempt.first_token_ms / 1000),
        tokens=_used(attempt.usage),
        cost="" if attempt.usage is None or attempt.usage.cost is None else f"cost {amount(attempt.usage.cost)}",
        code="" if error is None else error.code,
        error="" if error is None else error.message,
        http=attempt.http_status if attempt.http_status and attempt.http_status >= 400 else None,
        said="" if said is None else said.message or "",
        reason=_REASONS.get(attempt.reason, attempt.reason),
        worker=f"worker {attempt.worker}" if attempt.worker else "no worker",
        request_id=attempt.provider_request_id or "",
    )


_BAR_TONES: Final = {"good": "good", "bad": "bad", "busy": "busy"}


def _bar(attempt: AttemptResult, begin: datetime, end: datetime, ended: datetime) -> Bar:
    whole = max((end - begin).total_seconds(), 0.001)

    def place(at: datetime) -> float:
        return round(min(max((at - begin).total_seconds() / whole, 0.0), 1.0) * _WIDTH, 1)

    start, finish = place(attempt.started_at), place(ended)
    first = None
    if attempt.first_token_ms is not None:
        first = min(round(start + attempt.first_token_ms / 1000 / whole * _WIDTH, 1), finish)
    result = outcome(attempt.outcome)
    after = duration(max(0.0, (attempt.started_at - begin).total_seconds()))
    words = f"Attempt {attempt.number}: began {after} after the job was created, {result.word}"
    return Bar(start, first, finish, _BAR_TONES.get(result.tone, "still"), words)


def _used(usage: Usage | None) -> str:
    if usage is None or usage.total_tokens is None:
        return ""
    about = "about " if usage.source is UsageSource.ESTIMATED else ""
    return f"{about}{_number(usage.prompt_tokens)} tokens read, {_number(usage.completion_tokens)} written"


def _number(value: int | None) -> str:
    return "?" if value is None else count(value)


_SOURCES: Final = {
    UsageSource.PROVIDER: "the provider",
    UsageSource.ESTIMATED: "an estimate",
    UsageSource.UNKNOWN: "nobody",
}


def _facts(job: CompletionResult, now: datetime) -> list[Fact]:
    facts = []
    if job.usage is not None:
        facts.append(Fact("Tokens read", _number(job.usage.prompt_tokens)))
        facts.append(Fact("Tokens written", _number(job.usage.completion_tokens)))
        facts.append(Fact("Counted by", _SOURCES[job.usage.source]))
    if job.usage is not None and job.usage.cost is not None:
        facts.append(Fact("Cost, says the provider", amount(job.usage.cost)))
    if job.started_at is not None:
        facts.append(Fact("Waited", duration((job.started_at - job.created_at).total_seconds())))
        facts.append(Fact("Ran", duration(((job.finished_at or now) - job.started_at).total_seconds())))
    facts.append(Fact("Created", moment(job.created_at, now).full))
    if job.finished_at is not None:
        facts.append(Fact("Ended", moment(job.finished_at, now).full))
    written = sum(len(choice.content.encode()) for choice in job.choices)
    if written and job.finished_at is not None:
        facts.append(Fact("Text", size(written)))
    return facts


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(values: Mapping[str, Any]) -> str:
    names = ", ".join(values)
    return names if len(names) <= _NAMES_SHOWN else f"{names[:_NAMES_SHOWN]}…"


def _cut(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}\n\n[{size(len(text) - most)} more; the JSON has all of it]"
