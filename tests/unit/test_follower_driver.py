"""The sync and the async client perform a follower's operations alike: the same results, errors and events.

No server is needed here: what a real one answers is compared in ``tests/adapters/test_follow.py``.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
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

from keepstream.client.cancellation import cancellable
from keepstream.client.follower import (
    DisconnectedError,
    FollowerRun,
    Listen,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
)
from keepstream.client.redis import RedisConnections
from keepstream.client.redis_aio import AsyncRedisConnections
from keepstream.errors import InvalidSettingError, StoreUnavailableError, UnexpectedError
from keepstream.events import Event, parse_event
from keepstream.names import job_keys
from tests.event_texts import ended, started

NOWHERE = "redis://127.0.0.1:1"
KEYS = job_keys("default", "job-1")

Database = Callable[[Operation], Any]
Driver = Callable[[FollowerRun[Any], Database], Awaitable[list[Event]]]


async def follow_sync(run: FollowerRun[Any], database: Database) -> list[Event]:
    connections = RedisConnections(NOWHERE)
    try:
        return list(connections.follow(run, KEYS, database))
    finally:
        connections.close()


async def follow_async(run: FollowerRun[Any], database: Database) -> list[Event]:
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

    def run() -> FollowerRun[Any]:
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

    def run() -> FollowerRun[Any]:
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
        (ZeroDivisionError(), UnexpectedError),  # a defect, which is the cause of that
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
async def test_an_error_reaches_the_follower_as_one_that_it_knows(
    follow: Driver, error: Exception, thrown: type[Exception]
) -> None:
    caught = []

    def database(_: Operation) -> Any:
        raise error

    def run() -> FollowerRun[Any]:
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

    def run() -> FollowerRun[Any]:
        yield ReadSummary()

    with pytest.raises(InvalidSettingError) as raised:
        await follow(run(), database)
    assert "somebody" not in str(raised.value)
    assert "check the Redis URL" in str(raised.value)


# -- subscriptions of the sync form; those of the other are tried in tests/adapters/test_subscriptions.py --

Closing = Callable[[], object]  #: Called at each close, which it may prevent by an exception.


class Subscription:
    """A subscription that is confirmed at once and then silent."""

    def __init__(self, unclosed: set["Subscription"], closing: Closing) -> None:
        self._unclosed = unclosed
        self._closing = closing
        self._confirmed = False
        unclosed.add(self)

    def subscribe(self, _channel: str) -> None:
        self._confirmed = True

    def get_message(self, timeout: float) -> dict[str, Any] | None:
        confirmed, self._confirmed = self._confirmed, False
        return {"type": "subscribe"} if confirmed else None

    def close(self) -> None:
        self._closing()
        self._unclosed.discard(self)


class Subscriptions:
    """The place of the connection pool for subscriptions, which keeps each one until it is closed."""

    def __init__(self, closing: Closing = lambda: None) -> None:
        self._closing = closing
        self.made = 0
        self.unclosed: set[Subscription] = set()

    def pubsub(self) -> Subscription:
        self.made += 1
        return Subscription(self.unclosed, self._closing)


def first_event(run: FollowerRun[Any], subscriptions: Any) -> Any:
    """Return the first event, and end the iteration early."""
    connections = RedisConnections(NOWHERE)
    connections._links.get().subscriptions = subscriptions
    events = connections.follow(run, KEYS, lambda _: None)
    try:
        return next(events)
    finally:
        events.close()


def test_ending_early_closes_the_subscription() -> None:
    def run() -> FollowerRun[Any]:
        yield Subscribe()
        yield parse_event(started("1-1"))
        yield parse_event(ended("1-2", "completed", ""))

    subscriptions = Subscriptions()
    assert first_event(run(), subscriptions).id == "1-1"
    assert (subscriptions.made, subscriptions.unclosed) == (2, set())


def test_an_error_closes_the_subscription() -> None:
    def run() -> FollowerRun[Any]:
        yield Subscribe()
        yield Listen(1.0)
        raise ZeroDivisionError

    subscriptions = Subscriptions()
    with pytest.raises(ZeroDivisionError):
        first_event(run(), subscriptions)
    assert (subscriptions.made, subscriptions.unclosed) == (2, set())


def interrupted_at(close: int, error: BaseException) -> Closing:
    """Return a closing of which one is interrupted; they are counted from 0."""
    closes: Iterator[BaseException | None] = iter([*[None] * close, error])

    def closing() -> None:
        if interruption := next(closes, None):
            raise interruption

    return closing


def test_a_subscription_whose_close_failed_is_closed_later() -> None:
    disconnected = 0

    def run() -> FollowerRun[Any]:
        nonlocal disconnected
        for _ in range(3):
            try:
                yield Subscribe()
            except DisconnectedError:
                disconnected += 1
        yield parse_event(started("1-1"))

    subscriptions = Subscriptions(interrupted_at(1, ConnectionResetError()))
    assert first_event(run(), subscriptions).id == "1-1"
    assert disconnected == 1
    assert subscriptions.unclosed == set()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, asyncio.CancelledError])
def test_a_subscription_whose_close_was_interrupted_is_closed_at_the_end(interruption: type[BaseException]) -> None:
    def run() -> FollowerRun[Any]:
        yield Subscribe()
        yield Subscribe()
        yield parse_event(started("1-1"))

    subscriptions = Subscriptions(interrupted_at(1, interruption()))
    with pytest.raises(interruption):
        first_event(run(), subscriptions)
    assert subscriptions.unclosed == set()


@pytest.mark.parametrize("swallowed", [False, True])
async def test_a_cancellation_ends_a_call_even_if_redis_py_swallows_it(*, swallowed: bool) -> None:
    waiting = asyncio.Event()

    async def call() -> str:
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not swallowed:
                raise
        return "as if nothing had been"

    task = asyncio.create_task(cancellable(call()))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
