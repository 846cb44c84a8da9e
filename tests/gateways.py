"""Gateways for the tests, and how the tests call them.

In: a cluster. Out: gateway processes, API keys, and callers with a key.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import httpx2
from typing_extensions import override

from keepstream.client import api_keys
from keepstream.events import Event, parse_event
from keepstream.names import Right
from keepstream.transcript import Transcript
from tests.cluster import PATIENCE, Cluster, WorkerProcess
from tests.http_streams import HttpStream

_NUMBERS: Final = itertools.count(1)


class GatewayProcess(WorkerProcess):
    """One gateway on a free port."""

    module: ClassVar[str] = "keepstream_gateway"
    started: ClassVar[str] = "gateway_started"

    @property
    @override
    def id(self) -> str:
        """Where it listens."""
        return str(self.port)

    @property
    def port(self) -> int:
        """Its port; another one after each start."""
        return int(self.said(self.started)[-1]["port"])


def start_gateway(cluster: Cluster, **settings: Any) -> GatewayProcess:
    """Start a gateway, which ends with the cluster; ``settings`` are its own."""
    own = {f"gateway_{name}": value for name, value in {"port": 0, "key_cache": 0.5, **settings}.items()}
    log = cluster.directory / f"gateway-{next(_NUMBERS)}.log"
    gateway = GatewayProcess(cluster.environment(**own), log, cluster.forks)
    cluster.gateways.append(gateway)
    gateway.start()
    return gateway


def make_key(cluster: Cluster, tenant: str = "default", *rights: Right) -> str:
    """Make an API key."""
    with cluster.database() as connection:
        return api_keys.create(connection, tenant, "test", frozenset(rights or (Right.API,)))[1]


@contextmanager
def caller(gateway: GatewayProcess, key: str) -> Iterator[httpx2.Client]:
    """Give a caller with an API key."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{gateway.port}", headers=headers, timeout=PATIENCE) as client:
        yield client


class Reader:
    """Follows a job as an EventSource does: with the id of the last event it got, at one gateway or another."""

    def __init__(self, job_id: str, key: str) -> None:
        self.job_id = job_id
        self._key = key
        self.last_id: str | None = None
        self.events: list[Event] = []
        self.transcript = Transcript()

    def open(self, gateway: GatewayProcess) -> HttpStream:
        """Connect to a gateway."""
        headers = {"Authorization": f"Bearer {self._key}"}
        if self.last_id is not None:
            headers["Last-Event-ID"] = self.last_id
        return HttpStream(gateway.port, f"/api/jobs/{self.job_id}/events", headers)

    def take(self, stream: HttpStream, most: int = 1_000_000) -> bool:
        """Take so many events from a stream, or all to its end; return whether that was clean."""
        while most:
            frame = stream.read_frame()
            if frame is None:
                return stream.ended_cleanly
            if self._apply(frame):
                most -= 1
        return True

    def follow(self, gateway: GatewayProcess, most: int = 1_000_000) -> bool:
        """Connect, take so many events, and leave."""
        with self.open(gateway) as stream:
            assert stream.response.status == 200, stream.response.read()
            return self.take(stream, most)

    @property
    def has_the_end(self) -> bool:
        """Whether the terminal event has come."""
        return bool(self.events) and self.events[-1].type.startswith("job.")

    def _apply(self, frame: bytes) -> bool:
        fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if not line.startswith(":"))
        if "data" not in fields:
            return False
        event = parse_event(fields["data"])
        assert fields["id"] == event.id
        self.last_id = event.id
        self.events.append(event)
        self.transcript.apply(event)
        return True


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """Return the error in an answer, which must have OpenAI's shape."""
    body = json.loads(response.text)
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error
