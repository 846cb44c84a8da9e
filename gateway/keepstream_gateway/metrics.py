"""Metrics: what a gateway counts, in Prometheus' text.

In: requests that were answered, streams that open and end.  Out: `/metrics`.  No label names a tenant, a key or a job.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counters of one gateway process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._registry = registry
        self._requests = Counter(
            "keepstream_gateway_requests",
            "Requests that were answered.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "keepstream_gateway_head_seconds",
            "Seconds from a request to the head of its answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._followers = Gauge("keepstream_gateway_followers", "Streams that are open.", registry=registry)
        self._ended = Counter(
            "keepstream_gateway_streams_ended",
            "Streams that have ended: finished, left, given_up, failed or stopped.",
            ("how",),
            registry=registry,
        )
        self._refused = Counter(
            "keepstream_gateway_followers_refused", "Streams that were one too many.", registry=registry
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """The head of an answer was sent, so long after the request."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def followers(self, number: int) -> None:
        """So many streams are open now."""
        self._followers.set(number)

    def stream_ended(self, how: str) -> None:
        """A stream has ended."""
        self._ended.labels(how).inc()

    def refused(self) -> None:
        """A stream was refused, because there are too many."""
        self._refused.inc()

    def routes(self) -> list[Route]:
        """Return the address under which they are read."""

        async def metrics(_request: Request) -> Response:
            return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

        return [Route("/metrics", metrics)]
