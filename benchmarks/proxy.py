"""A slow network: a TCP proxy that delays what the server sends.

In: connections, and ``--to PORT``, ``--delay SECONDS``.
Out: the same bytes, delayed; one JSON line with the ``port`` it listens on.

It gives a worker a slow Redis, or, once the proxy is stopped, one that is gone.
"""

import argparse
import asyncio
import json

import uvloop

_READ_BYTES = 65_536


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    loop = asyncio.get_running_loop()
    while data := await reader.read(_READ_BYTES):
        loop.call_later(delay, writer.write, data)  # delayed, not throttled: later bytes do not wait twice
    loop.call_later(delay, writer.close)


async def _main(port: int, delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pump(reader, server_writer, 0.0), _pump(server_reader, writer, delay))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(json.dumps({"event": "ready", "port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy")
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--delay", type=float, required=True)
    arguments = parser.parse_args()
    uvloop.run(_main(arguments.to, arguments.delay))
