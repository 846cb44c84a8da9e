"""Why there is no connection to PostgreSQL is told in the server's own words, and waited for only if that may help.

In: a real PostgreSQL that refuses in each way.  Out: what commands, workers and clients say and do.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from keepstream.client.database import ClientDatabase, make_engine
from keepstream.errors import InvalidSettingError, StoreUnavailableError
from keepstream_worker.store import schema
from tests.cluster import Cluster
from tests.fork_server import ForkServer
from tests.services import PostgresServer

SECRET = "hunter2"
RULES = (
    "host all asked 127.0.0.1/32 scram-sha-256",
    "host all single 127.0.0.1/32 trust",
    "host all unwanted 127.0.0.1/32 reject",
)


@pytest.fixture(scope="module")
def strict() -> Iterator[PostgresServer]:
    """A server with a user of each kind."""
    with PostgresServer() as server:
        engine = create_engine(server.url(), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("CREATE ROLE asked LOGIN PASSWORD 'right'"))
            connection.execute(text("CREATE ROLE single LOGIN CONNECTION LIMIT 0"))
        engine.dispose()
        server.admit(*RULES)
        yield server


def url(server: PostgresServer, user: str = "postgres", query: str = "", database: str = "postgres") -> str:
    return f"postgresql://{user}@127.0.0.1:{server.port}/{database}{query}"


REFUSED = [
    pytest.param(f"asked:{SECRET}", "", "refuses the connection", "password authentication failed", id="password"),
    pytest.param("asked", "", "refuses the connection", "no password supplied", id="no password"),
    pytest.param("nobody", "", "refuses the connection", 'role "nobody" does not exist', id="unknown role"),
    pytest.param("unwanted", "", "refuses the connection", "pg_hba.conf rejects", id="pg_hba"),
    pytest.param("postgres", "?options=-cno_such%3D1", "refuses the connection", "no_such", id="option"),
    pytest.param("postgres", "?sslmode=require", "cannot be reached by TLS", "SSL was required", id="no TLS"),
    pytest.param("postgres", "?sslmode=verify-full&sslrootcert=/no.pem", "by TLS", "certificate", id="no certificate"),
    pytest.param("postgres", "?sslmode=sure", "in the way the URL says", "invalid sslmode value", id="sslmode"),
    pytest.param("postgres", "?no_such=1", "in the way the URL says", "no_such", id="no such option"),
]


@pytest.mark.parametrize(("user", "query", "what", "words"), REFUSED)
def test_a_refusal_is_told_at_once_in_the_servers_words(
    strict: PostgresServer, user: str, query: str, what: str, words: str
):
    database, engine = ClientDatabase(url(strict, user, query)), make_engine(url(strict, user, query))
    with pytest.raises(StoreUnavailableError) as client, database.transaction():
        pass
    with pytest.raises(schema.SchemaError) as worker:
        schema.check(engine)
    database.close()
    engine.dispose()
    assert not isinstance(worker.value, schema.DatabaseAwayError)
    for said in (str(client.value), str(worker.value)):
        assert what in said
        assert words in said
        assert "KEEPSTREAM_DATABASE_URL" in said
        assert SECRET not in said
        assert "\n" not in said


def test_an_unknown_database_is_a_refusal(strict: PostgresServer):
    engine = make_engine(url(strict, database="nowhere"))
    with pytest.raises(schema.SchemaError, match=r'refuses the connection \(.*database "nowhere" does not exist'):
        schema.check(engine)
    engine.dispose()


def test_too_many_connections_may_pass(strict: PostgresServer):
    engine = make_engine(url(strict, "single"))
    with pytest.raises(schema.DatabaseAwayError, match=r"takes no connection now \(.*too many connections for role"):
        schema.check(engine)
    engine.dispose()


def test_a_server_that_is_not_ready_yet_may_pass():
    with PostgresServer() as server:
        server.become_standby()
        engine = make_engine(server.url())
        with pytest.raises(schema.DatabaseAwayError, match=r"takes no connection now \(.*database system is"):
            schema.check(engine)
        engine.dispose()


def test_a_client_writes_again_when_the_database_may_be_written_again(postgres_url: str):
    engine, name = make_engine(postgres_url), postgres_url.rpartition("/")[2]
    database = ClientDatabase(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x int)")
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with database.transaction() as connection:
        connection.exec_driver_sql("SELECT 1")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with pytest.raises(StoreUnavailableError, match="ReadOnly"), database.transaction() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    with database.transaction() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    database.close()
    engine.dispose()


def test_a_server_that_is_away_may_pass(strict: PostgresServer):
    engine = make_engine("postgresql://password@127.0.0.1:1/ssl")
    with pytest.raises(schema.DatabaseAwayError, match=r"does not answer \(.*Connection refused"):
        schema.check(engine)
    engine.dispose()


def test_a_password_with_an_at_sign_is_not_taken_for_a_host():
    with pytest.raises(InvalidSettingError, match="write %40") as caught:
        make_engine(f"postgresql://user:12@{SECRET}@127.0.0.1/x")
    assert SECRET not in str(caught.value)


def test_values_of_a_statement_are_not_told(strict: PostgresServer):
    database = ClientDatabase(url(strict))
    with pytest.raises(StoreUnavailableError) as caught, database.transaction() as connection:
        connection.execute(text("SELECT CAST(CAST(:value AS text) AS integer)"), {"value": SECRET})
    database.close()
    assert SECRET not in str(caught.value)
    assert "InvalidTextRepresentation" in str(caught.value)


# -- commands and workers --


@pytest.mark.slow
@pytest.mark.parametrize("command", [["migrate"], ["worker"], ["worker", "--processes", "2"], ["doctor"]])
def test_a_wrong_password_ends_a_command_at_once(
    tmp_path: Path, strict: PostgresServer, postgres_url: str, forks: ForkServer, command: list[str]
):
    with Cluster(tmp_path, postgres_url, forks=forks) as cluster:
        environment = cluster.environment(database_url=url(strict, f"asked:{SECRET}"))
        done = forks.run("keepstream_worker.commands", command, environment, timeout=120)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == (1 if command == ["doctor"] else 3)
    assert "refuses the connection" in said
    assert 'password authentication failed for user "asked"' in said
    assert "correct the user, password or database" in said
    assert "start it" not in said
    assert SECRET not in said


@pytest.mark.slow
def test_a_worker_waits_for_a_database_that_is_away(tmp_path: Path, forks: ForkServer):
    with PostgresServer() as postgres, Cluster(tmp_path, postgres.url(), postgres=postgres, forks=forks) as cluster:
        postgres.stop()
        worker, stopped = cluster.new_worker(), cluster.new_worker()
        for each in (worker, stopped):
            each.launch()
            each.wait_to_say("database_unavailable", waiting_to="start")
        assert "Connection refused" in worker.said("database_unavailable")[0]["reason"]
        stopped.terminate()
        assert stopped.wait() == 0
        postgres.start()
        worker.wait_to_say("worker_started")
        job_id = cluster.enqueue(text="After a wait.")
        assert cluster.wait_for(job_id).status == "completed"
