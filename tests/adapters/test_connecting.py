"""How many connections to a provider are opened at the same time."""

import asyncio
import ssl

import pytest
from yarl import URL

from keepstream_worker.providers.http import Head, HttpTransport, ProviderFailure

AT_ONCE = 64
REQUESTS = 100


async def test_many_requests_open_a_bounded_number_of_connections_at_the_same_time() -> None:
    opened: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await opened.put(writer)  # and nothing is said: the handshake goes on until it is closed

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=REQUESTS)
    port = server.sockets[0].getsockname()[1]
    transport = HttpTransport(tls=ssl.create_default_context())
    head = Head("POST", URL(f"https://127.0.0.1:{port}/"), [])
    requests = [asyncio.create_task(transport.send(head, b"{}", connect_timeout=60.0)) for _ in range(REQUESTS)]
    async with asyncio.timeout(60):
        shaking = [await opened.get() for _ in range(AT_ONCE)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opened.get(), 0.5)
        for _ in range(REQUESTS - AT_ONCE):  # each that ends makes room for one
            shaking.pop().close()
            shaking.append(await opened.get())
        for writer in shaking:
            writer.close()
        answers = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(answer, ProviderFailure) for answer in answers)
    await transport.aclose()
    server.close()
    await server.wait_closed()
