"""The store: every statement that the worker puts to the database.

In: groups of jobs, turns, endings and questions, by way of ``keepstream_worker.store.database``.  Out: rows, and an
answer for each member of the group.

The rules of ownership:

* a job that is not terminal waits or runs: it has one row in one of the two narrow tables, and changes from one to the
  other in one transaction;
* whoever takes a job raises its attempt number by one, and every later write names that number and the worker, so that
  a superseded worker changes nothing (fencing);
* all times are read from, and compared with, the database's own clock;
* a write whose commit was cut may be repeated: it then answers the same and changes nothing.

Each function below takes a connection inside a transaction and a list of arguments, and returns a list of answers in
the same order.
"""

from keepstream_worker.store.claims import Claim, Direct, Picked, begin
from keepstream_worker.store.client_calls import cancel, load_results
from keepstream_worker.store.endings import LateUsage, NotEnded, end, record_usage
from keepstream_worker.store.heartbeats import (
    Heartbeat,
    HeartbeatResult,
    Look,
    Looked,
    Wanted,
    find_unknown,
    look,
    record_heartbeat,
    retire,
)
from keepstream_worker.store.intake import Admits, Incoming, Named, Stored, incoming, take_in, take_named
from keepstream_worker.store.minutes import Expiry, add_up, delete_old_minutes
from keepstream_worker.store.misplaced import PutRight, put_right
from keepstream_worker.store.rejections import Refused, Rejection, refuse, reject
from keepstream_worker.store.reports import InUse, read_use, tell_limits
from keepstream_worker.store.sweeps import (
    Candidacy,
    Parked,
    Sweep,
    Tidying,
    delete_idle_pools,
    delete_idle_standings,
    delete_old_turns,
    end_expired,
    find_late_arrivals,
    find_parked,
    find_unannounced,
    find_waiting_pools,
    lead,
    mark_announced,
    release_lost,
)
from keepstream_worker.store.turns import Turn, Turned, TurnLostError, take_turn
from keepstream_worker.store.waiting import OwnedJob, Released, release

__all__ = [
    "Admits",
    "Candidacy",
    "Claim",
    "Direct",
    "Expiry",
    "Heartbeat",
    "HeartbeatResult",
    "InUse",
    "Incoming",
    "LateUsage",
    "Look",
    "Looked",
    "Named",
    "NotEnded",
    "OwnedJob",
    "Parked",
    "Picked",
    "PutRight",
    "Refused",
    "Rejection",
    "Released",
    "Stored",
    "Sweep",
    "Tidying",
    "Turn",
    "TurnLostError",
    "Turned",
    "Wanted",
    "add_up",
    "begin",
    "cancel",
    "delete_idle_pools",
    "delete_idle_standings",
    "delete_old_minutes",
    "delete_old_turns",
    "end",
    "end_expired",
    "find_late_arrivals",
    "find_parked",
    "find_unannounced",
    "find_unknown",
    "find_waiting_pools",
    "incoming",
    "lead",
    "load_results",
    "look",
    "mark_announced",
    "put_right",
    "read_use",
    "record_heartbeat",
    "record_usage",
    "refuse",
    "reject",
    "release",
    "release_lost",
    "retire",
    "take_in",
    "take_named",
    "take_turn",
    "tell_limits",
]
