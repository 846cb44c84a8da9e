"""In which dialect a provider is asked: as configured, or as it turns out; and what a refusal costs: no attempt."""

from dataclasses import replace
from typing import Any

import pytest

from keepstream.errors import ErrorCode
from keepstream.next_turn import ITEMS_FIELD
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.providers.config import ProviderConfig, parse_providers
from keepstream_worker.providers.provider import ProviderFailure, Providers, Timeouts
from keepstream_worker.providers.stream import Output, StreamReader

PATIENT = Timeouts(connect=60.0, first_token=60.0, idle=60.0)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
#: As OpenAI words it for its newer models.
WANTS_RESPONSES = {
    "error": {
        "message": "Function tools with reasoning_effort are not supported for m-1 in /v1/chat/completions."
        " Please use /v1/responses instead.",
        "type": "invalid_request_error",
        "param": "reasoning_effort",
        "code": None,
    }
}


def refusal(body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    return {"kind": "status", "status": status, "body": body}


class Asked:
    """A provider under test, and what it was sent."""

    def __init__(self, server: ScriptedProvider, toml: str) -> None:
        self._server = server
        table = f'[providers.p]\nbase_url = "{server.base_url}"\n{toml}'
        self._providers = Providers(parse_providers(table, {}))

    async def ask(self, timeouts: Timeouts = PATIENT, **request: Any) -> Output:
        """Send a request as an attempt does, and return what is made of the answer."""
        body = {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "script": {"text": "ok"}} | request
        async with self._providers.get("p").stream(body, timeouts) as response:
            reader = StreamReader(responses=response.by_responses)
            async for data in response:
                reader.feed(data)
                if reader.saw_data:
                    response.note_data()
                if reader.done:
                    break
        assert reader.finish() is None
        return reader.output()

    @property
    def paths(self) -> list[str]:
        return [request.path.removeprefix("/v1") for request in self._server.requests]

    @property
    def last(self) -> Any:
        return self._server.requests[-1].json()

    async def aclose(self) -> None:
        await self._providers.aclose()


@pytest.fixture
async def make(scripted_provider: ScriptedProvider, request: pytest.FixtureRequest) -> Any:
    made: list[Asked] = []

    def make(toml: str = "") -> Asked:
        made.append(Asked(scripted_provider, toml))
        return made[-1]

    yield make
    for asked in made:
        await asked.aclose()


@pytest.mark.parametrize(
    ("toml", "request_", "path"),
    [
        ("", {}, "/chat/completions"),
        ('api = "responses"', {}, "/responses"),
        ('models = { "m-*" = { api = "responses" } }', {}, "/responses"),
        (
            'api = "responses"\nmodels = { "m-*" = { api = "responses" }, "m-1" = { api = "chat" } }',
            {},
            "/chat/completions",
        ),
        ("", {"reasoning": {"effort": "low"}}, "/chat/completions"),  # as OpenRouter has it
        ('api = "chat"', {"reasoning": {"effort": "low"}}, "/chat/completions"),
    ],
)
async def test_the_dialect_is_configured_or_follows_from_the_request(
    make: Any, toml: str, request_: dict[str, Any], path: str
) -> None:
    asked = make(toml)
    output = await asked.ask(**request_)
    assert output.choices[0].content == "ok"
    assert asked.paths == [path]


@pytest.mark.parametrize("request_", [{"reasoning": {"effort": "low"}}, {"tools": [{"type": "web_search"}]}])
async def test_what_openai_has_only_there_is_asked_of_openai_there(
    make: Any, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not make()._providers.get("p").config.is_openai
    assert parse_providers("", {})["default"].is_openai
    monkeypatch.setattr(ProviderConfig, "is_openai", True)
    asked = make()
    await asked.ask(**request_)
    assert asked.paths == ["/responses"]


async def test_a_refusal_that_names_the_other_endpoint_is_followed_at_once_and_remembered(make: Any) -> None:
    asked = make()
    script = {"key": "k", "text": "ok", "faults": [refusal(WANTS_RESPONSES)]}
    assert (await asked.ask(tools=TOOLS, script=script)).choices[0].content == "ok"
    assert (await asked.ask(tools=TOOLS)).choices[0].content == "ok"
    assert asked.paths == ["/chat/completions", "/responses", "/responses"]
    assert asked.last["tools"] == [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]


async def test_a_model_that_is_only_there_is_found_there(make: Any) -> None:
    asked = make()
    error = {
        "message": "This model is only supported in v1/responses and not in v1/chat/completions.",
        "param": "model",
    }
    script = {"key": "k", "text": "ok", "faults": [refusal({"error": error}, 404)]}
    await asked.ask(script=script)
    assert asked.paths == ["/chat/completions", "/responses"]


@pytest.mark.parametrize(
    ("status", "body", "hinted"),
    [
        (404, {"detail": "Not Found"}, True),
        (404, {"error": {"message": "Invalid URL (POST /v1/responses)", "type": "invalid_request_error"}}, True),
        (405, {"detail": "Method Not Allowed"}, True),
        (404, {"error": {"message": "The model `m-1` does not exist", "code": "model_not_found"}}, False),
        (400, {"error": {"message": "temperature is too high", "param": "temperature"}}, False),
    ],
)
async def test_a_server_without_the_endpoint_is_told_from_one_without_the_model(
    make: Any, status: int, body: dict[str, Any], *, hinted: bool
) -> None:
    asked = make('api = "responses"')
    with pytest.raises(ProviderFailure) as caught:
        await asked.ask(script={"key": "k", "faults": [refusal(body, status)]})
    assert ('api = "chat"' in caught.value.failure.message) is hinted


async def test_the_first_output_of_a_response_may_take_longer(make: Any) -> None:
    """A model that thinks unseen is silent: the other dialect's limit does not apply, also not after its refusal."""
    asked = make()
    script = {"key": "k", "text": "ok", "first_token_delay": 2.5, "faults": [refusal(WANTS_RESPONSES)]}
    impatient = replace(PATIENT, first_token=2.0, first_token_by_responses=60.0)
    assert (await asked.ask(impatient, tools=TOOLS, script=script)).choices[0].content == "ok"
    asked = make('api = "responses"')
    hasty = replace(PATIENT, first_token_by_responses=0.3)
    with pytest.raises(ProviderFailure, match=r"0\.3 s"):
        await asked.ask(hasty, script={"text": "ok", "first_token_delay": 20.0})


async def test_what_the_other_dialect_cannot_say_is_refused_by_its_name(make: Any) -> None:
    asked = make()
    script = {"key": "k", "text": "ok", "faults": [refusal(WANTS_RESPONSES)]}
    with pytest.raises(ProviderFailure, match="'stop'") as caught:
        await asked.ask(tools=TOOLS, stop=["x"], script=script)
    assert caught.value.failure.code is ErrorCode.BAD_REQUEST
    assert asked.paths == ["/chat/completions"]


async def test_any_other_refusal_stands(make: Any) -> None:
    asked = make()
    error = {"message": "Unknown parameter: 'foo'.", "type": "invalid_request_error", "param": "foo"}
    with pytest.raises(ProviderFailure):
        await asked.ask(script={"key": "k", "faults": [refusal({"error": error})]})
    assert asked.paths == ["/chat/completions"]


async def test_encrypted_reasoning_is_asked_for_until_a_model_refuses_it(make: Any) -> None:
    asked = make('api = "responses"')
    error = {"message": "Encrypted content is not supported with this model.", "param": "include"}
    await asked.ask(script={"key": "k", "text": "ok", "faults": [refusal({"error": error})]})
    assert "include" not in asked.last
    await asked.ask()
    assert "include" not in asked.last
    await asked.ask(model="m-2")
    assert asked.last["include"] == ["reasoning.encrypted_content"]


async def test_items_that_the_provider_cannot_read_any_more_are_left_out(make: Any) -> None:
    asked = make('api = "responses"')
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    earlier = {"role": "assistant", "content": "Hm.", ITEMS_FIELD: {"provider": "p", "items": [item]}}
    error = {"message": "The encrypted content could not be verified.", "code": "invalid_encrypted_content"}
    await asked.ask(messages=[earlier], script={"key": "k", "text": "ok", "faults": [refusal({"error": error})]})
    assert asked.last["input"] == [{"type": "message", "role": "assistant", "content": "Hm."}]


async def test_chat_completions_are_not_sent_the_items_of_the_other_dialect(make: Any) -> None:
    asked = make('api = "chat"')
    await asked.ask(messages=[{"role": "assistant", "content": "Hm.", ITEMS_FIELD: {"provider": "p", "items": []}}])
    assert asked.last["messages"] == [{"role": "assistant", "content": "Hm."}]


async def test_reasoning_comes_back_with_the_next_turn(make: Any) -> None:
    asked = make('api = "responses"')
    output = await asked.ask(script={"text": "ok", "reasoning": "Let me think."})
    kept = output.choices[0].extra[ITEMS_FIELD]
    await asked.ask(messages=[{"role": "assistant", "content": "ok", ITEMS_FIELD: {"provider": "p", "items": kept}}])
    reasoning, message = asked.last["input"]
    assert reasoning["encrypted_content"] == kept[0]["encrypted_content"]
    assert message["content"][0]["text"] == "ok"
