"""Made-up chunks of chat completions, for the fuzzer.

In: random numbers.
Out: chunks whose fields are missing, usual or of any type.
"""

import random
from typing import Any

from tests.fuzz.any_values import any_json, any_object, any_text


def any_chunk(rng: random.Random) -> Any:
    """Return a chunk."""
    rare = {
        "error": lambda: _error(rng),
        "x_groq": lambda: {"usage": _usage(rng), "error": rng.choice([None, None, _error(rng)])},
        "code": lambda: rng.choice([0, 400, 500]),
        "message": lambda: any_text(rng),
        "citations": lambda: ["x"],
        "base_resp": lambda: {"status_code": rng.choice([0, 1002])},
    }
    some = {name: make for name, make in rare.items() if rng.random() < 0.04}
    chunk = any_object(
        rng,
        id=lambda: "cc-1",
        model=lambda: "m",
        choices=lambda: [_choice(rng) for _ in range(rng.choice([0, 1, 1, 1, 2]))],
        usage=lambda: rng.choice([None, None, _usage(rng)]),
        **some,
    )
    return rng.choice([[chunk], [chunk, chunk]]) if rng.random() < 0.03 else chunk


def _choice(rng: random.Random) -> dict[str, Any]:
    rare = {
        "message": lambda: _delta(rng),
        "error": lambda: _error(rng),
        "usage": lambda: _usage(rng),
        "logprobs": lambda: {"content": [{"token": any_text(rng)}]},
        "content_filter_results": lambda: {"a": {"filtered": False}},
    }
    some = {name: make for name, make in rare.items() if rng.random() < 0.06}
    return any_object(
        rng,
        index=lambda: rng.choice([0, 0, 0, 1, 2, "1", None]),
        delta=lambda: _delta(rng),
        finish_reason=lambda: rng.choice([None] * 8 + ["", "stop", "length", "error", "null"]),
        **some,
    )


def _delta(rng: random.Random) -> dict[str, Any]:
    usual = {
        "role": lambda: "assistant",
        "content": lambda: rng.choice([any_text(rng), _parts(rng)]),
        "reasoning_content": lambda: any_text(rng),
        "reasoning": lambda: any_text(rng),
        "reasoning_details": lambda: _parts(rng),
        "refusal": lambda: any_text(rng),
        "tool_calls": lambda: [_fragment(rng) for _ in range(rng.choice([1, 1, 2]))],
        "function_call": lambda: {"name": rng.choice(["", "f"]), "arguments": any_text(rng)},
        "audio": lambda: rng.choice([{"data": "AA"}, {"expires_at": 1}]),
        "annotations": lambda: [{"type": "url_citation"}],
        "thinking": lambda: rng.choice([any_text(rng), any_json(rng)]),
        "plan": lambda: rng.choice([any_text(rng), "a", any_json(rng)]),
        "images": lambda: [{"type": "image_url"}],
    }
    chosen = rng.choices(["content", "tool_calls", *usual], k=rng.choice([1, 1, 2, 4]))
    return any_object(rng, **{name: usual[name] for name in chosen})


def _parts(rng: random.Random) -> list[Any]:
    kinds = ("text", "thinking", "reasoning", "refusal", "image_url", "reasoning.encrypted")
    return [
        any_object(rng, type=lambda: rng.choice(kinds), text=lambda: any_text(rng), thinking=lambda: any_json(rng))
        for _ in range(rng.randrange(3))
    ]


def _fragment(rng: random.Random) -> dict[str, Any]:
    function = any_object(
        rng,
        name=lambda: rng.choice(["f", "fg", "g", "", None, any_text(rng)]),
        arguments=lambda: rng.choice([any_text(rng), "{}", '{"a":1}', "null", "", None, {"a": any_json(rng)}]),
    )
    return any_object(
        rng,
        index=lambda: rng.choice([0, 0, 1, 2, "0", None]),
        id=lambda: rng.choice(["a", "b", "", "null", None, any_text(rng)]),
        type=lambda: rng.choice(["function", "custom"]),
        **{rng.choice(["function", "function", "custom"]): lambda: function},
        extra_content=lambda: rng.choice([None, None, {"google": {"thought_signature": "A"}}]),
    )


def _usage(rng: random.Random) -> dict[str, Any]:
    return any_object(
        rng,
        prompt_tokens=lambda: rng.choice([0, 3, None, "4", 5.0]),
        completion_tokens=lambda: rng.choice([0, 7]),
        total_tokens=lambda: rng.choice([0, 9, 10**30]),
        completion_tokens_details=lambda: {"reasoning_tokens": rng.choice([0, 1])},
    )


def _error(rng: random.Random) -> Any:
    return rng.choice(
        [
            None,
            {},
            "text",
            any_object(
                rng, code=lambda: rng.choice([400, 503, "429", "x"]), message=lambda: any_text(rng), type=lambda: "t"
            ),
        ]
    )
