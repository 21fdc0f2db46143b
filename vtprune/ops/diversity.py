# SPDX-License-Identifier: Apache-2.0
"""Max-min diversity: the subset whose closest pair is far apart."""

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
    # Distance to the nearest chosen token; before the first choice, to the nearest other one.
    nearest = distances.amin(dim=0)
    for step in range(len(order)):
        chosen = nearest.argmax()
        order[step] = chosen
        # ``minimum`` keeps a chosen token's -inf for good, so it cannot come back however close all others are.
        nearest = distances[chosen].clone() if step == 0 else torch.minimum(nearest, distances[chosen])
        nearest[chosen] = -torch.inf
    return order


def max_min_diversity(features: Tensor, k: int) -> Tensor:
    """Choose ``k`` tokens by greedy max-min diversity (DivPrune, arXiv 2503.02175).

    Distance is one minus the cosine. The first token is the one whose nearest other is farthest away; each further
    one is the farthest from its nearest chosen token (the lowest index of equal ones).

    Args:
        features: ``(tokens, dim)``.
        k: tokens to choose, at least 0.

    Returns:
        ``(min(k, tokens),)`` ascending long indices without repetition, also where tokens coincide.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    return diversity_order(features, k).sort().values
