"""Settings: everything about a deployment that the environment decides.

In: environment variables with the prefix ``KEEPSTREAM_``.  Out: one frozen ``Settings`` value, to the
composition root and the command line.  Each setting is here once, with its unit, its default and the
reason for it; a wrong one stops the start with a clear line.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, SecretStr, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from keepstream import names
from keepstream.client.redis_url import RedisServer, parse_redis_url, with_password

Seconds = Annotated[float, Field(gt=0)]

_PREFIX: Final = names.ENVIRONMENT
#: Set by `keepstream dev`, for people and itself; read by the scripted provider and by docker-compose.yml.
_READ_ELSEWHERE: Final = {
    "KEEPSTREAM_API_KEY",
    "KEEPSTREAM_API_URL",
    "KEEPSTREAM_DEV",
    "KEEPSTREAM_SCRIPTED_API_KEY",
    "KEEPSTREAM_TAG",
}


class SettingsError(Exception):
    """A setting is missing or malformed; the message names the variable and never its value."""


class Settings(BaseSettings):
    """The worker's settings. Each is read from ``KEEPSTREAM_<NAME IN CAPITALS>``."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,  # as deployment files write an option that was not given
        frozen=True,
        extra="ignore",
    )

    # -- where things are --
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis for events, logs and cancel requests: redis://, rediss://, unix:// or redis+sentinel://.",
    )
    broker_url: str | None = Field(None, description="Celery's broker; default: the Redis of KEEPSTREAM_REDIS_URL.")
    redis_password: SecretStr | None = Field(
        None,
        description="Password for both, if their URLs have none; as it is, where a URL would need it percent-encoded.",
    )
    database_url: str = Field(
        "sqlite:///keepstream.db",
        description="Database; sqlite:///file.db and postgresql://user:password@host/name are supported.",
    )
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._\-:]{1,64}$")] = Field(
        names.PREFIX, description="Prefix of every Redis key and channel; change it to share one Redis."
    )
    queue: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._\-:]{1,128}$")] = Field(
        names.QUEUE,
        description="Celery queue, and the jobs that these workers run; others get a queue and workers of their own.",
    )
    providers_file: Path | None = Field(None, description="TOML file with further providers, and with limits.")

    # -- how much at once --
    concurrency: int = Field(
        1000,
        ge=1,
        le=20_000,
        description="Jobs that one worker process runs at once; a stream costs little but memory.",
    )
    processes: int = Field(
        1, ge=1, le=256, description="Worker processes that `keepstream worker` starts; one per core."
    )

    # -- how long --
    connect_timeout: Seconds = Field(
        15.0, description="Seconds to connect; generous, because a burst of new streams shares one event loop."
    )
    first_token_timeout: Seconds = Field(
        120.0, description="Seconds from the request to the first data; reasoning models think for long."
    )
    responses_first_token_timeout: Seconds = Field(
        600.0, description="The same where a provider is asked by the Responses API, which may think unseen."
    )
    idle_timeout: Seconds = Field(
        180.0,
        description="Seconds between two data events; gateways are silent for minutes while a tool call is built.",
    )
    total_timeout: Seconds = Field(
        3600.0, description="Seconds from the first attempt's start to the end of the last, waits included."
    )
    usage_wait: Seconds = Field(
        5.0, description="Seconds to go on reading after the finish reason, because the usage comes after it."
    )

    # -- retry --
    max_attempts: int = Field(5, ge=1, le=100, description="Most provider streams per job.")
    backoff_base: Seconds = Field(0.5, description="Seconds; the first retry waits a random time up to this.")
    backoff_cap: Seconds = Field(30.0, description="Seconds; the random wait doubles up to this.")

    # -- recovery --
    heartbeat_interval: Seconds = Field(1.0, description="Seconds between two heartbeats of a worker process.")
    lease: Seconds = Field(
        6.0,
        description="Seconds without a heartbeat after which a worker counts as dead; at least three intervals.",
    )
    sweep_interval: Seconds = Field(
        1.0, description="Seconds between two sweeps for lost jobs and missing events, by one worker for all."
    )
    shutdown_grace: Seconds = Field(
        30.0, description="Seconds that running streams may go on after SIGTERM; keep it below the supervisor's limit."
    )

    # -- live events --
    log_ttl: Seconds = Field(
        900.0, description="Seconds that a job's log outlives its last event; after that the database answers."
    )
    publish_buffer: int = Field(
        262_144,
        ge=1024,
        description="Bytes of unsent events kept per job while Redis is away; beyond that, one snapshot replaces them.",
    )
    merge_above: int = Field(
        256, ge=1, description="Unsent deltas of one job above which neighbouring ones of one kind are merged."
    )

    # -- bounds --
    max_output_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        description="Bytes of one job's whole output; a model that repeats itself without end is stopped there.",
    )
    max_event_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="Bytes of one event from the provider; an image comes in one."
    )
    max_extra_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024,
        description="Bytes of one job's images, audio, logprobs and other extras; what is more is left out, and the"
        " result says so.",
    )
    live_extra_bytes: int = Field(
        262_144,
        ge=1024,
        description="Bytes of one image or other extra that events carry; of a larger one they carry the size, and the"
        " row the whole.",
    )

    # -- for whoever watches --
    alive_dir: Path | None = Field(
        None,
        description="Directory in memory for signs of life, which `keepstream alive` reads; each worker needs its own.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Literal["json", "console"] = Field("json", description="json for machines, console for people.")

    @field_validator("redis_url", "broker_url")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        if value is not None:
            parse_redis_url(value)
        return value

    @field_validator("database_url")
    @classmethod
    def _is_supported_database(cls, value: str) -> str:
        if value.startswith(("sqlite://", "postgresql://", "postgres://", "postgresql+psycopg://")):
            return value
        raise ValueError("must start with sqlite:// or postgresql://")

    @model_validator(mode="after")
    def _lease_outlasts_heartbeats(self) -> Self:
        if self.lease < 3 * self.heartbeat_interval:
            raise ValueError("KEEPSTREAM_LEASE must be at least three times KEEPSTREAM_HEARTBEAT_INTERVAL")
        return self

    @property
    def broker(self) -> str:
        """The broker's URL."""
        return self.broker_url or self.redis_url

    @property
    def redis_server(self) -> RedisServer:
        """The Redis for events, logs and cancel requests."""
        return parse_redis_url(self.redis_url)

    @property
    def broker_server(self) -> RedisServer:
        """The Redis that is Celery's broker."""
        return parse_redis_url(self.broker)

    def redis_servers(self) -> dict[str, RedisServer]:
        """Return each Redis once, by the variable that names it."""
        servers = {names.ENV_REDIS_URL: self.redis_server, names.ENV_BROKER_URL: self.broker_server}
        if self.broker_server == self.redis_server:
            del servers[names.ENV_BROKER_URL]
        return servers


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of this process; ``environment`` is looked through for misspelt names.

    Raises:
        SettingsError: naming each unknown variable and each wrong value, and what to write instead.
    """
    problems = unknown_variables(environment)
    try:
        settings = Settings()  # type: ignore[call-arg]  # every field has a default
    except ValidationError as error:
        problems += [_complaint(details) for details in error.errors(include_url=False, include_input=False)]
    else:
        if not problems:
            return _with_password(settings)
    raise SettingsError("; ".join(problems))


def _with_password(settings: Settings) -> Settings:
    """Put the password of Redis into the URLs that have none."""
    password = settings.redis_password.get_secret_value() if settings.redis_password else None
    broker_url = settings.broker_url and with_password(settings.broker_url, password)
    return settings.model_copy(
        update={"redis_url": with_password(settings.redis_url, password), "broker_url": broker_url}
    )


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a complaint about each ``KEEPSTREAM_…`` variable that nothing reads, with the name that was meant."""
    known = {f"{_PREFIX}{name.upper()}" for name in Settings.model_fields} | _READ_ELSEWHERE
    complaints = []
    for name, value in sorted(environment.items()):
        spelling = name.upper()  # names are read in either case
        if not spelling.startswith(_PREFIX) or spelling in known or names.is_set_by_the_platform(name, value):
            continue
        if spelling.startswith(names.GATEWAY_ENVIRONMENT):  # the gateway's, which looks at them itself
            continue
        if _is_named_in_providers_file(name, environment):
            continue
        nearest = names.nearest(spelling.removeprefix(_PREFIX), (variable.removeprefix(_PREFIX) for variable in known))
        advice = f"did you mean {_PREFIX}{nearest}?" if nearest else "unset it, or rename it if it is yours"
        complaints.append(f"{name}: there is no such setting; {advice}")
    return complaints


def _is_named_in_providers_file(name: str, environment: Mapping[str, str]) -> bool:
    """Whether the providers file names a variable, as the holder of a key; what else is in it is checked elsewhere."""
    file = environment.get(f"{_PREFIX}PROVIDERS_FILE")
    try:
        text = Path(file).read_text(encoding="utf-8") if file else ""
    except (OSError, ValueError):
        return False
    return f'"{name}"' in text or f"'{name}'" in text


def _complaint(details: ErrorDetails) -> str:
    """Return what is wrong with a value and what to write, without the value: it may be a secret."""
    limits = details.get("ctx", {})
    match details["type"]:
        case "int_parsing" | "int_from_float" | "int_parsing_size":
            complaint = "must be a whole number"
        case "float_parsing":
            complaint = "must be a number"
        case "greater_than":
            complaint = f"must be greater than {limits['gt']:g}"
        case "greater_than_equal":
            complaint = f"must be at least {limits['ge']}"
        case "less_than_equal":
            complaint = f"must be at most {limits['le']}"
        case "literal_error":
            return f"{_variable(details)}: must be {limits['expected']}"
        case "string_pattern_mismatch":
            complaint = "must consist of letters, digits, '.', '_', '-' and ':', and be neither empty nor very long"
        case _:
            message = details["msg"].removeprefix("Value error, ")
            return f"{_variable(details)}: {message}" if details["loc"] else message
    default = Settings.model_fields[str(details["loc"][0])].default
    example = f"{default:g}" if isinstance(default, float) else default
    return f"{_variable(details)}: {complaint}, {example} for instance"


def _variable(details: ErrorDetails) -> str:
    return _PREFIX + "_".join(map(str, details["loc"])).upper()
