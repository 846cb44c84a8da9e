"""The contenders: how each is started, given jobs and checked.

In: the services and a number of jobs.
Out: running workers with one interface, which publish each job's output and an end mark, to ``bench``.
"""

import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from benchmarks import tutorial
from benchmarks.harness import ROOT, BenchmarkError, Process, python
from benchmarks.services import Services
from benchmarks.wire import celery_message, completion_body
from keepstream import names, tables

KEEPSTREAM: Final = "keepstream"
UNMERGED: Final = "keepstream-unmerged"  #: The same worker, set to publish every delta on its own.
RESPONSES: Final = "keepstream-responses"  #: The same worker, which asks the provider by the Responses API.
FLOOR: Final = "floor"
DIRECT: Final = "direct"  #: Reading the provider without a worker, the reference for latencies.
TUTORIALS: Final = ("prefork", "threads", "gevent", "asyncio")


_CONCURRENCY: Final = 10_000  #: Jobs our worker runs at once: more than any load has.
_SETTINGS: Final = {UNMERGED: {"KEEPSTREAM_MERGE_ABOVE": str(2**31)}}
_BY_RESPONSES: Final = '[providers.default]\napi = "responses"\n'


def tutorial_name(pool: str) -> str:
    """Return the contender's name in a tutorial's samples."""
    return f"tutorial-{pool}"


def migrate(database_url: str) -> None:
    """Make Keepstream's tables.

    Raises:
        BenchmarkError: that failed.
    """
    command = python("keepstream_worker.commands", "migrate")
    environment = os.environ | {names.ENV_DATABASE_URL: database_url}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        raise BenchmarkError(f"keepstream migrate failed: {made.stderr}")


class Contender(ABC):
    """A running worker; stop it through its ``process``."""

    process: Process
    ended: str  #: A text that only a job's last message contains.
    failed: str  #: A text that the last message of a failed job contains as well.

    def __init__(self, name: str) -> None:
        """Name it as in the results."""
        self.name = name

    @abstractmethod
    def channel(self, job: str) -> str:
        """Return the channel of a job's messages."""

    @abstractmethod
    def submit(self, jobs: list[str], script: dict[str, Any]) -> None:
        """Submit the jobs, all at once."""

    def stored_characters(self) -> int | None:
        """Return how many characters of output the database holds; None if the contender stores nothing."""
        return None

    def explain_failures(self) -> str:
        """Return what is known about failed jobs."""
        return "no reason is recorded"


class Floor(Contender):
    """The bare reader and publisher."""

    ended = tutorial.DONE
    failed = tutorial.FAILED

    def __init__(self, services: Services, cores: frozenset[int], log: Path) -> None:
        """Start it."""
        super().__init__(FLOOR)
        arguments = ("--base-url", services.base_url, "--redis-port", str(services.redis_port))
        self.process = Process(self.name, python("benchmarks.floor", *arguments), cores, log)

    def channel(self, job: str) -> str:
        """Return the channel of a job's messages."""
        return f"floor:{job}"

    def submit(self, jobs: list[str], script: dict[str, Any]) -> None:
        """Submit the jobs."""
        self.process.send({"channels": [self.channel(job) for job in jobs], "script": script})


class _CeleryContender(Contender):
    _stored: sa.Select[Any]

    def __init__(self, name: str, services: Services, queue: str, database_url: str) -> None:
        super().__init__(name)
        self._redis = services.redis
        self._queue = queue
        self._redis.delete(queue)  # a failed worker of the same name may have left jobs behind
        self._engine = sa.create_engine(database_url)

    @abstractmethod
    def message(self, job: str, script: dict[str, Any]) -> bytes:
        """Return a job's Celery message."""

    def submit(self, jobs: list[str], script: dict[str, Any]) -> None:
        """Put the jobs on the queue in one command."""
        self._redis.lpush(self._queue, *(self.message(job, script) for job in jobs))

    def stored_characters(self) -> int | None:
        """Return how many characters of output the database holds."""
        with self._engine.connect() as connection:
            return int(connection.execute(self._stored).scalar() or 0)


class Tutorial(_CeleryContender):
    """The tutorial's Celery worker in one of its pools."""

    ended = tutorial.DONE
    failed = tutorial.FAILED
    _stored = sa.select(sa.func.sum(sa.func.length(tutorial.completions.c.text)))

    def __init__(
        self,
        pool: str,
        concurrency: int,
        services: Services,
        database_url: str,
        cores: frozenset[int],
        log: Path,
        events_url: str | None = None,
    ) -> None:
        """Start it; ``asyncio`` is a thread pool in front of one event loop."""
        name = tutorial_name(pool)
        super().__init__(name, services, name, database_url)
        tutorial.completions.create(self._engine)
        self._task = tutorial.GENERATE_ASYNC if pool == "asyncio" else tutorial.GENERATE
        pool_class = "threads" if pool == "asyncio" else pool
        options = ("--pool", pool_class, "--concurrency", str(concurrency), "--hostname", f"{name}@localhost")
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "warning")
        self.process = Process(
            name,
            python("celery", "--app", "benchmarks.tutorial", "worker", *options, *quiet),
            cores,
            log,
            {
                "TUTORIAL_REDIS_URL": events_url or services.redis_url,
                "TUTORIAL_BROKER_URL": services.redis_url,
                "TUTORIAL_DATABASE_URL": database_url,
                "TUTORIAL_QUEUE": name,
                "OPENAI_BASE_URL": services.base_url,
                "OPENAI_API_KEY": "none",
            },
        )

    def channel(self, job: str) -> str:
        """Return the channel of a job's messages."""
        return f"tutorial:{job}"

    def message(self, job: str, script: dict[str, Any]) -> bytes:
        """Return a job's Celery message."""
        return celery_message(self._task, job, self._queue, job, self.channel(job), script)


class Keepstream(_CeleryContender):
    """This project's worker."""

    ended = '"type":"job.'
    failed = '"type":"job.failed"'
    _stored = sa.select(sa.func.sum(sa.func.length(tables.choices.c.content)))

    def __init__(
        self,
        name: str,
        services: Services,
        database_url: str,
        cores: frozenset[int],
        log: Path,
        events_url: str | None = None,
    ) -> None:
        """Start it; ``events_url`` is the Redis for events, if it is not the broker's."""
        super().__init__(name, services, name, database_url)
        self.database_url = database_url
        environment = {names.ENV_DATABASE_URL: database_url}
        migrate(database_url)
        if name == RESPONSES:
            file = log.with_suffix(".toml")
            file.write_text(_BY_RESPONSES)
            environment["KEEPSTREAM_PROVIDERS_FILE"] = str(file)
        self.process = Process(
            self.name,
            python("keepstream_worker.commands", "worker"),
            cores,
            log,
            environment
            | {
                names.ENV_REDIS_URL: events_url or services.redis_url,
                names.ENV_BROKER_URL: services.redis_url,
                names.ENV_QUEUE: name,
                "KEEPSTREAM_CONCURRENCY": str(_CONCURRENCY),
                **_SETTINGS.get(name, {}),
                "KEEPSTREAM_LOG_LEVEL": "warning",
                "OPENAI_BASE_URL": services.base_url,
                "OPENAI_API_KEY": "none",
            },
        )

    def explain_failures(self) -> str:
        """Return the attempts that did not finish, counted by outcome and error."""
        attempts = tables.attempts.c
        what = (attempts.reason, attempts.outcome, attempts.error_code)
        failed = sa.select(*what, sa.func.count()).where(attempts.outcome != "finished").group_by(*what)
        with self._engine.connect() as connection:
            return ", ".join(
                f"{n} × {reason}/{outcome}/{code}" for reason, outcome, code, n in connection.execute(failed)
            )

    def channel(self, job: str) -> str:
        """Return the channel of a job's events."""
        return names.job_keys(names.DEFAULT_TENANT, job).channel

    def message(self, job: str, script: dict[str, Any]) -> bytes:
        """Return a job's Celery message."""
        wire = {"v": 2, "id": job, "tenant": names.DEFAULT_TENANT, "request": completion_body(script)}
        return celery_message(names.TASK, job, self._queue, wire)
