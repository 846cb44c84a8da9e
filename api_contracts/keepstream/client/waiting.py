"""Waiting: what a job that does not go on waits for.

In: a job's row, and a look at the workers and the backlog, from ``queries`` and ``listing``.  Out: a ``WaitingFor``.

Looking costs little, however many jobs there are: the workers are a small table, and of the backlog only so many rows
are counted.
"""

from datetime import UTC, datetime
from typing import Final, NamedTuple

from sqlalchemy import Connection, func, select, text

from keepstream.client.results_from_rows import StoredRow
from keepstream.results import JobStatus, WaitingFor
from keepstream.tables import jobs, seconds_from_now, seconds_until, workers

SECONDS_UNTIL_DUE: Final = seconds_until(jobs.c.due_at).label("seconds_until_due")
#: What ``waiting_for`` needs of a job, besides its status.
COLUMNS: Final = (jobs.c.queue, jobs.c.due_at, jobs.c.worker_id, SECONDS_UNTIL_DUE)

_COUNTED: Final = 100  #: Waiting jobs that are counted; beyond them there are "more than" so many.
_LONGEST_LEASE: Final = 3600.0  #: Seconds; workers silent for longer are gone, whatever their lease was.
_SOON: Final = 0.5  #: Seconds; a job that is due by then is due.


class Worker(NamedTuple):
    """A worker that is alive."""

    queue: str
    places: int
    running: int


class Surroundings(NamedTuple):
    """What decides how long a job waits."""

    workers: dict[str, Worker]  #: Those alive, by id.
    waiting: int  #: Jobs of all tenants that wait; more than ``_COUNTED`` are not counted.


def look_around(connection: Connection) -> Surroundings:
    """Return the state of workers and backlog."""
    recent = select(workers.c.id, workers.c.queue, workers.c.places, workers.c.running).where(
        workers.c.heartbeat_at > seconds_from_now(-_LONGEST_LEASE),
        seconds_until(workers.c.heartbeat_at) > -workers.c.lease,
    )
    # Spelled as the partial index has it: with bound values SQLite would not use it.
    some = select(jobs.c.id).where(text("status IN ('queued', 'retrying')")).limit(_COUNTED + 1).subquery()
    return Surroundings(
        workers={row.id: Worker(row.queue, row.places, row.running) for row in connection.execute(recent)},
        waiting=connection.scalar(select(func.count()).select_from(some)) or 0,
    )


def waits(status: str) -> bool:
    """Tell whether a job of this status may wait for something, so that looking around is worth it."""
    return not JobStatus(status).terminal


def waiting_for(row: StoredRow, surroundings: Surroundings) -> WaitingFor | None:
    """Return what the job of ``row``, which has ``COLUMNS`` and a status, waits for; None: nothing is in its way."""
    if row.status == JobStatus.RUNNING:
        if row.worker_id in surroundings.workers:
            return None
        return WaitingFor(cause="worker", text="another worker to take it over: its own gives no sign of life")
    if JobStatus(row.status).terminal:
        return None
    here = [worker for worker in surroundings.workers.values() if worker.queue == row.queue]
    if not here:
        return WaitingFor(cause="worker", text=f"a worker: none is alive for the queue '{row.queue}'")
    if row.seconds_until_due > _SOON:
        return WaitingFor(cause="retry", text=f"its next attempt, due at {_clock_time(row.due_at)}")
    if all(worker.running >= worker.places for worker in here):
        busy = "the queue's only worker is busy" if len(here) == 1 else f"all {len(here)} workers are busy"
        return WaitingFor(cause="place", text=f"a free place: {busy}, and {_count(surroundings.waiting)}")
    return WaitingFor(cause="pickup", text="a worker to take it")


def _clock_time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%H:%M:%S} UTC"


def _count(waiting: int) -> str:
    if waiting > _COUNTED:
        return f"more than {_COUNTED} jobs wait"
    return "1 job waits" if waiting == 1 else f"{waiting} jobs wait"
