# SPDX-License-Identifier: Apache-2.0
"""Values that stand apart from the others, in both senses: far from their neighbours, or far above the quartiles."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def local_outlier_factor(values: Tensor, neighbours: int) -> Tensor:
    """How much sparser a number's surroundings are than those of its nearest neighbours (LOF, Breunig et al. 2000).

    With ``d_k(o)`` the distance of ``o`` to the k-th nearest of the others, and reachability ``max(d_k(o), |p - o|)``
    from ``p`` to ``o``, the density of ``p`` is one over its mean reachability to its ``k`` nearest, and its factor is
    their mean density over its own: about 1 among its like, larger far from all others, above or below.

    Numbers need no distance matrix: sorted, the nearest ones of each lie within ``k`` places, so memory is
    ``values * neighbours``. Of equally near neighbours the smaller numbers are taken.

    Args:
        values: ``(..., values)``, finite.
        neighbours: ``k``, at least 1; with ``k`` values or fewer all the others.

    Returns:
        ``(..., values)`` float64, positive; 1 for a value without others.
    """
    count = values.shape[-1]
    if count < 2:
        return torch.ones_like(values, dtype=torch.float64)
    k = min(neighbours, count - 1)
    ordered, order = values.double().reshape(-1, count).sort(dim=1)
    distances = (pad(ordered, (k, k), value=torch.inf).unfold(1, 2 * k + 1, 1) - ordered.unsqueeze(2)).abs()
    distances[..., k] = torch.inf  # to itself
    distances, offsets = (part[..., :k] for part in distances.sort(dim=2, stable=True))
    nearest = (torch.arange(count, device=values.device).unsqueeze(1) + offsets - k).flatten(1)
    reach = torch.maximum(distances[..., -1].gather(1, nearest).view_as(distances), distances)
    # Coinciding values have no distance; the constant is scikit-learn's.
    density = 1 / (reach.mean(2) + 1e-10)
    factors = density.gather(1, nearest).view_as(distances).mean(2) / density
    return torch.empty_like(factors).scatter_(1, order, factors).view(values.shape)


def outlier_share(values: Tensor, neighbours: int, factor: float = 1.5) -> float:
    """Share of numbers whose :func:`local_outlier_factor` exceeds ``factor``; 0 of none.

    The dynamic ratio of Recoverable Compression (arXiv 2409.01179).

    Args:
        values: ``(values,)``.
    """
    outliers = int((local_outlier_factor(values, neighbours) > factor).sum())
    return outliers / max(len(values), 1)


def above_quartiles(values: Tensor, valid: Tensor | None = None, whiskers: float = 1.5) -> Tensor:
    """Which numbers lie more than ``whiskers`` interquartile ranges above the third quartile (Tukey's fences).

    Args:
        values: ``(groups, values)``.
        valid: ``(groups, values)`` bool; quartiles are of these alone. By default all count.

    Returns:
        ``(groups, values)`` bool, False where not valid.
    """
    if not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    counted = values.float()
    if valid is not None:
        counted = counted.masked_fill(~valid, torch.nan)
    quartiles = torch.nanquantile(counted, torch.tensor([0.25, 0.75], device=values.device), dim=1, keepdim=True)
    first, third = quartiles
    # NaN compares false, so padding never stands out.
    return counted > third + whiskers * (third - first)
