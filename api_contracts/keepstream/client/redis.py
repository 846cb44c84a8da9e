"""The client's way to Redis: what a follower wants done is done here, with redis-py, sync and async.

In: a follower's plan, and requests to cancel, from ``keepstream.client.client``.  Out: the plan's events;
keys and messages on Redis.  Exists so that every call is bounded in time, and that a follower hears
of a lost connection: redis-py would reconnect in silence, and events in between would be lost.  The
only importer of redis-py among the contracts.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Final, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, MasterDownError, NoPermissionError, RedisError
from redis.retry import Retry

from keepstream.client.follower import (
    LOG_PAGE,
    DisconnectedError,
    Listen,
    LogEntry,
    Pause,
    Plan,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Step,
    Subscribe,
)
from keepstream.errors import BrokerUnavailableError, InvalidSettingError, StoreUnavailableError
from keepstream.events import Event
from keepstream.names import JobKeys

#: Seconds; little is asked of Redis at a time, so what takes longer than this is an outage.
_ANSWER_TIMEOUT: Final = 2.0
_TIMEOUTS: Final[dict[str, Any]] = {"socket_connect_timeout": 1.0, "socket_timeout": _ANSWER_TIMEOUT}
#: Connections for commands; who finds all of them busy waits at most ``timeout`` seconds for one.
_COMMAND_POOL: Final[dict[str, Any]] = {**_TIMEOUTS, "max_connections": 20, "timeout": 5.0}
#: Each follower has a connection of its own, so that a slow reader holds up nobody else.
_SUBSCRIPTION_POOL: Final[dict[str, Any]] = {**_TIMEOUTS, "max_connections": 100_000}
_CANCEL_KEPT: Final = 86_400  #: Seconds for which a request to cancel waits for its job.
_BAD_URL: Final = "the Redis URL cannot be used; it looks like redis://host:6379/0"

T = TypeVar("T")


class Live:
    """Redis for one client, from any thread."""

    def __init__(self, url: str) -> None:
        try:
            self._commands = redis.Redis.from_pool(
                redis.BlockingConnectionPool.from_url(url, retry=Retry(NoBackoff(), 1), **_COMMAND_POOL)
            )
            self._subscriptions = redis.Redis.from_pool(
                redis.ConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), **_SUBSCRIPTION_POOL)
            )
        except ValueError:
            raise InvalidSettingError(_BAD_URL) from None

    def run(
        self, plan: Plan, keys: JobKeys, ask_database: Callable[[ReadSummary | ReadResult], Any]
    ) -> Generator[Event]:
        """Perform a follower's plan and give its events."""
        pubsub = self._subscriptions.pubsub()

        def perform(step: Step) -> Any:
            nonlocal pubsub
            match step:
                case Subscribe():
                    pubsub.close()
                    pubsub = self._subscriptions.pubsub()
                    pubsub.subscribe(keys.channel)
                    _check_confirmed(pubsub.get_message(timeout=_ANSWER_TIMEOUT))
                case Listen(seconds):
                    return _payload(pubsub.get_message(timeout=seconds))
                case ReadLog(after):
                    return _entries(self._commands.xrange(keys.log, _after(after), count=LOG_PAGE))
                case ReadNewest():
                    return next(iter(_entries(self._commands.xrevrange(keys.log, count=1))), None)
                case Pause(seconds):
                    time.sleep(seconds)
                case ReadSummary() | ReadResult():
                    return ask_database(step)
            return None

        try:
            step = next(plan)
            while True:
                if not isinstance(step, Step):
                    yield step
                    step = next(plan)
                    continue
                try:
                    answer = perform(step)
                except Exception as error:  # noqa: BLE001  # what the plan does not know comes out of it again
                    step = plan.throw(_for_the_plan(error))
                else:
                    step = plan.send(answer)
        except StopIteration:
            return
        finally:
            pubsub.close()

    def request_cancel(self, keys: JobKeys, control_channel: str, message: str) -> None:
        """Leave a request to cancel for whoever claims the job, and tell the workers to look at once.

        Raises:
            BrokerUnavailableError: Redis did not take it.
        """
        try:
            with self._commands.pipeline(transaction=False) as pipeline:
                pipeline.set(keys.cancel, 1, ex=_CANCEL_KEPT)
                pipeline.publish(control_channel, message)
                pipeline.execute()
        except RedisError as error:
            raise BrokerUnavailableError(f"Redis did not take the cancellation ({type(error).__name__})") from None

    def close(self) -> None:
        """Close all connections."""
        self._commands.close()
        self._subscriptions.close()


class AsyncLive:
    """Redis for one async client, on its event loop. The counterpart of ``Live``, line by line."""

    def __init__(self, url: str) -> None:
        try:
            self._commands = redis.asyncio.Redis.from_pool(
                redis.asyncio.BlockingConnectionPool.from_url(url, retry=AsyncRetry(NoBackoff(), 1), **_COMMAND_POOL)
            )
            self._subscriptions = redis.asyncio.Redis.from_pool(
                redis.asyncio.ConnectionPool.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **_SUBSCRIPTION_POOL)
            )
        except ValueError:
            raise InvalidSettingError(_BAD_URL) from None

    async def run(
        self, plan: Plan, keys: JobKeys, ask_database: Callable[[ReadSummary | ReadResult], Awaitable[Any]]
    ) -> AsyncGenerator[Event]:
        """Perform a follower's plan and give its events."""
        pubsub = self._subscriptions.pubsub()

        async def perform(step: Step) -> Any:
            nonlocal pubsub
            match step:
                case Subscribe():
                    await pubsub.aclose()
                    pubsub = self._subscriptions.pubsub()
                    await pubsub.subscribe(keys.channel)
                    _check_confirmed(await pubsub.get_message(timeout=_ANSWER_TIMEOUT))
                case Listen(seconds):
                    return _payload(await pubsub.get_message(timeout=seconds))
                case ReadLog(after):
                    return _entries(await self._commands.xrange(keys.log, _after(after), count=LOG_PAGE))
                case ReadNewest():
                    return next(iter(_entries(await self._commands.xrevrange(keys.log, count=1))), None)
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                case ReadSummary() | ReadResult():
                    return await ask_database(step)
            return None

        try:
            step = next(plan)
            while True:
                if not isinstance(step, Step):
                    yield step
                    step = next(plan)
                    continue
                try:
                    answer = await _cancellable(perform(step))
                except Exception as error:  # noqa: BLE001  # what the plan does not know comes out of it again
                    step = plan.throw(_for_the_plan(error))
                else:
                    step = plan.send(answer)
        except StopIteration:
            return
        finally:
            await pubsub.aclose()

    async def close(self) -> None:
        """Close all connections."""
        await self._commands.aclose()
        await self._subscriptions.aclose()


async def _cancellable(work: Awaitable[T]) -> T:
    """Await ``work``, and be cancelled if a cancellation was swallowed in it.

    redis-py uses ``asyncio.wait_for``, which before Python 3.12 swallows one that comes at the very
    moment at which its own wait is over.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await work
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def _check_confirmed(message: dict[str, Any] | None) -> None:
    if message is None or message["type"] != "subscribe":
        raise DisconnectedError


def _payload(message: dict[str, Any] | None) -> bytes | None:
    if message is None:
        return None
    if message["type"] != "message":  # a second confirmation: the connection is a new one
        raise DisconnectedError
    return bytes(message["data"])


def _after(event_id: str | None) -> str:
    return "-" if event_id is None else f"({event_id}"


def _entries(reply: Any) -> list[LogEntry]:
    return [LogEntry(entry_id.decode(), fields.get(b"event", b"")) for entry_id, fields in reply]


def _for_the_plan(error: Exception) -> Exception:
    """An outage of Redis becomes ``DisconnectedError``, which the plan survives; a refusal says what to change."""
    if isinstance(error, StoreUnavailableError):  # an OSError too, but the database's
        return error
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return InvalidSettingError(
            f"Redis does not let this user follow the job ({type(error).__name__}); check the user and password of the"
            " Redis URL, and that its ACL allows the tenant's log and channel"
        )
    is_outage = isinstance(error, redis.ConnectionError | redis.TimeoutError | MasterDownError | OSError)
    return DisconnectedError() if is_outage else error
