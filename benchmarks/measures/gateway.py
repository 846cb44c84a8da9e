"""What a gateway process holds, and what it costs.

In: a ``Bench``.
Out: samples ``gateway_load``, ``gateway_idle``, ``gateway_stalled`` and ``gateway_first_delta``.

The gateway has a core to itself; Redis, the source of events and the readers share the rest.  A delta's time ends in
its reader's socket, so that it is Redis' and the gateway's, and not that of a reader which comes late to read.
"""

import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Final

from benchmarks.bench import Bench, Load, Sample, percentile
from benchmarks.contenders import DIRECT, Keepstream
from benchmarks.event_source import Order
from benchmarks.gateways import BARE, GATEWAY, Fan, Readers, Seen, bare, enqueue, events_path, gateway, source
from benchmarks.harness import BenchmarkError
from benchmarks.wire import address, completion_body, completion_request

_RATE: Final = 10.0  #: Deltas per second and job.
_FANS: Final[dict[str, Callable[[Bench], AbstractContextManager[Fan]]]] = {GATEWAY: gateway, BARE: bare}
_LARGE: Final = 65_536  #: Bytes of a delta, so that the buffers of a reader that reads nothing are full within seconds.
_STALLED: Final = 10
_FIRST: Final = Load(streams=1, deltas=3, stamped=True)
_STAMP: Final = re.compile(rb"\d{20} ")
_ACCEPTED: Final = re.compile(rb'\{.*"id":"([^"]+)".*\}')
_END: Final = re.compile(rb'"type":"job\.')
_WAIT_SECONDS: Final = 20.0


def gateway_load(bench: Bench) -> None:
    """2,000 readers of 200 jobs: latency, CPU per delta and reader beside the bare fan-out, memory, connections."""
    jobs, per_job, seconds = (50, 10, 5.0) if bench.quick else (200, 10, 20.0)
    for repetition in range(bench.repeat):
        for name, start in _FANS.items():
            order = Order([f"load-{n}" for n in range(jobs)], _RATE, seconds, [])
            with start(bench) as fan:
                enqueue(bench, fan, order.jobs)
                before = fan.process.memory().uss
                with source(bench, order) as events, closing(Readers(bench, fan, order.jobs * per_job)) as readers:
                    readers.wait_until_there()
                    connections = len(bench.services.redis.client_list(_type="pubsub"))
                    memory = fan.process.memory().uss - before
                    seen = readers.run(events)
            _check(name, seen.arrived, seen.published * per_job)
            metrics = {
                "cpu_us_per_delta": seen.used.cpu / len(seen.latencies_ms) * 1e6,
                **_latencies(seen),
                "core_share": seen.used.cpu / seen.used.wall,
                "stolen_share": seen.used.stolen / seen.used.wall,
                "waited_share": seen.waited / seen.used.wall,
                "others_share": seen.others_cpu / seen.used.wall / len(bench.cores.rest),
                "reader_lag_p99_ms": percentile(seen.lags_ms, 0.99),
                "kb_per_reader": memory / (jobs * per_job) / 1024,
                "subscription_connections": float(connections),
            }
            parameters = {"readers": float(jobs * per_job), "jobs": float(jobs), "rate": _RATE}
            bench.record(Sample("gateway_load", name, metrics, parameters, repetition))


def gateway_idle(bench: Bench) -> None:
    """10,000 readers of as many jobs that say nothing: memory of each, and CPU of all."""
    count, seconds = (1_000, 10.0) if bench.quick else (10_000, 60.0)
    order = Order([f"idle-{n}" for n in range(count)], _RATE, 0.0, [])
    with gateway(bench) as fan:
        enqueue(bench, fan, order.jobs)
        before = fan.process.memory().uss
        with source(bench, order), closing(Readers(bench, fan, order.jobs)) as readers:
            began = time.monotonic()
            readers.wait_until_there()
            arrived = time.monotonic() - began
            time.sleep(seconds / 6)  # what their arrival has left behind is done meanwhile
            memory = fan.process.memory().uss - before
            reading = bench.read(fan.process)
            time.sleep(seconds)
            used = bench.read(fan.process).since(reading)
            connections = len(bench.services.redis.client_list(_type="pubsub"))
    metrics = {
        "kb_per_reader": memory / count / 1024,
        "core_share": used.cpu / used.wall,
        "arrivals_per_second": count / arrived,
        "subscription_connections": float(connections),
    }
    bench.record(Sample("gateway_idle", GATEWAY, metrics, {"readers": float(count)}))


def gateway_stalled(bench: Bench) -> None:
    """Readers of large deltas that read, and that stop reading: what the others notice, and what is kept for them.

    Those that stop are given up within the run, which shows that what the gateway kept for them was bounded.
    """
    jobs, per_job, seconds = (20, 5, 10.0) if bench.quick else (50, 10, 20.0)
    for repetition in range(bench.repeat):
        for stalled in (0, _STALLED):
            order = Order([f"stalled-{n}" for n in range(jobs)], _RATE, seconds, ["large"], _LARGE)
            with gateway(bench, drain_seconds=seconds / 5) as fan:
                enqueue(bench, fan, [*order.jobs, "large"])
                wanted = order.jobs * per_job + ["large"] * _STALLED
                with source(bench, order) as events, closing(Readers(bench, fan, wanted, stalled)) as readers:
                    readers.wait_until_there()
                    before = fan.process.memory().uss
                    seen = readers.run(events)
                    grown = fan.process.memory().uss - before
                given_up = _count(fan, "streams_ended_total", how="given_up")
            _check(GATEWAY, seen.arrived, seen.published * per_job)
            metrics = {**_latencies(seen), "grown_mb": grown / 2**20, "given_up": given_up}
            bench.record(Sample("gateway_stalled", GATEWAY, metrics, {"stalled": float(stalled)}, repetition))


def gateway_first_delta(bench: Bench) -> None:
    """One job at a time, from ``POST`` to its first delta, on an otherwise idle machine."""
    jobs = 15 if bench.quick else 50
    _record_first(bench, DIRECT, [_read_directly(bench) for _ in range(jobs)])
    with bench.keepstream() as worker:
        assert isinstance(worker, Keepstream)
        with gateway(bench, worker.database_url, worker.name, apart=False) as fan:
            _post_and_read(bench, fan)  # the first one opens connections
            _record_first(bench, GATEWAY, [_post_and_read(bench, fan) for _ in range(jobs)])


def _latencies(seen: Seen) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "most_ms": 1.0}
    return {name: percentile(seen.latencies_ms, share) for name, share in shares.items()}


def _count(fan: Fan, name: str, **labels: str) -> float:
    """Return what the gateway's metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{fan.port}/metrics", timeout=_WAIT_SECONDS) as answer:
        text = answer.read().decode()
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^keepstream_gateway_{name}\{{{inside}\}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _check(name: str, arrived: int, published: int) -> None:
    if arrived != published:
        raise BenchmarkError(f"readers of {name} got {arrived} of {published} deltas")


def _record_first(bench: Bench, name: str, times_ms: list[float]) -> None:
    times_ms = sorted(times_ms)
    metrics = {"p50_ms": percentile(times_ms, 0.5), "p90_ms": percentile(times_ms, 0.9), "least_ms": times_ms[0]}
    bench.record(Sample("gateway_first_delta", name, metrics, {"jobs": float(len(times_ms))}))


def _post_and_read(bench: Bench, fan: Fan) -> float:
    """Return the milliseconds from a ``POST`` to the first byte of the first delta, over one connection."""
    body = json.dumps({"request": completion_body(_FIRST.script())}).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "localhost"} | fan.headers).items())
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", fan.port), timeout=_WAIT_SECONDS) as connection:
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(f"POST /api/jobs HTTP/1.1\r\n{head}{length}".encode() + body)
        answer = _read_until(connection, _ACCEPTED)
        path = events_path(answer[1].decode())
        connection.sendall(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
        first = _read_until(connection, _STAMP)
        elapsed = time.monotonic() - begin
        _read_until(connection, _END, first.string)
    time.sleep(0.05)  # let everything become idle again
    return elapsed * 1e3


def _read_directly(bench: Bench) -> float:
    request = completion_request(bench.services.base_url, _FIRST.script())
    begin = time.monotonic()
    with socket.create_connection(address(bench.services.base_url), timeout=_WAIT_SECONDS) as connection:
        connection.sendall(request)
        _read_until(connection, _STAMP)
        return (time.monotonic() - begin) * 1e3


def _read_until(connection: socket.socket, mark: re.Pattern[bytes], data: bytes = b"") -> re.Match[bytes]:
    while (found := mark.search(data)) is None:
        piece = connection.recv(65_536)
        if not piece:
            raise BenchmarkError(f"the connection ended: {data[-500:]!r}")
        data += piece
    return found
