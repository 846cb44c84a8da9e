"""Streams: server-sent events to readers that may be slow, gone or many.

In: frames, as bytes, from a room; when the gateway stops.  Out: responses, one for each reader.

All protocols share what is written here.  What goes wrong before the first frame becomes a status of HTTP: the head is
sent with that frame, or after a moment of silence.  Silence is broken by comments, for proxies' sake.  A reader that
reads nothing for long is given up, and harms nobody but itself: no more waits for it than one connection buffers.  When
the gateway stops, each stream ends as its protocol allows, and its reader goes on elsewhere.  So do those of a key that
is revoked; their readers do not get in again.

One task looks after the time of all streams; a stream costs no timer of its own.  A frame that comes while its reader
waits can take a shortcut to the connection: no task is woken for it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keepstream_gateway.access.rights import Access
from keepstream_gateway.errors import ApiError, api_error
from keepstream_gateway.logs import get_logger
from keepstream_gateway.settings import Settings

log = get_logger()

Frames = AsyncGenerator[bytes]
#: What to send when a stream ends before its frames do: because of an error, or (None) because the gateway stops. None:
#: nothing, and the connection is broken off, where a clean end would be taken for the answer's.
Farewell = Callable[[Exception | None], bytes | None]

#: What the server puts into a request's ``extensions``: a call that ends its connection and drops what is not sent.
ABORT: Final = "keepstream.abort"
#: And one that writes a part of the response's body at once, and returns whether it could: not while the connection
#: takes no more. For thousands of streams, ``send`` and what is wrapped around it cost as much as all the rest.
WRITE: Final = "keepstream.write"
PING: Final = b": ping\n\n"
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold the frames back
}
HEAD_WAIT: Final = 0.5  #: Seconds for which the head waits for the first frame, or an error.
_TICK: Final = 0.5  #: Seconds between two looks at all streams.
_KEYS_TICK: Final = 1.0  #: Seconds between two looks at their keys, which are remembered for longer.
_LAST_WORDS: Final = 1.0  #: Seconds for which the end of a stream may wait for its reader.


class Watcher(Protocol):
    """Is told how many streams there are and how they end; ``metrics`` counts it."""

    def followers(self, number: int) -> None:
        """So many are open now."""

    def stream_ended(self, how: str) -> None:
        """One has ended: finished, left, given_up, failed or stopped."""

    def refused(self) -> None:
        """One was refused, because there are too many."""


class Shortcut:
    """The way to a stream's connection, for a frame that is made while the stream waits for its next one."""

    def __init__(self) -> None:
        #: Writes a frame, and returns whether it could; if not, the stream is to get it as its next one.
        self.write: Callable[[bytes], bool] = lambda _frame: False  # until the first frame is sent


class Streams:
    """All streams of a gateway.

    Args:
        settings: The gateway's.
        watcher: Is told what happens.
        is_known: Tells whether an API key, by its id, has not been revoked.
    """

    def __init__(self, settings: Settings, watcher: Watcher, is_known: Callable[[str], Awaitable[bool]]) -> None:
        self._settings = settings
        self._watcher = watcher
        self._is_known = is_known
        self._open: set[EventStream] = set()
        self._places: Counter[str] = Counter()  #: Taken, by API key.
        self._taken = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.stopping = False

    async def answer(
        self,
        access: Access,
        frames: Frames,
        *,
        farewell: Farewell,
        comment: Callable[[], bytes] = lambda: PING,
        headers: Mapping[str, str] | None = None,
        shortcut: Shortcut | None = None,
    ) -> Response:
        """Return the response that sends ``frames``; 204 if they end without any.

        Args:
            access: Whose stream it is; it counts as one of its key's.
            frames: Whole server-sent events; it is closed here, in any case.
            farewell: What to send if they do not come to their end.
            comment: Returns what breaks a silence.
            headers: Further ones.
            shortcut: Will lead to this stream.

        Raises:
            ApiError: there are too many streams, or the gateway stops.
            Exception: what ``frames`` raised before the first.
        """
        place = self._take_place(access.key_id)
        first: asyncio.Future[bytes | None] = asyncio.ensure_future(anext(frames, None))
        try:
            await asyncio.wait([first], timeout=HEAD_WAIT)
            if first.done() and first.result() is None:
                place()
                await frames.aclose()
                return Response(status_code=204)
        except BaseException:
            place()
            await _drop(first, frames)
            raise
        all_headers = {**HEADERS, **(headers or {})}
        return EventStream(
            self, access.key_id, first, frames, farewell, comment, all_headers, shortcut or Shortcut(), place
        )

    @contextmanager
    def place(self, access: Access) -> Iterator[None]:
        """Count as a stream a request that waits for its answer, which may take as long and costs as much.

        Raises:
            ApiError: as ``answer`` does.
        """
        give_back = self._take_place(access.key_id)
        try:
            yield
        finally:
            give_back()

    def start(self) -> None:
        """Begin to look after the streams' time and keys."""
        looks = {"streams": self._look_after(), "keys": self._look_after_keys()}
        self._tasks = [asyncio.create_task(look, name=name) for name, look in looks.items()]

    async def stop(self) -> None:
        """Refuse new streams, end all others, and wait until they have ended, which takes a second or two."""
        self.stopping = True
        for stream in list(self._open):
            stream.stop()
        while self._open:
            await asyncio.wait([asyncio.ensure_future(stream.ended.wait()) for stream in self._open])
        for task in self._tasks:
            task.cancel()

    def opened(self, stream: "EventStream") -> None:
        """Called by a stream whose head is sent."""
        self._open.add(stream)
        if self.stopping:
            stream.stop()

    def closed(self, stream: "EventStream", how: str) -> None:
        """Called by a stream that has ended."""
        self._open.discard(stream)
        self._watcher.stream_ended(how)

    def _take_place(self, key_id: str) -> Callable[[], None]:
        """Count one more stream of a key; return what gives its place back, however often it is called."""
        if self.stopping:
            raise ApiError(503, "this gateway is stopping; another one goes on", "stopping", retry_after=1)
        most = {"gateway": self._settings.max_followers, "key": self._settings.max_followers_per_key}
        for whose, taken in (("gateway", self._taken), ("key", self._places[key_id])):
            if taken >= most[whose]:
                self._watcher.refused()
                message = f"too many streams are open: this {whose} may have {most[whose]} at once"
                raise ApiError(429, message, "too_many_followers", retry_after=5)
        self._taken += 1
        self._places[key_id] += 1
        self._watcher.followers(self._taken)
        is_taken = True

        def give_back() -> None:
            nonlocal is_taken
            if is_taken:
                is_taken = False
                self._taken -= 1
                self._places[key_id] -= 1
                if not self._places[key_id]:
                    del self._places[key_id]
                self._watcher.followers(self._taken)

        return give_back

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            for stream in list(self._open):
                stream.look(now, self._settings.ping, self._settings.drain_timeout)

    async def _look_after_keys(self) -> None:
        while True:
            await asyncio.sleep(_KEYS_TICK)
            for key_id in {stream.key_id for stream in self._open}:
                try:
                    is_known = await self._is_known(key_id)
                except Exception as error:  # what is open goes on while nobody can tell
                    if api_error(error) is None:
                        log.exception("key_check_failed")
                    continue
                for stream in () if is_known else [each for each in self._open if each.key_id == key_id]:
                    stream.stop()


class EventStream(Response):
    """One stream to one reader: a response that ``Streams.answer`` makes."""

    def __init__(
        self,
        streams: Streams,
        key_id: str,
        first: asyncio.Future[bytes | None],
        frames: Frames,
        farewell: Farewell,
        comment: Callable[[], bytes],
        headers: Mapping[str, str],
        shortcut: Shortcut,
        give_place_back: Callable[[], None],
    ) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]  # nobody knows it
        self.ended = asyncio.Event()
        self.key_id = key_id
        self._streams = streams
        self._first = first
        self._frames = frames
        self._farewell = farewell
        self._comment = comment
        self._shortcut = shortcut
        self._give_place_back = give_place_back
        self._send: Send
        self._write_at_once: Callable[[bytes], bool]
        self._pump: asyncio.Task[None]
        self._how: str | None = None  #: It ends, if it is not by itself.
        self._sent_at = 0.0
        self._sending_since: float | None = None
        self._pinging: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the frames until they, the reader or the gateway end."""
        self._send = send
        extensions = scope.get("extensions", {})
        abort: Callable[[], None] = extensions.get(ABORT, lambda: None)
        self._write_at_once = extensions.get(WRITE, lambda _frame: False)
        gone = asyncio.ensure_future(_disconnected(receive))
        how, error = "left", None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            self._pump = asyncio.ensure_future(self._send_frames())
            self._sent_at = time.monotonic()
            self._streams.opened(self)
            await asyncio.wait([self._pump, gone], return_when=asyncio.FIRST_COMPLETED)
            how, error = self._outcome()
            ends_cleanly = how == "finished" or (how in {"failed", "stopped"} and await self._say_farewell(error))
            if not ends_cleanly and how != "left":
                abort()
                await asyncio.wait([gone], timeout=_LAST_WORDS)  # the server takes notice of it
        finally:
            try:
                await self._release(gone)
            finally:  # also if the request is cancelled meanwhile: who stops the gateway waits for it
                self._streams.closed(self, how)
                self.ended.set()

    def look(self, now: float, ping: float, patience: float) -> None:
        """Give up a reader that reads nothing for ``patience`` seconds; break a silence of ``ping`` seconds."""
        if self._pump.done() or self._how is not None:
            return  # it ends
        if self._sending_since is not None:
            if now - self._sending_since > patience:
                self._end("given_up")
        elif now - self._sent_at > ping:
            comment = self._comment()
            if not self._write(comment):
                self._pinging = asyncio.ensure_future(self._send_frame(comment))

    def stop(self) -> None:
        """End the stream, because the gateway stops, or its key does not count any more."""
        self._end("stopped")

    def _end(self, how: str) -> None:
        self._how = self._how or how
        self._pump.cancel()

    def _outcome(self) -> tuple[str, Exception | None]:
        """Return how the frames have ended, and what broke them."""
        if not self._pump.done() or self._pump.cancelled():
            return self._how or "left", None
        error = self._pump.exception()
        if error is None:
            return "finished", None
        assert isinstance(error, Exception)
        if api_error(error) is None:
            log.error("stream_failed", error=error)
        else:
            log.warning("stream_broken", reason=str(error))
        return "failed", error

    async def _send_frames(self) -> None:
        frame = await self._first
        while frame is not None:
            if not self._write(frame):
                await self._send_frame(frame)
            self._shortcut.write = self._write
            frame = await anext(self._frames, None)
        await self._send({"type": "http.response.body", "body": b""})

    def _write(self, frame: bytes) -> bool:
        """Send a frame at once, if the connection takes it."""
        self._sent_at = time.monotonic()
        return self._write_at_once(frame)

    async def _send_frame(self, frame: bytes) -> None:
        """Send a frame as soon as the connection takes it."""
        self._sending_since = self._sent_at = time.monotonic()
        try:
            await self._send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            self._sending_since = None

    async def _say_farewell(self, error: Exception | None) -> bool:
        """Send the last words; return whether the stream has ended cleanly."""
        words = self._farewell(error)
        if words is None:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await self._send({"type": "http.response.body", "body": words})
                return True
        return False

    async def _release(self, gone: asyncio.Future[None]) -> None:
        """Let go of everything."""
        self._give_place_back()
        gone.cancel()
        for task in (getattr(self, "_pump", None), self._pinging):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await _drop(self._first, self._frames)


async def _disconnected(receive: Receive) -> None:
    """Return when the reader has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(first: "asyncio.Future[bytes | None]", frames: Frames) -> None:
    """Close frames that nobody wants any more."""
    first.cancel()
    await asyncio.wait([first])
    if not first.cancelled():
        first.exception()  # seen
    with suppress(Exception):  # what breaks an end nobody waits for changes nothing
        await frames.aclose()
