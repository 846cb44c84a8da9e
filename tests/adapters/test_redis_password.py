"""The password of Redis, given apart from the URL: any characters, for the worker and for services."""

import dataclasses
from collections.abc import Iterator

import pytest
import redis

from keepstream import Client
from keepstream.client.redis_url import parse_redis_url, with_password
from keepstream.errors import InvalidSettingError
from keepstream_worker.app import StartError, check_redis
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from keepstream_worker.settings import load_settings

PASSWORD = "s p@c:e/$d?#%41\"'&ü"


@pytest.fixture(scope="module")
def guarded() -> Iterator[EmbeddedValkey]:
    """A server that asks for a password."""
    with EmbeddedValkey() as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", PASSWORD)
        yield server


@pytest.fixture(autouse=True)
def environment(guarded: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_REDIS_URL", guarded.url)
    monkeypatch.setenv("KEEPSTREAM_BROKER_URL", guarded.url.replace("/0", "/1"))


def test_worker_and_service_are_let_in_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match="Redis"):
        check_redis(load_settings())
    monkeypatch.setenv("KEEPSTREAM_REDIS_PASSWORD", PASSWORD)
    check_redis(load_settings())
    with Client.from_env() as client:
        assert client.enqueue(model="m", messages=[{"role": "user", "content": "Hi"}])


def test_settings_do_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_REDIS_PASSWORD", PASSWORD)
    assert PASSWORD not in repr(load_settings().redis_password)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:6379/0",
        "redis://[::1]:6379",
        "rediss://worker@host/0?ssl_ca_certs=/a@b",
        "unix:///run/redis.sock?db=1",
        "redis+socket:///run/redis.sock",
        "redis+sentinel://a:1,b:2/mymaster/0",
        "sentinel://a:1;sentinel://b:2/0?master_name=mymaster",
        "sentinel://a:1/0?master_name=mymaster;sentinel://worker@b:2;\n",
        "redis://worker:@host",
        " redis://host\n",
    ],
)
def test_every_url_of_a_redis_takes_it_and_keeps_its_own(url: str) -> None:
    assert with_password(url, None) == with_password(url, "") == url
    with_own = with_password(url, "own")
    assert with_password(with_own, PASSWORD) == with_own
    server = parse_redis_url(with_password(url, PASSWORD))
    assert server.password == PASSWORD
    assert dataclasses.replace(server, password=None) == parse_redis_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:own@host",
        "rediss://host?password=own",
        "sentinel://a;sentinel://:own@b?master_name=mymaster",
        "unix://worker:own@/run/redis.sock",
    ],
)
def test_a_password_in_the_url_wins_wherever_it_stands(url: str) -> None:
    server = parse_redis_url(with_password(url, PASSWORD))
    assert server == parse_redis_url(url)
    assert server.password == "own"


def test_a_url_that_cannot_be_used_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTREAM_REDIS_PASSWORD", PASSWORD)
    monkeypatch.setenv("KEEPSTREAM_BROKER_URL", "amqp://host")
    with pytest.raises(InvalidSettingError, match=r"^broker_url \(KEEPSTREAM_BROKER_URL\): amqp"):
        Client.from_env()
