# SPDX-License-Identifier: Apache-2.0
"""Outliers: numbers far from the others (Recoverable Compression), or far above the quartiles (Token correlation)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.devices import send


def local_outlier_factor(values: Tensor, neighbours: int, valid: Tensor | None = None) -> Tensor:
    """Local outlier factor of each number: the density around its neighbours over its own (LOF, Breunig et al. 2000).

    ``d_k(o)`` is the distance of ``o`` to its k-th nearest other number. The reachability from ``p`` to ``o`` is
    ``max(d_k(o), |p - o|)``. The density of ``p`` is one over its mean reachability to its ``k`` nearest numbers. The
    factor of ``p`` is the mean density of these numbers over its own density. It is about 1 among similar numbers, and
    larger for a number far from all others, above or below them.

    No distance matrix is needed: in sorted order, the nearest numbers of each lie within ``k`` places. So memory is
    ``values * neighbours``. Of equally near neighbours the smaller numbers are taken.

    Args:
        values: ``(..., values)``, finite.
        neighbours: ``k``, at least 1; with at most ``k`` values all other values are neighbours.
        valid: ``(..., values)`` bool, False for values that are left out; by default none is.

    Returns:
        ``(..., values)`` float64, positive; 1 if there is only one value, and for values that are left out.
    """
    count = values.shape[-1]
    if count < 2:
        return torch.ones_like(values, dtype=torch.float64)
    shape, most = values.shape, min(neighbours, count - 1)
    valid = (torch.ones_like(values, dtype=torch.bool) if valid is None else valid).reshape(-1, count)
    # What is left out comes last, infinitely far away.
    ordered, order = values.double().reshape(-1, count).masked_fill(~valid, torch.inf).sort(dim=1, stable=True)
    distances = (pad(ordered, (most, most), value=torch.inf).unfold(1, 2 * most + 1, 1) - ordered.unsqueeze(2)).abs()
    distances[..., most] = torch.inf  # to itself
    distances, offsets = (part[..., :most] for part in distances.sort(dim=2, stable=True))
    numbers = torch.arange(count, device=values.device).unsqueeze(1)
    nearest = (numbers + offsets - most).clamp(0, count - 1).flatten(1)
    sizes = valid.sum(1, keepdim=True)
    k = (sizes - 1).clamp(1, most).unsqueeze(2)
    beyond = torch.arange(most, device=values.device) >= k
    farthest = distances.gather(2, (k - 1).expand(-1, count, 1)).squeeze(2)
    reach = torch.maximum(farthest.gather(1, nearest).view_as(distances), distances)
    # The constant avoids a division by zero where values coincide. It is the one that scikit-learn uses.
    density = 1 / (reach.masked_fill(beyond, 0).sum(2) / k.squeeze(2) + 1e-10)
    around = density.gather(1, nearest).view_as(distances).masked_fill(beyond, 0).sum(2) / k.squeeze(2)
    factors = (around / density).masked_fill((sizes < 2) | (sizes <= numbers.T), 1)
    return torch.empty_like(factors).scatter_(1, order, factors).view(shape)


def outlier_share(values: Tensor, neighbours: int, factor: float = 1.5, valid: Tensor | None = None) -> Tensor:
    """Share of the numbers whose :func:`local_outlier_factor` is above ``factor``; 0 if there are no numbers.

    This is the dynamic ratio of Recoverable Compression (arXiv 2409.01179).

    Args:
        values: ``(values,)``, finite.
        neighbours: as in :func:`local_outlier_factor`.
        factor: local outlier factor above which a number is an outlier.
        valid: ``(values,)`` bool, False for values that are left out; by default none is.

    Returns:
        ``()`` float64.
    """
    outliers = local_outlier_factor(values, neighbours, valid) > factor
    valid = torch.ones_like(outliers) if valid is None else valid
    return (outliers & valid).sum().double() / valid.sum().clamp_min(1)


def above_quartiles(values: Tensor, valid: Tensor | None = None, whiskers: float = 1.5) -> Tensor:
    """Mark the numbers more than ``whiskers`` interquartile ranges above the third quartile (Tukey's fences).

    Args:
        values: ``(groups, values)``.
        valid: ``(groups, values)`` bool; quartiles are computed from valid values only. By default all are valid.

    Returns:
        ``(groups, values)`` bool, False where not valid.
    """
    if not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    counted = values.float()
    if valid is not None:
        counted = counted.masked_fill(~valid, torch.nan)
    quartiles = torch.nanquantile(counted, send(torch.tensor([0.25, 0.75]), values.device), dim=1, keepdim=True)
    first, third = quartiles
    # Comparisons with NaN are false, so padding is never marked.
    return counted > third + whiskers * (third - first)
