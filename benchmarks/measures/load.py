"""Latency over load, and how many streams one process can hold.

In: a ``Bench``.
Out: samples ``load`` (one per point), ``capacity`` and ``hold``.

The latency added by the worker runs from the provider's write to the follower's receipt, beyond what reading the
provider directly takes.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from benchmarks.bench import Bench, Load, Outcome, Sample, percentile
from benchmarks.contenders import Contender

LIMIT_MS: Final = 50.0  #: Added latency at p99 up to which a load counts as held.
_DELIVERED: Final = 0.97  #: Share of the nominal rate that must arrive for the load to count.
_SETTLE_SECONDS: Final = 0.5
_direct: Final[dict[tuple[int, float], list[float]]] = {}
_DISTURBED: Final = 0.05  #: Share of a core; if the host takes more than this, it shows in the latencies.
_MAX_ROUNDS: Final = 4  #: Rounds at most, as a multiple of the repetitions.
_FIRST_STREAMS: Final = {10.0: 50, 50.0: 10}
_HEAD_START: Final = 5  #: Our worker's first load is larger by this factor.
_MAX_STREAMS: Final = 8000


def load(bench: Bench) -> None:
    """Raise the load until it is no longer held, at 10 and at 50 deltas per second and stream."""
    rates = (10.0,) if bench.quick else (10.0, 50.0)
    with ExitStack() as stack:
        keepstream = stack.enter_context(bench.keepstream())
        for rate in rates:
            _find_capacity(bench, keepstream, rate, _FIRST_STREAMS[rate] * _HEAD_START)
    for pool in (pool for pool in bench.pools if pool != "prefork"):  # it would need a process of 60 MB per stream
        with bench.tutorial(pool, concurrency=1000) as worker:
            for rate in rates:
                _find_capacity(bench, worker, rate, _FIRST_STREAMS[rate])


def hold(bench: Bench) -> None:
    """Repeat the load that the design promises: 1,000 streams at 10 deltas a second.

    A round in which the host took time from this machine says something about the host. It is recorded as
    ``hold_disturbed`` and repeated, up to a limit.
    """
    with bench.keepstream() as worker:
        for repetition in range(_MAX_ROUNDS * bench.repeat):
            _measure_point(bench, worker, 1000, 10.0, "hold", repetition)
            if bench.samples[-1].metrics["stolen_share"] > _DISTURBED:
                bench.samples[-1] = replace(bench.samples[-1], measure="hold_disturbed")
            if sum(sample.measure == "hold" for sample in bench.samples) == bench.repeat:
                break


def _find_capacity(bench: Bench, worker: Contender, rate: float, first: int) -> None:
    held, not_held = 0, 0
    streams = first
    # Double until it fails, then bisect: the answer is accurate to an eighth.
    for _ in range(2 if bench.quick else 8):
        # Try twice: a machine that paused for a moment says nothing about the worker.
        if any(_measure_point(bench, worker, streams, rate, "load", attempt) for attempt in range(2)):
            held = streams
        else:
            not_held = streams
        if not_held and not_held - held <= max(not_held // 8, 1):
            break
        streams = (held + not_held) // 2 if not_held else held * 2
        if not 0 < streams <= _MAX_STREAMS:
            break
    bench.record(Sample("capacity", worker.name, {"streams": held, "not_held": not_held}, {"rate": rate}))


def _measure_point(
    bench: Bench, worker: Contender, streams: int, rate: float, measure: str, repetition: int = 0
) -> bool:
    window = 2.0 if bench.quick else 4.0
    direct = _direct_latencies(bench, streams, rate)
    outcome, begin, end = _run(bench, worker, streams, rate, 1 + streams / 300, window)
    if end - begin < window / 2 * 1e9:  # not all had started in time: once more, with a longer ramp
        outcome, begin, end = _run(bench, worker, streams, rate, 4 + streams / 100, window)
    seconds = max(end - begin, 1) / 1e9
    latencies = outcome.arrivals.latencies_ms(begin, end)
    metrics = {
        "p50_ms": percentile(latencies, 0.50),
        "p99_ms": percentile(latencies, 0.99),
        "direct_p50_ms": percentile(direct, 0.50),
        "direct_p99_ms": percentile(direct, 0.99),
        "added_p50_ms": percentile(latencies, 0.50) - percentile(direct, 0.50),
        "added_p99_ms": percentile(latencies, 0.99) - percentile(direct, 0.99),
        "delivered": len(latencies) / seconds / (streams * rate),
        "window_s": seconds,
        "core_share": outcome.used.cpu / outcome.used.wall,
        "stolen_share": outcome.used.stolen / outcome.used.wall,
        "failed": outcome.failed,
    }
    held = (
        metrics["added_p99_ms"] < LIMIT_MS
        and metrics["delivered"] >= _DELIVERED
        and seconds > window / 2
        and not outcome.failed
    )
    parameters = {"rate": rate, "streams": streams}
    bench.record(Sample(measure, worker.name, metrics | {"held": float(held)}, parameters, repetition))
    return held


def _direct_latencies(bench: Bench, streams: int, rate: float) -> list[float]:
    """Return the latencies of reading the provider directly, measured once per load."""
    if (streams, rate) not in _direct:
        arrivals = bench.read_directly(_stamped(streams, rate, 3 + streams / 1000))
        _direct[streams, rate] = arrivals.latencies_ms()
    return _direct[streams, rate]


def _run(
    bench: Bench, worker: Contender, streams: int, rate: float, ramp: float, window: float
) -> tuple[Outcome, int, int]:
    """Run a round; return it with the time span (ns) in which all streams were in flight."""
    with bench.started_round(worker, _stamped(streams, rate, ramp + _SETTLE_SECONDS + window)) as running:
        begin = running.started_ns + int(_SETTLE_SECONDS * 1e9)
    arrivals = running.outcome().arrivals
    return running.outcome(), begin, min(begin + int(window * 1e9), arrivals.first_end_ns)


def _stamped(streams: int, rate: float, seconds: float) -> Load:
    return Load(streams, int(rate * seconds), rate, stamped=True)
