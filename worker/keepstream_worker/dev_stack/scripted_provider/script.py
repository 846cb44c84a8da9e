"""The script: what a request can tell the scripted provider to do.

In: the ``script`` object of a request body, from the server.
Out: a validated ``Script``, to the server, encoding and playback; an unknown field is an error that names it.
"""

import base64
from typing import Annotated, Any, Final, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

DEFAULT_TEXT: Final = (
    "Hello! I am the scripted provider, a small server that comes with Keepstream and speaks the OpenAI "
    "chat-completions protocol. No model is thinking here, and no key was needed: every word was written "
    "beforehand and reaches you piece by piece, the way a real model's words would. Grüße, ¡saludos!, 你好, "
    "こんにちは and 🌊 from the stream. Configure a provider of your own whenever you like; I stay "
    "around for demos, tests and benchmarks."
)

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
HttpStatus = Annotated[int, Field(ge=200, le=599)]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StatusFault(_Strict):
    """Answer with an HTTP error instead of a stream."""

    kind: Literal["status"]
    status: HttpStatus
    headers: dict[HeaderName, HeaderValue] = {}
    body: Any = Field(default=None, description="JSON; null: an error object in OpenAI's format.")


class SilentFault(_Strict):
    """``refuse``: close before any byte.  ``hang``: accept the request and never answer."""

    kind: Literal["refuse", "hang"]


class MidwayFault(_Strict):
    """Break the stream after some deltas.

    ``cut`` resets the connection, ``eof`` ends the body cleanly without a finish reason, ``stall``
    goes silent with the socket open, ``garbage`` sends bytes that are neither JSON nor UTF-8, then ends.
    """

    kind: Literal["cut", "eof", "stall", "garbage"]
    after: Count = Field(default=0, description="Deltas sent before it; 0: the headers and nothing else.")


class ErrorEventFault(_Strict):
    """Send an error object inside the stream, then end."""

    kind: Literal["error_event"]
    after: Count = 0
    error: Any = {"message": "The scripted provider was told to fail.", "type": "server_error", "code": "server_error"}


class CommentsFault(_Strict):
    """Send only SSE comments for some seconds, then go on."""

    kind: Literal["comments"]
    after: Count = 0
    seconds: Seconds = Field(validation_alias="for")


class EndFault(_Strict):
    """``no_usage``: leave the usage out.  ``cut_after_finish``: reset once the finish reason is sent."""

    kind: Literal["no_usage", "cut_after_finish"]


class SlowFault(_Strict):
    """Stream at another rate than the script's."""

    kind: Literal["slow"]
    rate: Annotated[float, Field(gt=0, le=1_000_000)]


Fault = Annotated[
    StatusFault | SilentFault | MidwayFault | ErrorEventFault | CommentsFault | SlowFault | EndFault,
    Field(discriminator="kind"),
]


class BinaryChunk(_Strict):
    """Bytes that are not valid UTF-8."""

    b64: str


class RawResponse(_Strict):
    """A response played write by write, as conformance cases are stored."""

    status: HttpStatus | Literal[0] = Field(
        default=200,
        validation_alias=AliasChoices("status", "http_status"),
        description="0: the connection is closed before the headers.",
    )
    headers: dict[HeaderName, HeaderValue] = {"content-type": "text/event-stream"}
    chunks: list[str | BinaryChunk] = Field(description="Each is sent as one HTTP chunk and flushed.")
    close: Literal["clean", "reset", "stall"] = "clean"

    def chunk_bytes(self) -> list[bytes]:
        """Return the chunks as bytes, without empty ones, which would end the body."""
        chunks = [c.encode() if isinstance(c, str) else base64.b64decode(c.b64, validate=True) for c in self.chunks]
        return [chunk for chunk in chunks if chunk]

    @model_validator(mode="after")
    def _chunks_are_bytes(self) -> "RawResponse":
        self.chunk_bytes()  # invalid base64 or a lone surrogate raises ValueError here, not during playback
        return self


class ScriptedToolCall(_Strict):
    """A tool call to stream; arguments that are not a string are sent as JSON."""

    name: str
    arguments: Any = {}
    id: str | None = None


class Script(_Strict):
    """Everything a request can ask for; the defaults give an unpaced answer without faults.

    Deltas are counted over the whole stream: reasoning, content and pieces of tool calls, of all choices.
    """

    key: str | None = Field(default=None, max_length=256, description="Attempts are counted per key.")
    text: str | None = Field(default=None, description="What to stream, cut into pieces that join to it exactly.")
    words: Annotated[int, Field(ge=1)] = Field(default=1, description="Words of ``text`` in a delta.")
    delta_chars: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Cut by characters instead.")
    deltas: Count | None = Field(default=None, description="Content deltas per choice, each ``delta_text``.")
    delta_text: str = "word "
    reasoning: str = Field(default="", description="Streamed as reasoning_content before the text.")
    tool_calls: list[ScriptedToolCall] = Field(default=[], description="Streamed after the text, in fragments.")
    rate: Annotated[float, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="Deltas per second of this stream; 0: as fast as possible."
    )
    delay: Seconds = Field(default=0, description="Seconds before the headers.")
    first_token_delay: Seconds = Field(default=0, description="Seconds from the headers to the first delta.")
    at_once: Count = Field(default=1, description="Streams that the server has had open before the first delta.")
    finish_reason: str | None = Field(default="auto", description="null: none is sent.")
    usage: dict[str, Any] | Literal["auto"] | None = Field(default="auto", description="null: none is sent.")
    stamp: bool = Field(
        default=False,
        description="Replace each content delta's text by CLOCK_MONOTONIC in ns, 20 digits and a space, as it is sent.",
    )
    chunk_size: Annotated[int, Field(ge=1)] = Field(default=1, description="Deltas joined in one HTTP chunk.")
    done: bool = Field(default=True, description="Whether [DONE] is sent.")
    pad: Annotated[int, Field(ge=0, le=65_536)] = Field(
        default=0, description="Characters of a meaningless field that is added to each delta's chunk."
    )
    faults: list[Fault | None] = Field(default=[], description="One per attempt; null and beyond the end: none.")
    raw: RawResponse | None = Field(default=None, description="Played instead of everything above, unless a fault is.")

    @model_validator(mode="after")
    def _one_source_of_content(self) -> "Script":
        if self.text is not None and self.deltas is not None:
            raise ValueError("give either text or deltas, not both")
        return self

    def fault(self, attempt: int) -> Fault | None:
        """Return the fault of an attempt, counted from 1."""
        return self.faults[attempt - 1] if attempt <= len(self.faults) else None


def parse_script(data: object) -> Script:
    """Parse a script; raise a ``ValueError`` that names each invalid field."""
    try:
        return Script.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(['script', *map(str, item['loc'])])}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise ValueError("; ".join(problems[:5])) from None
