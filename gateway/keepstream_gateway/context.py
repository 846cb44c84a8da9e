"""The context: what the rooms of a gateway share.

In: the settings.  Out: one value with the clients, the gatekeeper, the streams and the metrics, to the rooms, which
share nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from keepstream_gateway.access.gatekeeper import Gatekeeper
from keepstream_gateway.access.keyring import Keyring
from keepstream_gateway.clients import Clients
from keepstream_gateway.metrics import Metrics
from keepstream_gateway.settings import Settings
from keepstream_gateway.streaming import Streams


@dataclass(frozen=True)
class Context:
    """What a room needs to answer."""

    settings: Settings
    clients: Clients
    keyring: Keyring
    gatekeeper: Gatekeeper
    streams: Streams
    metrics: Metrics
    at_the_end: list[Callable[[], None]] = field(default_factory=list)  #: What closes what a room holds open.


def make_context(settings: Settings) -> Context:
    """Return the context of a gateway; nothing is connected yet.

    Raises:
        InvalidSettingError: a URL cannot be used.
    """
    metrics = Metrics()
    keyring = Keyring(settings.database_url, settings.key_cache)
    secret = settings.token_secret.get_secret_value() if settings.token_secret else ""
    return Context(
        settings=settings,
        clients=Clients(settings),
        keyring=keyring,
        gatekeeper=Gatekeeper(keyring, secret),
        streams=Streams(settings, metrics, keyring.knows),
        metrics=metrics,
    )
