from pathlib import Path

import pytest

from keepstream_worker.providers.config import (
    ProviderConfig,
    ProviderConfigError,
    ProviderLimits,
    ProviderTimeouts,
    load_providers,
    parse_providers,
)

ENV = {"OPENAI_API_KEY": "sk-default", "GROQ_API_KEY": "gsk_secret", "PROXY_URL": "http://me:word@proxy.example:3128"}
ONLY_TABLES = "only tables named [providers.NAME], [tenants.NAME] and [scheduling] belong here"
KEY_LIKE = ["sk-proj-abcdef", "gsk_abcdef", "AIzaSyAbcdef", "0123456789abcdef0123456789abcdef", "Bearer abc"]
NO_COMMAND = (
    'providers.toml: [providers.x] api_key_command: must be a list of texts, ["program", "argument"]; no shell reads it'
)


def only(toml: str, env: dict[str, str] | None = None) -> ProviderConfig:
    return parse_providers(f"[providers.x]\n{toml}", ENV if env is None else env)["x"]


def complaint(toml: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ProviderConfigError) as caught:
        parse_providers(toml, ENV if env is None else env, file="providers.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_provider_comes_from_the_sdks_own_variables() -> None:
    config = parse_providers("", {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})["default"]
    assert config.url == "http://127.0.0.1:9/v1"
    assert config.api_key is not None
    assert config.api_key.get_secret_value() == "sk-1"
    assert not config.key_missing


def test_the_default_providers_account_is_sent_to_it_and_to_no_other() -> None:
    env = {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1"}
    configs = parse_providers('[providers.x]\nbase_url = "http://h"', env)
    headers = {name: value.get_secret_value() for name, value in configs["default"].headers.items()}
    assert headers == {"OpenAI-Organization": "org-1", "OpenAI-Project": "proj-1"}
    assert configs["x"].headers == {}


def test_without_a_key_the_default_provider_is_there_and_says_so() -> None:
    config = parse_providers("", {"OPENAI_API_KEY": " \n"})["default"]
    assert config.url == "https://api.openai.com/v1"
    assert config.key_missing
    assert config.api_key_env == "OPENAI_API_KEY"


def test_a_file_adds_providers_and_may_replace_the_default() -> None:
    configs = parse_providers(
        """
        [providers.groq]
        base_url = "https://api.groq.com/openai/v1"
        api_key_env = "GROQ_API_KEY"
        stream_options = false
        done_completes = false
        max_connections = 7
        timeouts = { connect = 3, first_token = 600.5, idle = 30 }
        limits = { max_output_bytes = 4096, max_event_bytes = 2048 }

        [providers.default]
        base_url = "http://127.0.0.1:8000/v1"
        """,
        ENV,
    )
    assert sorted(configs) == ["default", "groq"]
    groq = configs["groq"]
    assert groq.api_key is not None
    assert groq.api_key.get_secret_value() == "gsk_secret"
    assert (groq.stream_options, groq.done_completes, groq.max_connections) == (False, False, 7)
    assert (groq.timeouts.connect, groq.timeouts.first_token, groq.timeouts.idle) == (3, 600.5, 30)
    assert (groq.limits.max_output_bytes, groq.limits.max_event_bytes) == (4096, 2048)
    assert configs["default"].url == "http://127.0.0.1:8000/v1"
    assert not configs["default"].key_missing


def test_what_the_file_leaves_out_has_a_default() -> None:
    config = only('base_url = "http://127.0.0.1:8000/v1"')
    assert (config.kind, config.stream_options, config.done_completes) == ("openai", True, True)
    assert config.timeouts == ProviderTimeouts(connect=None, first_token=None, idle=None)
    assert config.limits == ProviderLimits(max_output_bytes=None, max_event_bytes=None)
    assert (config.max_connections, config.proxy, config.headers) == (None, None, {})


def test_azure_has_an_endpoint_and_a_version() -> None:
    config = only(
        'kind = "azure"\nendpoint = "https://e.openai.azure.com"\napi_version = "2024-10-21"\n'
        'deployment = "d"\napi_key_env = "OPENAI_API_KEY"'
    )
    assert (config.url, config.api_version, config.deployment) == ("https://e.openai.azure.com", "2024-10-21", "d")


def test_no_secret_is_ever_printed() -> None:
    config = only(
        'base_url = "https://h.example/v1"\napi_key_env = "GROQ_API_KEY"\nproxy = { env = "PROXY_URL" }\n'
        'headers = { Authorization = { env = "OPENAI_API_KEY" } }\nquery = { key = { env = "OPENAI_API_KEY" } }'
    )
    assert config.headers["Authorization"].get_secret_value() == "sk-default"
    assert config.proxy is not None
    assert config.proxy.get_secret_value() == ENV["PROXY_URL"]
    for text in (repr(config), str(config), config.model_dump_json(), str(config.model_dump())):
        assert "sk-default" not in text
        assert "gsk_secret" not in text
        assert "word" not in text


@pytest.mark.parametrize("key", KEY_LIKE)
@pytest.mark.parametrize(
    "line",
    [
        'api_key = "{}"',
        'key = "{}"',
        'token = "{}"',
        'api_key_env = "{}"',
        'api_key_file = "{}"',
        'api_key_command = ["{}"]',
        'headers = {{ X-Gateway = "{}" }}',
        'query = {{ sig = "{}" }}',
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(line: str, key: str) -> None:
    message = complaint(f'[providers.x]\nbase_url = "https://h.example"\n{line.format(key)}')
    assert message.startswith("providers.toml: [providers.x] ")
    assert line.split(" ", 1)[0] in message
    assert key not in message


def test_a_key_among_the_arguments_of_the_command_is_refused_but_not_an_id() -> None:
    message = complaint('[providers.x]\nbase_url = "https://h.example"\napi_key_command = ["p", "sk-proj-abcdef"]')
    assert message == (
        "providers.toml: [providers.x] api_key_command: "
        "holds what looks like a key; let the program read it from its environment"
    )
    words = ("/opt/azure-cli-2/bin/print-token", "--tenant", "72f988bf-86f1-41af-91ab-2d7cd011db47")
    config = only(f'base_url = "https://h.example"\napi_key_command = {list(words)}\napi_key_valid = 300')
    assert (config.api_key_command, config.api_key_valid) == (words, 300)


def test_a_secret_header_must_come_from_the_environment() -> None:
    message = complaint('[providers.x]\nbase_url = "https://h.example"\nheaders = { authorization = "secret" }')
    assert "headers.authorization: looks like a key" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "value", ["X-Title value", "https://example.org/app", "MY_OPENAI_KEY_NO_2_OF_THE_TEAM", "beta=v2"]
)
def test_ordinary_header_values_are_accepted(value: str) -> None:
    config = only(f'base_url = "https://h.example"\nheaders = {{ X-Title = "{value}" }}')
    assert config.headers["X-Title"].get_secret_value() == value


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[providers.x", "providers.toml: not valid TOML (end of document)"),
        ("[providers.x]\nbase_url = sk-secret", "providers.toml: not valid TOML (line 2, column 12)"),
        ("[provider.x]", f"providers.toml: 'provider': {ONLY_TABLES}; did you mean 'providers'?"),
        ("[server.x]", f"providers.toml: 'server': {ONLY_TABLES}"),
        ("providers = 1", "providers.toml: 'providers' must be tables named [providers.NAME]"),
        ("[providers]\nx = 1", "providers.toml: providers.x must be a table [providers.x]"),
        ("[providers.x]", "providers.toml: [providers.x]: 'base_url' is missing; kind 'openai' needs it"),
        (
            '[providers.x]\nbase_url = "http://h"\nbase_ur = 1',
            "providers.toml: [providers.x] base_ur: unknown key; did you mean 'base_url'?",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\ntimeouts = { total = 5 }',
            "providers.toml: [providers.x] timeouts.total: unknown key; there are connect, first_token, idle",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nlimits = { max_output_byte = 5 }',
            "providers.toml: [providers.x] limits.max_output_byte: unknown key; did you mean 'max_output_bytes'?",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nmodels = { "m-*" = { apis = "chat" } }',
            "providers.toml: [providers.x] models.m-*.apis: unknown key; did you mean 'api'?",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nresponses = { reasoning_sumary = "auto" }',
            "providers.toml: [providers.x] responses.reasoning_sumary: unknown key; did you mean 'reasoning_summary'?",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nresponses = 3',
            "providers.toml: [providers.x] responses: must be a table",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nquery = 3',
            "providers.toml: [providers.x] query: must be a table",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nkind = "gemini"',
            "providers.toml: [providers.x] kind: must be 'openai' or 'azure'",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\ntimeouts = { idle = 0 }',
            "providers.toml: [providers.x] timeouts.idle: must be greater than 0",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\ntimeouts = { idle = inf }',
            "providers.toml: [providers.x] timeouts.idle: must be a finite number",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nendpoint = "http://h"',
            "providers.toml: [providers.x]: 'endpoint' has no meaning for kind 'openai'",
        ),
        (
            '[providers.x]\nkind = "azure"\nendpoint = "http://h"\napi_version = "v"',
            "providers.toml: [providers.x]: kind 'azure' needs 'api_key_env', 'api_key_file' or 'api_key_command'",
        ),
        (
            '[providers."a b"]\nbase_url = "http://h"',
            "providers.toml: [providers.a b] name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._\\-]{0,127}$'",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nheaders = { A = { env = "NOT_SET" } }',
            "providers.toml: [providers.x] headers.A: the environment variable it names is not set",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\nheaders = { A = 1 }',
            'providers.toml: [providers.x] headers.A: must be a text or { env = "NAME" }',
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_env = "K"\napi_key_file = "/k"',
            "providers.toml: [providers.x]: 'api_key_env' and 'api_key_file' both name the key; keep one of them",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_file = "secrets/key"',
            "providers.toml: [providers.x] api_key_file: must be a file's whole path, from / on, not a key",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_command = "az account"',
            NO_COMMAND,
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_command = []',
            NO_COMMAND,
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_command = ["p"]\napi_key_valid = 0',
            "providers.toml: [providers.x] api_key_valid: must be greater than 0",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_env = "K"\napi_key_valid = 60',
            "providers.toml: [providers.x]: 'api_key_valid' has no meaning without 'api_key_command'",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_header = "api-key"',
            "providers.toml: [providers.x]: 'api_key_header' has no meaning without a key",
        ),
        (
            '[providers.x]\nbase_url = "http://h"\napi_key_env = "K"\napi_key_header = "x-key"',
            "providers.toml: [providers.x] api_key_header: must be 'authorization', 'api-key' or 'x-api-key'",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_file_table_and_key(toml: str, message: str) -> None:
    assert complaint(toml) == message


@pytest.mark.parametrize("url", ["ftp://h", "h.example/v1", "http://", "http://h:99999/", "http://[::1/v1", ""])
def test_a_base_url_is_an_http_url(url: str) -> None:
    assert complaint(f'[providers.x]\nbase_url = "{url}"').startswith("providers.toml: [providers.x] base_url: must be")


def test_a_wrong_base_url_in_the_environment_names_the_variable() -> None:
    assert complaint("", {"OPENAI_BASE_URL": "localhost:8000"}).startswith("OPENAI_BASE_URL: must be a URL")


def test_a_url_holds_no_password() -> None:
    message = complaint('[providers.x]\nbase_url = "https://me:word@h.example"')
    assert message == "providers.toml: [providers.x] base_url: must not hold a user name or password"


def test_a_url_ends_with_its_path() -> None:
    message = complaint('[providers.x]\nbase_url = "https://h.example/v1?key=abc"')
    assert message == "providers.toml: [providers.x] base_url: must end with its path; parameters go into 'query'"


@pytest.mark.parametrize("key", ["sk-\nabc", "sk-ä", "sk-\x00"])
def test_a_key_that_fits_no_header_is_refused_by_the_name_of_its_variable(key: str) -> None:
    assert complaint("", {"OPENAI_API_KEY": key}) == (
        "the environment variable OPENAI_API_KEY holds characters that no key has"
    )


def test_the_line_end_of_a_key_file_is_no_part_of_the_key() -> None:
    config = parse_providers("", {"OPENAI_API_KEY": "sk-1\n"})["default"]
    assert config.api_key is not None
    assert config.api_key.get_secret_value() == "sk-1"


@pytest.mark.parametrize(
    ("env", "proxy"),
    [
        ({"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ({"https_proxy": "http://p:1"}, "http://p:1"),
        ({"ALL_PROXY": "http://me:word@p:1"}, "http://me:word@p:1"),
        ({"HTTP_PROXY": "http://p:1"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example,h.example"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ({}, None),
    ],
)
def test_the_environments_proxy_is_used(env: dict[str, str], proxy: str | None) -> None:
    config = only('base_url = "https://h.example/v1"', env)
    assert (config.proxy.get_secret_value() if config.proxy else None) == proxy


def test_the_files_proxy_comes_before_the_environments() -> None:
    config = only('base_url = "https://h.example/v1"\nproxy = "http://q:2"', {"HTTPS_PROXY": "http://p:1"})
    assert config.proxy is not None
    assert config.proxy.get_secret_value() == "http://q:2"


def test_a_proxy_of_another_kind_is_refused_by_name() -> None:
    message = complaint('[providers.x]\nbase_url = "https://h.example"', {"ALL_PROXY": "socks5://p:1"})
    assert message.startswith("HTTPS_PROXY or ALL_PROXY: must be a URL")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "providers.toml"
    with pytest.raises(ProviderConfigError, match=r"providers\.toml: cannot be read \(No such file or directory\)"):
        load_providers(missing, ENV)
    missing.write_bytes(b"\xff")
    with pytest.raises(ProviderConfigError, match=r"cannot be read \(not UTF-8\)"):
        load_providers(missing, ENV)
    missing.write_text('[providers.x]\nbase_url = "http://h/v1"')
    assert sorted(load_providers(missing, ENV)) == ["default", "x"]
    assert sorted(load_providers(None, ENV)) == ["default"]
