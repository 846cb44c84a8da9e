"""What the sync and the async client share: everything but the way in which they wait.

In: the arguments of a client and of its calls.  Out: jobs on the queue and in the database, requests to
cancel, stored results, and the follower's runs, to ``keepstream.client.sync`` and ``keepstream.client.aio``.
"""

import contextlib
import copy
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar

from keepstream import names
from keepstream.client import queries
from keepstream.client.arguments import check_limit, check_seconds, check_text
from keepstream.client.database import ClientDatabase
from keepstream.client.follower import Follower, FollowerRun, is_more_to_come, parse_cursor
from keepstream.client.forks import ForkMember
from keepstream.client.gate import Gate
from keepstream.client.listing import Wanted, list_jobs
from keepstream.client.payloads import TYPED, Form
from keepstream.client.redis import RedisConnections
from keepstream.client.redis_url import with_password
from keepstream.client.sender import Sender
from keepstream.client.summaries import SummaryReader
from keepstream.errors import (
    BrokerUnavailableError,
    ErrorCode,
    InvalidArgumentError,
    InvalidJobError,
    InvalidSettingError,
    JobNotFoundError,
    JobStateError,
    KeepstreamError,
    NotConfiguredError,
    StoreUnavailableError,
    UnexpectedError,
)
from keepstream.events import Event
from keepstream.jobs import Job, JobRef, make_job
from keepstream.results import CompletionResult, JobPage, JobStatus, JobSummary, WaitingFor

FOLLOW_TIMEOUT: Final = 600.0  #: Seconds; a reasoning model may be silent for minutes.
NOT_FOUND_AFTER: Final = 10.0  #: Seconds; a job sent without a row is unknown until a worker claims it.
WAIT_TIMEOUT: Final = 3600.0  #: Seconds; a worker's own limit for a job is as long.

_CANCEL_TTL: Final = 60  #: Seconds for which a request to cancel that the database has stays on Redis as well.
_UNCLAIMED_CANCEL_TTL: Final = 86_400  #: The same for one that only Redis has, until a worker claims its job.
_log: Final = logging.getLogger("keepstream")
_EXAMPLE_URL: Final = "redis://host:6379/0"
#: How alike two names are of which one is a typo: QEUE, REDIS_URI; but not REDIS_PORT, which is another.
_SIMILAR: Final = 0.8
_VARIABLES: Final = (
    names.ENV_REDIS_URL,
    names.ENV_BROKER_URL,
    names.ENV_REDIS_PASSWORD,
    names.ENV_DATABASE_URL,
    names.ENV_PREFIX,
    names.ENV_QUEUE,
)


#: Seconds that ``close`` and a fork wait for calls under way; each is bounded in time, but for a database that hangs.
_CALLS_TIMEOUT: Final = 10.0

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E")


class BaseClient(ForkMember):
    """The jobs of one tenant; see ``Client`` for the arguments. Thread-safe.

    Its methods block: the async client calls them in threads.  Both call them by ``_perform``.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        broker_url: str | None = None,
        database_url: str | None = None,
        tenant: str = names.DEFAULT_TENANT,
        prefix: str = names.PREFIX,
        queue: str = names.QUEUE,
    ) -> None:
        given: dict[str, Any] = {
            "redis_url": redis_url,
            "broker_url": broker_url,
            "database_url": database_url,
            "tenant": tenant,
            "prefix": prefix,
            "queue": queue,
        }
        for argument, value in given.items():
            if value is not None and not isinstance(value, str):
                raise InvalidSettingError(f"{argument} is a text, not {type(value).__name__}")
        _check_tenant(tenant)
        for argument in ("prefix", "queue"):
            if not given[argument]:
                raise InvalidSettingError(f"{argument} is empty; leave it out, or give the workers' one")
        if not redis_url:  # or None, from a variable that is not set
            raise InvalidSettingError(f"redis_url ({names.ENV_REDIS_URL}) is missing; it looks like {_EXAMPLE_URL}")
        self.tenant = tenant
        self._origin: Self | None = None  # the client whose connections this one uses
        self._prefix = prefix
        self._queue = queue
        self._gate = Gate()
        with _setting("redis_url", names.ENV_REDIS_URL):
            self._redis = RedisConnections(redis_url, self._gate.check)
        with _setting("broker_url", names.ENV_BROKER_URL) if broker_url else _setting("redis_url", names.ENV_REDIS_URL):
            self._sender = Sender(broker_url or redis_url, queue)
        with _setting("database_url", names.ENV_DATABASE_URL):
            self._database = None if database_url is None else ClientDatabase(database_url)
        self._summaries = SummaryReader(self._read_summaries)
        super().__init__()

    @classmethod
    def from_env(cls, tenant: str = names.DEFAULT_TENANT) -> Self:
        """Make a client from ``KEEPSTREAM_REDIS_URL`` and, if set, those for broker, database, prefix and queue.

        ``KEEPSTREAM_REDIS_PASSWORD`` goes into the URLs of Redis and broker that have no password.

        Raises:
            NotConfiguredError: ``KEEPSTREAM_REDIS_URL`` is not set.
            InvalidSettingError: a variable's value cannot be used, or its name is nearly one of these.
        """
        _refuse_misspelt_variables()
        redis_url = os.environ.get(names.ENV_REDIS_URL)
        if not redis_url:
            raise NotConfiguredError(f"{names.ENV_REDIS_URL} is not set; it looks like {_EXAMPLE_URL}")
        broker_url = os.environ.get(names.ENV_BROKER_URL) or None
        password = os.environ.get(names.ENV_REDIS_PASSWORD)
        with _setting("redis_url", names.ENV_REDIS_URL):
            redis_url = with_password(redis_url, password)
        with _setting("broker_url", names.ENV_BROKER_URL):
            broker_url = broker_url and with_password(broker_url, password)
        return cls(
            redis_url,
            broker_url=broker_url,
            database_url=os.environ.get(names.ENV_DATABASE_URL) or None,
            tenant=tenant,
            prefix=os.environ.get(names.ENV_PREFIX) or names.PREFIX,
            queue=os.environ.get(names.ENV_QUEUE) or names.QUEUE,
        )

    def for_tenant(self, tenant: str) -> Self:
        """Return a client for another tenant, which uses the connections and threads of this one.

        It costs next to nothing, and may be made for each request.  Closing it closes nothing; closing the client that
        it was made from ends both.

        Raises:
            InvalidSettingError: no tenant can be called so.
        """
        check_text("tenant", tenant)
        _check_tenant(tenant)
        view = copy.copy(self)
        view.tenant = tenant
        view._origin = self._origin or self  # noqa: SLF001  # and keeps it alive: it is the one that knows of forks
        return view

    def _perform(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call of the client's; whatever it raises is one of our errors.

        Raises:
            ClientClosedError: the client has been closed.
            UnexpectedError: something failed that nobody foresaw.
        """
        try:
            with self._gate.inside():
                return call(*args, **kwargs)
        except KeepstreamError:
            raise
        except Exception as error:
            self._gate.check()  # a connection may have been closed under the call
            raise UnexpectedError(f"the call failed in an unexpected way ({type(error).__name__})") from error

    # -- forks --

    def before_fork(self) -> None:
        """Close SQLite's connections: it must not be open across a fork, which would break its locks."""
        if self._database is not None and self._database.is_file:
            self._gate.shut(_CALLS_TIMEOUT)
            self._database.close()

    def after_fork_in_parent(self) -> None:
        """Let calls go on."""
        if self._database is not None and self._database.is_file:
            self._gate.open()

    def after_fork_in_child(self) -> None:
        """Forget the calls of the parent's threads."""
        self._gate.forget_calls()

    # -- calls --

    def _enqueue(self, request: Job | Mapping[str, Any] | None, fields: dict[str, Any]) -> str:
        accepted = self._own_job(request, fields)
        accepted.to_json()  # refuses what is no JSON or too large, before anything is written
        if self._database is None:
            self._sender.send(accepted.to_wire())
            return accepted.id
        return self._store_and_send(self._database, accepted)

    def _store_and_send(self, database: ClientDatabase, accepted: Job, retry_of: str | None = None) -> str:
        with database.transaction() as connection:
            is_new = queries.enqueue(connection, accepted, self._queue, retry_of)
        if is_new:
            # The row is what counts; the message only wakes a worker, and workers look for themselves as well.
            with contextlib.suppress(Exception):
                self._sender.send(JobRef(tenant=accepted.tenant, id=accepted.id).to_wire())
        return accepted.id

    def _own_job(self, request: Job | Mapping[str, Any] | None, fields: dict[str, Any]) -> Job:
        if isinstance(request, Job):
            if fields:
                raise InvalidJobError("a whole job takes no further arguments; set its fields when you make it")
            job = request
        else:
            job = make_job({"tenant": self.tenant, **_with_request(request, fields)})
        if job.tenant != self.tenant:
            raise InvalidJobError(f"tenant: the job is of '{job.tenant}', and this client is for '{self.tenant}'")
        return job

    def _run_follower(
        self,
        job_id: str,
        after: str | None,
        timeout: float,
        not_found_after: float,
        form: Form[E],
        on_waiting: Callable[[WaitingFor], None] | None = None,
        offer: Callable[[E], bool] | None = None,
        *,
        total_timeout: float = math.inf,
    ) -> FollowerRun[E]:
        """Return the run of a new follower; its operations are performed by the client's Redis connections."""
        cursor = _cursor(after)
        check_seconds("timeout", timeout)
        check_seconds("timeout", total_timeout)
        check_seconds("not_found_after", not_found_after)
        return Follower(
            job_id,
            cursor,
            form=form,
            has_database=self._database is not None,
            timeout=timeout,
            not_found_after=not_found_after,
            report=on_waiting or partial(_log_reason, job_id),
            offer=offer,
            total_timeout=total_timeout,
            pause=self._summaries.pause,
        ).run()

    def _run_waiting(self, job_id: str, timeout: float, not_found_after: float) -> FollowerRun[Event]:
        """Return the run of a follower whose reader waits for the end, and does not look at what comes before."""
        self._required_database()
        return self._run_follower(job_id, None, math.inf, not_found_after, TYPED, total_timeout=timeout)

    def _check_follow(self, job_id: str, after: str | None) -> bool:
        keys, cursor = self._keys(job_id), _cursor(after)
        newest = progress = outage = None
        try:
            newest = self._redis.read_newest(keys)
        except BrokerUnavailableError as error:
            outage = error
            if self._database is None:
                raise
        has_row = self._database is not None
        if self._database is not None:
            try:
                with self._database.transaction() as connection:
                    progress = queries.get_progress(connection, self.tenant, job_id)
            except StoreUnavailableError:
                if newest is None:
                    raise
                has_row = False
        if progress is None and outage is not None:
            raise outage  # its log may be there
        return is_more_to_come(job_id, cursor, newest, progress, has_database=has_row)

    def _get_ended(self, job_id: str) -> CompletionResult:
        result = self._get(job_id)
        if result is None:
            raise JobNotFoundError(f"job {job_id} has been deleted since it ended")
        return result

    def _read_summaries(self, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], JobSummary]:
        """Return the summaries of some jobs, by tenant and id."""
        by_tenant: dict[str, list[str]] = {}
        for tenant, job_id in jobs:
            by_tenant.setdefault(tenant, []).append(job_id)

        def read() -> dict[tuple[str, str], JobSummary]:
            with self._required_database().transaction() as connection:
                return {
                    (tenant, job_id): summary
                    for tenant, job_ids in by_tenant.items()
                    for job_id, summary in queries.get_summaries(connection, tenant, job_ids).items()
                }

        return self._perform(read)

    def _read_result(self, job_id: str) -> CompletionResult | None:
        with self._required_database().transaction() as connection:
            return queries.get(connection, self.tenant, job_id)

    def _cancel(self, job_id: str) -> JobStatus | None:
        keys = self._keys(job_id)
        status, ttl = None, _UNCLAIMED_CANCEL_TTL
        if self._database is not None:
            with self._database.transaction() as connection:
                status = queries.cancel(connection, self.tenant, job_id)
            if status is not None:
                if status.terminal and status is not JobStatus.CANCELLED:
                    return status  # it ended before, so nobody has to know
                ttl = _CANCEL_TTL
        try:
            message = json.dumps({"tenant": self.tenant, "job_id": job_id})
            self._redis.request_cancel(keys, names.control_channel(self._prefix), message, ttl)
        except BrokerUnavailableError:
            if status is None:
                raise
        return status

    def _get(self, job_id: str) -> CompletionResult | None:
        database = self._required_database()
        if not _can_be_an_id(job_id):
            return None
        with database.transaction() as connection:
            return queries.get(connection, self.tenant, job_id, whole=True)

    def _last_numbered(self, prefix: str) -> JobSummary | None:
        database = self._required_database()
        if re.fullmatch("[a-z][0-9a-z]{0,99}", prefix) is None:
            raise InvalidArgumentError("a prefix of numbered ids consists of small letters and digits, at most 100")
        with database.transaction() as connection:
            return queries.get_last_numbered(connection, self.tenant, prefix)

    def _list(self, wanted: Wanted, before: str | None, limit: int) -> JobPage:
        database = self._required_database()
        check_limit(limit)
        if before is not None:
            _check_id(before)
        if not all(_can_be_stored(text) for text in (wanted.model, wanted.provider) if text is not None):
            return JobPage()
        with database.transaction() as connection:
            return list_jobs(connection, self.tenant, wanted, before=before, limit=limit)

    def _retry(self, job_id: str, *, force: bool) -> str:
        database = self._required_database()
        _check_id(job_id)
        with database.transaction() as connection:
            found = queries.get_for_retry(connection, self.tenant, job_id)
        if found is None:
            raise JobNotFoundError(f"there is no job {job_id} to run again")
        if not found.status.terminal:
            raise JobStateError(f"job {job_id} is {found.status} and goes on by itself; cancel it first")
        if found.error_code == ErrorCode.INVALID_JOB:
            raise JobStateError(f"job {job_id} was refused because it was not valid; enqueue it anew, corrected")
        if found.status is JobStatus.COMPLETED and not force:
            raise JobStateError(
                f"job {job_id} is completed; to pay for another answer all the same, use force=True or --force"
            )
        again = found.job.model_copy(update={"id": uuid.uuid4().hex, "idempotency_key": None, "expires_at": None})
        if found.queue == self._queue:
            return self._store_and_send(database, again, retry_of=job_id)
        with database.transaction() as connection:
            queries.enqueue(connection, again, found.queue, retry_of=job_id)  # that queue's workers find it
        return again.id

    def _delete(self, job_id: str) -> bool:
        database, keys = self._required_database(), self._keys(job_id)
        with database.transaction() as connection:
            progress = queries.get_progress(connection, self.tenant, job_id)
        if progress is None:
            return False
        if not progress.status.terminal:
            raise JobStateError(f"job {job_id} is {progress.status}; cancel it first, and delete it when it has ended")
        self._redis.delete_log(keys)  # first, so that who is refused here can try again
        with database.transaction() as connection:
            return queries.delete_ended(connection, self.tenant, job_id)

    def _waiting_for(self, job_id: str) -> WaitingFor | None:
        database = self._required_database()
        _check_id(job_id)
        try:
            with database.transaction() as connection:
                summary = queries.get_summary(connection, self.tenant, job_id)
        except StoreUnavailableError as error:
            return WaitingFor(cause="database", text=f"the database: {error}")
        if summary is None:
            raise JobNotFoundError(f"there is no job {job_id} in the database")
        if summary.waiting_for is None or not summary.waiting_for.passes:
            return summary.waiting_for
        try:
            self._redis.ping()
        except BrokerUnavailableError as error:
            return WaitingFor(cause="redis", text=f"Redis: {error}")
        return summary.waiting_for

    def _close(self) -> None:
        self._gate.close(_CALLS_TIMEOUT)
        self._sender.close()
        self._redis.close()
        if self._database is not None:
            self._database.close()

    def _keys(self, job_id: str) -> names.JobKeys:
        _check_id(job_id)
        return names.job_keys(self.tenant, job_id, self._prefix)

    def _required_database(self) -> ClientDatabase:
        if self._database is None:
            raise NotConfiguredError(f"this needs a database: give database_url or set {names.ENV_DATABASE_URL}")
        return self._database


def _log_reason(job_id: str, reason: WaitingFor) -> None:
    level = logging.INFO if reason.passes else logging.WARNING
    _log.log(level, "job %s waits for %s", job_id, reason.text)


def _check_tenant(tenant: str | None) -> None:
    if not _can_be_an_id(tenant or ""):
        raise InvalidSettingError("a tenant consists of letters, digits, '.', '_' and '-', at most 128 of them")


def _cursor(after: str | None) -> names.EventId | None:
    if after is not None:
        check_text("after", after)
    return parse_cursor(after)


def _can_be_an_id(text: str) -> bool:
    check_text("an id", text)
    return re.fullmatch(names.ID_PATTERN, text) is not None


def _check_id(job_id: str) -> None:
    if not _can_be_an_id(job_id):
        raise JobNotFoundError("no job has such an id: ids consist of letters, digits, '.', '_' and '-'")


def _can_be_stored(text: str) -> bool:
    """Tell whether a text may be in a row: it is UTF-8, and PostgreSQL refuses a NUL."""
    return re.search(r"[\x00\ud800-\udfff]", text) is None


def _with_request(request: object, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a job from the arguments of ``enqueue``."""
    parts = {name: fields.pop(name) for name in ("model", "messages") if name in fields}
    if request is None and not parts:
        return fields
    if "request" in fields or (parts and request is not None):
        raise InvalidJobError("give the request once: as the first argument, or as model= and messages=")
    if isinstance(request, Mapping) and request.keys() & {"v", "request"}:
        raise InvalidJobError("this looks like a whole job, not like a request: give parse_job(...) of it")
    return fields | {"request": parts if request is None else request}


@contextlib.contextmanager
def _setting(argument: str, variable: str) -> Iterator[None]:
    """Have the error about a setting name the argument and the environment variable that it comes from."""
    try:
        yield
    except InvalidSettingError as error:
        raise InvalidSettingError(f"{argument} ({variable}): {error}") from None


def _refuse_misspelt_variables() -> None:
    """Raise ``InvalidSettingError`` for a variable whose name is nearly one that a client reads.

    Further ``KEEPSTREAM_`` variables are the worker's, and no business of the client's.
    """
    known = [variable.removeprefix(names.ENVIRONMENT) for variable in _VARIABLES]
    for name, value in os.environ.items():
        spelling = name.upper()
        if (
            name in _VARIABLES
            or not spelling.startswith(names.ENVIRONMENT)
            or names.is_set_by_the_platform(name, value)
        ):
            continue
        meant = names.nearest(spelling.removeprefix(names.ENVIRONMENT), known, _SIMILAR)
        if meant is not None:
            raise InvalidSettingError(f"{name}: there is no such variable; did you mean {names.ENVIRONMENT}{meant}?")
