"""Redis or the database is away: streams go on, results arrive, followers heal."""

import time

import pytest
from sqlalchemy import text, update

from api_contracts.results import JobStatus
from api_contracts.tables import jobs
from tests.harness import Following, Stand, wait_until
from tests.tcp_proxy import TcpProxy

#: Seconds a stream may last longer than planned on a machine that is busy with other tests.
SLACK = 3.0


def check_completed(stand: Stand, following: Following, text: str, requests: int = 1) -> None:
    """Check that the job was completed and that its follower holds its text."""
    transcript = following.to_the_end()
    result = stand.result(following.events[-1].job_id)
    assert result.status is JobStatus.COMPLETED
    assert transcript.text == result.text == text
    assert transcript.sha256() == result.output_sha256
    assert len(stand.provider.attempts(result.id)) == requests


def stream_seconds(stand: Stand, job_id: str) -> float:
    """Return how long the provider needed to get rid of its stream."""
    attempt = stand.provider.attempts(job_id)[-1]
    assert attempt.ended is not None
    return attempt.ended - attempt.started


# -- Redis --


def test_redis_killed_in_mid_stream(redis_stand: Stand) -> None:
    stand = redis_stand
    stand.start_worker()
    job_id = stand.enqueue(deltas=100, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=10)
    stand.valkey.kill()
    stand.wait_for_deltas(job_id, 60)
    stand.valkey.start()
    check_completed(stand, following, "word " * 100)
    assert stream_seconds(stand, job_id) < 5 + SLACK
    check_completed(stand, stand.follow(job_id), "word " * 100)


def test_redis_frozen_in_mid_stream(stand: Stand) -> None:
    stand.start_worker()
    job_id = stand.enqueue(deltas=100, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=10)
    stand.valkey.freeze()
    stand.wait_for_deltas(job_id, 100)
    assert stand.wait_for(job_id).status is JobStatus.COMPLETED
    stand.valkey.thaw()
    check_completed(stand, following, "word " * 100)
    assert stream_seconds(stand, job_id) < 5 + SLACK


def test_redis_away_before_the_claim(redis_stand: Stand) -> None:
    stand = redis_stand
    stand.start_worker()
    stand.valkey.kill()
    job_id = stand.enqueue(deltas=10)
    following = stand.follow(job_id)
    stand.valkey.start()
    check_completed(stand, following, "word " * 10)


def test_redis_away_at_the_end_delays_the_news_and_not_the_result(redis_stand: Stand) -> None:
    stand = redis_stand
    stand.start_worker()
    job_id = stand.enqueue(deltas=40, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    stand.valkey.kill()
    assert stand.wait_for(job_id).status is JobStatus.COMPLETED
    stand.valkey.start()
    check_completed(stand, following, "word " * 40)
    wait_until(lambda: [one for one in stand.log(job_id) if one.type == "job.completed"], "the end to be in the log")
    check_completed(stand, stand.follow(job_id), "word " * 40)


def test_redis_emptied_twice_in_one_stream(stand: Stand) -> None:
    stand.start_worker()
    job_id = stand.enqueue(deltas=100, rate=20, reasoning="Why not?")
    following = stand.follow(job_id)
    for deltas in (20, 60):
        stand.wait_for_deltas(job_id, deltas)
        stand.valkey.restart()
    check_completed(stand, following, "word " * 100)
    assert "snapshot" in [one.type for one in stand.log(job_id)]
    assert following.transcript.choices[0].reasoning == "Why not?"


def test_redis_out_of_memory_loses_nothing(stand: Stand) -> None:
    stand.start_worker()
    job_id = stand.enqueue(deltas=60, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    with stand.redis() as client:
        client.config_set("maxmemory", 1)
        stand.wait_for_deltas(job_id, 40)
        client.config_set("maxmemory", 0)
    check_completed(stand, following, "word " * 60)
    # The worker is still at work: Celery met the full Redis as well.
    check_completed(stand, stand.follow(stand.enqueue(deltas=3)), "word " * 3)


def test_redis_out_of_memory_while_messages_wait_stops_no_worker(stand: Stand) -> None:
    worker = stand.start_worker(concurrency=1)
    first = stand.enqueue(deltas=40, rate=20)
    waiting = [stand.enqueue(deltas=3) for _ in range(5)]
    stand.wait_for_deltas(first, 5)
    with stand.redis() as client:
        client.config_set("maxmemory", 1)
        stand.wait_for(first)
        worker.wait_to_say("messages_unnoted")
        client.config_set("maxmemory", 0)
    for job_id in (first, *waiting):
        check_completed(stand, stand.follow(job_id), stand.wait_for(job_id).text)
    assert worker.running


def test_lost_connections_start_nothing_twice(stand: Stand) -> None:
    stand.start_worker()
    job_ids = [stand.enqueue(deltas=60, rate=20) for _ in range(5)]
    followers = [stand.follow(job_id) for job_id in job_ids]
    for following in followers:
        following.wait_for("delta", count=5)
    with stand.redis() as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
    for following in followers:
        check_completed(stand, following, "word " * 60)


# -- the database --


def test_database_away_at_the_claim(postgres_stand: Stand) -> None:
    stand = postgres_stand
    stand.start_worker()
    stand.postgres.kill()
    job = stand.job(deltas=10)
    stand.send(job)
    time.sleep(1)  # the worker meets the outage, or it does not: both must end well
    stand.postgres.start()
    check_completed(stand, stand.follow(job["id"]), "word " * 10)


@pytest.mark.parametrize(
    ("statements", "user", "reason"),
    [
        (["ALTER DATABASE {name} SET default_transaction_read_only = on"], "postgres", "ReadOnlySqlTransaction"),
        (
            ["CREATE ROLE reader LOGIN", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"],
            "reader",
            "InsufficientPrivilege",
        ),
    ],
    ids=["read-only", "no rights"],
)
def test_worker_that_meets_a_database_it_cannot_write_says_so_in_one_line(
    postgres_stand: Stand, statements: list[str], user: str, reason: str
) -> None:
    stand = postgres_stand
    with stand.database() as connection:
        for statement in statements:
            connection.execute(text(statement.format(name=connection.engine.url.database)))
    worker = stand.new_worker(database_url=stand.database_url.replace("postgres@", f"{user}@"))
    worker.launch()
    assert worker.wait() == 1
    (line,) = worker.log_lines()
    assert "worker_not_started" in line
    assert reason in line


def test_database_away_in_mid_stream(postgres_stand: Stand) -> None:
    stand = postgres_stand
    stand.start_worker()
    job_id = stand.enqueue(deltas=100, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    stand.postgres.kill()
    following.wait_for("delta", count=60)
    stand.postgres.start()
    check_completed(stand, following, "word " * 100)
    assert stream_seconds(stand, job_id) < 5 + SLACK


def test_database_away_at_the_end_delays_the_end(postgres_stand: Stand) -> None:
    stand = postgres_stand
    stand.start_worker()
    job_id = stand.enqueue(deltas=20, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    stand.postgres.kill()
    following.wait_for("attempt.finished")
    assert following.types[-1] == "attempt.finished", "the end is told after the commit"
    stand.postgres.start()
    check_completed(stand, following, "word " * 20)


def test_both_away_at_the_end(postgres_stand: Stand) -> None:
    stand = postgres_stand
    stand.start_worker()
    job_id = stand.enqueue(deltas=40, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    stand.postgres.kill()
    stand.valkey.kill()
    wait_until(lambda: stand.provider.attempts(job_id)[0].ended, "the stream to end")
    stand.postgres.start()
    stand.valkey.start()
    check_completed(stand, following, "word " * 40)


def test_database_restarted_cleanly_under_load(postgres_stand: Stand) -> None:
    stand = postgres_stand
    stand.start_worker()
    followers = [stand.follow(stand.enqueue(deltas=20 + 2 * number, rate=20)) for number in range(20)]
    for following in followers:
        following.wait_for("delta")
    stand.postgres.restart()
    for number, following in enumerate(followers):
        check_completed(stand, following, "word " * (20 + 2 * number))


def test_locked_sqlite_file_is_waited_for(stand: Stand) -> None:
    stand.start_worker()
    job_id = stand.enqueue(deltas=20, rate=20)
    following = stand.follow(job_id)
    following.wait_for("delta", count=5)
    with stand.database() as connection:
        connection.execute(update(jobs).values(model="scripted-1"))  # takes the one writer's place
        following.wait_for("attempt.finished")
        assert following.types[-1] == "attempt.finished"
    check_completed(stand, following, "word " * 20)


def test_database_that_stalls_beyond_the_lease_makes_nobody_dead(postgres_stand: Stand) -> None:
    stand = postgres_stand
    workers = stand.start_workers(3)
    job_ids = [stand.enqueue(deltas=120, rate=10) for _ in range(12)]
    for job_id in job_ids:
        stand.wait_for_deltas(job_id)
    for _ in range(2):
        time.sleep(1.5 * stand.settings["lease"])  # until the workers trust in their own clocks
        stand.postgres.freeze()
        time.sleep(1.5 * stand.settings["lease"])
        stand.postgres.thaw()
    for job_id in job_ids:
        assert [one.outcome for one in stand.wait_for(job_id).attempts] == ["finished"]
    assert not any(worker.said("worker_lost") for worker in workers)


def test_worker_that_is_cut_off_from_the_database_loses_its_jobs_and_writes_nothing(postgres_stand: Stand) -> None:
    stand = postgres_stand
    with TcpProxy(stand.postgres.port) as proxy:
        there = stand.database_url.replace(f":{stand.postgres.port}/", f":{proxy.port}/")
        lonely = stand.start_worker(database_url=there)
        # The lonely worker's stream outlasts the test: had it finished, the heir would take its text from the log.
        job_id = stand.enqueue(deltas=150, rate=50, faults=[{"kind": "slow", "rate": 2}])
        following = stand.follow(job_id)
        following.wait_for("delta", count=3)
        heir = stand.start_worker()
        proxy.cut()
        following.wait_for("delta", count=5, attempt=2)
        wait_until(lambda: stand.provider.attempts(job_id)[0].client_closed, "Redis to stop the lonely worker's stream")
        proxy.mend()
        lonely.wait_to_say("attempt_superseded", job_id=job_id)
        check_completed(stand, following, "word " * 150, requests=2)
    assert [one.worker for one in stand.result(job_id).attempts] == [lonely.id, heir.id]
    assert [one.attempt for one in following.events] == sorted(one.attempt for one in following.events)
