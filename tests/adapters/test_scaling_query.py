"""The query that scales workers on Kubernetes counts what runs or could run, and reads no job that has ended."""

from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import func, insert, select, text, update

from keepstream.client import queries
from keepstream.client.database import make_engine
from keepstream.jobs import make_job
from keepstream.names import QUEUE
from keepstream.tables import jobs, now
from keepstream_worker.store import schema
from tests.stored_jobs import pause, start

MANIFEST = Path(__file__).parents[2] / "docs" / "operations" / "kubernetes" / "scaling.yaml"
SCALED: dict[str, Any] = next(
    document for document in yaml.safe_load_all(MANIFEST.read_text()) if document["kind"] == "ScaledObject"
)["spec"]
TRIGGER: dict[str, str] = SCALED["triggers"][0]["metadata"]
ENDED = 5000
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_the_query_counts_what_runs_or_could_run_and_reads_nothing_else(postgres_url: str) -> None:
    engine = make_engine(postgres_url, writer=True)
    schema.migrate(engine)
    try:
        with engine.begin() as connection:
            for number in range(6):
                job = make_job({"id": f"job-{number}", "request": REQUEST})
                queries.enqueue(connection, job, QUEUE)
            start(connection, "job-0")
            pause(connection, "job-0", seconds=3600)
            for number in (1, 2):
                start(connection, f"job-{number}")
            start(connection, "job-3")
            pause(connection, "job-3")  # due now
            row = dict(connection.execute(select(jobs).where(jobs.c.id == "job-3")).mappings().one())
            ended = [row | {"id": f"ended-{number}", "status": "completed"} for number in range(ENDED)]
            connection.execute(insert(jobs), ended)
            connection.execute(update(jobs).where(jobs.c.status == "completed").values(finished_at=now()))
        with engine.connect() as connection:
            connection.execute(text("ANALYZE"))
            assert connection.scalar(select(func.count()).select_from(jobs)) == 6 + ENDED
            assert connection.scalar(text(TRIGGER["query"])) == 3 + 2
            plan = "\n".join(connection.scalars(text(f"EXPLAIN {TRIGGER['query']}")))
        assert "keepstream_jobs" not in plan, plan
    finally:
        engine.dispose()


def test_the_count_goes_as_far_as_the_greatest_number_of_pods() -> None:
    most = SCALED["maxReplicaCount"] * int(TRIGGER["targetQueryValue"])
    assert f"LIMIT {most})" in TRIGGER["query"]
