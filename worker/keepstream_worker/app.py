"""The composition root: from settings to a running worker.

In: the environment.  Out: a Celery worker process with our pool and transport, or one clear line that
says what is wrong and what to do.
"""

import os
import sys
import threading
import warnings
from typing import NoReturn

import redis
from celery.platforms import SecurityWarning
from celery.signals import worker_shutting_down
from redis.exceptions import AuthenticationError, RedisError

from keepstream.client.database import make_engine
from keepstream.errors import InvalidSettingError
from keepstream_worker.intake.celery_app import POOL, make_celery
from keepstream_worker.providers.config import ProviderConfigError, load_providers
from keepstream_worker.service import Service
from keepstream_worker.settings import Settings, SettingsError, load_settings
from keepstream_worker.store import schema
from keepstream_worker.telemetry.logs import configure_logging


class StartError(Exception):
    """The worker cannot start; the message is one line that says what to do, and holds no secret."""


def run_worker(*, concurrency: int | None = None) -> int:
    """Run one worker process until it is stopped; return its exit code.

    Args:
        concurrency: Jobs at once, instead of the setting.

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
        providers = load_providers(settings.providers_file, os.environ)
    except ProviderConfigError as error:
        raise StartError(str(error)) from None
    check_database(settings)
    check_redis(settings)
    app = make_celery(settings, Service(settings, providers))
    worker = app.Worker(
        hostname=f"keepstream-{os.getpid()}@%h",
        pool=POOL,
        concurrency=settings.concurrency,
        queues=[settings.queue],
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        optimization="default",
    )
    shutdown_requested = threading.Event()
    worker_shutting_down.connect(lambda **_: shutdown_requested.set(), weak=False)
    worker.start()
    # Celery counts Ctrl-C as a failure; it is how people stop a worker.
    return 0 if shutdown_requested.is_set() else int(worker.exitcode or 0)


def check_database(settings: Settings) -> None:
    """Check that the database answers and has our tables.

    Raises:
        StartError: it does not.
    """
    try:
        engine = make_engine(settings.database_url)
        try:
            schema.check(engine)
        finally:
            engine.dispose()
    except (InvalidSettingError, schema.SchemaError) as error:
        raise StartError(str(error)) from None


def check_redis(settings: Settings) -> None:
    """Check that the broker and the Redis for events answer.

    Raises:
        StartError: one of them does not, or refuses us.
    """
    for name, url in (("KEEPSTREAM_REDIS_URL", settings.redis_url), ("KEEPSTREAM_BROKER_URL", settings.broker)):
        try:
            with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
                client.ping()
        except AuthenticationError:
            raise StartError(f"Redis refused the user or password in {name}") from None
        except (RedisError, OSError, ValueError) as error:
            raise StartError(
                f"Redis does not answer ({type(error).__name__}); start it, or set {name} to where it is"
            ) from None


def leave(code: int) -> NoReturn:
    """End the process at once; the worker has closed what it had opened.

    Python's own exit takes longer than all the rest of a shutdown, and a supervisor that replaces workers
    waits for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> NoReturn:
    """Run a worker process: ``python -m keepstream_worker.app``."""
    try:
        leave(run_worker())
    except StartError as error:
        raise SystemExit(f"keepstream: {error}") from None


if __name__ == "__main__":
    main()
