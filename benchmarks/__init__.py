"""The benchmark suite: Keepstream, the usual tutorial's worker and the physical floor, side by side in one run.

In: a machine with two cores or more.  Out: a table of ratios, ``results.json`` and plots.  Exists so
that "it is fast" is a figure anyone can reproduce with one command: ``python -m benchmarks``.
"""
