"""The plots: the same results, drawn for the README.

In: ``Results``.
Out: SVG files beside ``results.json``.

One colour per contender throughout, no background, and greys that are readable on white and on black.
"""

import importlib.util
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import Sample
from benchmarks.contenders import FLOOR, KEEPSTREAM
from benchmarks.measures.load import LIMIT_MS
from benchmarks.report import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY: Final = "#7d8590"
_COLOURS: Final = {
    KEEPSTREAM: "#2f81f7",
    FLOOR: "#57ab5a",
    "tutorial-asyncio": "#d4a72c",
    "tutorial-gevent": "#e0823d",
    "tutorial-threads": "#d1604f",
    "tutorial-prefork": "#a475c9",
}
_STYLE: Final[Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "keepstream",  # the same results give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "axes.titlecolor": _GREY,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "grid.color": _GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}


def draw(results: Results, directory: Path) -> None:
    """Draw whatever the results allow; without matplotlib, say so."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: the package matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    pictures = {
        "cpu": (_saturated, _paced),
        "latency": (_latency_at_10, _latency_at_50),
        "flat": (_flat_streams, _flat_length),
        "jobs": (_jobs_postgresql, _memory),
    }
    with mpl.rc_context(_STYLE):
        for name, panels in pictures.items():
            figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
            drawn = [panel(results.samples, ax) for panel, ax in zip(panels, axes, strict=True)]
            if any(drawn):
                for ax, has_data in zip(axes, drawn, strict=True):
                    ax.set_visible(has_data)
                handles, labels = axes[drawn.index(True)].get_legend_handles_labels()
                if labels:  # lines only; bars are labelled themselves
                    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
                figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def _saturated(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("CPU per delta, saturated (µs)")
    return _bars(samples, ax, "saturated", "cpu_us_per_delta", log=False)


def _paced(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("CPU per delta, 30 a second each (µs)")
    return _bars(samples, ax, "paced", "cpu_us_per_delta", log=False)


def _jobs_postgresql(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("Short jobs per second of a core, PostgreSQL")
    chosen = [sample for sample in samples if sample.parameters.get("database") == "postgresql"]
    return _bars(chosen, ax, "short_jobs", "jobs_per_core_second", log=False)


def _memory(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("Memory per stream in flight (KB)")
    return _bars(samples, ax, "memory", "uss_kb_per_stream", log=True)


def _bars(samples: list[Sample], ax: "Axes", measure: str, metric: str, *, log: bool) -> bool:
    """Draw each contender's median and spread as a bar; of several loads, at its best."""
    loads: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.measure == measure:
            loads[sample.contender][str(sample.parameters)].append(sample.metrics[metric])
    best = {name: min(values.values(), key=statistics.median) for name, values in loads.items()}
    names = [name for name in _COLOURS if name in best]
    medians = [statistics.median(best[name]) for name in names]
    below = [median - min(best[name]) for name, median in zip(names, medians, strict=True)]
    above = [max(best[name]) - median for name, median in zip(names, medians, strict=True)]
    ax.barh(
        names,
        medians,
        xerr=(below, above),
        color=[_COLOURS[name] for name in names],
        error_kw={"ecolor": _GREY, "elinewidth": 1, "capsize": 2},
        height=0.65,
    )
    for name, median, upward in zip(names, medians, above, strict=True):
        text = f"{median:,.0f}" if median >= 10 else f"{median:.1f}"
        ax.annotate(text, (median + upward, name), xytext=(6, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    if log:
        ax.set_xscale("log")
        ax.set_xlim(left=1)
    ax.margins(x=0.12)
    ax.xaxis.set_major_formatter("{x:,g}")
    return bool(names)


def _latency_at_10(samples: list[Sample], ax: "Axes") -> bool:
    return _latency(samples, ax, 10.0)


def _latency_at_50(samples: list[Sample], ax: "Axes") -> bool:
    return _latency(samples, ax, 50.0)


def _latency(samples: list[Sample], ax: "Axes", rate: float) -> bool:
    ax.set_title(f"Latency, {rate:.0f} deltas a second and stream (ms)")
    chosen = [sample for sample in samples if sample.parameters.get("rate") == rate]
    drawn = _lines(chosen, ax, "load", "streams", "p99_ms")
    _lines(chosen, ax, "load", "streams", "p50_ms", linestyle=":", label=False)
    ax.axhline(LIMIT_MS, color=_GREY, linewidth=1, linestyle="--")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel("streams in one process")
    ax.set_ylabel("p99 solid, p50 dotted")
    return drawn


def _flat_streams(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("CPU per delta, 8,000 a second in all (µs)")
    ax.set_xlabel("streams in flight")
    drawn = _lines(samples, ax, "flat_streams", "streams", "cpu_us_per_delta")
    ax.set_ylim(bottom=0)
    return drawn


def _flat_length(samples: list[Sample], ax: "Axes") -> bool:
    ax.set_title("CPU per delta over a stream's length (µs)")
    ax.set_xlabel("deltas in a stream")
    longer = [sample for sample in samples if sample.parameters.get("deltas") != 1]
    drawn = _lines(longer, ax, "flat_length", "deltas", "cpu_us_per_further_delta")
    ax.set_ylim(bottom=0)
    return drawn


def _lines(
    samples: list[Sample], ax: "Axes", measure: str, x: str, y: str, *, linestyle: str = "-", label: bool = True
) -> bool:
    """Draw a line per contender through the medians of each x."""
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.measure == measure:
            points[sample.contender][float(sample.parameters[x])].append(sample.metrics[y])
    for name in (name for name in _COLOURS if name in points):
        xs = sorted(points[name])
        medians = [statistics.median(points[name][value]) for value in xs]
        marker = "o" if label else ""
        ax.plot(xs, medians, color=_COLOURS[name], label=name if label else None, linestyle=linestyle, marker=marker)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.grid(visible=True)
    return bool(points)
