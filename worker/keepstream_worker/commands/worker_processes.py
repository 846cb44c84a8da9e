"""How a command becomes a worker: one process, which is this one, or several under a supervisor.

In: settings, from `worker` and `dev`.
Out: the exit code of the worker, to the shell.
"""

import os
from typing import TYPE_CHECKING, NoReturn

import typer

from keepstream_worker.commands.exits import UNAVAILABLE, fail

if TYPE_CHECKING:
    from keepstream_worker.settings import Settings


def run_worker_here(concurrency: int | None = None) -> NoReturn:
    """Run a worker in this process, so that signals reach it."""
    from keepstream_worker.app import StartError, run_worker

    try:
        code = run_worker(concurrency=concurrency)
    except StartError as error:
        fail(str(error), UNAVAILABLE)
    raise typer.Exit(code)


def run_workers(settings: "Settings", count: int, concurrency: int | None) -> NoReturn:
    """Run several worker processes."""
    from keepstream_worker.app import StartError, check_database, check_redis, expect_pulses
    from keepstream_worker.supervisor import Supervisor, python_module
    from keepstream_worker.telemetry.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    try:
        # Once and here, rather than by each process again and again.
        pulses = expect_pulses(settings, count)
        check_database(settings, pulses)
        check_redis(settings, pulses)
    except StartError as error:
        fail(str(error), UNAVAILABLE)
    environment = dict(os.environ)
    if concurrency is not None:
        environment["KEEPSTREAM_CONCURRENCY"] = str(concurrency)
    raise typer.Exit(Supervisor(python_module("keepstream_worker.app"), count, environment).run())
