"""What the worker asks costs as much with 100,000 jobs that ended and as many that wait as with none.

Every statement of the store that is executed per job or periodically is seen here: an operation or a statement that
this does not use makes it fail.
"""

import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest
from sqlalchemy import Engine, Executable, create_engine, delete, event, select, text, update

from keepstream.client import queries
from keepstream.client.database import make_engine
from keepstream.errors import ErrorCode
from keepstream.jobs import Job
from keepstream.results import Choice as Output
from keepstream.results import JobStatus, ToolCall, Usage, UsageSource
from keepstream.tables import (
    announcements,
    arrivals,
    metadata,
    minutes,
    seconds_from_now,
    standings,
    turns,
    waiting,
    workers,
)
from keepstream.tables import jobs as jobs_table
from keepstream.tables import pools as pools_table
from keepstream.tables import running as running_table
from keepstream_worker import store
from keepstream_worker.limits import Limits, Policy, ProviderPolicy, TenantPolicy
from keepstream_worker.scheduling import choice as choice_module
from keepstream_worker.scheduling.choice import Choice
from keepstream_worker.store import pools
from keepstream_worker.telemetry.figures import Sums
from keepstream_worker.turn import LATE_ARRIVALS
from keepstream_worker.values import Ending, Failure, JobKey, Outcome, Target
from tests.explained import BY_THEIR_END, DEAD, RUNNING, Explained, fill, leave_dead, read, vacuum
from tests.jobs import make_job

QUEUE: Final = "completions"
TARGET: Final = Target("default", "m")
#: Pages: of a statement that is executed per job, and of a sweep's, which takes up to 200 rows.
FEW: Final = 120
SWEPT: Final = 4000
USAGE: Final = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, source=UsageSource.PROVIDER)
OUTPUT: Final = Output(
    index=0,
    content="Hello",
    finish_reason="stop",
    tool_calls=[ToolCall(id="c1", name="look", arguments="{}", arguments_valid=True)],
)
UNBOUND: Final = Policy(providers={"default": ProviderPolicy(limits=Limits(concurrency=10_000))})
LIMITED: Final = replace(UNBOUND, tenants={"default": TenantPolicy(concurrency=10_000)})


class Used:
    """What of the store was executed."""

    def __init__(self, engine: Engine) -> None:
        self.operations: set[str] = set()
        self.statements: set[int] = set()
        self.texts: set[str] = set()
        event.listen(engine, "before_execute", lambda _c, statement, *_: self.statements.add(id(statement)))
        event.listen(engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: self.texts.add(statement))

    def missing(self, dialect: str) -> list[str]:
        """Return the names of operations and statements of the store that were not executed."""
        operations = [name for name in store.__all__ if name.islower() and name != "incoming"]
        missing = [name for name in operations if name not in self.operations]
        other = {"postgresql": "sqlite", "sqlite": "postgresql"}[dialect]
        for module in pkgutil.iter_modules(store.__path__, f"{store.__name__}."):
            if module.name.endswith(other):
                continue
            for name, value in vars(importlib.import_module(module.name)).items():
                found = value.get(dialect) if isinstance(value, dict) else value
                if (
                    isinstance(found, Executable)
                    and found.is_dml | found.is_select
                    and id(found) not in self.statements
                ):
                    missing.append(f"{module.name}.{name}")
        return missing


@pytest.fixture(params=["empty", pytest.param("full", marks=pytest.mark.slow), "held"])
def engine(request: pytest.FixtureRequest, database_url: str) -> Iterator[Engine]:
    """A database in which nothing or very much is stored, or from which nothing that was can go; a worker's engine."""
    maker = create_engine(database_url)
    metadata.create_all(maker)
    if request.param == "held" and maker.dialect.name == "postgresql":
        with maker.connect() as holder:
            holder.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.exec_driver_sql("SELECT count(*) FROM keepstream_waiting")
            leave_dead(maker)
            engine = make_engine(database_url, writer=True)
            yield engine
            engine.dispose()
        maker.dispose()
        return
    maker.dispose()
    engine = make_engine(database_url, writer=True)
    if request.param == "full":
        with engine.begin() as connection:
            fill(connection)  # the one that waited first has an arrival, so that a turn finds its lane
        with engine.begin() as connection:
            connection.execute(text("ANALYZE"))
    yield engine
    engine.dispose()


class Doing:
    """Does what a worker does, and looks at the plans; ``holds``: while a transaction is held open."""

    def __init__(self, engine: Engine, *, holds: bool = False) -> None:
        self.engine = engine
        self.holds = holds
        self.used = Used(engine)
        self.explained = Explained(engine)

    def __call__(
        self, operation: Callable[..., list[Any]], *arguments: Any, buffers: int = FEW, scanned: str = ""
    ) -> list[Any]:
        self.explained.clear()
        self.used.operations.add(operation.__name__)
        with self.engine.begin() as connection:
            answers = operation(connection, list(arguments))
        if self.explained:
            if self.holds:  # a sweep looks at all that is dead; everybody else at notes of arrivals, of which some are
                buffers += 3 * DEAD if buffers == SWEPT else LATE_ARRIVALS
            self.explained.check(buffers, scanned=BY_THEIR_END | {"keepstream_arrivals", scanned})
        return answers

    def change(self, *statements: Any) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)

    def choose(self, places: int = 1, policy: Policy = LIMITED) -> store.Turned:
        turned: store.Turned
        turn = store.Turn("me", Choice(policy, QUEUE, places))
        (turned,) = self(store.take_turn, turn, buffers=FEW + RUNNING // 2)  # what runs is counted
        return turned

    def begin(self, turned: store.Turned) -> list[store.Claim]:
        picked = [store.Picked(pick, "me", 60.0) for pick in turned.picks]
        return [claim for claim in self(store.begin, *picked) if claim is not None]


def ending(claim: store.Claim, **changes: Any) -> Ending:
    fields: dict[str, Any] = {
        "outcome": Outcome.FINISHED,
        "status": JobStatus.COMPLETED,
        "choices": [OUTPUT],
        "usage": USAGE,
        "terminal_event_id": f"{claim.attempt}-9",
    }
    return Ending(claim.key, claim.attempt, "me", **(fields | changes))


def pause(claim: store.Claim, **changes: Any) -> Ending:
    return Ending(
        claim.key,
        claim.attempt,
        "me",
        Outcome.FAILED,
        JobStatus.RETRYING,
        choices=[OUTPUT],
        usage=USAGE.model_copy(update={"source": UsageSource.ESTIMATED, "prompt_tokens": 9}),
        failure=Failure(ErrorCode.CONNECTION, "cut"),
        **changes,
    )


def key(job_id: str) -> JobKey:
    return JobKey("fresh", job_id)


def job(job_id: str, **fields: Any) -> Job:
    return make_job(id=job_id, tenant="fresh", **fields)


def incoming(job_id: str, *, direct: bool = False, **fields: Any) -> store.Incoming:
    item = store.incoming(job(job_id, **fields), QUEUE)
    return item._replace(direct=store.Direct("me", 60.0, TARGET, 7)) if direct else item


def test_a_worker_reads_and_locks_a_few_pages(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(pools, "_KNOWN", {})
    monkeypatch.setattr(choice_module, "_OLDEST_MEMORY", 3600.0)
    do = Doing(engine, holds=request.node.callspec.params["engine"] == "held")
    _take_in(do)
    _choose_and_end(do)
    _look_after(do)
    assert do.used.missing(engine.dialect.name) == []


def _take_in(do: Doing) -> None:
    sign = store.Heartbeat("me", 60.0, QUEUE, 10, 0)
    do(store.record_heartbeat, sign)
    do(store.record_heartbeat, sign)
    do(store.look, store.Look())
    (started,) = do(store.take_in, incoming("started", direct=True))
    do(store.take_in, incoming("started", direct=True))
    do(store.end, ending(started))
    do(store.end, ending(started))
    do(store.take_in, incoming("a", expires_at="2990-01-01T00:00:00Z"), incoming("a"), incoming("b"))
    do(store.take_in, incoming("expires", expires_at="2020-01-01T00:00:00Z"))
    with do.engine.begin() as connection:
        for job_id in ("named", "cancelled", "refused"):
            queries.enqueue(connection, job(job_id))
    admits = store.Admits("me", 60.0, lambda *_: (TARGET, 7))
    (named,) = do(store.take_named, store.Named(key("named"), admits))
    do(store.take_named, store.Named(key("named"), admits), store.Named(key("a")))
    do(store.cancel, key("named"))
    do(store.end, ending(named))
    do(store.end, ending(named, status=JobStatus.CANCELLED))
    do(store.cancel, key("cancelled"))
    do(store.load_results, key("cancelled"))
    do(store.refuse, store.Refused(job("refused"), QUEUE, ErrorCode.INTERNAL, "no", job("refused").request_hash()))
    do(store.refuse, store.Refused(job("no"), QUEUE, ErrorCode.INTERNAL, "no"))
    do(store.reject, store.Rejection("r1", "not JSON", 3))


def _choose_and_end(do: Doing) -> None:
    claims = {claim.key: claim for claim in do.begin(do.choose(8))}
    do(store.record_heartbeat, store.Heartbeat("me", 60.0, QUEUE, 10, len(claims)))
    first = claims[key("a")]
    do(store.end, pause(first, chain=(TARGET, Target("p", "n")), least_tokens=1000))
    again = {claim.key: claim for claim in do.begin(do.choose(8))}[key("a")]
    do(store.end, pause(again, retry_in=60.0))
    do.change(update(waiting).where(waiting.c.tenant == "fresh").values(restarted_due=seconds_from_now(-1.0)))
    last = {claim.key: claim for claim in do.begin(do.choose(8))}[key("a")]
    do(store.end, ending(last))
    do(store.record_usage, store.LateUsage(key("a"), 1, USAGE))
    do(store.mark_announced, key("a"), key("started"))
    do(store.end, ending(claims[key("b")], outcome=Outcome.UNSTARTED, status=JobStatus.FAILED, choices=[]))


def _look_after(do: Doing) -> None:
    do(store.lead, store.Candidacy("me", 60.0), store.Candidacy("other", 60.0))
    do(store.lead, store.Candidacy("me", 0.0))
    do(store.take_in, *(incoming(job_id) for job_id in ("lost", "orphan", "unbegun", "stopped", "gone-runs")))
    claims = {claim.key: claim for claim in do.begin(do.choose(8))}
    do(store.release, store.OwnedJob(key("orphan"), claims[key("orphan")].attempt, "me"))
    do(store.cancel, key("stopped"))
    with do.engine.begin() as connection:
        queries.enqueue(connection, job("expires-2", expires_at="2020-01-01T00:00:00Z"))
    do(store.take_in, incoming("gone-waits", expires_at="2020-01-01T00:00:00Z"))
    do.change(delete(jobs_table).where(jobs_table.c.id.like("gone-%")))
    do(store.retire, "me")
    do.change(
        update(announcements).values(ended_at=seconds_from_now(-60.0)),
        update(workers).where(workers.c.id == "me").values(heartbeat_at=seconds_from_now(-999_999.0)),
    )
    request = store.Sweep(60.0, True, float("inf"), 5, 200)
    (lost,) = do(store.release_lost, request, buffers=SWEPT)
    assert {key("lost"), key("stopped")} <= {released.key for released in lost}
    (expired,) = do(store.end_expired, request, buffers=SWEPT)
    assert key("expires-2") in expired
    (unannounced,) = do(store.find_unannounced, request, buffers=SWEPT)
    assert unannounced
    with do.engine.begin() as connection:
        newest = connection.scalar(select(turns.c.n).order_by(turns.c.n.desc()).limit(1)) or 0
        queries.enqueue(connection, job("late"))
        low = connection.scalar(select(arrivals.c.seq).order_by(arrivals.c.seq.desc()).limit(1)) or 0
        row = {"ready": "{}", "closed": "{}", "state": "{}", "arrivals_low": low + 1}
        connection.execute(turns.insert(), [row | {"n": newest + number} for number in range(1, 200)])
    do(store.add_up, [Sums("p", "m", "finished", attempts=1, deltas=20)])
    do.change(
        minutes.insert().from_select(
            [column.name for column in minutes.c],
            select(*(minutes.c.minute - 99_999 if column.name == "minute" else column for column in minutes.c)),
        )
    )
    do(store.delete_old_minutes, store.Expiry(1))
    # What runs is counted by target, for people.
    (in_use,) = do(store.read_use, None, buffers=FEW + RUNNING // 2, scanned="keepstream_running")
    assert in_use.now > 0
    do(store.tell_limits, {"limits": [], "tenants": {}, "other_tenants": None})
    idle = {(QUEUE, "interactive"): 1e9}
    tidying = store.Tidying(200, idle_times=idle)
    do(store.find_late_arrivals, tidying, tidying._replace(whole=False), buffers=SWEPT)
    do(store.delete_old_turns, tidying, buffers=SWEPT)
    do(store.delete_idle_standings, tidying, buffers=SWEPT)
    # What runs is never more than the workers have places for.
    do(store.delete_idle_pools, tidying._replace(limit=10), buffers=SWEPT, scanned="keepstream_running")
    do(store.find_waiting_pools, tidying._replace(limit=10), buffers=SWEPT)
    do(store.find_parked, store.Parked("", 10))
    assert do(store.put_right, low) != [None]
    do(store.find_unknown, store.Wanted(QUEUE, frozenset({"default"})), scanned="keepstream_workers")


@pytest.mark.parametrize("engine", ["empty"], indirect=True)
def test_a_sweep_looks_at_as_many_pools_however_many_there_are(engine: Engine) -> None:
    """Tenants name the models, and may name another one for each job."""
    pool = {"queue": QUEUE, "class": "interactive", "chain": [["p", "m"]]}
    lane = {"pool": 4000, "tenant": "x", "head": 0, "active": None, "parked": None}
    with engine.begin() as connection:
        connection.execute(pools_table.insert().values([{"id": number, **pool} for number in range(5000)]))
        connection.execute(standings.insert().values([{"lane": n, "time": 1.0 + n, **lane} for n in range(4000)]))
    with engine.begin() as connection:
        connection.execute(text("ANALYZE"))
    do = Doing(engine)
    for place, idle in ((2000, 0.5), (4000, 0.5), (4000, 1e9)):
        idle_times = {(QUEUE, "interactive"): idle}
        tidying = store.Tidying(20, pools_from=place, standings_from=place, idle_times=idle_times)
        for operation in (store.delete_idle_standings, store.find_waiting_pools, store.delete_idle_pools):
            do(operation, tidying, buffers=2 * FEW, scanned="keepstream_running")


LANES: Final = 10


def test_a_turn_reads_as_little_after_many_while_a_transaction_is_held_open(postgres_url: str) -> None:
    """Then nothing that was deleted or replaced can be cleaned away."""
    maker = create_engine(postgres_url)
    metadata.create_all(maker)
    engine = make_engine(postgres_url, writer=True)
    for group in range(22):
        with engine.begin() as connection:
            jobs = [make_job(id=f"j{group}-{number}", tenant=f"t{number % LANES}") for number in range(100)]
            store.take_in(connection, [store.incoming(job, QUEUE) for job in jobs])

    def choose() -> int:
        with engine.begin() as connection:
            (turned,) = store.take_turn(connection, [store.Turn("me", Choice(LIMITED, QUEUE, 10))])
        with engine.begin() as connection:
            store.begin(connection, [store.Picked(pick, "me", 60.0) for pick in turned.picks])
        with engine.begin() as connection:
            connection.execute(delete(running_table).where(running_table.c.job_id != "endless"))  # they have ended
            connection.execute(update(turns).values(state=aged(turned.state)).where(turns.c.n == turned.turn))
        return len(turned.picks)

    def aged(state: str) -> str:
        """Have a moment pass, after which the jobs that ended just now need not be counted."""
        document = json.loads(state)
        by_provider, *_ = document["s"]
        assert list(by_provider) == ["other"]
        document["s"] = [by_provider, time.time(), time.time()]
        return json.dumps(document)

    def pages() -> dict[str, int]:
        """Return how many pages each statement of a turn reads, of the beginning of its jobs, and of a look."""
        explained = Explained(engine)
        assert choose() == 10
        with engine.begin() as connection:
            store.look(connection, [store.Look()])
        explained.stop()
        known = {
            "newest": "FROM keepstream_turns ORDER BY n DESC",
            "standings": "SELECT s.lane, s.pool",
            "jobs": "s.most",
            "running": "r.provider, r.model",
            "tenants": "r.tenant = ANY",
            "written": "INSERT INTO keepstream_turns",
            "begun": "SELECT r.* FROM unnest",
            "look": "AS newest",
        }
        found = {
            name: [read(plan) for statement, plan in explained if part in statement] for name, part in known.items()
        }
        return {name: one for name, (one,) in found.items()}

    endless = {"tenant": "t0", "job_id": "endless", "provider": "other", "model": "m", "worker_id": "me"}
    numbers = dict.fromkeys(("attempt", "lane", "pool", "tokens", "prompt_tokens", "max_tokens"), 1)
    moment = {"started_at": seconds_from_now(-999.0), "cancel_requested": False}
    with engine.begin() as connection:
        connection.execute(running_table.insert().values(endless | numbers | moment))
    with maker.connect() as holder:  # which is not cut off, as a worker that stands still is
        holder.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.exec_driver_sql("SELECT count(*) FROM keepstream_waiting")
        assert sum(choose() for _ in range(20)) >= 180
        before = pages()
        assert sum(choose() for _ in range(180)) >= 1800
        vacuum(maker)  # after which the statistics say how little there is, and not how much is in its way
        after = pages()
    engine.dispose()
    maker.dispose()
    assert after["newest"] <= 20, "of which most are of arrivals that were handled"
    assert after["standings"] <= 10
    assert after["jobs"] <= 6 * LANES
    assert after["running"] <= 10, "that have not ended"
    assert after["tenants"] <= 10
    assert after["begun"] <= before["begun"] + 20
    assert after["look"] <= 20
    assert after["written"] <= 1.5 * before["written"] + 40
