"""A balancer: one port that leads to several gateways, whichever of them live.

In: the ports behind it, which may change.
Out: connections, each forwarded to the next port that accepts it; the end of one side is the end of the other.
"""

import asyncio
from contextlib import suppress
from typing import Self

_PIECE = 65_536


class Balancer:
    """Listens while it is entered; runs on one event loop, and ``ports`` may be set from any thread."""

    def __init__(self) -> None:
        self.ports: tuple[int, ...] = ()  #: Of the gateways; one that refuses is passed over.
        self.port = 0
        self._turn = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await self._connect()
        if behind is None:
            writer.close()
            return
        ways = [asyncio.ensure_future(_forward(reader, behind[1])), asyncio.ensure_future(_forward(behind[0], writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, behind[1]):
                end.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        ports = self.ports
        self._turn += 1
        for place in range(len(ports)):
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", ports[(self._turn + place) % len(ports)])
        return None


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
