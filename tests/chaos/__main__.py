"""The command line of the chaos suite: ``python -m tests.chaos``.

In: options: items, seed, number of jobs.
Out: a table of counts for each item on standard output; exit code 1 if a check failed.
"""

import argparse
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.chaos import chaos, deploy, failover, garbage, gateway, live_join, times, zombie
from tests.chaos.report import Report
from tests.chaos.sandbox import Sandbox

ITEMS: Final[dict[str, Callable[[Sandbox, int, int], Report]]] = {
    "chaos": chaos.run,
    "failover": failover.run,
    "live-join": live_join.run,
    "times": times.run,
    "deploy": deploy.run,
    "zombie": zombie.run,
    "garbage": garbage.run,
    "gateway": gateway.run,
}


def main() -> int:
    """Run the requested items."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="what happens when (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=300, help="jobs of the item chaos (default: %(default)s)")
    parser.add_argument("--only", choices=ITEMS, action="append", help="an item; may be repeated (default: all)")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--keep", type=Path, help="directory for the workers' logs (default: a temporary one)")
    options = parser.parse_args()
    logging.getLogger("keepstream").setLevel(logging.ERROR)  # jobs wait here, and for what is known
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, leaving nothing behind
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="keepstream-chaos-") as temporary:
        directory = options.keep or Path(temporary)
        for name in options.only or ITEMS:
            began = time.monotonic()
            report = ITEMS[name](Sandbox(directory, options.database), options.seed, options.jobs)
            print("\n".join(report.lines()), flush=True)
            print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
            failed += [f"{name}: {check}" for check in report.failures]
    print("\nAll checks hold." if not failed else "\nFAILED\n" + "\n".join(f"  {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
