"""Services as people run them enqueue and follow jobs: gunicorn with a preloaded client, Celery's prefork, gevent.

In: a real service, a real worker, PostgreSQL through PgBouncer in transaction mode, Redis over TLS with an authority of
its own.  Out: each follower's text is the row's, each job took one attempt, and nobody logged an error.
"""

import json
import os
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, free_port
from tests.cluster import Cluster
from tests.fork_server import ForkServer
from tests.redis_servers import Certificates, RedisTls
from tests.services import PgBouncer, PostgresServer

pytestmark = pytest.mark.slow

JOBS, AT_ONCE = 200, 20


class HostService(EmbeddedProcess):
    """A service of other people's, with processes of its own."""

    start_timeout = 120.0

    def __init__(self, command: list[str], environment: dict[str, str], ready: Callable[[str], bool]) -> None:
        super().__init__("service")
        self._arguments = command
        self._environment = environment
        self._ready = ready

    @override
    def _command(self) -> list[str]:
        return [sys.executable, "-m", *self._arguments]

    @override
    def _options(self) -> dict[str, Any]:
        return {"cwd": Path(__file__).parents[2], "env": self._environment}

    @override
    def _is_ready(self) -> bool:
        return self._ready(self.said)

    @property
    def said(self) -> str:
        """Its log."""
        return self._log.read_text(errors="replace")


@pytest.fixture
def cluster(tmp_path: Path, postgres: PostgresServer, postgres_url: str, forks: ForkServer) -> Iterator[Cluster]:
    with ExitStack() as stack:
        bouncer = stack.enter_context(PgBouncer(postgres))
        cluster = Cluster(tmp_path, bouncer.url(postgres_url.rpartition("/")[2]), forks=forks)
        certificates = Certificates(tmp_path)
        tls = stack.enter_context(RedisTls(cluster.valkey.port, certificates.server_context("localhost")))
        cluster.settings["redis_url"] = tls.url(ssl_ca_certs=str(certificates.authority_file))
        cluster.settings |= {"lease": 20.0}  # what is slow here is not lost
        yield stack.enter_context(cluster)


@pytest.fixture
def environment(cluster: Cluster) -> dict[str, str]:
    """What a service is told: the settings of a client, and a broker of its own."""
    names = ("KEEPSTREAM_REDIS_URL", "KEEPSTREAM_DATABASE_URL")
    ours = cluster.environment()
    others = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTREAM_")}
    return others | {name: ours[name] for name in names} | {"HOST_BROKER_URL": f"{cluster.valkey.url[:-1]}1"}


def check(cluster: Cluster, service: HostService, ask: Callable[[str], dict[str, Any]], processes: int) -> None:
    """Ask all questions, some at a time, and look at every answer."""
    questions = [f"Question {number}: what is it that makes a service wait?" for number in range(JOBS)]
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(ask, questions))
    seconds = time.monotonic() - began
    print(f"{JOBS} jobs in {seconds:.1f} s by {len({answer['process'] for answer in answers})} processes")  # noqa: T201
    for question, answer in zip(questions, answers, strict=True):
        assert answer["status"] == "completed"
        assert answer["followed"] == answer["stored"] == question
        assert answer["attempts"] == 1
    assert len({answer["id"] for answer in answers}) == JOBS
    assert len({answer["process"] for answer in answers}) == processes
    service.stop()
    said = _without(r"waits for Redis: it does not answer", service.said)
    assert not re.search(r"Traceback|error|exception|critical", said, re.IGNORECASE), said
    for worker in cluster.workers:
        worker.terminate()
        assert worker.wait() == 0
        said = _without(r"_unavailable", "\n".join(worker.log_lines()))
        assert not re.search(r'"level": ?"(warning|error|critical)"', said), said


def _without(outage: str, said: str) -> str:
    """Return a log without what may be said on a machine on which a server waits longer than its clients do."""
    return "\n".join(line for line in said.splitlines() if not re.search(outage, line))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--preload --worker-class gthread --threads 8 --workers 3", id="preload"),
        pytest.param("--worker-class gevent --workers 2", id="gevent"),
    ],
)
def test_gunicorn(cluster: Cluster, environment: dict[str, str], options: str):
    cluster.start_worker()
    port = free_port()

    def ready(_: str) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    def ask(question: str) -> dict[str, Any]:
        query = urllib.parse.urlencode({"question": question})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?{query}", timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    command = ["gunicorn", "tests.host_services:application", "--bind", f"127.0.0.1:{port}", "--timeout", "120"]
    with HostService([*command, *options.split()], environment, ready) as service:
        check(cluster, service, ask, processes=int(options[-1]))


def test_celery_prefork(cluster: Cluster, environment: dict[str, str]):
    cluster.start_worker()
    broker = environment["HOST_BROKER_URL"]
    caller = Celery(broker=broker, backend=broker)

    def ask(question: str) -> dict[str, Any]:
        answer: dict[str, Any] = caller.send_task("answer", [question]).get(timeout=120)
        return answer

    command = [
        "celery",
        "--app",
        "tests.host_services",
        "worker",
        "--pool",
        "prefork",
        "--concurrency",
        "4",
        "--loglevel",
        "INFO",
    ]
    environment["PYTHONWARNINGS"] = "ignore:You're running the worker with superuser"  # as a container may
    with HostService(command, environment, lambda said: " ready." in said) as service:
        check(cluster, service, ask, processes=4)
    caller.close()
