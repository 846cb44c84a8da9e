"""The native stream of a gateway, live: what comes goes to the reader's connection where it arrives, and in order."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import sqlalchemy as sa
import uvicorn

from keepstream import Client, tables
from keepstream.client import api_keys
from keepstream.events import parse_head
from keepstream.names import Right, job_keys
from keepstream_gateway.app import make_app
from keepstream_gateway.native import routes
from keepstream_gateway.server import _Protocol
from keepstream_gateway.settings import load_settings
from keepstream_gateway.streaming import Shortcut
from tests import live_join
from tests.cluster import wait_until
from tests.event_texts import JOB_ID, delta, ended, started
from tests.http_streams import HttpStream

KEYS = job_keys("default", JOB_ID)


class CountedShortcut(Shortcut):
    """Keeps what has taken it."""

    taken: list[bytes]

    def __setattr__(self, name: str, value: Any) -> None:
        def write(sent: bytes) -> bool:
            is_taken: bool = value(sent)
            if is_taken:
                CountedShortcut.taken.append(sent)
            return is_taken

        super().__setattr__(name, write)


@pytest.fixture
def stream(redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStream]:
    """A stream of a job whose first event is in its log."""
    engine = sa.create_engine(database_url)
    tables.metadata.create_all(engine)
    with engine.begin() as connection:
        key = api_keys.create(connection, "default", "test", frozenset({Right.API}))[1]
    engine.dispose()
    with Client(redis_url, database_url=database_url) as client:
        client.enqueue(model="m", messages=[{"role": "user", "content": "Hello"}], id=JOB_ID)
    publish(redis_url, started("1-1"))
    CountedShortcut.taken = []
    monkeypatch.setattr(routes, "Shortcut", CountedShortcut)
    app, _ = make_app(load_settings({}, redis_url=redis_url, database_url=database_url))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=_Protocol, ws="none", log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server")
    port = server.servers[0].sockets[0].getsockname()[1]
    with HttpStream(port, f"/api/jobs/{JOB_ID}/events", {"Authorization": f"Bearer {key}"}) as stream:
        stream.read_until(b"id: 1-1\n")
        yield stream
    server.should_exit = True
    thread.join(60)


def publish(redis_url: str, *events: str) -> None:
    with redis.Redis.from_url(redis_url) as log:
        for text in events:
            log.eval(live_join.APPEND, 2, KEYS.log, KEYS.channel, parse_head(text)[0], text)


def publish_until_one_is_taken(stream: HttpStream, redis_url: str, first: int) -> int:
    """Publish deltas, each when the reader has those before it, until one takes the shortcut; return its number.

    One that comes while the stream looks into the log, as it does in a silence, does not.
    """
    for n in range(first, first + 100):
        publish(redis_url, delta(f"1-{n}", "x"))
        stream.read_until(b"id: 1-%d\n" % n)
        if any(b"id: 1-%d\n" % n in taken for taken in CountedShortcut.taken):
            return n
    pytest.fail("none has taken the shortcut")


def assert_whole(stream: HttpStream, redis_url: str, last: int) -> None:
    publish(redis_url, ended(f"1-{last}", "completed", "x"))
    assert stream.read_to_the_end()
    ids = [line for line in stream.received.split(b"\n") if line.startswith(b"id: ")]
    assert ids == [b"id: 1-%d" % n for n in range(1, last + 1)]
    assert stream.received.startswith(b"retry: 1000\nid: 1-1\n")


def test_live_events_wake_no_task(stream: HttpStream, redis_url: str) -> None:
    n = publish_until_one_is_taken(stream, redis_url, 2)
    publish(redis_url, *(delta(f"1-{n + more}", "x") for more in range(1, 100)))
    assert_whole(stream, redis_url, n + 100)


def test_after_an_event_that_is_lost_on_the_way_they_go_on_so(stream: HttpStream, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as log:
        log.xadd(KEYS.log, {"event": delta("1-2", "x")}, id="1-2")  # and not published
    n = publish_until_one_is_taken(stream, redis_url, 3)
    assert_whole(stream, redis_url, n + 1)
