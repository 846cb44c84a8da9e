"""Whether one tenant's flood delays others, and whether shares are what the weights say.

In: a ``Bench``.
Out: samples ``fairness_flood`` (ten small tenants, alone and beside one with a large backlog), ``fairness_weights``
(shares in tokens of three tenants who always wait) and ``fairness_bulk`` (the share of bulk beside interactive jobs).
"""

import time
from typing import Any, Final

import sqlalchemy as sa

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.contenders import KEEPSTREAM
from benchmarks.deployment import Deployment, Order, wait_until
from benchmarks.full_table import Backlog
from keepstream.tables import attempts, now, running

_WORKERS: Final = 2
_PLACES: Final = 25  #: Of each worker.
_SMALL_TENANTS: Final = 10
_SMALL_JOBS: Final = 10  #: Of each.
_SECOND: Final = {"deltas": 5, "rate": 5}  #: A stream of a second.
_HALF: Final = {"deltas": 3, "rate": 6}
_WEIGHTS: Final = {1: 100, 2: 50, 4: 200}  #: And the tokens of one answer, so that jobs and tokens are not the same.
_WAIT_SECONDS: Final = 120.0
_TOKENS: Final = sa.func.sum(attempts.c.total_tokens)
_ENDED: Final = attempts.c.outcome == "finished"


def fairness(bench: Bench) -> None:
    """Measure a flood, weights and classes."""
    if bench.services.postgres_url is None:
        return
    _flood(bench)
    _weights(bench)
    _bulk(bench)


def _deployment(bench: Bench, name: str, providers: str = "") -> Deployment:
    url = bench.services.new_database("postgresql", name)
    return Deployment(bench, url, name, providers=providers, concurrency=_PLACES, shutdown_grace=1)


def _flood(bench: Bench) -> None:
    with _deployment(bench, "fairness-flood") as deployment:
        deployment.start_workers(_WORKERS)
        _run_small_tenants(deployment, "warm")
        alone = [_run_small_tenants(deployment, f"alone{n}") for n in range(bench.repeat)]
        waiting = 2_000 if bench.quick else 100_000
        full_table.add_backlog(deployment.database_url, Backlog(waiting, deployment.name, "flood", 1, _SECOND))
        _wait_until_full(deployment)
        for repetition, without in enumerate(alone):
            seconds = _run_small_tenants(deployment, f"flooded{repetition}")
            metrics = {"alone_s": without, "flooded_s": seconds, "ratio": seconds / without}
            bench.record(Sample("fairness_flood", KEEPSTREAM, metrics, {"waiting": waiting}, repetition))


def _run_small_tenants(deployment: Deployment, name: str) -> float:
    """Return the seconds until all jobs of the small tenants have ended."""
    orders = [
        Order(f"{name}-{tenant}-{number}", _SECOND, f"{name}-{tenant}")
        for tenant in range(_SMALL_TENANTS)
        for number in range(_SMALL_JOBS)
    ]
    begin = time.monotonic()
    deployment.submit(orders)
    deployment.wait_for_ends([order.id for order in orders], _WAIT_SECONDS)
    return max(deployment.watcher.jobs[order.id].ended or 0.0 for order in orders) - begin


def _wait_until_full(deployment: Deployment) -> None:
    count = sa.select(sa.func.count()).select_from(running)
    places = _WORKERS * _PLACES
    wait_until(lambda: deployment.query(count)[0][0] >= places, "all places to be taken", _WAIT_SECONDS)


def _weights(bench: Bench) -> None:
    providers = "\n".join(f"[tenants.weight-{weight}-tenant-0]\nweight = {weight}" for weight in _WEIGHTS)
    with _deployment(bench, "fairness-weights", providers) as deployment:
        for weight, tokens in _WEIGHTS.items():
            usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
            script = {**_HALF, "usage": usage}
            backlog = Backlog(3_000 if bench.quick else 30_000, deployment.name, f"weight-{weight}", 1, script)
            full_table.add_backlog(deployment.database_url, backlog)
        deployment.start_workers(_WORKERS)
        _wait_until_full(deployment)
        time.sleep(2.0 if bench.quick else 10.0)
        for repetition in range(bench.repeat):
            taken = _tokens_in(deployment, 6.0 if bench.quick else 30.0, attempts.c.tenant)
            total = sum(taken.values())
            shares = {weight: taken.get(f"weight-{weight}-tenant-0", 0) / total for weight in _WEIGHTS}
            expected = {weight: weight / sum(_WEIGHTS) for weight in _WEIGHTS}
            metrics = {f"share_{weight}": share for weight, share in shares.items()}
            metrics["most_off"] = max(abs(shares[weight] / expected[weight] - 1) for weight in _WEIGHTS)
            bench.record(Sample("fairness_weights", KEEPSTREAM, metrics, {"tokens": total}, repetition))


def _bulk(bench: Bench) -> None:
    with _deployment(bench, "fairness-bulk") as deployment:
        usage = {"prompt_tokens": 1, "completion_tokens": 99, "total_tokens": 100}
        script = {**_HALF, "usage": usage}
        for job_class in ("bulk", "interactive"):
            waiting = 3_000 if bench.quick else 30_000
            backlog = Backlog(waiting, deployment.name, job_class, 1, script, job_class=job_class)
            full_table.add_backlog(deployment.database_url, backlog)
        deployment.start_workers(_WORKERS)
        _wait_until_full(deployment)
        time.sleep(2.0)
        for repetition in range(bench.repeat):
            taken = _tokens_in(deployment, 6.0 if bench.quick else 30.0, attempts.c.tenant)
            total = sum(taken.values())
            metrics = {"bulk_share": taken.get("bulk-tenant-0", 0) / total}
            bench.record(Sample("fairness_bulk", KEEPSTREAM, metrics, {"tokens": total}, repetition))


def _tokens_in(deployment: Deployment, seconds: float, by: Any) -> dict[str, float]:
    """Return the tokens of the attempts that end in the next ``seconds``."""
    (begin,) = deployment.query(sa.select(now()))[0]
    time.sleep(seconds)
    ended = sa.select(by, _TOKENS).where(_ENDED, attempts.c.finished_at > begin).group_by(by)
    return {name: float(tokens) for name, tokens in deployment.query(ended)}
