"""A whole Keepstream over every way to reach Redis: sockets, TLS, Sentinels; and what happens when that way is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from keepstream.errors import InvalidSettingError
from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import Cluster, wait_until
from tests.fork_server import ForkServer
from tests.redis_servers import HANDSHAKES_BREAK, SERVICE, Certificates, RedisTls, SentinelSet, ValkeyAtSocket

MakeCluster = Callable[..., Cluster]
#: What a worker says of each of its links that is lost.
OUTAGES = (
    ("broker_unavailable", "take messages"),
    ("redis_unavailable", "publish events"),
    ("redis_unavailable", "hear of cancels"),
)
TEXT = "One two three four five six seven eight nine ten. "


@pytest.fixture
def make_cluster(tmp_path: Path, forks: ForkServer) -> Iterator[MakeCluster]:
    """Makes a cluster with a Redis at a URL."""
    clusters = []

    def make(redis_url: str, **settings: Any) -> Cluster:
        database_url = sqlite_url(tmp_path / "keepstream.db")
        cluster = Cluster(tmp_path, database_url, redis_url=redis_url, forks=forks, **settings)
        clusters.append(cluster)
        return cluster.__enter__()

    yield make
    for cluster in clusters:
        cluster.close()


@contextmanager
def socket_urls(_: Certificates) -> Iterator[tuple[str, str | None]]:
    with ValkeyAtSocket() as valkey:
        yield f"unix://{valkey.socket}?db=3", None


@contextmanager
def celery_socket_urls(_: Certificates) -> Iterator[tuple[str, str | None]]:
    with ValkeyAtSocket() as valkey:
        yield f"redis://127.0.0.1:{valkey.port}?db=6", f"redis+socket://{valkey.socket}?virtual_host=3"


@contextmanager
def tls_urls(certificates: Certificates) -> Iterator[tuple[str, str | None]]:
    with ValkeyAtSocket() as valkey, RedisTls(valkey.port, certificates.server_context("localhost")) as tls:
        yield tls.url(ssl_ca_certs=str(certificates.authority_file), ssl_cert_reqs="CERT_REQUIRED"), None


@contextmanager
def mutual_tls_urls(certificates: Certificates) -> Iterator[tuple[str, str | None]]:
    context = certificates.server_context("localhost", clients=True)
    certificate, key = map(str, certificates.issue("client"))
    with ValkeyAtSocket() as valkey, RedisTls(valkey.port, context) as tls:
        url = tls.url(ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=str(certificates.authority_file))
        yield url, f"{url.replace('localhost', '127.0.0.1')}&ssl_check_hostname=false"


@contextmanager
def celery_sentinel_urls(_: Certificates) -> Iterator[tuple[str, str | None]]:
    with SentinelSet(password="server-word") as servers:
        hosts = ";".join(f"sentinel://:server-word@127.0.0.1:{sentinel.port}" for sentinel in servers.sentinels)
        yield f"{hosts}/2?master_name={SERVICE}", servers.url


@pytest.mark.parametrize(
    "urls", [socket_urls, celery_socket_urls, tls_urls, mutual_tls_urls, celery_sentinel_urls], ids=lambda f: f.__name__
)
def test_jobs_run_and_are_followed_and_cancelled(
    urls: Any, make_cluster: MakeCluster, certificates: Certificates
) -> None:
    with urls(certificates) as (redis_url, broker_url):
        cluster = make_cluster(redis_url, **({"broker_url": broker_url} if broker_url else {}))
        worker = cluster.start_worker()
        job_id = cluster.enqueue(text=TEXT * 3, rate=50)
        assert cluster.follow(job_id).to_the_end().text == TEXT * 3
        assert len(cluster.result(job_id).attempts) == 1
        endless = cluster.enqueue(text=TEXT * 200, rate=10)
        cluster.wait_for_deltas(endless)
        cluster.client.cancel(endless)
        assert cluster.wait_for(endless).status == "cancelled"
        assert [worker.said(event) for event, _ in OUTAGES] == [[], [], []]


@HANDSHAKES_BREAK
def test_every_link_refuses_a_certificate_that_is_not_right_any_more(
    make_cluster: MakeCluster, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else answers in the server's place, and gets neither the password nor a prompt.

    The URL has no options of TLS, which kombu would take for a wish not to verify anything.
    """
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority_file))  # the system trusts this authority
    (tmp_path / "strangers").mkdir()
    strangers = Certificates(tmp_path / "strangers")
    right = certificates.server_context("localhost")
    with ValkeyAtSocket() as valkey, RedisTls(valkey.port, right) as tls:
        cluster = make_cluster(tls.url(user=":the-word"))
        worker = cluster.start_worker()
        running = cluster.enqueue(text=TEXT * 2, rate=10)
        following = cluster.follow(running)
        following.wait_for("delta")
        tls.use(strangers.server_context("localhost"))
        for event, waiting_to in OUTAGES:
            worker.wait_to_say(event, waiting_to=waiting_to)
        with pytest.raises(InvalidSettingError, match="certificate is not trusted"):
            following.to_the_end()
        assert tls.served == 0
        kept = cluster.enqueue(text=TEXT)  # its row, with the message still to come
        tls.use(right)
        assert [event.id for event in cluster.log(running)][: len(following.ids)] == following.ids
        assert cluster.follow(running).to_the_end().text == TEXT * 2
        assert cluster.wait_for(kept).status == "completed"
        assert [len(cluster.result(job_id).attempts) for job_id in (running, kept)] == [1, 1]


def test_verification_that_is_switched_off_is_said(make_cluster: MakeCluster, certificates: Certificates) -> None:
    with ValkeyAtSocket() as valkey, RedisTls(valkey.port, certificates.server_context("localhost")) as tls:
        cluster = make_cluster(tls.url("127.0.0.1", ssl_cert_reqs="CERT_NONE"))
        worker = cluster.start_worker()
        assert [line["variable"] for line in worker.said("redis_not_verified")] == ["KEEPSTREAM_REDIS_URL"]
        assert cluster.wait_for(cluster.enqueue(text=TEXT)).status == "completed"


@pytest.mark.parametrize("how", ["killed", "handed-over", "frozen"])
def test_a_fail_over_costs_no_attempt_and_no_event(make_cluster: MakeCluster, how: str) -> None:
    """Ten streams run on; followers get everything; what was enqueued meanwhile is done afterwards."""
    with SentinelSet(replicas=2, dead_after=2.0) as servers:
        cluster = make_cluster(servers.url)
        workers = cluster.start_workers(2)
        text = TEXT * 30
        jobs = [cluster.enqueue(text=text, rate=20) for _ in range(10)]
        followings = [cluster.follow(job_id) for job_id in jobs]
        for following in followings:
            following.wait_for("delta")
        old = servers.master
        match how:
            case "killed":
                servers.fail_over()
            case "handed-over":
                servers.hand_over()
            case "frozen":
                old.freeze()
                servers.wait_for_new_master(old)
        meanwhile = cluster.enqueue(text=TEXT)
        assert [following.to_the_end().text for following in followings] == [text] * 10
        assert cluster.wait_for(meanwhile).status == "completed"
        results = [cluster.result(job_id) for job_id in (*jobs, meanwhile)]
        assert [result.status for result in results] == ["completed"] * 11
        assert [len(result.attempts) for result in results] == [1] * 11
        assert [len(cluster.provider.attempts(job_id)) for job_id in (*jobs, meanwhile)] == [1] * 11
        assert [result.choices[0].content for result in results] == [text] * 10 + [TEXT]
        assert all(worker.running for worker in workers)
        if how == "frozen":
            for worker in workers:
                worker.wait_to_say(
                    "redis_unavailable", waiting_to="hear of cancels"
                )  # who only listens notices the silence, too
            old.thaw()
        wait_until(lambda: cluster.wait_for(cluster.enqueue(text=TEXT)).status == "completed", "one more job")
