"""Realistic requests: the provider gets what was given; followers and rows get what came back."""

import http.client
import json
from pathlib import Path
from typing import Any, Final

from keepstream.events import DeltaEvent, ToolCallDelta
from keepstream.jobs import Job, parse_job
from keepstream.names import QUEUE
from keepstream.results import JobStatus
from tests.cluster import Cluster, Following

PIXEL: Final = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WEATHER: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Das Wetter in einer Stadt ☀",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
RECIPE: Final[dict[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "recipe",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}}, "note": {"type": "null"}},
            "$defs": {"step": {"type": "object", "properties": {"text": {"type": "string"}}}},
        },
    },
}
PICTURE_AND_SOUND: Final[list[dict[str, Any]]] = [
    {"role": "developer", "content": "Answer in one word."},
    {
        "role": "user",
        "name": "Zoë",
        "content": [
            {"type": "text", "text": "What is this? 你好 🌊"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "UklGRiQAAABXQVZF", "format": "wav"}},
        ],
    },
]
TOOL_TURN: Final[list[dict[str, Any]]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sun": true}'},
]
HELLO: Final[list[dict[str, Any]]] = [{"role": "user", "content": "Hello"}]

#: What is given to ``enqueue`` beside the model and the script.
REQUESTS: Final[dict[str, dict[str, Any]]] = {
    "tools": {"messages": HELLO, "tools": [WEATHER], "tool_choice": "auto", "parallel_tool_calls": False},
    "forced-tool": {
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    },
    "tool-turn": {"messages": TOOL_TURN, "tools": [WEATHER]},
    "json-schema": {"messages": HELLO, "response_format": RECIPE},
    "image-and-audio": {"messages": PICTURE_AND_SOUND, "modalities": ["text"]},
    "two-choices": {"messages": HELLO, "n": 2, "temperature": 1.5, "top_p": 0.25},
    "sampling": {
        "messages": HELLO,
        "logprobs": True,
        "top_logprobs": 5,
        "seed": 2**63 - 1,
        "stop": ["\n\n", "ENDE 🛑"],
        "logit_bias": {"50256": -100},
        "presence_penalty": -0.5,
        "max_completion_tokens": 1000,
        "reasoning_effort": "high",
        "user": "user-1",
    },
    "nothing-dropped": {
        "messages": HELLO,
        "temperature": 0,
        "stop": None,
        "store": False,
        "tools": [],
        "prediction": {},
    },
    "names-that-are-ours-too": {
        "messages": HELLO,
        "metadata": {"topic": "Mühlen", "n": "1"},
        "provider": {"order": ["a", "b"], "allow_fallbacks": False},
        "user": "user-1",
        "id": 17,
        "v": [1],
        "request": {"v": 2},
        "tenant": None,
        "max_attempts": "as often as you like",
        "headers": {"OpenAI-Beta": "x"},
        "class": {},
    },
    "odd-names": {
        "messages": [{"role": "user", "content": "Hello", "x-Vendor": {"": [[], {}]}}],
        "": 0,
        "a b": [None, True, 1.5e-300, -0.0, "\x00\u2028"],
        "水/~1": {"$ref": "#", "__proto__": {"constructor": None}},
        "temprature": 0.2,
        "timeout": 5,
    },
    "own-stream-options": {"messages": HELLO, "stream_options": {"include_obfuscation": False}},
    "lone-surrogate": {"messages": [{"role": "user", "content": "cut emoji \ud83d"}]},
    "beyond-64-bits": {"messages": HELLO, "seed": 10**30},
    "deeply-nested": {"messages": HELLO, "vendor": json.loads('{"a":' * 240 + "1" + "}" * 240)},
}
#: What a worker adds to ask for usage.
OPTIONS: Final = {"include_usage": True}


def recorded(cluster: Cluster) -> list[dict[str, Any]]:
    """The requests that the provider received."""
    connection = http.client.HTTPConnection("127.0.0.1", cluster.provider.port, timeout=60)
    try:
        connection.request("GET", "/_requests")
        requests: list[dict[str, Any]] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return requests


def bodies(cluster: Cluster) -> dict[str, Any]:
    """The bodies that the provider received, by the script's key."""
    return {request["body"]["script"]["key"]: request["body"] for request in recorded(cluster)}


def fragments(following: Following, choice: int = 0) -> list[ToolCallDelta]:
    """The pieces of tool calls that a follower received, in order."""
    return [
        fragment
        for event in following.events
        if isinstance(event, DeltaEvent) and event.choice == choice
        for fragment in event.delta.tool_calls or ()
    ]


def test_every_parameter_reaches_the_provider_untouched(cluster: Cluster) -> None:
    given = {name: {"model": "scripted-1", "script": {"key": name}, **one} for name, one in REQUESTS.items()}
    cluster.start_worker()
    job_ids = [
        cluster.client.enqueue(
            Job(request=request, metadata={"secret": "of the caller"}, max_attempts=3, idle_timeout=30.5)
        )
        for request in given.values()
    ]
    for job_id in job_ids:
        assert cluster.wait_for(job_id).status is JobStatus.COMPLETED

    asked = bodies(cluster)
    expected = {name: request | {"stream": True, "stream_options": OPTIONS} for name, request in given.items()}
    expected["own-stream-options"]["stream_options"] = OPTIONS | {"include_obfuscation": False}
    assert asked.keys() == expected.keys()
    for name, body in asked.items():
        # As JSON, in which true is not 1 and -0.0 is not 0.
        assert json.dumps(body, sort_keys=True) == json.dumps(expected[name], sort_keys=True), name


def test_waiting_jobs_that_are_hard_to_read_are_run_like_others(cluster: Cluster) -> None:
    """They wait in the database as text; their messages are lost."""
    names = ["lone-surrogate", "beyond-64-bits", "deeply-nested", "tools"]
    job_ids = [
        cluster.client.enqueue({"model": "scripted-1", "script": {"key": name, "deltas": 1}, **REQUESTS[name]})
        for name in names
    ]
    with cluster.redis() as client:
        client.delete(QUEUE)
    cluster.start_worker()
    assert {cluster.wait_for(job_id).status for job_id in job_ids} == {JobStatus.COMPLETED}


def test_metadata_and_limits_stay_at_home(cluster: Cluster) -> None:
    cluster.start_worker()
    job = cluster.job(limits={"max_attempts": 2, "idle_timeout": 20, "metadata": {"order": "Größe 47"}})
    assert cluster.wait_for(cluster.client.enqueue(parse_job(job))).metadata == {"order": "Größe 47"}
    assert bodies(cluster)[job["id"]].keys() == {"model", "messages", "script", "stream", "stream_options"}


def test_followers_get_the_tool_calls_fragment_by_fragment_as_they_are_stored(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    texts = ['{"city":"Zürich 🌊","days":3,"note":"' + "ein langer Text " * 8 + '"}', '{"city":"東京"}']
    job_id = cluster.enqueue(
        text="Let me see. ",
        rate=100,
        tool_calls=[
            {"name": "get_weather", "id": "call_a", "arguments": texts[0]},
            {"name": "get_time", "id": "call_b", "arguments": texts[1]},
        ],
    )
    following = cluster.follow(job_id)
    transcript = following.to_the_end()
    result = cluster.result(job_id)

    assert [(call.id, call.name, call.arguments) for call in result.tool_calls] == [
        ("call_a", "get_weather", texts[0]),
        ("call_b", "get_time", texts[1]),
    ]
    assert all(call.arguments_valid for call in result.tool_calls)
    assert result.choices[0].finish_reason == "tool_calls"
    received = fragments(following)
    for index, call in enumerate(result.tool_calls):
        own = [fragment for fragment in received if fragment.index == index]
        assert [fragment.id for fragment in own if fragment.id] == [call.id]
        assert [fragment.name for fragment in own if fragment.name] == [call.name]
        assert "".join(fragment.arguments or "" for fragment in own) == call.arguments
        assert len(own) > 1
    assert transcript.choices[0].tool_calls == result.tool_calls
    terminal = transcript.terminal
    assert terminal is not None
    assert terminal.tool_call_ids == ["call_a", "call_b"]


def test_arguments_that_do_not_parse_are_kept_as_text_and_marked(cluster: Cluster) -> None:
    cluster.start_worker()
    for arguments in ('{"city": "Zür', "{'city': 'Zürich'}", '{"a": 1}{"b": 2}', "[" * 5000, "plain"):
        job_id = cluster.enqueue(text="", tool_calls=[{"name": "get_weather", "id": "call_x", "arguments": arguments}])
        transcript = cluster.follow(job_id).to_the_end()
        result = cluster.result(job_id)
        (call,) = result.tool_calls
        assert (call.arguments, call.arguments_valid) == (arguments, False)
        assert transcript.choices[0].tool_calls == [call]
        assert result.status is JobStatus.COMPLETED


def test_each_of_two_choices_has_its_own_text_and_tool_calls(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    job = cluster.job(text="Grüße an beide", rate=100, tool_calls=[{"name": "look_up", "arguments": {"q": "ß"}}])
    job["request"]["n"] = 2
    job_id = cluster.client.enqueue(parse_job(job))
    following = cluster.follow(job_id)
    transcript = following.to_the_end()
    result = cluster.result(job_id)
    assert [choice.index for choice in result.choices] == [0, 1]
    for choice in result.choices:
        assert (choice.content, choice.finish_reason) == ("Grüße an beide", "tool_calls")
        assert [call.name for call in choice.tool_calls] == ["look_up"]
        joined = "".join(fragment.arguments or "" for fragment in fragments(following, choice.index))
        assert joined == choice.tool_calls[0].arguments == '{"q":"ß"}'
    assert transcript.sha256() == result.output_sha256
    assert [choice.content for choice in transcript.choices] == [choice.content for choice in result.choices]


def test_logprobs_are_stored_beside_the_choice(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    tokens = [{"token": piece, "logprob": -0.25, "bytes": list(piece.encode()), "top_logprobs": []} for piece in "Zü"]
    chunks = [
        {
            "choices": [
                {"index": 0, "delta": {"content": token["token"]}, "logprobs": {"content": [token], "refusal": None}}
            ]
        }
        for token in tokens
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    writes = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    job = cluster.job(raw={"chunks": [*writes, "data: [DONE]\n\n"]})
    job["request"]["logprobs"] = True
    result = cluster.wait_for(cluster.client.enqueue(parse_job(job)))
    assert result.text == "Zü"
    assert result.choices[0].extra is not None
    assert result.choices[0].extra["logprobs"]["content"] == tokens


def test_a_model_that_thinks_longer_than_the_first_limit_gets_more_time(cluster: Cluster) -> None:
    cluster.start_worker()
    limits = {"first_token_timeout": 1.0, "max_attempts": 8}
    result = cluster.wait_for(cluster.enqueue(limits=limits, text="at last", first_token_delay=1.5))
    assert (result.status, result.text) == (JobStatus.COMPLETED, "at last")
    assert result.attempts[0].error is not None
    assert result.attempts[0].error.code == "timeout"


def test_why_a_provider_refused_stands_with_the_attempt_and_nowhere_else(any_cluster: Cluster) -> None:
    cluster = any_cluster
    worker = cluster.start_worker()
    words = {"message": "n must be 1, not sk-live-abcdefgh", "type": "invalid_request_error", "param": "n"}
    job_id = cluster.enqueue(raw={"http_status": 400, "chunks": [json.dumps({"error": words})]})
    result = cluster.wait_for(job_id)
    assert result.status is JobStatus.FAILED
    said = result.attempts[0].provider_error
    assert said is not None
    assert said.model_dump(exclude_none=True) == {**words, "message": "n must be 1, not [removed]"}
    assert result.error is not None
    assert "must be" not in result.error.message
    events = [event.model_dump_json() for event in cluster.log(job_id)]
    assert events
    assert not [text for text in (*events, *worker.log_lines()) if "must be" in text or "sk-live" in text]


def test_a_tool_loop_with_a_model_that_wants_the_other_dialect(any_cluster: Cluster, tmp_path: Path) -> None:
    """Followers, row and the next turn are as ever; the refusal costs no attempt, and the reasoning goes back."""
    cluster = any_cluster
    file = tmp_path / "providers.toml"
    file.write_text(f'[providers.own]\nbase_url = "{cluster.provider.base_url}"\n')
    worker = cluster.start_worker(providers_file=file)
    refusal = {"error": {"message": "Please use /v1/responses instead.", "param": "reasoning_effort"}}
    script = {
        "key": "loop",
        "reasoning": "I need the weather.",
        "text": "Let me look.",
        "tool_calls": [{"name": "get_weather", "arguments": {"city": "Zürich"}}],
        "faults": [{"kind": "status", "status": 400, "body": refusal}],
    }
    question = {"role": "user", "content": "Weather?"}
    request = {"model": "m", "messages": [question], "tools": [WEATHER], "script": script}
    first = cluster.client.enqueue(request, provider="own")
    transcript = cluster.follow(first).to_the_end()
    result = cluster.result(first)
    assert [attempt.outcome for attempt in result.attempts] == ["finished"]
    (choice,) = result.choices
    assert (choice.reasoning, choice.content, choice.finish_reason) == (
        "I need the weather.",
        "Let me look.",
        "tool_calls",
    )
    assert json.loads(choice.tool_calls[0].arguments) == {"city": "Zürich"}
    assert transcript.sha256() == result.output_sha256
    assert result.usage is not None
    assert result.usage.source == "provider"
    worker.wait_to_say("dialect_learnt", model="m", api="responses")

    answer = {
        "role": "assistant",
        "content": choice.content,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ],
        "responses_output": {"provider": "own", "items": (choice.extra or {})["responses_output"]},
    }
    returned = {"role": "tool", "tool_call_id": choice.tool_calls[0].id, "content": "Rain."}
    second = cluster.client.enqueue(
        {"model": "m", "messages": [question, answer, returned], "script": {"text": "It rains."}}, provider="own"
    )
    assert cluster.wait_for(second).text == "It rains."
    asked = recorded(cluster)[-1]
    assert asked["path"] == "/v1/responses"
    assert [item["type"] for item in asked["body"]["input"]] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
    ]
    assert asked["body"]["input"][1]["encrypted_content"]
