# SPDX-License-Identifier: Apache-2.0
"""Recycling: the best of what is dropped is clustered, and each cluster merged into one token (SparseVLM)."""

import torch
from torch import Tensor

from vtprune.ops.density_peaks import density_peak_order, merge_clusters, scaled_distances

POOLED_PER_CLUSTER = 10


def recycling_counts(n: int, k: int, share: float) -> tuple[int, int, int]:
    """How many of ``n`` tokens are kept, pooled and merged so that ``k`` are left (SparseVLM, arXiv 2410.04417).

    Of ``d`` dropped tokens ``floor(share * d) + 1`` are pooled, and one in ten of those, rounded down, plus one is the
    number of clusters; kept tokens and clusters together are ``k``, with as many kept as can be. Where that leaves
    less than half of ``k`` for the kept ones, they are half of it, rounded up, and there are fewer clusters.

    Args:
        n: tokens, at least 0.
        k: tokens to be left, at least 0.
        share: of the dropped tokens, in [0, 1]; 0 merges none.

    Returns:
        Kept tokens, pooled tokens, clusters.
    """
    if k >= n or share == 0:
        return min(k, n), 0, 0
    half = (k + 1) // 2
    for kept in range(k - 1, half - 1, -1):
        pooled = min(int(share * (n - kept)) + 1, n - kept)
        clusters = pooled // POOLED_PER_CLUSTER + 1
        if kept + clusters == k:
            return kept, pooled, clusters
    return half, min(int(share * (n - half)) + 1, n - half), k - half


def recycle_dropped(
    points: Tensor, scores: Tensor, k: int, share: float = 0.3, *, runs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the best tokens, and merge the best of the others by density peaks (SparseVLM, arXiv 2410.04417).

    Numbers are those of :func:`recycling_counts`. A merged token is the mean of its cluster and takes the place of the
    cluster's centre. As many neighbours as there are clusters make up density. Of equal scores the lower index, of
    equally dense points that of the better score comes first, where the reference adds noise.

    Args:
        points: ``(tokens, dim)``.
        scores: ``(tokens,)``, higher is better.
        k: tokens to be left, at least 0.
        share: of the dropped tokens that are pooled, in [0, 1].
        runs: ``(tokens,)`` long, which run of visual tokens each is of. Tokens join a centre of their own run,
            because text that stands between two must not see the later one; without one they are lost. None: all are
            of one.

    Returns:
        keep: ``(tokens,)`` bool, the centres of the clusters included.
        merged: ``(tokens, dim)``, the points with those of the centres replaced.
        sources: ``(tokens,)`` long, index of the kept token that each went into, -1 for tokens that are lost.
    """
    kept, pooled, clusters = recycling_counts(len(points), k, share)
    order = scores.argsort(descending=True, stable=True).to(points.device)
    keep = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    keep[order[:kept]] = True
    sources = torch.where(keep, torch.arange(len(points), device=points.device), -1)
    if clusters == 0:
        return keep, points, sources
    pool = order[kept : kept + pooled]
    distances = scaled_distances(points[pool])
    centres = density_peak_order(distances, clusters, clusters, reference_quirks=True)
    to_centres = distances[:, centres]
    if runs is not None:
        to_centres = to_centres.masked_fill(runs[pool][:, None] != runs[pool[centres]], torch.inf)
    nearest, assigned = to_centres.min(1)
    assigned = assigned.masked_fill(nearest == torch.inf, -1)
    # A centre that coincides with another one still is a centre of its own.
    assigned[centres] = torch.arange(clusters, device=assigned.device)
    merged = points.clone()
    merged[pool[centres]] = merge_clusters(points[pool], centres, assigned, centre_weight=None)
    keep[pool[centres]] = True
    sources[pool] = torch.where(assigned >= 0, pool[centres][assigned], -1)
    return keep, merged, sources
