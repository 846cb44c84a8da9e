"""The sums of all workers by the minute, on both databases: added to, told, kept for a week."""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, func, insert, select, text

from keepstream import tables
from keepstream.client import overview
from keepstream.client.database import make_engine
from keepstream.tables import epoch_seconds, minutes, now
from keepstream_worker.store.minutes import KEPT, Expiry, add_up, delete_old_minutes
from keepstream_worker.telemetry.figures import Sums
from tests.explained import Explained

WORKERS = 6
TIMES = 10
EMPTY = {name.name: 0 for name in minutes.c if name.name not in {"minute", "provider", "model", "cost"}}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    maker = create_engine(database_url)
    tables.metadata.create_all(maker)
    maker.dispose()
    engine = make_engine(database_url, writer=True, pool_size=WORKERS)
    yield engine
    engine.dispose()


def current(connection: Connection) -> int:
    return int(connection.execute(select(epoch_seconds(now()))).scalar_one() // 60)


def test_workers_add_to_the_same_rows(engine: Engine) -> None:
    names = [f"model-{number}" for number in range(5)]

    def work(number: int) -> None:
        for _ in range(TIMES):
            # Each in an order of its own: who waits for whom must not become a ring.
            mine = names[number % 5 :] + names[: number % 5]
            report = [Sums("p", name, "failed", "timeout", 1, 2, 3, 4, 0.5, [1, *[0] * 7, 1]) for name in mine]
            with engine.begin() as connection:
                assert add_up(connection, [report, [Sums("p", names[number % 5], deltas=1)]]) == [None, None]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.begin() as connection:
        total = {name: func.sum(minutes.c[name]) for name in ("attempts", "deltas", "first_output_0", "first_output_8")}
        row = connection.execute(select(*(value.label(name) for name, value in total.items()))).one()
        assert row.attempts == WORKERS * TIMES * 5
        assert row.deltas == WORKERS * TIMES * 11
        assert row.first_output_0 == row.first_output_8 == WORKERS * TIMES * 5
        lasted = connection.execute(select(func.count(minutes.c.minute.distinct()))).scalar_one()
        assert 10 <= connection.execute(select(func.count()).select_from(minutes)).scalar_one() <= 10 * lasted
        past = overview.history(connection, 60, 60)
        assert {(each.code, each.attempts) for each in past.errors} <= {("timeout", WORKERS * TIMES)}


def test_an_unknown_cost_stays_unknown_and_known_ones_are_summed(engine: Engine) -> None:
    for costs in ([None], [0.5, None], [None, 0.25]):
        with engine.begin() as connection:
            add_up(connection, [[Sums("p", "m", "finished", attempts=1, cost=cost)] for cost in costs])
            found = [each.cost for each in overview.history(connection, 60, 60).sums if each.cost is not None]
            assert sum(found) == {1: 0.0}.get(len(costs), 0.5 if costs[0] else 0.75)
            assert bool(found) == (len(costs) > 1)


def old(connection: Connection, at: int, ages: list[int], models: int = 1) -> None:
    rows = [
        {**EMPTY, "minute": at - age, "provider": "p", "model": f"m{number}", "outcome": "", "error_code": ""}
        for age in ages
        for number in range(models)
    ]
    connection.execute(insert(minutes), rows)


def test_what_is_old_goes_step_by_step(engine: Engine) -> None:
    with engine.begin() as connection:
        at = current(connection)
        old(connection, at, [KEPT + age for age in range(1, 6)], models=3)
        old(connection, at, [0, 1, KEPT - 5], models=2)
        assert delete_old_minutes(connection, [Expiry(4)]) == [6]  # whole minutes
        assert delete_old_minutes(connection, [Expiry(1)]) == [3]
        assert delete_old_minutes(connection, [Expiry(100)]) == [6]
        assert delete_old_minutes(connection, [Expiry(100)]) == [0]
        assert connection.execute(select(func.count()).select_from(minutes)).scalar_one() == 6


@pytest.mark.parametrize("days", [0, pytest.param(14, marks=pytest.mark.slow)])
def test_each_statement_uses_the_index(engine: Engine, days: int) -> None:
    with engine.begin() as connection:
        at = current(connection)
        for day in range(days):
            old(connection, at, list(range(day * 1440, (day + 1) * 1440)), models=10)
        connection.execute(text("ANALYZE"))
    explained = Explained(engine)
    with engine.begin() as connection:
        add_up(connection, [[Sums("p", "m1"), Sums("p", "new", "finished")]])
    explained.check(60)
    with engine.begin() as connection:
        overview.history(connection, 5, 1)
        overview.history(connection, 60, 1)
    explained.check(200, sorts=True)
    with engine.begin() as connection:
        deleted = delete_old_minutes(connection, [Expiry(100)])
        assert deleted == ([100] if days else [0])
    explained.check(500)
