"""Fuzz the stream reader, in both dialects, with broken, mixed and invented streams, cut anywhere.

In: the conformance cases and a seed.
Out: progress and a final count; exit code 1 and the failing input, as a Python literal, if a promise does not hold.

However odd a provider is, the reader must not raise, hang, grow without bound, or publish something other than it
stores. Run it as ``python -m tests.fuzz.fuzz_stream --inputs 1000000``. The same seed gives the same inputs.
"""

import argparse
import copy
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from keepstream_worker.providers.stream import Limits
from keepstream_worker.values import Failure
from tests.fuzz.any_values import any_json, any_text
from tests.fuzz.chat_chunks import any_chunk
from tests.fuzz.responses_events import any_events
from tests.streams import CAUSES, FILES, load_cases, play

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


@dataclass(frozen=True, slots=True)
class _Dialect:
    """One dialect: real answers, and how to make up more."""

    responses: bool
    seeds: list[bytes]
    invent: Callable[[random.Random], bytes]

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the dialect of this name."""
        seeds = [case.body for case in load_cases(name) if case.http_status == 200 and len(case.body) <= _LARGEST_BODY]
        return cls(name == "responses", seeds, _INVENTORS[name])


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz the stream reader.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of each dialect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialect", choices=list(FILES), action="append", help="default: all; may be repeated")
    options = parser.parse_args(arguments)
    return max(_fuzz(name, options.inputs, options.seed) for name in options.dialect or FILES)


def _fuzz(name: str, inputs: int, seed: int) -> int:
    dialect = _Dialect.named(name)
    start = reported = time.monotonic()
    ends: dict[str, int] = {}
    memory_at_first = 0
    for number in range(inputs):
        rng = random.Random(f"{seed}:{number}")
        body = rng.choice(_MAKERS)(rng, dialect)
        cause = rng.choice([None, None, *CAUSES.values()])
        try:
            end = _try(body, cause, rng, responses=dialect.responses)
        except BaseException:
            _tell(f"{name}: input {number} of seed {seed} failed: {body!r}")
            raise
        ends[end] = ends.get(end, 0) + 1
        if number == 2_000:
            memory_at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            _tell(f"{name}: {number + 1} inputs, {reported - start:.0f} s")
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_at_first if memory_at_first else 0
    seconds = time.monotonic() - start
    tally = dict(sorted(ends.items()))
    _tell(f"{name}: {inputs} inputs in {seconds:.0f} s, grown by {growth} KiB, ends: {tally}")
    return 1 if growth > _MOST_GROWTH else 0


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _try(body: bytes, cause: Failure | None, rng: random.Random, *, responses: bool) -> str:
    """Play one input whole and in pieces; ``play`` itself checks the promises."""
    limits = rng.choice([None, None, _LIMITS])
    start = time.perf_counter()
    played = play(pieces(body, rng), cause, limits=limits, responses=responses)
    if time.perf_counter() - start > _SLOWEST_SECONDS:  # slow, or this machine is busy
        start = time.process_time()
        play(pieces(body, rng), cause, limits=limits, responses=responses)
        assert time.process_time() - start < _SLOWEST_SECONDS
    if rng.random() < 0.3:
        assert play([body], cause, limits=limits, responses=responses).seen() == played.seen()
    return played.failure.code.value if played.failure else "completed"


def pieces(body: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield ``body`` in pieces: many small ones, few large ones, or anything between; rarely the costly small ones."""
    (most,) = rng.choices([1, 4, 30, 300, 5_000], weights=[1, 2, 12, 40, 40])
    place = 0
    while place < len(body):
        size = rng.randint(1, most)
        yield body[place : place + size]
        place += size


# -- inputs -------------------------------------------------------------------------------------------------


def _mutated(rng: random.Random, dialect: _Dialect) -> bytes:
    body = bytearray(rng.choice(dialect.seeds))
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
                other = rng.choice(dialect.seeds)
                body[place:place] = other[rng.randint(0, len(other)) :][: rng.randint(0, 400)]
            case _:
                token = rng.choice(_TOKENS)
                body[place : place + len(token)] = token
    return bytes(body[:_LARGEST_BODY])


def _spliced(rng: random.Random, dialect: _Dialect) -> bytes:
    """Whole events of several streams, shuffled, repeated and dropped."""
    events = [event for _ in range(3) for event in rng.choice(dialect.seeds).split(b"\n\n")]
    return b"\n\n".join(rng.choices(events, k=rng.randint(1, 12))) + b"\n\n"


def _rearranged(rng: random.Random, dialect: _Dialect) -> bytes:
    """A real answer, event by event: some are missing, repeated or elsewhere, and some fields are others."""
    events = [event for line in rng.choice(dialect.seeds).split(b"\n") if (event := _event_in(line)) is not None]
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        if not events:
            break
        place = rng.randrange(len(events))
        match rng.randrange(5):
            case 0:
                del events[place]
            case 1:
                events.insert(rng.randrange(len(events)), copy.deepcopy(events[place]))
            case 2:
                events.insert(rng.randrange(len(events)), events.pop(place))
            case 3:
                _alter(rng, events[place])
            case _:  # some servers never send a field, or always the same value
                name = rng.choice(_TELLING)
                value = rng.choice([_GONE, _GONE, 0, "x", "", None])
                for event in events:
                    _set_everywhere(event, name, value)
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + rng.choice(
        [b"", b"data: [DONE]\n\n"]
    )


def _event_in(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.removeprefix(b"data:"), strict=False)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _alter(rng: random.Random, value: Any) -> None:
    """Change, remove or repeat one thing somewhere in a value."""
    while isinstance(value, dict | list) and value:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        match rng.randrange(4):
            case 0:
                del value[key]
            case 1 if isinstance(value, list):
                value.insert(key, copy.deepcopy(value[key]))
            case 2 if isinstance(value[key], str):
                value[key] = rng.choice([value[key][:-1], value[key] + "a", value[key] * 2, any_text(rng)])
            case _:
                value[key] = any_json(rng)
        return


def _set_everywhere(value: Any, name: str, new: Any) -> None:
    if isinstance(value, dict):
        if name in value:
            if new is _GONE:
                del value[name]
            else:
                value[name] = new
        for inner in value.values():
            _set_everywhere(inner, name, new)
    elif isinstance(value, list):
        for inner in value:
            _set_everywhere(inner, name, new)


def _made_up(rng: random.Random, dialect: _Dialect) -> bytes:
    """Chunks whose fields are missing, usual or of any type."""
    return dialect.invent(rng)


def _of_chunks(rng: random.Random) -> bytes:
    return _sent(rng, [any_chunk(rng) for _ in range(rng.randint(1, 12))])


def _of_events(rng: random.Random) -> bytes:
    return _sent(rng, any_events(rng))


def _sent(rng: random.Random, values: list[Any]) -> bytes:
    lines = [json.dumps(value, ensure_ascii=rng.random() < 0.7) for value in values]
    end = rng.choice(["\n\n", "\n\n", "\r\n\r\n", "\r\r"])
    text = "".join(f"data: {line}{end}" for line in lines) + rng.choice(["", "data: [DONE]" + end])
    return text.encode(errors="surrogatepass")


_INVENTORS: Final = {"chat": _of_chunks, "responses": _of_events}
_MAKERS: Final = (_mutated, _mutated, _spliced, _rearranged, _rearranged, _made_up, _made_up)
#: Fields that tell calls, items, parts and choices apart.
_TELLING: Final = (
    "id", "index", "call_id", "item_id", "output_index", "content_index", "summary_index", "sequence_number", "type",
    "name", "phase", "finish_reason", "status", "response", "object",
)  # fmt: skip
_GONE: Final = object()

if __name__ == "__main__":
    sys.exit(main())
