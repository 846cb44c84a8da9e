"""The comparison: what a server sent, what two followers held, and what the row holds.

In: the body of an answer, two followers at their end, and the stored result.
Out: one ``Comparison`` per case, with each difference in words.

The body is read by the simplest possible reader rather than our own decoder. It suffices for these servers, but
would not for most.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from keepstream.results import CompletionResult, JobStatus, UsageSource
from keepstream.transcript import Transcript
from tests.interop.servers import Case

Calls = list[tuple[str, str, str]]  # id, name, arguments


@dataclass(slots=True)
class Answer:
    """What a server sent."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))  #: By choice.
    calls: Calls = field(default_factory=list)  #: Of the first choice.
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of one case."""

    answer: Answer
    result: CompletionResult
    problems: list[str]  #: Empty if everything agrees.


def read(body: bytes) -> Answer:
    """Read an event stream of the simplest kind: one line per event, with data only."""
    answer = Answer()
    for line in body.decode().split("\n"):
        data = line.removeprefix("data: ")
        if data in (line, "[DONE]"):  # no data, or no JSON
            continue
        chunk = json.loads(data)
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            answer.texts[choice["index"]] += delta.get("content") or ""
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
        expect(f"follower {number}: tool calls", result.tool_calls, held.choices[0].tool_calls)
        terminal = held.terminal
        expect(f"follower {number}: last event's SHA-256", digest, terminal.output_sha256 if terminal else None)
    return Comparison(answer, result, problems)
