"""The job: one request for a completion, as a producer puts it on the queue.

In: keyword arguments or decoded JSON, from a producer or from the queue.
Out: a checked, frozen ``Job``, to the client and the worker; a ``JobRef`` for a message that only names a stored job.

The envelope is ours and closed: a name that is not known there is a mistake. ``request`` is the caller's
chat-completions body and reaches the provider as it is. Both are checked in the producer's process already, so that
mistakes are reported where they are made.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import to_jsonable_python

from keepstream import names
from keepstream.errors import InvalidJobError

VERSION: Final = 2  #: Of the job's format.
MAX_JOB_BYTES: Final = 8 * 1024 * 1024  #: Bytes of a job as JSON; images travel inside messages.
MAX_METADATA_BYTES: Final = 64 * 1024  #: Of its metadata as JSON: listings read those of thousands of jobs at once.
MODEL_CHARACTERS: Final = 256
PROMPT_START: Final = 160  #: Characters of a prompt that a listing may show.
MAX_FALLBACKS: Final = 8  #: Of a job.

_KEY_HINT: Final = "cannot be part of a job: it belongs in the worker's configuration; a job names a 'provider'"
#: What may not be in a request, and what to do instead.
NOT_IN_A_REQUEST: Final = {
    "stream": "is set by the worker, which always streams; leave it out",
    "api_key": _KEY_HINT,
    "base_url": _KEY_HINT,
    "extra_headers": "is no parameter of the API: headers belong in the provider's configuration",
    "extra_query": "is no parameter of the API: a query belongs in the provider's configuration",
    "extra_body": "is no parameter of the API: put its content in the request itself",
}
#: Names that a later version may give a meaning in the envelope.
RESERVED_FIELDS: Final = frozenset({"callback_url", "headers"})

_IDEMPOTENT_NAMESPACE: Final = uuid.UUID("5f0f1c3e-6a58-4f0c-9f0a-7d2f6d1f3f11")
#: Well within what Python and the databases can express in any time zone.
_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC)
_SIMILAR: Final = 0.75  #: Of difflib's ratio; "max_tokens" is none of "max_attempts".
_COMPARED: Final = 100  #: Names in which a typo is looked for; a request may have a million, and comparing takes time.


def _checked_request(request: dict[str, Any]) -> dict[str, Any]:
    for name, hint in NOT_IN_A_REQUEST.items():
        if name in request:
            raise ValueError(f"'{name}' {hint}")
    for name in ("model", "messages"):
        if name not in request:
            similar = _most_similar(name, request)
            raise ValueError(f"'{name}' is missing" + (f"; is '{similar}' a typo?" if similar else ""))
    model, messages = request["model"], request["messages"]
    if not _names_a_model(model):
        raise ValueError(f"'model' must be a text of 1 to {MODEL_CHARACTERS} characters without control characters")
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("'messages' must hold objects only, each with a 'role'")
    return request | {"messages": [dict(message) for message in messages]}


def _names_a_model(value: object) -> bool:
    # PostgreSQL refuses a NUL in a text, and no text that is not UTF-8 can be stored or be part of a URL.
    return (
        isinstance(value, str)
        and 1 <= len(value) <= MODEL_CHARACTERS
        and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value) is None
    )


def _checked_model(value: str) -> str:
    if not _names_a_model(value):
        raise ValueError(f"a model is a text of 1 to {MODEL_CHARACTERS} characters without control characters")
    return value


def _in_utc(value: object) -> datetime:
    time = value
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.upper())
        except ValueError:
            time = None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise ValueError("must be a time with its offset, 2030-01-01T00:00:00Z for instance")
    try:
        utc = time.astimezone(UTC)
    except OverflowError:
        utc = None
    if utc is None or not _EARLIEST <= utc < _LATEST:
        raise ValueError(f"must be a time from {_EARLIEST.year} to {_LATEST.year - 1}")
    return utc


_MODEL_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "minLength": 1,
    "maxLength": MODEL_CHARACTERS,
    "pattern": r"^[^\x00-\x1f\x7f]+$",
}
_REQUEST_SCHEMA: Final[dict[str, Any]] = {
    "title": "Request",
    "description": (
        "The body of a chat completion. It goes to the provider as it is, but for 'stream' and 'stream_options',"
        " with which the worker asks for a stream and its usage; all further names are the provider's."
    ),
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": _MODEL_SCHEMA,
        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    },
    "propertyNames": {"not": {"enum": sorted(NOT_IN_A_REQUEST)}},
    "additionalProperties": True,
}

Identifier = Annotated[str, StringConstraints(pattern=names.ID_PATTERN)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86_400)]
Request = Annotated[dict[str, Any], AfterValidator(_checked_request), WithJsonSchema(_REQUEST_SCHEMA)]
Time = Annotated[datetime, BeforeValidator(_in_utc)]
JobClass = Literal["interactive", "bulk"]
Chain = tuple[tuple[str, str], ...]  #: Provider and model: a job's target, then its fallbacks.


def _new_id(validated: dict[str, Any]) -> str:
    key = validated.get("idempotency_key")
    if key is None:
        return uuid.uuid4().hex
    return uuid.uuid5(_IDEMPOTENT_NAMESPACE, f"{validated['tenant']}\n{key}").hex


class Fallback(BaseModel):
    """A further target: who is asked if those before it cannot answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    provider: Identifier
    model: Annotated[str, AfterValidator(_checked_model), WithJsonSchema(_MODEL_SCHEMA)]


class JobRef(BaseModel):
    """What a message says of a job that is stored already: its name alone. It wakes a worker."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, json_schema_extra={"required": ["v", "id"]}
    )

    v: Literal[2] = Field(default=VERSION, description="Version of this format.")
    tenant: Identifier = Field(default=names.DEFAULT_TENANT, description="Whose job it is.")
    id: Identifier = Field(description="The job's.")

    def to_wire(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {"v": VERSION, "id": self.id, "tenant": self.tenant}


class Job(BaseModel):
    """One request for a completion, in its envelope."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,  # "class", as messages have it, is no name in Python
        validate_by_alias=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it is prompts
        ser_json_inf_nan="constants",  # keeps a NaN visible, so that to_json can refuse it; the default is null
        json_schema_extra={"required": ["v", "request"]},
    )

    v: Literal[2] = Field(default=VERSION, description="Version of this format.")
    tenant: Identifier = Field(default=names.DEFAULT_TENANT, description="Whose job it is.")
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="The same key gives the same job id, unless an id is given; with another request it is an error.",
    )
    id: Identifier = Field(
        default_factory=_new_id, description="Chosen by the caller; else derived from the idempotency key, or random."
    )
    request: Request
    provider: Identifier = Field(default="default", description="Name of a configured provider; never a URL or a key.")
    fallbacks: tuple[Fallback, ...] = Field(
        default=(),
        max_length=MAX_FALLBACKS,
        json_schema_extra={"uniqueItems": True},
        description=(
            "Further targets, in their order. A job goes on to the next one when its target is cooling down for long,"
            " is broken, or refuses the request for good."
        ),
    )
    job_class: JobClass = Field(
        default="interactive",
        validation_alias="class",
        serialization_alias="class",
        description="Somebody waits for an interactive job; bulk ones take what those leave, and a small share.",
    )
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="Stored with the result, never sent to the provider."
    )
    max_attempts: Annotated[int, Field(strict=True, ge=1, le=100)] | None = Field(
        default=None, description="Provider streams made for this job at most; null: the worker's setting."
    )
    first_token_timeout: Seconds | None = Field(
        default=None, description="Seconds from the request to the first data; null: the worker's setting."
    )
    idle_timeout: Seconds | None = Field(
        default=None, description="Seconds between two data events; null: the worker's setting."
    )
    total_timeout: Seconds | None = Field(
        default=None,
        description=(
            "Seconds from the first attempt's start to the end of the last one, waits included;"
            " null: the worker's setting."
        ),
    )
    expires_at: Time | None = Field(default=None, description="A job that has not started by then ends as expired.")

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {*cls.model_fields, "class"}
            for name in data:
                if name not in known:
                    raise ValueError(_unknown_name(name, sorted(known)))
        return data

    @model_validator(mode="after")
    def _targets_differ(self) -> "Job":
        if len(set(self.chain)) <= len(self.fallbacks):
            raise ValueError("fallbacks: each must be another provider or model than the job's own and the others")
        return self

    @property
    def chain(self) -> Chain:
        """The job's targets in their order: its own, then its fallbacks."""
        return ((self.provider, self.model), *((target.provider, target.model) for target in self.fallbacks))

    @property
    def model(self) -> str:
        """The model, as the provider calls it."""
        model: str = self.request["model"]
        return model

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The request's messages."""
        messages: list[dict[str, Any]] = self.request["messages"]
        return messages

    def prompt_start(self) -> str:
        """Return the beginning of the last user message on one line, as listings show it; empty if it has no text."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return _beginning(message.get("content"))
        return ""

    def request_hash(self) -> str:
        """Return the SHA-256 (hex) by which two jobs of one id are told apart.

        It covers what is asked and whom first. Fallbacks, class, limits, expiry and metadata may differ between a job
        and its repetition.
        """
        # Dumped first, so that the producer's Python values and the worker's decoded JSON hash alike.
        body = self.model_dump(mode="json", include={"provider", "request"})
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """Return the job as JSON-ready values, without what was left at its default."""
        head = {"v": VERSION, "id": self.id, "tenant": self.tenant}
        return head | self.model_dump(mode="json", exclude_defaults=True)

    def to_json(self) -> str:
        """Return the job as JSON text in ASCII.

        Raises:
            InvalidJobError: a value is not JSON, the text is larger than ``MAX_JOB_BYTES``, or the metadata are larger
                than ``MAX_METADATA_BYTES``.
        """
        try:
            wire = self.to_wire()
            text = json.dumps(wire, ensure_ascii=True, allow_nan=False)
        except (ValueError, RecursionError):  # pydantic's serialization errors are ValueErrors
            raise InvalidJobError(f"{self._field_that_is_no_json()}: a value in it cannot be written as JSON") from None
        if len(text) > MAX_JOB_BYTES:
            raise InvalidJobError(f"the job has {len(text)} bytes as JSON; at most {MAX_JOB_BYTES} are accepted")
        if len(text) > MAX_METADATA_BYTES and "metadata" in wire:
            size = len(json.dumps(wire["metadata"], ensure_ascii=True))
            if size > MAX_METADATA_BYTES:
                raise InvalidJobError(
                    f"metadata: has {size} bytes as JSON; at most {MAX_METADATA_BYTES} are accepted:"
                    " keep what is larger elsewhere, and its name here"
                )
        return text

    def _field_that_is_no_json(self) -> str:
        parameters = ((f"request.{names.shown(name)}", value) for name, value in self.request.items())
        for name, value in (("metadata", self.metadata), *parameters):
            try:
                json.dumps(to_jsonable_python(value, inf_nan_mode="constants"), allow_nan=False)
            except (ValueError, RecursionError):
                return name
        return "job"  # too deep as a whole


def _beginning(content: object) -> str:
    """Return the beginning of a message's text, which may be one of several parts, as the API has them."""
    for part in content if isinstance(content, list | tuple) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and text.strip():
            # Neither NUL nor what is no UTF-8 can be stored; cut first, because a prompt may have megabytes.
            beginning = re.sub(r"[\x00-\x20\x7f\s\ud800-\udfff]+", " ", text.lstrip()[: 2 * PROMPT_START])
            return beginning.strip()[:PROMPT_START]
    return ""


Message = TypeVar("Message", Job, JobRef)


def parse_job(data: object) -> Job:
    """Return the job that ``data`` (decoded JSON, or a ``Job``) describes.

    Raises:
        InvalidJobError: naming what is wrong; no value is repeated in the message.
    """
    return data if isinstance(data, Job) else make_job(_of_this_version(data))


def parse_message(data: object) -> Job | JobRef:
    """Return what a message (decoded JSON) brings: a job, or the name of one that is stored already.

    Raises:
        InvalidJobError: naming what is wrong; no value is repeated in the message.
    """
    fields = _of_this_version(data)
    if "id" not in fields or fields.keys() - JobRef.model_fields.keys():
        return make_job(fields)
    return _validated(JobRef, fields)


def _of_this_version(data: object) -> dict[str, Any]:
    """Return the fields of a message's envelope; raise ``InvalidJobError`` if they are not of this format."""
    if not isinstance(data, dict):
        raise InvalidJobError(f"a job is a JSON object, not {type(data).__name__}")
    if "v" not in data:
        hint = "" if "request" in data else ", and put 'model', 'messages' and all further parameters in 'request'"
        raise InvalidJobError(f'v: a job says the version of its format: add "v": {VERSION}{hint}')
    if type(data["v"]) is not int or data["v"] != VERSION:
        raise InvalidJobError(f"v: this library knows version {VERSION} of a job only; it must be the number {VERSION}")
    if "job_class" in data:
        raise InvalidJobError("'job_class' is no field of a job; did you mean 'class'?")
    return data


def make_job(fields: dict[str, Any]) -> Job:
    """Return the job of these fields of the envelope; without ``v`` it is of this library's version.

    Raises:
        InvalidJobError: naming what is wrong; no value is repeated in the message.
    """
    return _validated(Job, fields)


def _validated(model: type[Message], fields: dict[str, Any]) -> Message:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise InvalidJobError(_explain(error)) from None
    except RecursionError:
        raise InvalidJobError("the job is nested too deeply") from None


def _unknown_name(name: object, known: Iterable[str]) -> str:
    shown = names.shown(name)
    if name in NOT_IN_A_REQUEST:
        return f"'{name}' {NOT_IN_A_REQUEST[str(name)]}"
    if name in RESERVED_FIELDS:
        return f"'{name}' is not supported by this version"
    if name in ("model", "messages"):
        return f"'{name}' belongs in 'request'"
    similar = _most_similar(shown.lower(), known)
    hint = f"did you mean '{similar}'?" if similar else "if it is a parameter of the model's API, put it in 'request'"
    return f"'{shown}' is no field of a job; {hint}"


def _most_similar(name: str, candidates: Iterable[object]) -> str | None:
    return names.nearest(name, (names.shown(candidate) for candidate in islice(candidates, _COMPARED)), _SIMILAR)


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        kind, location = item["type"], item["loc"]
        if kind == "default_factory_not_called":  # the id's, because something else is wrong
            continue
        if kind == "missing":
            message = "is missing" if len(location) == 1 else f"'{location[-1]}' is missing"
        elif kind == "extra_forbidden":  # all other names have been looked at by now
            message = "a target has a 'provider' and a 'model', and nothing else"
        elif kind == "too_long":
            message = f"at most {MAX_FALLBACKS} are accepted"
        elif kind == "dict_type":
            message = "must be an object"
        elif kind == "string_pattern_mismatch":  # all patterns are of identifiers
            message = "must be 1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"
        elif "[key]" in location:
            message = "names must be texts"
        else:
            message = item["msg"].removeprefix("Value error, ")
        # The rest of a location is pydantic's names of its validators, or the caller's keys.
        problems.append(f"{location[0]}: {message}" if location else message)
    return "; ".join(problems[:5])
