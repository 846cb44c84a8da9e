"""Chaos: everything fails at random, and afterwards every job is accounted for.

In: a sandbox, a seed and a number of jobs.
Out: a report.

The promises are about several failures at once, in orders for which nobody would write a test. While workers, Redis,
the database and the provider fail, each job is followed by readers that come and go with their last event id, and a raw
subscriber watches all channels. Whoever receives the end of a job checks at once that its row says the same.
"""

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import redis.asyncio
from redis.exceptions import RedisError

from keepstream import AsyncClient
from keepstream.errors import BrokerUnavailableError, StoreUnavailableError
from keepstream.events import Event, is_terminal, parse_event
from keepstream.names import EventId, job_keys, parse_event_id
from keepstream.results import AttemptResult, CompletionResult, JobStatus
from keepstream.transcript import Transcript
from tests.chaos.faults import Saboteur, plan
from tests.chaos.report import Report
from tests.chaos.sandbox import Sandbox
from tests.chaos.workload import ScriptedJob, make_job
from tests.cluster import Cluster
from tests.recording_provider import ProviderAttempt

#: Short times, so that minutes are enough to meet each of them.
SETTINGS: Final[dict[str, Any]] = {
    "heartbeat_interval": 0.5,
    "lease": 3.0,
    "sweep_interval": 0.5,
    "shutdown_grace": 2.0,
    "connect_timeout": 5.0,
    "first_token_timeout": 3.0,
    "idle_timeout": 2.0,
    "usage_wait": 1.0,
    "max_attempts": 12,
    "backoff_base": 0.2,
    "backoff_cap": 1.5,
}
WORKERS: Final = 3
SECONDS_PER_JOB: Final = 0.35  #: How the arrival of jobs is spread.
MEAN_PAUSE: Final = 2.0  #: Seconds between two faults of workers and servers.
CANCELLED: Final = 0.08  #: Share of jobs that somebody cancels.
PATIENCE: Final = 300.0  #: Seconds for everything to end once nothing fails any more.
_ENDS_WITHIN: Final = 30.0  #: Seconds in which workers publish ends again that Redis has lost.
_OVERLAP: Final = SETTINGS["lease"] + 2.0  #: Seconds that a superseded stream may go on beside its successor.


@dataclass
class Witness:
    """What one follower of a job received."""

    job_id: str
    events: list[Event] = field(default_factory=list)
    transcript: Transcript = field(default_factory=Transcript)
    joins: int = 0
    error: str | None = None


@dataclass
class Testimony:
    """Everything that was observed during the chaos."""

    witnesses: list[Witness] = field(default_factory=list)
    overheard: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))  #: By the raw subscriber.
    early: list[str] = field(default_factory=list)  #: Terminal events that came before their rows.
    looked_at_once: int = 0  #: Terminal events whose row could be looked at immediately.
    cancels: dict[str, JobStatus | None] = field(default_factory=dict)
    trouble: Counter[str] = field(default_factory=Counter)  #: What the producers and the subscriber met.


def run(sandbox: Sandbox, seed: int, jobs: int) -> Report:
    """Run the item and check the results."""
    report = Report(f"chaos (seed {seed}, {jobs} jobs, {WORKERS} workers, {sandbox.database})")
    dice = random.Random(seed)
    dealt: Counter[str] = Counter()
    workload = [make_job(f"chaos-{number}", random.Random(f"{seed} {number}"), dealt) for number in range(jobs)]
    seconds = jobs * SECONDS_PER_JOB
    faults = plan(dice, seconds, MEAN_PAUSE, sandbox.database)
    with sandbox.cluster("chaos", sentinels=True, **SETTINGS) as cluster:
        began = time.monotonic()
        saboteur = Saboteur(cluster, WORKERS)
        testimony = asyncio.run(_play(cluster, workload, saboteur, faults, seconds, seed))
        report.count("seconds", round(time.monotonic() - began))
        report.count_each("fault", saboteur.done)
        report.count_each("worker ended", saboteur.exits)
        _judge(report, cluster, workload, testimony)
        _judge_logs(report, cluster, workload, saboteur.redis_harmed_at)
        _judge_workers(report, cluster, saboteur)
    return report


# -- playing --------------------------------------------------------------------------------------


async def _play(
    cluster: Cluster, workload: list[ScriptedJob], saboteur: Saboteur, faults: Any, seconds: float, seed: int
) -> Testimony:
    testimony = Testimony()
    async with AsyncClient(cluster.redis_url, database_url=cluster.database_url) as client:
        subscriber = asyncio.create_task(_overhear(cluster, client, testimony))
        sabotage = asyncio.create_task(asyncio.to_thread(saboteur.play, faults))
        actors: list[asyncio.Task[None]] = []
        for scripted in workload:
            dice = random.Random(f"{seed} {scripted.id} actors")
            arrives = dice.uniform(0, seconds)
            actors.append(asyncio.create_task(_produce(client, scripted, arrives, dice, testimony)))
            for _ in range(dice.choice((1, 1, 2, 3))):
                witness = Witness(scripted.id)
                testimony.witnesses.append(witness)
                joins = arrives + dice.uniform(0, 5)
                actors.append(asyncio.create_task(_follow(client, witness, joins, dice, testimony)))
        done, pending = await asyncio.wait(
            [sabotage, *actors], timeout=seconds + PATIENCE, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()  # an exception here is a defect of the suite
        await asyncio.sleep(3)  # time for a second end, which would be a defect
        subscriber.cancel()
        await asyncio.gather(subscriber, return_exceptions=True)
    return testimony


async def _produce(
    client: AsyncClient, scripted: ScriptedJob, arrives: float, dice: random.Random, testimony: Testimony
) -> None:
    await asyncio.sleep(arrives)
    while True:
        try:
            await client.enqueue(scripted.job)
            break
        except StoreUnavailableError:
            testimony.trouble["enqueue repeated, the database was away"] += 1
            await asyncio.sleep(0.3)
    if dice.random() < CANCELLED:
        await asyncio.sleep(dice.uniform(0, 3))
        for repeated in range(100):
            try:
                testimony.cancels[scripted.id] = await client.cancel(scripted.id)
                break
            except (StoreUnavailableError, BrokerUnavailableError):
                testimony.trouble["cancel repeated, a server was away"] += 1
                await asyncio.sleep(0.3 + repeated / 100)


async def _follow(
    client: AsyncClient, witness: Witness, joins: float, dice: random.Random, testimony: Testimony
) -> None:
    """Follow a job to its end, leaving now and then and resuming after the last event id."""
    await asyncio.sleep(joins)
    try:
        while True:
            witness.joins += 1
            after = str(witness.transcript.last) if witness.transcript.last else None
            leaves_after = dice.randint(1, 40) if dice.random() < 0.4 else None
            stream = client.follow(witness.job_id, after, timeout=PATIENCE, not_found_after=PATIENCE)
            try:
                heard = 0
                async for event in stream:
                    heard += 1
                    witness.events.append(event)
                    witness.transcript.apply(event)
                    if is_terminal(event):
                        await _look_at_the_row(client, event, testimony)
                        return
                    if heard == leaves_after:
                        break
            finally:
                await stream.aclose()
            await asyncio.sleep(dice.uniform(0, 1))
    except asyncio.CancelledError:
        witness.error = "never received the end"
        raise
    except Exception as error:  # noqa: BLE001  # no follower may ever see one
        witness.error = repr(error)


async def _look_at_the_row(client: AsyncClient, event: Event, testimony: Testimony) -> None:
    """Check that a terminal event's row is committed."""
    result, looks = await _row_of(client, event.job_id)
    testimony.looked_at_once += looks == 1
    if result is None or f"job.{result.status}" != event.type or result.terminal_event_id != event.id:
        testimony.early.append(f"{event.job_id}: {event.type} {event.id}, row: {result and result.status}")


async def _row_of(client: AsyncClient, job_id: str) -> tuple[CompletionResult | None, int]:
    """Return a job as stored, and how many reads that took."""
    looks = 1
    while True:
        try:
            return await client.get(job_id), looks
        except StoreUnavailableError:  # unavailable; once it is back, the row is no newer than the event
            looks += 1
            await asyncio.sleep(0.2)


async def _overhear(cluster: Cluster, client: AsyncClient, testimony: Testimony) -> None:
    """Listen to all channels, ignoring what is missed while the connection is down."""
    looks: set[asyncio.Task[None]] = set()
    while True:
        try:
            url = await asyncio.to_thread(lambda: cluster.valkey.url)  # it asks the Sentinels
            async with redis.asyncio.Redis.from_url(url) as connection, connection.pubsub() as pubsub:
                await pubsub.psubscribe("keepstream:*:events")
                async for message in pubsub.listen():
                    if message["type"] != "pmessage":
                        continue
                    event = parse_event(message["data"])
                    testimony.overheard[event.job_id].append(event)
                    if is_terminal(event):
                        looks.add(asyncio.create_task(_look_at_the_row(client, event, testimony)))
        except (RedisError, OSError):
            testimony.trouble["raw subscriber reconnected"] += 1
            await asyncio.sleep(0.05)


# -- judging --------------------------------------------------------------------------------------


def _judge(report: Report, cluster: Cluster, workload: list[ScriptedJob], testimony: Testimony) -> None:
    results = {scripted.id: cluster.client.get(scripted.id) for scripted in workload}
    provider = cluster.provider.history()
    stored = {job_id: result for job_id, result in results.items() if result is not None}

    report.count_each("provider fault met", _met_faults(workload, provider))
    report.count_each("job", Counter(result.status.value for result in stored.values()))
    report.count_each(
        "failed because", Counter(_reason(result) for result in stored.values() if result.status == "failed")
    )
    report.count_each(
        "attempt", Counter(str(attempt.outcome) for result in stored.values() for attempt in result.attempts)
    )
    report.count("provider requests", sum(map(len, provider.values())))
    report.count("followers", len(testimony.witnesses))
    report.count("follower joins", sum(witness.joins for witness in testimony.witnesses))
    report.count("events followed", sum(len(witness.events) for witness in testimony.witnesses))
    report.count("snapshots followed", sum(e.type == "snapshot" for w in testimony.witnesses for e in w.events))
    report.count("terminal events whose row was looked at at once", testimony.looked_at_once)
    report.count("cancels accepted", sum(status is not JobStatus.COMPLETED for status in testimony.cancels.values()))
    report.count_each("trouble", testimony.trouble)

    report.check("every job is stored and has ended", _not_terminal(results))
    report.check("a completed job holds what the provider sent", _wrong_results(workload, stored))
    report.check("no terminal event before its row", testimony.early)
    report.check("a cancelled job is never completed", _uncancelled(testimony, stored))
    report.check("attempts' usage sums to the job's", _wrong_sums(stored))
    report.check("every provider request has its attempt", _unbooked(stored, provider))
    report.check("no two attempts stream beyond the lease", _overlapping(provider))
    report.check("no follower meets an error or waits in vain", _forsaken(testimony))
    report.check("a follower receives one end", _wrong_ends(testimony))
    report.check("a follower gets each event once, in order, without gaps", _gaps(testimony))
    report.check("a follower's output is the row's", _wrong_texts(testimony, stored))
    report.check("no event of an older attempt after a newer one's", _out_of_order(testimony))


def _reason(result: CompletionResult) -> str:
    return result.error.code if result.error else "no reason"


def _met_faults(workload: list[ScriptedJob], provider: dict[str, list[ProviderAttempt]]) -> Counter[str]:
    met: Counter[str] = Counter()
    for scripted in workload:
        made = len(provider.get(scripted.id, []))
        for fault in scripted.job.request["script"]["faults"][:made]:
            met[f"{fault['kind']} {fault.get('status', '')}".strip() if fault else "none"] += 1
    return met


def _not_terminal(results: dict[str, CompletionResult | None]) -> Iterator[str]:
    for job_id, result in results.items():
        if result is None or not result.status.terminal:
            yield f"{job_id} is {result and result.status}"


def _wrong_results(workload: list[ScriptedJob], stored: dict[str, CompletionResult]) -> Iterator[str]:
    for scripted in workload:
        result = stored.get(scripted.id)
        if result is None or result.status is not JobStatus.COMPLETED:
            continue
        contents = [choice.content for choice in result.choices]
        arguments = [call.arguments for choice in result.choices for call in choice.tool_calls]
        if contents != scripted.contents or arguments != scripted.arguments:
            yield f"{scripted.id}: {contents} {arguments}"


def _uncancelled(testimony: Testimony, stored: dict[str, CompletionResult]) -> Iterator[str]:
    for job_id, answer in testimony.cancels.items():
        final = stored[job_id].status
        if (
            answer is None
            or (answer.terminal and answer is not final)
            or (not answer.terminal and final == "completed")
        ):
            yield f"{job_id}: cancel answered {answer}, and the job is {final}"


def _wrong_sums(stored: dict[str, CompletionResult]) -> Iterator[str]:
    for result in stored.values():
        paid = [
            attempt
            for attempt in result.attempts
            if (attempt.http_status or 200) < 400 and attempt.outcome != "recovered"
        ]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            known = [value for attempt in paid if (value := _tokens(attempt, name)) is not None]
            total = getattr(result.usage, name) if result.usage else None
            if total != (sum(known) if known else None):
                yield f"{result.id}: {name} {total}, attempts {known}"


def _tokens(attempt: AttemptResult, name: str) -> int | None:
    return getattr(attempt.usage, name) if attempt.usage else None


def _unbooked(stored: dict[str, CompletionResult], provider: dict[str, list[ProviderAttempt]]) -> Iterator[str]:
    for job_id, requests in provider.items():
        booked = len(stored[job_id].attempts) if job_id in stored else 0
        if len(requests) > booked:
            yield f"{job_id}: {len(requests)} requests, {booked} attempts"


def _overlapping(provider: dict[str, list[ProviderAttempt]]) -> Iterator[str]:
    for job_id, requests in provider.items():
        for before, after in pairwise(requests):
            if before.ended is None or before.ended - after.started > _OVERLAP:
                yield f"{job_id}: {before} went on beside {after}"


def _forsaken(testimony: Testimony) -> Iterator[str]:
    for witness in testimony.witnesses:
        if witness.error is not None:
            yield f"{witness.job_id}: {witness.error}"


def _wrong_ends(testimony: Testimony) -> Iterator[str]:
    for witness in testimony.witnesses:
        ends = [event.id for event in witness.events if is_terminal(event)]
        if len(ends) != 1:
            yield f"{witness.job_id}: {ends}"


def _gaps(testimony: Testimony) -> Iterator[str]:
    for witness in testimony.witnesses:
        yield from _gaps_in(witness.job_id, witness.events)


def _gaps_in(job_id: str, events: list[Event]) -> Iterator[str]:
    last = EventId(0, 0)
    for event in events:
        here = parse_event_id(event.id)
        expected = EventId(here.attempt, last.n + 1 if here.attempt == last.attempt else 1)
        if here <= last or (here != expected and event.type != "snapshot"):
            yield f"{job_id}: {event.type} {here} after {last}"
        last = here


def _wrong_texts(testimony: Testimony, stored: dict[str, CompletionResult]) -> Iterator[str]:
    for witness in testimony.witnesses:
        result = stored.get(witness.job_id)
        if result is None or witness.transcript.terminal is None:
            continue
        held = [
            (choice.index, choice.content, choice.reasoning, _calls(choice)) for choice in witness.transcript.choices
        ]
        row = [(choice.index, choice.content, choice.reasoning, _calls(choice)) for choice in result.choices]
        if held != row or witness.transcript.sha256() != result.output_sha256:
            yield f"{witness.job_id} ({result.status}): {held} instead of {row}"


def _calls(choice: Any) -> list[tuple[str, str, str]]:
    return [(call.id, call.name, call.arguments) for call in choice.tool_calls]


def _out_of_order(testimony: Testimony) -> Iterator[str]:
    for job_id, events in testimony.overheard.items():
        newest = 0
        for event in events:
            if event.attempt < newest:
                yield f"{job_id}: {event.type} {event.id} after attempt {newest} had begun"
            newest = max(newest, event.attempt)


def _judge_logs(report: Report, cluster: Cluster, workload: list[ScriptedJob], redis_harmed_at: float) -> None:
    """A log has one end, its last event, and no gaps.

    A replica that takes over has not got the newest events.  The worker of a job publishes its end again if the log
    lacks it, some seconds later, but may be killed as well; the end is in the row then, where followers with a database
    get it.
    """
    deadline = time.monotonic() + _ENDS_WITHIN
    while True:
        lost, wrong = _look_at_logs(cluster, workload, redis_harmed_at)
        if (not lost and not wrong) or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    report.count("logs whose end Redis lost, and no worker was left to publish again", lost)
    report.check("a log has one end, and no gaps", wrong)


def _look_at_logs(cluster: Cluster, workload: list[ScriptedJob], redis_harmed_at: float) -> tuple[int, list[str]]:
    """Return how many logs have no end because Redis was harmed after it, and what else is wrong with logs."""
    wrong: list[str] = []
    lost = 0
    with cluster.redis() as client:
        for scripted in workload:
            entries: Any = client.xrange(job_keys("default", scripted.id).log)
            if not entries:  # Redis has lost it; the row has the result
                continue
            events = [parse_event(fields[b"event"]) for _, fields in entries]
            ends = [event.id for event in events if is_terminal(event)]
            result = cluster.client.get(scripted.id)
            ended_at = result.finished_at.timestamp() if result is not None and result.finished_at else time.time()
            if not ends and ended_at < redis_harmed_at:
                lost += 1
            elif ends != [events[-1].id]:
                wrong.append(f"{scripted.id}: ends {ends}, the last event is {events[-1].type} {events[-1].id}")
            wrong += _gaps_in(scripted.id, events)
    return lost, wrong


def _judge_workers(report: Report, cluster: Cluster, saboteur: Saboteur) -> None:
    """Whatever happens, a worker must not hit a defect of its own, or exit unless it was asked to."""
    defects = []
    for worker in cluster.workers:
        if not worker.at_work:
            continue  # it could not start, because a server was unavailable
        for line in worker.log_lines():
            if '"exception"' in line or "Traceback" in line:
                try:
                    record = json.loads(line)
                    defects.append(f"{record.get('event')}: {str(record.get('exception'))[-300:]}")
                except ValueError:
                    defects.append(line[:300])
    report.check("no worker met a defect", defects)
    unasked = [ended for ended in saboteur.exits if ended.startswith("by itself") and not ended.endswith("code 1")]
    report.check("no worker ended unasked", unasked)  # code 1: it could not start, because a server was unavailable
