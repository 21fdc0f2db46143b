# SPDX-License-Identifier: Apache-2.0
"""Draws `pareto.png`, accuracy against tokens, FLOPs and latency, and `families.png`, by kind of question or class.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import itemgetter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vtprune.eval.results.entries import Entry, conditions, rows
from vtprune.eval.results.formatting import latency
from vtprune.eval.results.records import Record
from vtprune.eval.results.terms import terms
from vtprune.eval.results.timings import Latency

COLOURS = [
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
MARKERS = "osD^vP*X<"
"""Nine, because nine has no divisor in common with the ten colours and the five greys. So a pair of colour and marker
comes again only after 90 methods, or after 45 baselines."""
GREYS = ["#8a8a8a", "#6b6b6b", "#a8a8a8", "#4d4d4d", "#7a7a7a"]
"""Of the baselines, so that methods stand out against them."""
PLAIN = (
    "random",
    "uniform",
    "random_patches",
    "uniform_patches",
    "uniform_frames",
    "block",
    "pool",
    "downsample",
)
"""Methods that are drawn in grey."""
LINES = ("full", "zero")
"""Rows that are drawn as horizontal lines, because they have a single budget."""
LATENCY = "milliseconds of one example, measured"
"""What the axis of the latency shows."""
Cost = Callable[[Entry], float | None]
"""A row -> its place on the horizontal axis."""
_DODGE = 1.015
"""Factor between neighbouring rows on the horizontal axis. Most have the same cost, so their bars would coincide."""


@dataclass(frozen=True)
class Style:
    """How a row is drawn."""

    colour: str
    marker: str
    baseline: bool


def styles(grid: Mapping[str, Mapping[float, Entry]]) -> dict[str, Style]:
    """Label of a row, except `LINES` -> its style, the same in all plots of the results."""
    methods, baselines = _signs(COLOURS), _signs(GREYS)
    found = {}
    for label, by_ratio in grid.items():
        if label not in LINES:
            plain = next(iter(by_ratio.values())).cells[0]["method"] in PLAIN
            found[label] = Style(*next(baselines if plain else methods), plain)
    return found


def _signs(colours: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a colour and a marker, all different as long as there are."""
    return zip(cycle(colours), cycle(MARKERS))


def pareto(results: Sequence[Record], path: Path, times: Mapping[str, Latency]) -> None:
    """Draws all panels to a PNG: points are cells (mean over seeds), bars their 95 % intervals.

    Args:
        results: lines of `results.jsonl`; cells without numbers are left out.
        path: the PNG.
        times: name of a cell -> its latency; without any there is no panel of the latency.
    """
    first, words = results[0], terms(results)
    costs: list[tuple[Cost, str]] = [(average_tokens, words.average), (flops, f"{words.flops_of}, one example")]
    if any(line["cell"] in times for line in results):
        costs.append((milliseconds(times), LATENCY))
    width = 1.5 + 5.5 * len(costs)
    figure = Figure(figsize=(width, _height(results)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True)
    for axes, (cost, label) in zip(panels, costs, strict=True):
        panel(axes, results, cost)
        axes.set_xlabel(label)
    panels[0].set_ylabel(words.axis)
    shown = f"{first['task']}{conditions(first)}, {first['n']} examples"
    figure.suptitle(f"{shown}; bars: 95 % intervals, rows nudged sideways by 1.5 % each", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _height(results: Sequence[Record]) -> float:
    """Inches of a figure, whose legend has a line for each row."""
    return max(5.2, 0.6 + 0.2 * len(rows(results)))


def families(results: Sequence[Record], path: Path) -> None:
    """Draws accuracy against tokens to a PNG, one panel for each kind of question or class, without intervals.

    Args:
        results: lines of `results.jsonl`; cells without numbers are left out.
        path: the PNG.
    """
    names = list(results[0]["family_scores"])
    lines = -(-len(names) // 3)
    figure = Figure(figsize=(12.5, max(3.3 * lines, _height(results))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        panel(axes, results, average_tokens, family=name)
        axes.set_title(name, fontsize=10)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(terms(results).average, fontsize=10)
    figure.supylabel(terms(results).axis, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def average_tokens(entry: Entry) -> float:
    """Tokens measured, averaged over the layers."""
    return entry.mean("measured_keep_ratio") * entry.mean("visual_tokens")


def flops(entry: Entry) -> float:
    """FLOPs of one example: of the language model's prefill, or of the encoder that classifies."""
    return entry.mean(terms(entry.cells).flops)


def milliseconds(times: Mapping[str, Latency]) -> Cost:
    """The cost that is the latency of one example, until its answer has ended. times: name of a cell -> its latency."""

    def cost(entry: Entry) -> float | None:
        found = latency(entry, times)
        return None if found is None else 1e3 * found.whole

    return cost


def panel(axes: Axes, results: Sequence[Record], cost: Cost, family: str | None = None) -> None:
    """One plot of score against cost: of all questions with intervals, or of one family without intervals.

    Rows without the cost are left out.
    """

    def points(entry: Entry) -> tuple[float, float, float]:
        if family is not None:
            score = 100 * entry.family(family)
            return score, score, score
        score = entry.mean("score")
        low, high = entry.interval or (score, score)
        return 100 * score, 100 * low, 100 * high

    axes.set_xscale("log")
    grid = rows(results)
    drawn = styles(grid)
    for place, (label, by_ratio) in enumerate(grid.items(), start=-len(grid) // 2):
        found = [(spent, entry) for entry in by_ratio.values() if entry.ok and (spent := cost(entry)) is not None]
        costs, entries = zip(*sorted(found, key=itemgetter(0)), strict=True) if found else ((), ())
        if label in LINES:
            (entry,) = by_ratio.values()
            if not entry.ok:
                continue
            score, low, high = points(entry)
            dash = "-" if label == "full" else "--"
            axes.axhline(score, label=label, zorder=1, color="black", linestyle=dash, linewidth=1.2)
            axes.axhspan(low, high, color="black", alpha=0.06, linewidth=0)
            continue
        style = drawn[label]
        if not entries:  # if every budget is under its floor, the legend still names the method
            axes.plot([], [], color=style.colour, marker=style.marker, label=f"{label} (no cell)")
            continue
        score, low, high = zip(*map(points, entries), strict=True)
        below = [y - bound for y, bound in zip(score, low, strict=True)]
        above = [bound - y for y, bound in zip(score, high, strict=True)]
        axes.errorbar(
            [spent * _DODGE**place for spent in costs],
            score,
            yerr=None if family else [below, above],
            label=label,
            color=style.colour,
            marker=style.marker,
            markersize=6,
            linestyle=":" if style.baseline else "-",
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    bottom, top = axes.get_ylim()
    if top - bottom < 1:  # all rows are alike, for example with random weights
        axes.set_ylim(bottom - 1, top + 1)
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
