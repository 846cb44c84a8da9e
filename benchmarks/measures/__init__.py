"""The measures, one module per question; this table is the order of a run.

In: a ``Bench``.
Out: samples, recorded with it.
"""

from collections.abc import Callable
from typing import Final

from benchmarks.bench import Bench
from benchmarks.measures import (
    cpu,
    first_delta,
    flatness,
    follower,
    load,
    memory,
    publishing,
    reading,
    short_jobs,
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
    "flat_streams": flatness.flat_streams,
    "flat_length": flatness.flat_length,
    "publishing": publishing.publishing,
    "startup": startup.startup,
}
