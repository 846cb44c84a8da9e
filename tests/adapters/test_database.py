"""The database thread on real databases: groups share a transaction, and outages are distinguished from refusals."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.exc import DBAPIError

from keepstream.client.database import make_engine
from keepstream.errors import StoreUnavailableError
from keepstream.tables import now, workers
from keepstream_worker.dev_stack.embedded import sqlite_url
from keepstream_worker.store import database as database_module
from keepstream_worker.store import one_writer
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.store.error_answers import StoreRefusedError
from keepstream_worker.store.one_writer import OneWriter
from tests.cluster import wait_until

PATIENCE: Final = 60.0


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[WorkerDatabase]:
    """A database whose threads stop with the test."""
    database = WorkerDatabase(make_engine(url, writer=True))
    try:
        yield database
    finally:
        await asyncio.to_thread(database.close)


def execute(connection: Connection, statements: list[str]) -> list[None]:
    for statement in statements:
        connection.execute(text(statement))
    return [None] * len(statements)


# -- groups --


async def test_writes_that_arrive_together_share_a_transaction(engine: Engine) -> None:
    database = WorkerDatabase(engine)
    groups: list[int] = []

    def count(_: Connection, arguments: list[int]) -> list[int]:
        groups.append(len(arguments))
        return arguments

    try:
        assert await asyncio.gather(*(database.run(count, number) for number in range(50))) == list(range(50))
    finally:
        await asyncio.to_thread(database.close)
    assert sum(groups) == 50
    assert len(groups) < 10


async def test_one_bad_member_of_a_group_fails_alone(engine: Engine) -> None:
    database = WorkerDatabase(engine)

    def fussy(connection: Connection, arguments: list[str]) -> list[None]:
        for worker in arguments:
            connection.execute(
                workers.insert().values(
                    id=worker, started_at=now(), heartbeat_at=now(), lease=6.0, queue="q", places=1, running=0
                )
            )
        if "bad" in arguments:
            raise ValueError("bad")
        return [None] * len(arguments)

    try:
        answers = await asyncio.gather(
            *(database.run(fussy, name) for name in ("a", "bad", "b", "c")), return_exceptions=True
        )
    finally:
        await asyncio.to_thread(database.close)
    assert [type(answer) for answer in answers] == [type(None), ValueError, type(None), type(None)]
    with engine.begin() as connection:
        assert set(connection.scalars(select(workers.c.id))) == {"a", "b", "c"}


class Sized(NamedTuple):
    """An argument that says how much is to be written."""

    number: int
    size: int


async def test_transaction_is_bounded_in_bytes_and_a_large_member_is_written_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "MAX_GROUP_BYTES", 100)
    database = WorkerDatabase(engine)
    groups: list[list[int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def write(_: Connection, arguments: list[Sized]) -> list[int]:
        groups.append([argument.size for argument in arguments])
        begun.set()
        go_on.wait(PATIENCE)
        return [argument.number for argument in arguments]

    try:
        first = asyncio.create_task(database.run(write, Sized(0, 1)))
        await asyncio.to_thread(begun.wait, PATIENCE)
        sizes = [40, 40, 40, 10, 1000, 5, 5]  # they come while the first is written
        others = [asyncio.create_task(database.run(write, Sized(*item))) for item in enumerate(sizes, 1)]
        await asyncio.sleep(0)
        go_on.set()
        assert await asyncio.gather(first, *others) == list(range(8)), "in the order in which they came"
    finally:
        go_on.set()
        await asyncio.to_thread(database.close)
    assert groups == [[1], [40, 40, 40], [10, 1000], [5, 5]]


async def test_group_may_be_bounded_to_one(engine: Engine) -> None:
    database = WorkerDatabase(engine, max_group=1)
    groups: list[int] = []

    def count(_: Connection, arguments: list[int]) -> list[int]:
        groups.append(len(arguments))
        return arguments

    try:
        assert await asyncio.gather(*(database.run(count, number) for number in range(20))) == list(range(20))
    finally:
        await asyncio.to_thread(database.close)
    assert groups == [1] * 20


# -- several ways to one database --


async def test_connection_of_a_way_that_is_idle_is_closed_and_opened_again(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_IDLE", 0.01)
    name = "idle-way"
    database = WorkerDatabase(make_engine(postgres_url, name, pool_size=1, writer=True))
    observer = make_engine(postgres_url)

    def connections() -> int:
        with observer.begin() as connection:
            count = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
            return int(connection.scalar(count, {"name": name}) or 0)

    def seen(connection: Connection, arguments: list[None]) -> list[str]:
        return [str(connection.scalar(text("SELECT current_setting('application_name')"))) for _ in arguments]

    try:
        for _ in range(3):
            assert await database.run(seen, None) == name
            await asyncio.to_thread(wait_until, lambda: connections() == 0, "the connection is closed")
    finally:
        await asyncio.to_thread(database.close)
        observer.dispose()


async def test_ways_of_one_process_take_turns_where_there_is_one_writer(tmp_path: Path) -> None:
    """SQLite itself makes who finds it locked look again after a growing pause, and give up in the end."""
    (tmp_path / "a.db").touch()
    url, turn = sqlite_url(tmp_path / "a.db"), threading.Lock()
    ways = [WorkerDatabase(make_engine(url, writer=True), turn=turn) for _ in range(3)]
    begun, go_on = threading.Event(), threading.Event()
    others: list[bool] = []

    def hold(connection: Connection, arguments: list[None]) -> list[None]:
        connection.execute(text("CREATE TABLE t (x int)"))
        begun.set()
        go_on.wait(PATIENCE)
        return arguments

    def write(connection: Connection, arguments: list[int]) -> list[int]:
        others.append(turn.locked())
        connection.execute(text("INSERT INTO t VALUES (1)"))
        return arguments

    try:
        first = asyncio.create_task(ways[0].run(hold, None))
        await asyncio.to_thread(begun.wait, PATIENCE)
        waiting = [asyncio.create_task(way.run(write, number)) for number, way in enumerate(ways[1:])]
        await asyncio.sleep(0)
        go_on.set()
        assert await asyncio.gather(first, *waiting) == [None, 0, 1]
    finally:
        go_on.set()
        for way in ways:
            await asyncio.to_thread(way.close)
    assert others == [True, True], "each has its turn while it writes"


def test_processes_take_turns_and_a_frozen_one_keeps_nobody_out_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ``OneWriter`` has the file open for itself, as another process would."""
    mine, others = OneWriter(tmp_path / "a.db-turn"), OneWriter(tmp_path / "a.db-turn")
    entered = threading.Event()

    def enter() -> None:
        with others:
            entered.set()

    with mine:
        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.1)
    waiting.join(PATIENCE)
    assert entered.is_set()
    monkeypatch.setattr(one_writer, "_PATIENCE", 0.01)
    with mine, others:  # SQLite says then who may write
        pass
    with others:
        pass
    for each in (mine, others):
        each.close()


# -- locks --


def test_locks_of_whoever_stands_still_are_free_before_others_give_up(postgres_url: str) -> None:
    """A machine that is lost in the middle of a transaction says nothing to its server."""
    one, other = make_engine(postgres_url), make_engine(postgres_url)
    lock = text("SELECT pg_advisory_xact_lock(1)")
    try:
        with one.connect() as stands_still:
            stands_still.execute(lock)
            with other.begin() as waits:
                waits.execute(lock)
            with pytest.raises(DBAPIError, match="idle-in-transaction"):
                stands_still.execute(lock)
    finally:
        one.dispose()
        other.dispose()


# -- options of the URL --


def settings(url: str) -> dict[str, str]:
    """What PostgreSQL says about a connection of ours."""
    names = ("search_path", "lock_timeout", "statement_timeout", "work_mem", "application_name", "client_encoding")
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            return {name: str(connection.scalar(text(f"SHOW {name}"))) for name in names}
    finally:
        engine.dispose()


OURS = {"lock_timeout": "10s", "statement_timeout": "30s", "application_name": "keepstream", "client_encoding": "UTF8"}


@pytest.mark.parametrize(
    ("query", "changed"),
    [
        ("", {}),
        ("?options=-csearch_path%3Dtenant_a", {"search_path": "tenant_a"}),
        ("?options=-c%20search_path%3Da%20-c%20work_mem%3D1MB", {"search_path": "a", "work_mem": "1MB"}),
        ("?options=-csearch_path%3Da&options=-cwork_mem%3D1MB", {"search_path": "a", "work_mem": "1MB"}),
        ("?options=-cstatement_timeout%3D5000", {"statement_timeout": "5s"}),
        ("?options=--lock-timeout%3D2000", {"lock_timeout": "2s"}),
        ("?application_name=shop&connect_timeout=60", {"application_name": "shop"}),
    ],
)
def test_what_the_url_sets_is_kept_beside_our_time_outs(postgres_url: str, query: str, changed: dict[str, str]) -> None:
    assert settings(postgres_url) == settings(postgres_url) | OURS
    assert settings(postgres_url + query) == settings(postgres_url) | OURS | changed


@pytest.mark.parametrize(("query", "prepared"), [("", False), ("?prepare_threshold=3", True)])
def test_nothing_is_prepared_unless_the_url_says_so(postgres_url: str, query: str, *, prepared: bool) -> None:
    engine = make_engine(postgres_url + query)
    try:
        with engine.begin() as connection:
            for number in range(10):
                connection.execute(text("SELECT CAST(:number AS int)"), {"number": number})
            assert bool(connection.scalar(text("SELECT count(*) FROM pg_prepared_statements"))) is prepared
    finally:
        engine.dispose()


def test_options_of_the_environment_are_kept_as_libpq_keeps_them(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-csearch_path=tenant_a")
    assert settings(postgres_url) == settings(postgres_url) | OURS | {"search_path": "tenant_a"}


# -- outages and refusals --


@pytest.mark.parametrize(
    "state",
    [
        *("08006", "0A000", "25006", "25P03", "26000", "28P01", "40001", "40P01", "42501", "42703", "42P01"),
        *("53100", "53300", "55P03", "57014", "57P01", "57P03", "58030", "XX000"),
    ],
)
async def test_what_passes_on_postgresql_is_an_outage(postgres_url: str, state: str) -> None:
    async with opened(postgres_url) as database:
        with pytest.raises(StoreUnavailableError):
            await database.run(execute, f"DO $$ BEGIN RAISE EXCEPTION 'as it would' USING ERRCODE = '{state}'; END $$")


@pytest.mark.parametrize("state", ["22021", "23505", "42601", "54000", "P0001"])
async def test_what_stays_on_postgresql_is_a_refusal(postgres_url: str, state: str) -> None:
    async with opened(postgres_url) as database:
        with pytest.raises(StoreRefusedError):
            await database.run(execute, f"DO $$ BEGIN RAISE EXCEPTION 'as it would' USING ERRCODE = '{state}'; END $$")


async def test_postgresql_that_may_only_be_read_is_an_outage(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        await database.run(
            execute, "ALTER DATABASE " + postgres_url.rpartition("/")[2] + " SET default_transaction_read_only=on"
        )
    async with opened(postgres_url) as database:
        with pytest.raises(StoreUnavailableError, match="ReadOnlySqlTransaction"):
            await database.run(execute, "CREATE TABLE t (x int)")


@pytest.mark.slow
async def test_server_that_never_answers_is_an_outage() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with opened(f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none") as database:
            with pytest.raises(StoreUnavailableError, match="ConnectionTimeout"):
                await database.run(execute, "SELECT 1")


async def test_sqlite_that_cannot_be_written_is_an_outage_and_a_constraint_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    async with opened(sqlite_url(tmp_path / "a.db")) as database:
        await database.run(execute, "CREATE TABLE t (x int unique)")
        await database.run(execute, "INSERT INTO t VALUES (1)")
        with pytest.raises(StoreRefusedError):
            await database.run(execute, "INSERT INTO t VALUES (1)")
        await database.run(execute, "PRAGMA max_page_count = 1")  # the file cannot grow, as on a full disk
        with pytest.raises(StoreUnavailableError):
            await database.run(execute, "CREATE TABLE u AS SELECT zeroblob(1000000) AS x")
