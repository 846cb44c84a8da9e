"""Claims: a job that was chosen for a worker becomes its attempt.

In: what a turn has picked, from the chooser.  Out: the job under a new attempt number, written where everybody sees it.

The turn has given the job to the worker already, in the narrow tables. Its commit need not be on the disk yet; this one
is, and no stream starts before.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection, Float, Integer, Table, and_, bindparam, case, func, select, text, true, update

from keepstream.jobs import Job
from keepstream.results import TERMINAL_STATUSES, JobStatus
from keepstream.tables import attempts, epoch_seconds, jobs, now, requests, running, seconds_from_now, seconds_until
from keepstream_worker.store.conditions import among, each, is_named, name
from keepstream_worker.store.pools import find_pools
from keepstream_worker.store.waiting import OwnedJob, give_up
from keepstream_worker.turn import Pick, Pool
from keepstream_worker.values import AttemptReason, JobKey, Target

Rows = Mapping[Table, Mapping[str, Any]]  #: What is stored of a new job.


class Picked(NamedTuple):
    """A job that a turn has given to a worker."""

    pick: Pick
    worker_id: str
    total_timeout: float  #: Seconds from the first attempt's start, for a job that does not say.

    @property
    def owned(self) -> OwnedJob:
        """The job, with the attempt that begins, as the worker owns it."""
        return OwnedJob(self.pick.job.key, self.pick.job.attempt + 1, self.worker_id)


class Direct(NamedTuple):
    """How a job starts at once."""

    worker_id: str
    total_timeout: float  #: Seconds from the first attempt's start, for a job that does not say.
    target: Target
    tokens: int  #: Charged for it.


@dataclass(frozen=True, slots=True)
class Claim:
    """The job is this worker's, under this attempt number."""

    key: JobKey
    attempt: int
    tries: int  #: Attempts that count against ``max_attempts``, this one included.
    max_attempts: int | None
    reason: AttemptReason
    remaining_seconds: float  #: Until the job's total time is used up.
    expired: bool  #: The job's ``expires_at`` had passed before its first attempt.
    cancel_requested: bool
    job: Job | str  #: As its message brought it, or as it is stored: JSON.
    target: Target  #: Whom to ask.
    chain: tuple[Target, ...]  #: What is left of the job's targets, from ``target`` on.
    queue: str
    job_class: str
    lane: int
    pool: int
    tokens: int  #: Charged for this attempt.
    prompt_tokens: int  #: As estimated.
    max_tokens: int | None  #: Of the answer, if the request says so.
    chosen_at: float  #: When it was chosen; seconds since the epoch, by the database's clock.
    running: int = 0  #: Jobs at the target then, this one included; 0: they were not counted.


class Place(Protocol):
    """A job's row among those that run."""

    @property
    def attempt(self) -> int:
        """The one that begins, or is under way."""

    @property
    def provider(self) -> str:
        """Who is asked."""

    @property
    def model(self) -> str:
        """Of that provider."""

    @property
    def lane(self) -> int:
        """As the job's when it waited."""

    @property
    def pool(self) -> int:
        """As the job's when it waited."""

    @property
    def tokens(self) -> int:
        """Charged for the attempt."""

    @property
    def prompt_tokens(self) -> int:
        """As the job's when it waited."""

    @property
    def max_tokens(self) -> int | None:
        """As the job's when it waited."""


HAS_EXPIRED: Final = case((jobs.c.expires_at <= now(), true()), else_=False).label("has_expired")

NOW: Final = epoch_seconds(now()).label("now")

#: What a claim takes from a job's row.
COLUMNS: Final = (
    jobs.c.tenant,
    jobs.c.id,
    jobs.c.status,
    jobs.c.attempt,
    jobs.c.tries,
    jobs.c.max_attempts,
    jobs.c.next_reason,
    jobs.c.queue,
    jobs.c["class"].label("job_class"),
    jobs.c.total_timeout,
    seconds_until(jobs.c.deadline_at).label("remaining"),
    HAS_EXPIRED,
    NOW,
    jobs.c.cancel_requested_at,
)

_LOCK: Final = {
    dialect: select(*COLUMNS, requests.c.job)
    .join(requests, and_(requests.c.tenant == jobs.c.tenant, requests.c.job_id == jobs.c.id))
    .where(named)
    .order_by(jobs.c.tenant, jobs.c.id)  # one order of locks for all workers
    .with_for_update(of=jobs, key_share=True)
    for dialect, named in among(jobs).items()
}
#: With several keys at once PostgreSQL's planner would read the whole of a table in which few rows are left, though it
#: was large, or those that ended are kept by a transaction held open; with an offset it looks for each by itself.
_FIND_RUNNING: Final[dict[str, Any]] = {
    "sqlite": select(running).where(among(running)["sqlite"]),
    "postgresql": text("""
SELECT r.* FROM unnest(CAST(:tenants AS text[]), CAST(:job_ids AS text[])) k(tenant, job_id)
CROSS JOIN LATERAL (SELECT * FROM keepstream_running WHERE tenant = k.tenant AND job_id = k.job_id OFFSET 0) r
"""),
}


def lock(connection: Connection, keys: Collection[JobKey]) -> dict[JobKey, Any]:
    """Return the rows of jobs, which nobody else changes until the transaction ends, with their request."""
    return {JobKey(row.tenant, row.id): row for row in each(connection, _LOCK, keys)}


def find_running(connection: Connection, keys: Collection[JobKey]) -> dict[JobKey, Any]:
    """Return the rows that jobs have among those that run."""
    if connection.dialect.name == "sqlite":
        rows = each(connection, _FIND_RUNNING, keys)
    elif keys:
        values = {"tenants": [key.tenant for key in keys], "job_ids": [key.id for key in keys]}
        rows = list(connection.execute(_FIND_RUNNING["postgresql"], values))
    else:
        rows = []
    return {JobKey(row.tenant, row.job_id): row for row in rows}


def make_claim(
    row: Any,
    place: Place,
    pools: Mapping[int, Pool],
    job: Job | str,
    total_timeout: float,
    *,
    is_new: bool,
    pick: Pick | None = None,
) -> Claim:
    """Return a claim as its rows say.

    Args:
        row: The job's, with ``COLUMNS``.
        place: The one that it has among those that run.
        pools: Has its pool.
        job: As ``Claim.job``.
        total_timeout: Seconds, if the job does not say.
        is_new: Whether ``row`` was read before the attempt was written there.
        pick: By which a turn has given it to the worker, if one has.
    """
    target = Target(place.provider, place.model)
    pool = pools.get(place.pool)
    chain = pool.chain if pool is not None else ()
    return Claim(
        key=JobKey(row.tenant, row.id),
        attempt=place.attempt,
        tries=row.tries + is_new,
        max_attempts=row.max_attempts,
        reason=AttemptReason(row.next_reason),
        remaining_seconds=(row.total_timeout or total_timeout) if row.remaining is None else row.remaining,
        expired=place.attempt == 1 and bool(row.has_expired),
        cancel_requested=row.cancel_requested_at is not None,
        job=job,
        target=target,
        chain=chain[chain.index(target) :] if target in chain else (target,),
        queue=row.queue,
        job_class=row.job_class,
        lane=place.lane,
        pool=place.pool,
        tokens=place.tokens,
        prompt_tokens=place.prompt_tokens,
        max_tokens=place.max_tokens,
        chosen_at=row.now if pick is None else pick.chosen_at,
        running=0 if pick is None else pick.running,
    )


class Start(NamedTuple):
    """An attempt that begins."""

    owned: OwnedJob
    reason: str
    target: Target
    total_timeout: float  #: Seconds, for a job that does not say.


#: The job's own, or the worker's.
_TOTAL_TIMEOUT: Final = func.coalesce(jobs.c.total_timeout, bindparam("given_timeout", type_=Float))

#: The job's row says which attempt runs, and the attempt has a row: on PostgreSQL, where each statement costs a round
#: trip and a plan, both at once for all jobs of a group.
_START: Final[dict[str, Any]] = {
    "sqlite": update(jobs)
    .where(is_named(jobs))
    .values(
        status=JobStatus.RUNNING,
        attempt=bindparam("new_attempt", type_=Integer),
        tries=jobs.c.tries + 1,
        started_at=func.coalesce(jobs.c.started_at, now()),
        deadline_at=func.coalesce(jobs.c.deadline_at, seconds_from_now(_TOTAL_TIMEOUT)),
    ),
    "postgresql": text("""
WITH given AS (
  SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:job_ids AS text[]), CAST(:numbers AS int[]),
    CAST(:reasons AS text[]), CAST(:worker_ids AS text[]), CAST(:providers AS text[]), CAST(:models AS text[]),
    CAST(:total_timeouts AS float8[]))
    g(tenant, job_id, number, reason, worker_id, provider, model, total_timeout)
), met AS (
  SELECT j.place, g.number, g.total_timeout FROM given g CROSS JOIN LATERAL (
    SELECT ctid AS place FROM keepstream_jobs WHERE tenant = g.tenant AND id = g.job_id OFFSET 0
  ) j
), started AS (
  UPDATE keepstream_jobs j SET status = 'running', attempt = m.number, tries = j.tries + 1,
    started_at = coalesce(j.started_at, statement_timestamp()),
    deadline_at = coalesce(j.deadline_at, statement_timestamp()
      + make_interval(secs => coalesce(j.total_timeout, m.total_timeout)))
  FROM met m WHERE j.ctid = m.place
)
INSERT INTO keepstream_attempts (tenant, job_id, number, reason, worker_id, provider, model, started_at)
SELECT tenant, job_id, number, reason, worker_id, provider, model, statement_timestamp() FROM given
"""),
}
_OPEN_ATTEMPT: Final = {"sqlite": attempts.insert().values(started_at=now())}


def start(connection: Connection, starts: Sequence[Start]) -> None:
    """Write that attempts begin, in the rows of their jobs, which the caller has locked, and in their own."""
    if not starts:
        return
    dialect = connection.dialect.name
    if dialect == "postgresql":
        values = {
            "tenants": [start.owned.key.tenant for start in starts],
            "job_ids": [start.owned.key.id for start in starts],
            "numbers": [start.owned.attempt for start in starts],
            "reasons": [start.reason for start in starts],
            "worker_ids": [start.owned.worker_id for start in starts],
            "providers": [start.target.provider for start in starts],
            "models": [start.target.model for start in starts],
            "total_timeouts": [start.total_timeout for start in starts],
        }
        connection.execute(_START[dialect], values)
    else:
        connection.execute(
            _START[dialect],
            [
                name(start.owned.key) | {"new_attempt": start.owned.attempt, "given_timeout": start.total_timeout}
                for start in starts
            ],
        )
        open_attempts(connection, starts)


def open_attempts(connection: Connection, starts: Sequence[Start]) -> None:
    """Write the rows of attempts that begin; SQLite's."""
    if not starts:
        return
    connection.execute(
        _OPEN_ATTEMPT["sqlite"],
        [
            {
                "tenant": start.owned.key.tenant,
                "job_id": start.owned.key.id,
                "number": start.owned.attempt,
                "reason": start.reason,
                "worker_id": start.owned.worker_id,
                "provider": start.target.provider,
                "model": start.target.model,
            }
            for start in starts
        ],
    )


def begin(connection: Connection, picked: list[Picked]) -> list[Claim | None]:
    """Begin the attempts of jobs that a turn has picked; None: there is nothing to run."""
    keys = [item.owned.key for item in picked]
    rows = lock(connection, keys)
    # Read after the rows are locked: from now on nobody takes these jobs away.
    places = find_running(connection, keys)
    pools = find_pools(connection, {place.pool for place in places.values()})
    answers: list[Claim | None] = []
    starts = []
    for item in picked:
        owned = item.owned
        row, place = rows.get(owned.key), places.get(owned.key)
        if place is None or (place.attempt, place.worker_id) != (owned.attempt, owned.worker_id):
            answers.append(None)
        elif row is None or row.status in TERMINAL_STATUSES or row.attempt not in (owned.attempt - 1, owned.attempt):
            give_up(connection, owned)
            answers.append(None)
        else:
            is_new = row.attempt < owned.attempt  # else its commit was cut before the worker heard of it
            if is_new:
                target = Target(place.provider, place.model)
                starts.append(Start(owned, row.next_reason, target, item.total_timeout))
            answers.append(make_claim(row, place, pools, row.job, item.total_timeout, is_new=is_new, pick=item.pick))
    start(connection, starts)
    return answers
