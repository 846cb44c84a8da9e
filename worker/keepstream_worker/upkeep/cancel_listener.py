"""The cancel listener: takes cancel requests the moment they are made.

In: notices on the control channel, from clients.  Out: the job cancelled in the database, its stream here
stopped, its terminal event announced.  A cancel takes milliseconds this way; if a notice is lost, the
heartbeat finds the request in the database a little later.  All workers hear each notice; the one that runs the job
acts on it, or else one that is the first to say so.

The same channel carries nudges of workers that have more jobs waiting than they can take.  And whoever listens all the
time is the first to know that Redis may be another one, which may have lost ends of jobs.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import orjson
import redis.asyncio
from redis.exceptions import RedisError, ResponseError

from keepstream.errors import StoreUnavailableError
from keepstream.names import control_channel, job_keys
from keepstream.results import JobStatus
from keepstream_worker import store
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.lost_ends import LostEnds
from keepstream_worker.values import JobKey

log = get_logger()

#: Seconds for which a request that the database has stays on Redis, where all workers see it at once.
_REQUEST_KEPT: Final = 60
#: What a request is overwritten with by the worker that writes it into the database.
_TAKEN: Final = b"taken"
#: Seconds after which it is tried again to listen.
_PAUSE: Final = 1.0
#: Seconds for Redis to confirm the subscription.
_ANSWER_TIMEOUT: Final = 5.0
#: Seconds after a new connection when it is looked for lost ends: the old master may have been written to meanwhile.
_LOOKS_FOR_LOST_ENDS: Final = (0.0, 15.0)


class CancelListener:
    """Listens for cancel requests. Made and used on the event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        prefix: str,
        queue: str,
        database: WorkerDatabase,
        engine: Engine,
        announcer: Announcer,
        lost_ends: LostEnds,
        on_nudge: Callable[[], None],
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._channel = control_channel(prefix)
        self._queue = queue
        self._on_nudge = on_nudge
        self._database = database
        self._engine = engine
        self._announcer = announcer
        self._lost_ends = lost_ends
        self._hearing = Outage(Server.REDIS, "hear of cancels")
        self._looking = Outage(Server.REDIS, "look at a cancel request")
        self._listening: asyncio.Task[None] | None = None
        self._cancels: set[asyncio.Task[None]] = set()
        self._looking_for_ends: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen in the background, whatever happens to Redis meanwhile."""
        self._listening = asyncio.create_task(self._listen(), name="cancel listener")

    async def stop(self) -> None:
        """Stop listening."""
        others = (self._listening, self._looking_for_ends)
        tasks = [*self._cancels, *(task for task in others if task is not None)]
        for task in tasks:
            task.cancel()
        if tasks:
            # Bounded: before Python 3.12 a cancellation may get lost in redis-py's time-outs.
            await asyncio.wait(tasks, timeout=2.0)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await self._subscribe(pubsub)
                    await self._catch_up()
                    self._hearing.worked()
                    while True:
                        await self._hear(pubsub)
            except (RedisError, OSError) as error:
                self._hearing.redis_failed(error)
            except Exception:  # a defect met once must not end the listening
                log.exception("cancel_listener_defect")
            await asyncio.sleep(_PAUSE)

    async def _subscribe(self, pubsub: redis.asyncio.client.PubSub) -> None:
        await pubsub.subscribe(self._channel)
        if await pubsub.get_message(timeout=_ANSWER_TIMEOUT) is None:
            raise TimeoutError

    async def _hear(self, pubsub: redis.asyncio.client.PubSub) -> None:
        """Wait for a notice, for a while; then see whether the server is still there."""
        try:
            message = await pubsub.get_message(timeout=10.0)
            if message is None:
                await pubsub.ping()
                message = await self._answer(pubsub)
        except ResponseError:
            return  # to a PING, which is refused while Redis cannot save; the connection is alive
        if message["type"] == "message":
            self._handle_notice(message["data"])
        elif message["type"] == "subscribe":  # redis-py has lost the connection and made another one by itself
            await self._catch_up()

    async def _answer(self, pubsub: redis.asyncio.client.PubSub) -> dict[str, Any]:
        """Return what comes after a PING.

        Raises:
            TimeoutError: nothing; the server is silent, and after a fail-over another one is spoken to.
        """
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        while (seconds := deadline - time.monotonic()) > 0:
            message: dict[str, Any] | None = await pubsub.get_message(timeout=seconds)
            if message is not None:  # None may also be the answer to a PING of redis-py's own
                return message
        raise TimeoutError

    async def _catch_up(self) -> None:
        """Do what came while nobody listened: cancels, and the loss of what the server before had."""
        if self._looking_for_ends is not None:
            self._looking_for_ends.cancel()
        self._looking_for_ends = asyncio.create_task(self._look_for_lost_ends(), name="lost ends")
        await self._cancel_requested_meanwhile()

    async def _look_for_lost_ends(self) -> None:
        for seconds in _LOOKS_FOR_LOST_ENDS:
            await asyncio.sleep(seconds)
            try:
                await self._lost_ends.publish_again()
            except (RedisError, OSError, StoreUnavailableError):
                pass  # after the next connection, or by the row
            except Exception:
                log.exception("lost_ends_defect")

    async def _cancel_requested_meanwhile(self) -> None:
        """Cancel the jobs that run here and whose request came while nobody listened."""
        keys = list(self._engine.active)
        if not keys:
            return
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(job_keys(key.tenant, key.id, self._prefix).cancel)  # type: ignore[unused-awaitable]
            for key, requested in zip(keys, await pipe.execute(), strict=True):
                if requested:
                    self._engine.request_stop(key, Stop.CANCELLED)  # its ending says it to the database

    def _handle_notice(self, data: bytes) -> None:
        try:
            notice = orjson.loads(data)
            queues = notice.get("wake")
            key = None if queues else JobKey(str(notice["tenant"]), str(notice["job_id"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("cancel_notice_unreadable", size=len(data))
            return
        if key is None:
            if isinstance(queues, list) and self._queue in queues:
                self._on_nudge()
            return
        task = asyncio.get_running_loop().create_task(self._cancel(key))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, key: JobKey) -> None:
        """Cancel a job for which Redis holds a request; a notice alone cancels nothing, whoever sent it."""
        request = job_keys(key.tenant, key.id, self._prefix).cancel
        try:
            found = await self._client.set(request, _TAKEN, xx=True, get=True, keepttl=True)
        except (RedisError, OSError) as error:
            self._looking.redis_failed(error)
            return  # the heartbeat finds the request, if the database has it
        self._looking.worked()
        if found is None:
            return
        self._engine.request_stop(key, Stop.CANCELLED)
        if found == _TAKEN:
            return  # by a worker that was quicker
        try:
            # The client may have had no database, so the request is written here too; writing it twice is harmless.
            await self._cancel_in_database(key, request)
        except StoreUnavailableError:
            pass  # a stream is stopped all the same, and its ending waits for the database
        except Exception:
            log.exception("cancel_listener_defect", tenant=key.tenant, job_id=key.id)

    async def _cancel_in_database(self, key: JobKey, request: str) -> None:
        status = await self._database.run(store.cancel, key)
        if status is not None:  # the database has the request now; a job that is deleted should leave no trace
            with suppress(RedisError, OSError):  # it goes by itself some time later
                await self._client.expire(request, _REQUEST_KEPT)
        if status is JobStatus.CANCELLED:
            await self._announcer.announce(key)
