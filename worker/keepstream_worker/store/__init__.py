"""The store: every statement the worker puts to the database.

In: groups of claims, endings and questions, by way of ``keepstream_worker.store.database``.  Out: rows, and the answer
for each member of the group.  Exists so that the rules of ownership stand in one place:

* a claim raises the job's attempt number by one, and every later write names that number: whoever
  was superseded changes nothing (fencing);
* every time, and every comparison of times, is the database's own clock;
* a write may be repeated when its commit was cut: repeated, it answers the same and changes nothing.

Each plural function takes a connection inside a transaction and a list, and answers in its order.
"""

from keepstream_worker.store.claims import Claim, ClaimRequest, Refusal, claim
from keepstream_worker.store.client_calls import cancel, load_results
from keepstream_worker.store.endings import LateUsage, NotEnded, end, record_usage
from keepstream_worker.store.rejections import Refused, Rejection, refuse, reject
from keepstream_worker.store.upkeep import (
    Heartbeat,
    HeartbeatResult,
    OwnedJob,
    Sweep,
    SweepResult,
    mark_announced,
    record_heartbeat,
    release,
    requeue,
    retire,
    schedule_resend,
    sweep,
)

__all__ = [
    "Claim",
    "ClaimRequest",
    "Heartbeat",
    "HeartbeatResult",
    "LateUsage",
    "NotEnded",
    "OwnedJob",
    "Refusal",
    "Refused",
    "Rejection",
    "Sweep",
    "SweepResult",
    "cancel",
    "claim",
    "end",
    "load_results",
    "mark_announced",
    "record_heartbeat",
    "record_usage",
    "refuse",
    "reject",
    "release",
    "requeue",
    "retire",
    "schedule_resend",
    "sweep",
]
