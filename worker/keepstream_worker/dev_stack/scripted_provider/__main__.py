"""The scripted provider as a process of its own, which can be killed and does not share a core.

In: command-line options.
Out: one JSON line with the base URL on standard output, once it listens.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import time

import uvloop

from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.dev_stack.scripted_provider.limiter import Limiter

ENV_API_KEY = "KEEPSTREAM_SCRIPTED_API_KEY"


async def serve(host: str, port: int, api_key: str | None, limits: object = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with ScriptedProvider(host, port, api_key) as provider:
        provider.limit(limits or {})
        sys.stdout.write(json.dumps({"base_url": provider.base_url}) + "\n")
        sys.stdout.flush()
        await stop.wait()


def _limits(text: str) -> object:
    """Return the limits of the command line, checked; raise ``ValueError`` if they are none."""
    limits = json.loads(text)
    try:
        Limiter(time.monotonic).change(limits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return limits


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m keepstream_worker.dev_stack.scripted_provider", description=__doc__
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument(
        "--api-key", default=os.environ.get(ENV_API_KEY), help=f"key to demand from clients (default: ${ENV_API_KEY})"
    )
    parser.add_argument(
        "--limits",
        type=_limits,
        default={},
        help='what may be used, as JSON: {"concurrency": 50, "requests_per_minute": 600, "tokens_per_minute": 100000}; '
        "GET and POST /_limits show and change them",
    )
    options = parser.parse_args()
    # Each stream takes a file descriptor, and the usual soft limit is 1,024.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options.host, options.port, options.api_key, options.limits))
    except OSError as error:
        parser.exit(1, f"cannot listen on {options.host}:{options.port}: {error.strerror}\n")


if __name__ == "__main__":
    main()
