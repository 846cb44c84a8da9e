"""Redis or the database is unavailable: streams continue, results arrive, followers recover."""

import time

from sqlalchemy import text, update

from keepstream import Client
from keepstream.results import JobStatus
from keepstream.tables import jobs
from tests.cluster import BRIEF, Cluster, Following, wait_until
from tests.tcp_proxy import TcpProxy


def check_completed(cluster: Cluster, following: Following, text: str, requests: int = 1) -> None:
    """Check that the job was completed and that its follower holds its text."""
    transcript = following.to_the_end()
    result = cluster.result(following.events[-1].job_id)
    assert result.status is JobStatus.COMPLETED
    assert transcript.text == result.text == text
    assert transcript.sha256() == result.output_sha256
    assert len(cluster.provider.attempts(result.id)) == requests


def follow_to_the_middle(cluster: Cluster, job_id: str, deltas: int = 5) -> Following:
    """Follow a held job, and wait until its stream has come so far and its follower has met it."""
    following = cluster.follow(job_id)
    following.wait_for("delta")
    cluster.wait_for_deltas(job_id, deltas)
    return following


# -- Redis --


def test_redis_killed_in_mid_stream(cluster_losing_redis: Cluster) -> None:
    cluster = cluster_losing_redis
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=100, hold=10)
    following = follow_to_the_middle(cluster, job_id, 10)
    cluster.valkey.kill()
    cluster.release(job_id, until=60)
    cluster.wait_for_deltas(job_id, 60)
    cluster.valkey.start()
    cluster.release(job_id)
    check_completed(cluster, following, "word " * 100)
    check_completed(cluster, cluster.follow(job_id), "word " * 100)


def test_redis_frozen_in_mid_stream(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=100, hold=10)
    following = follow_to_the_middle(cluster, job_id, 10)
    cluster.valkey.freeze()
    cluster.release(job_id)
    cluster.wait_for_deltas(job_id, 100)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    cluster.valkey.thaw()
    check_completed(cluster, following, "word " * 100)


def test_redis_away_before_the_claim(cluster_losing_redis: Cluster) -> None:
    cluster = cluster_losing_redis
    cluster.start_worker()
    cluster.valkey.kill()
    job_id = cluster.enqueue(deltas=10)
    following = cluster.follow(job_id)
    cluster.valkey.start()
    check_completed(cluster, following, "word " * 10)


def test_redis_away_at_the_end_delays_the_news_and_not_the_result(cluster_losing_redis: Cluster) -> None:
    cluster = cluster_losing_redis
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=40, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    cluster.valkey.kill()
    cluster.release(job_id)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    cluster.valkey.start()
    check_completed(cluster, following, "word " * 40)
    wait_until(
        lambda: [event for event in cluster.log(job_id) if event.type == "job.completed"], "the end to be in the log"
    )
    check_completed(cluster, cluster.follow(job_id), "word " * 40)


def test_an_end_that_redis_loses_is_published_again(cluster: Cluster) -> None:
    """As after a fail-over to a replica that had not got it: a follower without a database needs it."""
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=10)
    assert cluster.wait_for(job_id).status is JobStatus.COMPLETED
    wait_until(lambda: [event for event in cluster.log(job_id) if event.type == "job.completed"], "the end")
    cluster.valkey.restart()  # it comes back empty
    wait_until(lambda: cluster.log(job_id), "the end to be there again")
    snapshot, end = cluster.log(job_id)
    assert (snapshot.type, end.type) == ("snapshot", "job.completed")
    with Client(cluster.valkey.url) as client:
        assert [event.type for event in client.follow(job_id, timeout=60)] == ["snapshot", "job.completed"]


def test_redis_emptied_twice_in_one_stream(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=100, hold=20, reasoning="Why not?")
    following = cluster.follow(job_id)
    for deltas, further in ((20, 60), (60, None)):
        cluster.wait_for_deltas(job_id, deltas)
        cluster.valkey.restart()
        cluster.release(job_id, until=further)
    check_completed(cluster, following, "word " * 100)
    assert "snapshot" in [event.type for event in cluster.log(job_id)]
    assert following.transcript.choices[0].reasoning == "Why not?"


def test_redis_out_of_memory_loses_nothing(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=60, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    with cluster.redis() as client:
        client.config_set("maxmemory", 1)
        cluster.release(job_id, until=40)
        cluster.wait_for_deltas(job_id, 40)
        client.config_set("maxmemory", 0)
    cluster.release(job_id)
    check_completed(cluster, following, "word " * 60)
    # The worker still works, although Celery met the full Redis too.
    check_completed(cluster, cluster.follow(cluster.enqueue(deltas=3)), "word " * 3)


def test_redis_out_of_memory_while_messages_wait_stops_no_worker(cluster: Cluster) -> None:
    worker = cluster.start_worker()
    first = cluster.enqueue(deltas=40, hold=5)
    cluster.wait_for_deltas(first, 5)
    cluster.freeze(worker)
    waiting = [cluster.enqueue(deltas=3) for _ in range(5)]
    with cluster.redis() as client:
        client.config_set("maxmemory", 1)
        worker.thaw()
        cluster.release(first)
        cluster.wait_for(first)
        worker.wait_to_say("broker_unavailable", waiting_to="note messages", reason="OOM")
        client.config_set("maxmemory", 0)
    for job_id in (first, *waiting):
        check_completed(cluster, cluster.follow(job_id), cluster.wait_for(job_id).text)
    assert worker.running


def test_lost_connections_start_nothing_twice(cluster: Cluster) -> None:
    cluster.start_worker()
    job_ids = [cluster.enqueue(deltas=60, hold=5) for _ in range(5)]
    followers = [follow_to_the_middle(cluster, job_id) for job_id in job_ids]
    with cluster.redis() as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
    cluster.release(*job_ids)
    for following in followers:
        check_completed(cluster, following, "word " * 60)


def test_fail_over_runs_nothing_twice(cluster: Cluster) -> None:
    workers = cluster.start_workers(2)
    job_ids = [cluster.enqueue(deltas=160, hold=5) for _ in range(10)]
    for job_id in job_ids:
        cluster.wait_for_deltas(job_id, 5)
    with cluster.redis() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        for worker in workers:
            worker.wait_to_say("broker_unavailable", reason="READONLY")
        cluster.release(*job_ids, until=90)
        for job_id in job_ids:
            cluster.wait_for_deltas(job_id, 90)
        client.execute_command("REPLICAOF", "NO", "ONE")
    cluster.release(*job_ids)
    for job_id in job_ids:
        check_completed(cluster, cluster.follow(job_id), "word " * 160)
        assert len(cluster.result(job_id).attempts) == 1
    assert all(worker.running for worker in workers)


# -- the database --


def test_database_away_at_the_claim(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    cluster.start_worker()
    cluster.postgres.kill()
    job = cluster.job(deltas=10)
    cluster.send(job)
    time.sleep(1)  # the worker may or may not notice the outage; both must end well
    cluster.postgres.start()
    check_completed(cluster, cluster.follow(job["id"]), "word " * 10)


def test_worker_that_may_not_write_says_so_in_one_line(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    with cluster.database() as connection:
        connection.execute(text("CREATE ROLE reader LOGIN"))
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"))
    worker = cluster.new_worker(database_url=cluster.database_url.replace("postgres@", "reader@"))
    worker.launch()
    assert worker.wait() == 1
    (line,) = worker.log_lines()
    assert "lacks a right (InsufficientPrivilege" in line


def test_worker_that_starts_waits_for_a_database_that_can_only_be_read(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    name = cluster.database_url.rpartition("/")[2]
    with cluster.database() as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    worker = cluster.new_worker()
    worker.launch()
    worker.wait_to_say("database_unavailable", waiting_to="start")
    with cluster.database() as connection:
        connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    worker.wait_to_say("worker_started")
    worker.stop()


def test_database_away_in_mid_stream(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=100, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    cluster.postgres.kill()
    cluster.release(job_id, until=60)
    wait_until(lambda: following.transcript.text == "word " * 60, "its follower to get what comes meanwhile")
    cluster.postgres.start()
    cluster.release(job_id)
    check_completed(cluster, following, "word " * 100)


def test_database_away_at_the_end_delays_the_end(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=20, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    cluster.postgres.kill()
    cluster.release(job_id)
    following.wait_for("attempt.finished")
    assert following.types[-1] == "attempt.finished", "the end is published after the commit"
    cluster.postgres.start()
    check_completed(cluster, following, "word " * 20)


def test_both_away_at_the_end(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=40, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    cluster.postgres.kill()
    cluster.valkey.kill()
    cluster.release(job_id)
    wait_until(lambda: cluster.provider.attempts(job_id)[0].ended, "the stream to end")
    cluster.postgres.start()
    cluster.valkey.start()
    check_completed(cluster, following, "word " * 40)


def test_database_restarted_cleanly_under_load(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    cluster.start_worker()
    followers = [cluster.follow(cluster.enqueue(deltas=20 + 2 * number, rate=20)) for number in range(20)]
    for following in followers:
        following.wait_for("delta")
    cluster.postgres.restart()
    for number, following in enumerate(followers):
        check_completed(cluster, following, "word " * (20 + 2 * number))


def test_locked_sqlite_file_is_waited_for(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = cluster.enqueue(deltas=20, hold=5)
    following = follow_to_the_middle(cluster, job_id)
    with cluster.database() as connection:
        connection.execute(update(jobs).values(model="scripted-1"))  # takes the only writer's slot
        cluster.release(job_id)
        following.wait_for("attempt.finished")
        assert following.types[-1] == "attempt.finished"
    check_completed(cluster, following, "word " * 20)


def test_database_that_stalls_beyond_the_lease_makes_nobody_dead(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    workers = cluster.start_workers(3, lease=BRIEF)
    job_ids = [cluster.enqueue(deltas=120, hold=10) for _ in range(12)]
    for job_id in job_ids:
        cluster.wait_for_deltas(job_id)
    for _ in range(2):
        time.sleep(1.5 * BRIEF)  # until the workers trust their own heartbeats
        cluster.postgres.freeze()
        time.sleep(1.5 * BRIEF)
        cluster.postgres.thaw()
    cluster.release(*job_ids)
    for job_id in job_ids:
        assert [attempt.outcome for attempt in cluster.wait_for(job_id).attempts] == ["finished"]
    assert not any(worker.said("worker_lost") for worker in workers)


def test_worker_that_is_cut_off_from_the_database_loses_its_jobs_and_writes_nothing(postgres_cluster: Cluster) -> None:
    cluster = postgres_cluster
    with TcpProxy(cluster.postgres.port) as proxy:
        there = cluster.database_url.replace(f":{cluster.postgres.port}/", f":{proxy.port}/")
        lonely = cluster.start_worker(database_url=there, lease=BRIEF)
        # The lonely worker's stream outlasts the test: had it finished, the heir would take its text from the log.
        job_id = cluster.enqueue(deltas=150, rate=50, faults=[{"kind": "slow", "rate": 2}])
        following = cluster.follow(job_id)
        following.wait_for("delta", count=3)
        heir = cluster.start_worker(lease=BRIEF)
        proxy.cut()
        following.wait_for("delta", count=5, attempt=2)
        wait_until(
            lambda: cluster.provider.attempts(job_id)[0].client_closed, "Redis to stop the lonely worker's stream"
        )
        proxy.mend()
        lonely.wait_to_say("attempt_superseded", job_id=job_id)
        check_completed(cluster, following, "word " * 150, requests=2)
    assert [attempt.worker for attempt in cluster.result(job_id).attempts] == [lonely.id, heir.id]
    assert [event.attempt for event in following.events] == sorted(event.attempt for event in following.events)
