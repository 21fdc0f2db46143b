# SPDX-License-Identifier: Apache-2.0
"""How tables, plots and pages write the numbers of a row."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from vtprune.eval.results.entries import Entry
from vtprune.eval.results.terms import ACCURACY, terms
from vtprune.eval.results.timings import Latency

MISSING = "–"
"""Stands where there is no number."""


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def points(difference: float) -> str:
    """A difference of accuracy in points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def at_budget(keep_ratio: float | None) -> str:
    """Behind the name of a row: ` at 50 %`; nothing for rows without a budget and for own schedules."""
    return "" if keep_ratio in (None, 0.0, 1.0) else f" at {100 * keep_ratio:g} %"


def flops(value: float) -> str:
    """With a unit: 1.23 GFLOPs."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOPs"
    return f"{value:.3g} FLOPs"


def milliseconds(seconds: float | None) -> str:
    """Without the unit, in about three digits."""
    if seconds is None:
        return MISSING
    value = 1e3 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def accuracy(entry: Entry) -> str:
    """Score in per cent with its 95 % interval, and the spread over seeds where there are several."""
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    return f"{percent(entry.mean('score'))}{spread}{bounds(entry.interval)}"


def bounds(interval: tuple[float, float] | None) -> str:
    """An interval in per cent, to stand behind a number; nothing if there is none."""
    return "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def retention(entry: Entry) -> str:
    """Score over the full model's in per cent, with its paired interval; over several seeds the means."""
    if entry.mean("retention") is None:
        return MISSING
    return f"{percent(entry.mean('retention'))}{bounds(entry.bounds('retention_ci'))}"


def tokens(entry: Entry) -> str:
    """Measured tokens of the last layer, and their share averaged over the layers."""
    return f"{entry.mean('final_tokens'):.1f} ({percent(entry.mean('measured_keep_ratio'))} %)"


def cost(entry: Entry) -> str:
    """FLOPs of one example and their share of the unpruned ones."""
    key = terms(entry.cells).flops
    return f"{flops(entry.mean(key))} ({percent(flops_share(entry))} %)"


def flops_share(entry: Entry) -> float:
    """FLOPs of one example over the unpruned ones."""
    key = terms(entry.cells).flops
    return entry.mean(key) / entry.mean(f"unpruned_{key}")


def short_gain(entry: Entry) -> str:
    """Gain over the smaller image in points; behind ≈ if it is interpolated."""
    gain = entry.mean("gain")
    return MISSING if gain is None else f"{'' if entry.bounds('gain_ci') else '≈ '}{points(gain)}"


def gain(entry: Entry) -> str:
    """The same with its paired interval, unless it is interpolated; over several seeds the means."""
    bounds = entry.bounds("gain_ci")
    return short_gain(entry) + ("" if bounds is None else f" [{points(bounds[0])}, {points(bounds[1])}]")


def hard(entry: Entry) -> str:
    """Score in per cent on the questions that the smaller image gets wrong, and their number."""
    score = entry.mean("hard_score")
    return MISSING if score is None else f"{percent(score)} (of {entry.cells[0]['hard_examples']})"


def loyalty(entry: Entry) -> str:
    """Share of the answers that are the full model's, in per cent."""
    return percent(entry.mean("loyalty"))


def tokens_per_correct(entry: Entry) -> str:
    """Measured tokens, averaged over the layers, that all examples take for each one that is right.

    Only where the score is the share of right answers.
    """
    score = entry.mean("score") if terms(entry.cells).score == ACCURACY else None
    return f"{entry.mean('average_tokens') / score:.1f}" if score else MISSING


def latency(entry: Entry, times: Mapping[str, Latency]) -> Latency | None:
    """Means over the seeds; None if a cell has no times. times: name of a cell -> its latency."""
    found = [times[cell["cell"]] for cell in entry.cells if cell["cell"] in times]
    if len(found) < len(entry.cells):
        return None
    prefills = [one.prefill for one in found if one.prefill is not None]
    return Latency(mean(one.whole for one in found), mean(prefills) if len(prefills) == len(found) else None)
