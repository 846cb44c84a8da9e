"""The comparison: what a server sent, what two followers held, and what the row holds.

In: the body of an answer, two followers at their end, and the stored result.
Out: one ``Comparison`` per case, with each difference in words.

The body is read by the simplest possible readers, one for each dialect, rather than our own decoder. They suffice for
these servers, but would not for most.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from keepstream.results import CompletionResult, JobStatus, UsageSource
from keepstream.transcript import Transcript
from tests.interop.servers import Case

_CHAT_NAMES = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}
Calls = list[tuple[str, str, str]]  # id, name, arguments


@dataclass(slots=True)
class Answer:
    """What a server sent."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))  #: By choice.
    reasoning: str = ""  #: Of the first choice.
    calls: Calls = field(default_factory=list)  #: Of the first choice.
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of one case."""

    answer: Answer
    result: CompletionResult
    problems: list[str]  #: Empty if everything agrees.


def read(case: Case, body: bytes) -> Answer:
    """Read the answer to a case."""
    answer = _read_events(body) if case.api == "responses" else _read_chunks(body)
    answer.texts = {index: _whole(text) for index, text in answer.texts.items()}
    answer.reasoning = _whole(answer.reasoning)
    return answer


def _whole(text: str) -> str:
    """Join the surrogate pairs that were sent in two events."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _data(body: bytes) -> Iterator[Any]:
    """Yield the data of an event stream of the simplest kind: one line of it per event."""
    for line in body.decode().split("\n"):
        data = line.removeprefix("data: ")
        if data not in (line, "[DONE]"):  # no data, or no JSON
            yield json.loads(data)


def _read_events(body: bytes) -> Answer:
    """Read events of the Responses API: texts as they grow, calls when they are whole."""
    answer = Answer(texts={0: ""})
    for event in _data(body):
        match event["type"]:
            case "response.output_text.delta":
                answer.texts[0] += event["delta"]
            case "response.reasoning_summary_text.delta":
                answer.reasoning += event["delta"]
            case "response.output_item.done" if event["item"]["type"] == "function_call":
                item = event["item"]
                answer.calls.append((item["call_id"], item["name"], item["arguments"]))
            case "response.completed":
                answer.finish_reasons[0] = "tool_calls" if answer.calls else "stop"
                usage = event["response"].get("usage") or {}
                answer.usage = {_CHAT_NAMES.get(name, name): value for name, value in usage.items()} or None
    return answer


def _read_chunks(body: bytes) -> Answer:
    """Read chunks of chat completions."""
    answer = Answer()
    for chunk in _data(body):
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            answer.texts[choice["index"]] += delta.get("content") or ""
            answer.reasoning += delta.get("reasoning_content") or ""
            for fragment in delta.get("tool_calls") or ():
                _add(answer.calls, fragment)
            if choice.get("finish_reason"):
                answer.finish_reasons[choice["index"]] = choice["finish_reason"]
    return answer


def _add(calls: Calls, fragment: dict[str, Any]) -> None:
    function = fragment["function"]
    if fragment.get("id"):
        calls.append((fragment["id"], function["name"], function["arguments"]))
    else:
        call_id, name, arguments = calls.pop()
        calls.append((call_id, name, arguments + function["arguments"]))


def compare(case: Case, answer: Answer, result: CompletionResult, followers: list[Transcript]) -> Comparison:
    """Compare what was asked for, sent, followed and stored."""
    problems = []

    def expect(what: str, expected: object, got: object) -> None:
        if expected != got:
            problems.append(f"{what}: expected {expected!r}, got {got!r}")

    contents = {choice.index: choice.content for choice in result.choices}
    digest = hashlib.sha256("".join(contents[index] for index in sorted(contents)).encode()).hexdigest()
    expect("status", JobStatus.COMPLETED, result.status)
    expect("attempts", 1, len(result.attempts))
    expect("text, as configured", dict(enumerate(case.texts)), contents)
    expect("text, as sent", dict(answer.texts), contents)
    expect("reasoning, as configured", case.reasoning, result.choices[0].reasoning)
    expect("reasoning, as sent", answer.reasoning, result.choices[0].reasoning)
    expect("stored SHA-256", digest, result.output_sha256)

    calls = [(call.id, call.name, call.arguments) for call in result.tool_calls]
    given = [(call["name"], call["arguments"]) for call in case.calls]
    expect("tool calls, as configured", given, [(name, json.loads(arguments)) for _, name, arguments in calls])
    expect("tool calls, as sent", answer.calls, calls)
    expect("arguments that parse", [True] * len(calls), [call.arguments_valid for call in result.tool_calls])
    reasons = {choice.index: choice.finish_reason for choice in result.choices if choice.finish_reason}
    expect("finish reasons, as sent", answer.finish_reasons, reasons)

    spent = result.attempts[0].usage
    assert spent is not None
    expect("usage, as sent", answer.usage, spent.details)
    expect("source of usage", UsageSource.PROVIDER if answer.usage else UsageSource.ESTIMATED, spent.source)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens") if answer.usage else ():
        expect(name, (answer.usage or {}).get(name), getattr(spent, name))

    for number, held in enumerate(followers, 1):
        expect(f"follower {number}: SHA-256", digest, held.sha256())
        expect(f"follower {number}: text", contents, {choice.index: choice.content for choice in held.choices})
        expect(f"follower {number}: reasoning", case.reasoning, held.choices[0].reasoning)
        expect(f"follower {number}: tool calls", result.tool_calls, held.choices[0].tool_calls)
        terminal = held.terminal
        expect(f"follower {number}: last event's SHA-256", digest, terminal.output_sha256 if terminal else None)
    return Comparison(answer, result, problems)
