# SPDX-License-Identifier: Apache-2.0
"""SparseVLM's token recycling: the best dropped tokens are clustered, and each cluster becomes one token."""

import torch
from torch import Tensor

from vtprune.ops.density_peaks import density_peak_order, merge_clusters, scaled_distances

POOLED_PER_CLUSTER = 10


def recycling_counts(n: int, k: int, share: float) -> tuple[int, int, int]:
    """How many of ``n`` tokens are kept, pooled and merged so that ``k`` are left (SparseVLM, arXiv 2410.04417).

    Of ``d`` dropped tokens, ``floor(share * d) + 1`` are pooled. The number of clusters is a tenth of the pooled ones,
    rounded down, plus one. Kept tokens and clusters together are ``k``, with as many kept tokens as possible. If fewer
    than half of ``k`` would be kept tokens, then half of ``k``, rounded up, are kept tokens, and there are fewer
    clusters.

    Args:
        n: number of tokens, at least 0.
        k: number of tokens to be left, at least 0.
        share: share of the dropped tokens that are pooled, in [0, 1]; 0 merges none.

    Returns:
        Number of kept tokens, of pooled tokens, and of clusters.
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

    The numbers come from :func:`recycling_counts`. A merged token is the mean of its cluster and takes the place of the
    cluster's centre. Density is computed from as many neighbours as there are clusters. Of equal scores the lower index
    comes first, of equally dense points the one with the better score; the reference adds noise instead.

    Args:
        points: ``(tokens, dim)``.
        scores: ``(tokens,)``, higher is better.
        k: number of tokens to be left, at least 0.
        share: share of the dropped tokens that are pooled, in [0, 1].
        runs: ``(tokens,)`` long, the run of visual tokens that each token belongs to. Tokens join only a centre of
            their own run, because text between two runs must not see the later one. In a run without a centre they are
            lost. None: all tokens belong to one run.

    Returns:
        keep: ``(tokens,)`` bool, the centres of the clusters included.
        merged: ``(tokens, dim)``, the points; those of the centres are replaced.
        sources: ``(tokens,)`` long, index of the kept token that each token went into, -1 for lost tokens.
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
    # A centre that coincides with another centre stays a separate centre.
    assigned[centres] = torch.arange(clusters, device=assigned.device)
    merged = points.clone()
    merged[pool[centres]] = merge_clusters(points[pool], centres, assigned, centre_weight=None)
    keep[pool[centres]] = True
    sources[pool] = torch.where(assigned >= 0, pool[centres][assigned], -1)
    return keep, merged, sources
