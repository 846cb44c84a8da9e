"""The measures, one module per question; this table is the order of a run.

In: a ``Bench``.
Out: samples, recorded with it.
"""

from collections.abc import Callable
from typing import Final

from benchmarks.bench import Bench
from benchmarks.measures import (
    cpu,
    fairness,
    fallback,
    false_deaths,
    first_delta,
    flatness,
    follower,
    gateway,
    hand_back,
    limits,
    load,
    many_followers,
    many_workers,
    memory,
    publishing,
    reading,
    short_jobs,
    size,
    startup,
)

MEASURES: Final[dict[str, Callable[[Bench], None]]] = {
    "tune": cpu.tune,
    "saturated": cpu.saturated,
    "paced": cpu.paced,
    "reading": reading.reading,
    "load": load.load,
    "hold": load.hold,
    "memory": memory.memory,
    "first_delta": first_delta.first_delta,
    "short_jobs": short_jobs.short_jobs,
    "follower": follower.follower,
    "many_followers": many_followers.many_followers,
    "idle_followers": many_followers.idle_followers,
    "gateway_load": gateway.gateway_load,
    "gateway_idle": gateway.gateway_idle,
    "gateway_stalled": gateway.gateway_stalled,
    "gateway_first_delta": gateway.gateway_first_delta,
    "flat_streams": flatness.flat_streams,
    "flat_length": flatness.flat_length,
    "publishing": publishing.publishing,
    "startup": startup.startup,
    "size": size.size,
    "many_workers": many_workers.many_workers,
    "fairness": fairness.fairness,
    "limits": limits.limits,
    "hand_back": hand_back.hand_back,
    "no_false_deaths": false_deaths.no_false_deaths,
    "fallback": fallback.fallback,
}
