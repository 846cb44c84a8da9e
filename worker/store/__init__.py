"""The store: every statement the worker puts to the database.

In: groups of claims, endings and questions, by way of ``worker.database``.  Out: rows, and the answer
for each member of the group.  Exists so that the rules of ownership stand in one place:

* a claim raises the job's attempt number by one, and every later write names that number: whoever
  was superseded changes nothing (fencing);
* every time, and every comparison of times, is the database's own clock;
* a write may be repeated when its commit was cut: repeated, it answers the same and changes nothing.

Each plural function takes a connection inside a transaction and a list, and answers in its order.
"""

from worker.store.claims import Claim, ClaimRequest, Refusal, claim
from worker.store.endings import Ended, Ending, LateUsage, NotEnded, end, record_usage
from worker.store.rejections import Refused, Rejection, refuse, reject
from worker.store.upkeep import (
    Beat,
    Held,
    Pulse,
    Sweep,
    Swept,
    beat,
    hand_back,
    mark_announced,
    release,
    resend_soon,
    retire,
    sweep,
)
from worker.store.values import JobKey, Outcome, Reason

__all__ = [
    "Beat",
    "Claim",
    "ClaimRequest",
    "Ended",
    "Ending",
    "Held",
    "JobKey",
    "LateUsage",
    "NotEnded",
    "Outcome",
    "Pulse",
    "Reason",
    "Refusal",
    "Refused",
    "Rejection",
    "Sweep",
    "Swept",
    "beat",
    "claim",
    "end",
    "hand_back",
    "mark_announced",
    "record_usage",
    "refuse",
    "reject",
    "release",
    "resend_soon",
    "retire",
    "sweep",
]
