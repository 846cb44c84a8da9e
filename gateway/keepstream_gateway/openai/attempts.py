"""Attempts, as the streams of this room see them.

In: the first event of an attempt.  Out: whether what was sent of the one before may still count.  Pure.
"""

from keepstream.events import AttemptStarted, Event, Snapshot


def leaves_open(event: Event) -> bool:
    """Whether the first event of an attempt leaves open what becomes of the output of the one before."""
    return isinstance(event, Snapshot) or (isinstance(event, AttemptStarted) and event.continues)
