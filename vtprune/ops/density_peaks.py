# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks (HoliTom, FastVID, SparseVLM), and merging the points of a cluster into its centre."""

import torch
from torch import Tensor

from vtprune.checks import require


def scaled_distances(points: Tensor) -> Tensor:
    """Euclidean distances divided by the root of the dimension.

    Args:
        points: ``(..., n, dim)``.

    Returns:
        ``(..., n, n)`` float32, zero on the diagonal.

    Raises:
        VTPruneError: a point is NaN or infinite.
    """
    points = points.float()
    # Without subtracting the mean, rounding in the expanded square could be larger than the differences of points.
    points = points - points.mean(dim=-2, keepdim=True)
    products = points @ points.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    distances = (squares[..., None] + squares[..., None, :]).sub_(products, alpha=2).clamp_min_(0).sqrt_()
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    require(distances.isfinite().all(), "features hold NaN or infinite values: distances are not defined on them")
    return distances.div_(max(points.shape[-1], 1) ** 0.5)


def spread_and_separation(distances: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The two measures that define a density peak.

    Args:
        distances: ``(..., n, n)``, symmetric, zero on the diagonal.
        neighbours: number of nearest points that density is computed from, the point itself included; in [1, n].

    Returns:
        spread: ``(..., n)``, mean of the squared distances to the nearest points; density is ``exp(-spread)``.
        separation: ``(..., n)``, distance to the nearest denser point; for the densest point, the largest distance
            of all. Of equally dense points the one with the lower index counts as denser.
    """
    spread = distances.topk(neighbours, largest=False).values.square_().mean(-1)
    rank = spread.argsort(dim=-1, stable=True).argsort(dim=-1)
    denser = rank[..., None, :] < rank[..., None]
    separation = distances.masked_fill(~denser, torch.inf).amin(-1)
    return spread, torch.where(rank == 0, distances.amax((-2, -1))[..., None], separation)


def density_peak_order(
    distances: Tensor, clusters: int, neighbours: int = 7, *, reference_quirks: bool = False
) -> Tensor:
    """``(..., min(clusters, n))`` long: the centres of :func:`density_peaks`, the best first. Same arguments."""
    n = distances.shape[-1]
    clusters = min(clusters, n)
    if clusters == 0:
        return distances.new_empty(*distances.shape[:-2], 0, dtype=torch.long)
    if clusters > 2 or reference_quirks:
        neighbours = min(neighbours, clusters)
    spread, separation = spread_and_separation(distances, min(neighbours, n))
    # The logarithm of density times separation. Density itself would be zero for points far apart.
    score = separation.log() - spread
    return score.argsort(dim=-1, descending=True, stable=True)[..., :clusters]


def density_peaks(
    points: Tensor, clusters: int, neighbours: int = 7, *, reference_quirks: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster points around density peaks found with nearest neighbours (DPC-KNN, Du et al. 2016; as in HoliTom).

    Centres are the points with the largest product of density and separation (:func:`spread_and_separation`), computed
    from Euclidean distances. Every other point joins the nearest centre. Nothing is random: of equal points, scores and
    distances the lowest index comes first. HoliTom (arXiv 2505.21334) adds noise to the densities instead.

    HoliTom never uses more neighbours than there are clusters. One neighbour is the point itself, two are the point and
    its nearest neighbour. So with one or two clusters several points or all would be equally dense, and the noise would
    choose. Here, with one or two clusters, all ``neighbours`` count: the centre of a single cluster is the densest
    point.

    Args:
        points: ``(..., n, dim)``; each leading index is clustered separately.
        clusters: at least 0; never more than ``n`` clusters are made.
        neighbours: number of nearest points that density is computed from, the point itself included, at least 1. With
            three clusters or more it is at most the number of clusters.
        reference_quirks: with one and two clusters, too, it is at most the number of clusters.

    Returns:
        centres: ``(..., min(clusters, n))`` long, ascending indices.
        assigned: ``(..., n)`` long, the number of the centre that each point belongs to; a centre belongs to itself. -1
            if there are no centres.

    Raises:
        VTPruneError: a point is NaN or infinite.
    """
    distances = scaled_distances(points)
    order = density_peak_order(distances, clusters, neighbours, reference_quirks=reference_quirks)
    centres = order.sort(dim=-1).values
    if centres.shape[-1] == 0:
        return centres, points.new_full(points.shape[:-1], -1, dtype=torch.long)
    to_centres = distances.gather(-1, centres[..., None, :].expand(*distances.shape[:-1], -1))
    numbers = torch.arange(centres.shape[-1], device=centres.device).expand_as(centres)
    # A centre that coincides with another centre stays a separate centre.
    return centres, to_centres.argmin(dim=-1).scatter(-1, centres, numbers)


def merge_clusters(points: Tensor, centres: Tensor, assigned: Tensor, centre_weight: float | None = 0.6) -> Tensor:
    """Merge each cluster into one vector, made of its centre and its other members.

    Args:
        points: ``(..., n, dim)``.
        centres: ``(..., clusters)`` long.
        assigned: ``(..., n)`` long, as :func:`density_peaks` gives it.
        centre_weight: weight of the centre against the mean of all other members, in [0, 1]. A centre without other
            members stays as it is. None: the plain mean of all members, the centre included.

    Returns:
        ``(..., clusters, dim)`` in the dtype of ``points``; sums are taken in float32.
    """
    clusters, dim = centres.shape[-1], points.shape[-1]
    if clusters == 0:
        return points[..., :0, :]
    of_centres = points.gather(-2, centres[..., None].expand(*centres.shape, dim))
    # A product and not a scattered sum: on an accelerator the order of a scattered sum, and so its last bit, is random.
    members = assigned[..., None, :] == torch.arange(clusters, device=assigned.device)[:, None]
    members = members.scatter(-1, centres[..., None], False)
    sums, counts = members.float() @ points.float(), members.sum(-1, keepdim=True)
    if centre_weight is None:
        return ((sums + of_centres) / (counts + 1)).to(points.dtype)
    merged = centre_weight * of_centres.float() + (1 - centre_weight) * sums / counts.clamp_min(1)
    return torch.where(counts > 0, merged.to(points.dtype), of_centres)
