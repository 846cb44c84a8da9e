"""Chat completions: a stream ends with the row's text, or says that it does not; what is stored is told whole."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import APIError, OpenAI
from openai.types.chat import ChatCompletion
from pydantic import TypeAdapter

from keepstream.events import Event
from keepstream.jobs import make_job
from keepstream.results import Choice, JobStatus, ToolCall, Usage
from keepstream_gateway.errors import ApiError
from keepstream_gateway.openai.chat_object import chat_completion, stored_messages
from keepstream_gateway.openai.chat_request import job_fields, wants_usage
from keepstream_gateway.openai.chat_stream import DONE, ChatChunks
from tests.job_stories import SIGNED, Story, new_job, stories


def told(story: Story, events: Sequence[Event], *, with_usage: bool = False) -> list[bytes]:
    chunks = ChatChunks(new_job(story.job_id), with_usage=with_usage)
    return [frame for event in events for frame in chunks.feed(event)]


def data(frame: bytes) -> dict[str, Any]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    fields: dict[str, Any] = json.loads(frame.removeprefix(b"data: "))
    return fields


class Reader:
    """What a client makes of chunks."""

    def __init__(self) -> None:
        self.texts: dict[tuple[int, str], str] = {}
        self.calls: dict[tuple[int, int], dict[str, str]] = {}
        self.reasons: dict[int, str] = {}

    def read(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            for name in ("content", "reasoning_content", "refusal"):
                self.texts[index, name] = self.texts.get((index, name), "") + (delta.get(name) or "")
            for call in delta.get("tool_calls", ()):
                known = self.calls.setdefault((index, call["index"]), {"arguments": ""})
                known |= {"id": call["id"]} if "id" in call else {}
                known |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
                known["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]

    def check(self, story: Story) -> None:
        for choice in story.stored.choices:
            assert self.texts.get((choice.index, "content"), "") == choice.content
            assert self.texts.get((choice.index, "reasoning_content"), "") == choice.reasoning
            assert self.texts.get((choice.index, "refusal"), "") == choice.refusal
            for index, call in enumerate(choice.tool_calls):
                expected = {"id": call.id, "name": call.name, "arguments": call.arguments}
                assert self.calls[choice.index, index] == expected
        known = {choice.index for choice in story.stored.choices} or {0}
        assert not any(text for (index, _), text in self.texts.items() if index not in known)
        assert self.reasons.keys() == known


@given(stories(), st.data())
def test_a_stream_that_is_done_has_told_what_the_row_holds(story: Story, draw: st.DataObject) -> None:
    logs = [story.events, story.of_the_row()]
    if len(story.events) > 2:
        last = draw.draw(st.integers(1, len(story.events) - 2))
        logs.append(story.with_hole(draw.draw(st.integers(0, last)), last))
    for log in logs:
        frames = told(story, log)
        if frames[-1] == DONE:
            assert story.stored.status is JobStatus.COMPLETED
            reader = Reader()
            for frame in frames[:-1]:
                reader.read(data(frame))
            reader.check(story)
        else:
            assert data(frames[-1])["error"]["code"]
            assert DONE not in frames


@given(stories())
def test_a_retry_before_any_output_goes_unnoticed(story: Story) -> None:
    deltas = [event for event in story.events if event.type == "delta"]
    if story.stored.status is JobStatus.COMPLETED and all(e.attempt == story.stored.attempt for e in deltas):
        assert told(story, story.events)[-1] == DONE


answers: list[bytes] = []


def answer(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=answers[-1])


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    """Return OpenAI's library, which reads bytes that are given instead of sent."""
    transport = httpx2.MockTransport(answer)
    with OpenAI(api_key="k", base_url="http://gateway.test/v1", http_client=httpx2.Client(transport=transport)) as made:
        yield made


@given(stories())
@settings(max_examples=50)
def test_openai_s_own_helper_takes_every_stream_or_raises(client: OpenAI, story: Story) -> None:
    frames = told(story, story.events, with_usage=True)
    answers[:] = [b"".join(frames)]
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "Hi"}]) as stream:
        if frames[-1] != DONE:
            with pytest.raises(APIError):
                list(stream)
            return
        final = stream.get_final_completion() if _parses(story) else None
    if final is not None:
        for choice in story.stored.choices:
            message = final.choices[choice.index].message
            assert (message.content or "") == choice.content
            calls = [(call.id, call.function.arguments) for call in message.tool_calls or ()]
            assert calls == [(call.id, call.arguments) for call in choice.tool_calls]
        assert final.usage is not None


def _parses(story: Story) -> bool:
    """Whether the helper returns a completion: it raises for one that is cut, and for choices out of order."""
    reasons = {choice.finish_reason for choice in story.stored.choices}
    return "length" not in reasons and [choice.index for choice in story.stored.choices] == [0]


def test_a_stored_completion_has_everything_that_the_next_request_needs() -> None:
    call = ToolCall(id="c1", name="f", arguments="{}", arguments_valid=True, extra={"extra_content": {"s": "sig"}})
    choice = Choice(
        index=0,
        content="4",
        reasoning="2+2",
        finish_reason="tool_calls",
        tool_calls=[call],
        extra=SIGNED | {"images": [{"type": "image_url"}], "logprobs": {"content": []}},
    )
    usage = Usage(prompt_tokens=1, completion_tokens=2, details={"completion_tokens_details": {"reasoning_tokens": 1}})
    job = new_job().model_copy(update={"status": JobStatus.COMPLETED, "choices": [choice], "usage": usage})
    completion = chat_completion(job)
    TypeAdapter(ChatCompletion).validate_python(completion)
    told_choice = completion["choices"][0]
    assert told_choice["message"] == {
        **job.assistant_message(),
        "refusal": None,
        "reasoning_content": "2+2",
        "images": [{"type": "image_url"}],
    }
    assert told_choice["logprobs"] == {"content": []}
    assert completion["usage"]["total_tokens"] == 3
    assert completion["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert stored_messages(job.request, job.id) == [{"id": "chatcmpl-job1-0", "role": "user", "content": "Hi"}]


def test_a_request_goes_to_the_provider_as_it_is_but_for_what_is_ours() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": True,
        "metadata": {"a": "b"},
        "keepstream": {"provider": "p", "max_attempts": 2},
        "n": 2,
        "vendor_option": {"x": 1},
    }
    job = make_job(job_fields(body))
    assert job.request == {"model": "m", "messages": body["messages"], "n": 2, "vendor_option": {"x": 1}}
    assert (job.metadata, job.provider, job.max_attempts) == ({"a": "b"}, "p", 2)
    assert wants_usage(body)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"stream_options": {"include_usgae": True}}, "stream_options.include_usgae"),
        ({"stream_options": 1}, "stream_options"),
        ({"metadata": []}, "metadata"),
        ({"store": "yes"}, "store"),
        ({"keepstream": {"request": {}}}, "keepstream.request"),
    ],
)
def test_what_is_ours_is_checked(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        job_fields({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **wrong})
    assert refusal.value.param == param
