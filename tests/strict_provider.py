"""Strict providers: each gives an answer with a tool call, and refuses a second turn that does not give back its own.

In: requests of a worker, at ``http://…/<style>/v1``.
Out: the first turn's stream; for the second one a text, or a 400 if the assistant's message is not exactly what this
style of provider wants; what was refused, to the tests.

The messages that are wanted are written by hand after what these providers document, not made by our own code.
"""

import asyncio
import json
import threading
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

QUESTION: Final = {"role": "user", "content": "Weather?"}
ANSWER: Final = "It rains."
ARGUMENTS: Final = '{"city":"Zürich"}'
_CALL: Final = {"id": "call_7", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
_THOUGHTS: Final = ("I need ", "the weather", ".")
_REASONING: Final = "".join(_THOUGHTS)
_SIGNATURE: Final = "EqQBCkYIARgCKkDx/+=="
_ENCRYPTED: Final = "gAAAAABo" + "x" * 400


def _fragments(**extra: Any) -> list[dict[str, Any]]:
    """The tool call, in pieces."""
    begin = {"index": 0, "id": "call_7", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city"', ':"Zürich"}')]
    return [{"tool_calls": [part]} for part in ({**begin, **extra}, *pieces)]


def _claude(words: str, signature: str = "") -> dict[str, Any]:
    """A delta of LiteLLM's proxy for Claude, which shows the same blocks in two places."""
    blocks = [{"type": "thinking", "thinking": words, "signature": signature}]
    return {
        "reasoning_content": words,
        "thinking_blocks": blocks,
        "provider_specific_fields": {"thinking_blocks": blocks},
    }


def _detail(words: str | None, signature: str | None = None) -> dict[str, Any]:
    """A delta of OpenRouter with a piece of reasoning."""
    piece = {
        "type": "reasoning.text",
        "text": words,
        "signature": signature,
        "format": "anthropic-claude-v1",
        "index": 0,
    }
    return {"role": "assistant", "content": "", "reasoning": words, "reasoning_details": [piece]}


_ENCRYPTED_DETAIL: Final = {
    "type": "reasoning.encrypted",
    "data": _ENCRYPTED,
    "id": "rs_1",
    "format": "openai-responses-v1",
    "index": 1,
}
_GOOGLE: Final = {"extra_content": {"google": {"thought_signature": _SIGNATURE}}}

#: By style: the deltas of the first turn.
_DELTAS: Final[dict[str, list[dict[str, Any]]]] = {
    "plain": [{"role": "assistant", "content": "Let me "}, {"content": "look."}, *_fragments()],
    "deepseek": [
        {"role": "assistant", "content": None, "reasoning_content": ""},
        *({"content": None, "reasoning_content": words} for words in _THOUGHTS),
        *_fragments(),
    ],
    "openrouter": [
        *(_detail(words) for words in _THOUGHTS),
        _detail(None, _SIGNATURE),
        {"content": "", "reasoning_details": [_ENCRYPTED_DETAIL]},
        *_fragments(),
    ],
    "gemini": _fragments(**_GOOGLE),
    "claude": [*(_claude(words) for words in _THOUGHTS), _claude("", _SIGNATURE), *_fragments()],
}
_BLOCK: Final = {"type": "thinking", "thinking": _REASONING, "signature": _SIGNATURE}
#: By style: the assistant's message of the second turn.
WANTED: Final[dict[str, dict[str, Any]]] = {
    "plain": {"role": "assistant", "content": "Let me look.", "tool_calls": [_CALL]},
    "deepseek": {"role": "assistant", "content": None, "reasoning_content": _REASONING, "tool_calls": [_CALL]},
    "openrouter": {
        "role": "assistant",
        "content": None,
        "reasoning": _REASONING,
        "reasoning_details": [
            {
                "type": "reasoning.text",
                "text": _REASONING,
                "signature": _SIGNATURE,
                "format": "anthropic-claude-v1",
                "index": 0,
            },
            _ENCRYPTED_DETAIL,
        ],
        "tool_calls": [_CALL],
    },
    "gemini": {"role": "assistant", "content": None, "tool_calls": [{**_CALL, **_GOOGLE}]},
    "claude": {
        "role": "assistant",
        "content": None,
        "reasoning_content": _REASONING,
        "thinking_blocks": [_BLOCK],
        "tool_calls": [_CALL],
    },
}
RESPONSES: Final = "responses"
STYLES: Final = (*WANTED, RESPONSES)

_REASONING_ITEM: Final = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": _ENCRYPTED}
_CALL_ITEM: Final = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_7",
    "name": "get_weather",
    "arguments": ARGUMENTS,
    "status": "completed",
}
#: What may follow the question in the second turn; nothing was stored, so ids of calls mean nothing there.
_WANTED_ITEMS: Final = [
    _REASONING_ITEM,
    {name: value for name, value in _CALL_ITEM.items() if name not in {"id", "status"}},
    {"type": "function_call_output", "call_id": "call_7", "output": "Rain."},
]


class StrictProvider:
    """The server, in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self.refused: list[Any] = []  #: Assistant's messages, or items, that were not what is wanted.
        self.url = ""
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="strict-provider", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def providers_toml(self) -> str:
        """Return a providers file that names each style."""
        return "".join(
            f'[providers.{style}]\nbase_url = "{self.url}/{style}/v1"\napi = "{_api(style)}"\n' for style in STYLES
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.add_routes(
            [
                web.post("/{style}/v1/chat/completions", self._chat),
                web.post(f"/{RESPONSES}/v1/responses", self._responses),
            ]
        )
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        style = request.match_info["style"]
        question, *rest = (await request.json())["messages"]
        assert question == QUESTION
        if not rest:
            chunks = [_chunk(delta) for delta in _DELTAS[style]]
            return await _stream(request, [*chunks, _chunk({}, "tool_calls")])
        answer, *results = rest
        if answer != WANTED[style] or results != [{"role": "tool", "tool_call_id": "call_7", "content": "Rain."}]:
            return self._refuse(answer)
        return await _stream(request, [_chunk({"content": ANSWER}), _chunk({}, "stop")])

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["store"] is False
        assert body["include"] == ["reasoning.encrypted_content"]
        _, *rest = body["input"]
        if not rest:
            done = [_REASONING_ITEM, _CALL_ITEM]
            begun = _REASONING_ITEM | {"encrypted_content": "g"}  # not whole yet
            events: list[dict[str, Any]] = [
                {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}},
                {"type": "response.output_item.added", "output_index": 0, "item": begun},
                {"type": "response.output_item.done", "output_index": 0, "item": _REASONING_ITEM},
                {"type": "response.output_item.added", "output_index": 1, "item": _CALL_ITEM | {"arguments": ""}},
                {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": ARGUMENTS},
                {"type": "response.output_item.done", "output_index": 1, "item": _CALL_ITEM},
                {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": done}},
            ]
        elif rest == _WANTED_ITEMS:
            events = [
                {"type": "response.output_text.delta", "output_index": 0, "delta": ANSWER},
                {"type": "response.completed", "response": {"id": "resp_2", "status": "completed"}},
            ]
        else:
            return self._refuse(rest)
        return await _stream(request, events)

    def _refuse(self, given: Any) -> web.Response:
        self.refused.append(given)
        error = {"message": "The reasoning of the last turn must be passed back.", "type": "invalid_request_error"}
        return web.json_response({"error": error}, status=400)


def _api(style: str) -> str:
    return "responses" if style == RESPONSES else "chat"


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "cc-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1-real", "choices": [choice]}


async def _stream(request: web.Request, events: list[dict[str, Any]]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response
