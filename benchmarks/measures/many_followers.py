"""What a process pays that follows for many: a gateway, or a service with many readers.

In: a ``Bench``.
Out: samples ``many_followers`` and ``idle_followers``.

No worker takes part: deltas are published as a worker writes them, at a steady pace, by the harness.
"""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final

import redis

from benchmarks.bench import Bench, Sample
from benchmarks.harness import BenchmarkError, Process, python
from keepstream.names import DEFAULT_TENANT, JobKeys, job_keys

_JOBS: Final = 5
_PER_JOB: Final = (1, 10, 100)
_RATE: Final = 20.0  #: Deltas per second and job, as a model's; each is read on its own.
_WAIT_SECONDS: Final = 120.0
_APPEND: Final = """
redis.call('XADD', KEYS[1], ARGV[1], 'event', ARGV[2])
redis.call('PUBLISH', KEYS[2], ARGV[2])
"""


def many_followers(bench: Bench) -> None:
    """Follow a few jobs with 1, 10 and 100 followers each: CPU per delta and follower, connections."""
    seconds = 5.0 if bench.quick else 20.0
    for repetition in range(bench.repeat):
        for per_job in _PER_JOB:
            for kind in ("raw", "typed", "hand"):
                with _followers(bench, kind, per_job * _JOBS, _JOBS) as (process, _):
                    connections = len(bench.services.redis.client_list(_type="pubsub"))
                    before = process.cpu_seconds()
                    expected = _publish(bench.services.redis, seconds) * per_job
                    deltas = process.expect("ended", _WAIT_SECONDS)["deltas"]
                    used = process.cpu_seconds() - before
                if deltas != expected:
                    raise BenchmarkError(f"followers ({kind}) got {deltas} of {expected} deltas")
                metrics = {"cpu_us_per_delta": used / deltas * 1e6, "subscription_connections": float(connections)}
                bench.record(Sample("many_followers", kind, metrics, {"per_job": float(per_job)}, repetition))


def idle_followers(bench: Bench) -> None:
    """Hold many followers of jobs that say nothing: memory and CPU of each, connections."""
    followers, seconds = (1_000, 10.0) if bench.quick else (10_000, 60.0)
    for repetition in range(bench.repeat):
        with _followers(bench, "raw", followers, followers, "--idle") as (process, ready):
            connections = len(bench.services.redis.client_list(_type="pubsub"))
            before = process.cpu_seconds()
            time.sleep(seconds)
            metrics = {
                "bytes_each": ready["bytes_each"],
                "cpu_share": (process.cpu_seconds() - before) / seconds,
                "subscription_connections": float(connections),
            }
        bench.record(Sample("idle_followers", "raw", metrics, {"followers": float(followers)}, repetition))


@contextmanager
def _followers(
    bench: Bench, kind: str, followers: int, jobs: int, *options: str
) -> Iterator[tuple[Process, dict[str, float]]]:
    """Give the process with the followers, when each has its first event, and what it says of itself."""
    connection = bench.services.redis
    for name in _names(jobs):
        connection.delete(_keys(name).log)
        _append(connection, name, 1, "attempt.started", model="m", provider="p", reason="first")
    numbers = ("--followers", str(followers), "--jobs", str(jobs))
    command = python("benchmarks.many_followers", "--kind", kind, "--redis-url", bench.services.redis_url, *numbers)
    with closing(bench.start("many-followers", [*command, *options])) as process:
        yield process, process.expect("ready", _WAIT_SECONDS)
    connection.delete(*(_keys(name).log for name in _names(jobs)))


def _publish(connection: redis.Redis, seconds: float) -> int:
    """Publish deltas of all jobs at a steady pace, and then their ends; return how many deltas those are."""
    count = int(seconds * _RATE)
    began = time.monotonic()
    for place in range(count):
        for turn, name in enumerate(_names(_JOBS)):
            due = began + (place + turn / _JOBS) / _RATE
            time.sleep(max(0.0, due - time.monotonic()))
            _append(connection, name, place + 2, "delta", choice=0, delta={"content": " token"})
    for name in _names(_JOBS):
        end = {"status": "completed", "attempts": 1, "output_sha256": "0" * 64}
        _append(connection, name, count + 2, "job.completed", **end)
    return count * _JOBS


def _append(connection: redis.Redis, name: str, n: int, event_type: str, **fields: object) -> None:
    head = {"v": 1, "job_id": name, "attempt": 1, "type": event_type, "id": f"1-{n}", "ts": time.time_ns() // 1_000_000}
    text = json.dumps(head | fields, separators=(",", ":"))
    connection.eval(_APPEND, 2, _keys(name).log, _keys(name).channel, f"1-{n}", text)


def _names(jobs: int) -> list[str]:
    return [f"job-{n}" for n in range(jobs)]


def _keys(name: str) -> JobKeys:
    return job_keys(DEFAULT_TENANT, name)
