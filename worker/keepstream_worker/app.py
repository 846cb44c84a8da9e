"""The composition root: from settings to a running worker.

In: the environment.  Out: a Celery worker process with our pool and transport, or one clear line that
says what is wrong and what to do.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final, NoReturn

from celery import Celery
from celery.platforms import EX_OK, SecurityWarning
from celery.signals import worker_shutting_down
from celery.worker import state

from keepstream.client.database import make_engine
from keepstream.errors import InvalidSettingError
from keepstream_worker.intake.celery_app import INTAKE, POOL, make_celery
from keepstream_worker.providers.config import ProviderConfigError, load
from keepstream_worker.redis_check import RedisFault, check_redis_server
from keepstream_worker.service import Service
from keepstream_worker.settings import Settings, SettingsError, load_settings
from keepstream_worker.store import schema
from keepstream_worker.telemetry import pulse
from keepstream_worker.telemetry.logs import configure_logging, get_logger
from keepstream_worker.telemetry.outages import Outage, Server
from keepstream_worker.telemetry.pulse import Pulse

log = get_logger()

#: Seconds between two tries to start, while Redis answers with an error.
_PAUSE: Final = 1.0


class StartError(Exception):
    """The worker cannot start; the message is one line that says what to do, and holds no secret."""


def run_worker(*, concurrency: int | None = None, number: int | None = None) -> int:
    """Run one worker process until it is stopped; return its exit code.

    Args:
        concurrency: Jobs at once, instead of the setting.
        number: The process's number among those of a supervisor, which has checked Redis and called
            ``expect_pulses``; None: it is the only one.

    Raises:
        StartError: a setting, the database, Redis or the providers file is not as it must be.
    """
    try:
        settings = load_settings()
    except SettingsError as error:
        raise StartError(str(error)) from None
    if concurrency is not None:
        settings = settings.model_copy(update={"concurrency": concurrency})
    configure_logging(settings.log_level, settings.log_format)
    # Celery warns of root because of pickle, which we never accept; in a container root is the deployer's choice.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    try:
        configuration = load(settings.providers_file, os.environ)
    except ProviderConfigError as error:
        raise StartError(str(error)) from None
    if number is None:
        expect_pulses(settings, 1)
    own_pulse = Pulse(str(settings.alive_dir), number or 1) if settings.alive_dir else None
    pulses = [own_pulse] if own_pulse else []
    check_database(settings, pulses)
    if number is None:  # one that replaces another waits for a Redis that is away, as the others do
        check_redis(settings, pulses)
    app = make_celery(settings, Service(settings, configuration.providers, configuration.policy), own_pulse)
    worker = _worker_class(app)(
        hostname=f"keepstream-{os.getpid()}@%h",
        pool=POOL,
        concurrency=INTAKE,
        queues=[settings.queue],
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        optimization="default",
    )
    worker.start()
    code = int(worker.exitcode or 0)
    if own_pulse is not None and code == 0:
        own_pulse.end()
    return code


def _worker_class(app: Celery) -> Any:
    """Return Celery's worker, with signal handlers that print nothing.

    Celery's print to standard output, between our lines of JSON, and what they say does not hold for us: Ctrl-C is no
    failure and does not "terminate all running tasks". They also start the program anew on SIGHUP.
    """

    class Worker(app.Worker):  # type: ignore[misc]  # made by Celery when asked for
        def install_platform_tweaks(self, worker: Any) -> None:
            """Called by Celery before it consumes."""

            def stop(signum: int, _frame: FrameType | None) -> None:
                now = signum == signal.SIGQUIT
                worker_shutting_down.send(
                    sender=worker.hostname,
                    sig=signal.Signals(signum).name,
                    how="Cold" if now else "Warm",
                    exitcode=EX_OK,
                )
                if now:
                    state.should_terminate = EX_OK
                else:
                    state.should_stop = EX_OK

            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
                if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves it
                    signal.signal(signum, stop)

    return Worker


def expect_pulses(settings: Settings, processes: int) -> list[Pulse]:
    """Let `keepstream alive` expect the signs of life of so many processes; return these.

    Raises:
        StartError: the directory for them cannot be written.
    """
    if settings.alive_dir is None:
        return []
    directory = str(settings.alive_dir)
    try:
        pulse.expect(directory, processes)
    except pulse.PulseError as error:
        raise StartError(f"KEEPSTREAM_ALIVE_DIR: {error}; name a directory in memory that may be written") from None
    return [Pulse(directory, number) for number in range(1, processes + 1)]


def check_database(settings: Settings, pulses: Sequence[Pulse] = ()) -> None:
    """Check that the database has our tables and can be written; wait if it cannot be now, until SIGTERM or Ctrl-C.

    Args:
        settings: Those of the worker.
        pulses: Signs of life to give meanwhile: who waits is alive.

    Raises:
        StartError: it refuses us, has not got our tables, gives us no right to write, or the URL cannot be used.
        SystemExit: the worker was told to stop while it waited.
    """
    outage, pause = Outage(Server.DATABASE, "start"), 0.5
    with _stoppable():
        while True:
            try:
                _try_database(settings)
            except schema.DatabaseAwayError as error:
                outage.failed(str(error))
            except (InvalidSettingError, schema.SchemaError) as error:
                raise StartError(str(error)) from None
            else:
                outage.worked()
                return
            _wait(pause, pulses)
            pause = min(pause * 2, 5.0)


def _wait(seconds: float, pulses: Sequence[Pulse]) -> None:
    with suppress(OSError):  # said when the worker is at work
        for waiting in pulses:
            waiting.beat()
    time.sleep(seconds)


def _try_database(settings: Settings) -> None:
    engine = make_engine(settings.database_url)
    try:
        schema.check(engine)
        schema.check_writing(engine)
    finally:
        engine.dispose()


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the process, which as the first of a container would not notice it."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_redis(settings: Settings, pulses: Sequence[Pulse] = ()) -> None:
    """Check that the broker and the Redis for events can be used, by every link that will be.

    One that answers with an error which may pass is waited for, until SIGTERM or Ctrl-C.

    Args:
        settings: Those of the worker.
        pulses: Signs of life to give meanwhile.

    Raises:
        StartError: one of them cannot be used.
        SystemExit: the worker was told to stop while it waited.
    """
    for variable, server in settings.redis_servers().items():
        outage = Outage(Server.REDIS, "start")
        with _stoppable():
            while True:
                try:
                    check_redis_server(server, variable)
                except RedisFault as fault:
                    if not fault.passes:
                        raise StartError(f"Redis {fault.found}; {fault.advice}") from None
                    outage.failed(fault.found, fault.advice, variable=variable)
                else:
                    break
                _wait(_PAUSE, pulses)
        outage.worked()
        if server.tls is not None and not server.tls.verified:
            log.warning("redis_not_verified", variable=variable)


def leave(code: int) -> NoReturn:
    """End the process at once; the worker has closed what it had opened.

    Python's own exit takes longer than all the rest of a shutdown, and a supervisor that replaces workers
    waits for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> NoReturn:
    """Run a worker process: ``python -m keepstream_worker.app [NUMBER]``, with a number under a supervisor."""
    try:
        leave(run_worker(number=int(sys.argv[1]) if sys.argv[1:] else None))
    except StartError as error:
        raise SystemExit(f"keepstream: {error}") from None
    except KeyboardInterrupt:  # before the worker was up
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
