"""The scripted provider's Responses API, as OpenAI's own client reads it."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider


@pytest.fixture
async def client(scripted_provider: ScriptedProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=scripted_provider.base_url, api_key="secret", max_retries=0) as client:
        yield client


async def final(client: openai.AsyncOpenAI, script: dict[str, Any] | None, **request: Any) -> Any:
    """Return the response that the client builds from the stream, once it has checked each event."""
    body = {} if script is None else {"script": script}
    async with client.responses.stream(model="m", input="Hello?", extra_body=body, **request) as stream:
        return await stream.get_final_response()


async def test_a_stream_builds_the_same_answer_as_a_whole_response(client: openai.AsyncOpenAI) -> None:
    script = {
        "text": "Grüße aus Zürich 🌊.",
        "reasoning": "Let me think.",
        "tool_calls": [{"name": "f", "arguments": {"city": "Zürich"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }
    streamed = await final(client, script)
    whole: Any = await client.responses.create(model="m", input="Hello?", extra_body={"script": script})
    for response in (streamed, whole):
        reasoning, message, call = response.output
        assert reasoning.summary[0].text == "Let me think."
        assert message.content[0].text == response.output_text == "Grüße aus Zürich 🌊."
        assert (call.name, json.loads(call.arguments)) == ("f", {"city": "Zürich"})
        assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 7)
        assert response.status == "completed"


async def test_tools_are_answered_with_a_call_until_its_result_comes(client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool: Any = {"type": "function", "name": "weather", "parameters": schema, "strict": False}
    first = await final(client, None, tools=[tool])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    second = await client.responses.create(model="m", input=[result], tools=[tool])
    assert [item.type for item in second.output] == ["message"]


async def test_a_cut_answer_is_incomplete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        model="m", input="Hello?", extra_body={"script": {"text": "Once upon", "finish_reason": "length"}}
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_faults_are_those_of_the_other_dialect(client: openai.AsyncOpenAI) -> None:
    script = {
        "key": "k",
        "text": "one two three",
        "faults": [{"kind": "status", "status": 429}, {"kind": "eof", "after": 2}],
    }
    with pytest.raises(openai.RateLimitError):
        await final(client, script)
    with pytest.raises(RuntimeError, match=r"response\.completed"):
        await final(client, script)
    assert (await final(client, script)).output_text == "one two three"


async def test_a_body_without_an_input_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at least one item"):
        await client.responses.create(model="m", input=[])
