# SPDX-License-Identifier: Apache-2.0
"""Token condensation (TCA): the best tokens stay, the next ones become a few means, and the rest becomes one sum."""

import math

import torch
from torch import Tensor

from vtprune.ops.token_reduction import Reduction

_CLUSTERS = 4
# A smaller distance counts as none, so that its inverse is finite.
_SMALLEST_DISTANCE = 1e-30


def condensation_counts(patches: int, drop_rate: float) -> tuple[int, int, int]:
    """How many tokens stay, are clustered and are summed up (TCA, arXiv 2410.14729).

    If ``dropped`` tokens are summed up, ``2 * (dropped + 1)`` of the others are clustered.

    Deviation: if there are fewer others, all of them are clustered and none stays; the reference fails.

    Args:
        patches: number of tokens, the protected ones not counted.
        drop_rate: share of the tokens that are summed up, in [0, 1); their number is rounded down.

    Returns:
        Three numbers, whose sum is ``patches``.
    """
    left = math.ceil((1 - drop_rate) * patches)
    dropped = patches - left
    clustered = min(2 * (dropped + 1), left)
    return left - clustered, clustered, dropped


@torch.no_grad()
def condensation(
    features: Tensor, attention: Tensor, drop_rate: float, *, start: Tensor | None = None, protected: int = 1
) -> Reduction | None:
    """Condense tokens by the attention of the CLS token (TCA, arXiv 2410.14729).

    By falling attention, tokens stay, are clustered or are summed up (:func:`condensation_counts`). The clustered
    tokens become 4 means (:func:`coreset`). The rest becomes one token: the sum weighted by the attention, not divided
    by the sum of the weights.

    Order of the rows: protected tokens, tokens that stay by falling attention, means, sum.

    Deviations: if no token is to be summed up, nothing changes; the reference still makes four tokens of two. Means are
    not rounded to half precision.

    Args:
        features: ``(batch, tokens, dim)``, the tokens after the attention of the layer, its residual included.
        attention: ``(batch, tokens)``, mean over heads of the attention of the CLS token; that to protected tokens is
            not used.
        drop_rate: share of the tokens that are summed up, in [0, 1).
        start: ``(batch,)`` long, the first centre as a rank among the clustered tokens. In the reference it is random.
            Default: 0, the clustered token with the most attention.
        protected: number of tokens at the front (CLS, registers) that stay.

    Returns:
        ``protected + stay + 4 + 1`` rows, fewer if less than 4 tokens are clustered; None if no token is to be summed
        up.
    """
    batch, tokens, dim = features.shape
    stay, clustered, dropped = condensation_counts(tokens - protected, drop_rate)
    if not dropped:
        return None
    attention = attention.float()[:, protected:]
    order = attention.argsort(dim=1, descending=True, stable=True)
    candidates = (order[:, stay : stay + clustered] + protected).unsqueeze(-1).expand(-1, -1, dim)
    means = coreset(features.gather(1, candidates), min(_CLUSTERS, clustered), start)

    # Rows and weights in the order of the attention, behind the protected tokens.
    own = torch.arange(protected + stay, device=features.device).expand(batch, -1)
    first, last = protected + stay, protected + stay + means.rows
    into = torch.cat([own, first + means.into, order.new_full((batch, dropped), last)], dim=1)
    shares = attention.gather(1, order[:, stay + clustered :])
    weights = torch.cat([torch.ones_like(own, dtype=torch.float32), means.weights, shares], dim=1)
    places = torch.cat([own[:, :protected], order + protected], dim=1)
    return Reduction(
        torch.zeros_like(into).scatter(1, places, into), last + 1, torch.zeros_like(weights).scatter(1, places, weights)
    )


def coreset(points: Tensor, count: int, start: Tensor | None = None) -> Reduction:
    """Means of clusters whose centres are far from each other (greedy k-centre).

    Every centre is the point that is farthest from its nearest centre so far, by Euclidean distance. A point belongs to
    the nearest centre. Of equal distances, the first point and the first centre are taken. A cluster becomes the mean
    of its points, weighted by the inverse of their distances to the centre. The centre, and a point in the same place,
    has weight 1.

    Args:
        points: ``(batch, n, dim)``.
        count: number of centres, from 1 to ``n``.
        start: ``(batch,)`` long, the first centre. Default: 0.

    Returns:
        ``count`` rows, in the order in which the centres were chosen. All centres are different points.
    """
    points = points.float()
    batch, n, dim = points.shape
    places = torch.arange(n, device=points.device)
    centre = places.new_zeros(batch) if start is None else start
    nearest, distances = points.new_full((batch, n), torch.inf), []
    for _ in range(count):
        at_centre = points.gather(1, centre.view(batch, 1, 1).expand(-1, 1, dim))
        distance = torch.linalg.vector_norm(points - at_centre, dim=2)
        # Below all distances: a centre is not chosen again, and belongs to its own cluster.
        distance = distance.masked_fill(places == centre.unsqueeze(1), -1)
        distances.append(distance)
        nearest = torch.minimum(nearest, distance)
        centre = nearest.argmax(dim=1)
    nearest, cluster = torch.stack(distances, dim=2).min(dim=2)
    return Reduction.mean(cluster, count, torch.where(nearest > _SMALLEST_DISTANCE, 1 / nearest, 1.0))
