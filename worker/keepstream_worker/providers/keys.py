"""Provider keys: the key that a request carries, read anew while the worker runs where its source can change.

In: a provider's configuration; that the provider has refused a key.
Out: the key, or a ``ProviderFailure`` that says why there is none; lines in the log when it changes, and when it cannot
be read. No message holds a key, or what a command printed.

A file is read again with every request, at most once a second: that is cheaper than to find out whether it has
changed, and no way of replacing it is missed. A command runs again when a request comes and a fifth of its key's time
is left, while requests go on with the key that they have. No two readings run at the same time, and none of them on
the event loop, so that a file server that hangs, or a command that does, holds up no stream.
"""

import asyncio
import math
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from keepstream.errors import ErrorCode
from keepstream_worker.providers.config import ProviderConfig, fits_a_header
from keepstream_worker.providers.http import ProviderFailure
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import Failure

log = get_logger()

_MAX_KEY_BYTES: Final = 64 * 1024  #: Entra's tokens have two to five KiB.
_FILE_INTERVAL: Final = 1.0  #: Seconds for which a file's key is used without another look.
_FILE_PATIENCE: Final = 1.0  #: Seconds a request waits for a file while there is an older key.
_RENEWED_AT: Final = 0.8  #: The share of its time after which a command's key is renewed.
_COMMAND_PAUSE: Final = 10.0  #: Seconds between a run that did not help and the next one.
_COMMAND_SECONDS: Final = 30.0  #: A run may take.
_END_SECONDS: Final = 5.0  #: To see a killed command end.
_KEYS_KNOWN: Final = 8  #: Former keys that are still removed from what providers say.


class KeyUnreadableError(Exception):
    """A key cannot be read: ``args`` has the reason and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason, advice)
        self.reason = reason
        self.advice = advice


class ConstantKey:
    """A key that does not change while the worker runs, or the lack of one. As ``ChangingKey``, for the rest."""

    def __init__(self, config: ProviderConfig) -> None:
        """Take the key from ``config``."""
        self._missing = config.key_missing
        self._provider, self._variable = config.name, config.api_key_env
        self._value = config.api_key.get_secret_value() if config.api_key else None
        self.known = [self._value] if self._value else []
        self.origin = ""

    async def current(self) -> str | None:
        """Return the key; None if the provider needs none."""
        if self._missing:
            message = f"provider {self._provider!r} has no key: set the environment variable {self._variable}"
            raise ProviderFailure(Failure(code=ErrorCode.AUTH, message=message))
        return self._value

    async def other_than(self, _: str | None) -> str | None:
        """Return None: there is no other key."""
        return None

    async def aclose(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a key is read, and when. Times are in seconds."""

    read: Callable[[], Awaitable[str]]  #: Raises ``KeyUnreadableError``.
    origin: str  #: In words.
    fresh: float  #: For how long a key is used without another reading.
    valid: float  #: For how long it may be used, if no newer one can be read.
    patience: float  #: How long a request waits for a reading while it has a key that it may use.
    pause: float  #: Between a reading that failed, or brought a key that is refused, and the next.


class ChangingKey:
    """A key that is read from a file or a command. Used on one event loop.

    Args:
        provider: The provider's name, for messages.
        source: Where the key is read.
        clock: Seconds.
    """

    def __init__(self, provider: str, source: _Source, clock: Callable[[], float] = time.monotonic) -> None:
        self.known: deque[str] = deque(maxlen=_KEYS_KNOWN)  #: The keys so far, to be removed from what is stored.
        self._provider = provider
        self._source = source
        self._clock = clock
        self._value: str | None = None
        self._fresh_until = self._valid_until = self._began = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._trouble: KeyUnreadableError | None = None  # of the last reading
        self._failing_since: float | None = None
        self._said: set[str] = set()

    @property
    def origin(self) -> str:
        """Where the key comes from, in words."""
        return self._source.origin

    async def current(self) -> str:
        """Return the key to use now.

        Raises:
            ProviderFailure: there is none, or its time is over and no other can be read. That may pass, so it is to
                be tried again.
        """
        if self._clock() >= self._fresh_until:
            reading = self._read_anew()
            await asyncio.wait({reading}, timeout=self._source.patience if self._usable else None)
        if self._value is None or not self._usable:
            trouble = self._trouble
            reason = f"{trouble.reason}; {trouble.advice}" if trouble else f"{self.origin} gave none in time"
            message = f"provider {self._provider!r} has no key: {reason}"
            raise ProviderFailure(Failure(code=ErrorCode.AUTH, message=message, should_retry=True))
        return self._value

    async def other_than(self, refused: str | None) -> str | None:
        """Return another key than the one that the provider refused, after a new reading if need be; None if none."""
        if self._value == refused and self._reading is not None:
            await asyncio.wait({self._reading})  # it may have begun before the key changed
        if self._value == refused and self._clock() >= self._began + self._source.pause:
            await asyncio.wait({self._read_anew()})
        return None if self._value == refused else self._value

    async def aclose(self) -> None:
        """End a reading that is under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    @property
    def _usable(self) -> bool:
        return self._value is not None and self._clock() < self._valid_until

    def _read_anew(self) -> "asyncio.Task[None]":
        """Return the reading that is under way, a new one if there is none."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        self._began = self._clock()  # a key is at least as young as the reading that brought it
        try:
            key = await self._source.read()
        except KeyUnreadableError as error:
            self._note_trouble(error)
        except Exception as error:  # noqa: BLE001  # of a file system or the event loop; jobs wait for this reading
            reason = f"its key {self.origin} cannot be read ({type(error).__name__})"
            self._note_trouble(KeyUnreadableError(reason, "report this: it was not foreseen"))
        else:
            self._note_key(key)

    def _note_key(self, key: str) -> None:
        if self._failing_since is not None:
            lasted = round(self._clock() - self._failing_since, 1)
            log.info("key_readable", provider=self._provider, lasted=lasted)
        elif self._value is not None and key != self._value:
            log.info("key_changed", provider=self._provider)
        if key not in self.known:
            self.known.append(key)
        self._value = key
        self._trouble = self._failing_since = None
        self._said.clear()
        self._fresh_until = self._began + self._source.fresh
        self._valid_until = self._began + self._source.valid

    def _note_trouble(self, trouble: KeyUnreadableError) -> None:
        if self._failing_since is None:
            self._failing_since = self._began
        self._trouble = trouble
        self._fresh_until = self._clock() + self._source.pause
        if trouble.reason not in self._said:
            self._said.add(trouble.reason)
            usable = "the key that was read before is used" if self._usable else "jobs for this provider wait"
            log.warning(
                "key_unreadable",
                provider=self._provider,
                reason=trouble.reason,
                advice=trouble.advice,
                meanwhile=usable,
            )


def key_of(config: ProviderConfig, clock: Callable[[], float] = time.monotonic) -> ConstantKey | ChangingKey:
    """Return the key of a provider."""
    if (file := config.api_key_file) is not None:
        return ChangingKey(config.name, _from_file(file), clock)
    if (command := config.api_key_command) is not None:
        return ChangingKey(config.name, _from_command(command, config.api_key_valid or math.inf), clock)
    return ConstantKey(config)


# -- files --------------------------------------------------------------------------------------------


def _from_file(file: Path) -> _Source:
    async def read() -> str:
        return await asyncio.to_thread(_read_file, file)  # a file server may hang

    return _Source(read, f"file {file}", fresh=_FILE_INTERVAL, valid=math.inf, patience=_FILE_PATIENCE, pause=0.0)


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        reason = f"its key file {file} cannot be read ({os.strerror(error.errno or 0)})"
        raise KeyUnreadableError(reason, "put the key there, readable for the worker's user") from None
    return _key_in(content, f"its key file {file} holds", "write the key into it, and nothing else")


# -- commands -----------------------------------------------------------------------------------------


def _from_command(command: tuple[str, ...], valid: float) -> _Source:
    async def read() -> str:
        return await _run(command)

    origin = f"command {Path(command[0]).name!r}"
    return _Source(read, origin, fresh=valid * _RENEWED_AT, valid=valid, patience=0.0, pause=_COMMAND_PAUSE)


async def _run(command: tuple[str, ...]) -> str:
    """Run a command to its end; return the key that it prints. Its standard error, which may hold one, is not read."""
    name = f"its key command {Path(command[0]).name!r}"
    advice = "run it as the worker's user, with the worker's environment, to see why"
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # so that whatever it starts ends with it
        )
    except OSError as error:
        reason = f"{name} cannot be run ({os.strerror(error.errno or 0)})"
        raise KeyUnreadableError(reason, "name a program that the worker's user may run, by its path") from None
    try:
        async with asyncio.timeout(_COMMAND_SECONDS):
            content = await _read_up_to(cast("asyncio.StreamReader", process.stdout), _MAX_KEY_BYTES + 1)
            status = await process.wait() if len(content) <= _MAX_KEY_BYTES else 0
    except TimeoutError:
        raise KeyUnreadableError(f"{name} did not end within {_COMMAND_SECONDS:g} s", advice) from None
    finally:
        if process.returncode is None:
            await _end(process)
    if status:
        how = f"exit code {status}" if status > 0 else f"signal {-status}"
        raise KeyUnreadableError(f"{name} failed ({how})", advice)
    return _key_in(content, f"{name} printed", "it must print the key and nothing else")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a command with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):  # something that has left its group may keep the pipe open
        async with asyncio.timeout(_END_SECONDS):
            # To asyncio, a process has not ended before its pipe has been read to the end.
            while await cast("asyncio.StreamReader", process.stdout).read(_MAX_KEY_BYTES):
                pass
            await process.wait()


async def _read_up_to(stream: asyncio.StreamReader, limit: int) -> bytes:
    content = b""
    while len(content) < limit and (data := await stream.read(limit - len(content))):
        content += data
    return content


def _key_in(content: bytes, what: str, advice: str) -> str:
    """Return the key in what was read.

    Raises:
        KeyUnreadableError: it is not a key; ``what`` says where it was read, and what it was is not said.
    """
    text = content.decode("ascii", errors="replace").strip() if len(content) <= _MAX_KEY_BYTES else " "
    if not text:
        raise KeyUnreadableError(f"{what} nothing", advice)
    if not fits_a_header(text) or len(text.split()) != 1 or text[0] in "{[<\"'":
        raise KeyUnreadableError(f"{what} something that is no key", advice)
    return text
