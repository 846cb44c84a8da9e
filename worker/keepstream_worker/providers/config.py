"""Provider configuration: which providers a job may name, how each is reached, and how much of each may be used.

In: the providers file (TOML) and the environment.
Out: ``ProviderConfig`` values by name, to the provider module; a ``Policy``, to whoever decides what runs next; or one
line that says what is wrong.

A job only names a provider. URLs come from the operator's file; keys from the operator's environment, or from a file or
a command that the worker reads anew while it runs (``keys``).

The provider ``default`` needs no file: it is configured by OPENAI_API_KEY, OPENAI_BASE_URL, OPENAI_ORG_ID and
OPENAI_PROJECT_ID, as for the openai SDK. A file looks like this::

    [providers.groq]
    base_url = "https://api.groq.com/openai/v1"
    api_key_env = "GROQ_API_KEY"          # the name of the variable, never the key

    [providers.azure-eu]
    kind = "azure"
    endpoint = "https://example.openai.azure.com"
    api_version = "2024-10-21"
    api_key_command = ["print-entra-token"]   # run anew before its key's time is over
    api_key_valid = 3000                  # seconds
    api_key_header = "authorization"      # as a bearer token; without this, Azure is sent a key as "api-key"

    [providers.mistral]
    base_url = "https://api.mistral.ai/v1"
    api_key_file = "/run/secrets/mistral" # read anew when it changes

    [providers.local]                     # no api_key_env: a server that wants no key
    base_url = "http://127.0.0.1:8000/v1"
    stream_options = false                # it refuses parameters it does not know
    headers = { "X-Gateway-Key" = { env = "GATEWAY_KEY" } }
    timeouts = { first_token = 600 }

    [providers.gateway]
    base_url = "https://gateway.example/v1"
    api_key_env = "GATEWAY_API_KEY"
    api = "chat"                          # or "responses", or "auto": by chat completions, until the provider refuses
    models = { "gpt-6-*" = { api = "responses", concurrency = 20 } }
    concurrency = 200                     # streams at once, of all its models, for the whole deployment
    requests_per_minute = 3000
    tokens_per_minute = 1_000_000

    [tenants."*"]                         # every tenant without a table of its own
    concurrency = 50

    [scheduling]
    bulk_share = 0.1
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed does not know it

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, model_validator

from keepstream import names
from keepstream_worker.limits import (
    DEFAULT_BROKEN_AFTER,
    DEFAULT_BROKEN_FOR,
    DEFAULT_BULK_SHARE,
    DEFAULT_CREDIT,
    DEFAULT_MAX_COOLDOWN,
    OTHER_TENANTS,
    Limits,
    Policy,
    ProviderPolicy,
    TenantPolicy,
)

DEFAULT: Final = "default"
OPENAI_URL: Final = "https://api.openai.com/v1"
_KEY_VARIABLE: Final = "OPENAI_API_KEY"
_URL_VARIABLE: Final = "OPENAI_BASE_URL"
_ACCOUNT_HEADERS: Final = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}

_ENVIRONMENT_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_KEY_PREFIX: Final = re.compile(r"(sk|pk|gsk|xai|hf|r8|nvapi|pplx|key|csk|tgp|fw|dapi)[-_]|AIza|eyJ|(Bearer|Basic) ")
_OPAQUE: Final = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+/=_-]{24,}\Z")
_NAMES_OF_KEYS: Final = frozenset({"api_key", "apikey", "key", "token", "secret", "password"})
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "api-key", "x-api-key", "cookie"})
_KEY_SOURCES: Final = ("api_key_env", "api_key_file", "api_key_command")  #: Keys of which a table has at most one.

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Bytes = Annotated[int, Field(ge=1024)]
Name = Annotated[str, StringConstraints(pattern=names.ID_PATTERN)]
# Strict, because pydantic would take `true` for 1.
Places = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
PerMinute = Annotated[float, Field(strict=True, gt=0, le=1e12)]


class ProviderConfigError(Exception):
    """The configuration is invalid; the message names file, table and key, and never quotes a value."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_V = TypeVar("_V", bound=_Value)


class ProviderTimeouts(_Value):
    """Seconds; None leaves it to the job or the worker's settings."""

    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None


class ProviderLimits(_Value):
    """Bytes; None leaves it to the worker's settings."""

    max_output_bytes: Bytes | None = None
    max_event_bytes: Bytes | None = None
    max_extra_bytes: Bytes | None = None


Api = Literal["auto", "chat", "responses"]


class _Limited(_Value):
    """What may be used of a provider or a model by the whole deployment; None: no limit."""

    concurrency: Places | None = None  #: Streams at once.
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None  #: Prompt and completion together.

    @property
    def use(self) -> Limits:
        """The limits as one value."""
        return Limits(self.concurrency, self.requests_per_minute, self.tokens_per_minute)


class ModelConfig(_Limited):
    """What holds for some models of a provider; a pattern's limits hold for each of them by itself."""

    api: Api | None = None  #: In which dialect they are asked; None: as the provider's other models.


class ResponsesConfig(_Value):
    """How a provider wants to be asked by the Responses API; the defaults are what OpenAI wants."""

    pass_through: frozenset[str] = frozenset()  #: Parameters to send although OpenAI has none of this name.
    instructions: bool = False  #: Whether leading system texts go into ``instructions`` instead of ``input``.
    reasoning_summary: str | None = None  #: ``auto`` for instance; an organisation must be verified to ask for it.
    encrypted_reasoning: bool = True  #: Whether to ask for the reasoning that the next turn can give back.
    item_ids: bool = True  #: Whether reasoning that goes back keeps its id.


class ProviderConfig(_Limited):
    """How one provider is reached, and its limits. Values that may be secret print as ``**********``."""

    name: Name
    kind: Literal["openai", "azure"] = "openai"
    base_url: str | None = None  #: For kind openai; the path ``/chat/completions`` is added to it.
    endpoint: str | None = None  #: For kind azure; the resource's URL.
    api_version: str | None = None  #: For kind azure.
    deployment: str | None = None  #: For kind azure; None: the deployment has the model's name.
    # Where the key comes from; without any of the three, the provider needs none.
    api_key_env: str | None = None  #: The variable that holds it.
    api_key: SecretStr | None = None  #: The variable's value; None if it is unset or empty.
    api_key_file: Path | None = None  #: The file that holds it, and nothing else.
    api_key_command: tuple[str, ...] | None = None  #: The program that prints it, and nothing else; its arguments.
    api_key_valid: Seconds | None = None  #: How long what the command prints is good for; None: until it is refused.
    api_key_header: Literal["authorization", "api-key", "x-api-key"] | None = None  #: None: what the kind wants.
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    query: dict[str, SecretStr] = Field(default_factory=dict)
    stream_options: bool = True  #: Whether to request usage; a few servers refuse the parameter.
    api: Api = "auto"  #: The dialect: chat completions, the Responses API, or whichever a model needs.
    models: dict[str, ModelConfig] = Field(default_factory=dict)  #: By name; ``*`` stands for any characters.
    responses: ResponsesConfig = ResponsesConfig()
    done_completes: bool = True  #: Whether ``[DONE]`` after output completes a choice that has no finish reason.
    timeouts: ProviderTimeouts = ProviderTimeouts()
    limits: ProviderLimits = ProviderLimits()
    proxy: SecretStr | None = None  #: URL of an HTTP proxy; None: a direct connection.
    max_connections: Annotated[int, Field(ge=1)] | None = None  #: None: no limit.
    max_cooldown: Annotated[float, Field(strict=True, ge=0, le=86_400)] = DEFAULT_MAX_COOLDOWN  #: Seconds.
    broken_after: Annotated[int, Field(strict=True, ge=1, le=1000)] = DEFAULT_BROKEN_AFTER  #: Failures in a row.
    broken_for: Annotated[float, Field(strict=True, gt=0, le=300)] = DEFAULT_BROKEN_FOR  #: Seconds, doubled up to 300.

    @property
    def url(self) -> str:
        """The base URL of all requests."""
        return self.endpoint or self.base_url or OPENAI_URL

    @property
    def is_openai(self) -> bool:
        """Whether this is OpenAI itself, where a parameter means what OpenAI says it means."""
        return urlsplit(self.url).hostname == urlsplit(OPENAI_URL).hostname

    def api_of(self, model: str) -> Api:
        """In which dialect a model is asked: its exact name counts most, then the first pattern that fits."""
        matching = [self.models[model]] if model in self.models else []
        matching += [config for pattern, config in self.models.items() if fnmatchcase(model, pattern)]
        return next((config.api for config in matching if config.api is not None), self.api)

    @property
    def policy(self) -> ProviderPolicy:
        """What may be used of it, and when it counts as unfit."""
        return ProviderPolicy(
            limits=self.use,
            models=MappingProxyType({pattern: model.use for pattern, model in self.models.items() if model.use}),
            max_cooldown=self.max_cooldown,
            broken_after=self.broken_after,
            broken_for=self.broken_for,
        )

    @property
    def key_missing(self) -> bool:
        """Whether the provider needs a key that the environment does not have."""
        return self.api_key_env is not None and self.api_key is None

    @property
    def key_header(self) -> str:
        """The header that carries the key; ``authorization`` carries it as a bearer token."""
        return self.api_key_header or ("api-key" if self.kind == "azure" else "authorization")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        needed, foreign = ("base_url",), ("endpoint", "api_version", "deployment")
        if self.kind == "azure":
            needed, foreign = ("endpoint", "api_version"), ("base_url",)  # type: ignore[assignment]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"'{key}' is missing; kind {self.kind!r} needs it")
        if self.kind == "azure" and "responses" in {self.api, *(model.api for model in self.models.values())}:
            raise ValueError("for the Responses API use kind 'openai' and the base_url ENDPOINT/openai/v1")
        for key in foreign:
            if getattr(self, key) is not None:
                raise ValueError(f"'{key}' has no meaning for kind {self.kind!r}")
        return self

    @model_validator(mode="after")
    def _no_model_may_use_more_than_all(self) -> Self:
        for pattern, model in self.models.items():
            for key in _LIMITS:
                of_all, of_one = getattr(self, key), getattr(model, key)
                if of_all is not None and of_one is not None and of_one > of_all:
                    raise ValueError(
                        f"models.{pattern}.{key} is above the provider's own {key}, which holds for all its models "
                        "together and wins; lower the one or raise the other"
                    )
        return self

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        sources = [key for key in _KEY_SOURCES if getattr(self, key) is not None]
        if len(sources) > 1:
            raise ValueError(f"'{sources[0]}' and '{sources[1]}' both name the key; keep one of them")
        if self.kind == "azure" and not sources:
            raise ValueError("kind 'azure' needs 'api_key_env', 'api_key_file' or 'api_key_command'")
        if self.api_key_valid is not None and self.api_key_command is None:
            raise ValueError("'api_key_valid' has no meaning without 'api_key_command'")
        if self.api_key_header is not None and not sources:
            raise ValueError("'api_key_header' has no meaning without a key")
        return self


class TenantConfig(_Value):
    """What a tenant may use."""

    concurrency: Places | None = None  #: Jobs running at once; None: no limit.
    weight: Annotated[float, Field(strict=True, ge=0.001, le=1_000_000)] = 1.0


class SchedulingConfig(_Value):
    """How the deployment is divided."""

    bulk_share: Annotated[float, Field(strict=True, ge=0, lt=1)] = DEFAULT_BULK_SHARE
    credit: Annotated[int, Field(strict=True, ge=1, le=10**12)] = DEFAULT_CREDIT  #: Tokens ÷ weight.


class Configuration(NamedTuple):
    """All that the providers file and the environment say."""

    providers: dict[str, ProviderConfig]  #: By name; ``default`` is always among them.
    policy: Policy


#: The tables inside a provider's, by their key.
_INNER_TABLES: Final[Mapping[int | str, type[BaseModel]]] = {
    "timeouts": ProviderTimeouts,
    "limits": ProviderLimits,
    "models": ModelConfig,
    "responses": ResponsesConfig,
}
_LIMITS: Final = tuple(_Limited.model_fields)
_TABLES: Final = ("providers", "tenants", "scheduling")
#: Where the environment's own configuration of the default provider does not help: it is reached elsewhere.
_ANOTHER_PLACE: Final = frozenset({"kind", "base_url", "endpoint"})
_PYDANTIC_TABLE: Final = re.compile(r"Input should be a valid dictionary( or instance of \w+)?")


def load_providers(file: Path | None, environment: Mapping[str, str]) -> dict[str, ProviderConfig]:
    """Return the providers configured by the environment and ``file`` (if given), by name.

    Raises:
        ProviderConfigError: the file is missing or invalid.
    """
    return load(file, environment).providers


def load_policy(file: Path | None, environment: Mapping[str, str]) -> Policy:
    """Return the limits, and how they are divided, as ``file`` (if given) says.

    Raises:
        ProviderConfigError: the file is missing or invalid.
    """
    return load(file, environment).policy


def load(file: Path | None, environment: Mapping[str, str]) -> Configuration:
    """Return what the environment and ``file`` (if given) say.

    Raises:
        ProviderConfigError: the file is missing or invalid.
    """
    if file is None:
        return parse("", environment)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ProviderConfigError(f"{file}: cannot be read ({reason}); see KEEPSTREAM_PROVIDERS_FILE") from None
    return parse(text, environment, file=str(file))


def parse_providers(
    toml_text: str, environment: Mapping[str, str], *, file: str = "providers file"
) -> dict[str, ProviderConfig]:
    """Return the providers configured by ``toml_text`` and ``environment``, by name; ``default`` is always among them.

    Raises:
        ProviderConfigError: something is invalid; the message names ``file``, the table and the key.
    """
    return parse(toml_text, environment, file=file).providers


def parse_policy(toml_text: str, environment: Mapping[str, str], *, file: str = "providers file") -> Policy:
    """Return the limits, and how they are divided, as ``toml_text`` says.

    Raises:
        ProviderConfigError: something is invalid; the message names ``file``, the table and the key.
    """
    return parse(toml_text, environment, file=file).policy


def parse(toml_text: str, environment: Mapping[str, str], *, file: str = "providers file") -> Configuration:
    """Return what ``toml_text`` and ``environment`` say.

    Raises:
        ProviderConfigError: something is invalid; the message names ``file``, the table and the key.
    """
    try:
        document = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        # The decoder's message may quote the line, and with it a key that should not be there.
        position = re.search(r"\(at (.*)\)\Z", str(error))
        raise ProviderConfigError(f"{file}: not valid TOML{f' ({position[1]})' if position else ''}") from None
    for key in document.keys() - set(_TABLES):
        nearest = names.nearest(key, _TABLES)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        raise ProviderConfigError(
            f"{file}: '{key}': only tables named [providers.NAME], [tenants.NAME] and [scheduling] belong here{hint}"
        )
    providers = {DEFAULT: _provider(DEFAULT, _default_table(environment), environment, "environment")}
    for name, table in _named_tables(document, "providers", file):
        if name == DEFAULT and not table.keys() & _ANOTHER_PLACE:
            table = _default_table(environment, table)  # noqa: PLW2901  # the same provider, with more said about it
        providers[name] = _provider(name, table, environment, f"{file}: [providers.{name}]")
    tenants = {
        name: _tenant(name, table, f"{file}: [tenants.{_quoted(name)}]")
        for name, table in _named_tables(document, "tenants", file)
    }
    scheduling = document.get("scheduling", {})
    if not isinstance(scheduling, dict):
        raise ProviderConfigError(f"{file}: 'scheduling' must be a table [scheduling]")
    division = _checked(SchedulingConfig, scheduling, f"{file}: [scheduling]")
    policy = Policy(
        providers=MappingProxyType({name: provider.policy for name, provider in providers.items()}),
        tenants=MappingProxyType(tenants),
        bulk_share=division.bulk_share,
        credit=division.credit,
    )
    return Configuration(providers, policy)


def _named_tables(document: Mapping[str, Any], group: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tables [GROUP.NAME] with their names."""
    tables = document.get(group, {})
    if not isinstance(tables, dict):
        raise ProviderConfigError(f"{file}: '{group}' must be tables named [{group}.NAME]")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ProviderConfigError(f"{file}: {group}.{name} must be a table [{group}.{name}]")
        yield name, table


def _tenant(name: str, table: Mapping[str, Any], where: str) -> TenantPolicy:
    if name != OTHER_TENANTS and re.fullmatch(names.ID_PATTERN, name) is None:
        raise ProviderConfigError(f'{where}: must be named like a tenant, or "*" for all that have no table')
    tenant = _checked(TenantConfig, table, where)
    return TenantPolicy(tenant.concurrency, tenant.weight)


def _quoted(name: str) -> str:
    """Return a key as TOML wants it."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _default_table(environment: Mapping[str, str], more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return the table of the default provider: what the environment says, and what the file says in addition."""
    headers: dict[str, Any] = {
        name: {"env": variable} for name, variable in _ACCOUNT_HEADERS.items() if environment.get(variable)
    }
    table: dict[str, Any] = {"base_url": environment.get(_URL_VARIABLE) or OPENAI_URL}
    if not more.keys() & _KEY_SOURCES:
        table["api_key_env"] = _KEY_VARIABLE
    table |= more
    given = more.get("headers", {})
    return table | {"headers": headers | given if isinstance(given, dict) else given}


def _provider(name: str, table: Mapping[str, Any], environment: Mapping[str, str], where: str) -> ProviderConfig:
    """Return one table as a checked value, with keys and secrets read from the environment."""
    fields: dict[str, Any] = {**table, "name": name}
    for key in table.keys() & {"name", "api_key", *_NAMES_OF_KEYS}:
        hint = (
            "name the variable that holds the key in 'api_key_env', or its file in 'api_key_file'"
            if key != "name"
            else "the table's name says it"
        )
        raise ProviderConfigError(f"{where} {key}: does not belong here; {hint}")
    if (variable := table.get("api_key_env")) is not None:
        if not isinstance(variable, str) or not _ENVIRONMENT_NAME.match(variable) or _looks_like_a_key(variable):
            raise ProviderConfigError(f"{where} api_key_env: must be the name of an environment variable, not a key")
        fields["api_key"] = _clean(environment.get(variable, ""), variable) or None
    if (file := table.get("api_key_file")) is not None and not (isinstance(file, str) and Path(file).is_absolute()):
        raise ProviderConfigError(f"{where} api_key_file: must be a file's whole path, from / on, not a key")
    if (command := table.get("api_key_command")) is not None:
        _check_command(command, f"{where} api_key_command")
    for key in ("headers", "query"):
        if isinstance(table.get(key), dict):
            fields[key] = {
                part: _secret(value, environment, f"{where} {key}.{part}", must_be_env=part.lower() in _SECRET_HEADERS)
                for part, value in table[key].items()
            }
    for key in ("base_url", "endpoint"):
        if (url := table.get(key)) is not None:
            _check_url(url, f"{where} {key}" if where != "environment" else _URL_VARIABLE)
    if "proxy" in table:
        fields["proxy"] = _secret(table["proxy"], environment, f"{where} proxy")
        _check_url(fields["proxy"].get_secret_value(), f"{where} proxy", with_password="env" in table["proxy"])
    config = _checked(ProviderConfig, fields, where)
    return config if config.proxy else config.model_copy(update={"proxy": _environment_proxy(config.url, environment)})


def _checked(kind: type[_V], fields: Mapping[str, Any], where: str) -> _V:
    """Return the fields as a checked value; raise ``ProviderConfigError`` about the first one that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        item = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = " ".join([where, ".".join(map(str, item["loc"]))]).rstrip()
        if item["type"] == "extra_forbidden":
            message = _unknown_key(kind, *item["loc"])
        else:
            message = _PYDANTIC_TABLE.sub("must be a table", item["msg"].removeprefix("Value error, "))
            message = message.replace("Input should be", "must be")
            if item["type"].startswith("greater_than") and item["loc"][-1] in _LIMITS:
                message += "; leave it out for no limit"
        raise ProviderConfigError(f"{location}: {message}") from None


def _check_command(command: object, where: str) -> None:
    words = command if isinstance(command, list) else []
    if not words or not all(isinstance(word, str) and "\x00" not in word for word in words) or not words[0]:
        raise ProviderConfigError(f'{where}: must be a list of texts, ["program", "argument"]; no shell reads it')
    # The id of a tenant or an application looks as random as a key does; the name of a program does not.
    if any(_KEY_PREFIX.match(word) for word in words) or ("/" not in words[0] and _looks_like_a_key(words[0])):
        raise ProviderConfigError(f"{where}: holds what looks like a key; let the program read it from its environment")


def _unknown_key(kind: type[_Value], *location: int | str) -> str:
    """Return the complaint about a key that a table, or a table inside a provider's, does not know."""
    owner = _INNER_TABLES[location[0]] if len(location) > 1 else kind
    known = owner.model_fields.keys() - {"name", "api_key"}
    nearest = names.nearest(str(location[-1]), sorted(known))
    return (
        f"unknown key; did you mean '{nearest}'?" if nearest else f"unknown key; there are {', '.join(sorted(known))}"
    )


def _secret(value: object, environment: Mapping[str, str], where: str, *, must_be_env: bool = False) -> SecretStr:
    """Return a literal value, or the value of the variable named by ``{ env = "NAME" }``."""
    if isinstance(value, dict) and value.keys() == {"env"} and isinstance(value["env"], str):
        fetched = environment.get(value["env"])
        if not fetched:
            raise ProviderConfigError(f"{where}: the environment variable it names is not set")
        return SecretStr(_clean(fetched, value["env"]))
    if not isinstance(value, str):
        raise ProviderConfigError(f'{where}: must be a text or {{ env = "NAME" }}')
    if must_be_env or _looks_like_a_key(value):
        raise ProviderConfigError(f'{where}: looks like a key; put it in the environment and write {{ env = "NAME" }}')
    return SecretStr(value)


def _clean(secret: str, variable: str) -> str:
    """Return ``secret`` without surrounding white space; it must be valid in an HTTP header."""
    secret = secret.strip()
    if not fits_a_header(secret):
        raise ProviderConfigError(f"the environment variable {variable} holds characters that no key has")
    return secret


def fits_a_header(secret: str) -> bool:
    """Return whether a key can be sent as the value of an HTTP header."""
    return secret.isascii() and (secret.isprintable() or not secret)


def _looks_like_a_key(text: str) -> bool:
    if _KEY_PREFIX.match(text):
        return True
    # THE_NAME_OF_MY_2ND_KEY is not a key.
    return _OPAQUE.match(text) is not None and not (text.isupper() and "_" in text)


def _check_url(url: object, where: str, *, with_password: bool = False) -> None:
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        valid = parts is not None and parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        parts, valid = None, False
    if parts is None or not valid:
        raise ProviderConfigError(f"{where}: must be a URL that starts with http:// or https:// and names a host")
    if parts.username is not None and not with_password:
        raise ProviderConfigError(f"{where}: must not hold a user name or password")
    if parts.query or parts.fragment:
        raise ProviderConfigError(f"{where}: must end with its path; parameters go into 'query'")


def _environment_proxy(url: str, environment: Mapping[str, str]) -> SecretStr | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY select for ``url``."""
    parts = urlsplit(url)

    def variable(name: str) -> str:
        return environment.get(name) or environment.get(name.upper()) or ""

    proxy = variable(f"{parts.scheme}_proxy") or variable("all_proxy")
    if not proxy or proxy_bypass_environment(parts.netloc, {"no": variable("no_proxy")}):
        return None
    _check_url(proxy, f"{parts.scheme.upper()}_PROXY or ALL_PROXY", with_password=True)
    return SecretStr(proxy)
