"""What a Redis URL may be, and what it means."""

import ssl
from typing import Any

import pytest

from keepstream.client.redis_url import Address, RedisServer, Sentinels, Tls, UnixSocket, parse_redis_url
from keepstream.errors import InvalidSettingError

LOCAL = Address("localhost", 6379)
THREE = (Address("a", 26379), Address("b", 26380), Address("c", 26379))


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("redis://", RedisServer(LOCAL)),
        ("redis://:6380", RedisServer(Address("localhost", 6380))),
        ("REDIS://host", RedisServer(Address("host", 6379))),
        ("redis://host:/", RedisServer(Address("host", 6379))),
        ("redis://host:6380/3\n", RedisServer(Address("host", 6380), 3)),
        ("redis://host/3/", RedisServer(Address("host", 6379), 3)),
        ("redis://host?db=6", RedisServer(Address("host", 6379), 6)),
        ("redis://host/6?db=6", RedisServer(Address("host", 6379), 6)),
        ("redis://[::1]:6380/1", RedisServer(Address("::1", 6380), 1)),
        ("redis://[fe80::1%25eth0]", RedisServer(Address("fe80::1%eth0", 6379))),
        ("redis://user@host", RedisServer(Address("host", 6379), username="user")),
        ("redis://:word@host", RedisServer(Address("host", 6379), password="word")),
        ("redis://user:@host", RedisServer(Address("host", 6379), username="user")),
        ("redis://u%3As:p%40%2F%3F%23%25w:d@host", RedisServer(Address("host", 6379), 0, "u:s", "p@/?#%w:d")),
        ("redis://u:p@w@host", RedisServer(Address("host", 6379), 0, "u", "p@w")),
        ("redis://host?username=u&password=p%26", RedisServer(Address("host", 6379), 0, "u", "p&")),
        ("unix:///run/redis.sock", RedisServer(UnixSocket("/run/redis.sock"))),
        ("unix:///run/a%20b@c.sock?db=3", RedisServer(UnixSocket("/run/a b@c.sock"), 3)),
        ("unix://u:p@/run/redis.sock?db=3", RedisServer(UnixSocket("/run/redis.sock"), 3, "u", "p")),
        ("redis+socket:///run/redis.sock?virtual_host=3", RedisServer(UnixSocket("/run/redis.sock"), 3)),
        ("redis+socket://u:p@/run/redis.sock", RedisServer(UnixSocket("/run/redis.sock"), 0, "u", "p")),
        ("redis+sentinel://a,b:26380,c/mine", RedisServer(Sentinels("mine", THREE))),
        ("redis+sentinel://u:p@a,b:26380,c/mine/2", RedisServer(Sentinels("mine", THREE), 2, "u", "p")),
        (
            "redis+sentinel://:p@a,b:26380,c/mine?db=2&sentinel_username=su&sentinel_password=sp",
            RedisServer(Sentinels("mine", THREE, "su", "sp"), 2, password="p"),
        ),
        (
            "rediss+sentinel://[::1],[::2]:7/mine?ssl_ca_certs=/ca.pem",
            RedisServer(Sentinels("mine", (Address("::1", 26379), Address("::2", 7))), tls=Tls(ca_certs="/ca.pem")),
        ),
        (
            "sentinel://:p@a:26379;sentinel://b:26380;sentinel://c/2?master_name=mine",
            RedisServer(Sentinels("mine", THREE), 2, password="p"),
        ),
        (
            "sentinel://:p@a/2;sentinel://:p@b:26380/2;sentinel://:p@c/2?master_name=mine&sentinel_password=sp;",
            RedisServer(Sentinels("mine", THREE, password="sp"), 2, password="p"),
        ),
    ],
)
def test_url_means_a_server(url: str, server: RedisServer):
    assert parse_redis_url(url) == server


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("ssl_cert_reqs=required", {}),
        ("ssl_cert_reqs=CERT_REQUIRED", {}),
        ("ssl_cert_reqs=CERT_OPTIONAL", {"cert_reqs": "optional"}),
        ("ssl_cert_reqs=CERT_NONE", {"cert_reqs": "none"}),
        ("ssl_cert_reqs=none", {"cert_reqs": "none"}),
        ("ssl_check_hostname=False", {"check_hostname": False}),
        ("ssl_check_hostname=true", {}),
        ("ssl_ca_certs=/a&ssl_ca_path=/b", {"ca_certs": "/a", "ca_path": "/b"}),
        ("ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p", {"certfile": "/c", "keyfile": "/k", "password": "p"}),
        ("ssl_min_version=TLSv1.3", {"min_version": ssl.TLSVersion.TLSv1_3}),
        ("ssl_min_version=TLSv1_2", {"min_version": ssl.TLSVersion.TLSv1_2}),
        ("ssl_min_version=771", {"min_version": ssl.TLSVersion.TLSv1_2}),
        ("ssl_ciphers=ECDHE%2BAESGCM", {"ciphers": "ECDHE+AESGCM"}),
        ("ssl_exclude_verify_flags=VERIFY_X509_STRICT", {"exclude_verify_flags": (ssl.VERIFY_X509_STRICT,)}),
    ],
)
def test_options_of_tls(options: str, expected: dict[str, Any]):
    assert parse_redis_url(f"rediss://host?{options}").tls == Tls(**expected)


def test_only_words_switch_the_check_of_certificates_off():
    assert Tls().verified
    assert Tls(cert_reqs="optional").verified
    assert not Tls(cert_reqs="none").verified
    assert not Tls(check_hostname=False).verified


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "looks like redis://"),
        ("host:6379", "looks like redis://"),
        ("http://host", "begins with redis://"),
        ("amqp://guest:guest@host", "amqp:// is no Redis"),
        ("sqs://", "sqs:// is no Redis"),
        ("redis+cluster://host", "Cluster"),
        ("rediss+cluster://host", "Cluster"),
        ("redis://a,b/0", "redis+sentinel://"),
        ("redis://host/name", "is a number"),
        ("redis://host/1/2", "is a number"),
        ("redis://host/-1", "is a number"),
        ("redis://host/1?db=2", "two databases"),
        ("redis://host:port", "cannot be read"),
        ("redis://::1", "cannot be read"),
        ("redis://[::1", "cannot be read"),
        ("redis://host:70000", "1 to 65535"),
        ("redis://host:0", "1 to 65535"),
        ("redis://host?dbs=1", "did you mean db?"),
        ("redis://host?virtual_host=1", "no option virtual_host"),
        ("redis://host?socket_timeout=1", "leave it out"),
        ("redis://host?db=1&db=2", "twice"),
        ("redis://host?ssl_ca_certs=/ca.pem", "write rediss://"),
        ("sentinel://host?master_name=m&ssl_ca_certs=/ca.pem", "rediss+sentinel://"),
        ("unix:///sock?ssl_cert_reqs=none", "write rediss://"),
        ("rediss://host?ssl_ca_cert=/ca.pem", "did you mean ssl_ca_certs?"),
        ("rediss://host?ssl_cert_reqs=maybe", "is required, or none"),
        ("rediss://host?ssl_check_hostname=maybe", "true or false"),
        ("rediss://host?ssl_min_version=2", "TLSv1.2 or TLSv1.3"),
        ("rediss://host?ssl_exclude_verify_flags=ALL", "VERIFY_X509_STRICT"),
        ("rediss://host?ssl_validate_ocsp=true", "no option ssl_validate_ocsp"),
        ("unix://", "path of the socket"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix:///sock?db=x", "is a number"),
        ("redis+sentinel://host", "name of the service"),
        ("redis+sentinel://host/0", "name of the service"),
        ("redis+sentinel://host/mine/x", "is a number"),
        ("sentinel://host", "master_name"),
        ("sentinel://host;redis://host?master_name=m", "sentinel://host:26379"),
        ("sentinel://:a@host;sentinel://:b@host?master_name=m", "different users"),
    ],
)
def test_url_that_cannot_work_is_refused_with_what_to_write(url: str, said: str):
    with pytest.raises(InvalidSettingError) as caught:
        parse_redis_url(url)
    assert said in str(caught.value)


@pytest.mark.parametrize("mark", ["/", "?", "#", "[", ":6379/", "/0?", "?db=", "%"])
@pytest.mark.parametrize(
    "form",
    [
        "redis://:{}@host:6379/0",
        "rediss://user:{}@host?ssl_ca_cert=/x",
        "redis+sentinel://:{}@a,b/mine",
        "sentinel://:{}@a;sentinel://b?master_name=m",
        "redis://host?password={}",
        "{}@host:6379",
        "unix://:{}@/run/redis.sock?bd=1",
    ],
)
def test_no_piece_of_the_password_is_told(form: str, mark: str):
    secret = f"opensesame{mark}openrice"
    try:
        server = parse_redis_url(form.format(secret))
    except InvalidSettingError as error:
        told = str(error)
    else:
        told = f"{server} {server!r}"
    assert "open" not in told


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://u:p@host/3", "host:6379, database 3"),
        ("rediss://[::1]", "[::1]:6379, database 0, TLS"),
        ("unix:///run/redis.sock", "/run/redis.sock, database 0"),
        ("redis+sentinel://a,b:7/mine/1", "mine of the Sentinels a:26379,b:7, database 1"),
    ],
)
def test_place_is_told_without_user_and_password(url: str, told: str):
    assert str(parse_redis_url(url)) == told
