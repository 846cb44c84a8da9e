"""Made-up events of the Responses API, for the fuzzer.

In: random numbers.
Out: the events of one answer, whose fields are missing, usual or of any type, in an order that is roughly the usual.
"""

import random
from collections.abc import Callable
from typing import Any, Final

from tests.fuzz.any_values import any_json, any_object, any_text, just

_CALLS: Final = ("function_call", "custom_tool_call")
_ITEMS: Final = (
    "message",
    "message",
    "reasoning",
    "function_call",
    "function_call",
    "custom_tool_call",
    "web_search_call",
)


def any_events(rng: random.Random) -> list[Any]:
    """Return the events of an answer."""
    events = [_event(rng, "response.created", response=lambda: _response(rng, "in_progress"))]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        events += _of_item(rng, rng.choice(_ITEMS))
    if rng.random() < 0.2:
        rng.shuffle(events)
    if rng.random() < 0.1:
        events.insert(rng.randint(0, len(events)), _odd(rng))
    if rng.random() < 0.85:
        kind = rng.choice(["completed"] * 6 + ["incomplete", "failed", "done", "cancelled"])
        events.append(_event(rng, f"response.{kind}", response=lambda: _response(rng, kind)))
    return events


def _event(rng: random.Random, kind: str, **fields: Callable[[], Any]) -> dict[str, Any]:
    made = any_object(rng, sequence_number=lambda: rng.randrange(9), **fields)
    return made if rng.random() < 0.02 else {"type": kind, **made}


def _of_item(rng: random.Random, kind: str) -> list[Any]:
    index, item_id = rng.choice([0, 0, 1, 2, "1", None]), rng.choice(["a", "b", "", None, any_text(rng)])

    def place(kind: str, **fields: Callable[[], Any]) -> dict[str, Any]:
        return _event(rng, kind, output_index=lambda: index, item_id=lambda: item_id, **fields)

    item = _item(rng, kind, item_id)
    events = [place("response.output_item.added", item=lambda: item | {"content": [], "arguments": ""})]
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        part = rng.choice([0, 0, 1, None])
        match kind:
            case "message":
                name = rng.choice(["output_text", "output_text", "output_text", "refusal"])
                events.append(place(f"response.{name}.delta", content_index=just(part), delta=lambda: any_text(rng)))
                if rng.random() < 0.2:
                    events.append(
                        place("response.output_text.annotation.added", annotation=lambda: {"type": "url_citation"})
                    )
            case "reasoning":
                name = rng.choice(["reasoning_summary_text", "reasoning_summary_text", "reasoning_text"])
                events.append(place(f"response.{name}.delta", summary_index=just(part), delta=lambda: any_text(rng)))
            case "function_call":
                piece = rng.choice(["{", "}", "{}", '{"a":1}', any_text(rng)])
                events.append(place("response.function_call_arguments.delta", delta=just(piece)))
            case _:
                events.append(place("response.custom_tool_call_input.delta", delta=lambda: any_text(rng)))
    if rng.random() < 0.6:
        events.append(_whole(rng, kind, place))
    if rng.random() < 0.8:
        events.append(place("response.output_item.done", item=lambda: _item(rng, kind, item_id)))
    return events


def _whole(rng: random.Random, kind: str, place: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    match kind:
        case "message":
            return place("response.output_text.done", content_index=lambda: 0, text=lambda: any_text(rng))
        case "reasoning":
            return place("response.reasoning_summary_text.done", summary_index=lambda: 0, text=lambda: any_text(rng))
        case "function_call":
            return place(
                "response.function_call_arguments.done",
                arguments=lambda: rng.choice(["{}", '{"a":1}', "", any_text(rng)]),
                name=lambda: rng.choice(["f", ""]),
            )
    return place("response.custom_tool_call_input.done", input=lambda: any_text(rng))


def _item(rng: random.Random, kind: str, item_id: str | None) -> dict[str, Any]:
    fields: dict[str, Callable[[], Any]] = {"id": lambda: item_id, "status": lambda: "completed"}
    if kind in _CALLS:
        fields |= {
            "call_id": lambda: rng.choice(["a", "c", "", None, any_text(rng)]),
            "name": lambda: rng.choice(["f", "g", "", None, any_text(rng)]),
            "arguments": lambda: rng.choice(["{}", '{"a":1}', "", any_text(rng)]),
            "input": lambda: any_text(rng),
        }
    else:
        fields |= {
            "role": lambda: "assistant",
            "phase": lambda: rng.choice(["commentary", "final_answer", None]),
            "content": lambda: [_part(rng, "output_text") for _ in range(rng.randrange(3))],
            "summary": lambda: [_part(rng, "summary_text") for _ in range(rng.randrange(3))],
            "encrypted_content": lambda: any_text(rng),
        }
    return {"type": kind, **any_object(rng, **fields)}


def _part(rng: random.Random, kind: str) -> dict[str, Any]:
    return any_object(
        rng,
        type=lambda: kind,
        text=lambda: any_text(rng),
        refusal=lambda: rng.choice([None, any_text(rng)]),
        annotations=lambda: rng.choice([[], [{"type": "url_citation", "url": any_text(rng)}]]),
    )


def _response(rng: random.Random, status: str) -> dict[str, Any]:
    return any_object(
        rng,
        id=lambda: "resp_1",
        status=lambda: status,
        model=lambda: "m",
        output=lambda: [_item(rng, rng.choice(_ITEMS), rng.choice(["a", "b", ""])) for _ in range(rng.randrange(3))],
        usage=lambda: rng.choice([None, {"input_tokens": 3, "output_tokens": any_json(rng)}]),
        error=lambda: rng.choice([None] * 8 + [{"code": rng.choice(["rate_limit_exceeded", 500]), "message": "m"}]),
        incomplete_details=lambda: rng.choice([None, None, {"reason": rng.choice(["max_output_tokens", "x"])}]),
    )


def _odd(rng: random.Random) -> Any:
    return rng.choice(
        [
            {"type": "error", "code": rng.choice([None, 500, "x"]), "message": any_text(rng)},
            {"type": "keepalive"},
            {"choices": []},
            {"error": any_json(rng)},
            any_json(rng),
        ]
    )
