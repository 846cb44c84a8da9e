"""What the worker that sweeps tells of the limits is what `keepstream limits` says, on both databases."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, insert, select

from keepstream import tables
from keepstream.client import overview, queries
from keepstream.client.database import make_engine
from keepstream.tables import reports, turns
from keepstream_worker import store
from keepstream_worker.commands.activity import draw, limits_json
from keepstream_worker.limits import Limits, Policy, ProviderPolicy, TenantPolicy
from keepstream_worker.scheduling.state import State
from keepstream_worker.store.reports import InUse
from keepstream_worker.upkeep.limits_report import as_json
from keepstream_worker.values import Target
from tests.jobs import make_job
from tests.stored_jobs import start

POLICY = Policy(
    {"openai": ProviderPolicy(Limits(concurrency=30, tokens_per_minute=80_000), {"gpt": Limits(concurrency=4)})},
    {"acme": TenantPolicy(concurrency=2), "*": TenantPolicy(concurrency=9), "heavy": TenantPolicy(weight=3)},
)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    maker = create_engine(database_url)
    tables.metadata.create_all(maker)
    maker.dispose()
    engine = make_engine(database_url, writer=True)
    yield engine
    engine.dispose()


def test_the_console_is_told_what_the_command_says(engine: Engine) -> None:
    state = State()
    used = state.use("openai")
    used.used = 1.0
    with engine.begin() as connection:
        assert overview.look(connection).limits is None
        for number in range(3):
            queries.enqueue(connection, make_job(id=f"j{number}", provider="openai", model="gpt"))
            start(connection, f"j{number}")
        newest = {"n": 1, "arrivals_low": 0, "ready": "{}", "closed": "{}", "state": state.to_json()}
        connection.execute(insert(turns).values(newest))
    for _ in range(2):  # the second in the place of the first
        with engine.begin() as connection:
            (seen,) = store.read_use(connection, [None])
            store.tell_limits(connection, [as_json(POLICY, seen)])
    with engine.begin() as connection:
        assert len(connection.execute(select(reports)).all()) == 1
        activity = overview.look(connection)
    told = activity.limits
    assert told is not None
    assert abs((activity.at - told.told_at).total_seconds()) < 60
    command = limits_json(draw(activity, POLICY))["limits"]
    assert {limit.name for limit in told.limits} == {"openai", "openai/gpt"}
    for row in command:
        (limit,) = [limit for limit in told.limits if limit.name == row["name"]]
        assert limit.streams._asdict() == row["streams"]
        assert (limit.requests and limit.requests._asdict()) == row["requests"]
        assert (limit.tokens and limit.tokens._asdict()) == row["tokens"]
    assert [limit.streams.used for limit in told.limits] == [3, 3]
    assert [told.of_tenant(name) for name in ("acme", "heavy", "somebody")] == [2, None, 9]


def test_a_report_is_bounded() -> None:
    many = Policy({"p": ProviderPolicy(models={f"m{n}": Limits(concurrency=1) for n in range(1000)})})
    running = {Target("p", f"m{n}"): n for n in range(990, 1000)}
    report = as_json(many, InUse(1.0, "{}", running))
    assert len(report["limits"]) == 200
    assert [limit["name"] for limit in report["limits"][:2]] == ["p/m999", "p/m998"]
