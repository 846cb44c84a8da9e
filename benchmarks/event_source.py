"""Events as workers publish them, without workers: by their log script, at a steady pace.

In: ``--redis-port``, and JSON lines: first the ``Order``; then an empty one to begin, and another one to end all jobs.
Out: events in Redis, and the JSON lines ``ready`` (each job's first event is in its log), ``begun`` and ``ended``, the
latter with the number of stamped deltas. Each of these carries the time at which it was handed to Redis, as 20 digits
of CLOCK_MONOTONIC's nanoseconds.

Jobs take turns, so that their deltas are spread evenly over each second.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import uvloop

from benchmarks.followers import say
from benchmarks.wire import resp_command
from keepstream.names import DEFAULT_TENANT, job_keys
from keepstream_worker.events.log_script import APPEND, SCRIPT, pack_call

_TTL_MS: Final = b"600000"
_STARTED: Final = {"model": "scripted", "provider": "default", "reason": "first"}
_ENDED: Final = {"status": "completed", "attempts": 1, "output_sha256": "0" * 64}


@dataclass(frozen=True, slots=True)
class Order:
    """What to publish."""

    jobs: list[str]
    rate: float  #: Deltas per second and job.
    seconds: float
    large_jobs: list[str]  #: At the same pace, without stamps.
    large_bytes: int = 0  #: Of one of their deltas.

    def as_json(self) -> dict[str, Any]:
        """Return it as a line for the source."""
        return asdict(self)


class _Redis(asyncio.Protocol):
    """A connection that is written to; an error in what comes back ends the process."""

    transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        if b"-" in data or b"HOLE" in data or b"FENCED" in data:  # a script's answer is OK, the load's a hash
            sys.exit(f"Redis refused: {data[:200]!r}")


class _Job:
    """One job's events."""

    def __init__(self, name: str, text: str) -> None:
        keys = job_keys(DEFAULT_TENANT, name)
        self._keys = keys.log.encode(), keys.channel.encode(), keys.cancel.encode()
        self._head = f'{{"v":1,"job_id":"{name}","attempt":1,"type":"'
        self._text = text
        self._n = 0

    def event(self, event_type: str, fields: dict[str, object]) -> bytes:
        """Return the command that publishes the next event."""
        self._n += 1
        rest = json.dumps(fields, separators=(",", ":"))[1:]
        event = f'{self._head}{event_type}","id":"1-{self._n}","ts":{time.time_ns() // 1_000_000},{rest}'
        return pack_call(self._keys, 1, self._n, _TTL_MS, APPEND, [event.encode()])

    def delta(self) -> bytes:
        """Return the command that publishes the next delta."""
        text = self._text or f"{time.monotonic_ns():020d} "
        return self.event("delta", {"choice": 0, "content": text})


async def _main(redis_port: int) -> None:
    order = Order(**json.loads(sys.stdin.readline()))
    loop = asyncio.get_running_loop()
    _, redis = await loop.create_connection(_Redis, "127.0.0.1", redis_port)
    write = redis.transport.write
    write(resp_command(b"SCRIPT", b"LOAD", SCRIPT))
    stamped = [_Job(name, "") for name in order.jobs]
    large = [_Job(name, "x" * order.large_bytes) for name in order.large_jobs]
    for job in [*stamped, *large]:
        write(job.event("attempt.started", dict(_STARTED)))
    say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    say("begun")
    turns = int(order.seconds * order.rate)
    began = time.monotonic()
    for due, job in _schedule(large + stamped, turns, order.rate):
        if (pause := began + due - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        write(job.delta())
    say("ended", deltas=turns * len(stamped))
    await asyncio.to_thread(sys.stdin.readline)
    for job in [*stamped, *large]:
        write(job.event("job.completed", dict(_ENDED)))
    await asyncio.to_thread(sys.stdin.readline)


def _schedule(jobs: list[_Job], turns: int, rate: float) -> Iterator[tuple[float, _Job]]:
    for turn in range(turns):
        places: Iterable[tuple[int, _Job]] = enumerate(jobs)
        for place, job in places:
            yield (turn + place / len(jobs)) / rate, job


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.event_source")
    parser.add_argument("--redis-port", type=int, required=True)
    uvloop.run(_main(parser.parse_args().redis_port))
