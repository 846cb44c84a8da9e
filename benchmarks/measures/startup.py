"""Start-up: from starting a worker to the first delta of a waiting job, and the import of the contract.

In: a ``Bench``.
Out: samples ``startup`` and ``import``.

Deploys and crashes cost a start-up; every service that enqueues jobs pays for the import.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from benchmarks.bench import Bench, Load, Sample
from benchmarks.contenders import KEEPSTREAM, Contender, tutorial_name
from benchmarks.harness import ROOT

_LOAD: Final = Load(streams=1, deltas=1)


def startup(bench: Bench) -> None:
    """Measure from the start of the process to the end of a first job of one delta, and the imports."""
    starts: dict[str, Callable[[], AbstractContextManager[Contender]]] = {
        KEEPSTREAM: lambda: bench.keepstream(warm=False),
        tutorial_name("threads"): lambda: bench.tutorial("threads", warm=False),
        tutorial_name("prefork"): lambda: bench.tutorial("prefork", warm=False),
    }
    for repetition in range(bench.repeat):
        for name, start in starts.items():
            begin = time.monotonic()
            with start() as worker:
                bench.round(worker, _LOAD)
                metrics = {"seconds": time.monotonic() - begin, "cpu_seconds": worker.process.cpu_seconds()}
            bench.record(Sample("startup", name, metrics, {}, repetition))
        for statement in ("pass", "import pydantic", "import keepstream"):
            metrics = {"ms": _run_seconds(statement) * 1e3}
            bench.record(Sample("import", "python", metrics, {"statement": statement}, repetition))


def _run_seconds(statement: str) -> float:
    times = []
    for _ in range(5):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
        times.append(time.monotonic() - begin)
    return min(times)
