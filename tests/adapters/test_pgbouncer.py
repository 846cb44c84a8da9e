"""Everything works through PgBouncer as Debian ships it, in transaction mode and in session mode.

In: a real PgBouncer in front of a real PostgreSQL.  Out: what commands, workers and clients do there.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from keepstream import Client
from keepstream.client.database import ClientDatabase, make_engine
from keepstream.errors import StoreUnavailableError
from keepstream.names import QUEUE
from keepstream.results import CompletionResult
from keepstream.tables import VERSION_TABLE, metadata
from keepstream_worker.store import schema
from tests.cluster import Cluster, wait_until
from tests.fork_server import ForkServer
from tests.services import PgBouncer, PostgresServer

CLIENTS, JOBS_OF_EACH = 20, 10
BACKLOG = 40


@pytest.fixture(scope="module", params=["transaction", "session"])
def bouncer(request: pytest.FixtureRequest, postgres: PostgresServer) -> Iterator[PgBouncer]:
    with PgBouncer(postgres, pool_mode=request.param) as server:
        yield server


@pytest.fixture
def pooled_url(bouncer: PgBouncer, postgres_url: str) -> str:
    """The URL of an empty database, through the pooler."""
    return bouncer.url(postgres_url.rpartition("/")[2])


def keepstream(cluster: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    assert cluster.forks is not None
    return cluster.forks.run("keepstream_worker.commands", arguments, cluster.environment(), timeout=120)


@pytest.mark.slow
def test_commands_worker_clients_sweeps_and_purge(tmp_path: Path, pooled_url: str, forks: ForkServer):
    with Cluster(tmp_path, pooled_url, forks=forks) as cluster:
        assert keepstream(cluster, "migrate").returncode == 0
        lost = [cluster.enqueue(text="Through a pooler.") for _ in range(BACKLOG)]
        with cluster.redis() as redis:
            redis.delete(QUEUE)  # now only a sweep finds them
        worker = cluster.start_worker()

        def work(_: int) -> list[str]:
            ids = []
            with Client(cluster.valkey.url, database_url=pooled_url) as client:
                for _ in range(JOBS_OF_EACH):
                    ids.append(client.enqueue(cluster.job(text="Through a pooler.")["request"]))
                    found = client.get(ids[-1])
                    assert found is not None
                    assert found.id == ids[-1]
            return ids

        with ThreadPoolExecutor(CLIENTS) as threads:
            ids = [job_id for some in threads.map(work, range(CLIENTS)) for job_id in some]
        for job_id in lost + ids:
            result = cluster.wait_for(job_id)
            assert result.status == "completed", result.error
            assert len(result.attempts) == 1
        doctor = keepstream(cluster, "doctor", "--json")
        assert doctor.returncode == 0, doctor.stdout

        def purged() -> dict[str, int] | None:
            done = keepstream(cluster, "purge", "--older-than", "1s", "--all-tenants", "--yes", "--json")
            assert done.returncode == 0, done.stderr
            counts: dict[str, int] = json.loads(done.stdout)
            return counts if counts["jobs"] else None

        found: list[int] = []
        while sum(found) < len(lost + ids):
            found.append(wait_until(purged, "jobs older than a second")["jobs"])
        worker.terminate()
        assert worker.wait() == 0
        bad = [line for line in worker.log_lines() if re.search(r'"level": ?"(warning|error|critical)"', line)]
        assert [line for line in bad if "_unavailable" not in line] == []  # a server that a busy machine keeps waiting


@pytest.mark.slow
def test_a_restart_of_the_server_behind_is_survived(tmp_path: Path, forks: ForkServer):
    with ExitStack() as stack:
        postgres = stack.enter_context(PostgresServer())
        bouncer = stack.enter_context(PgBouncer(postgres))
        cluster = stack.enter_context(Cluster(tmp_path, bouncer.url("postgres"), forks=forks, lease=30.0))
        cluster.start_worker()
        job_id = cluster.enqueue(text="Before, during and after.", first_token_delay=3)
        cluster.wait_for(job_id, "running")
        postgres.restart()

        def ended() -> CompletionResult | None:
            with suppress(StoreUnavailableError):  # PgBouncer asks its server again after a quarter of a minute
                result = cluster.result(job_id)
                return result if result.status.terminal else None
            return None

        result = wait_until(ended, "the job's end")
        assert (result.status, len(result.attempts)) == ("completed", 1)
        assert cluster.wait_for(cluster.enqueue(text="Afterwards.")).status == "completed"


def test_time_outs_hold_in_every_transaction_and_stay_out_of_the_session(bouncer: PgBouncer, postgres_url: str):
    name = postgres_url.rpartition("/")[2]
    ours = make_engine(f"{bouncer.url(name)}?options=-csearch_path%3Dtenant_a,public%20-clock_timeout%3D2s")
    theirs = create_engine(bouncer.url(name).replace("://", "+psycopg://"), isolation_level="AUTOCOMMIT")
    query = text(
        "SELECT current_setting(name) FROM unnest(ARRAY['search_path','lock_timeout','statement_timeout']) name"
    )
    try:
        with theirs.connect() as connection:
            before = connection.scalars(query).all()
        for _ in range(2):
            with ours.begin() as connection:
                assert connection.scalars(query).all() == ["tenant_a,public", "2s", "30s"]
        with theirs.connect() as connection:
            assert connection.scalars(query).all() == before
    finally:
        ours.dispose()
        theirs.dispose()


def test_tables_go_into_the_search_path_of_the_url(postgres_url: str, pooled_url: str):
    direct = create_engine(postgres_url)
    with direct.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant_a"))
    engine = make_engine(f"{pooled_url}?options=-csearch_path%3Dtenant_a")
    try:
        schema.migrate(engine)
        schema.check(engine)
    finally:
        engine.dispose()
    with direct.begin() as connection:
        found = connection.execute(
            text("SELECT schemaname, tablename FROM pg_tables WHERE tablename LIKE 'keepstream%' ORDER BY tablename")
        ).all()
    direct.dispose()
    assert [(row[0], row[1]) for row in found] == [
        ("tenant_a", name) for name in sorted([*metadata.tables, VERSION_TABLE])
    ]


def test_no_lock_is_left_behind_by_a_migration(postgres_url: str, pooled_url: str):
    engine = make_engine(pooled_url)
    try:
        schema.migrate(engine)
        direct = create_engine(postgres_url)
        with direct.begin() as connection:
            assert connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == 0
        direct.dispose()
    finally:
        engine.dispose()


# -- what it refuses is told in its own words --


def refusal(url: str) -> tuple[str, str]:
    """What the client and the schema say about a connection that is refused."""
    database, engine = ClientDatabase(url), make_engine(url)
    try:
        with pytest.raises(StoreUnavailableError) as client, database.transaction():
            pass
        with pytest.raises(schema.SchemaError) as worker:
            schema.check(engine)
    finally:
        database.close()
        engine.dispose()
    assert not isinstance(worker.value, schema.DatabaseAwayError)
    for said in (str(client.value), str(worker.value)):
        assert "\n" not in said
        assert "hunter2" not in said
    return str(client.value), str(worker.value)


def test_an_option_that_a_pooler_refuses_is_named_with_what_to_do_instead(pooled_url: str):
    for said in refusal(f"{pooled_url}?options=-cwork_mem%3D1MB"):
        assert "refuses an option of the connection (" in said
        assert "unsupported startup parameter: options" in said
        assert "ALTER ROLE" in said


def test_a_wrong_password_is_told_as_such(bouncer: PgBouncer, pooled_url: str):
    for said in refusal(pooled_url.replace(bouncer.password, "hunter2")):
        assert "refuses the connection (" in said
        assert "password authentication failed" in said


def test_an_unknown_database_is_told_as_such_and_silence_with_where_to_look(bouncer: PgBouncer):
    first, second = make_engine(bouncer.url("nowhere")), make_engine(f"{bouncer.url('nowhere')}?connect_timeout=2")
    with pytest.raises(schema.SchemaError, match=r'refuses the connection \(.*database "nowhere" does not exist'):
        schema.check(first)
    # The next one PgBouncer keeps waiting until it has asked its server again, a quarter of a minute later.
    with pytest.raises(schema.DatabaseAwayError, match=r"does not answer in time .* a pooler .* see its log"):
        schema.check(second)
    first.dispose()
    second.dispose()


def test_a_pooler_without_databases_is_told_as_such(postgres: PostgresServer):
    with PgBouncer(postgres, databases="") as server:
        for said in refusal(server.url("nowhere")):
            assert "refuses the connection (" in said
            assert "no such database: nowhere" in said


def test_a_pooler_whose_server_is_away_is_waited_for():
    with PostgresServer() as postgres:
        postgres.stop()
        with PgBouncer(postgres) as bouncer:
            engine = make_engine(f"{bouncer.url('postgres')}?connect_timeout=2")
            with pytest.raises(schema.DatabaseAwayError):
                schema.check(engine)
            engine.dispose()
