"""A server answers with an error: the worker says so once, waits, and goes on by itself when it is over.

Each fault is made for real, lasts for some seconds of a stream, and is a line of a table in failures.md. One worker
goes through all faults of its server.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import pytest
import redis
from redis.exceptions import RedisError
from sqlalchemy import text
from typing_extensions import override

from keepstream.names import QUEUE
from keepstream.results import JobStatus
from keepstream_worker.dev_stack.embedded import EmbeddedValkey, free_port, sqlite_url
from tests.cluster import Cluster, WorkerProcess, wait_until
from tests.fork_server import ForkServer
from tests.services import UNPRIVILEGED_USER, PostgresServer

DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "operations" / "failures.md").read_text()

#: Deltas that the running stream brings while a fault lasts, at 20 a second.
DURING: Final = 60


class Fault(NamedTuple):
    """One line of the table."""

    name: str  #: The server's word for it.
    make: Callable[[Cluster], AbstractContextManager[None]]
    said: Sequence[str] = ()  #: Reasons in the worker's log, one of which is enough; by default the name.


def documented(heading: str) -> list[str]:
    """Return the first words of the lines of a table."""
    table = DOCUMENT.partition(f"### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\| `([A-Z0-9]+)`", table, re.MULTILINE)


def check_survived(
    cluster: Cluster, worker: WorkerProcess, fault: Fault, events: Sequence[str], enqueue: Callable[[], str]
) -> None:
    """Let a fault come and go while a job streams; both it and one that comes meanwhile are completed once."""
    pid = worker.pid
    reasons = fault.said or [fault.name]
    before = len(worker.log_lines())

    def said_now() -> list[str]:
        return worker.log_lines()[before:]

    def told(names: Sequence[str], words: Sequence[str]) -> list[str]:
        return [
            line
            for line in said_now()
            if any(f'"{name}"' in line for name in names) and any(word in line for word in words)
        ]

    running = cluster.enqueue(deltas=DURING + 60, rate=20)
    cluster.wait_for_deltas(running, 10)
    with fault.make(cluster):
        meanwhile = enqueue()
        wait_until(lambda: told(events, reasons), f"{events} with one of {reasons} in the worker's log")
        streamed = cluster.provider.attempts(running)[0].deltas
        cluster.wait_for_deltas(running, min(streamed + DURING, DURING + 60))
        assert worker.running
    for job_id, output in ((running, "word " * (DURING + 60)), (meanwhile, "word " * 3)):
        result = cluster.wait_for(job_id)
        assert (result.status, result.text) == (JobStatus.COMPLETED, output)
        assert [attempt.outcome for attempt in result.attempts] == ["finished"]
        assert len(cluster.provider.attempts(job_id)) == 1
    over = [event.replace("unavailable", "available") for event in events]
    wait_until(lambda: told(over, [""]), f"one of {over} in the worker's log")
    assert (worker.running, worker.pid) == (True, pid)
    told_of: Counter[tuple[str, str, str]] = Counter()
    for record in map(json.loads, told([*events, *over], [""])):
        server = record["event"].partition("_")[0]
        if record["event"] in over:  # a busy machine is slow to make some faults: then there are several outages
            told_of = Counter({said: n for said, n in told_of.items() if said[:2] != (server, record["waited_to"])})
        else:
            told_of[server, record["waiting_to"], record["reason"]] += 1
            assert max(told_of.values()) <= 2, "each of two connections says each reason once in an outage"
    assert not any('"level": "critical"' in line or "Traceback" in line for line in said_now())


# -- Redis --


class HarmedValkey(EmbeddedValkey):
    """A Valkey that knows the user of the worker, and takes further settings for its next start."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, str] = {}

    @property
    def worker_url(self) -> str:
        return f"redis://worker:right@127.0.0.1:{self.port}/0"

    def launch(self) -> None:
        """Start and do not wait until it answers."""
        self._process = self._spawn()

    @override
    def _command(self) -> list[str]:
        extra = [word for name, value in self.settings.items() for word in (f"--{name}", value)]
        return [*super()._command(), "--user", *["worker", "on", ">right", "~*", "&*", "+@all"], *extra]


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster on SQLite with a worker, whose Redis is harmed again and again."""
    directory = tmp_path_factory.mktemp("redis")
    valkey = HarmedValkey()
    with Cluster(directory, sqlite_url(directory / "keepstream.db"), valkey=valkey, forks=forks) as cluster:
        cluster.start_worker(redis_url=valkey.worker_url)
        yield cluster


@contextmanager
def control(cluster: Cluster) -> Iterator["redis.Redis"]:
    """Give one connection that is made before the fault and lasts until its end."""
    with redis.Redis(port=cluster.valkey.port, single_connection_client=True, socket_timeout=30) as client:
        client.ping()
        yield client


def commands(begin: Sequence[str], end: Sequence[str]) -> Callable[[Cluster], AbstractContextManager[None]]:
    """Return a fault that is made and ended by commands."""

    @contextmanager
    def make(cluster: Cluster) -> Iterator[None]:
        with control(cluster) as client:
            for command in begin:
                client.execute_command(*command.split())
            try:
                yield
            finally:
                for command in end:
                    client.execute_command(*command.split())

    return make


REPLICA: Final = "REPLICAOF 127.0.0.1 1"  # one that finds no master, and keeps its data
MASTER: Final = "REPLICAOF NO ONE"
CUT: Final = ("CLIENT KILL TYPE normal SKIPME yes", "CLIENT KILL TYPE pubsub")


@contextmanager
def disk_fails(cluster: Cluster) -> Iterator[None]:
    """Let Redis be unable to save: something that cannot be replaced lies where its file is to be."""
    blocker = cluster.valkey.directory / "dump.rdb"
    blocker.unlink(missing_ok=True)
    (blocker / "in the way").mkdir(parents=True)
    with control(cluster) as client:
        client.config_set("save", "1 1")
        client.set("change", 1)
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed save")
        try:
            yield
        finally:
            (blocker / "in the way").rmdir()
            blocker.rmdir()
            client.config_set("save", "")
            with suppress(RedisError):  # one is under way
                client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok", "a save that succeeds")


@contextmanager
def restarted(cluster: Cluster, **settings: str) -> Iterator[None]:
    """Restart Redis with its data and other settings, and once more without them."""
    valkey = cluster.valkey
    assert isinstance(valkey, HarmedValkey)
    with control(cluster) as client:
        client.save()
    valkey.kill()
    valkey.settings = settings
    valkey.launch()
    try:
        yield
    finally:
        valkey.settings = {}
        valkey.kill()
        valkey.start()


@contextmanager
def loading(cluster: Cluster) -> Iterator[None]:
    """Restart Redis with so much data that it takes long to load."""
    with control(cluster) as client:
        client.mset({f"filler:{number}": "x" * 100 for number in range(4000)})
        try:
            with restarted(cluster, **{"key-load-delay": "10000", "loading-process-events-interval-bytes": "1024"}):
                yield
        finally:
            pass
    with control(cluster) as client:
        client.delete(*(f"filler:{number}" for number in range(4000)))


@contextmanager
def cluster_node(cluster: Cluster) -> Iterator[None]:
    """Restart Redis as a node of a cluster that has no slots."""
    # The port for other nodes would be this one's and 10,000, where anybody may have a connection.
    with restarted(cluster, **{"cluster-enabled": "yes", "cluster-port": str(free_port())}):
        yield


@contextmanager
def endless_script(cluster: Cluster) -> Iterator[None]:
    """Hold Redis up with a script."""

    def run() -> None:
        with suppress(RedisError), redis.Redis(port=cluster.valkey.port, socket_timeout=120) as client:
            client.eval("while true do end", 0)

    with control(cluster) as client:
        client.config_set("busy-reply-threshold", 100)
        script = threading.Thread(target=run)
        script.start()
        try:
            yield
        finally:
            client.execute_command("SCRIPT", "KILL")
            script.join()


REDIS_FAULTS: Final = [
    Fault("UNBLOCKED", commands([REPLICA], [MASTER])),
    Fault("READONLY", commands([REPLICA], [MASTER])),
    Fault(
        "MASTERDOWN",
        commands(
            ["CONFIG SET replica-serve-stale-data no", REPLICA], [MASTER, "CONFIG SET replica-serve-stale-data yes"]
        ),
    ),
    Fault("NOREPLICAS", commands(["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"])),
    Fault("LOADING", loading),
    Fault("CLUSTERDOWN", cluster_node),
    Fault("MISCONF", disk_fails),
    # A script that has written may go on writing, so the refusal is met by what sends jobs again, at the latest.
    Fault("OOM", commands(["CONFIG SET maxmemory 1"], ["CONFIG SET maxmemory 0"]), ["OOM", "OutOfMemoryError"]),
    Fault("BUSY", endless_script),
    Fault("NOSCRIPT", commands(["SCRIPT FLUSH"], [])),
    Fault(
        "NOPERM",
        commands(["ACL SETUSER worker -blmpop -evalsha"], ["ACL SETUSER worker +blmpop +evalsha"]),
    ),
    Fault("WRONGTYPE", commands([f"DEL {QUEUE}", f"SET {QUEUE} something"], [f"DEL {QUEUE}"])),
    Fault(
        "WRONGPASS",
        commands(["ACL SETUSER worker resetpass >another", *CUT], ["ACL SETUSER worker resetpass >right"]),
    ),
    Fault("MAXCLIENTS", commands(["CONFIG SET maxclients 1", *CUT], ["CONFIG SET maxclients 1000"])),
]


@pytest.mark.parametrize("fault", REDIS_FAULTS, ids=lambda fault: fault.name)
def test_redis_answers_with_an_error(redis_cluster: Cluster, fault: Fault) -> None:
    (worker,) = redis_cluster.workers
    events = ("broker_unavailable", "redis_unavailable")
    check_survived(redis_cluster, worker, fault, events, lambda: redis_cluster.enqueue(deltas=3))


#: What a Redis says to the checks with which a worker starts, and may pass.
MET_AT_THE_START: Final = ("READONLY", "MASTERDOWN", "LOADING", "MISCONF", "BUSY", "MAXCLIENTS")


@pytest.mark.parametrize(
    "fault", [fault for fault in REDIS_FAULTS if fault.name in MET_AT_THE_START], ids=lambda fault: fault.name
)
def test_worker_that_starts_waits_while_redis_answers_with_an_error(redis_cluster: Cluster, fault: Fault) -> None:
    cluster = redis_cluster
    assert isinstance(cluster.valkey, HarmedValkey)
    worker = cluster.new_worker(redis_url=cluster.valkey.worker_url)
    with fault.make(cluster):
        worker.launch()
        wait_until(
            lambda: worker.log.exists() and worker.said("redis_unavailable", waiting_to="start"), "the worker to wait"
        )
        assert worker.running
    worker.wait_to_say("worker_started")
    worker.stop()


def test_each_answer_of_redis_is_documented_and_tried() -> None:
    assert sorted(documented("An answer of Redis that is an error")) == sorted(fault.name for fault in REDIS_FAULTS)


# -- PostgreSQL --

#: Of a database whose disk can be filled: it needs some 9 MB itself.
DISK: Final = "24m"


@contextmanager
def small_disk(server: PostgresServer) -> Iterator[Path | None]:
    """Give a disk that is soon full, or None where nobody may mount one."""
    directory = server.directory / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        yield None
        return
    try:
        shutil.chown(directory, UNPRIVILEGED_USER)
        yield directory
    finally:
        server.stop()
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture(scope="module")
def database_cluster(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Iterator[Cluster]:
    """A cluster with a worker that has a role of its own on a PostgreSQL server that is harmed again and again."""
    with PostgresServer() as server, small_disk(server) as disk:
        with administrator(server) as admin:
            admin.execute("CREATE ROLE worker LOGIN PASSWORD 'right'")
            if disk is None:
                admin.execute("CREATE DATABASE harmed")
            else:
                admin.execute(f"CREATE TABLESPACE small LOCATION '{disk}'".encode())
                admin.execute("CREATE DATABASE harmed TABLESPACE small")
            access = Path(str(admin.execute("SHOW hba_file").fetchone()[0]))  # type: ignore[index]  # one row
            access.write_text(f"host all worker 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
            admin.execute("SELECT pg_reload_conf()")
        url = server.url("harmed")
        directory = tmp_path_factory.mktemp("database")
        with Cluster(directory, url, postgres=server, forks=forks) as cluster:
            with cluster.database() as connection:
                connection.execute(
                    text("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO worker")
                )
            theirs = url.replace("postgres@", "worker:right@")
            cluster.start_worker(database_url=f"{theirs}?options=-clock_timeout%3D1000")
            yield cluster


@contextmanager
def administrator(server: PostgresServer) -> Iterator["psycopg.Connection[Any]"]:
    """Give a connection to another database of the server than the harmed one."""
    with psycopg.connect(host="127.0.0.1", port=server.port, user="postgres", dbname="postgres", autocommit=True) as it:
        yield it


CUT_WORKER: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'worker'"


def statements(begin: Sequence[str], end: Sequence[str]) -> Callable[[Cluster], AbstractContextManager[None]]:
    """Return a fault that is made and ended by statements."""

    @contextmanager
    def make(cluster: Cluster) -> Iterator[None]:
        with administrator(cluster.postgres) as connection:
            for statement in begin:
                connection.execute(statement.encode())
            try:
                yield
            finally:
                for statement in end:
                    connection.execute(statement.encode())

    return make


def in_database(begin: str, end: str) -> Callable[[Cluster], AbstractContextManager[None]]:
    """Return a fault that is made and ended by a statement within the database."""

    @contextmanager
    def make(cluster: Cluster) -> Iterator[None]:
        with cluster.database() as connection:
            connection.execute(text(begin))
        try:
            yield
        finally:
            with cluster.database() as connection:
                connection.execute(text(end))

    return make


@contextmanager
def table_locked(cluster: Cluster) -> Iterator[None]:
    """Hold a lock against which the worker's statements run into their time-out."""
    with cluster.database() as connection:
        connection.execute(text("LOCK TABLE keepstream_jobs IN ACCESS EXCLUSIVE MODE"))
        yield


@contextmanager
def connections_cut(cluster: Cluster) -> Iterator[None]:
    """Cut the worker's connections again and again."""
    over = threading.Event()

    def cut() -> None:
        with administrator(cluster.postgres) as connection:
            while not over.wait(0.001):
                connection.execute(CUT_WORKER.encode())

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def shutting_down(cluster: Cluster) -> Iterator[None]:
    """Let the server wait for its last session to end, which refuses new ones, and start it again afterwards."""
    server = cluster.postgres
    with administrator(server) as last:
        os.kill(server.pid, signal.SIGTERM)
        last.execute(CUT_WORKER.encode())
        try:
            yield
        finally:
            last.close()
            server.restart()


@contextmanager
def disk_full(cluster: Cluster) -> Iterator[None]:
    """Fill the disk of the database."""
    with administrator(cluster.postgres) as connection:
        places = connection.execute("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'small'")
        found = places.fetchone()
    if found is None:
        pytest.skip("only root can mount a disk that is small enough to be filled")
    filler = Path(found[0]) / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


DATABASE_FAULTS: Final = [
    Fault(
        "25006",
        statements(
            ["ALTER DATABASE harmed SET default_transaction_read_only = on", CUT_WORKER],
            ["ALTER DATABASE harmed RESET default_transaction_read_only"],
        ),
        ["ReadOnlySqlTransaction"],
    ),
    Fault("57P01", connections_cut, ["AdminShutdown", "OperationalError"]),
    Fault("57P03", shutting_down, ["shutting down"]),
    Fault(
        "53300",
        statements(["ALTER ROLE worker CONNECTION LIMIT 0", CUT_WORKER], ["ALTER ROLE worker CONNECTION LIMIT -1"]),
        ["too many connections"],
    ),
    Fault(
        "28P01",
        statements(["ALTER ROLE worker PASSWORD 'another'", CUT_WORKER], ["ALTER ROLE worker PASSWORD 'right'"]),
        ["password authentication failed"],
    ),
    Fault(
        "42501",
        in_database(
            "REVOKE INSERT, UPDATE ON ALL TABLES IN SCHEMA public FROM worker",
            "GRANT INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO worker",
        ),
        ["InsufficientPrivilege"],
    ),
    Fault(
        "42P01",
        in_database("ALTER TABLE keepstream_jobs RENAME TO moved", "ALTER TABLE moved RENAME TO keepstream_jobs"),
        ["UndefinedTable"],
    ),
    Fault("55P03", table_locked, ["LockNotAvailable"]),
    Fault("53100", disk_full, ["DiskFull"]),
]


@pytest.mark.parametrize("fault", DATABASE_FAULTS, ids=lambda fault: fault.name)
def test_database_answers_with_an_error(database_cluster: Cluster, fault: Fault) -> None:
    cluster = database_cluster
    (worker,) = cluster.workers

    def send() -> str:
        job = cluster.job(deltas=3)
        job["request"]["messages"][0]["content"] = secrets.token_hex(100_000)  # on a full disk there is no room for it
        cluster.send(job)
        return str(job["id"])

    check_survived(cluster, worker, fault, ("database_unavailable",), send)


def test_each_answer_of_the_database_is_documented_and_tried() -> None:
    assert sorted(documented("An answer of the database that is an error")) == sorted(
        fault.name for fault in DATABASE_FAULTS
    )
