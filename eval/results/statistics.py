# SPDX-License-Identifier: Apache-2.0
"""Intervals and differences: seeded bootstraps over the examples of one row, or of two rows in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
RESAMPLES_OF_DIFFERENCES = 20_000
"""More than for intervals, because a p value must be small to remain significant after correction for many rows."""
LEVEL = 0.95
_SEED = 0
_FEW = 16  # up to so many different values, it is faster to count them
_CHUNK = 200  # resamples at a time; the memory is chunk x examples


def resampled_means(columns: np.ndarray) -> np.ndarray:
    """(examples, k) scores -> (RESAMPLES, k) means; one draw of examples serves all k columns, hence "paired"."""
    rng = np.random.default_rng(_SEED)
    n = len(columns)
    means = []
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = rng.integers(0, n, size=(min(_CHUNK, RESAMPLES - start), n))
        means.append(columns[drawn].mean(axis=1))
    return np.concatenate(means)


def interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def mean_interval(scores: list[float]) -> tuple[float, list[float]]:
    """Mean of `scores` (examples,) and its 95 % percentile bootstrap interval."""
    columns = np.asarray(scores, dtype=float)[:, None]
    return float(columns.mean()), interval(resampled_means(columns)[:, 0])


def retention_interval(scores: list[float], full: list[float]) -> tuple[float, list[float]] | tuple[None, None]:
    """Mean score over the full model's on the same examples, and its paired 95 % bootstrap interval.

    Args:
        scores: (examples,) of the pruned model.
        full: (examples,) of the full model, in the same order.

    Returns:
        (ratio, [low, high]); (None, None) if the score of the full model is 0.
    """
    pair = np.stack([np.asarray(scores, dtype=float), np.asarray(full, dtype=float)], axis=1)
    mine, theirs = pair.mean(axis=0)
    if theirs == 0:
        return None, None
    means = resampled_means(pair)
    means = means[means[:, 1] > 0]
    return float(mine / theirs), interval(means[:, 0] / means[:, 1])


_IMAGINED = 2
"""Examples lost that `retention_bound` adds: a bootstrap cannot draw a loss that it has not seen. With two of them, a
bound on few losses is about the exact one for a count (Garwood 1936), also when there is no loss at all."""


def retention_bound(scores: Sequence[float], full: Sequence[float], error: float) -> float | None:
    """A lower bound of the retention that also holds for few examples, and for few or no differences among them.

    Args:
        scores: (examples,) of the pruned model.
        full: (examples,) of the full model, in the same order.
        error: how often the bound may lie above the true retention, e.g. 0.05.

    Returns:
        The bound; None if the score of the full model is 0.
    """
    lost = [max(full)] * _IMAGINED
    pair = np.asarray([[*scores, *[0.0] * _IMAGINED], [*full, *lost]], dtype=float).T
    if max(full) <= 0:
        return None
    means = resampled_means(pair)
    means = means[means[:, 1] > 0]
    return float(np.quantile(means[:, 0] / means[:, 1], error))


@dataclass(frozen=True)
class Difference:
    """How much better one row is than another on the same examples."""

    mean: float
    """mean score of the first row less that of the second"""
    interval: list[float]
    """paired 95 % percentile bootstrap interval"""
    p: float
    """two-sided bootstrap p value of "no difference"; at least 2 / (RESAMPLES_OF_DIFFERENCES + 1)"""

    @property
    def significant(self) -> bool:
        """Whether `p` is below 5 %."""
        return self.p < 1 - LEVEL


def difference(scores: Sequence[float], others: Sequence[float]) -> Difference:
    """Paired bootstrap of the mean difference.

    Args:
        scores: (examples,) of the first row; if there are several seeds, their mean for each example.
        others: (examples,) of the second row, in the same order.
    """
    change = np.asarray(scores, dtype=float) - np.asarray(others, dtype=float)
    rng = np.random.default_rng(_SEED)
    values, counts = np.unique(change.round(12), return_counts=True)

    def draw() -> np.ndarray:
        if len(values) <= _FEW:  # how often each value occurs is all that matters
            return rng.multinomial(len(change), counts / len(change), size=_CHUNK) @ values / len(change)
        return change[rng.integers(0, len(change), size=(_CHUNK, len(change)))].mean(axis=1)

    drawn = [draw() for _ in range(RESAMPLES_OF_DIFFERENCES // _CHUNK)]
    means = np.concatenate(drawn).round(12)
    tail = min((means <= 0).sum(), (means >= 0).sum()) + 1
    p = min(1.0, 2 * float(tail) / (RESAMPLES_OF_DIFFERENCES + 1))
    return Difference(float(change.mean()), interval(means), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), so that 5 % is the chance of any false alarm among them."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """The same differences with p values corrected for their number. The intervals are not corrected."""
    return [dataclasses.replace(raw, p=p) for raw, p in zip(found, holm([raw.p for raw in found]), strict=True)]
