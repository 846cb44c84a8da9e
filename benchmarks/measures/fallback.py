"""Whether jobs go on by their second target while the first is unfit, and return to it.

In: a ``Bench``.
Out: samples ``fallback``, one for each way of being unfit.

The first target is a small server of our own, whose mood can be changed; the second is the scripted provider.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Literal

import sqlalchemy as sa

from benchmarks.bench import Bench, Sample, percentile
from benchmarks.contenders import KEEPSTREAM
from benchmarks.deployment import Deployment, Order, wait_until
from keepstream.tables import attempts

Mood = Literal["well", "broken", "cooling", "refusing"]

_PACE: Final = 10.0  #: Jobs a second.
_SCRIPT: Final = {"deltas": 5}
_COOL_SECONDS: Final = 6
_WAIT_SECONDS: Final = 90.0
_FALLBACKS: Final = {"provider": "first", "fallbacks": [{"provider": "default", "model": "scripted"}]}
_PROVIDERS: Final = """
[providers.first]
base_url = "{url}"
max_cooldown = 1.0
broken_after = 5
broken_for = 2.0
"""
_CHUNK: Final = {"id": "moody", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}
_ANSWER: Final = b"".join(
    b"data: " + json.dumps(_CHUNK | part).encode() + b"\n\n"
    for part in (
        {"choices": [{"index": 0, "delta": {"content": "well"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}},
    )
)
_REFUSALS: Final[dict[Mood, tuple[int, str]]] = {
    "broken": (500, "server_error"),
    "cooling": (429, "rate_limit_exceeded"),
    "refusing": (404, "model_not_found"),
}


class _Moody(ThreadingHTTPServer):
    """A provider that is well, or not."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.mood: Mood = "well"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, _Moody)
        mood = self.server.mood
        if mood == "well":
            self._send(200, "text/event-stream", _ANSWER + b"data: [DONE]\n\n")
            return
        status, code = _REFUSALS[mood]
        error = {"error": {"message": f"The provider is {mood}.", "type": code, "code": code}}
        self._send(status, "application/json", json.dumps(error).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", str(_COOL_SECONDS))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Say nothing."""


@contextmanager
def _moody() -> Iterator[_Moody]:
    with _Moody() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fallback(bench: Bench) -> None:
    """Let a steady load meet a first target that breaks, cools down and refuses."""
    if bench.services.postgres_url is None:
        return
    for repetition in range(bench.repeat):
        name = f"fallback-{repetition}"
        url = bench.services.new_database("postgresql", name)
        with _moody() as first, Deployment(bench, url, name, providers=_PROVIDERS.format(url=first.url)) as deployment:
            deployment.start_workers(2)
            for mood in ("broken", "cooling", "refusing"):
                metrics = _meet(bench, deployment, first, mood)
                bench.record(Sample("fallback", KEEPSTREAM, metrics, {"first": mood}, repetition))


def _meet(bench: Bench, deployment: Deployment, first: _Moody, mood: Mood) -> dict[str, float]:
    seconds = 4.0 if bench.quick else 15.0
    _submit_steadily(deployment, f"{mood}-before", 1.0)
    first.mood = mood
    sent = _submit_steadily(deployment, f"{mood}-during", seconds)
    first.mood = "well"
    begin = time.monotonic()
    returned = None
    after: dict[str, float] = {}
    while returned is None:
        after |= _submit_steadily(deployment, f"{mood}-after{len(after)}", 0.5)
        by_first = sa.select(sa.func.count()).where(attempts.c.job_id.in_(list(after)), attempts.c.provider == "first")
        finished = by_first.where(attempts.c.outcome == "finished")
        if deployment.query(finished)[0][0]:
            returned = time.monotonic() - begin
        elif time.monotonic() - begin > _WAIT_SECONDS:
            raise deployment.workers[0].process.failure("did not return to its first target")
    jobs = sent | after
    deployment.wait_for_ends(list(jobs), _WAIT_SECONDS)
    seen = deployment.watcher.jobs
    times = sorted((seen[job].ended or 0.0) - begin for job, begin in sent.items())
    made = sa.select(attempts.c.provider, attempts.c.outcome, sa.func.count()).where(attempts.c.job_id.in_(list(sent)))
    counts = {
        (provider, outcome): count
        for provider, outcome, count in deployment.query(made.group_by(attempts.c.provider, attempts.c.outcome))
    }
    return {
        "jobs": float(len(sent)),
        "failed": float(sum(seen[job].how != "job.completed" for job in jobs)),
        "by_second_share": counts.get(("default", "finished"), 0) / len(sent),
        "refused_by_first": float(counts.get(("first", "failed"), 0)),
        "p50_ms": percentile(times, 0.5) * 1e3,
        "most_ms": times[-1] * 1e3,
        "returned_s": returned,
    }


def _submit_steadily(deployment: Deployment, name: str, seconds: float) -> dict[str, float]:
    """Submit jobs for some seconds; return when each was."""
    sent: dict[str, float] = {}
    begin = time.monotonic()
    for number in range(round(seconds * _PACE)):
        time.sleep(max(0.0, begin + number / _PACE - time.monotonic()))
        job = f"{name}-{number}"
        sent[job] = time.monotonic()
        deployment.submit([Order(job, _SCRIPT, fields=_FALLBACKS)])
    wait_until(lambda: deployment.watcher.ended(sent) or None, "a job to end", _WAIT_SECONDS)
    return sent
