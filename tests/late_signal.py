"""A signal that does not wake who waits: as one does that comes just before a wait begins.

In: what its handler is to do; a wait.
Out: whether the wait looked up and heeded it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_SIGNAL: Final = signal.SIGUSR1


@contextmanager
def late_signal(handler: Callable[[], object]) -> Iterator[None]:
    """Within the context, a signal comes once which another thread receives, so that the main thread sleeps on."""

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})
        os.kill(os.getpid(), _SIGNAL)

    before = signal.signal(_SIGNAL, lambda *_: handler())
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
    timer = threading.Timer(0.3, send)  # later than the wait begins; if it comes before, the wait is not hard, no more
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})
        signal.signal(_SIGNAL, before)
