# SPDX-License-Identifier: Apache-2.0
"""`pareto.png`: accuracy against measured visual tokens and against FLOPs. Importing this module imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vtprune.eval.summary import Entry, Record, rows

_COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#7b3fa0",
    "#a6761d",
    "#e7298a",
    "#1b1b1b",
    "#56b4e9",
    "#b8860b",
]
_MARKERS = "osD^vP*X<>"
_PLAIN = {"random": "#8a8a8a", "uniform": "#6b6b6b", "pool": "#a8a8a8", "downsample": "#4d4d4d"}
"""The baselines are grey, so that the methods stand out against them."""
_DODGE = 1.015
"""Factor between neighbouring rows on the horizontal axis: most have the same cost, and their bars would coincide."""


def pareto(results: Sequence[Record], path: Path) -> None:
    """Draws both panels to a PNG: points are cells (mean over seeds), bars their 95 % intervals.

    Args:
        results: lines of `results.jsonl`; cells without numbers are left out.
        path: the PNG.
    """
    figure = Figure(figsize=(12.5, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, results, lambda entry: entry.mean("measured_keep_ratio") * entry.mean("visual_tokens"))
    _panel(right, results, lambda entry: entry.mean("prefill_flops"))
    first = results[0]
    left.set_ylabel("accuracy (%)")
    left.set_xlabel("visual tokens measured, averaged over decoder layers")
    right.set_xlabel("prefill FLOPs of the language model, one example")
    figure.suptitle(
        f"{first['task']}, {first['n']} examples; bars: 95 % intervals, rows nudged sideways by 1.5 % each", fontsize=11
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _panel(axes: Axes, results: Sequence[Record], cost: Callable[[Entry], float]) -> None:
    axes.set_xscale("log")
    colours = iter(_COLOURS * len(results))
    marker = iter(_MARKERS * len(results))
    grid = rows(results)
    for place, (label, by_ratio) in enumerate(grid.items(), start=-len(grid) // 2):
        entries = sorted((entry for entry in by_ratio.values() if entry.ok), key=cost)
        if label in ("full", "zero"):
            style = {"color": "black", "linestyle": "-" if label == "full" else "--", "linewidth": 1.2}
            axes.axhline(100 * entries[0].mean("score"), label=label, zorder=1, **style)
            axes.axhspan(*(100 * bound for bound in entries[0].interval), color="black", alpha=0.06, linewidth=0)
            continue
        colour = _PLAIN.get(label) or next(colours)
        shape = next(marker)
        if not entries:  # every budget under its floor: the legend still says that the method was asked for
            axes.plot([], [], color=colour, marker=shape, label=f"{label} (no cell)")
            continue
        score = [100 * entry.mean("score") for entry in entries]
        below = [y - 100 * entry.interval[0] for y, entry in zip(score, entries, strict=True)]
        above = [100 * entry.interval[1] - y for y, entry in zip(score, entries, strict=True)]
        axes.errorbar(
            [cost(entry) * _DODGE**place for entry in entries],
            score,
            yerr=[below, above],
            label=label,
            color=colour,
            marker=shape,
            markersize=6,
            linestyle=":" if label in _PLAIN else "-",
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float, _: int) -> str:
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
