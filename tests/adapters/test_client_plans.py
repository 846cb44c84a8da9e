"""What a client asks costs as much with 100,000 jobs that ended and as many that wait as with none."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from sqlalchemy import Engine, create_engine, select, text

from keepstream.client import overview as overview_of_all
from keepstream.client import queries
from keepstream.client.database import make_engine
from keepstream.client.listing import list_jobs
from keepstream.results import JobStatus
from keepstream.tables import metadata, waiting
from keepstream_worker.store import inspection
from tests.explained import BY_THEIR_END, RUNNING, Explained, fill
from tests.jobs import make_job
from tests.stored_jobs import change, pause, start

PAGE: Final = 50


@pytest.fixture(params=["empty", pytest.param("full", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, database_url: str) -> Iterator[Engine]:
    """A database in which nothing or very much is stored; a client's engine to it."""
    maker = create_engine(database_url)
    metadata.create_all(maker)
    if request.param == "full":
        filler = make_engine(database_url)
        with filler.begin() as connection:
            fill(connection)
            connection.execute(text("ANALYZE"))
        filler.dispose()
    maker.dispose()
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def test_a_client_reads_and_locks_a_few_pages(engine: Engine) -> None:
    """Enqueue, again, look, cancel in each state, retry."""
    explained = Explained(engine)

    def do(call: Callable[..., Any], *arguments: Any, buffers: int = 90, **keywords: Any) -> Any:
        with engine.begin() as connection:
            explained.clear()
            answer = call(connection, *arguments, **keywords)
        explained.check(buffers)
        return answer

    job = make_job(id="new", expires_at="2990-01-01T00:00:00Z", max_tokens=5)
    assert do(queries.enqueue, job)
    assert not do(queries.enqueue, job)
    for whole in (True, False):
        assert do(queries.get, "default", "new", whole=whole).status is JobStatus.QUEUED
    assert do(queries.get_summary, "default", "new").waiting_for is not None
    assert do(queries.get_for_retry, "default", "new").job == job
    assert do(queries.get_last_numbered, "default", "chat0") is None
    assert do(queries.cancel, "default", "new") is JobStatus.CANCELLED
    assert do(queries.cancel, "default", "new") is JobStatus.CANCELLED
    assert do(queries.cancel, "default", "nothing") is None
    with engine.begin() as connection:
        for job_id in ("running", "pausing"):
            queries.enqueue(connection, make_job(id=job_id))
            start(connection, job_id)
        pause(connection, "pausing", seconds=60)
    for job_id, status in (("running", JobStatus.RUNNING), ("pausing", JobStatus.CANCELLED)):
        assert do(queries.get_summary, "default", job_id) is not None
        assert do(queries.cancel, "default", job_id) is status


def test_a_page_of_waiting_jobs_reads_as_much_as_its_jobs_need(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(PAGE):
            queries.enqueue(connection, make_job(id=f"page-{number}"))
        change(connection, "page-0", metadata={})
    explained = Explained(engine)
    with engine.begin() as connection:
        page = list_jobs(connection, "default", limit=PAGE)
        found = queries.get_summaries(connection, "default", [job.id for job in page])
    assert [job.waiting_for for job in page] == [found[job.id].waiting_for for job in page]
    assert {job.waiting_for and job.waiting_for.cause for job in page} <= {"worker", "pickup", "place"}
    assert len(explained) < 20
    explained.check(PAGE * 6)


def test_an_overview_counts_no_further_than_it_says(engine: Engine) -> None:
    explained = Explained(engine)
    with engine.begin() as connection:
        overview = inspection.overview(connection, 60.0)
        if overview.workers:
            assert (overview.backlog.queued, overview.rejected) == (inspection.COUNTED + 1,) * 2
            assert (overview.backlog.running, overview.backlog.retrying) == (RUNNING + 1, RUNNING + 1)
        overview_of_all.rejected(connection, 50)
        seen = overview_of_all.look(connection)
        assert seen.more_waiting == bool(overview.workers)
        assert connection.scalar(select(waiting.c.seq).limit(1)) is None or overview.backlog.oldest_wait is not None
    # It stops where it has counted enough, so a walk through what waits or runs is as good as one by an index.
    explained.check(600, scanned=BY_THEIR_END | {"keepstream_running", "keepstream_workers", "keepstream_pools"})
