"""Forks: a process and its children share nothing that a client holds open.

In: the objects that hold something open, from the modules of the client.  Out: calls to them around each fork.

A child that used its parent's connections would read the parent's answers, and one that closed them properly would end
them for the parent.  A lock that another thread held at the moment of the fork stays locked in the child for ever.  So
a child forgets all that it found, closes none of it, and makes its own.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")


class ForkMember:
    """Is told about the forks of the process for as long as it lives. A subclass does what it has to at each step."""

    def __init__(self) -> None:
        with _lock:
            _members.add(self)

    def before_fork(self) -> None:
        """Get ready in the parent, just before it forks."""

    def after_fork_in_parent(self) -> None:
        """Go on in the parent."""

    def after_fork_in_child(self) -> None:
        """Forget in the child what belongs to the parent."""


class PerProcess(ForkMember, Generic[T]):
    """A value that each process makes for itself when it first needs it. Thread-safe."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T | None = None
        self._lock = threading.Lock()
        super().__init__()

    def get(self) -> T:
        """Return this process's value."""
        value = self._value
        if value is None:
            with self._lock:
                if self._value is None:
                    self._value = self._make()
                value = self._value
        return value

    def take(self) -> T | None:
        """Return this process's value, if there is one, and forget it."""
        with self._lock:
            value, self._value = self._value, None
        return value

    def after_fork_in_child(self) -> None:
        """Forget the parent's value, and whoever held the lock."""
        if self._value is not None:
            _left_behind.append(self._value)
        self._value = None
        self._lock = threading.Lock()


_members: Final[weakref.WeakSet[ForkMember]] = weakref.WeakSet()
_lock: Final = threading.Lock()  #: Of ``_members``; held during a fork.
_told: Final[list[ForkMember]] = []  #: Those who are told about the present fork.
#: What children found of their parents', kept because some of it would be closed, or complain, when it is destroyed.
_left_behind: Final[list[Any]] = []


def _before_fork() -> None:
    _lock.acquire()
    _told.extend(_members)
    for member in _told:
        member.before_fork()


def _after_fork_in_parent() -> None:
    for member in _told:
        member.after_fork_in_parent()
    _told.clear()
    _lock.release()


def _after_fork_in_child() -> None:
    for member in _told:
        member.after_fork_in_child()
    _told.clear()
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
