"""Settings: everything about a gateway that the environment decides.

In: environment variables with the prefix ``KEEPSTREAM_GATEWAY_``, and those that a worker has too.  Out: one frozen
``Settings`` value, to the composition.  A wrong one stops the start with a clear line.
"""

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from keepstream import names
from keepstream.client.redis_url import with_password
from keepstream.errors import InvalidSettingError

Seconds = Annotated[float, Field(gt=0)]

_PREFIX: Final = names.GATEWAY_ENVIRONMENT


class SettingsError(Exception):
    """A setting is missing or malformed; the message names the variable and never its value."""


def _shared(variable: str, default: Any, **constraints: Any) -> Any:
    """Return a field that has the worker's variable, default and meaning."""
    return Field(default, validation_alias=variable, **constraints)


class Settings(BaseSettings):
    """The gateway's settings. Each but the first ones is read from ``KEEPSTREAM_GATEWAY_<NAME IN CAPITALS>``."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,  # as deployment files write an option that was not given
        frozen=True,
        extra="ignore",
        populate_by_name=True,
    )

    # -- those of the worker --
    redis_url: str = _shared(names.ENV_REDIS_URL, "redis://127.0.0.1:6379/0")
    broker_url: str | None = _shared(names.ENV_BROKER_URL, None)
    redis_password: SecretStr | None = _shared(names.ENV_REDIS_PASSWORD, None)
    database_url: str = _shared(names.ENV_DATABASE_URL, "sqlite:///keepstream.db")
    prefix: str = _shared(names.ENV_PREFIX, names.PREFIX)
    queue: str = _shared(names.ENV_QUEUE, names.QUEUE)
    log_level: Literal["debug", "info", "warning", "error"] = _shared("KEEPSTREAM_LOG_LEVEL", "info")
    log_format: Literal["json", "console"] = _shared("KEEPSTREAM_LOG_FORMAT", "json")

    # -- where it listens --
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all of the machine's.")
    port: int = Field(8080, ge=0, le=65_535, description="Port to listen on; 0 takes a free one, which the log names.")
    cors_origins: str = Field(
        "",
        description="Web pages that may call it from a browser: their origins, as https://app.example, separated by"
        " commas; * for any. By default none may.",
    )

    # -- bounds --
    max_body_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, description="Bytes of a request's body; a job may have as many."
    )
    max_followers: int = Field(
        20_000, ge=1, description="Streams and waiting requests that one gateway process serves at once."
    )
    max_followers_per_key: int = Field(10_000, ge=1, description="The same for one API key, and the tokens made by it.")
    ping: Seconds = Field(
        15.0,
        description="Seconds of silence on a stream after which a comment is sent, for proxies give up silent ones.",
    )
    drain_timeout: Seconds = Field(
        30.0, description="Seconds that a stream's reader may read nothing of what was sent before it is given up."
    )

    # -- who may --
    key_cache: Seconds = Field(
        10.0, description="Seconds for which a checked API key is remembered; a revoked one works for so long at most."
    )
    token_seconds: Seconds = Field(3600.0, description="Longest life, in seconds, of a token for one job.")
    token_secret: SecretStr | None = Field(
        None,
        description="Secret that goes into the signatures of tokens, the same for all gateways. Without it, whoever can"
        " read the table of keys could make tokens.",
    )

    # -- chats of the AI SDK --
    chat_request: str = Field(
        "{}",
        description="What each chat asks for, as the JSON of a chat-completions body: model, tools, and messages that"
        " come first. An API key may ask for more in the body, a token may not.",
    )
    chat_retry: Literal["reset-step", "error"] = Field(
        "reset-step",
        description="What a chat is sent when an attempt fails and its text is to be dropped: reset-step for version 7"
        " of the AI SDK; error for older ones, which then resume.",
    )
    chat_replay: Seconds = Field(
        600.0,
        description="Seconds after its end for which a chat's answer can still be resumed.",
    )

    # -- the end --
    shutdown_grace: Seconds = Field(
        10.0,
        description="Seconds that requests may go on after SIGTERM; streams are ended at once, and resume elsewhere.",
    )
    keep_alive: int = Field(
        75, ge=1, description="Seconds that an idle connection is kept; longer than a proxy in front keeps it."
    )

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in split_origins(value):
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or parts.path or parts.query):
                raise ValueError("must be origins, as https://app.example, without a path, separated by commas")
        return value

    @field_validator("chat_request")
    @classmethod
    def _is_a_request(cls, value: str) -> str:
        try:
            request = json.loads(value)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("messages", []), list):
            raise ValueError('must be a JSON object, as {"model": "gpt-5"}')  # noqa: TRY004  # pydantic tells it
        return value

    @property
    def origins(self) -> list[str]:
        """The origins of web pages that may call the gateway."""
        return split_origins(self.cors_origins)


def split_origins(text: str) -> list[str]:
    """Return the origins in a text."""
    return [origin.strip() for origin in text.split(",") if origin.strip()]


#: The fields that only a gateway has.
OWN_FIELDS: Final = {name: field for name, field in Settings.model_fields.items() if field.validation_alias is None}


def load_settings(environment: Mapping[str, str] = os.environ, **given: Any) -> Settings:
    """Return the settings of this process; ``given`` ones win, and ``environment`` is searched for misspelt names.

    Raises:
        SettingsError: naming each unknown variable and each wrong value, and what to write instead.
    """
    problems = unknown_variables(environment)
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problems += [_complaint(details) for details in error.errors(include_url=False, include_input=False)]
    else:
        if not problems:
            return _with_password(settings)
    raise SettingsError("; ".join(problems))


def _with_password(settings: Settings) -> Settings:
    """Put the password of Redis into the URLs that have none."""
    password = settings.redis_password.get_secret_value() if settings.redis_password else None
    urls: dict[str, str | None] = {"redis_url": settings.redis_url, "broker_url": settings.broker_url}
    for name, url in urls.items():
        try:
            urls[name] = url and with_password(url, password)
        except InvalidSettingError as error:
            raise SettingsError(f"KEEPSTREAM_{name.upper()}: {error}") from None
    return settings.model_copy(update=urls)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a complaint about each ``KEEPSTREAM_GATEWAY_…`` variable that nothing reads, with the nearest known name.

    Other variables are the worker's: whoever starts both gives them the same environment.
    """
    known = [name.upper() for name in OWN_FIELDS]
    complaints = []
    for name, value in sorted(environment.items()):
        own = name.upper().removeprefix(_PREFIX)
        if own == name.upper() or own in known or names.is_set_by_the_platform(name, value):
            continue
        nearest = names.nearest(own, known)
        advice = f"did you mean {_PREFIX}{nearest}?" if nearest else "unset it, or rename it if it is yours"
        complaints.append(f"{name}: there is no such setting; {advice}")
    return complaints


def _complaint(details: ErrorDetails) -> str:
    """Return what is wrong with a value, without the value: it may be a secret."""
    name = str(details["loc"][0])
    variable = name if name.startswith("KEEPSTREAM_") else f"{_PREFIX}{name.upper()}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{variable}: {message[:1].lower()}{message[1:]}"
