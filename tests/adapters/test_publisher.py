"""The publisher on a real Redis: every event once and in order, whatever happens to the connection."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepstream.client.redis_url import parse_redis_url
from keepstream.events import Event, parse_event
from keepstream.names import EventId, job_keys, parse_event_id
from keepstream.transcript import Transcript
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from keepstream_worker.events.log_script import APPEND, HEAL, SCRIPT, SCRIPT_SHA, VERIFY
from keepstream_worker.events.publication import FlushResult, Publication
from keepstream_worker.events.publisher import Publisher
from keepstream_worker.events.redis_link import RedisLink, pack
from keepstream_worker.values import Delta
from tests.log_model import LogModel

KEYS = job_keys("default", "job-1")
BUFFER = 4096
MERGE_ABOVE = 16
PATIENCE = 60.0


@pytest.fixture
def server() -> Iterator[EmbeddedValkey]:
    """A Valkey that a test may harm; it comes back empty."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def client(server: EmbeddedValkey) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def make_publisher(server: EmbeddedValkey) -> Publisher:
    place = parse_redis_url(server.url)
    return Publisher(place, prefix="keepstream", log_ttl=60, buffer_bytes=BUFFER, merge_above=MERGE_ABOVE)


@pytest.fixture
async def publisher(server: EmbeddedValkey) -> AsyncIterator[Publisher]:
    publisher = make_publisher(server)
    yield publisher
    await publisher.close(timeout=0)


class Job:
    """An attempt of one job, and what it has produced."""

    def __init__(self, publisher: Publisher, attempt: int = 1, job_id: str = "job-1") -> None:
        self.text = ""
        self.fenced = 0
        self.cancelled = 0
        self.publication = publisher.open("default", job_id, attempt, self._snapshot, self._on_fenced, self._on_cancel)
        self.publication.send("attempt.started", {"model": "m", "provider": "p", "reason": "first"})

    def say(self, *pieces: str) -> None:
        """Publish one delta for each piece."""
        self.text += "".join(pieces)
        self.publication.send_deltas([Delta(0, {"content": piece}) for piece in pieces])

    def end(self) -> None:
        """Publish the terminal event."""
        self.publication.send("job.completed", end_of(self.text))

    async def is_sent(self) -> bool:
        """Wait until everything is in the log."""
        return await self.publication.wait_flushed(PATIENCE) is FlushResult.SENT

    def _snapshot(self) -> dict[str, Any]:
        return {"choices": [{"index": 0, "content": self.text}]}

    def _on_fenced(self) -> None:
        self.fenced += 1

    def _on_cancel(self) -> None:
        self.cancelled += 1


def end_of(text: str) -> dict[str, Any]:
    return {"status": "completed", "attempts": 1, "output_sha256": "0" * 64, "finish_reasons": {"0": "stop"}}


def log(client: "redis.Redis", job_id: str = "job-1") -> list[Event]:
    entries: Any = client.xrange(job_keys("default", job_id).log)
    for entry_id, fields in entries:
        assert parse_event(fields[b"event"]).id == entry_id.decode()
    return [parse_event(fields[b"event"]) for _, fields in entries]


def text_of(events: list[Event]) -> str:
    transcript = Transcript()
    for event in events:
        assert transcript.apply(event)
    return transcript.text


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
            await asyncio.sleep(0.01)


# -- the script --

calls = st.tuples(
    st.integers(1, 3),  # attempt
    st.integers(1, 6),  # n of the first event
    st.sampled_from([APPEND, VERIFY, HEAL]),
    st.integers(1, 3),  # events
)
schedules = st.lists(
    st.one_of(
        calls,
        calls,
        calls,
        st.sampled_from(["lose everything", "lose an entry", "cancel"]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedules)
def test_script_behaves_like_its_model(redis_url: str, schedule: list[Any]) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        client.script_load(SCRIPT)
        model = LogModel()
        with client.pubsub() as pubsub:
            pubsub.subscribe(KEYS.channel)
            assert pubsub.get_message(timeout=PATIENCE) is not None
            for step in schedule:
                match step:
                    case "lose everything":
                        client.delete(KEYS.log)
                        model.lose(len(model.log))
                    case "lose an entry":  # as a replica that was behind; the stream's own last id goes back with it
                        keep = [(str(here), {"event": event}) for here, event in model.log[:-1]]
                        client.delete(KEYS.log)
                        for entry_id, fields in keep:
                            client.xadd(KEYS.log, fields, entry_id)
                        model.lose(1)
                    case "cancel":
                        client.set(KEYS.cancel, 1)
                        model.cancelled = True
                    case attempt, n, mode, count:
                        events = [b"%d-%d" % (attempt, n + number) for number in range(count)]
                        arguments = [KEYS.log, KEYS.channel, KEYS.cancel, attempt, n, 60_000, mode, *events]
                        command = pack(b"EVALSHA", SCRIPT_SHA, 3, *map(_packable, arguments))
                        assert client.evalsha(SCRIPT_SHA.decode(), 3, *arguments) == model.execute(command)
                entries: Any = client.xrange(KEYS.log)
                assert [(parse_event_id(i.decode()), f[b"event"]) for i, f in entries] == model.log
            heard = [pubsub.get_message(timeout=PATIENCE) for _ in model.heard]
            assert [message and message["data"] for message in heard] == model.heard


def _packable(value: Any) -> bytes | str | int:
    return value if isinstance(value, bytes | str | int) else str(value)


# -- on a healthy Redis --


async def test_every_delta_is_its_own_event_in_log_and_channel(publisher: Publisher, client: "redis.Redis") -> None:
    with client.pubsub() as pubsub:
        pubsub.subscribe(KEYS.channel)
        pubsub.get_message(timeout=PATIENCE)
        job = Job(publisher)
        for number in range(30):
            job.say(f"word{number} ")
            assert await job.is_sent()
        job.end()
        assert await job.is_sent()
        messages = [pubsub.get_message(timeout=PATIENCE) for _ in range(32)]
    events = log(client)
    assert [event.id for event in events] == [f"1-{n}" for n in range(1, 33)]
    assert [parse_event(message["data"]) for message in messages if message] == events
    assert text_of(events) == job.text


async def test_what_arrives_during_a_flush_goes_out_together_and_in_order(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    jobs = [Job(publisher, job_id=f"job-{number}") for number in range(20)]
    for number in range(1000):
        jobs[number % 20].say(f"{number} ")
    for job in jobs:
        assert await job.is_sent()
    for number, job in enumerate(jobs):
        assert text_of(log(client, f"job-{number}")) == job.text


async def test_neighbours_of_one_kind_are_merged_under_pressure(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    job.say(*(f"{number} " for number in range(500)))
    assert await job.is_sent()
    events = log(client)
    assert len(events) == 2
    assert text_of(events) == job.text


async def test_log_lives_for_its_time_after_the_last_event(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    assert await job.is_sent()
    client.pexpire(KEYS.log, 1000)
    job.say("more")
    assert await job.is_sent()
    assert 1000 < int(client.pttl(KEYS.log)) <= 60_000


# -- fences --


async def test_older_attempt_is_fenced_by_the_newer_ones_first_event(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    old = Job(publisher, attempt=1)
    old.say("old ")
    assert await old.is_sent()
    new = Job(publisher, attempt=2)
    assert await new.is_sent()
    for _ in range(3):
        old.say("too late ")
        assert await old.publication.wait_flushed(PATIENCE) is FlushResult.FENCED
    assert old.fenced == 1, "called once"
    new.say("new")
    assert await new.is_sent()
    assert [event.id for event in log(client)] == ["1-1", "1-2", "2-1", "2-2"]


async def test_older_attempt_is_fenced_after_a_lost_connection_too(publisher: Publisher, client: "redis.Redis") -> None:
    old, other = Job(publisher, attempt=1), Job(publisher, job_id="other")
    assert await old.is_sent()
    client.xadd(KEYS.log, {"event": "{}"}, "2-1")
    client.client_kill_filter(_type="normal", skipme=True)
    old.say("too late")
    other.say("in time")
    assert await old.publication.wait_flushed(PATIENCE) is FlushResult.FENCED
    assert await other.is_sent()
    assert old.fenced == 1


async def test_attempt_that_was_overtaken_before_its_first_event_is_fenced(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    client.xadd(KEYS.log, {"event": "{}"}, "2-1")
    old = Job(publisher, attempt=1)
    assert await old.publication.wait_flushed(PATIENCE) is FlushResult.FENCED


async def test_request_to_cancel_is_met_at_the_first_event(publisher: Publisher, client: "redis.Redis") -> None:
    client.set(KEYS.cancel, 1)
    job = Job(publisher)
    assert await job.is_sent()
    assert job.cancelled == 1


async def test_request_to_cancel_is_met_after_a_lost_connection(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    assert await job.is_sent()
    assert job.cancelled == 0
    client.set(KEYS.cancel, 1)
    client.client_kill_filter(_type="normal", skipme=True)
    job.say("more")
    assert await job.is_sent()
    assert job.cancelled >= 1


# -- outages --


async def test_lost_connections_lose_and_double_nothing(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    for number in range(200):
        job.say(f"{number} ")
        if number % 20 == 0:
            client.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.001)
    job.end()
    assert await job.is_sent()
    events = log(client)
    assert text_of(events) == job.text
    assert [event.type for event in events].count("job.completed") == 1


async def test_emptied_redis_is_healed_by_one_snapshot(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    job.say("one ", "two ")
    assert await job.is_sent()
    client.flushall()
    job.say("three ")
    assert await job.is_sent()
    job.say("four")
    assert await job.is_sent()
    assert [(event.id, event.type) for event in log(client)] == [("1-4", "snapshot"), ("1-5", "delta")]
    assert text_of(log(client)) == "one two three four"


async def test_redis_away_costs_little_memory_and_one_snapshot(
    publisher: Publisher, server: EmbeddedValkey, client: "redis.Redis"
) -> None:
    job = Job(publisher)
    assert await job.is_sent()
    server.kill()
    for number in range(2000):
        job.say(f"{number} ")
        if number % 100 == 0:
            await asyncio.sleep(0.02)
    await until(lambda: job.publication._pending_bytes <= BUFFER)
    assert await job.publication.wait_flushed(0.01) is FlushResult.PENDING
    server.start()
    job.end()
    assert await job.is_sent()
    assert [event.type for event in log(client)][-2:] == ["snapshot", "job.completed"]
    assert text_of(log(client)) == job.text


@pytest.mark.slow
async def test_frozen_redis_gets_everything_once_when_it_thaws(
    publisher: Publisher, server: EmbeddedValkey, client: "redis.Redis"
) -> None:
    job = Job(publisher)
    assert await job.is_sent()
    server.freeze()
    for number in range(50):
        job.say(f"{number} ")
        await asyncio.sleep(0)
    await until(lambda: not publisher.connected)
    server.thaw()
    job.end()
    assert await job.is_sent()
    assert text_of(log(client)) == job.text


async def test_full_redis_is_waited_for(publisher: Publisher, client: "redis.Redis") -> None:
    client.config_set("maxmemory", 1)
    job = Job(publisher)
    job.say("one ")
    assert await job.publication.wait_flushed(0.3) is FlushResult.PENDING
    client.config_set("maxmemory", 0)
    assert await job.is_sent()
    assert text_of(log(client)) == "one "


async def test_forgotten_script_is_loaded_again(publisher: Publisher, client: "redis.Redis") -> None:
    job = Job(publisher)
    assert await job.is_sent()
    client.script_flush()
    job.say("one ")
    assert await job.is_sent()
    assert text_of(log(client)) == "one "


async def test_spoiled_log_of_one_job_holds_up_no_other(publisher: Publisher, client: "redis.Redis") -> None:
    client.set(KEYS.log, "not a stream")
    spoiled = Job(publisher)
    healthy = Job(publisher, job_id="healthy")
    for number in range(10):
        spoiled.say("lost ")
        healthy.say(f"{number} ")
        assert await healthy.is_sent()
    assert text_of(log(client, "healthy")) == healthy.text
    assert await spoiled.publication.wait_flushed(0.01) is FlushResult.PENDING
    client.delete(KEYS.log)
    assert await spoiled.is_sent()
    assert text_of(log(client)) == spoiled.text


async def test_what_is_discarded_while_redis_is_away_is_not_sent_when_it_is_back(
    publisher: Publisher, server: EmbeddedValkey, client: "redis.Redis"
) -> None:
    server.kill()
    discarded, kept = Job(publisher, job_id="discarded"), Job(publisher)
    assert await discarded.publication.wait_flushed(0.2) is FlushResult.PENDING
    discarded.publication.discard()
    server.start()
    assert await kept.is_sent()
    assert log(client, "discarded") == []


async def test_what_is_discarded_during_a_flush_that_fails_stays_discarded(
    publisher: Publisher, server: EmbeddedValkey, client: "redis.Redis"
) -> None:
    discarded, kept = Job(publisher, job_id="discarded"), Job(publisher)
    assert await discarded.is_sent()
    server.freeze()
    discarded.say("word ")
    await until(lambda: publisher._in_flight)
    discarded.publication.needs_snapshot = True  # it would take the id of the end, which the sweeps will publish
    discarded.end()
    discarded.publication.discard()
    server.kill()
    server.start()
    kept.say("more ")
    assert await kept.is_sent()
    assert log(client, "discarded") == []


# -- announcing again --


def announce(publisher: Publisher, terminal: EventId, text: str) -> Publication:
    """Publish a terminal event that somebody else may have published, as the announcer does."""
    publication = publisher.resume(
        "default",
        "job-1",
        terminal.attempt,
        terminal.n - 1,
        lambda: {"choices": [{"index": 0, "content": text}], "finished": True},
    )
    publication.send("job.completed", end_of(text))
    return publication


async def test_terminal_event_is_in_the_log_once_however_often_it_is_announced(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    job = Job(publisher)
    job.say("one ")
    job.end()
    assert await job.is_sent()
    for _ in range(3):
        assert await announce(publisher, EventId(1, 3), job.text).wait_flushed(PATIENCE) is FlushResult.SENT
    assert [event.id for event in log(client)] == ["1-1", "1-2", "1-3"]


async def test_announcement_is_preceded_by_a_snapshot_where_the_log_lacks_what_led_to_it(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    assert await announce(publisher, EventId(2, 40), "the output").wait_flushed(PATIENCE) is FlushResult.SENT
    assert [(event.id, event.type) for event in log(client)] == [("2-39", "snapshot"), ("2-40", "job.completed")]
    assert text_of(log(client)) == "the output"


async def test_terminal_event_of_a_job_without_output_needs_no_snapshot(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    assert await announce(publisher, EventId(1, 1), "").wait_flushed(PATIENCE) is FlushResult.SENT
    assert [(event.id, event.type) for event in log(client)] == [("1-1", "job.completed")]


async def test_announcer_and_worker_at_the_same_time_end_the_log_once(
    publisher: Publisher, client: "redis.Redis"
) -> None:
    for number in range(50):
        client.flushall()
        job = Job(publisher)
        job.say("one ", "two ")
        if number % 2:
            assert await job.is_sent()
        job.end()
        announcement = announce(publisher, EventId(1, 4), job.text)
        assert await job.is_sent()
        assert await announcement.wait_flushed(PATIENCE) is FlushResult.SENT
        assert text_of(log(client)) == "one two "
        assert [event.id for event in log(client)][-1] == "1-4"


# -- the end --


async def test_closing_sends_what_is_pending_and_never_hangs(server: EmbeddedValkey, client: "redis.Redis") -> None:
    for number in range(100):
        publisher = make_publisher(server)
        job = Job(publisher, job_id=f"job-{number}")
        assert await job.is_sent()
        job.say("the last ", "words")
        for _ in range(number % 5):  # so that the end meets the flush in each of its moments
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await publisher.close(timeout=3)
        assert text_of(log(client, f"job-{number}")) == "the last words"


async def test_healing_many_large_outputs_goes_in_steps(
    server: EmbeddedValkey, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step encodes a bounded number of bytes, between which the event loop does other work."""
    publisher = make_publisher(server)
    jobs = [Job(publisher, job_id=f"job-{number}") for number in range(24)]
    for job in jobs:
        assert await job.is_sent()
    server.kill()
    for job in jobs:
        job.say("x" * 500_000)
    flushed: list[int] = []
    call = RedisLink.call

    async def recording(link: RedisLink, commands: list[bytes], answers: int) -> Any:
        flushed.append(sum(map(len, commands)))
        return await call(link, commands, answers)

    monkeypatch.setattr(RedisLink, "call", recording)
    server.start()
    for job in jobs:
        job.end()
        assert await job.is_sent()
    assert max(flushed) < 2 * 1024 * 1024
    for number, job in enumerate(jobs):
        assert text_of(log(client, f"job-{number}")) == job.text
    await publisher.close(timeout=0)
