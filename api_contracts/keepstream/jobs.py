"""The job: what a producer puts on the queue.

In: a producer's keyword arguments or JSON.  Out: a validated, frozen ``Job`` to the client and the
worker.  Exists so that a request is checked once, in the producer's process, with an error that
names the field.
"""

import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from keepstream import names
from keepstream.errors import InvalidJobError

MAX_JOB_BYTES: Final = 8 * 1024 * 1024  #: Bytes of a job as JSON; images travel inside messages.
#: Names a caller may not use as chat-completions parameters: the worker sets them.
RESERVED_PARAMETERS: Final = frozenset({"stream", "api_key", "base_url", "extra_headers", "extra_query"})
_IDEMPOTENT_NAMESPACE: Final = uuid.UUID("5f0f1c3e-6a58-4f0c-9f0a-7d2f6d1f3f11")

Identifier = Annotated[str, StringConstraints(pattern=names.ID_PATTERN)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _new_id() -> str:
    return uuid.uuid4().hex


class Job(BaseModel):
    """One request for a completion.

    Fields that are not named here are chat-completions parameters (``temperature``, ``tools``,
    ``response_format``, vendor extras …) and go to the provider untouched.
    """

    # "constants" keeps a NaN visible, so that to_json can refuse it; the default would turn it into null.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")

    id: Identifier = Field(default_factory=_new_id, description="Chosen by the caller or generated.")
    tenant: Identifier = Field(default=names.DEFAULT_TENANT, description="Whose job it is.")
    # No control characters: PostgreSQL refuses a NUL in a text, and none of them names a model.
    model: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=256)]
    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1, description="Chat-completions messages, passed through untouched.")
    ]
    provider: Identifier = Field(default="default", description="Name of a configured provider; never a URL or a key.")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="Stored with the result, never sent to the provider."
    )
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        default=None, description="The same key gives the same job id; with another body it is an error."
    )
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="Provider streams made for this job at most; null: the worker's setting."
    )
    first_token_timeout: Seconds | None = Field(
        default=None, description="Seconds from the request to the first data; null: the worker's setting."
    )
    idle_timeout: Seconds | None = Field(
        default=None, description="Seconds between two data events; null: the worker's setting."
    )
    total_timeout: Seconds | None = Field(
        default=None, description="Seconds from the first attempt's start to the end of the last one, waits included."
    )
    expires_at: AwareDatetime | None = Field(
        default=None, description="A job that has not started by then ends as expired."
    )

    @model_validator(mode="before")
    @classmethod
    def _id_from_idempotency_key(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("idempotency_key"), str) and not data.get("id"):
            tenant = data.get("tenant", names.DEFAULT_TENANT)
            derived = uuid.uuid5(_IDEMPOTENT_NAMESPACE, f"{tenant}\n{data['idempotency_key']}")
            return {**data, "id": derived.hex}
        return data

    @field_validator("expires_at")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    @model_validator(mode="after")
    def _parameters_are_the_callers(self) -> Self:
        for name in sorted(RESERVED_PARAMETERS & (self.model_extra or {}).keys()):
            raise ValueError(f"'{name}' is set by the worker and cannot be part of a job")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The further chat-completions parameters, as the caller gave them."""
        return dict(self.model_extra or {})

    def request_hash(self) -> str:
        """Return the SHA-256 (hex) that tells whether two jobs with one id ask for the same thing.

        Limits, expiry and metadata may differ between a job and its repetition; what is generated
        and by whom may not.
        """
        # Dumped first, so that the producer's Python values and the worker's decoded JSON hash alike.
        body = self.model_dump(mode="json", exclude=_NOT_HASHED)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """Return the job as JSON-ready values, without what was left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"id": self.id, "tenant": self.tenant}

    def to_json(self) -> str:
        """Return the job as JSON text in ASCII.

        Raises:
            InvalidJobError: a value is not JSON, or the text is larger than ``MAX_JOB_BYTES``.
        """
        try:
            text = json.dumps(self.to_wire(), ensure_ascii=True, allow_nan=False)
        except (ValueError, RecursionError):  # pydantic's serialization errors are ValueErrors
            raise InvalidJobError("the job holds a value that JSON cannot express") from None
        if len(text) > MAX_JOB_BYTES:
            raise InvalidJobError(f"the job has {len(text)} bytes as JSON; at most {MAX_JOB_BYTES} are accepted")
        return text


_NOT_HASHED: Final = set(Job.model_fields) - {"model", "messages", "provider"}
_LOCATION_TAIL = re.compile(r"\.(function-.*|constrained-.*)$")


def parse_job(data: object) -> Job:
    """Return the job that ``data`` (keyword arguments or decoded JSON) describes.

    Raises:
        InvalidJobError: naming each wrong field; values are never repeated in the message.
    """
    if isinstance(data, Job):
        return data
    if not isinstance(data, dict):
        raise InvalidJobError(f"a job is a JSON object, not {type(data).__name__}")
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        raise InvalidJobError(_explain(error)) from None
    except RecursionError:
        raise InvalidJobError("the job is nested too deeply") from None
    return job


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        location = _LOCATION_TAIL.sub("", ".".join(str(part) for part in item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{location}: {message}" if location else message)
    return "; ".join(problems[:5])
