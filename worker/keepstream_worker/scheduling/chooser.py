"""The chooser: when this worker asks the table for jobs.

In: wake-ups (a message stored a job, a job ended here, a moment known in advance has come, another worker has more than
it can take), and what the heartbeat reads anyway; what ended attempts have taken.  Out: claims, to the engine; nudges,
to other workers.

A wake-up carries no promise: whoever misses one finds the work at its next heartbeat.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final

from keepstream.errors import StoreUnavailableError
from keepstream.jobs import Job
from keepstream_worker import store
from keepstream_worker.limits import Policy
from keepstream_worker.scheduling.choice import Choice, may_start_directly
from keepstream_worker.scheduling.observations import Observation, merged, withdrawn_of
from keepstream_worker.scheduling.state import State, UnreadableStateError, key_of
from keepstream_worker.store import Claim
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.turn import FoundPool, Pick, Pool
from keepstream_worker.values import JobKey, Target

log = get_logger()

#: Jobs taken in one turn at most: with more, the others would wait for the turn too long.
_MOST_PICKS: Final = 50
#: Observations told in one turn at most.
_MOST_TOLD: Final = 200
#: Observations kept while no turn succeeds; beyond, they are merged.
_MOST_KEPT: Final = 4_000
#: Seconds after which observations are told though no job is wanted: at once they would cost a turn each.
_TELL_WITHIN: Final = 1.0
#: The same while nothing waits and nothing is limited: then nobody needs them soon.
_TELL_IDLE: Final = 5.0
#: Seconds for which "nothing waits" is believed; a heartbeat says it each second.
_FRESH: Final = 2.5
#: Seconds over which workers that hear of the same thing spread their looks.
_SPREAD: Final = 0.02
#: Seconds to wait for a turn at the end of the process.
_SETTLE_TIMEOUT: Final = 5.0
#: Seconds after which a turn that met a defect is tried again.
_PAUSE_AFTER_DEFECT: Final = 1.0
#: Seconds until a turn follows one that brought nothing though jobs could go; doubled each time, up to one.
_FRUITLESS_PAUSE: Final = 0.01
#: Seconds until it is asked again whether another worker has a provider that this one lacks.
_ASK_PAUSE: Final = 1.0
#: Turns lost in a row that are said: now and then one is, when somebody changes what it had read.
_MANY_LOST: Final = 5
#: Looks in a row that find an older turn than the newest known one, after which that one is lost.
_BEHIND: Final = 3
#: Arrivals of which turns are taken to take note though no place is free: about as many as one of them does. Else who
#: came after very many of another tenant's would be seen only after as many jobs have ended as there are hundreds.
_MANY_ARRIVALS: Final = 200
#: Seconds between two nudges of one worker.
_NUDGE_PAUSE: Final = 0.05


class Chooser:
    """Takes jobs for one worker process. Made and used on the event loop."""

    def __init__(
        self,
        policy: Policy,
        worker_id: str,
        queue: str,
        places: int,
        total_timeout: float,
        turns: WorkerDatabase,
        work: WorkerDatabase,
        running: Collection[JobKey],
        streams: Mapping[Target, int],
        start: Callable[[Claim], bool],
        nudge: Callable[[list[str]], None],
        providers: Collection[str] | None = None,
    ) -> None:
        """Make a chooser.

        Args:
            policy: Limits and weights.
            worker_id: Whose jobs they will be.
            queue: The only one whose jobs this worker runs.
            places: Jobs that it runs at once.
            total_timeout: Seconds that a job may take in all, if it does not say.
            turns: For the turn alone, one operation in a transaction.
            work: For claims.
            running: The jobs that run here; it changes.
            streams: How many of them there are, by target; it changes.
            start: Called with each claim; returns whether it is new here.
            nudge: Called with queues whose jobs wait for a worker that has a place.
            providers: Those that this worker can ask; None: all.
        """
        #: Jobs that are ours already, or perhaps, but do not run yet; counted, since a turn and a message may both
        #: bring one.
        self.expected: Counter[JobKey] = Counter()
        #: Those of them that were let start, by a turn or without one: they are on their way to their targets. Jobs
        #: that start without a turn come here on the database's thread, too.
        self._admitted: set[JobKey] = set()
        self._policy = policy
        self._worker_id = worker_id
        self._queue = queue
        self._places = places
        self._total_timeout = total_timeout
        self._turns = turns
        self._work = work
        self._running = running
        self._streams = streams
        self._start = start
        self._nudge = nudge
        self._providers = None if providers is None else frozenset(providers)
        self._lacking: set[str] = set()  #: For which jobs wait that could go, but not here, as the last turn found.
        self._asked_at = 0.0  #: When it was last asked who has them.
        self._nudged_at = 0.0
        self._to_nudge: set[str] = set()  #: Queues of which others are told soon.
        self._nudge_timer: asyncio.TimerHandle | None = None
        self._observations: deque[Observation] = deque()
        self._state = State()
        self._takes_note = False  #: Whether turns are to be taken because very many jobs have arrived.
        self._parked: tuple[str, ...] = ()  #: Tenants to be looked at by the next turn.
        self._found: tuple[FoundPool, ...] = ()  #: Pools of which the next turn is told.
        self._turn = -1  #: Of the state; -1: nothing was heard yet.
        self._behind = 0  #: Times in a row that the database's newest turn was an older one.
        #: From when on jobs that wait in our queue can go, by our clock; 0: now; None: none wait, as far as is known.
        self._ready_at: float | None = 0.0
        self._awaited: frozenset[str] = frozenset()  #: Providers for which jobs wait.
        self._heard_at = 0.0
        self._wanted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tell_timer: asyncio.TimerHandle | None = None
        self._beginning: set[asyncio.Task[None]] = set()
        self._putting_right: asyncio.Task[None] | None = None
        self._paused = False
        self._turning = asyncio.Lock()
        self._fruitless = 0  #: Turns in a row that brought nothing, though jobs could go.
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Choose in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="chooser")

    def pause(self) -> None:
        """Take no more jobs; what those that run here have taken is told all the same."""
        self._paused = True

    async def settle(self) -> None:
        """Wait until the jobs of a turn that is under way are known here."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_TIMEOUT), self._turning:
                pass

    async def stop(self) -> None:
        """Stop, after what was learned of ended jobs is told."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait((self._task,), timeout=2.0)
        for timer in (self._timer, self._tell_timer, self._nudge_timer):
            if timer is not None:
                timer.cancel()
        try:
            async with asyncio.timeout(2.0):
                while self._observations:
                    await self._take_turn(0)
        except (StoreUnavailableError, TimeoutError):
            pass  # an estimate stays what it was

    @property
    def free(self) -> int:
        """Places that are neither taken nor promised."""
        return self._places - len(self._running) - len(self.expected)

    @property
    def known_turn(self) -> int:
        """Number of the newest turn whose state is known here."""
        return self._turn

    @property
    def parks_beyond(self) -> bool:
        """Whether lanes are parked that no turn remembers: ``look_at`` is to name their tenants now and then."""
        return self._state.parked_beyond > 0

    def look_at(self, parked: Iterable[str]) -> None:
        """Look again, in the next turn, at tenants whose lanes are parked: perhaps they have a place."""
        self._parked = tuple(parked)
        if self._parked:
            self._wanted.set()

    def find(self, pools: Iterable[FoundPool]) -> None:
        """Tell the next turn of pools in which jobs wait, if turns do not know of them."""
        self._found = tuple(pool for pool in pools if not self._state.knows(pool))
        if self._found:
            self._wanted.set()

    def idle_times(self) -> dict[tuple[str, str], float]:
        """Return below which times standings that are not active mean nothing, by queue and class."""
        return self._state.idle_times(self._policy.credit)

    # -- wake-ups --

    def wake(self) -> None:
        """Ask for jobs soon: one waits, as far as is known."""
        self._ready_at = 0.0
        if self.free > 0:
            self._wanted.set()
        else:
            self._nudge_others([self._queue])

    def nudged(self) -> None:
        """Another worker has more than it can take; many hear it, so each looks a little later."""
        if self.free > 0 and not self._paused:
            self._look_in(random.uniform(0, _SPREAD))  # noqa: S311  # no secret

    def expect(self, seconds: float) -> None:
        """Look in so many seconds: a job goes on then whose attempt has ended here."""
        self._look_in(seconds)

    def hear(self, looked: store.Looked) -> None:
        """Take note of what a look at the database brought; the heartbeat brings one each second."""
        self._note_state(looked.turn, looked.state)
        self._note_loss(looked.turn)
        ready = looked.ready.get(self._queue)
        # Those that turns have left are looked at by a turn now and then, not by one of each worker each second.
        left = len(self._state.passed) if looked.turn == self._turn else 0
        has_arrivals = looked.arrivals > left
        if looked.arrivals > left + _MANY_ARRIVALS:
            self._takes_note = True
            self._wanted.set()
        self._note_ready(0.0 if has_arrivals else ready, looked.now)
        if has_arrivals or (ready is not None and ready <= looked.now):
            if self.free > 0:
                self._wanted.set()
        elif ready is not None:
            self._look_in(ready - looked.now + random.uniform(0, _SPREAD))  # noqa: S311  # no secret

    def observe(self, observation: Observation, *, urgent: bool = False) -> None:
        """Take note of what an attempt has taken; it is told to the others at the next turn.

        ``urgent``: the others should know at once, of a refusal for instance.
        """
        self._keep(observation)
        if urgent or self._is_awaited(observation) or len(self._observations) >= _MOST_TOLD:
            self._wanted.set()
        else:
            self._tell_later()

    def _keep(self, observation: Observation) -> None:
        self._observations.append(observation)
        if len(self._observations) > _MOST_KEPT:
            self._observations = deque(merged(self._observations, _MOST_KEPT // 2))

    def _withdraw(self, pick: Pick) -> None:
        """Give back what a pick has taken that does not begin; at once if it was the one to try its target."""
        use = self._state.uses.get(key_of(pick.target))
        self.observe(withdrawn_of(pick), urgent=use is not None and use.learned.probe_at is not None)

    def _tell_later(self) -> None:
        if self._observations and self._tell_timer is None:
            limited = self._state.is_limited or self._policy.is_limited
            seconds = _TELL_WITHIN if limited else _TELL_IDLE
            self._tell_timer = asyncio.get_running_loop().call_later(seconds, self._tell)

    def _is_awaited(self, observation: Observation) -> bool:
        """Whether jobs wait that may go because of it: for a place here, at its provider, or among its tenant's."""
        place = observation.place
        return self._can_go or place.target.provider in self._awaited or place.tenant in self._state.tenants

    def _tell(self) -> None:
        self._tell_timer = None
        self._wanted.set()

    def _look_in(self, seconds: float) -> None:
        """Look again then, unless that is to happen sooner anyway."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(seconds, 0.0)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = loop.call_at(at, self._look_now)

    def _look_now(self) -> None:
        self._timer = None
        task = asyncio.get_running_loop().create_task(self._look())
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _look(self) -> None:
        """Look whether a turn is worth taking: whoever was first may have taken everything."""
        if self._paused or self.free <= 0:
            return
        try:
            self.hear(await self._turns.run(store.look, store.Look(self._turn)))
        except StoreUnavailableError:
            pass  # the next heartbeat looks again
        except Exception:
            log.exception("choice_defect")

    def _nudge_others(self, queues: Iterable[str]) -> None:
        """Tell others of queues; not for each job, but also of the last: who looked before it came saw nothing."""
        self._to_nudge.update(queues)
        if self._to_nudge and self._nudge_timer is None:
            pause = self._nudged_at + _NUDGE_PAUSE - time.monotonic()
            if pause > 0:
                self._nudge_timer = asyncio.get_running_loop().call_later(pause, self._nudge_now)
            else:
                self._nudge_now()

    def _nudge_now(self) -> None:
        self._nudge_timer = None
        self._nudged_at = time.monotonic()
        queues, self._to_nudge = sorted(self._to_nudge), set()
        self._nudge(queues)

    # -- direct starts --

    def reserve(self, key: JobKey) -> bool:
        """Keep a place for a job that a message names, if it may start at once; ``forget`` gives it back."""
        known = time.monotonic() - self._heard_at < _FRESH
        if self._paused or self._can_go or not known or self.free <= 0 or key in self.expected or key in self._running:
            return False
        self.expected[key] += 1
        return True

    def forget(self, key: JobKey) -> None:
        """Give a place back that was kept."""
        self.expected[key] -= 1
        if not self.expected[key]:
            del self.expected[key]
            self._admitted.discard(key)

    def direct(self, job: Job, prompt_tokens: int, max_tokens: int | None) -> store.Direct | None:
        """Return how a job that came whole is started, if nothing limits it and its place is reserved."""
        chain = tuple(Target(*target) for target in job.chain)
        found = self._admit(JobKey(job.tenant, job.id), chain, prompt_tokens, max_tokens)
        return found and store.Direct(self._worker_id, job.total_timeout or self._total_timeout, *found)

    def admits(self, key: JobKey) -> store.Admits:
        """Return by what the database's thread starts a stored job that a message names, whose place is reserved."""

        def admit(pool: Pool, _tenant: str, prompt_tokens: int, max_tokens: int | None) -> tuple[Target, int] | None:
            return None if pool.queue != self._queue else self._admit(key, pool.chain, prompt_tokens, max_tokens)

        return store.Admits(self._worker_id, self._total_timeout, admit)

    def _admit(
        self, key: JobKey, chain: tuple[Target, ...], prompt_tokens: int, max_tokens: int | None
    ) -> tuple[Target, int] | None:
        if self._providers is not None and chain[0].provider not in self._providers:
            return None
        state = self._state
        # Of very many that come at once, the last would else start as if there were no others.
        here = self._streams.get(chain[0], 0) + len(self._admitted) - (key in self._admitted)
        target = may_start_directly(self._policy, state, chain, key.tenant, here)
        if target is None:
            return None
        self._admitted.add(key)
        return target, state.estimate(target, prompt_tokens, max_tokens)

    # -- the turn --

    async def _run(self) -> None:
        pause = 0.1
        lost = 0  # turns in a row
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._choose()
                pause, lost = 0.1, 0
            except StoreUnavailableError as error:
                lost = lost + 1 if isinstance(error, store.TurnLostError) else 0
                if lost == _MANY_LOST:
                    log.warning("turns_lost", in_a_row=lost, reason=str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
                self._wanted.set()
            except Exception:  # whatever it is, jobs are to be chosen
                log.exception("choice_defect")
                await asyncio.sleep(_PAUSE_AFTER_DEFECT)
                self._wanted.set()

    async def _choose(self) -> None:
        unknown: frozenset[str] = frozenset()
        while True:
            places = 0 if self._paused else max(min(self.free, _MOST_PICKS), 0)
            takes_note, self._takes_note = self._takes_note and not self._paused, False
            if not (places or self._observations or self._parked or self._found or takes_note):
                return
            turned = await self._take_turn(places, unknown)
            if turned.more_arrivals and not turned.misplaced:  # those stay, so that there would be no end
                self._takes_note, unknown = True, frozenset()
                continue
            unknown = await self._find_unknown()
            if unknown:
                continue
            ready = turned.ready.get(self._queue)
            takes_more = self.free > 0 and not self._paused
            if takes_more:
                if ready is not None and ready > turned.now:
                    self._look_in(ready - turned.now + random.uniform(0, _SPREAD))  # noqa: S311  # no secret
                others = [queue for queue, at in turned.ready.items() if queue != self._queue and at <= turned.now]
            else:
                others = [queue for queue, at in turned.ready.items() if at <= turned.now]
            self._nudge_others(others)
            can_go = ready is not None and ready <= turned.now
            self._fruitless = 0 if turned.picks or not (takes_more and can_go) else self._fruitless + 1
            if self._fruitless == 1 and self._lacking:
                self._nudge_others([self._queue])
            if self._fruitless:  # what could go was not read, or went elsewhere: asking without end helps nobody
                self._look_in(min(_FRUITLESS_PAUSE * 2.0**self._fruitless, 1.0))
                self._tell_later()
                return
            if not (takes_more and can_go) and len(self._observations) < _MOST_TOLD:
                self._tell_later()
                return

    async def _find_unknown(self) -> frozenset[str]:
        """Return those of the providers that this worker lacks which no worker has.

        Their jobs would wait for ever, so this one takes them in its next turn, and they fail.  What others have
        changes, so the answer is good for that turn.
        """
        now = time.monotonic()
        if not self._lacking or now - self._asked_at < _ASK_PAUSE:
            return frozenset()
        unknown: frozenset[str] = await self._turns.run(
            store.find_unknown, store.Wanted(self._queue, frozenset(self._lacking))
        )
        if not unknown:
            self._asked_at = now
        return unknown

    async def _take_turn(self, places: int, unknown: frozenset[str] = frozenset()) -> store.Turned:
        """Take a turn for so many places; of ``unknown`` providers, too, which no worker can ask."""
        providers = None if self._providers is None else self._providers | unknown
        told = [self._observations.popleft() for _ in range(min(len(self._observations), _MOST_TOLD))]
        parked, self._parked = self._parked, ()
        found, self._found = self._found, ()
        choice = Choice(self._policy, self._queue, places, told, providers, parked, found)
        async with self._turning:
            try:
                turned = await self._turns.run(store.take_turn, store.Turn(self._worker_id, choice))
            except BaseException:
                self._observations.extendleft(reversed(told))
                raise
            self.expected.update(pick.job.key for pick in turned.picks)
            self._admitted.update(pick.job.key for pick in turned.picks)
        if choice.lost_state:
            log.error("turn_state_lost", turn=turned.turn)
        self._lacking = choice.lacking
        for pick in turned.left_out:  # told by the next turn: one at once could find them as they are
            self._keep(withdrawn_of(pick))
        if turned.picks:
            task = asyncio.get_running_loop().create_task(self._begin(turned.picks))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)
        if turned.misplaced and (self._putting_right is None or self._putting_right.done()):
            self._putting_right = asyncio.get_running_loop().create_task(self._put_right(turned.misplaced))
        self._note_state(turned.turn, turned.state)
        self._note_ready(turned.ready.get(self._queue), turned.now)
        return turned

    async def _put_right(self, misplaced: Iterable[int]) -> None:
        await asyncio.gather(*(self._put_one_right(seq) for seq in misplaced))

    async def _put_one_right(self, seq: int) -> None:
        """See to a job that waits where no turn can look."""
        try:
            put = await self._work.run(store.put_right, seq)
            if put is not None:
                log.error("job_misplaced", tenant=put.key.tenant, job_id=put.key.id, ended=put.ended)
                self._wanted.set()
        except StoreUnavailableError:
            pass  # the next turn finds it again
        except Exception:
            log.exception("choice_defect")

    def _note_state(self, turn: int, state: str | None) -> None:
        if state is None or turn <= self._turn:
            return
        with suppress(UnreadableStateError):  # the next turn begins a new one
            self._state = State.from_json(state)
            self._awaited = self._find_awaited()
            self._turn = turn

    def _note_loss(self, turn: int) -> None:
        """Note that the database's newest turn is older than what is known here, and not because it answered late.

        It has lost its newest turns, or was restored: then what it has counts, and is asked for again.
        """
        self._behind = self._behind + 1 if turn < self._turn else 0
        if self._behind >= _BEHIND:
            self._turn, self._behind = -1, 0

    def _find_awaited(self) -> frozenset[str]:
        """Return providers for which jobs wait: in our queue, or in any if they are limited."""
        found = set()
        for pool in self._state.pools.values():
            for key in pool.chain:
                provider, _, model = key.partition("/")
                use = self._state.uses.get(key)
                limited = bool(self._policy.limits_of(provider, model)) or (use is not None and use.learned.is_limited)
                if limited or pool.queue == self._queue:
                    found.add(provider)
        return frozenset(found)

    def _note_ready(self, ready: float | None, now: float) -> None:
        """Note from when on jobs of our queue can go, by the database's clock, which shows ``now``."""
        self._heard_at = time.monotonic()
        self._ready_at = None if ready is None else self._heard_at + max(ready - now, 0.0)

    @property
    def _can_go(self) -> bool:
        """Whether jobs wait in our queue that could go at this moment, as far as is known."""
        return self._ready_at is not None and self._ready_at <= time.monotonic()

    async def _begin(self, picks: Iterable[Pick]) -> None:
        await asyncio.gather(*(self._begin_one(pick) for pick in picks))

    async def _begin_one(self, pick: Pick) -> None:
        key = pick.job.key
        try:
            picked = store.Picked(pick, self._worker_id, self._total_timeout)
            claim = await self._work.persist(store.begin, picked)
            # It has ended meanwhile; or a message has brought it, too, and has charged it.
            if claim is None or not self._start(claim):
                self._withdraw(pick)
        except Exception:  # its row says that it is ours; the heartbeat finds it and gives it back
            log.exception("claim_defect", tenant=key.tenant, job_id=key.id)
            self._withdraw(pick)
        finally:
            self.forget(key)
            if self.free > 0 and self._can_go:
                self._wanted.set()
