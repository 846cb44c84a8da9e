"""Reports: what an item of the suite counted, and which of its checks failed.

In: counts and violations, from the items.
Out: lines of text and whether all checks hold, to the command line and the tests. A check without violations holds.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

_SHOWN: Final = 5  #: Offences that are shown of each check.


class Report:
    """The outcome of one item."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.counts: dict[str, Any] = {}
        self.checks: dict[str, list[str]] = {}

    def count(self, name: str, value: object) -> None:
        """Record a number to show."""
        self.counts[name] = value

    def count_each(self, prefix: str, counter: Counter[str]) -> None:
        """Record a number for each kind."""
        for kind, number in sorted(counter.items()):
            self.counts[f"{prefix}: {kind}"] = number

    def check(self, name: str, offences: Iterable[str] = ()) -> None:
        """Record a check, which holds if there are no violations; it may be recorded more than once."""
        self.checks.setdefault(name, []).extend(offences)

    @property
    def failures(self) -> dict[str, list[str]]:
        """The checks that do not hold, with their violations."""
        return {name: offences for name, offences in self.checks.items() if offences}

    def lines(self) -> list[str]:
        """The report as text."""
        width = max(map(len, [*self.counts, *self.checks]), default=0)
        lines = ["", self.title, "=" * len(self.title)]
        lines += [f"  {name:<{width}}  {value}" for name, value in self.counts.items()]
        for name, offences in self.checks.items():
            lines.append(f"  {name:<{width}}  {'ok' if not offences else f'FAILED ({len(offences)})'}")
            lines += [f"      {offence}" for offence in offences[:_SHOWN]]
        return lines


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the value below which this fraction of the values lies."""
    return sorted(values)[min(int(len(values) * fraction), len(values) - 1)]


def spread(values: Sequence[float]) -> str:
    """Return the median, the 99th percentile and the maximum of times given in seconds."""
    if not values:
        return "nothing measured"
    return (
        f"n={len(values)}  p50 {percentile(values, 0.5):.3f} s  p99 {percentile(values, 0.99):.3f} s"
        f"  max {max(values):.3f} s"
    )
