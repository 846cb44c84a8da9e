"""Streams for tests: the conformance cases as bytes, and a stream played to the reader.

In: the files of cases in ``conformance``.
Out: cases, and what the reader made of a stream, to unit tests and the fuzzer.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from keepstream.errors import ErrorCode
from keepstream.extras import Extras, merged_extra, omissions
from keepstream_worker.providers.stream import Limits, Output, StreamReader
from keepstream_worker.values import Delta, Failure

_CASES: Final = Path(__file__).parent / "conformance"
#: The files of cases, by the dialect in which the provider was asked.
FILES: Final = {"chat": "sse_cases.jsonl", "responses": "responses_cases.jsonl"}
CAUSES: Final[dict[str, Failure | None]] = {
    "clean": None,
    "reset": Failure(ErrorCode.CONNECTION, "the connection was reset"),
    "stall": Failure(ErrorCode.TIMEOUT, "nothing came any more"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the file of cases."""

    name: str
    http_status: int
    headers: dict[str, str]
    chunks: list[bytes]
    cause: Failure | None  #: What the transport says at the end.
    expect: dict[str, Any]
    responses: bool = False  #: Whether the provider was asked by the Responses API.
    hard: bool = False  #: Whether it was made up to be hard: nobody has seen quite this.

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


def load_cases(dialect: str = "chat") -> list[Case]:
    """Return all cases of a dialect."""
    return [case for prefix in ("", "hard_") for case in _load_file(dialect, prefix)]


def _load_file(dialect: str, prefix: str) -> list[Case]:
    text = (_CASES / f"{prefix}{FILES[dialect]}").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    return [
        Case(
            name=line["name"],
            http_status=line["http_status"],
            headers=line["headers"],
            chunks=[base64.b64decode(c["b64"]) if isinstance(c, dict) else c.encode() for c in line["chunks"]],
            cause=CAUSES[line["close"]],
            expect=line["expect"],
            responses=dialect == "responses",
            hard=bool(prefix),
        )
        for line in lines
    ]


@dataclass(frozen=True, slots=True)
class Played:
    """What the reader made of a stream."""

    failure: Failure | None
    output: Output
    deltas: list[Delta]

    def seen(self) -> tuple[Failure | None, Output, dict[int, dict[str, Any]]]:
        """What must not depend on how the bytes were split."""
        return self.failure, self.output, joined(self.deltas)


def play(
    pieces: Iterable[bytes],
    cause: Failure | None = None,
    *,
    limits: Limits | None = None,
    done_completes: bool = True,
    responses: bool = False,
) -> Played:
    """Feed ``pieces`` to a reader until it is done, then finish it, checking its promises on the way."""
    reader = StreamReader(limits, done_completes=done_completes, call_seed="job-1", responses=responses)
    deltas: list[Delta] = []
    for piece in pieces:
        if reader.done:
            break
        deltas += reader.feed(piece)
    failure = reader.finish(cause)
    deltas += reader.final_deltas
    output = reader.output()
    check(deltas, output)
    return Played(failure, output, deltas)


def check(deltas: Sequence[Delta], output: Output) -> None:
    """Check what holds for every stream: the deltas add up to the output, and all of it can be stored."""
    for _, fields in deltas:
        check_fields(fields)
    held = joined(deltas)
    for choice in output.choices:
        calls = [call.model_dump(exclude={"arguments_valid"}) for call in choice.tool_calls]
        texts = {"content": choice.content, "reasoning": choice.reasoning, "refusal": choice.refusal}
        nothing: dict[str, Any] = {"content": "", "reasoning": "", "refusal": "", "tool_calls": [], "extra": None}
        told = held.get(choice.index, nothing)
        extra = choice.extra if not omissions(told["extra"]) else told["extra"]
        assert told == {**texts, "tool_calls": calls, "extra": extra}
    assert held.keys() <= {choice.index for choice in output.choices}
    for part in (*(choice.model_dump() for choice in output.choices), output.usage, output.provider_details):
        text = json.dumps(part, allow_nan=False, ensure_ascii=False)
        text.encode()  # no lone surrogate
        assert "\\u0000" not in text.replace("\\\\", "")


def check_fields(fields: dict[str, Any]) -> None:
    """Check that a delta conforms to the contract and is not empty."""
    assert fields
    assert fields.keys() <= {"content", "reasoning", "refusal", "tool_calls", "extra"}
    for name, value in fields.items():
        assert value
        if name == "extra":
            assert isinstance(value, dict)
            orjson.dumps(value)
        elif name != "tool_calls":
            assert isinstance(value, str)
        else:
            for fragment in value:
                assert {"index"} < fragment.keys() <= {"index", "id", "type", "name", "arguments", "extra"}
                texts = [part for key, part in fragment.items() if key not in {"index", "extra"}]
                assert all(isinstance(part, str) and part for part in texts)


def joined(deltas: Iterable[Delta]) -> dict[int, dict[str, Any]]:
    """Return what a follower holds after applying ``deltas``."""
    held: dict[int, dict[str, Any]] = {}
    for index, fields in deltas:
        choice = held.setdefault(
            index, {"content": [], "reasoning": [], "refusal": [], "tool_calls": [], "extra": Extras()}
        )
        for name, value in fields.items():
            if name == "extra":
                for field, piece in value.items():
                    choice["extra"].add(field, piece)
                continue
            if name != "tool_calls":
                choice[name].append(value)
                continue
            for fragment in value:
                if fragment["index"] == len(choice["tool_calls"]):
                    choice["tool_calls"].append(
                        {"id": fragment["id"], "type": "function", "name": "", "arguments": [], "extra": None}
                    )
                call = choice["tool_calls"][fragment["index"]]
                call["id"] = fragment.get("id", call["id"])
                call["name"] = fragment.get("name", call["name"])
                call["type"] = fragment.get("type", call["type"])
                call["arguments"].append(fragment.get("arguments", ""))
                if "extra" in fragment:
                    call["extra"] = merged_extra(call["extra"], fragment["extra"])
    for choice in held.values():
        for name in ("content", "reasoning", "refusal"):
            choice[name] = "".join(choice[name])
        choice["extra"] = choice["extra"].value()
        for call in choice["tool_calls"]:
            call["arguments"] = "".join(call["arguments"])
    return held
