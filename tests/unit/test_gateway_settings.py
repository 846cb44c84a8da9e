"""The gateway's settings: what the environment may hold, and what is said about the rest."""

import os

import pytest

from keepstream_gateway.settings import OWN_FIELDS, SettingsError, load_settings, unknown_variables
from keepstream_worker.settings import unknown_variables as unknown_to_the_worker


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("KEEPSTREAM_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_each_setting_is_found_by_a_misspelling(name: str) -> None:
    variable = f"KEEPSTREAM_GATEWAY_{name.upper()}"
    assert unknown_variables({variable: ""}) == []
    (complaint,) = unknown_variables({variable[:-2] + variable[-1]: ""})
    assert f"did you mean {variable}?" in complaint


def test_worker_and_gateway_may_have_one_environment() -> None:
    assert unknown_variables({"KEEPSTREAM_CONCURRENCY": "7"}) == []
    assert unknown_to_the_worker({"KEEPSTREAM_GATEWAY_PORT": "7"}) == []


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("KEEPSTREAM_GATEWAY_PORT", "many", "must be a valid integer"),
        ("KEEPSTREAM_GATEWAY_PORT", "70000", "must be less than or equal to 65535"),
        ("KEEPSTREAM_GATEWAY_PING", "0", "must be greater than 0"),
        ("KEEPSTREAM_GATEWAY_CORS_ORIGINS", "app.example", "must be origins, as https://app.example"),
        ("KEEPSTREAM_GATEWAY_CORS_ORIGINS", "https://app.example/page", "must be origins, as https://app.example"),
        ("KEEPSTREAM_GATEWAY_CHAT_REQUEST", "gpt-5", 'must be a JSON object, as {"model": "gpt-5"}'),
        ("KEEPSTREAM_GATEWAY_CHAT_REQUEST", '{"messages": "Be brief."}', "must be a JSON object"),
        ("KEEPSTREAM_GATEWAY_CHAT_RETRY", "reset", "must be 'reset-step' or 'error'"),
        ("KEEPSTREAM_LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(f"{name}: {complaint}")
    assert "\n" not in str(error.value)


def test_no_value_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATEWAY_PORT", "GATEWAY_PING", "LOG_FORMAT"):
        monkeypatch.setenv(f"KEEPSTREAM_{name}", "hunter2")
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).count("KEEPSTREAM_") == 3
    assert "hunter2" not in str(error.value)


def test_what_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_GATEWAY_PORT", "1")
    monkeypatch.setenv("KEEPSTREAM_GATEWAY_HOST", "")
    settings = load_settings(port=2)
    assert (settings.port, settings.host) == (2, "127.0.0.1")


def test_the_password_of_redis_goes_into_urls_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_REDIS_URL", "redis://a:1/0")
    monkeypatch.setenv("KEEPSTREAM_BROKER_URL", "redis://:own@b:1/0")
    monkeypatch.setenv("KEEPSTREAM_REDIS_PASSWORD", "p@ss")
    settings = load_settings()
    assert settings.redis_url == "redis://a:1/0?password=p%40ss"
    assert settings.broker_url == "redis://:own@b:1/0"


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().origins == []
    monkeypatch.setenv("KEEPSTREAM_GATEWAY_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert load_settings().origins == ["https://a.example", "http://localhost:3000"]
