"""Memory per stream in flight, the second limit, after CPU, on the number of streams.

In: a ``Bench``.
Out: samples ``memory``.
"""

from benchmarks.bench import Bench, Load, Sample
from benchmarks.contenders import Contender


def memory(bench: Bench) -> None:
    """Measure the growth from an idle, warm worker to one with all streams in flight."""
    streams = 200 if bench.quick else 1000
    # One delta a second: slow enough even for the slowest worker to have all streams in flight at once.
    load = Load(streams, deltas=5 if bench.quick else 16, rate=1.0, stamped=True)
    with bench.floor() as worker:
        _measure(bench, worker, load)
    with bench.keepstream() as worker:
        _measure(bench, worker, load)
    for pool in (pool for pool in bench.pools if pool != "prefork"):
        with bench.tutorial(pool, concurrency=streams) as worker:
            _measure(bench, worker, load)
    slots = 4 if bench.quick else 20
    with bench.tutorial("prefork", concurrency=slots) as worker:
        held = worker.process.memory()  # here, a stream in flight is a process
        metrics = {
            "rss_kb_per_stream": held.rss / slots / 1e3,
            "uss_kb_per_stream": held.uss / slots / 1e3,
        }
        bench.record(Sample("memory", worker.name, metrics, {"streams": slots}))


def _measure(bench: Bench, worker: Contender, load: Load) -> None:
    idle = worker.process.memory()
    with bench.started_round(worker, load):
        busy = worker.process.memory()
    metrics = {
        "rss_kb_per_stream": (busy.rss - idle.rss) / load.streams / 1e3,
        "uss_kb_per_stream": (busy.uss - idle.uss) / load.streams / 1e3,
        "idle_rss_mb": idle.rss / 1e6,
    }
    bench.record(Sample("memory", worker.name, metrics, {"streams": load.streams}))
