"""The scripted provider with a memory, and with streams that wait until they are told to go on.

In: a port; from tests, how far held streams may go.
Out: the same server, whose ``/_stats`` has a ``history`` of all attempts by key, so that tests can see what was asked
of the provider, when and for how long, whatever the database says.

A request with ``hold`` beside its script is a paced stream that stops after so many deltas, in each of its attempts,
until ``/_release`` lets its key go further: so a test meets it in its middle, however slow the machine.
"""

import argparse
import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import uvloop
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProvider
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.dev_stack.scripted_provider.connection import (
    Attempt,
    Connection,
    Playback,
    Request,
    send_json,
)
from tests.fork_server import ForkServer

_LOOK_EVERY: Final = 0.01  #: Seconds after which a held stream looks whether it may go on.


class ProviderAttempt(NamedTuple):
    """One request as the provider saw it; times are CLOCK_MONOTONIC in seconds."""

    started: float
    ended: float | None  #: None while it streams.
    client_closed: float | None  #: When the client hung up before the answer had ended.
    deltas: int


class RecordingProvider(ScriptedProvider):
    """A scripted provider that remembers all attempts, and holds streams."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None) -> None:
        super().__init__(host, port, api_key)
        self._history: dict[str, list[Attempt]] = defaultdict(list)
        self._released: dict[str, int | None] = {}  #: Up to which delta streams of a key may go; None: to their end.

    @property
    @override
    def stats(self) -> dict[str, Any]:
        history = {
            key: [
                [attempt.started_ns, attempt.ended_ns, attempt.client_closed_ns, attempt.deltas] for attempt in attempts
            ]
            for key, attempts in self._history.items()
        }
        return super().stats | {"history": history}

    @override
    def _respond(self, connection: Connection, request: Request) -> Playback:
        if request.path != "/_release":
            return super()._respond(connection, request)
        self._released |= request.json()
        return send_json(connection, HTTPStatus.OK, {})

    @override
    def _playback_for(self, connection: Connection, request: Request) -> Playback:
        playback = super()._playback_for(connection, request)
        body = request.json()
        key = body.get("script", {}).get("key")
        attempt = self._attempts.get(key)
        if attempt is not None and attempt not in self._history[key][-1:]:  # a limit may have refused it
            self._history[key].append(attempt)  # updated until the response ends
            if "hold" in body:
                return self._held(connection, playback, attempt, key, body["hold"])
        return playback

    def _held(self, connection: Connection, playback: Playback, attempt: Attempt, key: str, hold: int) -> Playback:
        for due in playback:
            yield due
            while (limit := self._released.get(key, hold)) is not None and attempt.deltas >= limit:
                yield connection.later(_LOOK_EVERY)


class RecordingProviderProcess(EmbeddedProvider):
    """The recording provider in a process of its own, forked off if there is a server for that."""

    def __init__(self, *, forks: ForkServer | None = None) -> None:
        super().__init__()
        self._forks = forks

    @override
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "tests.recording_provider", "--port", str(self.port)]

    @override
    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._forks is None:
            return super()._spawn()
        return self._forks.start("tests.recording_provider", ["--port", str(self.port)], dict(os.environ), self._log)

    def stats(self) -> dict[str, Any]:
        """What ``/_stats`` shows."""
        stats: dict[str, Any] = self._ask("GET", "/_stats")
        return stats

    def release(self, *keys: str, until: int | None = None) -> None:
        """Let held streams go on, up to a delta or to their end."""
        self._ask("POST", "/_release", json.dumps(dict.fromkeys(keys, until)))

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def history(self) -> dict[str, list[ProviderAttempt]]:
        """All attempts by key, in the order in which they began."""
        return {
            key: [
                ProviderAttempt(started / 1e9, ended and ended / 1e9, closed and closed / 1e9, deltas)
                for started, ended, closed, deltas in attempts
            ]
            for key, attempts in self.stats()["history"].items()
        }

    def attempts(self, key: str) -> list[ProviderAttempt]:
        """All attempts for one key."""
        return self.history().get(key, [])


async def _serve(port: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with RecordingProvider(port=port):
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(parser.parse_args().port))
