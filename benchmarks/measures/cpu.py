"""CPU per delta, saturated and paced, and the concurrency at which each tutorial does best.

In: a ``Bench``.
Out: samples ``tune``, ``saturated`` and ``paced``.

CPU per delta decides how many streams a core can carry.
"""

from contextlib import ExitStack
from typing import Final

from benchmarks.bench import Bench, Load, Outcome, Sample
from benchmarks.contenders import KEEPSTREAM, RESPONSES, UNMERGED

_CANDIDATES: Final = {
    "prefork": (1, 2, 4, 8),
    "threads": (1, 2, 4, 16),
    "gevent": (4, 16, 64),
    "asyncio": (4, 16, 64),
}
_PACE: Final = 30.0  #: Deltas per second and stream, like a fast hosted model.
_HELD_BY_TUTORIALS: Final = 30  #: Streams at that pace that overload none of them.


def tune(bench: Bench) -> None:
    """Find each tutorial's best concurrency: the one with the least CPU per delta."""
    if bench.quick:
        bench.say("tune: skipped, the usual best settings are used")
        return
    for pool in bench.all_pools:
        costs: dict[int, float] = {}
        for concurrency in _CANDIDATES[pool]:
            with bench.tutorial(pool, concurrency=concurrency) as worker:
                outcome = bench.round(worker, Load(streams=max(16, concurrency), deltas=250))
            metrics = cpu_metrics(outcome)
            costs[concurrency] = metrics["cpu_us_per_delta"]
            bench.record(Sample("tune", worker.name, metrics, {"concurrency": concurrency}))
        bench.concurrency[pool] = min(costs, key=costs.__getitem__)


def saturated(bench: Bench) -> None:
    """Measure CPU per delta when nobody ever waits for the provider."""
    load = Load(200, 500)
    # CPU per delta does not depend on the number of streams, and the tutorials take 1 s for 3,000 deltas.
    tutorials_load = Load(12 if bench.quick else 40, 500)
    with ExitStack() as stack:
        runs = [(stack.enter_context(bench.floor()), load)]
        runs += [(stack.enter_context(bench.keepstream(name)), load) for name in (KEEPSTREAM, UNMERGED, RESPONSES)]
        runs += [(stack.enter_context(bench.tutorial(pool)), tutorials_load) for pool in bench.all_pools]
        for repetition in range(bench.repeat):
            for worker, own_load in runs:
                outcome = bench.round(worker, own_load)
                parameters = {"streams": own_load.streams, "deltas": own_load.deltas}
                bench.record(Sample("saturated", worker.name, cpu_metrics(outcome), parameters, repetition))


def paced(bench: Bench) -> None:
    """Measure CPU per delta when each stream sends 30 deltas a second, so that little arrives together."""
    deltas = 60 if bench.quick else 150
    many, few = Load(200, deltas, _PACE), Load(_HELD_BY_TUTORIALS, deltas, _PACE)
    with ExitStack() as stack:
        runs = [(stack.enter_context(bench.floor()), many)]
        runs += [(stack.enter_context(bench.keepstream(name)), many) for name in (KEEPSTREAM, RESPONSES)]
        for pool in bench.pools:
            # Prefork would need 200 processes, 5 GB, for the larger load.
            slots = few.streams if pool == "prefork" or bench.quick else many.streams
            worker = stack.enter_context(bench.tutorial(pool, concurrency=slots))
            runs += [(worker, load) for load in (few, many) if load.streams <= slots]
        for repetition in range(bench.repeat):
            for worker, load in runs:
                outcome = bench.round(worker, load)
                parameters = {"streams": load.streams, "rate": load.rate}
                bench.record(Sample("paced", worker.name, cpu_metrics(outcome), parameters, repetition))


def cpu_metrics(outcome: Outcome) -> dict[str, float]:
    """Return a round's costs per delta and how busy it kept the worker's core."""
    used, deltas = outcome.used, outcome.load.total
    return {
        "cpu_us_per_delta": used.cpu / deltas * 1e6,
        "core_share": used.cpu / used.wall,
        "deltas_per_second": deltas / used.wall,
        "messages_per_1000": outcome.messages / deltas * 1e3,
        "redis_cpu_us_per_delta": used.redis_cpu / deltas * 1e6,
        "redis_commands_per_1000": sum(used.redis_commands.values()) / deltas * 1e3,
        "provider_cpu_us_per_delta": used.provider_cpu / deltas * 1e6,
        "failed": outcome.failed,
    }
