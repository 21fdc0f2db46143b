# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks, and merging the points of a cluster into its centre."""

import torch
from torch import Tensor

from vtprune.errors import VTPruneError


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
    # What all points have in common would swamp their differences in the expansion of the square.
    points = points - points.mean(dim=-2, keepdim=True)
    products = points @ points.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    distances = (squares[..., None] + squares[..., None, :]).sub_(products, alpha=2).clamp_min_(0).sqrt_()
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    if not distances.isfinite().all():
        raise VTPruneError("features hold NaN or infinite values: distances are not defined on them")
    return distances.div_(max(points.shape[-1], 1) ** 0.5)


def spread_and_separation(distances: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The two measures of a density peak.

    Args:
        distances: ``(..., n, n)``, symmetric, zero on the diagonal.
        neighbours: nearest points that count, the point itself among them; in [1, n].

    Returns:
        spread: ``(..., n)``, mean of the squared distances to the nearest points; density is ``exp(-spread)``.
        separation: ``(..., n)``, distance to the nearest denser point; for the densest one, the largest distance
            of all. Of equally dense points the one of the lower index counts as denser.
    """
    spread = distances.topk(neighbours, largest=False).values.square_().mean(-1)
    rank = spread.argsort(dim=-1, stable=True).argsort(dim=-1)
    denser = rank[..., None, :] < rank[..., None]
    separation = distances.masked_fill(~denser, torch.inf).amin(-1)
    return spread, torch.where(rank == 0, distances.amax((-2, -1))[..., None], separation)


def density_peak_order(
    distances: Tensor, clusters: int, neighbours: int = 7, *, reference_quirks: bool = False
) -> Tensor:
    """The centres of :func:`density_peaks`, best first: ``(..., min(clusters, n))`` long. Arguments as there."""
    n = distances.shape[-1]
    clusters = min(clusters, n)
    if clusters == 0:
        return distances.new_empty(*distances.shape[:-2], 0, dtype=torch.long)
    if clusters > 2 or reference_quirks:
        neighbours = min(neighbours, clusters)
    spread, separation = spread_and_separation(distances, min(neighbours, n))
    # The logarithm of density times separation: far apart points would all have density zero.
    score = separation.log() - spread
    return score.argsort(dim=-1, descending=True, stable=True)[..., :clusters]


def density_peaks(
    points: Tensor, clusters: int, neighbours: int = 7, *, reference_quirks: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster points around density peaks found with nearest neighbours (DPC-KNN, Du et al. 2016; as in HoliTom).

    Centres are the points with the largest product of density and separation (:func:`spread_and_separation`) over
    Euclidean distances; every other point joins the nearest centre. Nothing is random: of equal points, scores and
    distances the lowest index comes first, where HoliTom (arXiv 2505.21334) adds noise to the densities.

    HoliTom counts no more neighbours than there are clusters. One neighbour is the point itself and two are itself and
    the nearest other, so with one or two clusters all or several points would be equally dense, and its noise would
    choose. Here one or two clusters count all ``neighbours``: a single cluster's centre is the densest point.

    Args:
        points: ``(..., n, dim)``, each leading index clustered on its own.
        clusters: at least 0; never more than ``n`` are made.
        neighbours: nearest points that make up density, at least 1, itself included; three or more clusters cap it.
        reference_quirks: one and two clusters cap it as well.

    Returns:
        centres: ``(..., min(clusters, n))`` ascending long indices.
        assigned: ``(..., n)`` long, which of the centres each point belongs to; a centre to itself. -1 without any.

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
    # A centre that coincides with another one still is a centre of its own.
    return centres, to_centres.argmin(dim=-1).scatter(-1, centres, numbers)


def merge_clusters(points: Tensor, centres: Tensor, assigned: Tensor, centre_weight: float | None = 0.6) -> Tensor:
    """One vector for each cluster, of its centre and its other members.

    Args:
        points: ``(..., n, dim)``.
        centres: ``(..., clusters)`` long.
        assigned: ``(..., n)`` long, as :func:`density_peaks` gives it.
        centre_weight: weight of the centre against the mean of all other members, in [0, 1]; a centre alone stays
            as it is. None: the mean of all members, the centre being one of them.

    Returns:
        ``(..., clusters, dim)`` in the type of ``points``; sums are taken in float32.
    """
    clusters, dim = centres.shape[-1], points.shape[-1]
    if clusters == 0:
        return points[..., :0, :]
    own = points.gather(-2, centres[..., None].expand(*centres.shape, dim))
    # A product instead of a scattered sum, whose order, and with it the last bit, an accelerator leaves to chance.
    members = assigned[..., None, :] == torch.arange(clusters, device=assigned.device)[:, None]
    members = members.scatter(-1, centres[..., None], False)
    sums, counts = members.float() @ points.float(), members.sum(-1, keepdim=True)
    if centre_weight is None:
        return ((sums + own) / (counts + 1)).to(points.dtype)
    merged = centre_weight * own.float() + (1 - centre_weight) * sums / counts.clamp_min(1)
    return torch.where(counts > 0, merged.to(points.dtype), own)
