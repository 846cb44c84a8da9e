"""Intake: jobs that messages bring are stored, and wait; or start at once where nothing is to be chosen.

In: jobs, or the names of jobs that clients have stored, from messages.  Out: rows; claims of those that started.

A new job's rows and the note of its arrival are one transaction, so that no turn can miss it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Float, Table, bindparam, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client import queries
from keepstream.jobs import Job
from keepstream.results import JobStatus
from keepstream.tables import arrivals, jobs, now, pools, requests, running, seconds_from_now, waiting
from keepstream_worker.store import claims
from keepstream_worker.store.claims import Claim, Start, open_attempts
from keepstream_worker.store.conditions import among
from keepstream_worker.store.pools import add_pools, find_pools
from keepstream_worker.store.waiting import OwnedJob, note_arrivals
from keepstream_worker.turn import Pool
from keepstream_worker.values import AttemptReason, JobKey, Target


class Stored(StrEnum):
    """What became of a message's job, if it did not start at once."""

    NEW = "new"  #: It waits.
    KNOWN = "known"  #: It was stored before, or runs, or has ended: nothing is to be done.
    OTHER_REQUEST = "other_request"  #: The id belongs to a different request.


class Direct(NamedTuple):
    """How a job starts at once."""

    worker_id: str
    total_timeout: float  #: Seconds from the first attempt's start.
    target: Target
    tokens: int  #: Charged for it.


class Incoming(NamedTuple):
    """A job that a message brought."""

    job: Job
    queue: str
    rows: Mapping[Table, Mapping[str, Any]]  #: What is stored of it, if it is new and waits.
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
    total_timeout: float  #: Seconds from the first attempt's start.
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
    new = _insert_jobs(connection, [item for item in ordered if item.direct is None])
    new |= _insert_jobs(connection, [item for item in ordered if item.direct is not None])
    _insert_what_is_theirs(connection, [item for item in ordered if item.key in new])
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


def _insert_jobs(connection: Connection, items: list[Incoming]) -> dict[JobKey, _New]:
    """Insert the rows of jobs that have none, which all wait or all start; return what is known of the new ones."""
    if not items:
        return {}
    rows = []
    for item in items:
        row = dict(item.rows[jobs])
        if item.direct is not None:
            row |= {"status": JobStatus.RUNNING, "attempt": 1, "tries": 1, "total_timeout": item.direct.total_timeout}
        rows.append(row)
    found = connection.execute(_INSERT_JOBS[connection.dialect.name, items[0].direct is not None], rows)
    return {JobKey(tenant, job_id): _New(bool(expired), now) for tenant, job_id, expired, now in found}


def _insert_statement(dialect: Any, *, starts: bool) -> Any:
    statement = dialect.insert(jobs).values(created_at=now())
    if starts:
        deadline = seconds_from_now(bindparam("total_timeout", type_=Float))
        statement = statement.values(started_at=now(), deadline_at=deadline)
    return statement.on_conflict_do_nothing().returning(jobs.c.tenant, jobs.c.id, claims.HAS_EXPIRED, claims.NOW)


_INSERT_JOBS: Final = {
    (dialect_name, starts): _insert_statement(dialect, starts=starts)
    for dialect_name, dialect in (("postgresql", postgresql), ("sqlite", sqlite))
    for starts in (False, True)
}


def _insert_what_is_theirs(connection: Connection, items: list[Incoming]) -> None:
    """Insert the further rows of new jobs."""
    if not items:
        return
    connection.execute(requests.insert(), [item.rows[requests] for item in items])
    add_pools(connection, [item.rows[pools] for item in items])
    waits = [item for item in items if item.direct is None]
    if waits:
        connection.execute(waiting.insert(), [item.rows[waiting] for item in waits])
        note_arrivals(connection, [item.key for item in waits])
    starts = [(item, item.direct) for item in items if item.direct is not None]
    if starts:
        _insert_running(connection, [_place_of(item, direct) for item, direct in starts])
        open_attempts(
            connection,
            [
                Start(_owned(item.key, direct), AttemptReason.FIRST, direct.target, direct.total_timeout)
                for item, direct in starts
            ],
        )


class _Place(NamedTuple):
    """The row of a job's first attempt among those that run."""

    key: JobKey
    worker_id: str
    provider: str
    model: str
    lane: int
    pool: int
    tokens: int
    prompt_tokens: int
    max_tokens: int | None
    attempt: int = 1


def _place_of(item: Incoming, direct: Direct) -> _Place:
    row = item.rows[waiting]
    return _Place(
        item.key,
        direct.worker_id,
        *direct.target,
        lane=row["lane"],
        pool=row["pool"],
        tokens=direct.tokens,
        prompt_tokens=item.prompt_tokens,
        max_tokens=item.max_tokens,
    )


def _owned(key: JobKey, direct: Direct | Admits) -> OwnedJob:
    return OwnedJob(key, 1, direct.worker_id)


_INSERT_RUNNING: Final = running.insert().values(started_at=now(), cancel_requested=False)


def _insert_running(connection: Connection, places: list[_Place]) -> None:
    connection.execute(
        _INSERT_RUNNING,
        [
            {"tenant": place.key.tenant, "job_id": place.key.id}
            | {column: value for column, value in place._asdict().items() if column != "key"}
            for place in places
        ],
    )


def _new_claim(item: Incoming, direct: Direct, new: _New) -> Claim:
    job = item.job
    chain = tuple(Target(*target) for target in job.chain)
    place = _place_of(item, direct)
    return Claim(
        key=item.key,
        attempt=1,
        tries=1,
        max_attempts=job.max_attempts,
        reason=AttemptReason.FIRST,
        remaining_seconds=direct.total_timeout,
        expired=new.expired,
        cancel_requested=False,
        job=item.text,
        target=direct.target,
        chain=chain[chain.index(direct.target) :],
        queue=item.queue,
        job_class=job.job_class,
        lane=place.lane,
        pool=place.pool,
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


_FIND_JOBS: Final = select(*claims.COLUMNS, jobs.c.request_hash).where(among(jobs))


def _find(connection: Connection, keys: list[JobKey]) -> _Found:
    if not keys:
        return _Found({}, {}, {})
    rows = {JobKey(row.tenant, row.id): row for row in connection.execute(_FIND_JOBS, {"keys": sorted(keys)})}
    places = claims.find_running(connection, keys)
    return _Found(rows, places, find_pools(connection, {place.pool for place in places.values()}))


def _known(item: Incoming, found: _Found) -> Claim | Stored:
    row = found.rows[item.key]
    if row.request_hash != item.rows[jobs]["request_hash"]:
        return Stored.OTHER_REQUEST
    place: Any = found.places.get(item.key)
    if item.direct is not None and _is_ours(row, place, item.direct.worker_id):
        return claims.make_claim(row, place, found.pools, item.text, item.direct.total_timeout, is_new=False)
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
    rows = claims.lock(connection, direct.keys())
    others = sorted({item.key for item in given} - direct.keys())
    if others:
        rows |= {JobKey(row.tenant, row.id): row for row in connection.execute(_FIND_JOBS, {"keys": others})}
    # Read after the rows are locked: nobody but a turn moves these jobs any more.
    waits = {
        JobKey(row.tenant, row.job_id): row
        for row in connection.execute(_FIND_WAITING, {"keys": sorted(rows)} if rows else {"keys": []})
    }
    found = _start_waiting(connection, rows, waits, direct)
    answers: list[Claim | Stored | None] = []
    for item in given:
        if item.key not in rows:
            answers.append(None)
        elif item.direct is not None and item.key in found:
            answers.append(found.pop(item.key))  # a second message for one job is a duplicate
        else:
            answers.append(Stored.NEW if item.key in waits else Stored.KNOWN)
    return answers


_FIND_WAITING: Final = select(waiting).where(among(waiting))
_TAKE: Final = (
    delete(waiting)
    .where(waiting.c.seq.in_(bindparam("seqs", expanding=True)))
    .returning(waiting.c.tenant, waiting.c.job_id)
)
_ARRIVED: Final = delete(arrivals).where(arrivals.c.seq.in_(bindparam("seqs", expanding=True)))


def _start_waiting(
    connection: Connection, rows: Mapping[JobKey, Any], waits: dict[JobKey, Any], direct: Mapping[JobKey, Admits]
) -> dict[JobKey, Claim]:
    """Start those of the jobs that may; they do not wait any more. Return the claims, also of those started before."""
    places = claims.find_running(connection, [key for key in direct if key in rows and key not in waits])
    near = [row for key, row in waits.items() if key in direct]
    known = find_pools(connection, {row.pool for row in (*near, *places.values())})
    found = {
        key: claims.make_claim(rows[key], place, known, rows[key].job, direct[key].total_timeout, is_new=False)
        for key, place in places.items()
        if _is_ours(rows[key], place, direct[key].worker_id)
    }
    admitted = {}
    for key, how in direct.items():
        row = waits.get(key)
        if row is None or row.restarted_due is not None or row.pool not in known:
            continue
        answer = how.admits(known[row.pool], key.tenant, row.prompt_tokens, row.max_tokens)
        if answer is not None:
            admitted[key] = _Place(
                key, how.worker_id, *answer[0], row.lane, row.pool, answer[1], row.prompt_tokens, row.max_tokens
            )
    if not admitted:
        return found
    seqs = {"seqs": [waits[key].seq for key in admitted]}
    # A turn may have been quicker.
    taken = {JobKey(tenant, job_id) for tenant, job_id in connection.execute(_TAKE, seqs)}
    connection.execute(_ARRIVED, seqs)
    for key in admitted:
        del waits[key]
    started = [place for key, place in sorted(admitted.items()) if key in taken]
    if started:
        _insert_running(connection, started)
        claims.start(
            connection,
            [
                Start(
                    _owned(place.key, direct[place.key]),
                    rows[place.key].next_reason,
                    Target(place.provider, place.model),
                    direct[place.key].total_timeout,
                )
                for place in started
            ],
        )
    return found | {
        place.key: claims.make_claim(
            rows[place.key], place, known, rows[place.key].job, direct[place.key].total_timeout, is_new=True
        )
        for place in started
    }
