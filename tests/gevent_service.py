"""A service on gevent that uses a client in greenlets; run by ``tests/adapters/test_gevent.py``.

In: Redis and a migrated database, by the client's own variables.
Out: one line of JSON with what was seen.
"""

# ruff: noqa: E402, T201  # what is patched has to be patched first
from gevent import monkey

monkey.patch_all()

import contextlib
import json
import os
from typing import Any

import gevent
import gevent.pool
from sqlalchemy import text

from keepstream import AsyncClient, Client, KeepstreamError

GREENLETS = 30
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def ticks_during(work: Any) -> int:
    """Return how often another greenlet got its turn while ``work`` went on."""
    count = 0

    def tick() -> None:
        nonlocal count
        while True:
            gevent.sleep(0.01)
            count += 1

    ticker = gevent.spawn(tick)
    try:
        gevent.spawn(work).get()
    finally:
        ticker.kill()
    return count


def use(client: Client, n: int) -> str:
    """Enqueue, get, list, follow and cancel; return what went wrong, or nothing."""
    try:
        job_id = client.enqueue(REQUEST, metadata={"n": n})
        found = client.get(job_id)
        assert found is not None
        assert found.metadata == {"n": n}
        assert client.list(limit=1)
        following = gevent.spawn(lambda: [event.type for event in client.follow(job_id, timeout=60)])
        gevent.sleep(0.1)
        assert client.cancel(job_id) == "cancelled"
        types = following.get()
        assert types == ["job.cancelled"], types
    except (AssertionError, KeepstreamError) as error:
        return repr(error)
    return ""


def main() -> None:
    """Use the client in all ways, and print what was seen."""
    client = Client.from_env()
    assert client._database is not None
    database = client._database

    def wait_for_the_database() -> None:
        with database.transaction() as connection:
            connection.execute(text("SELECT pg_sleep(1)"))

    def wait_for_redis() -> None:
        with contextlib.suppress(KeepstreamError):
            list(client.follow("there-is-none", timeout=1))

    seen = {
        "wrong": [answer for answer in gevent.pool.Pool(GREENLETS).map(lambda n: use(client, n), range(60)) if answer],
        "ticks during a slow statement": ticks_during(wait_for_the_database),
        "ticks while following": ticks_during(wait_for_redis),
    }
    child = os.fork()
    if child == 0:
        os._exit(1 if use(client, -1) else 0)
    seen["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        AsyncClient.from_env()
        seen["async"] = "made"
    except KeepstreamError as error:
        seen["async"] = str(error)
    client.close()
    print(json.dumps(seen))
