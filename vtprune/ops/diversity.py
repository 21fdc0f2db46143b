# SPDX-License-Identifier: Apache-2.0
"""Greedy max-min diversity (DivPrune, FlashVID): a subset whose two closest tokens are far apart."""

import torch
from torch import Tensor

from vtprune.checks import require
from vtprune.ops.selection import first_chosen
from vtprune.ops.token_pairs import Pairs, directions_of


def diversity_order(features: Tensor, valid: Tensor, k: int) -> Tensor:
    """The greedy solution of :func:`max_min_diversity` in the order in which it was found.

    Returns:
        ``(groups, k)`` long; entries after all valid tokens of a group are chosen have no meaning.
    """
    directions = directions_of(features, valid)
    require(directions.isfinite().all(), "features hold NaN or infinite values: distances are not defined on them")
    return order_of_directions(directions, valid, k)


def order_of_directions(directions: Tensor, valid: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """:func:`diversity_order` of ``(groups, tokens, dim)`` unit vectors, which are finite.

    weights: ``(groups, tokens)`` float, what the distance of each token to the chosen ones is multiplied with, as in
        FlashVID (arXiv 2602.08024); by default nothing.
    """
    order = torch.zeros(len(valid), k, dtype=torch.long, device=valid.device)
    if not order.numel():
        return order
    pairs = Pairs(directions)
    # Distance to the nearest chosen token. Before the first choice: distance to the nearest other token.
    nearest = (1 - pairs.largest(valid)).masked_fill(~valid, -torch.inf)
    for step in range(k):
        ranked = nearest if weights is None else (nearest * weights).masked_fill(nearest.isneginf(), -torch.inf)
        chosen = ranked.argmax(1)
        order[:, step] = chosen
        distances = 1 - pairs.row(chosen)
        # A chosen token has -inf, which ``minimum`` keeps. So it is never chosen again, even among duplicates.
        nearest = torch.minimum(nearest, distances) if step else distances.masked_fill_(~valid, -torch.inf)
        nearest.scatter_(1, chosen.unsqueeze(1), -torch.inf)
    return order


def max_min_diversity(features: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Choose tokens of each group by greedy max-min diversity (DivPrune, arXiv 2503.02175).

    Distance is one minus the cosine. The first token is the one whose nearest other token is farthest away. Each
    further token is the one that is farthest from its nearest chosen token; of equal distances the lowest index.

    Args:
        features: ``(groups, tokens, dim)``.
        valid: ``(groups, tokens)`` bool; a token that is not valid is never kept.
        budget: ``(groups,)`` long, on the CPU; at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool: as many different tokens as the budget says, even if tokens coincide.

    Raises:
        VTPruneError: a feature of a valid token is NaN or infinite.
    """
    steps = min(int(budget.max()), valid.shape[1]) if len(budget) else 0
    return first_chosen(diversity_order(features, valid, steps), valid, budget)
