"""The service: everything one worker process runs on its event loop, put together.

In: settings, providers and limits, from the composition root; deliveries and requests to stop, from the pool.
Out: valid jobs to the table, or at once to the engine; rejections of all others to the store.  Connections are opened
and closed here and nowhere else.
"""

import asyncio
import base64
import json
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import redis.asyncio
from redis.exceptions import RedisError

from keepstream.client.database import make_engine
from keepstream.client.queries import new_rows
from keepstream.client.redis_connections import make_async_pool
from keepstream.client.redis_url import RedisServer
from keepstream.errors import ErrorCode, InvalidJobError, StoreUnavailableError
from keepstream.jobs import Job, parse_message
from keepstream.names import DEFAULT_TENANT, control_channel
from keepstream.results import JobStatus
from keepstream_worker import store
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.intake.pool import Delivery
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.jobs.attempt import AttemptStreams
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.jobs.recovery import Recovery
from keepstream_worker.limits import Policy
from keepstream_worker.providers.config import ProviderConfig
from keepstream_worker.providers.provider import Providers
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.scheduling.observations import accepted_of, charge_of, is_refusal, observation_of
from keepstream_worker.settings import Settings
from keepstream_worker.store import Claim, Refused, Rejection
from keepstream_worker.store.database import Health, WorkerDatabase
from keepstream_worker.store.error_answers import StoreRefusedError
from keepstream_worker.store.one_writer import OneWriter
from keepstream_worker.telemetry.figures import Figures
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.upkeep.announcer import Announcer
from keepstream_worker.upkeep.bookkeeper import Bookkeeper
from keepstream_worker.upkeep.cancel_listener import CancelListener
from keepstream_worker.upkeep.heartbeat import WorkerHeartbeat
from keepstream_worker.upkeep.limits_report import LimitsReport
from keepstream_worker.upkeep.lost_ends import LostEnds
from keepstream_worker.upkeep.sweeper import Sweeper
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import Ending, JobKey, worker_id

log = get_logger()

#: Seconds for interrupted jobs to be stored as such, after which the process ends all the same.
_INTERRUPT_TIMEOUT = 10.0
#: Bytes of an invalid job that are kept; enough to see what it was.
_KEPT_BYTES = 64 * 1024


class Service:
    """One worker process's work; the ``LoopService`` of ``keepstream_worker.intake.pool``."""

    def __init__(self, settings: Settings, providers: dict[str, ProviderConfig], policy: Policy) -> None:
        self._settings = settings
        self._provider_configs = providers
        self._policy = policy
        self._draining = asyncio.Event()
        self._stop_forced = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_writer: OneWriter | None = None

    async def start(self) -> None:
        """Open connections and begin to give signs of life.

        Raises:
            StoreUnavailableError: the database cannot be written.
        """
        settings = self._settings
        # Unique for each start, so that a restarted process is not mistaken for the one before it.
        self.worker_id = worker_id(socket.gethostname(), os.getpid(), uuid.uuid4().hex[:8])
        self._open_databases()
        self._client = _redis_client(settings.redis_server)
        self._broker = _redis_client(settings.broker_server)
        self._publisher = Publisher(
            settings.redis_server,
            prefix=settings.prefix,
            log_ttl=settings.log_ttl,
            buffer_bytes=settings.publish_buffer,
            merge_above=settings.merge_above,
            on_moved=self._reconnect,
        )
        self._providers = Providers(self._provider_configs)
        self._announcer = Announcer(self._database, self._publisher)
        self._lost_ends = LostEnds(self._client, settings.prefix, self._announcer)
        self._figures = Figures()
        self._bookkeeper = Bookkeeper(self._figures, self._sweeps)
        self.engine = Engine(
            settings,
            self.worker_id,
            self._database,
            self._publisher,
            AttemptStreams(settings, self._providers, self._figures),
            Recovery(self._client, settings.prefix, self._database),
            self._policy.max_cooldown,
            lambda claim: self._chooser.observe(accepted_of(claim)),
            self._note_end,
        )
        self._chooser = Chooser(
            self._policy,
            self.worker_id,
            settings.queue,
            settings.concurrency,
            settings.total_timeout,
            self._turns,
            self._database,
            self.engine.active.keys(),
            self.engine.streams,
            self.engine.start,
            self._nudge,
            self._provider_configs,
        )
        self._cancel_listener = CancelListener(
            self._client,
            settings.prefix,
            settings.queue,
            self._database,
            self.engine,
            self._announcer,
            self._lost_ends,
            self._chooser.nudged,
        )
        self._heartbeat = WorkerHeartbeat(
            settings,
            self.worker_id,
            self._heartbeats,
            self._sweeps,
            self.engine,
            self._chooser,
            self._provider_configs,
        )
        self._sweeper = Sweeper(
            settings,
            self.worker_id,
            self._sweeps,
            self._heartbeat,
            self._chooser,
            self._announcer,
            UnreadableMessages(self._client, settings.prefix, self._sweeps),
            LimitsReport(self._policy, self._sweeps),
        )
        await self._heartbeat.start()
        self._chooser.start()
        self._sweeper.start()
        self._bookkeeper.start()
        self._cancel_listener.start()
        log.info("worker_started", worker=self.worker_id, concurrency=settings.concurrency)

    def _open_databases(self) -> None:
        """Open the ways to the database, each with a connection of its own, so that none holds up another."""
        url, health = self._settings.database_url, Health()
        engines = [make_engine(url, "keepstream-worker", pool_size=1, writer=True) for _ in range(4)]
        self._one_writer = OneWriter.of(engines[0])
        self._heartbeats = WorkerDatabase(engines[0], health, self._one_writer)
        self._database = WorkerDatabase(engines[1], health, self._one_writer)
        self._turns = WorkerDatabase(engines[2], health, self._one_writer, max_group=1)
        self._sweeps = WorkerDatabase(engines[3], health, self._one_writer)
        self._databases = (self._heartbeats, self._database, self._turns, self._sweeps)

    async def deliver(self, delivery: Delivery) -> None:
        """Store the job of one message, and start it if nothing is in its way; or record why it is no valid job."""
        if self._draining.is_set():
            return  # not acknowledged, so Celery puts the message back
        argument = _with_id(delivery.arguments[0], delivery.task_id)
        job: Job | None = None
        try:
            message = parse_message(argument)
            if isinstance(message, Job):
                job = message
                reason = await self._take_in(job)
            else:
                reason = await self._take_named(JobKey(message.tenant, message.id))
            if reason is not None:
                log.warning("job_refused", reason=reason, tenant=message.tenant, job_id=message.id)
                await self._reject(argument, reason, job, JobKey(message.tenant, message.id))
        except InvalidJobError as error:  # also raised by the store: the job is too large or too deep to be stored
            log.warning("job_invalid", reason=str(error), **_names(argument))
            await self._refuse(argument, ErrorCode.INVALID_JOB, str(error))
        except StoreRefusedError as error:  # no outage, for which it waits: the database refuses this job
            log.exception("job_unstorable", tenant=job and job.tenant, job_id=job and job.id)
            await self._reject(argument, str(error), job)
        except Exception as error:  # the last resort: a message that always meets a defect must not come for ever
            log.exception("job_defect", **_names(argument))
            reason = f"internal error ({type(error).__name__})"
            await self._refuse(argument, ErrorCode.INTERNAL, reason, _storable(job), request_hash=_hash_of(job))
        delivery.acknowledge()

    async def _take_in(self, job: Job) -> str | None:
        """Store a job that came whole; return why its message is to be recorded as rejected, or None."""
        key = JobKey(job.tenant, job.id)
        reserved = self._chooser.reserve(key)
        try:
            incoming = store.incoming(job, self._settings.queue)
            if reserved:
                incoming = incoming._replace(
                    direct=self._chooser.direct(job, incoming.prompt_tokens, incoming.max_tokens)
                )
            answer = await self._database.persist(store.take_in, incoming)
            return self._go_on(answer, "the job id is already used for a different request")
        finally:
            if reserved:
                self._chooser.forget(key)

    async def _take_named(self, key: JobKey) -> str | None:
        """Look after a job that was stored by whoever sent its message; the result is as for ``_take_in``."""
        reserved = self._chooser.reserve(key)
        try:
            named = store.Named(key, self._chooser.admits(key) if reserved else None)
            answer = await self._database.persist(store.take_named, named)
            return self._go_on(answer, "the message names a job that is not stored, and does not bring it")
        finally:
            if reserved:
                self._chooser.forget(key)

    def _go_on(self, answer: Claim | store.Stored | None, refusal: str) -> str | None:
        if isinstance(answer, Claim):
            if self.engine.start(answer):
                self._chooser.observe(charge_of(answer))
        elif answer is None or answer is store.Stored.OTHER_REQUEST:
            return refusal
        elif answer is store.Stored.NEW:
            self._chooser.wake()
        return None

    def _note_end(self, claim: Claim, ending: Ending) -> None:
        """Tell the chooser what an attempt has taken, and how it ended; count it."""
        code = ending.failure.code if ending.failure is not None else ""
        self._figures.note_end(*claim.target, ending.outcome, code, ending.usage)
        observation = observation_of(claim, ending)
        self._chooser.observe(observation, urgent=is_refusal(ending))
        if ending.status is JobStatus.RETRYING:
            self._chooser.expect(ending.retry_in)
        if ending.terminal_event_id is not None:
            self._lost_ends.note(ending.key, ending.terminal_event_id)

    def _nudge(self, queues: list[str]) -> None:
        """Tell other workers that jobs wait which this one cannot take."""
        task = asyncio.get_running_loop().create_task(self._publish_nudge(queues))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish_nudge(self, queues: list[str]) -> None:
        with suppress(RedisError, OSError):  # they look by themselves a little later
            await self._client.publish(control_channel(self._settings.prefix), json.dumps({"wake": queues}))

    async def _refuse(
        self, argument: object, code: ErrorCode, reason: str, job: Job | None = None, request_hash: str | None = None
    ) -> None:
        """Record a message that cannot be run.

        If it names a job that has no row, or one that waits and has this ``request_hash``, that job ends as failed: the
        ``job``, if it is valid.
        """
        named = job or _job_named_in(argument)
        await self._reject(argument, reason, named)
        if named is not None:
            key = JobKey(named.tenant, named.id)
            refused = Refused(named, self._settings.queue, code, reason, request_hash)
            await self._database.persist(store.refuse, refused)
            try:
                await self._announcer.announce(key)
            except StoreUnavailableError:
                log.warning("announcement_delayed", tenant=key.tenant, job_id=key.id)
            except Exception:  # the sweeps try it again
                log.exception("announcement_defect", tenant=key.tenant, job_id=key.id)

    async def _reject(self, argument: object, reason: str, job: Job | None, key: JobKey | None = None) -> None:
        text = json.dumps(argument).encode()
        rejection = Rejection(
            id=uuid.uuid4().hex,
            reason=reason,
            size=len(text),
            payload=base64.b64encode(text[:_KEPT_BYTES]).decode(),
            tenant=job.tenant if job else key and key.tenant,
            job_id=job.id if job else key and key.id,
        )
        await self._database.persist(store.reject, rejection)

    def _reconnect(self) -> None:
        """Leave a Redis that is not the master any more; a new connection leads to the one that is."""
        task = asyncio.get_running_loop().create_task(self._client.connection_pool.disconnect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the end --

    def drain(self) -> None:
        """Start nothing new; what runs goes on."""
        if not self._draining.is_set():
            log.info(
                "worker_draining",
                worker=self.worker_id,
                running=len(self.engine.active),
                grace=self._settings.shutdown_grace,
            )
            self._draining.set()
            self._chooser.pause()
            self._sweeper.pause()

    @property
    def _has_jobs(self) -> bool:
        return bool(self.engine.active or self._chooser.expected)

    def force_stop(self) -> None:
        """Interrupt what runs now instead of at the end of the grace period."""
        self.drain()
        self._stop_forced.set()

    async def stop(self) -> None:
        """Let streams finish within the grace period, interrupt the rest, and close everything."""
        self.drain()
        await self._chooser.settle()
        deadline = time.monotonic() + self._settings.shutdown_grace
        while self._has_jobs and time.monotonic() < deadline and not self._stop_forced.is_set():  # noqa: ASYNC110  # the end of the process is no hot path
            await asyncio.sleep(0.02)
        interrupted = len(self.engine.active)
        deadline = time.monotonic() + _INTERRUPT_TIMEOUT
        while self._has_jobs and time.monotonic() < deadline:
            for key in list(self.engine.active):  # again and again: what was on its way here begins meanwhile
                self.engine.request_stop(key, Stop.INTERRUPTED)
            await asyncio.sleep(0.02)
        if interrupted:
            await self._publish_nudge([self._settings.queue])
        closings: tuple[Callable[[], Awaitable[object]], ...] = (
            self._cancel_listener.stop,
            lambda: self._publisher.close(timeout=3.0),
            lambda: self.engine.wait_for_announcements(timeout=3.0),
            self._bookkeeper.stop,
            self._sweeper.stop,
            self._chooser.stop,
            self._heartbeat.stop,
            self._providers.aclose,
            self._client.aclose,
            *(partial(asyncio.to_thread, database.close) for database in self._databases),
            *([partial(asyncio.to_thread, self._one_writer.close)] if self._one_writer else []),
        )
        for close in closings:
            try:
                await close()
            except Exception:  # what comes after it is to be closed too
                log.exception("stop_defect")
        log.info("worker_stopped", worker=self.worker_id, interrupted=interrupted, left=len(self.engine.active))


def _with_id(argument: object, task_id: str) -> object:
    """Give a job without an id the task id as its id, so that its message, if repeated, stays one job."""
    if isinstance(argument, dict) and "id" not in argument and argument.get("idempotency_key") is None:
        return {**argument, "id": task_id}
    return argument


def _hash_of(job: Job | None) -> str | None:
    try:
        return job.request_hash() if job else None
    except Exception:  # the defect that was met may be in here
        log.exception("job_defect", tenant=job and job.tenant, job_id=job and job.id)
        return None


def _storable(job: Job | None) -> Job | None:
    """Return a job that met a defect, so that it can be run again later; None if it cannot even be stored."""
    try:
        if job is not None:
            new_rows(job)
    except Exception:
        log.exception("job_defect", tenant=job and job.tenant, job_id=job and job.id)
        return None
    return job


def _names(argument: object) -> dict[str, str | None]:
    job = _job_named_in(argument)
    return {"tenant": job.tenant, "job_id": job.id} if job else {"tenant": None, "job_id": None}


def _job_named_in(argument: object) -> Job | None:
    """Return a stand-in with the id and tenant of an invalid job, or None if not even these are valid."""
    if not isinstance(argument, dict) or "id" not in argument:
        return None
    try:
        request = {"model": "unknown", "messages": [{}]}
        return Job(id=argument["id"], tenant=argument.get("tenant", DEFAULT_TENANT), request=request)
    except ValueError:
        return None


def _redis_client(server: RedisServer) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_pool(
        make_async_pool(
            server,
            connect_timeout=2.0,
            answer_timeout=5.0,  # of a command; the cancel listener says how long it waits
            health_check_interval=10,
            retries=1,
        )
    )
