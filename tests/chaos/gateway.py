"""Gateways: they are killed and restarted, and Redis fails over, while hundreds of clients follow and resume.

In: a sandbox and a seed.
Out: a report.

Clients know one address, a balancer's. They follow by the native events and by OpenAI's Responses stream, leave now and
then, and come back with the last cursor they have, after whatever went wrong. At the end each holds the row's text.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx2

from keepstream.events import is_terminal, parse_event
from keepstream.results import CompletionResult, JobStatus
from keepstream.transcript import Transcript
from tests.chaos.balancer import Balancer
from tests.chaos.report import Report, spread
from tests.chaos.sandbox import Sandbox
from tests.cluster import Cluster
from tests.gateways import GatewayProcess, make_key, start_gateway

GATEWAYS: Final = 3
WORKERS: Final = 2
CLIENTS: Final = 500
PER_JOB: Final = 10
SECONDS: Final = 40.0  #: In which jobs are created.
DELTAS: Final = 100
RATE: Final = 5.0  #: Deltas per second of each job.
FAULTS: Final = (
    "gateway killed",
    "gateway stopped",
    "Redis' master killed",
    "gateway killed",
    "Redis' master replaced",
)
_PAUSE: Final = 2.0  #: Seconds between two faults.
_PATIENCE: Final = 240.0  #: Seconds for everything to end once nothing fails any more.
_TRY_AGAIN: Final = frozenset({429, 502, 503})


class Native:
    """A client that follows as an EventSource does.

    Args:
        job_id: The job.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.transcript = Transcript()
        self.has_the_end = False
        self.visits = 0
        self.offences: list[str] = []

    def request(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """Return the path, the parameters and the headers of the next visit."""
        last = self.transcript.last
        return f"/api/jobs/{self.job_id}/events", {}, {} if last is None else {"Last-Event-ID": str(last)}

    def take(self, fields: dict[str, str]) -> None:
        """Take in a server-sent event."""
        event = parse_event(fields["data"])
        if not self.transcript.apply(event):
            self.offences.append(f"{self.job_id}: {event.id} came after {self.transcript.last}")
        self.has_the_end = is_terminal(event)

    def text(self) -> str:
        """Return the text it holds."""
        return self.transcript.text


class Responses:
    """A client that follows as OpenAI's libraries do: by the number of the last event, and by items' places.

    Args:
        job_id: The job.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.has_the_end = False
        self.visits = 0
        self.offences: list[str] = []
        self._last: int | None = None
        self._items: dict[int, dict[str, Any]] = {}  #: By their place in the output.
        self._output: list[dict[str, Any]] = []  #: As the last event has it.

    def request(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """Return the path, the parameters and the headers of the next visit."""
        after = {} if self._last is None else {"starting_after": str(self._last)}
        return f"/v1/responses/resp_{self.job_id}", {"stream": "true", **after}, {}

    def take(self, fields: dict[str, str]) -> None:
        """Take in a server-sent event."""
        event = json.loads(fields["data"])
        number = event["sequence_number"]
        if self._last is not None and number <= self._last:
            self.offences.append(f"{self.job_id}: number {number} came after {self._last}")
        self._last = number
        match event["type"]:
            case "response.in_progress":
                self._items = dict(enumerate(event["response"]["output"]))
            case "response.output_item.added" | "response.output_item.done":
                self._items[event["output_index"]] = event["item"]
            case "response.content_part.added":
                self._items[event["output_index"]]["content"][event["content_index"] :] = [event["part"]]
            case "response.output_text.delta":
                self._items[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
            case "response.completed":
                self._output = event["response"]["output"]
                self.has_the_end = True

    def text(self) -> str:
        """Return the text it holds: that of the items which are complete at the end."""
        streamed = _text([item for item in self._items.values() if item["status"] == "completed"])
        return streamed if streamed == _text(self._output) else f"{len(streamed)} characters, and the end has others"


def _text(output: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])


Follower = Native | Responses


def run(
    sandbox: Sandbox,
    seed: int,
    _jobs: int = 0,
    *,
    clients: int = CLIENTS,
    per_job: int = PER_JOB,
    seconds: float = SECONDS,
    deltas: int = DELTAS,
    faults: tuple[str, ...] = FAULTS,
) -> Report:
    """Run the item and check the results."""
    report = Report(f"gateways killed, Redis failed over ({clients} clients, {GATEWAYS} gateways, {sandbox.database})")
    with sandbox.cluster("gateway", sentinels=True) as cluster:
        cluster.start_workers(WORKERS)
        gateways = [start_gateway(cluster) for _ in range(GATEWAYS)]
        play = _Play(cluster, gateways, random.Random(seed), make_key(cluster))
        began = time.monotonic()
        followers = asyncio.run(play.run(clients // per_job, per_job, seconds, deltas, faults))
        report.count("seconds", round(time.monotonic() - began))
        report.count_each("fault", play.faults)
        report.count_each("answer", play.answers)
        report.count("visits of clients", sum(follower.visits for follower in followers))
        report.count("times of a fault", spread(play.took))
        results = {job_id: cluster.wait_for(job_id) for job_id in {follower.job_id for follower in followers}}
        _judge(report, followers, results, play)
    return report


class _Play:
    """What happens: jobs, clients, faults."""

    def __init__(self, cluster: Cluster, gateways: list[GatewayProcess], dice: random.Random, key: str) -> None:
        self.faults: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()  #: Other than those that were hoped for.
        self.took: list[float] = []
        self.refused: list[str] = []
        self._cluster = cluster
        self._gateways = gateways
        self._dice = dice
        self._headers = {"Authorization": f"Bearer {key}"}
        self._balancer = Balancer()

    async def run(
        self, jobs: int, per_job: int, seconds: float, deltas: int, faults: tuple[str, ...]
    ) -> list[Follower]:
        """Let it happen; return the clients when all have the end, or it is in vain to wait."""
        self._show_ports()
        async with self._balancer as balancer:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            address = f"http://127.0.0.1:{balancer.port}"
            async with httpx2.AsyncClient(
                base_url=address, headers=self._headers, limits=limits, timeout=_PATIENCE
            ) as http:
                sabotage = asyncio.create_task(asyncio.to_thread(self._sabotage, faults))
                followers: list[Follower] = []
                actors = []
                for number in range(jobs):
                    arrives = self._dice.uniform(0, seconds)
                    dice = random.Random(self._dice.random())
                    actors.append(self._job_and_clients(http, number, per_job, arrives, deltas, dice, followers))
                done, pending = await asyncio.wait(
                    [sabotage, *map(asyncio.ensure_future, actors)],
                    timeout=seconds + _PATIENCE,
                    return_when=asyncio.FIRST_EXCEPTION,
                )
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
                for task in done:
                    task.result()  # an exception here is a defect of the suite
        return followers

    async def _job_and_clients(
        self,
        http: httpx2.AsyncClient,
        number: int,
        clients: int,
        arrives: float,
        deltas: int,
        dice: random.Random,
        followers: list[Follower],
    ) -> None:
        await asyncio.sleep(arrives)
        job_id = await self._create(http, f"job {number}", deltas)
        own: list[Follower] = [(Native, Responses)[place % 2](job_id) for place in range(clients)]
        followers += own
        await asyncio.gather(*(self._follow(http, follower, random.Random(dice.random())) for follower in own))

    async def _create(self, http: httpx2.AsyncClient, key: str, deltas: int) -> str:
        """Create a job; the same key makes no second one, so whoever got no answer asks again."""
        request = {
            "model": "scripted-1",
            "messages": [{"role": "user", "content": "Tell me something."}],
            "script": {"deltas": deltas, "rate": RATE},
        }
        while True:
            try:
                answer = await http.post("/api/jobs", json={"request": request}, headers={"Idempotency-Key": key})
            except httpx2.TransportError:
                self.answers["none, job created again"] += 1
            else:
                if answer.status_code == httpx2.codes.ACCEPTED:
                    return str(answer.json()["id"])
                self.answers[f"{answer.status_code}, job created again"] += 1
                if answer.status_code not in _TRY_AGAIN:
                    self.refused.append(f"{key}: {answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(0.3)

    async def _follow(self, http: httpx2.AsyncClient, follower: Follower, dice: random.Random) -> None:
        await asyncio.sleep(dice.uniform(0, 3))
        while not follower.has_the_end and not follower.offences:
            leaves_after = dice.randint(1, 40) if dice.random() < 0.3 else None
            try:
                await self._visit(http, follower, leaves_after)
            except httpx2.TransportError:
                self.answers["broken off"] += 1
            if not follower.has_the_end:
                await asyncio.sleep(dice.uniform(0.1, 0.6))

    async def _visit(self, http: httpx2.AsyncClient, follower: Follower, leaves_after: int | None) -> None:
        path, parameters, headers = follower.request()
        follower.visits += 1
        async with http.stream("GET", path, params=parameters, headers=headers) as answer:
            if answer.status_code != httpx2.codes.OK:
                self.answers[str(answer.status_code)] += 1
                if answer.status_code not in _TRY_AGAIN:
                    await answer.aread()
                    follower.offences.append(f"{path} {parameters} {headers}: {answer.status_code} {answer.text[:200]}")
                return
            taken = 0
            async for fields in _events(answer):
                follower.take(fields)
                taken += 1
                if follower.has_the_end or taken == leaves_after:
                    return

    def _sabotage(self, faults: tuple[str, ...]) -> None:
        for fault in faults:
            time.sleep(_PAUSE)
            began = time.monotonic()
            match fault:
                case "gateway killed":
                    self._gateways.pop(0).kill()
                    self._replace()
                case "gateway stopped":
                    self._gateways.pop(0).terminate()
                    self._replace()
                case "Redis' master killed":
                    dead = self._cluster.sentinels.master
                    dead.kill()
                    self._cluster.sentinels.wait_for_new_master(dead)
                    dead.start()
                    self._cluster.sentinels.wait_until_settled()
                case "Redis' master replaced":
                    self._cluster.sentinels.order_fail_over()
                    self._cluster.sentinels.wait_until_settled()
            self.faults[fault] += 1
            self.took.append(time.monotonic() - began)

    def _replace(self) -> None:
        self._gateways.append(start_gateway(self._cluster))
        self._show_ports()

    def _show_ports(self) -> None:
        self._balancer.ports = tuple(gateway.port for gateway in self._gateways)


async def _events(answer: httpx2.Response) -> AsyncIterator[dict[str, str]]:
    """Yield the fields of each server-sent event; an end within one is none."""
    unread = b""
    async for piece in answer.aiter_raw():
        *frames, unread = (unread + piece).split(b"\n\n")
        for frame in frames:
            lines = [line for line in frame.decode().splitlines() if not line.startswith(":")]
            fields = dict(line.split(": ", 1) for line in lines)
            if "data" in fields and fields["data"] != "[DONE]":
                yield fields


def _judge(report: Report, followers: list[Follower], results: dict[str, CompletionResult], play: _Play) -> None:
    report.check("every job is accepted, and no creation is refused", play.refused)
    report.check(
        "every job is completed by its first attempt",
        [
            f"{job_id}: {result.status} {[attempt.outcome for attempt in result.attempts]}"
            for job_id, result in results.items()
            if result.status is not JobStatus.COMPLETED or len(result.attempts) != 1
        ],
    )
    report.check("no client meets an error", [offence for follower in followers for offence in follower.offences])
    report.check(
        "every client gets the end",
        [
            f"{follower.job_id}: {follower.request()}"
            for follower in followers
            if not follower.has_the_end and not follower.offences
        ],
    )
    for kind in (Native, Responses):
        of_kind = [follower for follower in followers if isinstance(follower, kind)]
        report.count(f"clients, {kind.__name__}", len(of_kind))
        report.check(
            f"a client's text is the row's, {kind.__name__}",
            [
                f"{follower.job_id}: {len(follower.text())} of {len(results[follower.job_id].text)} characters"
                for follower in of_kind
                if follower.has_the_end and follower.text() != results[follower.job_id].text
            ],
        )
