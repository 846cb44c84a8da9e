"""A provider of very large answers: an image, a long sound, many logprobs, long reasoning with a signature at its end.

In: requests of a worker, whose ``model`` names the kind of answer.
Out: streams as the providers of such answers send them, and what is to be stored of each.
"""

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

IMAGE_BYTES: Final = 12_000_000
AUDIO_SECONDS: Final = 600
TOKENS: Final = 20_000
CHUNKS: Final = 50_000
SIGNATURE: Final = "EqQBCkYIARgCKkDx/+=="
KINDS: Final = ("image", "audio", "logprobs", "reasoning")

_WRITE: Final = 256 * 1024  #: Bytes; what is sent at once.
_SECOND: Final = 48_000  #: Bytes of a second of sound: 24,000 samples of 16 bits.
_PIECE: Final = 4_801  #: Bytes of one piece of it, which leaves padding at its end.


@cache
def image_url() -> str:
    """The image."""
    return "data:image/png;base64," + base64.b64encode(bytes(range(250)) * (IMAGE_BYTES // 250)).decode()


@cache
def sound() -> bytes:
    """The sound."""
    return bytes(range(240)) * (AUDIO_SECONDS * _SECOND // 240)


def token(number: int) -> dict[str, Any]:
    """The logprobs of one token."""
    others = [
        {"token": f" t{number + other}", "logprob": -0.125 - other, "bytes": [32, 116, 48 + other]}
        for other in range(20)
    ]
    return {**others[0], "top_logprobs": others}


def expected_extra(kind: str) -> dict[str, Any]:
    """What is to be stored beside the text."""
    match kind:
        case "image":
            return {"images": [{"type": "image_url", "image_url": {"url": image_url()}}]}
        case "audio":
            return {"audio": {"id": "audio_1", "data": base64.b64encode(sound()).decode(), "transcript": "la " * 600}}
        case "logprobs":
            return {"logprobs": {"content": [token(number) for number in range(TOKENS)]}}
        case _:
            block = {"type": "thinking", "thinking": "word " * CHUNKS, "signature": SIGNATURE}
            return {"reasoning_fields": ["reasoning_content"], "thinking_blocks": [block]}


def _choices(kind: str) -> Iterator[dict[str, Any]]:
    match kind:
        case "image":
            yield {"delta": {"role": "assistant", "content": "Here it is."}}
            images = [{"type": "image_url", "image_url": {"url": image_url()}}]
            yield {"delta": {"images": images}}
            yield {"delta": {}, "message": {"role": "assistant", "content": "Here it is.", "images": images}}
        case "audio":
            yield {"delta": {"role": "assistant", "audio": {"id": "audio_1", "transcript": ""}}}
            for start in range(0, len(sound()), _PIECE):
                yield {"delta": {"audio": {"data": base64.b64encode(sound()[start : start + _PIECE]).decode()}}}
            for _ in range(AUDIO_SECONDS):
                yield {"delta": {"audio": {"transcript": "la "}}}
        case "logprobs":
            for number in range(TOKENS):
                yield {"delta": {"content": f" t{number}"}, "logprobs": {"content": [token(number)]}}
        case "reasoning":
            for _ in range(CHUNKS):
                block = {"type": "thinking", "thinking": "word ", "signature": ""}
                yield {"delta": {"reasoning_content": "word ", "thinking_blocks": [block]}}
            block = {"type": "thinking", "thinking": "", "signature": SIGNATURE}
            yield {"delta": {"reasoning_content": "", "thinking_blocks": [block]}}
            yield {"delta": {"content": "Done."}}
    yield {"delta": {}, "finish_reason": "stop"}


def _body(kind: str) -> Iterator[bytes]:
    held = bytearray()
    for choice in _choices(kind):
        chunk = {"id": "cc-1", "model": kind, "choices": [{"index": 0, **choice}]}
        held += f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()
        if len(held) >= _WRITE:
            yield bytes(held)
            held.clear()
    yield bytes(held) + b"data: [DONE]\n\n"


class LargeAnswers:
    """The server, in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self.url = ""
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="large-answers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._answer)])
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        kind = (await request.json())["model"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for data in _body(kind):
            await response.write(data)
        return response
