"""Whether publishing slows a stream down: the time a paced stream takes with publishing and without.

In: a ``Bench``.
Out: samples ``publishing``.

Redis may be near, slow or away; reading must not wait for it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from benchmarks.bench import Bench, Load, Sample
from benchmarks.contenders import DIRECT, Contender
from benchmarks.harness import Process, python

_DELAY_SECONDS: Final = 0.05
_RATE: Final = 30.0
_STREAMS: Final = 10
_MAX_REPETITIONS: Final = 2
_POLL_SECONDS: Final = 0.01
_WAIT_SECONDS: Final = 120.0


def publishing(bench: Bench) -> None:
    """Measure the wall time with Redis near, 50 ms away and unreachable, and of reading the provider directly.

    Jobs always arrive over the near Redis; only the events take the other route.
    """
    load = Load(_STREAMS, 150 if bench.quick else 300, _RATE, stamped=True)
    for repetition in range(min(bench.repeat, _MAX_REPETITIONS)):
        pairs = bench.read_directly(load).pairs
        _record(bench, DIRECT, "none", (max(pairs[::2]) - min(pairs[1::2])) / 1e9, repetition)
        with bench.keepstream() as worker:
            _record(bench, worker.name, "near", _seconds_until_stored(worker, load), repetition)
        with _slow_redis(bench, _DELAY_SECONDS) as (_, url), bench.keepstream(events_url=url) as worker:
            _record(bench, worker.name, "slow", _seconds_until_stored(worker, load), repetition)
        with _slow_redis(bench, 0.0) as (proxy, url), bench.keepstream(events_url=url) as worker:
            _record(bench, worker.name, "away", _seconds_until_stored(worker, load, leaving=proxy), repetition)
        with (
            _slow_redis(bench, _DELAY_SECONDS) as (_, url),
            bench.tutorial("threads", concurrency=_STREAMS, events_url=url) as worker,
        ):
            _record(bench, worker.name, "slow", _seconds_until_stored(worker, load), repetition)


def _record(bench: Bench, name: str, redis: str, seconds: float, repetition: int) -> None:
    bench.record(Sample("publishing", name, {"seconds": seconds}, {"redis": redis}, repetition))


@contextmanager
def _slow_redis(bench: Bench, delay: float) -> Iterator[tuple[Process, str]]:
    proxy = bench.start(
        "proxy", python("benchmarks.proxy", "--to", str(bench.services.redis_port), "--delay", str(delay))
    )
    try:
        yield proxy, f"redis://127.0.0.1:{proxy.expect('ready', _WAIT_SECONDS)['port']}/0"
    finally:
        proxy.close()


def _seconds_until_stored(worker: Contender, load: Load, leaving: Process | None = None) -> float:
    """Return the seconds from submitting the jobs until the database holds all their output.

    ``leaving`` is the proxy to stop while the streams run, after which Redis is unreachable.
    """
    before = worker.stored_characters() or 0
    begin = time.monotonic()
    worker.submit([f"publishing-{worker.process.pid}-{number}" for number in range(load.streams)], load.script())
    if leaving is not None:
        time.sleep(0.5)
        leaving.close()
    while (worker.stored_characters() or 0) - before < load.characters:
        if time.monotonic() - begin > _WAIT_SECONDS:
            raise worker.process.failure("did not store what it was sent")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - begin
