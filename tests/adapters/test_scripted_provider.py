import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider

PROMPT: list[Any] = [{"role": "user", "content": "What is a keepstream?"}]
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture
async def client(scripted_provider: ScriptedProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=scripted_provider.base_url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(scripted_provider: ScriptedProvider) -> AsyncIterator[httpx2.AsyncClient]:
    base_url = scripted_provider.base_url.removesuffix("/v1")
    async with httpx2.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as http:
        yield http


async def collect(
    client: openai.AsyncOpenAI, script: dict[str, Any] | None, **request: Any
) -> list[ChatCompletionChunk]:
    body = {} if script is None else {"script": script}
    stream = await client.chat.completions.create(model="m", messages=PROMPT, stream=True, extra_body=body, **request)
    async with stream:
        return [chunk async for chunk in stream]


def content(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk.choices if c.index == choice]
    return "".join(c.delta.content or "" for c in choices)


def arguments(chunks: list[ChatCompletionChunk], choice: int = 0) -> list[str]:
    calls: dict[int, str] = {}
    for c in (c for chunk in chunks for c in chunk.choices if c.index == choice):
        for call in c.delta.tool_calls or ():
            assert call.function is not None
            calls[call.index] = calls.get(call.index, "") + (call.function.arguments or "")
    return [calls[index] for index in sorted(calls)]


def finish_reasons(chunks: list[ChatCompletionChunk]) -> list[str]:
    return [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]


async def post(http: httpx2.AsyncClient, script: dict[str, Any], **request: Any) -> bytes:
    """Return the body of a stream; raise if the connection breaks."""
    body = {"model": "m", "messages": PROMPT, "stream": True, "script": script, **request}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        return b"".join([part async for part in response.aiter_raw()])


async def client_closed(http: httpx2.AsyncClient, key: str) -> dict[str, Any]:
    """Wait until the client of a key's last attempt has closed its connection, and return the attempt."""
    async with asyncio.timeout(60):
        while True:
            attempt: dict[str, Any] = (await http.get("/_stats")).json()["keys"][key]
            if attempt["client_closed_ns"] is not None:
                return attempt


# Without a script


async def test_without_a_script_it_streams_a_friendly_text_that_is_not_all_ascii(client: openai.AsyncOpenAI) -> None:
    chunks = await collect(client, None)
    assert content(chunks).startswith("Hello!")
    assert "🌊" in content(chunks)
    assert finish_reasons(chunks) == ["stop"]


async def test_a_request_with_tools_gets_a_call_of_the_first_tool_that_fits_its_schema(
    client: openai.AsyncOpenAI,
) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": ["integer", "null"]},
            "unit": {"enum": ["celsius", "kelvin"]},
            "place": {"$ref": "#/$defs/place"},
        },
        "$defs": {"place": {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "null"}]}}},
    }
    tools: Any = [{"type": "function", "function": {"name": "forecast", "parameters": parameters}}]
    chunks = await collect(client, None, tools=tools)
    assert content(chunks)
    (text,) = arguments(chunks)
    assert json.loads(text) == {"city": "Zürich 🌊", "days": 1, "unit": "celsius", "place": [1.5]}
    assert finish_reasons(chunks) == ["tool_calls"]


async def test_the_result_of_a_tool_is_answered_with_text_alone(http: httpx2.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "forecast"}}]
    messages = [*PROMPT, {"role": "tool", "content": "rain", "tool_call_id": "c"}]
    response = await http.post("/v1/chat/completions", json={"messages": messages, "tools": tools})
    assert response.json()["choices"][0]["finish_reason"] == "stop"


async def test_a_request_that_does_not_stream_gets_the_same_answer_whole(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="m",
        messages=PROMPT,
        n=2,
        extra_body={"script": {"text": "Wasser läuft", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}},
    )
    assert [choice.message.content for choice in completion.choices] == ["Wasser läuft"] * 2
    message = completion.choices[0].message.model_dump()
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"a":1}']
    assert completion.usage is not None


async def test_models_can_be_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["scripted-1"]


async def test_paths_of_azure_deployments_work(http: httpx2.AsyncClient) -> None:
    path = "/openai/deployments/d/chat/completions?api-version=2024-10-21"
    response = await http.post(path, json={"messages": PROMPT, "script": {"text": "x"}})
    assert response.json()["choices"][0]["message"]["content"] == "x"


# What a script can ask for


@pytest.mark.parametrize("cut", [{}, {"words": 3}, {"delta_chars": 1}, {"delta_chars": 7, "chunk_size": 3}])
async def test_the_deltas_of_a_text_join_to_it_exactly(client: openai.AsyncOpenAI, cut: dict[str, int]) -> None:
    text = "  Ein Mühlgraben\n\nführt 水 zur Mühle. \t🌊  "
    assert content(await collect(client, {"text": text, **cut})) == text


async def test_each_choice_gets_the_given_number_of_deltas(client: openai.AsyncOpenAI) -> None:
    chunks = await collect(client, {"deltas": 300, "delta_text": "ab "}, n=2)
    assert content(chunks, 0) == content(chunks, 1) == "ab " * 300
    assert finish_reasons(chunks) == ["stop", "stop"]


async def test_reasoning_comes_before_the_text_and_tool_calls_after_it(client: openai.AsyncOpenAI) -> None:
    calls = [{"name": "f", "arguments": '{"not json', "id": "call_x"}, {"name": "g", "arguments": {"long": "ü" * 30}}]
    chunks = await collect(client, {"reasoning": "let me think", "text": "so", "tool_calls": calls})
    deltas = [c.delta for chunk in chunks for c in chunk.choices]
    kinds = [
        "reasoning" if (d.model_extra or {}).get("reasoning_content") else "tool" if d.tool_calls else "content"
        for d in deltas
        if d.tool_calls or d.content or (d.model_extra or {}).get("reasoning_content")
    ]
    assert kinds == ["reasoning"] * 3 + ["content"] + ["tool"] * (len(kinds) - 4)
    assert arguments(chunks) == ['{"not json', '{"long":"' + "ü" * 30 + '"}']
    assert next(d.tool_calls[0].id for d in deltas if d.tool_calls) == "call_x"


async def test_usage_comes_after_the_finish_reason_if_it_is_asked_for(client: openai.AsyncOpenAI) -> None:
    script = {"deltas": 5, "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}}
    last = (await collect(client, script, **USAGE))[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 10
    assert all(chunk.usage is None for chunk in await collect(client, script))
    assert all(chunk.usage is None for chunk in await collect(client, {"deltas": 5, "usage": None}, **USAGE))


async def test_stamps_are_the_time_of_sending(client: openai.AsyncOpenAI) -> None:
    before = time.monotonic_ns()
    chunks = await collect(client, {"deltas": 40, "stamp": True, "rate": 200, "chunk_size": 2})
    stamps = [int(stamp) for stamp in content(chunks).split()]
    assert len(stamps) == 40
    assert before < stamps[0]
    assert stamps == sorted(stamps)
    assert stamps[-1] < time.monotonic_ns()
    assert {len(c.delta.content or "") for chunk in chunks for c in chunk.choices} == {0, 21}


async def test_a_paced_stream_takes_its_time_and_no_more(http: httpx2.AsyncClient) -> None:
    started = time.monotonic()
    await post(http, {"deltas": 50, "rate": 100})
    assert 0.49 < time.monotonic() - started < 60


async def test_delays_come_before_the_headers_and_before_the_first_delta(http: httpx2.AsyncClient) -> None:
    script = {"deltas": 1, "delay": 0.1, "first_token_delay": 0.1}
    started = time.monotonic()
    body = {"messages": PROMPT, "stream": True, "script": script}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        headers_at = time.monotonic()
        await response.aread()
    assert headers_at - started > 0.09
    assert time.monotonic() - headers_at > 0.09


async def test_streams_can_wait_for_each_other(http: httpx2.AsyncClient, scripted_provider: ScriptedProvider) -> None:
    await asyncio.gather(*(post(http, {"key": f"k{number}", "deltas": 2, "at_once": 3}) for number in range(3)))
    attempts = scripted_provider.stats["keys"].values()
    assert max(a["started_ns"] for a in attempts) < min(a["first_delta_ns"] for a in attempts)


async def test_padding_makes_each_delta_longer(http: httpx2.AsyncClient) -> None:
    plain = await post(http, {"deltas": 10})
    assert len(await post(http, {"deltas": 10, "pad": 100})) >= len(plain) + 10 * 100


async def test_done_and_the_finish_reason_can_be_left_out(http: httpx2.AsyncClient) -> None:
    events = await post(http, {"deltas": 1, "done": False, "finish_reason": None})
    assert b"[DONE]" not in events
    assert b'"finish_reason":"' not in events


async def test_a_client_that_reads_slowly_gets_everything(http: httpx2.AsyncClient) -> None:
    body = {"messages": PROMPT, "stream": True, "script": {"deltas": 20_000, "delta_text": "x", "pad": 100}}
    received = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            received += '"content":"x"' in line
    assert received == 20_000


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ({"delts": 4}, r"script\.delts: Extra inputs"),
        ({"text": "a", "deltas": 4}, "either text or deltas"),
        ({"faults": [{"kind": "explode"}]}, r"script\.faults\.0: .*'explode'"),
        ({"raw": {"chunks": [{"b64": "?"}]}}, r"script\.raw: "),
        ("soon", "script: Input should be a valid dictionary"),
    ],
)
async def test_a_wrong_script_is_refused_with_the_name_of_the_field(
    client: openai.AsyncOpenAI, script: Any, complaint: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=complaint):
        await collect(client, script)


# Faults


async def test_a_fault_belongs_to_its_attempt_and_attempts_are_counted_per_key(client: openai.AsyncOpenAI) -> None:
    script = {
        "key": "a",
        "text": "fine",
        "faults": [{"kind": "status", "status": 429, "headers": {"retry-after": "7"}}, None, {"kind": "refuse"}],
    }
    with pytest.raises(openai.RateLimitError) as caught:
        await collect(client, script)
    assert caught.value.response.headers["retry-after"] == "7"
    assert content(await collect(client, script)) == "fine"
    with pytest.raises(openai.APIConnectionError):
        await collect(client, script)
    assert content(await collect(client, script)) == "fine"
    with pytest.raises(openai.RateLimitError):
        await collect(client, script | {"key": "b"})


async def test_without_a_key_each_request_is_a_first_attempt(client: openai.AsyncOpenAI) -> None:
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            await collect(client, {"faults": [{"kind": "status", "status": 503}]})


@pytest.mark.parametrize("after", [0, 3])
async def test_a_cut_resets_the_connection_after_its_deltas_were_read(http: httpx2.AsyncClient, after: int) -> None:
    script = {"deltas": 9, "faults": [{"kind": "cut", "after": after}]}
    body = {"messages": PROMPT, "stream": True, "script": script}
    received = b""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        with pytest.raises(httpx2.ReadError):  # noqa: PT012  # what comes before the error is the point
            async for part in response.aiter_raw():
                received += part
    assert received.count(b'"content":"word "') == after


async def test_an_eof_ends_the_body_cleanly_without_a_finish_reason(client: openai.AsyncOpenAI) -> None:
    chunks = await collect(client, {"deltas": 9, "faults": [{"kind": "eof", "after": 4}]})
    assert content(chunks) == "word " * 4
    assert finish_reasons(chunks) == []


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "stall"}, {"kind": "stall", "after": 2}])
async def test_a_silent_stream_stays_open_until_the_client_closes_it(
    scripted_provider: ScriptedProvider, http: httpx2.AsyncClient, fault: dict[str, Any]
) -> None:
    http.timeout = httpx2.Timeout(1.0)  # in which a busy machine, too, sends what comes before the silence
    with pytest.raises(httpx2.ReadTimeout):
        await post(http, {"key": "k", "deltas": 9, "faults": [fault]})
    attempt = await client_closed(http, "k")
    assert attempt["deltas"] == fault.get("after", 0)
    assert attempt["started_ns"] < attempt["client_closed_ns"] < time.monotonic_ns()
    assert scripted_provider.stats["open_streams"] == 0


async def test_garbage_is_neither_json_nor_utf8(http: httpx2.AsyncClient) -> None:
    events = await post(http, {"deltas": 9, "faults": [{"kind": "garbage", "after": 1}]})
    with pytest.raises(UnicodeDecodeError):
        events.decode()


async def test_an_error_event_ends_the_stream(client: openai.AsyncOpenAI) -> None:
    fault = {"kind": "error_event", "after": 1, "error": {"message": "too busy", "code": "overloaded"}}
    with pytest.raises(openai.APIError, match="too busy"):
        await collect(client, {"deltas": 9, "faults": [fault]})


async def test_comments_interrupt_a_stream_and_it_goes_on(http: httpx2.AsyncClient) -> None:
    started = time.monotonic()
    events = await post(http, {"deltas": 9, "faults": [{"kind": "comments", "after": 4, "for": 0.2}]})
    assert time.monotonic() - started > 0.19
    before, *_, after = events.split(b": keep-alive\n\n")
    assert before.count(b'"content":"word "') == 4
    assert after.count(b'"content":"word "') == 5
    assert after.endswith(b"data: [DONE]\n\n")


async def test_one_attempt_can_be_slower(http: httpx2.AsyncClient) -> None:
    script = {"deltas": 9, "key": "slow once", "faults": [{"kind": "slow", "rate": 40}]}
    started = time.monotonic()
    slow = await post(http, script)
    assert time.monotonic() - started > 8 / 40
    assert slow.count(b'"content":"word "') == 9
    assert (await post(http, script)).count(b'"content":"word "') == 9


async def test_usage_can_be_kept_back(client: openai.AsyncOpenAI) -> None:
    chunks = await collect(client, {"deltas": 2, "faults": [{"kind": "no_usage"}]}, **USAGE)
    assert finish_reasons(chunks) == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_cut_after_the_finish_reason_keeps_the_usage_back(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m",
        messages=PROMPT,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"script": {"deltas": 2, "faults": [{"kind": "cut_after_finish"}]}},
    )
    chunks = []
    with pytest.raises(openai.APIConnectionError):  # noqa: PT012  # what comes before the error is the point
        async for chunk in stream:
            chunks.append(chunk)  # noqa: PERF401
    assert finish_reasons(chunks) == ["stop"]
    assert chunks[-1].usage is None


async def test_a_fault_in_a_stream_is_refused_for_a_request_that_does_not_stream(http: httpx2.AsyncClient) -> None:
    script = {"faults": [{"kind": "stall"}]}
    response = await http.post("/v1/chat/completions", json={"messages": PROMPT, "script": script})
    assert response.status_code == 400
    assert "stream=true" in response.json()["error"]["message"]


# Raw responses


async def test_a_raw_response_is_played_chunk_by_chunk(http: httpx2.AsyncClient) -> None:
    raw = {"headers": {"content-type": "text/event-stream", "x-odd": "1"}, "chunks": ["data: ö\n", {"b64": "/w=="}]}
    body = {"messages": PROMPT, "stream": True, "script": {"raw": raw}}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["x-odd"] == "1"
        assert [part async for part in response.aiter_raw()] == ["data: ö\n".encode(), b"\xff"]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        ({"chunks": ["data: 1\n\n"], "close": "reset"}, httpx2.ReadError),
        ({"chunks": ["data: 1\n\n"], "close": "stall"}, httpx2.ReadTimeout),
        ({"chunks": [], "http_status": 0}, httpx2.RemoteProtocolError),
        ({"chunks": ["{"], "http_status": 500, "close": "reset"}, httpx2.HTTPStatusError),
    ],
)
async def test_a_raw_response_ends_as_told(
    http: httpx2.AsyncClient, raw: dict[str, Any], error: type[Exception]
) -> None:
    if raw.get("close") == "stall":
        http.timeout = httpx2.Timeout(1.0)  # in which a busy machine, too, sends what comes before the silence
    with pytest.raises(error):
        await post(http, {"raw": raw})


# The server


async def test_requests_are_recorded_without_their_key(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await collect(client, {"text": "x"}, temperature=0.5)
    (recorded,) = (await http.get("/_requests")).json()
    assert recorded["path"] == "/v1/chat/completions"
    assert recorded["headers"]["authorization"] == "***"
    assert recorded["body"]["temperature"] == 0.5
    assert [request.json() for request in scripted_provider.requests] == [recorded["body"]]


async def test_stats_count_and_can_be_reset(http: httpx2.AsyncClient) -> None:
    await post(http, {"key": "k", "deltas": 7, "chunk_size": 2}, n=2)
    await post(http, {"key": "k", "deltas": 7})
    stats = (await http.get("/_stats")).json()
    assert (stats["requests"], stats["deltas_sent"], stats["open_streams"]) == (2, 21, 0)
    assert stats["keys"]["k"]["attempts"] == 2
    assert stats["keys"]["k"]["deltas"] == 7
    assert stats["keys"]["k"]["client_closed_ns"] is None
    assert stats["keys"]["k"]["ended_ns"] > stats["keys"]["k"]["started_ns"]
    await http.post("/_reset")
    assert (await http.get("/_stats")).json()["keys"] == {}
    assert (await http.get("/_requests")).json() == []


async def test_one_connection_serves_many_requests(
    scripted_provider: ScriptedProvider, http: httpx2.AsyncClient
) -> None:
    for _ in range(3):
        await post(http, {"deltas": 2})
    assert scripted_provider.stats["connections"] == 1


async def test_requests_sent_ahead_are_answered_in_order(scripted_provider: ScriptedProvider) -> None:
    port = int(scripted_provider.base_url.split(":")[2].removesuffix("/v1"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    last = b"GET /_nowhere HTTP/1.1\r\nconnection: close\r\n\r\n"
    writer.write(b"GET /healthz HTTP/1.1\r\n\r\n" * 2000 + last)
    answers = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert answers.count(b"HTTP/1.1 200") == 2000
    assert answers.rindex(b"HTTP/1.1 404") > answers.rindex(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\ncontent-length: 999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, 431),
    ],
)
async def test_what_is_not_served_is_answered_and_the_connection_closed(
    scripted_provider: ScriptedProvider, request_bytes: bytes, status: int
) -> None:
    port = int(scripted_provider.base_url.split(":")[2].removesuffix("/v1"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes)
    answer = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 %d" % status)


async def test_a_body_that_is_no_request_is_refused(http: httpx2.AsyncClient) -> None:
    for body in (b"", b"[]", b"{}", b'{"messages":[]}', b"[" * 100_000, b'{"messages":[{}],"tools":"x"}'):
        response = await http.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_with_an_api_key_another_key_is_refused() -> None:
    async with ScriptedProvider(api_key="right") as provider:
        async with openai.AsyncOpenAI(base_url=provider.base_url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await collect(client, {"text": "x"})
        async with openai.AsyncOpenAI(base_url=provider.base_url, api_key="right", max_retries=0) as client:
            assert content(await collect(client, {"text": "x"})) == "x"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_as_a_process_it_tells_its_url_in_one_line_and_ends_cleanly(signum: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "keepstream_worker.dev_stack.scripted_provider"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        base_url = json.loads(process.stdout.readline())["base_url"]
        body = {"messages": PROMPT, "stream": True, "script": {"faults": [{"kind": "stall"}]}}
        with httpx2.stream("POST", f"{base_url}/chat/completions", json=body, trust_env=False, timeout=60) as response:
            assert response.status_code == 200
            process.send_signal(signum)
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")
