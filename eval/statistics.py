# SPDX-License-Identifier: Apache-2.0
"""Intervals: seeded bootstraps over examples, alone and paired with the full model."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0
_CHUNK = 200  # resamples at a time: bounds memory at chunk x examples


def _resampled_means(columns: np.ndarray) -> np.ndarray:
    """(examples, k) scores -> (RESAMPLES, k) means; one draw of examples serves all k columns, hence "paired"."""
    rng = np.random.default_rng(_SEED)
    n = len(columns)
    means = []
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = rng.integers(0, n, size=(min(_CHUNK, RESAMPLES - start), n))
        means.append(columns[drawn].mean(axis=1))
    return np.concatenate(means)


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def mean_interval(scores: list[float]) -> tuple[float, list[float]]:
    """Mean of `scores` (examples,) and its 95 % percentile bootstrap interval."""
    columns = np.asarray(scores, dtype=float)[:, None]
    return float(columns.mean()), _interval(_resampled_means(columns)[:, 0])


def retention_interval(scores: list[float], full: list[float]) -> tuple[float, list[float]] | tuple[None, None]:
    """Mean score over the full model's on the same examples, and its paired 95 % bootstrap interval.

    Args:
        scores: (examples,) of the pruned model.
        full: (examples,) of the full model, in the same order.

    Returns:
        (ratio, [low, high]); (None, None) where the full model scores nothing, so that there is nothing to retain.
    """
    pair = np.stack([np.asarray(scores, dtype=float), np.asarray(full, dtype=float)], axis=1)
    mine, theirs = pair.mean(axis=0)
    if theirs == 0:
        return None, None
    means = _resampled_means(pair)
    means = means[means[:, 1] > 0]
    return float(mine / theirs), _interval(means[:, 0] / means[:, 1])
