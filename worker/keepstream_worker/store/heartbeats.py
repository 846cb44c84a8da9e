"""Heartbeats: which workers are alive.

In: signs of life, from the heartbeat.  Out: the workers' rows, and to each worker the jobs that it owns.
"""

from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, select, update

from keepstream.tables import jobs, now, seconds_from_now, workers
from keepstream_worker.values import JobKey

#: Seconds for which a worker that is gone stays in the table, for `keepstream doctor` and for people.
_REMEMBERED: Final = 172_800.0


class Heartbeat(NamedTuple):
    """A sign of life."""

    worker_id: str
    lease: float  #: Seconds of silence after which a worker is taken for dead.
    queue: str  #: Where it takes its jobs from.
    places: int  #: Jobs that it runs at once.
    running: int  #: Jobs that it runs now.


class HeartbeatResult(NamedTuple):
    """What a worker learns when it gives a sign of life."""

    lapsed: bool  #: It was silent for longer than its lease: others may have taken its jobs.
    owned: frozenset[tuple[JobKey, int]]  #: The jobs it owns, with their attempt.
    cancels: frozenset[JobKey]  #: Those of them that are to be cancelled.


def record_heartbeat(connection: Connection, heartbeats: list[Heartbeat]) -> list[HeartbeatResult]:
    """Renew each worker's row, or create it."""
    return [_record(connection, heartbeat) for heartbeat in heartbeats]


def _record(connection: Connection, heartbeat: Heartbeat) -> HeartbeatResult:
    worker = workers.c.id == heartbeat.worker_id
    within_lease = workers.c.heartbeat_at > seconds_from_now(-heartbeat.lease)
    sign = {
        "heartbeat_at": now(),
        "lease": heartbeat.lease,
        "queue": heartbeat.queue,
        "places": heartbeat.places,
        "running": heartbeat.running,
    }
    alive = connection.execute(update(workers).where(worker, within_lease).values(sign)).rowcount
    if not alive:
        renewed = connection.execute(update(workers).where(worker).values(sign)).rowcount
        if not renewed:
            connection.execute(workers.insert().values(id=heartbeat.worker_id, started_at=now(), **sign))
    rows = connection.execute(
        select(jobs.c.tenant, jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested_at.is_not(None)).where(
            jobs.c.worker_id == heartbeat.worker_id
        )
    ).all()
    return HeartbeatResult(
        lapsed=not alive,
        # Unpacked: with a row's names it takes half as long again, and a worker may own thousands.
        owned=frozenset((JobKey(tenant, job_id), attempt) for tenant, job_id, attempt, _ in rows),
        cancels=frozenset(JobKey(tenant, job_id) for tenant, job_id, _, is_requested in rows if is_requested),
    )


def retire(connection: Connection, worker_ids: list[str]) -> list[None]:
    """Mark workers as gone at once, so that nobody waits for their lease."""
    connection.execute(
        update(workers).where(workers.c.id.in_(worker_ids)).values(heartbeat_at=seconds_from_now(-86_400.0))
    )
    return [None] * len(worker_ids)


def forget_workers(connection: Connection) -> None:
    """Delete workers that have been gone for two days and own nothing."""
    owners = select(jobs.c.worker_id).where(jobs.c.worker_id.is_not(None))
    connection.execute(
        delete(workers).where(workers.c.heartbeat_at < seconds_from_now(-_REMEMBERED), workers.c.id.not_in(owners))
    )
