"""Full tables, as the benchmarks make them: rows like a deployment's, keys as they were, jobs that can be chosen."""

import json
from typing import Any

from sqlalchemy import Engine, func, inspect, select

from benchmarks.full_table import Backlog, add_backlog, fill
from keepstream.jobs import parse_job
from keepstream.tables import attempts, jobs, metadata, requests, waiting
from keepstream_worker import store
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling.choice import Choice

ENDED, WAITING, TENANTS = 120, 30, 3
TIMEOUT = 60.0


def test_jobs_that_have_ended_are_whole_and_keys_are_as_they_were(engine: Engine, database_url: str) -> None:
    before = keys(engine)
    fill(database_url, ENDED)
    assert keys(engine) == before
    with engine.connect() as connection:
        for table in (jobs, requests, attempts):
            assert connection.scalar(select(func.count()).select_from(table)) == ENDED
        assert set(connection.scalars(select(jobs.c.status))) == {"completed", "failed"}
        assert connection.scalar(select(func.count()).select_from(waiting)) == 0


def test_jobs_that_wait_are_chosen_by_age_and_fairly(engine: Engine, database_url: str) -> None:
    add_backlog(database_url, Backlog(WAITING, "ours", "backlog", TENANTS, {"deltas": 3}))
    with engine.begin() as connection:
        (turned,) = store.take_turn(connection, [store.Turn("me", Choice(Policy(), "ours", 2 * TENANTS))])
    assert sorted(pick.job.seq for pick in turned.picks) == list(range(1, 2 * TENANTS + 1))
    with engine.begin() as connection:
        claims = store.begin(connection, [store.Picked(pick, "me", TIMEOUT) for pick in turned.picks])
    for pick, claim in zip(turned.picks, claims, strict=True):
        assert claim is not None
        assert isinstance(claim.job, str)
        job = parse_job(json.loads(claim.job))
        assert (job.tenant, job.id) == pick.job.key


def keys(engine: Engine) -> dict[str, Any]:
    """Return all keys and indexes of our tables."""
    look = inspect(engine)
    return {
        table: (
            look.get_pk_constraint(table),
            look.get_foreign_keys(table),
            {index["name"]: (index["column_names"], index["unique"]) for index in look.get_indexes(table)},
        )
        for table in metadata.tables
    }
