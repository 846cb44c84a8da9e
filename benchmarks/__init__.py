"""The benchmark suite: Keepstream, the usual tutorial's worker and a bare floor, side by side in one run.

In: a machine with at least two cores.
Out: a table of ratios, ``results.json`` and plots.
"""
