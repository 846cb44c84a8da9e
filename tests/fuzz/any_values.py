"""JSON of any kind, for the fuzzer: usual fields that are sometimes missing, and rarely of another type.

In: random numbers.
Out: values, to the modules that make up chunks and events.
"""

import random
from collections.abc import Callable
from typing import Any


def any_json(rng: random.Random, depth: int = 3) -> Any:
    """Return a value of any type."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [any_json(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 8:
        return {any_text(rng): any_json(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice([None, True, 0, -1, 2**70, 0.5, float("nan"), "", "null", any_text(rng), any_text(rng)])


def any_text(rng: random.Random) -> str:
    """Return a short text, perhaps of characters that are trouble."""
    return "".join(
        rng.choices(
            ["a", "b", " ", "{", "}", '"', "\\", "\x00", "\n", "é", "€", "😀", "\ud83d", "\ude00"], k=rng.randrange(6)
        )
    )


def any_object(rng: random.Random, **fields: Callable[[], Any]) -> dict[str, Any]:
    """Return an object whose fields are mostly as given, sometimes missing, rarely of any type."""
    made = {}
    for name, make in fields.items():
        chance = rng.random()
        if chance < 0.75:
            made[name] = make()
        elif chance < 0.8:
            made[name] = any_json(rng)
    if rng.random() < 0.05:
        made[any_text(rng)] = any_json(rng)
    return made


def just(value: Any) -> Callable[[], Any]:
    """Return what makes this value."""
    return lambda: value
