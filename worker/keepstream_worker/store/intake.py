"""Intake: jobs that messages bring are stored, and wait; or start at once where nothing is to be chosen.

In: jobs, or the names of jobs that clients have stored, from messages.  Out: rows; claims of those that started.

A new job's rows and the note of its arrival are one transaction, so that no turn can miss it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, select

from keepstream.client import queries
from keepstream.errors import StoreUnavailableError
from keepstream.jobs import Job
from keepstream.results import JobStatus
from keepstream.tables import jobs, requests, waiting
from keepstream_worker.store import claims, intake_postgresql, intake_sqlite
from keepstream_worker.store.claims import Claim, Direct, Rows
from keepstream_worker.store.conditions import among, each
from keepstream_worker.store.pools import find_pools
from keepstream_worker.turn import Pool
from keepstream_worker.values import AttemptReason, JobKey, Target


class Stored(StrEnum):
    """What became of a message's job, if it did not start at once."""

    NEW = "new"  #: It waits.
    KNOWN = "known"  #: It was stored before, or runs, or has ended: nothing is to be done.
    OTHER_REQUEST = "other_request"  #: The id belongs to a different request.


class Incoming(NamedTuple):
    """A job that a message brought."""

    job: Job
    queue: str
    rows: Rows  #: What is stored of it, if it is new and waits.
    direct: Direct | None = None  #: Nothing is to be chosen: it starts, if it is new.

    @property
    def key(self) -> JobKey:
        """The job's."""
        return JobKey(self.job.tenant, self.job.id)

    @property
    def size(self) -> int:
        """Bytes that are to be written, more or less."""
        return len(self.text)

    @property
    def text(self) -> str:
        """The job as JSON, in ASCII."""
        return str(self.rows[requests]["job"])

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, as estimated."""
        return int(self.rows[waiting]["prompt_tokens"])

    @property
    def max_tokens(self) -> int | None:
        """Of the answer, if the request says so."""
        most: int | None = self.rows[waiting]["max_tokens"]
        return most


class Admits(NamedTuple):
    """By what a stored job starts at once."""

    worker_id: str
    total_timeout: float  #: Seconds from the first attempt's start, for a job that does not say.
    #: By pool, tenant, the prompt's tokens and the answer's: whom to ask, and the tokens to be charged; None: it waits.
    #: Quick, and without I/O: it is asked in the middle of a transaction.
    admits: Callable[[Pool, str, int, int | None], tuple[Target, int] | None]


class Named(NamedTuple):
    """A job that a message named."""

    key: JobKey
    direct: Admits | None = None

    @property
    def size(self) -> int:
        """Bytes that are to be written."""
        return 0


def incoming(job: Job, queue: str) -> Incoming:
    """Return what is to be stored of a job.

    Raises:
        InvalidJobError: the job cannot be written as JSON.
    """
    return Incoming(job, queue, queries.new_rows(job, queue))


# -- jobs that came whole --


def take_in(connection: Connection, given: list[Incoming]) -> list[Claim | Stored]:
    """Store each job that has no row yet: it waits, or starts at once.

    A job that the worker was given by an earlier call, whose commit was cut, is given once more: whoever runs it
    already does not ask for it.
    """
    first: dict[JobKey, Incoming] = {}
    for item in given:
        first.setdefault(item.key, item)
    ordered = [first[key] for key in sorted(first)]  # one order of locks for all workers
    insert = _INSERT[connection.dialect.name]
    new = {
        JobKey(tenant, job_id): _New(bool(expired), now)
        for tenant, job_id, expired, now in insert(connection, [(_rows_of(item), item.direct) for item in ordered])
    }
    asked = Counter(item.key for item in given)
    stored = _find(connection, [key for key, times in asked.items() if times > 1 or key not in new])
    answers: list[Claim | Stored] = []
    for item in given:
        if item is first[item.key] and item.key in new:
            answers.append(Stored.NEW if item.direct is None else _new_claim(item, item.direct, new[item.key]))
        else:
            answers.append(_known(item, stored))
    return answers


class _New(NamedTuple):
    """What the database says of a new job."""

    expired: bool
    now: float


_INSERT: Final = {"postgresql": intake_postgresql.insert, "sqlite": intake_sqlite.insert}


def _rows_of(item: Incoming) -> Rows:
    if item.direct is None:
        return item.rows
    return {**item.rows, jobs: {**item.rows[jobs], "status": JobStatus.RUNNING.value, "attempt": 1, "tries": 1}}


class _Place(NamedTuple):
    """The row of a job's first attempt among those that run."""

    provider: str
    model: str
    lane: int
    pool: int
    tokens: int
    prompt_tokens: int
    max_tokens: int | None
    attempt: int = 1


def _new_claim(item: Incoming, direct: Direct, new: _New) -> Claim:
    job, place = item.job, item.rows[waiting]
    chain = tuple(Target(*target) for target in job.chain)
    return Claim(
        key=item.key,
        attempt=1,
        tries=1,
        max_attempts=job.max_attempts,
        reason=AttemptReason.FIRST,
        remaining_seconds=job.total_timeout or direct.total_timeout,
        expired=new.expired,
        cancel_requested=False,
        job=job,
        target=direct.target,
        chain=chain[chain.index(direct.target) :],
        queue=item.queue,
        job_class=job.job_class,
        lane=place["lane"],
        pool=place["pool"],
        tokens=direct.tokens,
        prompt_tokens=item.prompt_tokens,
        max_tokens=item.max_tokens,
        chosen_at=new.now,
    )


class _Found(NamedTuple):
    """What is stored of jobs."""

    rows: Mapping[JobKey, Any]
    places: Mapping[JobKey, Any]  #: Among those that run.
    pools: Mapping[int, Pool]


_FIND_JOBS: Final = {
    dialect: select(*claims.COLUMNS, jobs.c.request_hash).where(named) for dialect, named in among(jobs).items()
}


def _find(connection: Connection, keys: list[JobKey]) -> _Found:
    if not keys:
        return _Found({}, {}, {})
    rows = {JobKey(row.tenant, row.id): row for row in each(connection, _FIND_JOBS, keys)}
    places = claims.find_running(connection, keys)
    return _Found(rows, places, find_pools(connection, {place.pool for place in places.values()}))


def _known(item: Incoming, found: _Found) -> Claim | Stored:
    row = found.rows.get(item.key)
    if row is None:
        raise StoreUnavailableError("the job's row was purged while it was looked at")  # so it is stored at once
    if row.request_hash != item.rows[jobs]["request_hash"]:
        return Stored.OTHER_REQUEST
    place: Any = found.places.get(item.key)
    if item.direct is not None and _is_ours(row, place, item.direct.worker_id):
        return claims.make_claim(row, place, found.pools, item.job, item.direct.total_timeout, is_new=False)
    return Stored.KNOWN


def _is_ours(row: Any, place: Any, worker_id: str) -> bool:
    """Whether it is this worker's first attempt: it asks for it because the commit of its start was cut."""
    return place is not None and place.worker_id == worker_id and place.attempt == row.attempt == 1


# -- jobs that are named --


def take_named(connection: Connection, given: list[Named]) -> list[Claim | Stored | None]:
    """Start each job that waits and has never started, if it is to start at once; None: there is no such job.

    A job that the worker was given by an earlier call is given once more, as by ``take_in``.
    """
    direct: dict[JobKey, Admits] = {}
    for item in given:
        if item.direct is not None:
            direct.setdefault(item.key, item.direct)
    rows = _find_named(connection, _LOCK_NAMED, direct.keys())
    rows |= _find_named(connection, _FIND_NAMED, {item.key for item in given} - direct.keys())
    found = _start_named(connection, rows, direct)
    started = frozenset(found)
    answers: list[Claim | Stored | None] = []
    for item in given:
        if item.key not in rows:
            answers.append(None)
        elif item.direct is not None and item.key in found:
            answers.append(found.pop(item.key))  # a second message for one job is a duplicate
        else:
            waits = item.key not in started and rows[item.key].seq is not None
            answers.append(Stored.NEW if waits else Stored.KNOWN)
    return answers


#: What is read of jobs that are named: their rows, and those by which they wait, if they do.
_NAMED: Final = (
    *claims.COLUMNS,
    *(waiting.c[name] for name in ("seq", "lane", "pool", "restarted_due", "prompt_tokens", "max_tokens")),
)
_WAITS: Final = and_(waiting.c.tenant == jobs.c.tenant, waiting.c.job_id == jobs.c.id)
_FIND_NAMED: Final = {
    dialect: select(*_NAMED).outerjoin_from(jobs, waiting, _WAITS).where(named)
    for dialect, named in among(jobs).items()
}
#: The same with their requests, and locked: from then on nobody but a turn moves them. If somebody had them locked, the
#: rows by which they wait may be gone when this returns.
_LOCK_NAMED: Final = {
    dialect: find.add_columns(requests.c.job)
    .join_from(jobs, requests, and_(requests.c.tenant == jobs.c.tenant, requests.c.job_id == jobs.c.id))
    .order_by(jobs.c.tenant, jobs.c.id)
    .with_for_update(of=jobs, key_share=True)
    for dialect, find in _FIND_NAMED.items()
}


def _find_named(connection: Connection, statements: Mapping[str, Any], keys: Collection[JobKey]) -> dict[JobKey, Any]:
    return {JobKey(row.tenant, row.id): row for row in each(connection, statements, keys)}


def _start_named(
    connection: Connection, rows: Mapping[JobKey, Any], direct: Mapping[JobKey, Admits]
) -> dict[JobKey, Claim]:
    """Start those of the jobs that may; return their claims, also of those that were started before."""
    places = claims.find_running(connection, [key for key in direct if key in rows and rows[key].seq is None])
    waits = {key: rows[key] for key in sorted(direct) if key in rows and rows[key].seq is not None}
    pools = find_pools(connection, {row.pool for row in (*waits.values(), *places.values())})
    found = {
        key: claims.make_claim(rows[key], place, pools, rows[key].job, direct[key].total_timeout, is_new=False)
        for key, place in places.items()
        if _is_ours(rows[key], place, direct[key].worker_id)
    }
    starts: dict[JobKey, tuple[Any, Direct]] = {}
    for key, row in waits.items():
        if row.restarted_due is None and row.pool in pools:
            how = direct[key]
            answer = how.admits(pools[row.pool], key.tenant, row.prompt_tokens, row.max_tokens)
            if answer is not None:
                starts[key] = (row, Direct(how.worker_id, how.total_timeout, *answer))
    if not starts:
        return found
    for tenant, job_id in _TAKE[connection.dialect.name](connection, list(starts.values())):
        row, start = starts[JobKey(tenant, job_id)]
        place = _Place(*start.target, row.lane, row.pool, start.tokens, row.prompt_tokens, row.max_tokens)
        claim = claims.make_claim(row, place, pools, row.job, start.total_timeout, is_new=True)
        found[claim.key] = claim
    return found


_TAKE: Final = {"postgresql": intake_postgresql.take, "sqlite": intake_sqlite.take}
