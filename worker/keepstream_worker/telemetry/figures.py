"""The figures: what this worker has done since it last told, for people who look on.

In: deltas, first outputs and ends of attempts, as they come.  Out: sums by target and outcome, to the table of
minutes.  Pure, and cheap enough for each delta: a flow is fetched once for an attempt.  What is not told yet dies with
the worker; what has been told, of targets of which no attempt is under way, is forgotten: they may be very many.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Self

from keepstream.results import Usage
from keepstream.tables import FIRST_OUTPUT_CLASSES


class Flow:
    """What comes from one target; a context manager for each attempt that counts in it."""

    __slots__ = ("_attempts", "deltas", "first_outputs")

    def __init__(self) -> None:
        self._attempts = 0
        self.deltas = 0
        self.first_outputs = [0] * (len(FIRST_OUTPUT_CLASSES) + 1)

    def __enter__(self) -> Self:
        self._attempts += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._attempts -= 1

    @property
    def is_over(self) -> bool:
        """Whether no attempt counts in it any more."""
        return not self._attempts

    def note_first_output(self, seconds: float) -> None:
        """An attempt had its first output, so long after its request."""
        self.first_outputs[bisect_left(FIRST_OUTPUT_CLASSES, seconds)] += 1


@dataclass(slots=True)
class Sums:
    """What was done with one target, and ended in one way."""

    provider: str
    model: str
    outcome: str = ""  #: Of attempts that ended; empty: of those under way.
    error_code: str = ""
    attempts: int = 0
    deltas: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None  #: As the provider reported it; None: it did not.
    first_outputs: list[int] = field(default_factory=lambda: [0] * (len(FIRST_OUTPUT_CLASSES) + 1))


class Figures:
    """The figures of one worker. Used on the event loop."""

    def __init__(self) -> None:
        self._flows: dict[tuple[str, str], Flow] = {}
        self._ends: dict[tuple[str, str, str, str], Sums] = {}

    def flow(self, provider: str, model: str) -> Flow:
        """Return where an attempt counts what comes; within its context it counts after ``take``, too."""
        return self._flows.setdefault((provider, model), Flow())

    def note_end(
        self,
        provider: str,
        model: str,
        outcome: str,
        error_code: str,
        usage: Usage,
    ) -> None:
        """An attempt has ended; unknown tokens are none here, and an unknown cost stays unknown."""
        key = (provider, model, outcome, error_code)
        sums = self._ends.setdefault(key, Sums(*key))
        sums.attempts += 1
        sums.prompt_tokens += usage.prompt_tokens or 0
        sums.completion_tokens += usage.completion_tokens or 0
        if usage.cost is not None:
            sums.cost = (sums.cost or 0.0) + usage.cost

    def take(self) -> list[Sums]:
        """Return what has been done since this was last called."""
        taken = list(self._ends.values())
        self._ends = {}
        for (provider, model), flow in self._flows.items():
            if flow.deltas or any(flow.first_outputs):
                taken.append(Sums(provider, model, deltas=flow.deltas, first_outputs=flow.first_outputs))
                flow.deltas = 0
                flow.first_outputs = [0] * len(flow.first_outputs)
        self._flows = {target: flow for target, flow in self._flows.items() if not flow.is_over}
        return taken
