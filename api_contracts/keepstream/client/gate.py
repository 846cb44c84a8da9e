"""The gate: who enters it is inside a call, so that closing a client, or a fork, can wait for the calls under way.

In: calls, from ``keepstream.client.base``.  Out: leave to begin, or the error that the client has been closed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from keepstream.errors import ClientClosedError


class Gate:
    """Counts the calls under way. Thread-safe. It can be shut for a while, or for ever."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._open = True
        self.closed = False  #: Whether it has been shut for ever.

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be inside; wait first while the gate is shut.

        Raises:
            ClientClosedError: the gate is shut for ever.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._open or self.closed)
            self.check()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def check(self) -> None:
        """Raise ``ClientClosedError`` if the gate is shut for ever."""
        if self.closed:
            raise ClientClosedError("this client has been closed; make a new one")

    def shut(self, timeout: float) -> None:
        """Let nobody in, and wait until nobody is inside, for at most ``timeout`` seconds."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._inside, timeout)

    def open(self) -> None:
        """Let calls in again."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """Let nobody in any more, and wait until nobody is inside, for at most ``timeout`` seconds."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._inside, timeout)

    def forget_calls(self) -> None:
        """Begin anew in a child, in which the parent's other threads do not exist."""
        self._changed = threading.Condition()
        self._inside = 0
        self._open = True
