"""Settings: what the environment may hold, and what is said about the rest."""

import os
from pathlib import Path

import pytest

from keepstream_worker.settings import Settings, SettingsError, load_settings, unknown_variables


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("KEEPSTREAM_")]:
        monkeypatch.delenv(name)


def test_an_unknown_variable_stops_the_start_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_CONCURENCY", "7")
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value) == "KEEPSTREAM_CONCURENCY: there is no such setting; did you mean KEEPSTREAM_CONCURRENCY?"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_each_setting_is_found_by_a_misspelling(name: str) -> None:
    variable = f"KEEPSTREAM_{name.upper()}"
    assert unknown_variables({variable: ""}) == []
    (complaint,) = unknown_variables({variable[:-2] + variable[-1]: ""})
    assert f"did you mean {variable}?" in complaint


def test_a_variable_that_resembles_nothing_is_named_alone() -> None:
    (complaint,) = unknown_variables({"KEEPSTREAM_QQQQQQQQQQ": "x"})
    assert complaint == "KEEPSTREAM_QQQQQQQQQQ: there is no such setting; unset it, or rename it if it is yours"


@pytest.mark.parametrize("name", ["PATH", "MY_KEEPSTREAM_URL", "KEEPSTREAM_DEV", "KEEPSTREAM_SCRIPTED_API_KEY"])
def test_what_is_not_ours_or_read_by_another_command_is_let_through(name: str) -> None:
    assert unknown_variables({name: "x"}) == []


@pytest.mark.parametrize(
    "name",
    [
        "KEEPSTREAM_REDIS_SERVICE_HOST",
        "KEEPSTREAM_REDIS_SERVICE_PORT",
        "KEEPSTREAM_REDIS_SERVICE_PORT_REDIS",
        "KEEPSTREAM_REDIS_PORT",
        "KEEPSTREAM_PORT_6379_TCP",
        "KEEPSTREAM_REDIS_PORT_6379_TCP_ADDR",
        "KEEPSTREAM_REDIS_PORT_6379_TCP_PROTO",
        "KEEPSTREAM_REDIS_ENV_REDIS_VERSION",
    ],
)
def test_what_kubernetes_or_docker_sets_for_a_service_of_our_name_is_let_through(name: str) -> None:
    assert unknown_variables({name: "tcp://10.0.0.1:6379"}) == []


def test_what_only_resembles_those_is_a_mistake_of_the_user() -> None:
    assert unknown_variables({"KEEPSTREAM_REDIS_NAME": "/web/redis"}) == []
    assert "did you mean KEEPSTREAM_QUEUE?" in unknown_variables({"KEEPSTREAM_QUEUE_NAME": "mine"})[0]
    assert unknown_variables({"KEEPSTREAM_REDIS_PORT": "6379"}) != []


def test_a_variable_that_the_providers_file_names_is_known(tmp_path: Path) -> None:
    file = tmp_path / "providers.toml"
    file.write_text('[providers.a]\nbase_url = "http://a/v1"\napi_key_env = "KEEPSTREAM_A_KEY"\n')
    environment = {"KEEPSTREAM_PROVIDERS_FILE": str(file), "KEEPSTREAM_A_KEY": "k", "KEEPSTREAM_B_KEY": "k"}
    (complaint,) = unknown_variables(environment)
    assert complaint.startswith("KEEPSTREAM_B_KEY: ")
    file.unlink()
    assert len(unknown_variables(environment)) == 2


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("CONCURRENCY", "many", "must be a whole number, 1000 for instance"),
        ("CONCURRENCY", "0", "must be at least 1, 1000 for instance"),
        ("CONCURRENCY", "99999", "must be at most 20000, 1000 for instance"),
        ("IDLE_TIMEOUT", "long", "must be a number, 180 for instance"),
        ("IDLE_TIMEOUT", "0", "must be greater than 0, 180 for instance"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
        ("PREFIX", "a b", "must consist of letters, digits, '.', '_', '-' and ':'"),
        ("REDIS_URL", "http://x", "a Redis URL begins with redis://"),
        ("BROKER_URL", "amqp://x", "amqp:// is no Redis"),
        ("DATABASE_URL", "mysql://x", "must start with sqlite:// or postgresql://"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(f"KEEPSTREAM_{name}", value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(f"KEEPSTREAM_{name}: {complaint}")
    assert "\n" not in str(error.value)


def test_all_mistakes_are_named_at_once_and_no_value_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONCURRENCY", "REDIS_URL", "REDIS_URI", "MAX_ATTEMPTS"):
        monkeypatch.setenv(f"KEEPSTREAM_{name}", "hunter2-secret")
    with pytest.raises(SettingsError) as error:
        load_settings()
    message = str(error.value)
    assert "KEEPSTREAM_REDIS_URI: there is no such setting; did you mean KEEPSTREAM_REDIS_URL?" in message
    assert message.count("KEEPSTREAM_") == 5
    assert "hunter2" not in message


def test_settings_that_contradict_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_LEASE", "1")
    with pytest.raises(SettingsError, match="KEEPSTREAM_LEASE must be at least three times"):
        load_settings()


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"KEEPSTREAM_{name.upper()}", "")
    assert load_settings() == Settings.model_construct()
