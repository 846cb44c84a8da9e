"""A defect that nobody expected fails one thing, visibly and without a value in the log; everything else goes on.

Each place where one may be met has a function that raises there and checks what goes on.
"""

import asyncio
import gc
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from queue import Empty
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

import orjson
import pytest
from celery.signals import worker_shutting_down

from keepstream.errors import ErrorCode, StoreUnavailableError
from keepstream.jobs import parse_job
from keepstream.results import JobStatus
from keepstream_worker import store, supervisor
from keepstream_worker.events import log_script, publisher
from keepstream_worker.events.publication import FlushResult
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.intake import pool as pool_module
from keepstream_worker.intake import transport
from keepstream_worker.intake.pool import Delivery, LoopPool
from keepstream_worker.intake.transport import BatchingQoS, FilteringChannel, PatientPoller
from keepstream_worker.jobs.active_job import Stop
from keepstream_worker.jobs.engine import Engine
from keepstream_worker.jobs.recovery import Recovery
from keepstream_worker.jobs.usage import PromptSizes
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling import chooser as chooser_module
from keepstream_worker.scheduling.chooser import Chooser
from keepstream_worker.scheduling.observations import charge_of
from keepstream_worker.service import Service
from keepstream_worker.settings import load_settings
from keepstream_worker.store import Claim
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.supervisor import Supervisor
from keepstream_worker.telemetry.figures import Figures
from keepstream_worker.telemetry.logs import configure_logging
from keepstream_worker.telemetry.outages import Outage, Server
from keepstream_worker.turn import Pick, WaitingJob
from keepstream_worker.upkeep import cancel_listener
from keepstream_worker.upkeep.cancel_listener import CancelListener
from keepstream_worker.upkeep.periodic import PeriodicTask
from keepstream_worker.upkeep.sweeper import Sweeper
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages
from keepstream_worker.values import Ended, Ending, JobKey
from tests import claims
from tests.claims import TARGET

SECRET: Final = "the prompt of a customer"
BAD, GOOD = JobKey("default", "bad"), JobKey("default", "good")
PATIENCE: Final = 60.0
NOBODY: Final = cast("Any", None)


class Defect(Exception):  # noqa: N818  # what the rules of the log call it
    """What nobody expected; its text quotes what must not be logged."""

    def __init__(self) -> None:
        super().__init__(SECRET)


def fail(*_: Any, **__: Any) -> Any:
    raise Defect


async def fail_later(*_: Any, **__: Any) -> Any:
    await asyncio.sleep(0)
    raise Defect


async def until(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # what is waited for sets no event
            await asyncio.sleep(0.005)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The log as it is written in production."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for module, name in (
        (publisher, "_REFUSED_PAUSE"),
        (cancel_listener, "_PAUSE"),
        (transport, "_PAUSE"),
        (chooser_module, "_PAUSE_AFTER_DEFECT"),
        (supervisor, "_CHECK_INTERVAL"),
        (supervisor, "FIRST_PAUSE"),
    ):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(cancel_listener, "_LOOKS_FOR_LOST_ENDS", (0.0,))
    configure_logging("info", "json")
    return stream


class Database:
    """A database that notes what it is asked for, and fails for some."""

    def __init__(self, fails: Callable[[Any], bool] = lambda _: False) -> None:
        self.written: list[tuple[Any, Any]] = []
        self._fails = fails

    async def run(self, operation: Any, argument: Any) -> Any:
        await asyncio.sleep(0)
        if self._fails(argument):
            raise Defect
        self.written.append((operation, argument))
        return JobStatus.CANCELLED if operation is store.cancel else None

    persist = run


# -- messages, on Celery's thread --


class Acknowledgements:
    """The part of the bookkeeping that the channel calls."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []

    def ack(self, tag: str) -> None:
        self.acknowledged.append(tag)


def make_channel(**parts: Any) -> FilteringChannel:
    """Return a channel that is connected to nothing."""
    channel = object.__new__(FilteringChannel)
    channel._unreadable = []
    channel._rests_until = 0.0
    channel._active_queues = []
    channel._taking = channel._recording = Outage(Server.BROKER, "work")
    channel._in_poll = NOBODY
    channel.__dict__.update(client=SimpleNamespace(connection=None), **parts)
    return channel


def set_aside(channel: FilteringChannel) -> list[dict[str, Any]]:
    return [orjson.loads(record) for record in channel._unreadable]


async def message_is_delivered() -> None:
    channel = make_channel(connection=SimpleNamespace(_deliver=fail), _qos=(books := Acknowledgements()))
    message = {"headers": {"id": "job-1"}, "properties": {"delivery_tag": "tag-1"}}
    channel._deliver(b"{}", message, "completions")
    assert books.acknowledged == ["tag-1"]
    (record,) = set_aside(channel)
    assert (record["task_id"], record["reason"]) == ("job-1", "internal error (Defect); see the worker's log")


async def message_is_read() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "read_message", fail)
        channel = make_channel()
        assert channel._filter([b"one", b"two"]) == []
    assert len(set_aside(channel)) == 2


async def message_is_put_back() -> None:
    books = object.__new__(BatchingQoS)
    removed: list[str] = []
    channel = make_channel(unacked_key="unacked", unacked_index_key="index", _lookup=fail)
    books.channel = channel
    books._client = SimpleNamespace(
        hget=lambda *_: b'[{}, "", "completions"]',
        zrem=lambda _, tag: removed.append(tag),
        hdel=lambda _, tag: removed.append(tag),
    )
    books.restore_by_tag("tag-1")
    assert removed == ["tag-1", "tag-1"]
    assert len(set_aside(channel)) == 1


def make_books(channel: FilteringChannel) -> BatchingQoS:
    """Return the books of a channel, which meet a defect in each call to Redis."""
    books: BatchingQoS = object.__new__(BatchingQoS)
    books.channel = channel
    books._client = SimpleNamespace(pipeline=fail, rpush=fail)
    books._unnoted = {tag: ({}, "completions") for tag in ("tag-1", "tag-2")}
    books._acknowledged = ["tag-3"]
    books._noting = books._acknowledging = books._restoring = Outage(Server.BROKER, "work")
    return books


async def messages_are_noted() -> None:
    books = make_books(make_channel())
    books.flush_notes()
    assert list(books._unnoted) == ["tag-1", "tag-2"], "they are noted later"


async def acknowledgements_are_sent() -> None:
    books = make_books(make_channel(closed=False))
    again: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(books, "_flush_acknowledgements_in", again.append)
        books.flush_acknowledgements()
    assert books._acknowledged == ["tag-3"]
    assert len(again) == 1


async def messages_are_put_back_at_the_end() -> None:
    tried: list[str] = []

    def put_back(message: str) -> None:
        tried.append(message)
        raise Defect

    books = make_books(make_channel(closed=True, _restore=put_back))
    books._on_collect = cast("Any", SimpleNamespace(cancel=lambda: None))
    books._dirty = set()
    books._delivered = cast("Any", {"tag-1": NOBODY, "tag-4": "four", "tag-5": "five"})
    books.restore_unacked_once()
    assert tried == ["four", "five"]


async def old_messages_are_put_back() -> None:
    books = make_books(make_channel(conn_or_acquire=fail))
    books._vrestore_count = 0
    books.restore_visible()


async def unreadable_messages_are_handed_over() -> None:
    channel = make_channel(conn_or_acquire=fail)
    channel._unreadable.append(b"{}")
    channel._flush_unreadable()
    assert channel._unreadable == [b"{}"]


async def answer_of_the_broker_is_read() -> None:
    channel = make_channel(parse_response=fail, _flush_brpop_reauth=lambda: None, _read_items=fail)
    with pytest.raises(Empty):
        channel._brpop_read()
    assert channel.rests


async def broker_is_asked() -> None:
    poller: Any = cast("Any", PatientPoller)()
    channel = make_channel(active_queues_=[], _qos=SimpleNamespace(can_consume=fail))
    channel._active_queues = ["completions"]
    channel.active_fanout_queues = set()
    poller.add(channel)
    poller.on_poll_start()
    assert channel.rests


# -- jobs --


class Announcer:
    """Fails for one job."""

    def __init__(self) -> None:
        self.announced: list[JobKey] = []

    async def announce(self, key: JobKey) -> bool:
        await asyncio.sleep(0)
        if key == BAD:
            raise Defect
        self.announced.append(key)
        return True


async def delivery_is_stored() -> None:
    service = Service(load_settings({}), {}, Policy())
    database, announcer = Database(), Announcer()
    service._database, service._announcer = cast("Any", database), cast("Any", announcer)
    service._chooser = cast("Any", SimpleNamespace(reserve=fail))
    acknowledged: list[bool] = []
    job = {"v": 2, "id": "good", "request": {"model": "m", "messages": [{"role": "user", "content": SECRET}]}}
    await service.deliver(Delivery("good", [job], lambda: acknowledged.append(True)))
    (_, rejection), (refuse, refused) = database.written
    assert acknowledged
    assert rejection.reason == refused.message == "internal error (Defect)"
    assert (refuse, refused.code) == (store.refuse, ErrorCode.INTERNAL)
    assert (refused.job, refused.request_hash) == (parse_job(job), parse_job(job).request_hash())
    assert announcer.announced == [GOOD]


def claim_of(key: JobKey) -> Claim:
    """Return a claim of a job's first attempt."""
    request = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    return claims.claim_of(key, json.dumps({"v": 2, "id": key.id, "request": request}))


def make_engine(endings: list[Ending], streams: Any, outbox: Any, on_end: Any) -> Engine:
    """Return an engine whose database stores endings here."""

    class Answers(Database):
        async def persist(self, operation: Any, argument: Any) -> Any:
            if operation is store.end:
                endings.append(argument)
                return Ended(None, 1)
            return None

    settings, database = load_settings({}), cast("Any", Answers())
    return Engine(settings, "worker", database, outbox, cast("Any", streams), NOBODY, lambda _: 10.0, on_end=on_end)


async def attempt_is_made() -> None:
    endings: list[Ending] = []
    outbox = Publisher(NOBODY, prefix="p", log_ttl=1, buffer_bytes=1, merge_above=1)
    streams = SimpleNamespace(run=fail_later, prompts=PromptSizes(), figures=Figures())
    told: list[Ending] = []
    engine = make_engine(endings, streams, outbox, lambda _, ending: told.append(ending))
    engine.start(claim_of(BAD))
    await until(lambda: not engine.active)
    (ending,) = endings
    assert ending.failure is not None
    assert (ending.status, ending.failure.code) == (JobStatus.FAILED, ErrorCode.INTERNAL)
    assert told == endings
    assert not engine.streams
    await outbox.close(timeout=0)


async def job_is_run() -> None:
    outbox: Any = SimpleNamespace(open=fail)
    endings: list[Ending] = []
    engine = make_engine(endings, SimpleNamespace(prompts=PromptSizes(), figures=Figures()), outbox, lambda *_: None)
    engine.start(claim_of(BAD))
    assert engine.streams == {TARGET: 1}
    await until(lambda: not engine.active)
    assert endings == [], "its row stays; the heartbeat gives the job back"
    assert not engine.streams, "its place is free"


# -- choice --


class Turns(Database):
    """A database in which nothing waits; what is asked meets defects at first."""

    def __init__(self, defects: int) -> None:
        super().__init__()
        self.defects = defects

    async def run(self, operation: Any, argument: Any) -> Any:
        await super().run(operation, argument)
        if self.defects:
            self.defects -= 1
            raise Defect
        if operation is store.look:
            return store.Looked(0.0, 1, "{}", {}, arrivals=0)
        return store.Turned((), {}, {}, 0.0, 1, "{}")

    persist = run


def make_chooser(turns: Any, work: Any = NOBODY) -> Chooser:
    """Return a chooser with one place."""
    return Chooser(Policy(), "worker", "completions", 1, 60.0, turns, work, set(), {}, fail, fail)


async def turn_is_taken() -> None:
    chooser = make_chooser(turns := Turns(defects=1))
    chooser.observe(charge_of(claim_of(GOOD)))
    chooser.start()
    chooser.wake()
    await until(lambda: len(turns.written) > 1)
    first, second = (turn.decider._observations for _, turn in turns.written[:2])
    assert first == second == [charge_of(claim_of(GOOD))], "what was not told is told again"
    await chooser.stop()


async def look_is_taken() -> None:
    chooser = make_chooser(turns := Turns(defects=1))
    chooser.nudged()
    await until(lambda: turns.written and not turns.defects)
    chooser.nudged()
    await until(lambda: len(turns.written) > 1)
    await until(lambda: chooser.known_turn == 1)
    await chooser.stop()


async def pick_is_begun() -> None:
    job = WaitingJob(1, BAD, 1, 1, 0, 10, None)
    chooser = make_chooser(NOBODY, Turns(defects=1))
    chooser.expected[BAD] += 1
    await chooser._begin([Pick(job, TARGET, 500)])
    assert chooser.free == 1, "its row says that it is ours; the heartbeat gives it back"


async def log_of_a_lost_attempt_is_read() -> None:
    recovery = Recovery(cast("Any", SimpleNamespace(xrange=fail_later)), "p", cast("Any", Database()))
    attempt: Any = SimpleNamespace(key=GOOD, claim=SimpleNamespace(attempt=2))
    assert await recovery.look_back(attempt) is None


# -- events --


class Link:
    """A link to Redis that takes everything."""

    alive = True

    def __init__(self) -> None:
        self.calls: list[bytes] = []

    async def call(self, commands: list[bytes], count: int) -> list[bytes]:
        self.calls += commands
        return [log_script.OK] * count

    def close(self) -> None:
        pass


def outbox_on(*links: Any) -> Publisher:
    """Return a publisher that connects by these links, one after the other."""
    made = iter(links)
    outbox = Publisher(NOBODY, prefix="p", log_ttl=1, buffer_bytes=1000, merge_above=10)

    async def connect() -> Any:
        outbox.epoch += 1
        return next(made)

    outbox._connect = connect  # type: ignore[method-assign]
    return outbox


async def events_are_flushed() -> None:
    outbox = outbox_on(SimpleNamespace(alive=True, call=fail_later, close=lambda: None), link := Link())
    publication = outbox.open("default", "good", 1, lambda: {"choices": []})
    publication.send("delta", {})
    assert await publication.wait_flushed(PATIENCE) is FlushResult.SENT
    assert b"snapshot" in link.calls[0]
    await outbox.close(timeout=0)


async def events_of_one_job_are_packed() -> None:
    outbox = outbox_on(link := Link())
    bad = outbox.open("default", "bad", 1, fail)
    good = outbox.open("default", "good", 1, dict)
    bad.send("delta", {})
    bad.needs_snapshot = True
    good.send("delta", {})
    assert await good.wait_flushed(PATIENCE) is FlushResult.SENT
    assert await bad.wait_flushed(PATIENCE) is FlushResult.PENDING, "the end is left to the sweeps"
    bad.send("job.completed", {})
    assert await bad.wait_flushed(PATIENCE) is FlushResult.PENDING
    assert len(link.calls) == 1
    await outbox.close(timeout=0)


async def answer_to_one_job_is_acted_on() -> None:
    class Cancelled(Link):
        async def call(self, commands: list[bytes], count: int) -> list[bytes]:
            await super().call(commands, count)
            return [log_script.CANCEL] * count

    outbox = outbox_on(Cancelled())
    publication = outbox.open("default", "bad", 1, dict, on_cancel=fail)
    publication.send("delta", {})
    assert await publication.wait_flushed(PATIENCE) is FlushResult.SENT
    await outbox.close(timeout=0)


# -- upkeep --


async def terminal_event_is_announced() -> None:
    announcer = Announcer()
    sweeper = Sweeper(load_settings({}), "worker", NOBODY, NOBODY, NOBODY, cast("Any", announcer), NOBODY, NOBODY)
    await sweeper._announce([BAD, GOOD])
    assert announcer.announced == [GOOD]


async def step_of_a_sweep_is_made() -> None:
    announcer, recorded = Announcer(), []

    class Found:
        async def run(self, operation: Any, _: Any) -> Any:
            if operation in (store.end_expired, store.find_late_arrivals):
                raise Defect
            found: dict[Any, Any] = {store.lead: True, store.find_unannounced: [GOOD], store.release_lost: []}
            return found.get(operation)

    async def record(limit: int) -> None:
        recorded.append(limit)

    async def tell() -> None:
        raise Defect

    other, report = SimpleNamespace(record=record), SimpleNamespace(tell=tell)
    heartbeat = SimpleNamespace(unbroken_for_a_lease=True, sweeper_free=True)
    chooser = SimpleNamespace(idle_times=dict, parks_beyond=False)
    parts: tuple[Any, ...] = ("worker", Found(), heartbeat, chooser, announcer, other, report)
    sweeper = Sweeper(load_settings({}), *parts)
    await sweeper._sweep()
    assert announcer.announced == [GOOD]
    assert recorded


async def heartbeat_is_given() -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 1:
            raise Defect
        if beats == 2:
            raise StoreUnavailableError("away")

    task = PeriodicTask("heartbeat", beat, 0.001, on_outage=fail)
    await until(lambda: beats > 2)
    await task.stop()


async def cancels_are_heard() -> None:
    class Redis:
        tries = 0

        def pubsub(self) -> Any:
            self.tries += 1
            raise Defect

    client = Redis()
    parts: tuple[Any, ...] = (client, "keepstream", "completions", NOBODY, NOBODY, NOBODY, NOBODY, NOBODY)
    listener = CancelListener(*parts)
    listener.start()
    await until(lambda: client.tries > 2)
    await listener.stop()


async def lost_ends_are_looked_for() -> None:
    engine = SimpleNamespace(active={})
    ends = SimpleNamespace(publish_again=fail)
    parts: tuple[Any, ...] = (NOBODY, "keepstream", "completions", NOBODY, engine, NOBODY, ends, NOBODY)
    listener = CancelListener(*parts)
    await listener._catch_up()
    assert listener._looking_for_ends is not None
    await listener._looking_for_ends


async def cancel_is_carried_out() -> None:
    async def requested(*_: object, **__: object) -> bytes:
        return b"1"

    stopped: list[tuple[JobKey, Stop]] = []
    engine = SimpleNamespace(request_stop=lambda *what: stopped.append(what))
    client = SimpleNamespace(set=requested, expire=requested)
    parts: tuple[Any, ...] = (client, "keepstream", "completions", Database(), engine, Announcer(), NOBODY, fail)
    await CancelListener(*parts)._cancel(BAD)
    assert stopped == [(BAD, Stop.CANCELLED)]


async def unreadable_message_is_recorded() -> None:
    records = [
        orjson.dumps({"id": name, "reason": "r", "size": 1, "payload": "", "task_id": None}) for name in ("bad", "good")
    ]

    async def lrange(*_: object) -> list[bytes]:
        return records

    removed: list[bytes] = []

    async def lrem(_list: str, _count: int, raw: bytes) -> None:
        removed.append(raw)

    database = Database(fails=lambda rejection: rejection.id == "bad")
    client: Any = SimpleNamespace(lrange=lrange, lrem=lrem)
    await UnreadableMessages(client, "p", cast("Any", database)).record(limit=10)
    assert removed == records
    assert [rejection.reason for _, rejection in database.written] == [
        "the record of an unreadable message met an internal error (Defect)",
        "r",
    ]


# -- the database's thread --


async def group_is_executed() -> None:
    database = WorkerDatabase(cast("Any", SimpleNamespace(dispose=lambda: None)))
    executed: list[str] = []

    def execute(group: list[Any]) -> Any:
        if not executed:
            executed.append("bad")
            raise Defect
        return [(request, "answer", None) for request in group]

    database._execute = execute  # type: ignore[method-assign]
    with pytest.raises(Defect):
        await database.run(cast("Any", NOBODY), 1)
    assert await database.run(cast("Any", NOBODY), 2) == "answer"
    await asyncio.to_thread(database.close)


# -- the pool --


class PooledService:
    """A service that fails in everything but the start and what it is given to do."""

    def __init__(self) -> None:
        self.delivered = threading.Event()

    async def start(self) -> None:
        pass

    async def deliver(self, delivery: Delivery) -> None:
        delivery.acknowledge()
        if delivery.task_id == "bad":
            raise Defect
        self.delivered.set()

    drain = force_stop = fail
    stop = fail_later


class Hub:
    """Celery's hub: calls at once, on the caller's thread."""

    def call_soon(self, function: Any, *args: Any) -> None:
        function(*args)


def in_pool(act: Callable[[LoopPool], None]) -> None:
    """Let ``act`` raise in a pool; it goes on delivering, and ends."""
    service = PooledService()
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    pool = LoopPool(limit=1, app=SimpleNamespace(loop_service=service, pulse=None))
    pool.on_start()
    pool.register_with_event_loop(Hub())
    act(pool)
    pool.on_apply(None, ("task", "good", {"args": [{}]}), {}, callback=fail, accept_callback=fail)
    assert service.delivered.wait(PATIENCE)
    pool.on_stop()
    worker_shutting_down.disconnect(pool._on_signal)
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)
    assert pool._loop.is_closed()


async def message_is_run_by_the_pool() -> None:
    def act(pool: LoopPool) -> None:
        pool.on_apply(None, ("task", "bad", {"args": [{}]}), {}, callback=fail, accept_callback=fail)

    await asyncio.to_thread(in_pool, act)


async def call_on_the_loop() -> None:
    await asyncio.to_thread(in_pool, lambda pool: pool._call_on_loop(fail))


async def sign_of_life_is_given() -> None:
    beats: list[int] = []
    again = threading.Event()

    def beat() -> None:
        beats.append(1)
        if len(beats) > 1:
            again.set()
        raise Defect

    def act(pool: LoopPool) -> None:
        pool._call_on_loop(lambda: pool._beat(cast("Any", SimpleNamespace(beat=beat))))
        assert again.wait(PATIENCE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "INTERVAL", 0.001)
        await asyncio.to_thread(in_pool, act)


async def signal_is_handled() -> None:
    await asyncio.to_thread(in_pool, lambda pool: pool._on_signal())


# -- the service's end --


async def service_is_stopped() -> None:
    service = Service(load_settings({}), {}, Policy())
    closed: list[str] = []

    def closing(name: str) -> Callable[..., Awaitable[None]]:
        async def close(**_: object) -> None:
            closed.append(name)
            raise Defect

        return close

    async def settle() -> None:
        pass

    service.worker_id = "worker"
    service.engine = cast("Any", SimpleNamespace(active={}, wait_for_announcements=closing("announcements")))
    for part in (
        "bookkeeper",
        "cancel_listener",
        "publisher",
        "sweeper",
        "chooser",
        "heartbeat",
        "providers",
        "client",
    ):
        ends = {name: closing(part) for name in ("stop", "close", "aclose")}
        others = {"pause": lambda: None, "settle": settle, "expected": ()}
        setattr(service, f"_{part}", SimpleNamespace(**ends, **others))

    def close_on_a_thread() -> None:
        closed.append("on a thread")
        raise Defect

    database = cast("Any", SimpleNamespace(close=close_on_a_thread))
    service._databases = (database, database, database, database)
    await service.stop()
    assert len(closed) == 13


# -- the supervisor --


async def process_is_looked_after() -> None:
    supervised = Supervisor(["true"], 1, {})
    starts: list[float] = []

    class Process:
        pid = 1

        def poll(self) -> int | None:
            if len(starts) == 2:
                raise Defect
            return None

        def send_signal(self, _: int) -> None:
            raise Defect

        def terminate(self) -> None:
            raise Defect

    def start(*_: Any, **__: Any) -> Any:
        starts.append(0.0)
        if len(starts) == 1:
            raise Defect
        return Process()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        slot = supervised._slots[0]
        for _ in range(3):
            slot.due = 0.0
            supervised._tend(slot)
        supervised._forward(signal.SIGTERM, None)
    assert len(starts) == 2
    assert supervised._stopping


class Place(NamedTuple):
    """Where a defect may be met."""

    event: str  #: In the log.
    met: Callable[[], Awaitable[None]]


PLACES: Final = [
    Place("message_defect", message_is_delivered),
    Place("message_defect", message_is_read),
    Place("message_defect", message_is_put_back),
    Place("broker_defect", messages_are_noted),
    Place("broker_defect", acknowledgements_are_sent),
    Place("broker_defect", messages_are_put_back_at_the_end),
    Place("broker_defect", old_messages_are_put_back),
    Place("broker_defect", unreadable_messages_are_handed_over),
    Place("broker_defect", answer_of_the_broker_is_read),
    Place("broker_defect", broker_is_asked),
    Place("job_defect", delivery_is_stored),
    Place("job_defect", job_is_run),
    Place("attempt_defect", attempt_is_made),
    Place("choice_defect", turn_is_taken),
    Place("choice_defect", look_is_taken),
    Place("claim_defect", pick_is_begun),
    Place("log_unreadable", log_of_a_lost_attempt_is_read),
    Place("publisher_defect", events_are_flushed),
    Place("events_defect", events_of_one_job_are_packed),
    Place("events_defect", answer_to_one_job_is_acted_on),
    Place("announcement_defect", terminal_event_is_announced),
    Place("upkeep_defect", step_of_a_sweep_is_made),
    Place("upkeep_defect", heartbeat_is_given),
    Place("cancel_listener_defect", cancels_are_heard),
    Place("lost_ends_defect", lost_ends_are_looked_for),
    Place("cancel_listener_defect", cancel_is_carried_out),
    Place("message_defect", unreadable_message_is_recorded),
    Place("database_defect", group_is_executed),
    Place("delivery_failed", message_is_run_by_the_pool),
    Place("pool_defect", message_is_run_by_the_pool),
    Place("loop_defect", call_on_the_loop),
    Place("loop_defect", signal_is_handled),
    Place("loop_defect", sign_of_life_is_given),
    Place("stop_defect", service_is_stopped),
    Place("supervisor_defect", process_is_looked_after),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.met.__name__}: {place.event}")
async def test_defect_fails_one_thing_and_is_logged_without_values(place: Place, log: io.StringIO) -> None:
    await place.met()
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line for line in lines if line["event"] == place.event]
    assert SECRET not in log.getvalue()
    if place.event != "log_unreadable":
        assert any("Defect" in line.get("exception", "") for line in lines if line["event"] == place.event)


def test_every_defect_in_the_log_has_a_place() -> None:
    from tests.unit.test_readme import GUIDE

    documented = {word for word in GUIDE.replace("|", " ").split() if word.strip("`").endswith("_defect")}
    assert {word.strip("`") for word in documented} == {
        place.event for place in PLACES if place.event.endswith("_defect")
    }
