"""The transport on a real Redis, and on one that answers what no Redis would: no message is lost or logged."""

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import orjson
import pytest
import redis
import structlog
from kombu import Connection, Queue  # type: ignore[attr-defined]  # loaded when they are first used

from keepstream.client.redis_url import parse_redis_url
from keepstream.client.sender import celery_message
from keepstream.names import rejected_list
from keepstream_worker.dev_stack.embedded import EmbeddedValkey
from keepstream_worker.intake import transport
from keepstream_worker.intake.transport import FilteringChannel, FilteringTransport

QUEUE: Final = "completions"
PROMPT: Final = "the prompt of a customer"
PATIENCE: Final = 60.0


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_PAUSE", 0.05)


@contextmanager
def consumer(url: str, receive: Callable[[Any, Any], None] = lambda *_: None, **options: Any) -> Iterator[Connection]:
    """A connection that takes messages by our transport and hands them to ``receive``."""
    server = parse_redis_url(url)
    options |= {"server": server, "capacity": 10, "rejected_prefix": "keepstream", "priority_steps": [0]}
    with Connection(url, transport=FilteringTransport, transport_options=options) as connection:
        channel: FilteringChannel = connection.default_channel
        with connection.Consumer([Queue(QUEUE, channel=channel)], callbacks=[receive], accept=["json"]):
            yield connection


def turn(connection: Connection, until: Callable[[], object]) -> None:
    """Let the transport work until something is the case."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        try:
            connection.drain_events(timeout=0.2)
        except TimeoutError:
            continue


def send(client: "redis.Redis", *job_ids: str) -> None:
    for job_id in job_ids:
        request = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        client.lpush(QUEUE, celery_message({"v": 2, "id": job_id, "request": request}, QUEUE, "a test"))


@pytest.fixture
def client(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_message_whose_handling_meets_a_defect_is_set_aside_and_the_next_is_delivered(
    client: "redis.Redis", redis_url: str
) -> None:
    received: list[str] = []

    def receive(_body: Any, message: Any) -> None:
        received.append(message.headers["id"])
        if message.headers["id"] == "bad":
            raise LookupError(PROMPT)

    send(client, "bad", "good")
    with consumer(redis_url, receive) as connection, structlog.testing.capture_logs() as said:
        turn(connection, lambda: received == ["bad", "good"])
        turn(connection, lambda: client.llen(rejected_list("keepstream")))
    (record,) = client.lrange(rejected_list("keepstream"), 0, -1)
    assert orjson.loads(record)["task_id"] == "bad"
    assert [line["event"] for line in said] == ["message_defect"]
    assert client.lrange(QUEUE, 0, -1), "the other was not acknowledged, so it is put back"


def test_message_that_redis_refuses_to_take_back_is_not_set_aside(client: "redis.Redis", redis_url: str) -> None:
    client.set("unacked_index", "in the way")
    with consumer(redis_url, lambda *_: None) as connection, structlog.testing.capture_logs() as said:
        connection.transport._callbacks.clear()  # nobody takes messages any more: the worker stops
        send(client, "one")
        turn(connection, lambda: any(line.get("waiting_to") == "take messages" for line in said))
        client.delete("unacked_index")
    assert "message_defect" not in [line["event"] for line in said]
    assert not client.llen(rejected_list("keepstream"))
    assert client.llen(QUEUE), "once more, perhaps: its job is found claimed then"


def test_what_redis_refused_to_note_is_put_back_when_the_channel_closes(client: "redis.Redis", redis_url: str) -> None:
    received: list[str] = []
    client.set("unacked", "in the way")  # the notes cannot be written
    send(client, "one", "two")
    with consumer(redis_url, lambda _, message: received.append(message.headers["id"])) as connection:
        turn(connection, lambda: len(received) == 2)
        assert client.llen(QUEUE) == 0
    assert client.llen(QUEUE) == 2


def test_what_redis_refused_to_note_is_noted_when_it_can_be(client: "redis.Redis", redis_url: str) -> None:
    received: list[str] = []
    client.set("unacked", "in the way")
    send(client, "one")
    with consumer(redis_url, lambda _, message: received.append(message.headers["id"])) as connection:
        turn(connection, lambda: received)
        client.delete("unacked")
        turn(connection, lambda: client.hlen("unacked"))
        (entry,) = client.hvals("unacked")
        assert orjson.loads(entry)[1:] == ["", QUEUE], "it comes back to its queue, whatever its sender named"


def test_message_that_cannot_be_put_back_is_neither_lost_nor_logged(
    client: "redis.Redis", redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    received: list[str] = []
    send(client, "one")
    with consumer(redis_url, lambda _, message: received.append(message.headers["id"])) as connection:
        turn(connection, lambda: received)
        client.set(QUEUE, "in the way")
    assert client.hlen("unacked") == 1, "another worker puts it back later"
    assert PROMPT not in "".join(capfd.readouterr())


def test_silent_redis_does_not_keep_the_end_waiting_for_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_PUT_BACK_WITHIN", 0.1)
    tried: list[Any] = []
    put_back = FilteringChannel._restore

    def count(channel: FilteringChannel, message: Any, **options: Any) -> None:
        tried.append(message)
        put_back(channel, message, **options)

    monkeypatch.setattr(FilteringChannel, "_restore", count)
    received: list[Any] = []
    with EmbeddedValkey() as server:
        with redis.Redis.from_url(server.url) as client:
            send(client, *(f"job-{number}" for number in range(8)))
        with consumer(server.url, lambda _, message: received.append(message), socket_timeout=2.0) as connection:
            turn(connection, lambda: len(received) == 8)
            server.freeze()
        server.thaw()
    assert len(tried) == 1


def test_old_entry_that_is_no_message_is_set_aside_and_the_next_is_put_back(
    client: "redis.Redis", redis_url: str
) -> None:
    client.hset("unacked", mapping={"bad": b"garbage", "good": orjson.dumps([{"properties": {}}, "", QUEUE])})
    client.zadd("unacked_index", {"bad": 2, "good": 1})
    with consumer(redis_url) as connection:
        connection.default_channel.qos.restore_visible(num=10, interval=1)
        assert client.hkeys("unacked") == []
        turn(connection, lambda: client.llen(rejected_list("keepstream")) == 2)  # the good one was no message either


def test_no_more_is_taken_while_many_bytes_are_not_stored_yet(
    client: "redis.Redis", redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(client, *(f"job-{number}" for number in range(6)))
    (item,) = client.lrange(QUEUE, 0, 0)
    size = len(orjson.loads(item)["body"])
    monkeypatch.setattr(transport, "_TAKEN_AT_ONCE", 1)
    monkeypatch.setattr(transport, "_MOST_HELD", int(2.5 * size))
    received: list[Any] = []
    with consumer(redis_url, lambda _, message: received.append(message)) as connection:
        turn(connection, lambda: len(received) == 3)
        asked: list[bool] = []
        begin = FilteringChannel._brpop_start

        def ask(*some: Any) -> None:
            asked.append(True)
            begin(*some)

        monkeypatch.setattr(FilteringChannel, "_brpop_start", ask)
        turn(connection, lambda: len(asked) > 2)
        assert len(received) == 3, "the others are left to other workers"
        assert client.llen(QUEUE) == 3
        qos = connection.default_channel.qos
        assert qos.held == 3 * size
        for message in received[:2]:
            message.ack()
        turn(connection, lambda: len(received) == 5)
        for message in received[2:]:
            message.ack()
        turn(connection, lambda: len(received) == 6)
        received[-1].ack()
        assert qos.held == 0


class OddRedis(socketserver.ThreadingTCPServer):
    """Answers BLMPOP with what no Redis would, and lets another Redis answer all else."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, answer: bytes) -> None:
        self.port = port
        self.answer = answer
        self.asked = 0
        super().__init__(("127.0.0.1", 0), OddRequests)


class OddRequests(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: Any = self.server
        with socket.create_connection(("127.0.0.1", server.port)) as real:
            threading.Thread(target=self._relay, args=(real,), daemon=True).start()
            while line := self.rfile.readline():
                raw = line
                for _ in range(int(line[1:])):
                    size = self.rfile.readline()
                    raw += size + self.rfile.read(int(size[1:]) + 2)
                if b"BLMPOP" in raw:
                    server.asked += 1
                    self.wfile.write(server.answer)
                else:
                    real.sendall(raw)

    def _relay(self, real: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while piece := real.recv(65_536):
                self.wfile.write(piece)


@pytest.mark.parametrize(
    "answer",
    [b":7\r\n", b"+OK\r\n", b"*1\r\n$1\r\nx\r\n", b"*2\r\n:1\r\n:2\r\n", b"?what\r\n", b"-MOVED here\r\n", b"-\r\n"],
)
def test_answer_that_makes_no_sense_ends_nothing(valkey: EmbeddedValkey, answer: bytes) -> None:
    with OddRedis(valkey.port, answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with consumer(f"redis://127.0.0.1:{server.server_address[1]}/0") as connection:
            turn(connection, lambda: server.asked > 2)
        server.shutdown()
