"""Faults: what is done to workers and servers, and when.

In: a random generator and a cluster.
Out: a plan of faults, and the faults themselves, one after the other.

A run can be repeated by its seed as far as real processes allow: what happens and when is planned in advance; what it
hits is not.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from sqlalchemy import update

from keepstream.tables import workers
from keepstream_worker.dev_stack.embedded import EmbeddedServiceError
from tests.cluster import Cluster, WorkerProcess, wait_until
from tests.redis_servers import SentinelSet

_WEIGHTS: Final = {
    "worker SIGKILL": 6,
    "worker SIGTERM": 4,
    "worker SIGTERM twice": 1,
    "Redis killed, comes back empty": 2,
    "Redis killed, comes back with its data": 2,
    "Redis fails over, its master dead": 1,
    "Redis fails over, its master alive": 1,
    "Redis' disk full": 2,
    "Redis frozen": 1,
    "Redis connections cut": 1,
    "database killed": 2,
    "database restarted": 2,
    "database frozen": 1,
    "database locked": 1,
}
SETTLED: Final = 300.0  #: Seconds for the last faults of Redis, and for the workers to be there again.
#: Seconds after a fault of Redis for which two servers may both be written to, one of them in vain.
_GETS_OVER_IT: Final = 10.0
_SUPERVISED_EVERY: Final = 0.2  #: Seconds between two looks at whether all workers are there.
#: SQLite has no server.
_SERVER_FAULTS: Final = frozenset({"database killed", "database restarted", "database frozen"})


class Fault(NamedTuple):
    """One fault."""

    at: float  #: Seconds after the beginning.
    kind: str
    lasts: float  #: Seconds.
    which: int  #: Which worker, as far as there are that many.


def plan(dice: random.Random, seconds: float, mean_pause: float, database: str) -> list[Fault]:
    """Return the faults of a run; on average there is one every ``mean_pause`` seconds."""
    weights = {kind: weight for kind, weight in _WEIGHTS.items() if database != "sqlite" or kind not in _SERVER_FAULTS}
    faults = []
    at = dice.expovariate(1 / mean_pause)
    while at < seconds:
        (kind,) = dice.choices(list(weights), list(weights.values()))
        faults.append(Fault(at, kind, dice.uniform(0.1, 2.5), dice.randrange(100)))
        at += dice.expovariate(1 / mean_pause)
    return faults


class Saboteur:
    """Plays a plan on a cluster, and replaces dead workers like a supervisor.

    Args:
        cluster: The cluster.
        workers: How many workers there shall be, besides those that are ending.
    """

    def __init__(self, cluster: Cluster, workers: int) -> None:
        self.done: Counter[str] = Counter()
        self.redis_harmed_at = 0.0  #: When Redis was last harmed, and could lose what it had taken; since the epoch.
        self.exits: Counter[str] = Counter()
        self._cluster = cluster
        self._target = workers
        self._working: list[WorkerProcess] = []
        self._ending: list[WorkerProcess] = []
        self._actions: dict[str, Callable[[Fault], None]] = {
            "worker SIGKILL": self._kill_worker,
            "worker SIGTERM": self._terminate_worker,
            "worker SIGTERM twice": self._terminate_worker_twice,
            "Redis killed, comes back empty": lambda fault: self._kill_redis(fault, empty=True),
            "Redis killed, comes back with its data": lambda fault: self._kill_redis(fault, empty=False),
            "Redis fails over, its master dead": self._kill_master,
            "Redis fails over, its master alive": self._replace_master,
            "Redis' disk full": self._fill_disk_of_redis,
            "Redis frozen": self._freeze_redis,
            "Redis connections cut": self._cut_redis,
            "database killed": self._kill_database,
            "database restarted": self._restart_database,
            "database frozen": self._freeze_database,
            "database locked": self._lock_database,
        }

    def play(self, faults: list[Fault]) -> None:
        """Carry out the plan, then make sure that all workers are running."""
        self._supervise()
        wait_until(lambda: all(worker.at_work for worker in self._working), "the first workers")
        began = time.monotonic()
        # Redis needs seconds to get over a fail-over, which nothing else waits for.
        of_redis = [fault for fault in faults if fault.kind.startswith("Redis")]
        others = [fault for fault in faults if fault not in of_redis]
        with ThreadPoolExecutor(1) as threads:
            redis = threads.submit(self._play_all, of_redis, began, lambda: None)
            self._play_all(others, began, self._supervise)

            def settled() -> bool:
                self._supervise()
                return redis.done() and not self._ending and all(worker.at_work for worker in self._working)

            wait_until(settled, "the workers to be as many as they should be", SETTLED)
            redis.result()

    def _play_all(self, faults: list[Fault], began: float, between: Callable[[], None]) -> None:
        for fault in faults:
            between()  # the previous fault may have lasted until now
            while time.monotonic() < began + fault.at:
                time.sleep(_SUPERVISED_EVERY)
                between()
            self._actions[fault.kind](fault)
            self.done[fault.kind] += 1
            if fault.kind.startswith("Redis"):
                self.redis_harmed_at = time.time() + _GETS_OVER_IT

    def _supervise(self) -> None:
        for ended in [worker for worker in self._working + self._ending if not worker.running]:
            asked = ended in self._ending
            code = ended.wait()
            self.exits[f"{'after SIGTERM' if asked else 'by itself'}, code {code}"] += 1
            (self._ending if asked else self._working).remove(ended)
        while len(self._working) < self._target:
            worker = self._cluster.new_worker()
            worker.launch()  # not awaited: Redis or the database may be down; then it is replaced
            self._working.append(worker)

    def _take(self, fault: Fault) -> WorkerProcess:
        """Take one worker out of the list, preferably one that has started."""
        candidates = [worker for worker in self._working if worker.at_work] or self._working
        worker = candidates[fault.which % len(candidates)]
        self._working.remove(worker)
        return worker

    def _kill_worker(self, fault: Fault) -> None:
        self._take(fault).kill()

    def _terminate_worker(self, fault: Fault) -> None:
        worker = self._take(fault)
        worker.terminate()
        self._ending.append(worker)

    def _terminate_worker_twice(self, fault: Fault) -> None:
        self._terminate_worker(fault)
        time.sleep(fault.lasts / 4)
        self._ending[-1].terminate()

    def _kill_redis(self, fault: Fault, *, empty: bool) -> None:
        servers = self._settled_redis().servers
        for server in servers:
            server.kill()
            if empty:
                server.wipe()
        time.sleep(fault.lasts)
        for server in servers:
            server.start()

    def _kill_master(self, fault: Fault) -> None:
        redis = self._settled_redis()
        dead = redis.master
        dead.kill()
        redis.wait_for_new_master(dead)
        time.sleep(fault.lasts)
        try:
            dead.start()
        except EmbeddedServiceError:  # a full disk had broken its file; a replica gets all it needs from the master
            dead.wipe()
            dead.start()

    def _replace_master(self, fault: Fault) -> None:
        self._settled_redis().order_fail_over()

    def _fill_disk_of_redis(self, fault: Fault) -> None:
        master = self._settled_redis().master
        master.fill_disk()
        time.sleep(2 * fault.lasts)
        master.free_disk()

    def _freeze_redis(self, fault: Fault) -> None:
        master = self._settled_redis().master
        master.freeze()
        time.sleep(fault.lasts)
        master.thaw()

    def _settled_redis(self) -> SentinelSet:
        """Return the Redis servers once they have got over the fault before."""
        self._cluster.sentinels.wait_until_settled()
        return self._cluster.sentinels

    def _cut_redis(self, fault: Fault) -> None:
        with self._cluster.redis() as client:
            for kind in ("normal", "pubsub"):
                client.client_kill_filter(_type=kind, skipme=True)

    def _kill_database(self, fault: Fault) -> None:
        self._cluster.postgres.kill()
        time.sleep(fault.lasts)
        self._cluster.postgres.start()

    def _restart_database(self, fault: Fault) -> None:
        self._cluster.postgres.stop()
        time.sleep(fault.lasts)
        self._cluster.postgres.start()

    def _freeze_database(self, fault: Fault) -> None:
        self._cluster.postgres.freeze()
        time.sleep(2 * fault.lasts)  # sometimes longer than the lease
        self._cluster.postgres.thaw()

    def _lock_database(self, fault: Fault) -> None:
        with self._cluster.database() as connection:
            connection.execute(update(workers).values(heartbeat_at=workers.c.heartbeat_at))
            time.sleep(fault.lasts)
