"""Prints what a process has got from whoever started it, and ends with the exit code that it is given.

In: an exit code.
Out: one line of JSON.
"""

import json
import os
import signal
import sys
import threading


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    state = {
        "leads its session": os.getsid(0) == os.getpid(),
        "leads its group": os.getpgid(0) == os.getpid(),
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109
        "descriptors": [descriptor for descriptor in range(256) if _is_open(descriptor)],
        "signals": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "threads": threading.active_count(),
    }
    sys.stdout.write(json.dumps(state) + "\n")
    sys.exit(int(sys.argv[1]))
