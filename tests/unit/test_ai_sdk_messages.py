"""UI messages become those of a chat completion, and a page's request becomes a job's."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import pytest

from keepstream import names
from keepstream.results import Choice, CompletionResult, JobStatus, ToolCall
from keepstream_gateway.ai_sdk import chats
from keepstream_gateway.ai_sdk.messages import continued, to_chat, tool_outputs
from keepstream_gateway.ai_sdk.requests import to_request, trigger
from keepstream_gateway.errors import ApiError

PICTURE = "data:image/png;base64,AAAA"


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"id": "u", "role": "user", "parts": list(parts)}


def assistant(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"id": "a", "role": "assistant", "parts": [{"type": "step-start"}, *parts]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "state": "done"}


def tool(call_id: str = "c", state: str = "output-available", **fields: Any) -> dict[str, Any]:
    return {"type": "tool-look", "toolCallId": call_id, "state": state, "input": {"at": "it"}, **fields}


CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


def test_texts_files_and_roles() -> None:
    messages = [
        {"id": "s", "role": "system", "parts": [text("Be "), text("brief.")]},
        user(text("Hello, "), {"type": "data-note", "data": 1}, text("you.")),
        assistant({"type": "reasoning", "text": "Hm."}, text("Hello!")),
        user(
            text("What is this?"),
            {"type": "file", "mediaType": "image/png", "url": PICTURE},
            {"type": "file", "mediaType": "image/webp", "url": "https://example.org/a.webp"},
            {
                "type": "file",
                "mediaType": "application/pdf",
                "url": "data:application/pdf;base64,AA",
                "filename": "a.pdf",
            },
            {"type": "file", "mediaType": "audio/mpeg", "url": "data:audio/mpeg;base64,BBBB"},
        ),
    ]
    assert to_chat(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, you."},
        {"role": "assistant", "content": "Hello!"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.webp"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"}},
                {"type": "input_audio", "input_audio": {"data": "BBBB", "format": "mp3"}},
            ],
        },
    ]


def test_tool_calls_and_their_results() -> None:
    message = assistant(
        text("Let me look."),
        tool(output={"seen": [1]}),
        {"type": "step-start"},
        tool("d", "output-error", errorText="it is dark"),
        {**tool("e", output="a text"), "type": "dynamic-tool", "toolName": "other"},
        tool("f", "output-denied"),
        tool("g", "output-error", errorText="no JSON", input=None, rawInput="{"),
        {"type": "step-start"},
        text("I see."),
    )
    assert to_chat([message]) == [
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": '{"seen": [1]}'},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {**CALL, "id": "d"},
                {**CALL, "id": "e", "function": {"name": "other", "arguments": '{"at": "it"}'}},
                {**CALL, "id": "f"},
                {**CALL, "id": "g", "function": {"name": "look", "arguments": "{"}},
            ],
        },
        {"role": "tool", "tool_call_id": "d", "content": "it is dark"},
        {"role": "tool", "tool_call_id": "e", "content": "a text"},
        {"role": "tool", "tool_call_id": "f", "content": "The user did not allow this call."},
        {"role": "tool", "tool_call_id": "g", "content": "no JSON"},
        {"role": "assistant", "content": "I see."},
    ]


def test_calls_without_a_result_are_left_out() -> None:
    """Providers refuse them; a page has them when it was stopped."""
    message = assistant(text("Let me look."), tool(state="input-streaming"), tool("d", "input-available"))
    assert to_chat([message, user(text("Never mind."))])[0] == {"role": "assistant", "content": "Let me look."}
    assert to_chat([assistant(tool(state="input-available"))]) == []


def test_a_refusal_stays_one() -> None:
    part = {**text("I may not."), "providerMetadata": {"keepstream": {"refusal": True}}}
    assert to_chat([assistant(part)]) == [{"role": "assistant", "content": None, "refusal": "I may not."}]


def answer(content: str, *call_ids: str) -> CompletionResult:
    calls = [ToolCall(id=call_id, name="look", arguments="{}", arguments_valid=True) for call_id in call_ids]
    choice = Choice(
        index=0,
        content=content,
        reasoning="Hm.",
        tool_calls=calls,
        extra={"reasoning_fields": ["reasoning_content"], "signature": "s"},
    )
    return CompletionResult(
        id="j",
        tenant="default",
        status=JobStatus.COMPLETED,
        model="m",
        provider="p",
        created_at=datetime.now(UTC),
        attempt=1,
        choices=[choice],
    )


def test_a_step_is_replaced_by_its_stored_answer() -> None:
    """With the reasoning and the signature, which the page does not send."""
    message = assistant(text("One."), tool(output=1), {"type": "step-start"}, text("Two."), tool("d", output=2))
    first, result, second, _ = to_chat([message], [answer("One.", "c"), answer("Two.", "other")])
    assert first == answer("One.", "c").assistant_message()
    assert (first["reasoning_content"], first["signature"]) == ("Hm.", "s")
    assert result["tool_call_id"] == "c"
    assert second["content"] == "Two."
    assert "signature" not in second  # that answer is not this one's


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("text", "messages"),
        (["text"], "messages[0].role"),
        ([{"role": "tool", "parts": []}], "messages[0].role"),
        ([{"role": "user", "content": "as it was in version 4"}], "messages[0].parts"),
        ([{"role": "user", "parts": ["text"]}], "messages[0].parts"),
        ([user(text("a")), user({"type": "text"})], "messages[1].parts[0]"),
        ([user({"type": "file", "url": PICTURE})], "messages[0].parts[0]"),
        (
            [user({"type": "file", "mediaType": "application/pdf", "url": "https://example.org/a.pdf"})],
            "messages[0].parts[0].url",
        ),
        ([assistant({"type": "text", "text": 7})], "messages[0]"),
        ([assistant({"type": "tool-look", "state": "output-available"})], "messages[0].parts"),
    ],
)
def test_what_cannot_be_sent_is_named(messages: Any, param: str) -> None:
    with pytest.raises(ApiError) as error:
        to_chat(messages)
    assert (error.value.status, error.value.param) == (400, param)


def test_an_answer_goes_on_with_the_assistants_last_message() -> None:
    assert continued([user(text("a"))]) is None
    assert continued([user(text("a")), assistant(tool(output=1))]) == "a"
    with pytest.raises(ApiError):
        continued([{"role": "assistant", "parts": []}])


def test_what_tools_gave_is_found_again() -> None:
    values = [{"a": 1}, [1, "b"], "text", "{no JSON"]
    messages = to_chat([assistant(*(tool(str(number), output=value) for number, value in enumerate(values)))])
    assert tool_outputs(messages) == {str(number): value for number, value in enumerate(values)}


# -- requests --


def test_a_request_has_what_all_chats_have_and_what_the_page_asks_for() -> None:
    body: dict[str, Any] = {
        "id": "c",
        "messages": [],
        "trigger": "submit-message",
        "messageId": None,
        "temperature": 0.2,
        "model": "b",
    }
    common = {"model": "a", "tools": [], "messages": [{"role": "system", "content": "Be brief."}]}
    asked = [{"role": "user", "content": "Hello"}]
    assert to_request(body, asked, common, parameters=True) == {
        "model": "b",
        "tools": [],
        "temperature": 0.2,
        "messages": [*common["messages"], *asked],
    }


@pytest.mark.parametrize(
    ("own", "common", "parameters", "status", "param"),
    [
        ({}, {}, True, 400, "model"),
        ({"model": "b"}, {"model": "a"}, False, 403, "model"),
        ({"temperature": 2}, {"model": "a"}, False, 403, "temperature"),
        ({"stream": False}, {"model": "a"}, True, 400, "stream"),
        ({"n": 2}, {"model": "a"}, True, 400, "n"),
    ],
)
def test_a_request_is_refused(
    own: dict[str, Any], common: dict[str, Any], *, parameters: bool, status: int, param: str
) -> None:
    with pytest.raises(ApiError) as error:
        to_request({"id": "c", "messages": [], **own}, [], common, parameters=parameters)
    assert (error.value.status, error.value.param) == (status, param)


def test_a_trigger_is_one_of_two() -> None:
    assert trigger({}) == "submit-message"
    assert trigger({"trigger": "regenerate-message"}) == "regenerate-message"
    with pytest.raises(ApiError):
        trigger({"trigger": "resume-stream"})


# -- chats --


@pytest.mark.parametrize("chat", ["", "x" * 257, 7, None, "a\0b", "\ud800"])
def test_an_id_of_a_chat_is_a_text_that_can_be_stored(chat: Any) -> None:
    with pytest.raises(ApiError) as error:
        chats.check_id(chat)
    assert error.value.param == "id"


@pytest.mark.parametrize("chat", ["a", "/../ä?&#\n", "x" * 256])
def test_a_chats_jobs_have_ids_of_their_own(chat: str) -> None:
    assert chats.check_id(chat) == chat
    job_id = names.numbered_id(chats.prefix(chat), 41)
    assert job_id == f"chat{hashlib.sha256(chat.encode()).hexdigest()[:32]}00000041"
    assert names.number_in(job_id) == 41
    assert chats.prefix(chat) != chats.prefix(chat + "a")
    assert ":" in chats.scope(chat)  # no job is called so
