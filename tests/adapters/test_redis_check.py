"""What is wrong with a Redis is found at the start, and told in one line that says what to do."""

import asyncio
import re
import socket
import threading
from pathlib import Path

import pytest
import redis

from keepstream.client.redis_url import parse_redis_url
from keepstream_worker.dev_stack.embedded import EmbeddedValkey, free_port
from keepstream_worker.redis_check import RedisFacts, RedisFault, _fault, check_redis_server
from tests.redis_servers import (
    HANDSHAKES_BREAK,
    Certificates,
    ClusterNode,
    DebianRedis,
    RedisTls,
    ReplicatedValkey,
    SentinelSet,
    ValkeyAtSocket,
)

SECRET = "opensesame"


def check(url: str) -> RedisFacts:
    return check_redis_server(parse_redis_url(url), "KEEPSTREAM_REDIS_URL")


def fault(url: str) -> RedisFault:
    with pytest.raises(RedisFault) as caught:
        check(url)
    line = f"{caught.value.found}; {caught.value.advice}"
    assert "\n" not in line
    assert SECRET not in line
    return caught.value


def test_a_redis_that_can_be_used(redis_url: str):
    facts = check(redis_url)
    assert facts.version.startswith("Valkey ")
    assert facts.eviction == "noeviction"


@pytest.mark.parametrize("form", ["unix://{}?db=3", "redis+socket://{}?virtual_host=3"])
def test_a_socket_that_can_be_used(form: str):
    with ValkeyAtSocket() as valkey:
        assert check(form.format(valkey.socket)).version.startswith("Valkey ")


def test_tls_that_can_be_used(tls: RedisTls, strict_tls: RedisTls, certificates: Certificates):
    authority = str(certificates.authority_file)
    certificate, key = map(str, certificates.issue("client"))
    check(tls.url(ssl_ca_certs=authority))
    check(tls.url("127.0.0.1", ssl_ca_certs=authority, ssl_check_hostname="false"))
    check(tls.url("127.0.0.1", ssl_cert_reqs="CERT_NONE"))
    check(strict_tls.url(ssl_ca_certs=authority, ssl_certfile=certificate, ssl_keyfile=key))


@HANDSHAKES_BREAK
def test_a_certificate_that_is_not_trusted(tls: RedisTls):
    found = fault(tls.url(user=f":{SECRET}"))
    assert "certificate that is not trusted" in found.found
    assert "ssl_ca_certs" in found.advice
    assert not found.away


@HANDSHAKES_BREAK
def test_a_certificate_for_another_host(tls: RedisTls, certificates: Certificates):
    found = fault(tls.url("127.0.0.1", ssl_ca_certs=str(certificates.authority_file)))
    assert found.found == "shows a certificate for another host"
    assert "KEEPSTREAM_REDIS_URL" in found.advice


@HANDSHAKES_BREAK
def test_a_server_that_wants_a_certificate(strict_tls: RedisTls, certificates: Certificates):
    found = fault(strict_tls.url(ssl_ca_certs=str(certificates.authority_file)))
    assert found.found.startswith(("closes the connection", "does not agree on TLS"))
    assert "ssl_certfile" in found.advice


def test_a_server_without_tls(valkey: EmbeddedValkey):
    found = fault(f"rediss://127.0.0.1:{valkey.port}")  # it waits for the end of what it takes for a command
    assert found.found == "does not answer (TimeoutError)"
    assert "speaks TLS" in found.advice


def test_a_server_that_speaks_tls_only(tls: RedisTls):
    found = fault(f"redis://127.0.0.1:{tls.port}")
    assert found.found == "closes the connection"
    assert "rediss://" in found.advice


def test_a_file_that_is_not_there(tls: RedisTls):
    found = fault(tls.url(ssl_ca_certs="/nowhere/ca.pem"))
    assert found.found == "cannot be asked: the file of ssl_ca_certs cannot be read (No such file or directory)"
    assert found.advice == "correct KEEPSTREAM_REDIS_URL"


@pytest.mark.parametrize("user", ["", f":{SECRET}", f"default:{SECRET}", f"nobody:{SECRET}"])
def test_a_wrong_or_missing_password(user: str):
    with ReplicatedValkey(password="right") as valkey:
        check(f"redis://:right@127.0.0.1:{valkey.port}")
        found = fault(f"redis://{user}@127.0.0.1:{valkey.port}")
    assert found.found == "refuses the user or password"
    assert found.advice == "correct those in KEEPSTREAM_REDIS_URL, or KEEPSTREAM_REDIS_PASSWORD"


def test_a_password_that_is_not_needed_is_no_fault(valkey: EmbeddedValkey):
    check(f"redis://:{SECRET}@127.0.0.1:{valkey.port}")


def test_a_database_that_is_not_there(valkey: EmbeddedValkey):
    found = fault(f"redis://127.0.0.1:{valkey.port}/99")
    assert found.found == "has no database of this number"


def test_a_node_of_a_cluster():
    with ClusterNode() as node:
        found = fault(node.url)
    assert found.found == "is a node of a Redis Cluster, from which Celery cannot take a queue"
    assert "KEEPSTREAM_REDIS_URL" in found.advice


def test_a_replica():
    with ReplicatedValkey() as master, ReplicatedValkey(master) as replica:
        found = fault(replica.url)
    assert found.found == "is a replica, which takes no jobs and no events"


def test_a_redis_that_is_away():
    found = fault(f"redis://:{SECRET}@127.0.0.1:{free_port()}")
    assert found.found == "does not answer (ConnectionRefusedError)"
    assert found.away


def test_a_host_that_does_not_exist():
    found = fault(f"redis://:{SECRET}@nowhere.invalid")
    assert found.found == "does not answer (gaierror)"


def test_a_server_that_accepts_and_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []
        threading.Thread(target=lambda: held.extend(listener.accept()[0] for _ in range(1)), daemon=True).start()
        found = fault(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        assert found.away
        held[0].close()


def test_a_user_who_may_not_ask(valkey: EmbeddedValkey, redis_url: str):
    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "modest", "reset", "on", f">{SECRET}", "~*", "&*", "+@all", "-info")
        try:
            assert check(f"redis://modest:{SECRET}@127.0.0.1:{valkey.port}") == RedisFacts("Redis")
        finally:
            admin.execute_command("ACL", "DELUSER", "modest")


def test_sentinels_that_can_be_used(sentinels: SentinelSet):
    assert check(sentinels.url).silent_sentinels == 0
    assert check(sentinels.url.replace("@127.0.0.1:", "@127.0.0.1:1,127.0.0.1:")).silent_sentinels == 1


def test_sentinels_that_do_not_know_the_service(sentinels: SentinelSet):
    found = fault(sentinels.url.replace("/mymaster/", "/mymastre/"))
    assert "not known to its Sentinels" in found.found
    assert found.advice == "did you mean mymaster?"


def test_sentinels_that_refuse_the_password(sentinels: SentinelSet):
    found = fault(sentinels.url.replace("sentinel-word", SECRET))
    assert found.found == "is to be found by a Sentinel, which refuses the user or password"


def test_a_master_that_refuses_the_password(sentinels: SentinelSet):
    assert fault(sentinels.url.replace("server-word", SECRET)).found == "refuses the user or password"


def test_sentinels_that_are_away():
    found = fault(f"redis+sentinel://127.0.0.1:{free_port()}/mymaster")
    assert found.found == "is to be found by a Sentinel, which does not answer (ConnectionRefusedError)"
    assert found.away


def test_debians_redis_and_sentinel_by_tls_only(certificates: Certificates):
    authority = f"ssl_ca_certs={certificates.authority_file}"
    with DebianRedis(certificates) as master:
        watched = f"sentinel monitor mymaster 127.0.0.1 {master.port} 1"
        with DebianRedis(certificates, configuration=(watched,), sentinel=True) as sentinel:
            assert check(f"rediss://127.0.0.1:{master.port}/3?{authority}").version.startswith("Redis ")
            url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/mymaster"
            assert check(f"{url}?{authority}").version.startswith("Redis ")
            assert "which shows a certificate that is not trusted" in fault(url).found


def test_the_right_that_a_user_of_the_sentinels_needs(sentinels: SentinelSet):
    """As in the operations guide."""
    guide = Path(__file__).parents[2] / "docs" / "operations" / "running.md"
    rule = re.search(r"`ACL SETUSER keepstream on >SENTINEL-PASSWORD (.*)`", guide.read_text())
    assert rule is not None
    for sentinel in sentinels.sentinels:
        with sentinel.client() as admin:
            admin.execute_command("ACL", "SETUSER", "keepstream", "reset", "on", ">its-word", *rule[1].split())
    url = sentinels.url.replace(
        "sentinel_password=sentinel-word", "sentinel_username=keepstream&sentinel_password=its-word"
    )
    assert check(url).silent_sentinels == 0
    for sentinel in sentinels.sentinels:
        with sentinel.client() as admin:
            admin.execute_command("ACL", "SETUSER", "keepstream", "-sentinel")
    assert "does not let this user in" in fault(url).found


def test_time_out_is_named_as_one() -> None:
    error = TimeoutError()
    error.__context__ = asyncio.CancelledError()
    found = _fault(error, parse_redis_url("redis://host"), "KEEPSTREAM_REDIS_URL")
    assert found.found == "does not answer (TimeoutError)"
