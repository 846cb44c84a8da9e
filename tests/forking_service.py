"""A service that forks while it uses its clients, in all orders; run by ``tests/adapters/test_forks.py``.

In: the name of a scenario; Redis and a migrated database, by the client's own variables.
Out: one line of JSON with what parent and children found wrong, which is to be nothing, and what they counted.
"""

import asyncio
import atexit
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import text

from keepstream import AsyncClient, Client, KeepstreamError

JOBS: Final = 20
CALLS: Final = 40  #: Of ``get`` by each process, where many are at work at once.
CHILDREN: Final = 8
T = TypeVar("T")
REQUEST: Final = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PATIENCE: Final = 60.0  #: Seconds for a child; one that hangs is an error.

#: Made at import, as services do, and inherited or made anew by children of every kind.
CLIENT: Final = Client.from_env() if "KEEPSTREAM_REDIS_URL" in os.environ else None
if CLIENT is not None:
    atexit.register(CLIENT.close)


def make_jobs(client: Client) -> dict[str, int]:
    """Enqueue jobs that can be told apart."""
    return {client.enqueue(REQUEST, metadata={"n": n}): n for n in range(JOBS)}


def mistakes(client: Client, jobs: dict[str, int], calls: int = 20) -> list[str]:
    """Use a client's methods, and return what was wrong about their answers."""
    wrong = []
    ids = list(jobs)
    for call in range(calls):
        asked = ids[call % len(ids)]
        try:
            found = client.get(asked)
            if found is None or (found.id, found.metadata) != (asked, {"n": jobs[asked]}):
                wrong.append(f"get answered {found and found.id} for {asked}")
            if call % 50 == 0:
                made = client.enqueue(REQUEST, metadata={"by": os.getpid()})
                if client.cancel(made) != "cancelled":
                    wrong.append("a waiting job was not cancelled")
                if made not in {summary.id for summary in client.list(limit=500)}:
                    wrong.append("a new job is not in the list")
        except KeepstreamError as error:
            wrong.append(f"{type(error).__name__}: {error}")
    return wrong


def in_child(work: Callable[[], T]) -> Callable[[], T]:
    """Do ``work`` in a forked child; return a function that waits for what it returned."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            answer: Any = work()
        except BaseException:  # noqa: BLE001  # a child that went on would be a second test
            answer = [traceback.format_exc()]
        os.write(writable, json.dumps(answer).encode())
        os._exit(0)
    os.close(writable)

    def wait() -> T:
        with ThreadPoolExecutor(1) as reader, open(readable, "rb") as pipe:  # noqa: PTH123
            answer = reader.submit(pipe.read)
            try:
                found: T = json.loads(answer.result(PATIENCE))
                return found
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                raise
            finally:
                os.waitpid(child, 0)

    return wait


def used_before(client: Client) -> list[str]:
    """Fork while connections lie idle in the pools, then use the client in parent and children at once."""
    jobs = make_jobs(client)
    with ThreadPoolExecutor(5) as threads:  # as many connections
        answers = threads.map(lambda _: mistakes(client, jobs, 10), range(5))
    wrong = [problem for found in answers for problem in found]
    children = [in_child(partial(mistakes, client, jobs, CALLS)) for _ in range(CHILDREN // 2)]
    wrong += mistakes(client, jobs, CALLS)
    for wait in children:
        wrong += wait()
    return wrong + mistakes(client, jobs)


def used_in_threads(client: Client) -> list[str]:
    """Fork again and again while threads use the client in the parent."""
    jobs = make_jobs(client)
    wrong: list[str] = []
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            wrong.extend(mistakes(client, jobs, 20))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(CHILDREN // 2):
        children = [in_child(partial(mistakes, client, jobs, CALLS)) for _ in range(2)]
        for wait in children:
            wrong += wait()
    stop.set()
    for thread in threads:
        thread.join()
    return wrong + mistakes(client, jobs)


def in_every_order(client: Client) -> list[str]:
    """Fork with a client that was made before, used before, and used after; in a child's child; and not at all."""
    wrong: list[str] = in_child(lambda: mistakes(client, make_jobs(client)))()  # made before
    jobs = make_jobs(client)  # used before

    def grandchild() -> list[str]:
        return mistakes(client, jobs, 5) + in_child(lambda: mistakes(client, jobs))() + mistakes(client, jobs, 5)

    def child() -> list[str]:
        return in_child(partial(mistakes, client, jobs))()

    wrong += in_child(grandchild)()
    wrong += in_child(child)()  # not used in between
    wrong += in_child(lambda: mistakes(Client.from_env(), jobs))()  # made after
    return wrong + mistakes(client, jobs)


def held_locks(client: Client) -> list[str]:
    """Fork while another thread holds every lock of the client's, and of the pools below it."""
    jobs = make_jobs(client)
    engine: Any = client._database._engine.get()  # type: ignore[union-attr]
    parts: Any = [client._redis._links, client._sender._connections, client._database._engine]  # type: ignore[union-attr]
    pools = [client._redis._links.get().commands.connection_pool, client._sender._connections.get().connection_pool]
    locks = [part._lock for part in parts] + [
        client._gate._changed,
        engine.pool._pool.mutex,
        engine.pool._overflow_lock,
    ]
    locks += [pool.pool.mutex for pool in pools] + [pool._fork_lock for pool in pools]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        release.wait()
        for lock in locks:
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    wait = in_child(lambda: mistakes(client, jobs))
    wrong: list[str] = wait()
    release.set()
    holder.join()
    return wrong + mistakes(client, jobs)


def connections(client: Client) -> list[int]:
    """Return which session of each server answers."""
    assert client._database is not None
    with client._database.transaction() as connection:
        session = connection.scalar(text("SELECT pg_backend_pid()"))
    pools = (client._redis._links.get().commands, client._sender._connections.get())
    return [int(session), *(int(pool.client_id()) for pool in pools)]


def own_connections(client: Client) -> list[str]:
    """See that a child has connections of its own, and leaves its parent's open."""
    before = connections(client)
    child = in_child(lambda: connections(client))()
    wrong = [f"the child shares {shared}" for shared in {*before} & {*child}]
    after = connections(client)
    return wrong if after == before else [*wrong, f"the parent's connections {before} are now {after}"]


def iterating(client: Client) -> list[str]:
    """Begin to follow, fork, and go on in both; a publisher adds an event when it is told to."""
    job = os.environ["FOLLOWED_JOB"]
    follower = client.follow(job)
    first = next(follower).id

    def rest() -> list[str]:
        return [event.id for event in follower]

    wait = in_child(rest)
    print("forked", flush=True)  # noqa: T201  # now the rest is published
    seen = [[first, *wait()], [first, *rest()]]
    return [] if seen == [["1-1", "1-2", "1-3"]] * 2 else [f"seen: {seen}"]


def with_asyncio(client: Client) -> list[str]:
    """Fork with an async client that was used on the parent's event loop."""
    jobs = make_jobs(client)
    async_client = AsyncClient.from_env()

    async def use() -> list[str]:
        found = await asyncio.gather(*(async_client.get(job_id) for job_id in jobs))
        wrong = [job_id for result, job_id in zip(found, jobs, strict=True) if result is None or result.id != job_id]
        made = await async_client.enqueue(REQUEST)
        following = async_client.follow(made, timeout=1)
        try:
            await anext(following)
        except KeepstreamError as error:
            if type(error).__name__ != "FollowTimeoutError":
                wrong.append(repr(error))
        return wrong

    wrong = asyncio.run(use())
    children = [in_child(lambda: asyncio.run(use())) for _ in range(2)]
    for wait in children:
        wrong += wait()

    async def fork_on_the_loop() -> list[str]:
        await use()
        return in_child(lambda: asyncio.run(use()))()

    wrong += asyncio.run(fork_on_the_loop()) + asyncio.run(use())
    asyncio.run(async_client.close())
    return wrong


def work_of_a_pool(jobs: dict[str, int]) -> list[str]:
    """Use the client that this process has inherited, or made at import."""
    assert CLIENT is not None
    return mistakes(CLIENT, jobs, 20)


def multiprocessing_with(method: str) -> Callable[[Client], list[str]]:
    def scenario(client: Client) -> list[str]:
        jobs = make_jobs(client)
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map_async(work_of_a_pool, [jobs] * 4).get(PATIENCE)
            pool.close()
            pool.join()
        return [problem for answers in found for problem in answers] + mistakes(client, jobs)

    return scenario


SCENARIOS: Final[dict[str, Callable[[Client], list[str]]]] = {
    "used before": used_before,
    "used in threads": used_in_threads,
    "in every order": in_every_order,
    "locks are held": held_locks,
    "own connections": own_connections,
    "iterating": iterating,
    "asyncio": with_asyncio,
    **{f"multiprocessing {method}": multiprocessing_with(method) for method in ("fork", "forkserver", "spawn")},
}


def main() -> None:
    """Play the scenario that the command line names."""
    assert CLIENT is not None
    logging.getLogger("keepstream").disabled = True  # it says that no worker is alive, which is so
    problems = SCENARIOS[sys.argv[1]](CLIENT)
    print(json.dumps({"wrong": problems}), flush=True)  # noqa: T201
