"""The state: what one turn leaves for the next.

In: the JSON text of the newest turn.  Out: what is known of pools, queues, targets and full tenants, to ``Choice`` and
to whoever looks on; the JSON text again.

It is all that a turn knows before it reads: which pools have jobs, how far their lanes are, what is used of each limit.
It is parsed under the lock of the whole deployment, so it is kept small and plain: rows without names, nothing that
says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

import orjson

from keepstream_worker.scheduling.learning import TargetState as Learned
from keepstream_worker.turn import FoundPool, Oldest, Pool
from keepstream_worker.values import Target

INTERACTIVE: Final = "interactive"
BULK: Final = "bulk"

NOTHING_LEARNED: Final = Learned()
#: Tokens of an answer of which nothing is known.
_USUAL_OUTPUT: Final = 500
#: How much a new answer moves the mean.
_MEAN_STEP: Final = 0.1
#: Targets and providers remembered; beyond, the targets that were of use longest ago are forgotten.
_MOST_TARGETS: Final = 1000
#: Seconds after which a target is forgotten that nobody uses.
_TARGET_MEMORY: Final = 86_400.0


@dataclass(slots=True)
class PoolState:
    """What is known of a pool in which jobs wait."""

    queue: str
    job_class: str
    chain: Sequence[str]  #: Keys of its targets: ``PROVIDER/MODEL``.
    low: float | None = None  #: No lane that is active here has a smaller time; None: none is active.
    restarted: float | None = None  #: No restarted job goes on here earlier; None: none waits, as far as is known.
    lanes: int = 0  #: Active ones that were read last.
    #: Whether restarted jobs may wait here that were not read, because their tenants were full.
    hidden: bool = False
    full_at: float = 0.0  #: When its target was last found to run all it may; 0: it was not.


@dataclass(slots=True)
class QueueState:
    """What is known of a queue."""

    #: The largest start ever served, by class. Missing: nothing was ever chosen.
    reach: dict[str, float] = field(default_factory=dict)
    #: The smallest start of the lanes that could be served at the end of its newest turn, by class; missing: none.
    floor: dict[str, float] = field(default_factory=dict)
    owed: float = 0.0  #: Tokens that bulk is behind its share.
    ready: float | None = None  #: When its next turn is worth taking; 0: at once; None: nothing waits.


class UseState:
    """What is known of a target, or of a provider as a whole."""

    __slots__ = ("_learned", "_learned_json", "output", "requests", "tokens", "used")

    def __init__(
        self,
        requests: float = 0.0,
        tokens: float = 0.0,
        output: float | None = None,
        used: float = 0.0,
        learned_json: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the values of a state."""
        # A bucket is the moment at which it was, or will be, empty and free of debt: so its balance is kept in seconds,
        # and a new rate applies from now.  0: it is full.
        self.requests = requests
        self.tokens = tokens
        self.output = output  #: Running mean of the tokens of an answer.
        self.used = used  #: When it was last used.
        self._learned_json = learned_json  # read when it is first asked for: most are not, in one turn
        self._learned = NOTHING_LEARNED if learned_json is None else None

    @property
    def learned(self) -> Learned:
        """What was learned from its answers."""
        if self._learned is None:
            self._learned = Learned.from_json(self._learned_json or {})
        return self._learned

    @learned.setter
    def learned(self, learned: Learned) -> None:
        if learned is not self._learned:
            self._learned, self._learned_json = learned, learned.to_json() or None

    @property
    def needed(self) -> float:
        """The last moment at which it was, or will be, of use."""
        return max(self.used, self.requests, self.tokens)

    @property
    def says_nothing(self) -> bool:
        """Whether there is nothing to be remembered."""
        return not (self.requests or self.tokens or self._learned_json) and self.output is None

    def row(self) -> list[Any]:
        """Return it as it is stored."""
        row: list[Any] = [self.requests, self.tokens, self.output, self.used]
        if self._learned_json:
            row.append(self._learned_json)
        return row

    def answered(self, output_tokens: int) -> None:
        """Take note of the length of an answer."""
        mean = self.output
        self.output = float(output_tokens) if mean is None else mean + _MEAN_STEP * (output_tokens - mean)


@dataclass(slots=True)
class FullTenant:
    """A tenant of whom jobs wait, because it runs as many as it may."""

    checked: float  #: When its jobs were last counted.
    running: int
    low: float | None  #: No parked lane of it has a smaller time; None: none is parked.
    queues: list[str]  #: Where its jobs wait.


#: Fields that this version knows: a newer one appends its own, and both may be at work during an upgrade.
_POOL_FIELDS: Final = len(fields(PoolState))
_QUEUE_FIELDS: Final = len(fields(QueueState))
_USE_FIELDS: Final = 5
_TENANT_FIELDS: Final = len(fields(FullTenant))


class UnreadableStateError(ValueError):
    """A text is no state."""


class State:
    """What one turn leaves for the next."""

    __slots__ = (
        "arrivals_low",
        "oldest",
        "oldest_found",
        "parked_beyond",
        "passed",
        "passed_since",
        "pools",
        "queues",
        "tenants",
        "uses",
    )

    def __init__(self) -> None:
        self.arrivals_low = 0  #: From where the next turn looks for arrivals.
        #: Of these from there on, those that turns have left, because their lanes wait in many pools; and since when.
        self.passed: list[int] = []
        self.passed_since = 0.0
        self.pools: dict[int, PoolState] = {}  #: Those in which jobs wait, new or restarted, by id.
        self.queues: dict[str, QueueState] = {}
        self.uses: dict[str, UseState] = {}  #: By the key of a limit: ``PROVIDER/MODEL`` or ``PROVIDER``.
        self.tenants: dict[str, FullTenant] = {}  #: The full ones, as far as there is room.
        #: When a lane was last parked, or found parked, whose tenant is not among those; 0: never, or long ago.
        self.parked_beyond = 0.0
        self.oldest: Oldest | None = None  #: None: it is not known.
        self.oldest_found = 0.0  #: When it was found.

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a state; ``{}`` is that before the first turn.

        Raises:
            UnreadableStateError: it is none.
        """
        try:
            return cls._from_json(text)
        except Exception as error:  # noqa: BLE001  # whatever stands there
            raise UnreadableStateError(f"the state cannot be read ({type(error).__name__})") from None

    @classmethod
    def lost(cls, now: float) -> Self:
        """Return the state after one that cannot be read: a sweep tells which pools and tenants it knew."""
        state = cls()
        state.parked_beyond = now
        return state

    @classmethod
    def _from_json(cls, text: str) -> Self:
        state = cls()
        document: dict[str, Any] = orjson.loads(text)
        state.arrivals_low = document.get("a", 0)
        state.passed, state.passed_since = document.get("x", ([], 0.0))
        state.parked_beyond = document.get("o", 0.0)
        if "s" in document:
            by_provider, others, state.oldest_found = document["s"]
            state.oldest = Oldest(by_provider, others)
        for pool, row in document.get("p", {}).items():
            state.pools[int(pool)] = PoolState(*row[:_POOL_FIELDS])
        for queue, row in document.get("q", {}).items():
            state.queues[queue] = QueueState(*row[:_QUEUE_FIELDS])
        for key, row in document.get("u", {}).items():
            state.uses[key] = UseState(*row[:_USE_FIELDS])
        for tenant, row in document.get("t", {}).items():
            state.tenants[tenant] = FullTenant(*row[:_TENANT_FIELDS])
        return state

    def to_json(self) -> str:
        """Write it, without what says nothing."""
        pools = {
            str(number): [
                pool.queue,
                pool.job_class,
                pool.chain,
                pool.low,
                pool.restarted,
                pool.lanes,
                pool.hidden,
                pool.full_at,
            ]
            for number, pool in self.pools.items()
            if pool.low is not None or pool.restarted is not None or pool.hidden
        }
        queues = {
            name: [each.reach, each.floor, each.owed, each.ready]
            for name, each in self.queues.items()
            if each.reach or each.floor or each.ready is not None
        }
        uses = {key: use.row() for key, use in self._kept_uses()}
        tenants = {
            name: [tenant.checked, tenant.running, tenant.low, tenant.queues] for name, tenant in self.tenants.items()
        }
        parts: dict[str, Any] = {
            "a": self.arrivals_low,
            "x": [self.passed, self.passed_since] if self.passed else None,
            "o": self.parked_beyond,
            "s": None if self.oldest is None else [*self.oldest, self.oldest_found],
            "p": pools,
            "q": queues,
            "u": uses,
            "t": tenants,
        }
        return orjson.dumps({name: part for name, part in parts.items() if part}).decode()

    def forget_targets(self, now: float) -> None:
        """Forget targets and providers that nobody has used for a day; whatever they owed is paid by then."""
        at_rest = [key for key, use in self.uses.items() if use.needed < now - _TARGET_MEMORY]
        for key in at_rest:
            del self.uses[key]

    def _kept_uses(self) -> list[tuple[str, UseState]]:
        says = [(key, use) for key, use in self.uses.items() if not use.says_nothing]
        if len(says) > _MOST_TARGETS:
            says.sort(key=lambda item: ("/" not in item[0], item[1].needed), reverse=True)
            del says[_MOST_TARGETS:]
        return says

    @property
    def is_limited(self) -> bool:
        """Whether something was learned that limits a target."""
        return any(use.learned.is_limited for use in self.uses.values())

    def idle_times(self, credit: float) -> dict[tuple[str, str], float]:
        """Return, by queue and class, the time below which a standing that is not active means nothing."""
        return {
            (name, job_class): reach - credit
            for name, queue in self.queues.items()
            for job_class, reach in queue.reach.items()
        }

    def find(self, found: FoundPool) -> None:
        """Take note of a pool in which jobs wait; if it is known, it is as it was or is looked at once too often."""
        pool = self.pools.setdefault(found.pool.id, pool_state(found.pool))
        if found.time is not None:
            pool.low = found.time if pool.low is None else min(pool.low, found.time)
        if found.due is not None:
            pool.restarted = found.due if pool.restarted is None else min(pool.restarted, found.due)

    def knows(self, found: FoundPool) -> bool:
        """Whether all is known that waits in a pool."""
        pool = self.pools.get(found.pool.id)
        if pool is None:
            return False
        knows_lanes = found.time is None or (pool.low is not None and pool.low <= found.time)
        knows_restarted = pool.restarted is not None and found.due is not None and pool.restarted <= found.due
        return knows_lanes and (found.due is None or knows_restarted or pool.hidden)

    def use(self, key: str) -> UseState:
        """Return what is known under the key of a limit."""
        found = self.uses.get(key)
        if found is None:
            found = self.uses[key] = UseState()
        return found

    def queue(self, name: str) -> QueueState:
        """Return what is known of a queue."""
        found = self.queues.get(name)
        if found is None:
            found = self.queues[name] = QueueState()
        return found

    def estimate(self, target: Target, prompt_tokens: int, max_tokens: int | None) -> int:
        """Return the tokens that a job will take there, as far as can be known before; at least 1."""
        known = self.uses.get(f"{target.provider}/{target.model}")
        if known is not None and known.output is not None:
            output = round(known.output) if max_tokens is None else min(round(known.output), max_tokens)
        else:
            output = _USUAL_OUTPUT if max_tokens is None else max_tokens
        return max(1, prompt_tokens + output)


def key_of(target: Target) -> str:
    """Return the key of a target: ``PROVIDER/MODEL``."""
    return f"{target.provider}/{target.model}"


def class_of(name: str) -> str:
    """Return by which of the two classes jobs are chosen: one that this version does not know counts as bulk."""
    return INTERACTIVE if name == INTERACTIVE else BULK


def pool_state(pool: Pool) -> PoolState:
    """Return what is known of a pool before anything is."""
    return PoolState(pool.queue, class_of(pool.job_class), tuple(map(key_of, pool.chain)))
