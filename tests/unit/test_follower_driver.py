"""The sync and the async client perform a follower's operations alike: the same results, errors and events.

No server is needed here: what a real one answers is compared in ``tests/adapters/test_follow.py``.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    NoPermissionError,
    ResponseError,
)

from keepstream.client.follower import (
    DisconnectedError,
    FollowerRun,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
)
from keepstream.client.redis import AsyncRedisConnections, RedisConnections
from keepstream.errors import InvalidSettingError, StoreUnavailableError
from keepstream.events import Event, parse_event
from keepstream.names import job_keys
from tests.event_texts import ended, started

NOWHERE = "redis://127.0.0.1:1"
KEYS = job_keys("default", "job-1")

Database = Callable[[Operation], Any]
Driver = Callable[[FollowerRun, Database], Awaitable[list[Event]]]


async def follow_sync(run: FollowerRun, database: Database) -> list[Event]:
    connections = RedisConnections(NOWHERE)
    try:
        return list(connections.follow(run, KEYS, database))
    finally:
        connections.close()


async def follow_async(run: FollowerRun, database: Database) -> list[Event]:
    async def read(operation: Operation) -> Any:
        return database(operation)

    connections = AsyncRedisConnections(NOWHERE)
    try:
        return [event async for event in connections.follow(run, KEYS, read)]
    finally:
        await connections.close()


@pytest.fixture(params=[follow_sync, follow_async], ids=["sync", "async"])
def follow(request: pytest.FixtureRequest) -> Driver:
    driver: Driver = request.param
    return driver


async def test_results_are_sent_back_and_events_come_out_in_order(follow: Driver) -> None:
    results: list[Any] = []

    def run() -> FollowerRun:
        results.append((yield ReadSummary()))
        yield parse_event(started("1-1"))
        results.append((yield Sleep(0.001)))
        results.append((yield ReadResult()))
        yield parse_event(ended("1-2", "completed", ""))

    events = await follow(run(), lambda operation: type(operation).__name__)
    assert [event.id for event in events] == ["1-1", "1-2"]
    assert results == ["ReadSummary", None, "ReadResult"]


async def test_a_redis_that_is_away_disconnects_every_operation_and_ends_nothing(follow: Driver) -> None:
    disconnected = []

    def run() -> FollowerRun:
        for operation in (Subscribe(), ReadLog(None), ReadLog("1-1"), ReadNewest()):
            try:
                yield operation
            except DisconnectedError:
                disconnected.append(operation)
        yield parse_event(started("1-1"))

    assert [event.id for event in await follow(run(), lambda _: None)] == ["1-1"]
    assert [type(operation) for operation in disconnected] == [Subscribe, ReadLog, ReadLog, ReadNewest]


@pytest.mark.parametrize(
    ("error", "thrown"),
    [
        (StoreUnavailableError("away"), StoreUnavailableError),
        (ConnectionResetError(), DisconnectedError),
        (BusyLoadingError("LOADING"), DisconnectedError),
        (MasterDownError("MASTERDOWN"), DisconnectedError),
        (ClusterDownError("CLUSTERDOWN"), DisconnectedError),
        (ResponseError("BUSY Redis is busy running a script"), DisconnectedError),
        (AuthenticationError("WRONGPASS"), InvalidSettingError),
        (NoPermissionError("NOPERM"), InvalidSettingError),
        (ResponseError("WRONGTYPE Operation against a key"), InvalidSettingError),
        (InvalidResponse("b'HTTP/1.1 400'"), InvalidSettingError),
        (ZeroDivisionError(), ZeroDivisionError),  # a defect stays what it is
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
async def test_an_error_reaches_the_follower_as_one_that_it_knows(
    follow: Driver, error: Exception, thrown: type[Exception]
) -> None:
    caught = []

    def database(_: Operation) -> Any:
        raise error

    def run() -> FollowerRun:
        try:
            yield ReadSummary()
        except Exception as received:
            caught.append(received)
            raise

    with pytest.raises(thrown) as raised:
        await follow(run(), database)
    assert caught == [raised.value]


async def test_a_message_about_unreadable_data_does_not_repeat_the_data(follow: Driver) -> None:
    def database(_: Operation) -> Any:
        raise InvalidResponse("Protocol Error: b'somebody's text'")

    def run() -> FollowerRun:
        yield ReadSummary()

    with pytest.raises(InvalidSettingError) as raised:
        await follow(run(), database)
    assert "somebody" not in str(raised.value)
    assert "check the Redis URL" in str(raised.value)
