"""The clients of all tenants: one family, with the connections of one.

In: the settings; a tenant's name.  Out: its ``AsyncClient``; whether Redis answers.
"""

import asyncio

from keepstream import AsyncClient
from keepstream.client.redis import RedisConnections
from keepstream.errors import KeepstreamError
from keepstream_gateway.settings import Settings


class Clients:
    """The clients of a gateway; ``close`` closes them all.

    Raises:
        InvalidSettingError: a URL cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._first = AsyncClient(
            settings.redis_url,
            broker_url=settings.broker_url,
            database_url=settings.database_url,
            prefix=settings.prefix,
            queue=settings.queue,
        )
        self._redis = RedisConnections(settings.redis_url, lambda: None)

    def of(self, tenant: str) -> AsyncClient:
        """Return the client for a tenant's jobs; it costs next to nothing."""
        return self._first.for_tenant(tenant)

    async def redis_answers(self) -> bool:
        """Whether Redis answers now."""
        try:
            await asyncio.to_thread(self._redis.ping)
        except KeepstreamError:
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        await self._first.close()
        self._redis.close()
