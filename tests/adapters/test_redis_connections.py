"""Connections of redis-py, made from a URL, reach what the URL names, and nobody else."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
import redis.asyncio
import uvloop

from keepstream.client.redis_connections import make_async_pool, make_pool
from keepstream.client.redis_url import parse_redis_url
from keepstream.errors import InvalidSettingError
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from tests.redis_servers import HANDSHAKES_BREAK, Certificates, RedisTls, SentinelSet, ValkeyAtSocket

Link = Callable[[str], None]
#: Seconds; the time-outs of connections to servers that answer, however busy the machine.
LONG = 60.0


def ask_sync(url: str) -> None:
    pool = make_pool(parse_redis_url(url), connect_timeout=LONG, answer_timeout=LONG)
    with redis.Redis.from_pool(pool) as client:
        client.incr("asked")


def ask_sync_blocking(url: str) -> None:
    pool = make_pool(parse_redis_url(url), max_connections=2, wait_for_connection=LONG, retries=1)
    with redis.Redis.from_pool(pool) as client:
        client.incr("asked")


def ask_async(url: str) -> None:
    async def ask() -> None:
        pool = make_async_pool(parse_redis_url(url), connect_timeout=LONG, answer_timeout=LONG)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            await client.incr("asked")

    asyncio.run(ask())


def ask_async_blocking(url: str) -> None:
    async def ask() -> None:
        pool = make_async_pool(parse_redis_url(url), max_connections=2, wait_for_connection=LONG, retries=1)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            await asyncio.gather(*(client.incr("asked") for _ in range(5)))

    asyncio.run(ask())


@pytest.fixture(params=[ask_sync, ask_sync_blocking, ask_async, ask_async_blocking])
def ask(request: pytest.FixtureRequest) -> Link:
    link: Link = request.param
    return link


def asked(valkey: EmbeddedValkey, db: int = 0) -> bool:
    with redis.Redis(port=valkey.port, db=db) as client:
        return bool(client.exists("asked"))


def test_the_database_of_the_url_is_used(ask: Link, valkey: EmbeddedValkey, redis_url: str):
    ask(f"redis://127.0.0.1:{valkey.port}?db=6")
    assert asked(valkey, db=6)
    assert not asked(valkey, db=0)


@pytest.mark.parametrize("form", ["unix://{}?db=3", "redis+socket://{}?virtual_host=3"])
def test_socket(ask: Link, form: str):
    with ValkeyAtSocket() as valkey:
        ask(form.format(valkey.socket))
        assert asked(valkey, db=3)


def test_certificate_of_a_known_authority_is_accepted(ask: Link, tls: RedisTls, certificates: Certificates):
    ask(tls.url(ssl_ca_certs=str(certificates.authority_file)))
    ask(
        tls.url(ssl_ca_certs=str(certificates.authority_file), ssl_cert_reqs="CERT_REQUIRED", ssl_min_version="TLSv1.3")
    )


def test_certificate_of_an_unknown_authority_is_refused(ask: Link, tls: RedisTls):
    with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(tls.url())


def test_certificate_for_another_host_is_refused(ask: Link, tls: RedisTls, certificates: Certificates):
    with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(tls.url("127.0.0.1", ssl_ca_certs=str(certificates.authority_file)))


@pytest.mark.parametrize("value", ["none", "CERT_NONE"])
def test_verification_can_be_switched_off(ask: Link, tls: RedisTls, value: str):
    ask(tls.url("127.0.0.1", ssl_cert_reqs=value))


def test_check_of_the_host_name_can_be_switched_off(ask: Link, tls: RedisTls, certificates: Certificates):
    ask(tls.url("127.0.0.1", ssl_ca_certs=str(certificates.authority_file), ssl_check_hostname="false"))
    with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(tls.url("127.0.0.1", ssl_check_hostname="false"))


@HANDSHAKES_BREAK
def test_certificate_of_ones_own_is_shown(ask: Link, strict_tls: RedisTls, certificates: Certificates):
    certificate, key = certificates.issue("client")
    authority = str(certificates.authority_file)
    ask(strict_tls.url(ssl_ca_certs=authority, ssl_certfile=str(certificate), ssl_keyfile=str(key)))
    with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
        ask(strict_tls.url(ssl_ca_certs=authority))


@pytest.mark.parametrize("make", [make_pool, make_async_pool])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs cannot be read"),
        ("ssl_certfile={directory}/c.pem&ssl_keyfile={directory}/c.key", "ssl_certfile cannot be read"),
        ("ssl_ca_certs={file}", "no use"),
        ("ssl_ciphers=NONSENSE", "no use"),
    ],
)
def test_files_that_are_no_use_are_found_out_at_once(
    make: Callable[..., object], tmp_path: Path, options: str, said: str
):
    file = tmp_path / "empty.pem"
    file.write_text("no certificate\n")
    with pytest.raises(InvalidSettingError, match=said):
        make(parse_redis_url(f"rediss://localhost?{options.format(directory=tmp_path, file=file)}"))


def test_the_sentinels_lead_to_the_master(ask: Link, sentinels: SentinelSet):
    ask(sentinels.url)


def test_a_sentinel_that_is_gone_is_passed_over(ask: Link, sentinels: SentinelSet):
    ask(sentinels.url.replace("@127.0.0.1:", "@127.0.0.1:1,127.0.0.1:"))


def test_without_an_answer_from_a_sentinel_there_is_no_connection(ask: Link):
    with pytest.raises(redis.ConnectionError, match="No master found"):
        ask("redis+sentinel://127.0.0.1:1/mymaster")


def test_a_connection_follows_the_master(sentinels: SentinelSet):
    server = parse_redis_url(sentinels.url)
    with redis.Redis.from_pool(make_pool(server, answer_timeout=LONG, retries=1)) as client:
        client.set("asked", 1)
        sentinels.hand_over()
        client.set("asked", 2)  # the connection is old: its server refuses to write, or has closed it
        with sentinels.master.client() as master:
            assert master.get("asked") == "2"


async def test_an_async_connection_follows_the_master(sentinels: SentinelSet):
    server = parse_redis_url(sentinels.url)
    pool = make_async_pool(server, answer_timeout=LONG, retries=1, max_connections=2, wait_for_connection=LONG)
    async with redis.asyncio.Redis.from_pool(pool) as client:
        await client.set("asked", 1)
        await asyncio.to_thread(sentinels.hand_over)
        await client.set("asked", 3)
        with sentinels.master.client() as master:
            assert master.get("asked") == "3"


def test_no_connection_to_a_sentinel_stays_open(sentinels: SentinelSet):
    pool = make_pool(parse_redis_url(sentinels.url))
    ports = {sentinel.port for sentinel in sentinels.sentinels}
    with redis.Redis.from_pool(pool) as client:
        client.ping()
        peers = psutil.Process().net_connections("tcp")
        assert not [peer for peer in peers if peer.status == "ESTABLISHED" and peer.raddr[1] in ports]


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("place", ["address", "sentinels"])
def test_a_connection_that_has_ended_is_lost_and_no_defect(
    redis_url: str, sentinels: SentinelSet, place: str, make_loop: Callable[[], asyncio.AbstractEventLoop]
):
    """It ends between two commands, or between the greeting and the password."""

    async def use() -> None:
        pool = make_async_pool(parse_redis_url(redis_url if place == "address" else sentinels.url))
        connection = await pool.get_connection()
        assert isinstance(connection, redis.asyncio.Connection)
        writer = connection._writer
        assert writer is not None
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        with pytest.raises(redis.ConnectionError):  # noqa: PT012  # which of the two meets it depends on the loop
            await connection.send_command("PING")
            await connection.read_response()
        await pool.release(connection)
        await pool.aclose()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(use())


@pytest.fixture(params=["address", "tls", "socket"])
def moving(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[tuple[ValkeyAtSocket, str]]:
    """A server of its own, and the URL by which it is reached: the place stays the same in a fail-over."""
    with ValkeyAtSocket() as valkey, RedisTls(valkey.port, certificates.server_context("localhost")) as tls:
        urls = {
            "address": valkey.url,
            "tls": tls.url(ssl_ca_certs=str(certificates.authority_file)),
            "socket": f"unix://{valkey.socket}",
        }
        yield valkey, urls[request.param]


@contextlib.contextmanager
def as_replica(valkey: EmbeddedValkey) -> Iterator[None]:
    """Make a server the replica of another one, which does not end the connections to it."""
    with redis.Redis(port=valkey.port) as admin:
        admin.replicaof("127.0.0.1", "1")
        yield
        admin.replicaof("NO", "ONE")


def test_a_replica_is_left_for_wherever_the_address_leads(moving: tuple[ValkeyAtSocket, str]):
    valkey, url = moving
    with redis.Redis.from_pool(make_pool(parse_redis_url(url), answer_timeout=LONG)) as client:
        connection = client.client_id()
        assert client.client_id() == connection
        with as_replica(valkey), client.pipeline(transaction=False) as pipeline:
            pipeline.set("asked", 1)
            pipeline.set("asked", 2)
            with pytest.raises(redis.ReadOnlyError):
                pipeline.execute()
        assert client.client_id() != connection


async def test_an_async_connection_leaves_a_replica(moving: tuple[ValkeyAtSocket, str]):
    valkey, url = moving
    pool = make_async_pool(parse_redis_url(url), answer_timeout=LONG, max_connections=1, wait_for_connection=LONG)
    async with redis.asyncio.Redis.from_pool(pool) as client:
        connection = await client.client_id()
        assert await client.client_id() == connection
        with as_replica(valkey), pytest.raises(redis.ReadOnlyError):
            await client.set("asked", 1)
        assert await client.client_id() != connection
