"""The client's connections to Redis, in threads: performs a follower's operations, leaves requests, looks at logs.

In: a follower's run, from ``keepstream.client.sync``; requests to cancel or delete, and questions about a log, from
``keepstream.client.base``.  Out: the run's events; keys and messages on Redis.

Every call is bounded in time.  A lost subscription is reported to the follower: redis-py would reconnect
silently, and the events in between would be lost.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import redis
from redis.exceptions import RedisError

from keepstream.client.follower import (
    LOG_PAGE,
    DisconnectedError,
    FollowerRun,
    Listen,
    LogEntry,
    Operation,
    ReadLog,
    ReadNewest,
    ReadResult,
    ReadSummary,
    Sleep,
    Subscribe,
)
from keepstream.client.forks import PerProcess
from keepstream.client.log_reader import log_entries
from keepstream.client.payloads import Payload
from keepstream.client.redis_connections import PoolOptions, make_pool
from keepstream.client.redis_errors import explain, translate
from keepstream.client.redis_url import RedisServer, parse_redis_url
from keepstream.errors import BrokerUnavailableError, KeepstreamError
from keepstream.names import JobKeys

#: Seconds; each command is small, so a longer wait means an outage.
_ANSWER_TIMEOUT: Final = 2.0
#: Connections for commands; a caller that finds all of them busy waits so long for one.
_COMMAND_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,
    "answer_timeout": _ANSWER_TIMEOUT,
    "retries": 1,  # the server may have closed a connection that has not been used for long
    "max_connections": 20,
    "wait_for_connection": 5.0,
}
#: Each follower has a connection of its own, so that a slow reader delays nobody else.
_SUBSCRIPTION_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,
    "answer_timeout": _ANSWER_TIMEOUT,
    "max_connections": 100_000,
}
_CONNECTING: Final = 16  #: Followers that connect at once; all at once would keep each other from it.

E = TypeVar("E")
DatabaseRead = ReadSummary | ReadResult  #: What the database performs, through a function of the client's.


def _is_open() -> None:
    """Say that the client has not been closed."""


class RedisConnections:
    """One client's connections to Redis. Thread-safe; connects when first used, and anew after a fork.

    Args:
        url: The server.
        check_open: Raises the error that ends all followers, once the client has been closed.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """

    def __init__(self, url: str, check_open: Callable[[], None] = _is_open) -> None:
        self._links = PerProcess(partial(_make_links, parse_redis_url(url)))
        self._links.get()
        self._check_open = check_open

    def follow(self, run: FollowerRun[E], keys: JobKeys, read: Callable[[DatabaseRead], Any]) -> Generator[E]:
        """Perform a follower's run and yield its events; ``read`` asks the database."""
        session = _Session(self._links.get, keys, read)
        try:
            step = next(run)
            while True:
                if not isinstance(step, Operation):
                    yield step
                    step = next(run)
                    continue
                try:
                    self._check_open()
                    result = session.perform(step)
                except Exception as error:  # noqa: BLE001  # what the follower does not handle, it raises again
                    step = run.throw(explain(error, self._check_open))
                else:
                    step = run.send(result)
        except StopIteration:
            return
        finally:
            with suppress(Exception):
                session.pubsub.close()

    def ping(self) -> None:
        """See whether Redis answers.

        Raises:
            BrokerUnavailableError: it does not.
        """
        try:
            self._commands.ping()
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(str(translate(error))) from None

    def request_cancel(self, keys: JobKeys, control_channel: str, message: str, ttl: int) -> None:
        """Leave a request to cancel for whoever claims the job, and tell the workers to look at once.

        The request stays for ``ttl`` seconds.

        Raises:
            BrokerUnavailableError: Redis did not take it.
        """
        try:
            with self._commands.pipeline(transaction=False) as pipeline:
                pipeline.set(keys.cancel, 1, ex=ttl)
                pipeline.publish(control_channel, message)
                pipeline.execute()
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(f"Redis did not take the cancellation ({type(error).__name__})") from None

    def read_newest(self, keys: JobKeys) -> LogEntry | None:
        """Return the newest entry of a job's log, or None if there is no log.

        Raises:
            BrokerUnavailableError: Redis did not answer.
            InvalidSettingError: it does not let us, or its answer is none.
        """
        try:
            return next(iter(log_entries(self._commands.xrevrange(keys.log, count=1))), None)
        except (RedisError, OSError) as error:
            known = translate(error)
            if isinstance(known, KeepstreamError):
                raise known from None
            raise BrokerUnavailableError(f"Redis: {known}") from None

    def delete_log(self, keys: JobKeys) -> None:
        """Delete a job's log, if there is one.

        Raises:
            BrokerUnavailableError: Redis did not do it.
        """
        try:
            self._commands.delete(keys.log)
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(f"Redis did not delete the job's log ({type(error).__name__})") from None

    def close(self) -> None:
        """Close all connections."""
        links = self._links.take()
        if links is not None:
            links.commands.close()
            links.subscriptions.close()

    @property
    def _commands(self) -> redis.Redis:
        commands: redis.Redis = self._links.get().commands
        return commands


@dataclass(slots=True, eq=False)
class _Links:
    """The connections of one process."""

    commands: Any
    subscriptions: Any
    turns: Any  #: A semaphore of those who subscribe; who waits for it has not begun to, so no time-out runs.
    failures: list[tuple[float, str]] = field(default_factory=list)  #: The last attempt that failed: when, and why.

    def attempt(self) -> AbstractContextManager[None]:
        """Surround an attempt to subscribe that begins now to wait for its turn.

        An outage that another attempt met meanwhile is its own as well: it will meet the same.
        """
        return self._attempt(time.monotonic())

    @contextmanager
    def _attempt(self, waiting_since: float) -> Iterator[None]:
        if self.failures and self.failures[0][0] > waiting_since:
            raise DisconnectedError(self.failures[0][1])
        try:
            yield
        except Exception as error:
            outage = translate(error)
            if isinstance(outage, DisconnectedError):
                self.failures[:] = [(time.monotonic(), str(outage))]
            raise


def _make_links(server: RedisServer) -> _Links:
    return _Links(
        redis.Redis.from_pool(make_pool(server, **_COMMAND_POOL)),
        redis.Redis.from_pool(make_pool(server, **_SUBSCRIPTION_POOL)),
        threading.BoundedSemaphore(_CONNECTING),
    )


class _Session:
    """Performs one follower's operations."""

    def __init__(self, links: Callable[[], _Links], keys: JobKeys, read: Callable[[DatabaseRead], Any]) -> None:
        self.pubsub = links().subscriptions.pubsub()  #: The present subscription; ``follow`` closes it at the end.
        self._links = links()
        self._links_now = links
        self._keys = keys
        self._read = read

    def perform(self, operation: Operation) -> Any:
        """Perform an operation and return its result.

        Raises:
            DisconnectedError: the subscription is the parent's, and this is a child that goes on with an iteration.
        """
        links = self._links_now()
        if self._links is not links:
            self._links = links
            self.pubsub = links.subscriptions.pubsub()
            raise DisconnectedError
        match operation:
            case Listen(seconds, pass_on):
                payloads = _payloads(self.pubsub.get_message(timeout=seconds))
                return [payload for payload in payloads if pass_on is None or not pass_on(payload)]
            case Subscribe():
                attempt = links.attempt()
                with links.turns, attempt:
                    return self._subscribe()
            case ReadLog(after):
                start = "-" if after is None else f"({after}"
                return log_entries(links.commands.xrange(self._keys.log, start, count=LOG_PAGE))
            case ReadNewest():
                return next(iter(log_entries(links.commands.xrevrange(self._keys.log, count=1))), None)
            case Sleep(seconds):
                return time.sleep(seconds)
            case ReadSummary() | ReadResult():
                return self._read(operation)
        raise TypeError(f"no such operation: {type(operation).__name__}")

    def _subscribe(self) -> None:
        self.pubsub.close()
        # Only once the previous one is closed: if that was interrupted, ``follow`` closes it at the end.
        self.pubsub = self._links.subscriptions.pubsub()
        self.pubsub.subscribe(self._keys.channel)
        _check_confirmed(self.pubsub.get_message(timeout=_ANSWER_TIMEOUT))


def _check_confirmed(message: dict[str, Any] | None) -> None:
    if message is None or message["type"] != "subscribe":
        raise DisconnectedError("it did not confirm the subscription")


def _payloads(message: dict[str, Any] | None) -> list[Payload]:
    if message is None:
        return []
    if message["type"] != "message":  # a second confirmation: redis-py has made a new connection
        raise DisconnectedError("it has closed the connection")
    return [Payload(message["data"])]
