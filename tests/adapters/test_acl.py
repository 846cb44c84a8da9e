"""The Redis users in the operations guide: each can do its work, and nothing else."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError, ResponseError

from keepstream import Client
from keepstream.errors import BrokerUnavailableError, InvalidSettingError
from keepstream.jobs import parse_job
from keepstream.names import QUEUE, control_channel, job_keys
from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import PATIENCE, Cluster
from tests.fork_server import ForkServer

GUIDE = Path(__file__).parents[2] / "docs" / "operations" / "running.md"
USERS = re.findall(r"^user (\S+) (on .*)$", GUIDE.read_text(), re.MULTILINE)
JOB = {"model": "scripted-1", "messages": [{"role": "user", "content": "Hello!"}]}

pytestmark = pytest.mark.slow

UrlOf = Callable[[str], str]


@pytest.fixture(scope="module")
def guarded_cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[tuple[Cluster, UrlOf]]:
    """A cluster whose worker is the guide's user `worker`, and the URL of each of the guide's users."""
    directory = tmp_path_factory.mktemp("guarded")
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), forks=forks) as cluster:
        host = cluster.valkey.url.removeprefix("redis://")

        def url_of(user: str) -> str:
            return f"redis://{user}:{user}-password@{host}"

        with cluster.redis() as admin:
            for name, rules in USERS:
                own = re.sub(r">\S+", f">{name}-password", rules).split()
                admin.execute_command("ACL", "SETUSER", name, "reset", *own)
        cluster.start_worker(redis_url=url_of("worker"))
        yield cluster, url_of


@pytest.fixture
def guarded(guarded_cluster: tuple[Cluster, UrlOf]) -> tuple[Cluster, UrlOf]:
    """The guarded cluster, in which nobody has been refused anything yet."""
    with guarded_cluster[0].redis() as admin:
        admin.execute_command("ACL", "LOG", "RESET")
    return guarded_cluster


def test_a_service_confined_to_its_tenant_enqueues_and_follows(guarded: tuple[Cluster, UrlOf]) -> None:
    cluster, url_of = guarded
    with Client(url_of("shop"), broker_url=url_of("producer"), tenant="shop") as client:
        events = list(client.follow(client.enqueue(JOB)))
    assert events[-1].type == "job.completed"
    with cluster.redis() as admin:
        assert [(entry["username"], entry["object"]) for entry in admin.acl_log()] == []  # no command was refused


@pytest.mark.parametrize("with_database", [False, True])
def test_a_service_confined_to_its_tenant_cancels_its_jobs(
    guarded: tuple[Cluster, UrlOf], *, with_database: bool
) -> None:
    cluster, url_of = guarded
    database_url = cluster.database_url if with_database else None
    with Client(url_of("shop"), broker_url=url_of("producer"), database_url=database_url, tenant="shop") as client:
        job_id = client.enqueue(parse_job(cluster.job(limits={"tenant": "shop"}, text="word " * 1000, rate=10)))
        cluster.wait_for_deltas(job_id)
        client.cancel(job_id)
        *_, end = client.follow(job_id)
    assert end.type == "job.cancelled"


def test_a_service_confined_to_its_tenant_deletes_its_jobs(guarded: tuple[Cluster, UrlOf]) -> None:
    cluster, url_of = guarded
    own, log = url_of("shop"), url_of("producer")
    with Client(own, broker_url=log, database_url=cluster.database_url, tenant="shop") as client:
        job_id = client.enqueue(JOB)
        client.wait(job_id)
        assert client.delete(job_id)
        with cluster.redis() as admin:
            assert not admin.exists(job_keys("shop", job_id).log)


def test_a_message_on_the_control_channel_cancels_no_job_of_another_tenant(guarded: tuple[Cluster, UrlOf]) -> None:
    cluster, url_of = guarded
    job_id = cluster.enqueue(text="word " * 30, rate=30)
    cluster.wait_for_deltas(job_id)
    with redis.Redis.from_url(url_of("shop")) as shop:
        shop.publish(control_channel(), json.dumps({"tenant": "default", "job_id": job_id}))
    assert cluster.wait_for(job_id).status == "completed"


def test_a_service_cannot_touch_what_is_not_its_own(guarded: tuple[Cluster, UrlOf]) -> None:
    _, url_of = guarded
    own, foreign = job_keys("shop", "j1"), job_keys("other", "j1")
    with redis.Redis.from_url(url_of("shop")) as shop:
        refused: list[Callable[[], object]] = [
            lambda: shop.xrange(foreign.log),
            lambda: shop.set(foreign.cancel, 1),
            lambda: shop.xadd(own.log, {"event": "forged"}),
            lambda: shop.set(own.log, "forged"),
            lambda: shop.delete(foreign.log),
            lambda: shop.publish(own.channel, "forged"),
            lambda: shop.lrange(QUEUE, 0, -1),
            lambda: shop.keys("*"),
            lambda: shop.client_kill_filter(skipme=False),
        ]
        for attempt in refused:
            with pytest.raises(NoPermissionError):
                attempt()
        with shop.pubsub() as pubsub:
            pubsub.subscribe(foreign.channel)
            with pytest.raises(ResponseError):
                pubsub.get_message(timeout=PATIENCE)


@pytest.mark.parametrize(("user", "tenant"), [("shop", "other"), ("producer", "shop")])
def test_who_may_not_follow_is_told_what_to_check(guarded: tuple[Cluster, UrlOf], user: str, tenant: str) -> None:
    _, url_of = guarded
    with Client(url_of(user), tenant=tenant) as client, pytest.raises(InvalidSettingError, match="NoPermissionError"):
        next(client.follow("j1"))


def test_a_producer_can_put_jobs_on_the_queue_and_read_nothing(guarded: tuple[Cluster, UrlOf]) -> None:
    _, url_of = guarded
    with redis.Redis.from_url(url_of("producer")) as producer:
        for attempt in (lambda: producer.lrange(QUEUE, 0, -1), lambda: producer.rpop(QUEUE), producer.flushall):
            with pytest.raises(NoPermissionError):
                attempt()


def test_nobody_without_a_password_gets_in(guarded: tuple[Cluster, UrlOf]) -> None:
    """As in the guide, except that the test keeps the default user for itself."""
    assert re.search(r"^user default off$", GUIDE.read_text(), re.MULTILINE)
    _, url_of = guarded
    stranger = Client(url_of("producer").replace("producer-password", "wrong"))
    with stranger, pytest.raises(BrokerUnavailableError):
        stranger.enqueue(JOB)
