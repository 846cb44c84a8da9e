"""Fuzz the stream reader with broken, mixed and invented streams, cut anywhere.

In: the conformance cases and a seed.
Out: progress and a final count; exit code 1 and the failing input, as a Python literal, if a promise does not hold.

However odd a provider is, the reader must not raise, hang, grow without bound, or publish something other than it
stores. Run it as ``python -m tests.fuzz.fuzz_stream --inputs 1000000``. The same seed gives the same inputs.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from keepstream_worker.providers.stream import Limits
from tests.streams import CAUSES, load_cases, play

_LIMITS: Final = Limits(
    max_event_bytes=1_500,
    max_output_bytes=60,
    max_argument_bytes=20,
    max_extra_bytes=600,
    max_choices=2,
    max_tool_calls=2,
)
_LARGEST_BODY: Final = 8_000  #: Bytes; what is larger was a test of size.
_SLOWEST_SECONDS: Final = 2.0  #: CPU time for one input of a few kilobytes, a thousand times what it takes.
_MOST_GROWTH: Final = 200 * 1024  #: KiB the process may grow by after its first inputs.
_PROGRESS_SECONDS: Final = 30.0

# Pieces that have a meaning somewhere: mutations put them where they have none.
_TOKENS: Final = (
    b"data: ", b"data:", b"event: error\n", b"event: ping\n", b"error: {}\n", b": c\n", b"id: 1\n", b"\n", b"\n\n",
    b"\r\n", b"[DONE]", b"data: [DONE]\n\n", b"null", b"true", b"0", b"-1", b"1e999", b"NaN", b'""', b"[]", b"{}",
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\x00", b"\\u0000", b"\\ud83d", b"\\ude00", b"\xef\xbb\xbf",
    b"\xff", b"\xf0\x9f", b"9" * 5000, b"[" * 1200, b'{"a":' * 300, b"<html>", b'"stop"', b'"error"', b'"index":0,',
    b'"index":null', b'"error":{"code":500},', b'"id":"a",', b'"name":"f",', b'"arguments":"{",', b'"usage":{"a":1},',
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz the stream reader.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    seeds = [case.body for case in load_cases() if case.http_status == 200 and len(case.body) <= _LARGEST_BODY]
    start = reported = time.monotonic()
    ends: dict[str, int] = {}
    memory_at_first = 0
    for number in range(options.inputs):
        rng = random.Random(f"{options.seed}:{number}")
        body = rng.choice(_MAKERS)(rng, seeds)
        cause = rng.choice([None, None, *CAUSES.values()])
        try:
            end = _try(body, cause, rng)
        except BaseException:
            _tell(f"input {number} of seed {options.seed} failed: {body!r}")
            raise
        ends[end] = ends.get(end, 0) + 1
        if number == 2_000:
            memory_at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            _tell(f"{number + 1} inputs, {reported - start:.0f} s")
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_at_first if memory_at_first else 0
    seconds = time.monotonic() - start
    tally = dict(sorted(ends.items()))
    _tell(f"{options.inputs} inputs in {seconds:.0f} s, grown by {growth} KiB, ends: {tally}")
    return 1 if growth > _MOST_GROWTH else 0


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _try(body: bytes, cause: Any, rng: random.Random) -> str:
    """Play one input whole and in pieces; ``play`` itself checks the promises."""
    limits = rng.choice([None, None, _LIMITS])
    start = time.process_time()
    played = play(pieces(body, rng), cause, limits=limits)
    if rng.random() < 0.3:
        assert play([body], cause, limits=limits).seen() == played.seen()
    assert time.process_time() - start < _SLOWEST_SECONDS
    return played.failure.code.value if played.failure else "completed"


def pieces(body: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield ``body`` in pieces: many small ones, few large ones, or anything between."""
    (most,) = rng.choices([1, 4, 30, 300, 5_000], weights=[1, 1, 6, 6, 6])
    place = 0
    while place < len(body):
        size = rng.randint(1, most)
        yield body[place : place + size]
        place += size


# -- inputs -------------------------------------------------------------------------------------------------


def _mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    body = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 4, 10])):
        place = rng.randint(0, len(body))
        match rng.randrange(6):
            case 0:
                body[place:place] = rng.choice(_TOKENS)
            case 1:
                del body[place : place + rng.randint(1, 30)]
            case 2:
                body[place : place + 1] = rng.randbytes(1)
            case 3:
                del body[place:]
            case 4:
                other = rng.choice(seeds)
                body[place:place] = other[rng.randint(0, len(other)) :][: rng.randint(0, 400)]
            case _:
                token = rng.choice(_TOKENS)
                body[place : place + len(token)] = token
    return bytes(body[:_LARGEST_BODY])


def _spliced(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Whole events of several streams, shuffled, repeated and dropped."""
    events = [event for _ in range(3) for event in rng.choice(seeds).split(b"\n\n")]
    return b"\n\n".join(rng.choices(events, k=rng.randint(1, 12))) + b"\n\n"


def _made_up(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Chunks whose fields are missing, usual or of any type."""
    lines = [json.dumps(_chunk(rng), ensure_ascii=rng.random() < 0.7) for _ in range(rng.randint(1, 12))]
    end = rng.choice(["\n\n", "\n\n", "\r\n\r\n", "\r\r"])
    text = "".join(f"data: {line}{end}" for line in lines) + rng.choice(["", "data: [DONE]" + end])
    return text.encode(errors="surrogatepass")


def _any_json(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [_any_json(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 8:
        return {_any_text(rng): _any_json(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice([None, True, 0, -1, 2**70, 0.5, float("nan"), "", "null", _any_text(rng), _any_text(rng)])


def _any_text(rng: random.Random) -> str:
    return "".join(
        rng.choices(
            ["a", "b", " ", "{", "}", '"', "\\", "\x00", "\n", "é", "€", "😀", "\ud83d", "\ude00"], k=rng.randrange(6)
        )
    )


def _object(rng: random.Random, **fields: Callable[[], Any]) -> dict[str, Any]:
    """Return an object whose fields are mostly as given, sometimes missing, rarely of any type."""
    made = {}
    for name, make in fields.items():
        chance = rng.random()
        if chance < 0.75:
            made[name] = make()
        elif chance < 0.8:
            made[name] = _any_json(rng)
    if rng.random() < 0.05:
        made[_any_text(rng)] = _any_json(rng)
    return made


def _chunk(rng: random.Random) -> Any:
    rare = {
        "error": lambda: _error(rng),
        "x_groq": lambda: {"usage": _usage(rng), "error": rng.choice([None, None, _error(rng)])},
        "code": lambda: rng.choice([0, 400, 500]),
        "message": lambda: _any_text(rng),
        "citations": lambda: ["x"],
        "base_resp": lambda: {"status_code": rng.choice([0, 1002])},
    }
    some = {name: make for name, make in rare.items() if rng.random() < 0.04}
    chunk = _object(
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
        "logprobs": lambda: {"content": [{"token": _any_text(rng)}]},
        "content_filter_results": lambda: {"a": {"filtered": False}},
    }
    some = {name: make for name, make in rare.items() if rng.random() < 0.06}
    return _object(
        rng,
        index=lambda: rng.choice([0, 0, 0, 1, 2, "1", None]),
        delta=lambda: _delta(rng),
        finish_reason=lambda: rng.choice([None] * 8 + ["", "stop", "length", "error", "null"]),
        **some,
    )


def _delta(rng: random.Random) -> dict[str, Any]:
    usual = {
        "role": lambda: "assistant",
        "content": lambda: rng.choice([_any_text(rng), _parts(rng)]),
        "reasoning_content": lambda: _any_text(rng),
        "reasoning": lambda: _any_text(rng),
        "reasoning_details": lambda: _parts(rng),
        "refusal": lambda: _any_text(rng),
        "tool_calls": lambda: [_fragment(rng) for _ in range(rng.choice([1, 1, 2]))],
        "function_call": lambda: {"name": rng.choice(["", "f"]), "arguments": _any_text(rng)},
        "audio": lambda: rng.choice([{"data": "AA"}, {"expires_at": 1}]),
        "annotations": lambda: [{"type": "url_citation"}],
        "thinking": lambda: rng.choice([_any_text(rng), _any_json(rng)]),
        "plan": lambda: rng.choice([_any_text(rng), "a", _any_json(rng)]),
        "images": lambda: [{"type": "image_url"}],
    }
    chosen = rng.choices(["content", "tool_calls", *usual], k=rng.choice([1, 1, 2, 4]))
    return _object(rng, **{name: usual[name] for name in chosen})


def _parts(rng: random.Random) -> list[Any]:
    kinds = ("text", "thinking", "reasoning", "refusal", "image_url", "reasoning.encrypted")
    return [
        _object(rng, type=lambda: rng.choice(kinds), text=lambda: _any_text(rng), thinking=lambda: _any_json(rng))
        for _ in range(rng.randrange(3))
    ]


def _fragment(rng: random.Random) -> dict[str, Any]:
    function = _object(
        rng,
        name=lambda: rng.choice(["f", "fg", "g", "", None, _any_text(rng)]),
        arguments=lambda: rng.choice([_any_text(rng), "{}", '{"a":1}', "null", "", None, {"a": _any_json(rng)}]),
    )
    return _object(
        rng,
        index=lambda: rng.choice([0, 0, 1, 2, "0", None]),
        id=lambda: rng.choice(["a", "b", "", "null", None, _any_text(rng)]),
        type=lambda: rng.choice(["function", "custom"]),
        **{rng.choice(["function", "function", "custom"]): lambda: function},
        extra_content=lambda: rng.choice([None, None, {"google": {"thought_signature": "A"}}]),
    )


def _usage(rng: random.Random) -> dict[str, Any]:
    return _object(
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
            _object(
                rng, code=lambda: rng.choice([400, 503, "429", "x"]), message=lambda: _any_text(rng), type=lambda: "t"
            ),
        ]
    )


_MAKERS: Final = (_mutated, _mutated, _spliced, _made_up, _made_up)

if __name__ == "__main__":
    sys.exit(main())
