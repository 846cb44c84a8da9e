"""Flat growth: whether a delta costs the same among many streams and late in a long stream.

In: a ``Bench``.
Out: samples ``flat_streams`` and ``flat_length``.

A cost that grows with the number of streams, or with the length of one, exhausts a machine before its CPU does.
"""

import time
from contextlib import ExitStack
from typing import Final

from benchmarks.bench import Bench, Load, Sample

_DELTAS_A_SECOND: Final = 8000  #: Over all streams, so that only their number varies.
_AT_ONCE: Final = 10  #: Streams in flight while their length is varied.


def flat_streams(bench: Bench) -> None:
    """Measure the steady cost of the same number of deltas a second, spread over an increasing number of streams."""
    window = 2.0 if bench.quick else 4.0
    counts = (100, 500) if bench.quick else (100, 500, 1000, 2000)
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.floor()), stack.enter_context(bench.keepstream())]
        for repetition in range(bench.repeat):
            for streams in counts:
                rate = _DELTAS_A_SECOND / streams
                seconds = 2 + streams / 400 + window
                load = Load(streams, int(rate * seconds), rate, stamped=True)
                for worker in workers:
                    with bench.started_round(worker, load) as running:
                        time.sleep(0.5)
                        begin, begin_ns = running.read(), time.monotonic_ns()
                        time.sleep(window)
                        used, end_ns = running.read().since(begin), time.monotonic_ns()
                    arrivals = running.outcome().arrivals
                    metrics = {
                        "cpu_us_per_delta": used.cpu / arrivals.count(begin_ns, end_ns) * 1e6,
                        "core_share": used.cpu / used.wall,
                        "ended_early": float(arrivals.first_end_ns < end_ns),
                    }
                    bench.record(Sample("flat_streams", worker.name, metrics, {"streams": streams}, repetition))


def flat_length(bench: Bench) -> None:
    """Measure what a delta costs in streams of increasing length, beyond the cost of the job itself."""
    lengths = (1, 100, 2000) if bench.quick else (1, 100, 1000, 5000, 20_000)
    with ExitStack() as stack:
        workers = [stack.enter_context(bench.floor()), stack.enter_context(bench.keepstream())]
        for repetition in range(bench.repeat):
            for worker in workers:
                cost_of_job = 0.0
                for length in lengths:
                    load = Load(_AT_ONCE, length)
                    rounds = min(10, max(1, 5000 // load.total))
                    cpu = sum(bench.round(worker, load).used.cpu for _ in range(rounds)) / (rounds * _AT_ONCE)
                    if length == 1:
                        cost_of_job = cpu
                    metrics = {
                        "cpu_us_per_delta": cpu / length * 1e6,
                        "cpu_us_per_further_delta": (cpu - cost_of_job) / max(length - 1, 1) * 1e6,
                    }
                    bench.record(Sample("flat_length", worker.name, metrics, {"deltas": length}, repetition))
