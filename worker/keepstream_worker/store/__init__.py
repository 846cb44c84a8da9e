"""The store: every statement that the worker puts to the database.

In: groups of claims, endings and questions, by way of ``keepstream_worker.store.database``.  Out: rows, and an answer
for each member of the group.

The rules of ownership:

* a claim raises the job's attempt number by one, and every later write names that number, so that a superseded
  worker changes nothing (fencing);
* all times are read from, and compared with, the database's own clock;
* a write whose commit was cut may be repeated: it then answers the same and changes nothing.

Each function below takes a connection inside a transaction and a list of arguments, and returns a list of answers in
the same order.
"""

from keepstream_worker.store.claims import Claim, ClaimRequest, Refusal, claim
from keepstream_worker.store.client_calls import cancel, load_results
from keepstream_worker.store.endings import LateUsage, NotEnded, end, record_usage
from keepstream_worker.store.heartbeats import Heartbeat, HeartbeatResult, record_heartbeat, retire
from keepstream_worker.store.rejections import Refused, Rejection, refuse, reject
from keepstream_worker.store.sweeps import Sweep, SweepResult, mark_announced, sweep
from keepstream_worker.store.waiting import OwnedJob, release, requeue, schedule_resend

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
