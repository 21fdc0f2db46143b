# SPDX-License-Identifier: Apache-2.0
"""How tables, plots and pages write a number."""

from __future__ import annotations

from vtprune.eval.results.entries import Entry

MISSING = "–"
"""Stands where there is no number."""


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def flops(value: float) -> str:
    """With a unit: 1.23 GFLOPs."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOPs"
    return f"{value:.3g} FLOPs"


def accuracy(entry: Entry) -> str:
    """Score in per cent with its 95 % interval, and the spread over seeds where there are several."""
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    return f"{percent(entry.mean('score'))}{spread}{bounds(entry.interval)}"


def bounds(interval: tuple[float, float] | None) -> str:
    """An interval in per cent, to stand behind a number; nothing if there is none."""
    return "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
