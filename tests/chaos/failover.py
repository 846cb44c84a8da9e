"""Fail-over: Redis is replaced, or can write nothing, while streams run; and nothing but Redis notices.

In: a sandbox and a seed.
Out: a report.

A worker that loses Redis for less than its lease has lost nothing: the streams are the provider's, and the results the
database's. So no attempt may end because of it, which the item chaos cannot tell, since there workers die as well.
"""

import contextlib
import json
import random
import time
from collections import Counter
from typing import Final

import redis

from keepstream.results import CompletionResult, JobStatus
from tests.chaos.report import Report, spread
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster, Following, wait_until
from tests.redis_servers import ReplicatedValkey, SentinelSet

WORKERS: Final = 2
ROUNDS: Final = 6
JOBS: Final = 12  #: Streams that run while Redis is replaced; a quarter as many again are enqueued meanwhile.
RATE: Final = 15.0  #: Deltas per second of each stream.
DELTAS: Final = 150
DISK_FULL: Final = 4.0  #: Seconds.
FAULTS: Final = ("its master killed", "its master replaced", "its disk full")


def run(sandbox: Sandbox, seed: int, _jobs: int = 0, rounds: int = ROUNDS) -> Report:
    """Run the item and check the results."""
    report = Report(f"fail-over of Redis by Sentinel, and its disk full ({rounds} rounds, {sandbox.database})")
    dice = random.Random(seed)
    faults = [FAULTS[number % len(FAULTS)] for number in range(rounds)]
    dice.shuffle(faults)
    took: list[float] = []
    with sandbox.cluster("failover", sentinels=True) as cluster:
        workers = cluster.start_workers(WORKERS)
        for fault in faults:
            took.append(_round(report, cluster, fault))
            cluster.sentinels.wait_until_settled()
        report.count_each("Redis", Counter(faults))
        report.count("time without a Redis that can be written", spread(took))
        report.count_each("warnings of the workers", _warnings(cluster))
        report.check(
            "every worker is still the same process",
            [f"{worker.id} ended with code {worker.wait()}" for worker in workers if not worker.running],
        )
        report.check(
            "no worker met a defect",
            [line[:300] for worker in workers for line in worker.log_lines() if '"exception"' in line],
        )
    return report


def _round(report: Report, cluster: Cluster, fault: str) -> float:
    job_ids = [cluster.enqueue(deltas=DELTAS, rate=RATE) for _ in range(JOBS)]
    followers = {job_id: cluster.follow(job_id) for job_id in job_ids}
    for following in followers.values():
        following.wait_for("delta", count=5)
    began = time.monotonic()
    _play(cluster.sentinels, fault)
    meanwhile = [cluster.enqueue(deltas=10, rate=RATE) for _ in range(JOBS // 4)]  # their messages may be lost
    took = time.monotonic() - began
    followers |= {job_id: cluster.follow(job_id) for job_id in meanwhile}
    for job_id, following in followers.items():
        _judge(report, cluster.wait_for(job_id), following)
    return took


def _play(servers: SentinelSet, fault: str) -> None:
    """Carry out a fault; at its end there is a Redis that can be written."""
    master = servers.master
    match fault:
        case "its master killed":
            servers.fail_over()
            master.start()
        case "its master replaced":
            servers.order_fail_over()
        case "its disk full":
            master.fill_disk()
            wait_until(lambda: _refuses(master), "Redis to refuse to write")
            time.sleep(DISK_FULL)
            master.free_disk()


def _judge(report: Report, result: CompletionResult, following: Following) -> None:
    transcript = following.to_the_end()
    outcomes = [attempt.outcome for attempt in result.attempts]
    report.check(
        "every job is completed by its first attempt",
        [f"{result.id}: {result.status} {outcomes}"]
        if result.status is not JobStatus.COMPLETED or outcomes != ["finished"]
        else [],
    )
    report.check(
        "followers hold what the row holds",
        [result.id] if transcript.sha256() != result.output_sha256 or not result.text else [],
    )


def _refuses(server: ReplicatedValkey) -> bool:
    try:
        with server.client() as client:
            client.set("is-the-disk-full", 1)
    except redis.ResponseError:
        return True
    return False


def _warnings(cluster: Cluster) -> Counter[str]:
    warnings: Counter[str] = Counter()
    for worker in cluster.workers:
        for line in worker.log_lines():
            with contextlib.suppress(ValueError):  # not one of the worker's own lines
                record = json.loads(line)
                if record["level"] != "info":
                    warnings[f"{record['level']} {record['event']}"] += 1
    return warnings
