"""The workload: scripted jobs of every kind, and the result that each must have if it is completed.

In: a random generator.
Out: jobs with their provider faults and their expected output, which comes from the script and not from what was
published.
"""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from keepstream.jobs import Job

_WORDS: Final = ("mill", "race ", "Zürich ", "🌊", "水車 ", "word ", "\n", "naïve ", '"quoted" ', "a\\b ", "{json} ")
FAULTED: Final = 1 / 3  #: Share of attempts whose provider fails.
_MOST_FAULTS: Final = 8  #: Attempts after this one have none, so that every job can end well.


@dataclass(frozen=True, slots=True)
class ScriptedJob:
    """A job, and the output it must have when completed."""

    job: Job
    contents: list[str]
    arguments: list[str]

    @property
    def id(self) -> str:
        """The job's id, which is the key under which the provider counts it."""
        return self.job.id


def make_job(job_id: str, dice: random.Random, dealt: Counter[str]) -> ScriptedJob:
    """Return a job of some kind, with faults in a third of its attempts; the faults are counted in ``dealt``."""
    text = "".join(dice.choice(_WORDS) for _ in range(dice.randint(10, 120)))
    choices = 2 if dice.random() < 0.1 else 1
    calls = dice.choice((0, 0, 0, 0, 1, 2))
    script: dict[str, Any] = {
        "key": job_id,
        "text": text,
        "delta_chars": dice.randint(2, 8),
        "rate": dice.choice((15, 30, 60, 0)),
        "first_token_delay": dice.choice((0, 0, 0.3)),
        "tool_calls": [{"name": f"tool_{n}", "arguments": f'{{"n": {n}, "text": "é"}}'} for n in range(calls)],
        "faults": [_fault(dice) if dice.random() < FAULTED else None for _ in range(_MOST_FAULTS)],
    }
    if dice.random() < 0.2:
        script["reasoning"] = "Let me think about it for a while. "
    dealt.update(f"{fault['kind']} {fault.get('status', '')}".strip() for fault in script["faults"] if fault)
    request: dict[str, Any] = {
        "model": "scripted-1",
        "messages": [{"role": "user", "content": "Tell me something."}],
        "script": script,
    }
    if choices > 1:
        request["n"] = choices
    arguments = [str(call["arguments"]) for call in script["tool_calls"]]
    return ScriptedJob(Job(id=job_id, request=request), [text] * choices, arguments * choices)


def _fault(dice: random.Random) -> dict[str, Any]:
    after = dice.randint(0, 40)
    return dice.choice(
        (
            {"kind": "cut", "after": after},
            {"kind": "eof", "after": after},
            {"kind": "garbage", "after": after},
            {"kind": "error_event", "after": after},
            {"kind": "stall", "after": after},
            {"kind": "comments", "after": after, "for": 1.0},
            {"kind": "refuse"},
            {"kind": "hang"},
            {"kind": "cut_after_finish"},
            {"kind": "no_usage"},
            {"kind": "status", "status": 429, "headers": {"retry-after": "1"}},
            {"kind": "status", "status": 500},
            {"kind": "status", "status": 503},
        )
    )
