"""Whether a deployment keeps a provider's limits, and uses what they allow.

In: a ``Bench``.
Out: samples ``limits``, one for each way in which the limits are known, and ``limits_storm``.

Four worker processes have more jobs than the scripted provider accepts.  It counts what it serves and what it refuses,
by itself.  In the middle one worker is killed, and replaced: its places must not be lost.
"""

import json
import statistics
import time
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import full_table
from benchmarks.bench import Bench, Sample
from benchmarks.contenders import KEEPSTREAM
from benchmarks.deployment import Deployment
from benchmarks.full_table import Backlog
from keepstream_worker.dev_stack.embedded import EmbeddedProvider

_WORKERS: Final = 4
_PLACES: Final = 100  #: Of each worker; more than the provider allows all of them.
_CONCURRENCY: Final = 50
_REQUESTS: Final = 600.0  #: A minute.
_TOKENS: Final = 100_000.0
_LIMITS: Final = {"concurrency": _CONCURRENCY, "requests_per_minute": _REQUESTS, "tokens_per_minute": _TOKENS}
_CONFIGURED: Final = "[providers.default]\n" + "\n".join(f"{name} = {value}" for name, value in _LIMITS.items())
_JOBS: Final = 5_000  #: Of each of the three tenants.
_SECONDS: Final = 300.0
_WARM_SECONDS: Final = 60.0  #: The provider's buckets are full at first, so that the first minute may use two.
_QUICK: Final = (12.0, 4.0)
_STORM_SECONDS: Final = 5.0
_AFTER_STORM_SECONDS: Final = 15
_POLL_SECONDS: Final = 0.5
#: Seconds and tokens of a stream, by tenant.
_STREAMS: Final = ((2.0, 40), (4.0, 100), (6.0, 160))
_LONG_STREAMS: Final = ((6.0, 40), (8.0, 60), (10.0, 80))


@dataclass(frozen=True, slots=True)
class _Way:
    """How the provider limits, and what the workers know of it."""

    name: str
    rates: str  #: ``buckets`` or ``windows``.
    providers: str = _CONFIGURED
    streams: tuple[tuple[float, int], ...] = _STREAMS


_WAYS: Final = (
    _Way("configured", "buckets"),
    _Way("configured, long streams", "buckets", streams=_LONG_STREAMS),
    _Way("configured, hard windows", "windows"),
    _Way("learned", "buckets", providers=""),
)


def limits(bench: Bench) -> None:
    """Measure each way, then a storm of refusals."""
    if bench.services.postgres_url is None:
        return
    for number, way in enumerate(_WAYS):
        with EmbeddedProvider() as provider:
            url = bench.services.new_database("postgresql", f"limits-{number}")
            with Deployment(
                bench,
                url,
                f"limits-{number}",
                provider_url=provider.base_url,
                providers=way.providers,
                concurrency=_PLACES,
                shutdown_grace=1,
            ) as deployment:
                _measure(bench, deployment, provider, way)
                if way is _WAYS[0]:
                    _storm(bench, provider)


def _measure(bench: Bench, deployment: Deployment, provider: EmbeddedProvider, way: _Way) -> None:
    seconds, warm = _QUICK if bench.quick else (_SECONDS, _WARM_SECONDS)
    for number, (length, tokens) in enumerate(way.streams):
        script = {"deltas": tokens, "rate": tokens / length}
        full_table.add_backlog(deployment.database_url, Backlog(_JOBS, deployment.name, f"tenant{number}", 1, script))
    _ask(provider, "/_limits", _LIMITS | {"rates": way.rates})
    first, *_ = deployment.start_workers(_WORKERS)
    _ask(provider, "/_reset", {})
    begin = time.monotonic()
    streams = []
    killed = False
    while (elapsed := time.monotonic() - begin) < seconds:
        if not killed and elapsed > seconds / 2:
            killed = True
            first.kill()
            deployment.launch_worker()
        if elapsed > warm:
            streams.append(_ask(provider, "/_limits")["streams"])
        time.sleep(_POLL_SECONDS)
    report = _ask(provider, "/_limits")
    counted = [second for second in report["seconds"] if warm <= second["second"] < seconds]
    minutes = (seconds - warm) / 60
    accepted, refused = (sum(second[what] for second in counted) for what in ("accepted", "refused"))
    used = {
        "used_requests": accepted / minutes / _REQUESTS,
        "used_tokens": sum(second["tokens"] for second in counted) / minutes / _TOKENS,
        "used_streams": statistics.fmean(streams) / _CONCURRENCY,
    }
    all_refused = sum(report["refused"].values())
    metrics = {
        "most_streams": float(report["peak_streams"]),
        "most_asked": float(report["peak_asked"]),
        "refused_share": all_refused / (report["accepted"] + all_refused),
        "refused_share_warm": refused / (accepted + refused),
        **used,
        "used": max(used.values()),
    }
    bench.record(Sample("limits", KEEPSTREAM, metrics, {"way": way.name, "seconds": seconds}))
    bench.say(f"refused: {report['refused']}")


def _storm(bench: Bench, provider: EmbeddedProvider) -> None:
    """Have the provider refuse everything for some seconds; count how they come back."""
    _ask(provider, "/_limits", {"concurrency": 0, "retry_after": 2.0})
    begin = _second(provider)
    time.sleep(_STORM_SECONDS)
    during = _second(provider)
    _ask(provider, "/_limits", {"concurrency": _CONCURRENCY, "retry_after": 1.0})
    time.sleep(_AFTER_STORM_SECONDS)
    seconds = {second["second"]: second for second in _ask(provider, "/_limits")["seconds"]}
    asked = [
        seconds[number]["accepted"] + seconds[number]["refused"] if number in seconds else 0
        for number in range(begin, begin + int(_STORM_SECONDS) + _AFTER_STORM_SECONDS)
    ]
    bench.say(f"asked in each second of a storm of {_STORM_SECONDS:.0f} s and after it: {asked}")
    metrics = {
        "refused": float(sum(each["refused"] for number, each in seconds.items() if number >= begin)),
        "most_asked_in_a_second": float(max(asked[during - begin :])),
    }
    bench.record(Sample("limits_storm", KEEPSTREAM, metrics))


def _second(provider: EmbeddedProvider) -> int:
    """Return the second that the provider counts in."""
    seconds = _ask(provider, "/_limits")["seconds"]
    return int(seconds[-1]["second"]) if seconds else 0


def _ask(provider: EmbeddedProvider, path: str, body: object = None) -> Any:
    url = provider.base_url.removesuffix("/v1") + path
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310  # ours
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())
