"""The time from submitting a job to the follower's first delta.

In: a ``Bench``.
Out: samples ``first_delta``.
"""

import re
import socket
import time
from typing import Final

from benchmarks.bench import Bench, Load, Sample, percentile
from benchmarks.contenders import DIRECT, Contender
from benchmarks.wire import address, completion_request

_LOAD: Final = Load(streams=1, deltas=3, stamped=True)
_STAMP: Final = re.compile(rb"\d{20} ")
_WAIT_SECONDS: Final = 20.0


def first_delta(bench: Bench) -> None:
    """Measure one job at a time on an otherwise idle machine."""
    jobs = 15 if bench.quick else 50
    _record(bench, DIRECT, [_read_directly(bench) for _ in range(jobs)])
    with bench.keepstream() as worker:
        _record(bench, worker.name, [_run(bench, worker, number) for number in range(jobs)])
    for pool in bench.pools:
        with bench.tutorial(pool) as worker:
            _record(bench, worker.name, [_run(bench, worker, number) for number in range(jobs)])


def _record(bench: Bench, name: str, times_ms: list[float]) -> None:
    times_ms = sorted(times_ms)
    metrics = {
        "p50_ms": percentile(times_ms, 0.5),
        "p90_ms": percentile(times_ms, 0.9),
        "least_ms": times_ms[0],
        "most_ms": times_ms[-1],
    }
    bench.record(Sample("first_delta", name, metrics, {"jobs": len(times_ms)}))


def _run(bench: Bench, worker: Contender, number: int) -> float:
    job = f"first-{worker.name}-{number}"
    with bench.services.redis.pubsub(ignore_subscribe_messages=False) as follower:
        follower.subscribe(worker.channel(job))
        follower.get_message(timeout=_WAIT_SECONDS)
        begin = time.monotonic()
        worker.submit([job], _LOAD.script())
        elapsed = None
        while message := follower.get_message(timeout=_WAIT_SECONDS):
            if elapsed is None and _STAMP.search(message["data"]):
                elapsed = time.monotonic() - begin
            if worker.ended.encode() in message["data"]:
                break
    if elapsed is None:
        raise worker.process.failure("brought no delta")
    time.sleep(0.05)  # let everything become idle again
    return elapsed * 1e3


def _read_directly(bench: Bench) -> float:
    request = completion_request(bench.services.base_url, _LOAD.script())
    begin = time.monotonic()
    with socket.create_connection(address(bench.services.base_url)) as connection:
        connection.sendall(request)
        answer = b""
        while not _STAMP.search(answer):
            answer += connection.recv(65_536)
        return (time.monotonic() - begin) * 1e3
