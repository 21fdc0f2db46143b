# SPDX-License-Identifier: Apache-2.0
"""Greedy max-min diversity (DivPrune): a subset whose two closest tokens are far apart."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError


def diversity_order(features: Tensor, k: int) -> Tensor:
    """The greedy solution of :func:`max_min_diversity` in the order in which it was found.

    Returns:
        ``(min(k, tokens),)`` long.
    """
    order = torch.empty(min(k, len(features)), dtype=torch.long, device=features.device)
    if not len(order):
        return order
    directions = normalize(features.float(), dim=-1, eps=1e-8)
    distances = 1 - directions @ directions.T
    if not distances.isfinite().all():
        raise VTPruneError("features hold NaN or infinite values: distances are not defined on them")
    distances.fill_diagonal_(torch.inf)
    # Distance to the nearest chosen token. Before the first choice: distance to the nearest other token.
    nearest = distances.amin(dim=0)
    for step in range(len(order)):
        chosen = nearest.argmax()
        order[step] = chosen
        # A chosen token has -inf, which ``minimum`` keeps. So it is never chosen again, even among duplicates.
        nearest = distances[chosen].clone() if step == 0 else torch.minimum(nearest, distances[chosen])
        nearest[chosen] = -torch.inf
    return order


def max_min_diversity(features: Tensor, k: int) -> Tensor:
    """Choose ``k`` tokens by greedy max-min diversity (DivPrune, arXiv 2503.02175).

    Distance is one minus the cosine. The first token is the one whose nearest other token is farthest away. Each
    further token is the one that is farthest from its nearest chosen token; of equal distances the lowest index.

    Args:
        features: ``(tokens, dim)``.
        k: number of tokens to choose, at least 0.

    Returns:
        ``(min(k, tokens),)`` long, ascending indices without repetition, even if tokens coincide.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    return diversity_order(features, k).sort().values
