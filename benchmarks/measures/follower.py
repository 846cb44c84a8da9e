"""What following costs the service that follows.

In: a ``Bench``.
Out: samples ``follower``.

A stream has one worker but may have many followers.
"""

import time
from contextlib import closing
from typing import Final

from benchmarks.bench import Bench, Load, Sample
from benchmarks.harness import BenchmarkError, python

_RATE: Final = 1000.0  #: One delta at a time: at most a millisecond apart.
_WAIT_SECONDS: Final = 60.0


def follower(bench: Bench) -> None:
    """Follow one long stream with the client, sync and async, and with redis-py by hand."""
    load = Load(1, 1000 if bench.quick else 4000, _RATE)
    with bench.keepstream() as worker:
        for repetition in range(bench.repeat):
            for kind in ("sync", "async", "hand"):
                job = f"follower-{kind}-{repetition}"
                options = ("--kind", kind, "--redis-url", bench.services.redis_url, "--job", job)
                with closing(bench.start("client-follower", python("benchmarks.client_follower", *options))) as process:
                    process.expect("ready", _WAIT_SECONDS)
                    time.sleep(0.3)  # it subscribes meanwhile
                    before = process.cpu_seconds()
                    worker.submit([job], load.script())
                    deltas = process.expect("ended", _WAIT_SECONDS)["deltas"]
                    used = process.cpu_seconds() - before
                if deltas != load.deltas:
                    raise BenchmarkError(f"a follower ({kind}) got {deltas} of {load.deltas} deltas")
                metrics = {"cpu_us_per_delta": used / load.deltas * 1e6}
                bench.record(Sample("follower", f"client-{kind}", metrics, {"rate": _RATE}, repetition))
