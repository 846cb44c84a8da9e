"""Garbage: thousands of queue items that are not jobs, with valid jobs between them.

In: a sandbox, a seed and a number of items.
Out: a report.

A single unreadable item ends a stock Celery worker and, when it is put back, the next one.
"""

import base64
import contextlib
import json
import pickle
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import func, select

from keepstream.names import QUEUE, TASK
from keepstream.results import JobStatus
from keepstream.tables import rejected_messages
from tests.chaos.report import Report
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster, WorkerProcess, wait_until

ITEMS: Final = 10_000
GOOD_EVERY: Final = 50  #: A good job after this many bad items.
_HUGE_EVERY: Final = 2_000  #: An item of 13 MB after this many others.
_BATCH: Final = 100
_PATIENCE: Final = 300.0

Message = dict[str, Any]


def message(arguments: object) -> Message:
    """Return a message as a careful producer in another language would send it."""
    return {
        "body": base64.b64encode(json.dumps(arguments).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "js", "task": TASK, "id": uuid.uuid4().hex},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }


def _job(**changes: Any) -> dict[str, Any]:
    request = {"model": "scripted-1", "messages": [{"role": "user", "content": "?"}]}
    return {"v": 2, "id": uuid.uuid4().hex, "request": request} | changes


def _job_with(**changes: Any) -> dict[str, Any]:
    job = _job()
    job["request"] |= changes
    return job


#: No year 10000 can be expressed in UTC.
_OVERFLOW: Final = {"expires_at": "9999-12-31T23:59:59-01:00"}


def _altered(part: str, name: str, value: object) -> Message:
    altered = message([[_job()], {}, None])
    altered[part][name] = value
    return altered


def _lacking(part: str | None, name: str) -> Message:
    lacking = message([[_job()], {}, None])
    del (lacking if part is None else lacking[part])[name]
    return lacking


def _with_body(body: object, **changes: Any) -> Message:
    return message([[_job()], {}, None]) | {"body": body} | changes


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


#: Each gives an item that is no job, as bytes or as a value to be written as JSON.
KINDS: Final[dict[str, Callable[[random.Random], object]]] = {
    "not JSON": lambda dice: dice.choice((b"", b"{", b"hello", b"\xff\xfe\x00", dice.randbytes(40), b"[1,")),
    "no object": lambda dice: dice.choice(([], [1, 2], "text", 42, None, True)),
    "empty object": lambda _: {},
    "bad base64": lambda dice: _with_body(dice.choice(("%%%", "abc", "=", "w\n"))),
    "no id": lambda _: _lacking("headers", "id"),
    "wrong id": lambda dice: _altered("headers", "id", dice.choice((None, 5, "", [], "x" * 300, {}))),
    "no delivery tag": lambda _: _lacking("properties", "delivery_tag"),
    "wrong delivery tag": lambda dice: _altered("properties", "delivery_tag", dice.choice((None, 7, "", [1], {}))),
    "no delivery info": lambda _: _lacking("properties", "delivery_info"),
    "wrong delivery info": lambda dice: _altered("properties", "delivery_info", dice.choice(("x", 1, {"exchange": 5}))),
    "no properties": lambda _: _lacking(None, "properties"),
    "wrong properties": lambda dice: message([[_job()], {}, None]) | {"properties": dice.choice((None, [], "x"))},
    "no headers": lambda _: _lacking(None, "headers"),
    "wrong headers": lambda dice: message([[_job()], {}, None]) | {"headers": dice.choice((None, [], "x", 3))},
    "no body": lambda _: _lacking(None, "body"),
    "wrong body": lambda dice: _with_body(dice.choice((None, 5, [], {}))),
    "two-element body": lambda _: message([[_job()], {}]),
    "body of other shape": lambda dice: message(dice.choice(({}, [], "x", [[], {}, None, 1], [{}, [], None]))),
    "protocol 1": lambda _: _with_body(_encoded(json.dumps({"task": TASK, "id": "1", "args": [_job()]}).encode())),
    "wrong content type": lambda dice: _with_body("e30=", **{"content-type": dice.choice((None, "text/plain", 1))}),
    "wrong content encoding": lambda dice: _with_body("e30=", **{"content-encoding": dice.choice((None, "utf-16", 1))}),
    "wrong body encoding": lambda _: _altered("properties", "body_encoding", "gzip"),
    "pickle": lambda _: _with_body(_encoded(pickle.dumps([[_job()], {}, None]))),
    "declared pickle": lambda _: _with_body(
        _encoded(pickle.dumps([[_job()], {}, None])), **{"content-type": "application/x-python-serialize"}
    ),
    "bytes that are no UTF-8": lambda _: _with_body(_encoded(b'[["\xff\xfe"], {}, null]')),
    "not a number": lambda _: _with_body(_encoded(b'[[{"id": "x", "temperature": NaN}], {}, null]')),
    "deep": lambda dice: _with_body(_encoded(b"[" * dice.randint(2_000, 100_000))),
    "deep and closed": lambda _: _with_body(_encoded(b"[[" + b"[" * 5_000 + b"]" * 5_000 + b"], {}, null]")),
    "unknown task": lambda dice: _altered("headers", "task", dice.choice(("other.task", None, 5, ""))),
    "eta": lambda _: _altered("headers", "eta", "2030-01-01T00:00:00+00:00"),
    "wrong eta": lambda dice: _altered("headers", "eta", dice.choice((5, "soon", []))),
    "expires": lambda _: _altered("headers", "expires", "2030-01-01T00:00:00"),
    "no argument": lambda _: message([[], {}, None]),
    "two arguments": lambda _: message([[_job(), _job()], {}, None]),
    "keyword argument": lambda _: message([[_job()], {"job": _job()}, None]),
    "job is no object": lambda dice: message([[dice.choice((None, 5, "x", [], [1]))], {}, None]),
    "job of another version": lambda dice: message([[_job(v=dice.choice((None, 1, 3, "2", True, 2.0)))], {}, None]),
    "job without a version": lambda _: message([[_job()["request"]], {}, None]),
    "job without request": lambda dice: message([[_job(request=dice.choice((None, [], "x", {})))], {}, None]),
    "job without model": lambda _: message([[_job(request={"messages": [{}]})], {}, None]),
    "job without messages": lambda _: message([[_job_with(messages=[])], {}, None]),
    "job with an unknown field": lambda dice: message(
        [[_job(**{dice.choice(("max_attempt", "n", "class")): 1})], {}, None]
    ),
    "job of wrong types": lambda dice: message(
        [
            [dice.choice((_job_with(model=5), _job_with(messages="x"), _job(max_attempts="x"), _job(metadata=[])))],
            {},
            None,
        ]
    ),
    "job with a bad id": lambda dice: message([[_job(id=dice.choice(("", "a b", "{x}", "x" * 200, 5)))], {}, None]),
    "job with a bad tenant": lambda _: message([[_job(tenant="a:b")], {}, None]),
    "job with a key": lambda dice: message([[_job_with(**{dice.choice(("api_key", "base_url")): "x"})], {}, None]),
    "job with bad limits": lambda dice: message(
        [
            [_job(**dice.choice(({"total_timeout": -1}, {"max_attempts": 0}, {"expires_at": "soon"}, _OVERFLOW)))],
            {},
            None,
        ]
    ),
}


def items(number: int, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """Return ``number`` items that are not jobs, with the kind of each; every kind occurs if ``number`` allows."""
    kinds = list(KINDS)
    for position in range(number):
        if (position + 1) % _HUGE_EVERY == 0:
            yield "huge", json.dumps(_with_body("A" * 13_000_000)).encode()
            continue
        kind = kinds[position % len(kinds)]
        item = KINDS[kind](dice)
        yield kind, item if isinstance(item, bytes) else json.dumps(item).encode()


def run(sandbox: Sandbox, seed: int, _jobs: int = 0, number: int = ITEMS) -> Report:
    """Run the item and check the results."""
    report = Report(f"garbage in the queue (seed {seed}, {number} items, {sandbox.database})")
    dice = random.Random(seed)
    pushed: Counter[str] = Counter()
    good: list[str] = []
    with sandbox.cluster("garbage", sweep_interval=0.2) as cluster:
        worker = cluster.start_worker()
        streaming = cluster.enqueue(deltas=20_000, rate=100)
        batch: list[bytes] = []
        for position, (kind, item) in enumerate(items(number, dice)):
            pushed[kind] += 1
            batch.append(item)
            if (position + 1) % GOOD_EVERY == 0 or len(batch) >= _BATCH:
                cluster.push(*batch)
                batch.clear()
            if (position + 1) % GOOD_EVERY == 0:
                good.append(cluster.enqueue(deltas=3))
        cluster.push(*batch)
        _judge(report, cluster, worker, good, pushed, streaming)
    return report


def _judge(
    report: Report, cluster: Cluster, worker: WorkerProcess, good: list[str], pushed: Counter[str], streaming: str
) -> None:
    total = pushed.total()

    def recorded() -> int:
        with cluster.database() as connection:
            return int(connection.scalar(select(func.count()).select_from(rejected_messages)) or 0)

    with contextlib.suppress(AssertionError):  # the check below says how many are missing
        wait_until(lambda: recorded() >= total or not worker.running, f"{total} items to be recorded", _PATIENCE)
    report.count("items", total)
    report.count("kinds", len(pushed))
    report.count("recorded as rejected", recorded())
    report.count("good jobs between them", len(good))
    with cluster.database() as connection:
        reasons = connection.execute(
            select(rejected_messages.c.reason, func.count()).group_by(rejected_messages.c.reason)
        ).all()
    report.count("different reasons", len(reasons))
    report.check("the worker lives", [] if worker.running else [f"it ended with code {worker.wait()}"])
    report.check("each item is recorded, once", [] if recorded() == total else [f"{recorded()} of {total}"])
    ends = {job_id: cluster.wait_for(job_id, timeout=_PATIENCE) for job_id in good} if worker.running else {}
    report.check("good jobs finish", [job_id for job_id in good if not _flawless(ends.get(job_id))])
    attempts = cluster.result(streaming).attempts
    report.check("the stream under way is untouched", [] if len(attempts) == 1 else [f"{attempts}"])
    with cluster.redis() as client:
        left = client.llen(QUEUE) + client.hlen("unacked")
    report.check("nothing is left in the queue", [] if not left else [f"{left} items"])


def _flawless(result: Any) -> bool:
    return result is not None and result.status is JobStatus.COMPLETED and len(result.attempts) == 1
