# SPDX-License-Identifier: Apache-2.0
"""Maximal marginal relevance: tokens that matter, and are unlike those chosen before."""

import torch
from torch import Tensor

from vtprune.checks import require
from vtprune.ops.selection import first_chosen
from vtprune.ops.token_pairs import Pairs, directions_of


def marginal_relevance(features: Tensor, relevance: Tensor, valid: Tensor, budget: Tensor, trade: float) -> Tensor:
    """Choose tokens of each group greedily by maximal marginal relevance (Carbonell and Goldstein, 1998).

    Relevance is scaled to [0, 1] within its group. Each step takes the token with the largest
    ``trade * relevance - (1 - trade) * c``, where ``c`` is its largest cosine with a chosen token; in the first step,
    ``c`` is 0. Of equal values the lowest index is taken.

    Args:
        features: ``(groups, tokens, dim)``.
        relevance: ``(groups, tokens)`` float.
        valid: ``(groups, tokens)`` bool; a token that is not valid is never kept.
        budget: ``(groups,)`` long, on the CPU; at least 0; a budget above the number of valid tokens keeps them all.
        trade: weight of relevance against being unlike, in [0, 1].

    Returns:
        ``(groups, tokens)`` bool.

    Raises:
        VTPruneError: a feature or a relevance of a valid token is NaN or infinite.
    """
    directions = directions_of(features, valid)
    relevance = relevance.float()
    require(
        directions.isfinite().all() & (relevance.isfinite() | ~valid).all(),
        "features or scores hold NaN or infinite values: relevance is not defined on them",
    )
    least = relevance.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    most = relevance.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    # Where all are equally relevant, only being unlike counts.
    scaled = (relevance - least) / (most - least).clamp_min(torch.finfo(torch.float32).tiny)
    gain = (trade * scaled).masked_fill(~valid, -torch.inf)
    steps = min(int(budget.max()), valid.shape[1]) if len(budget) else 0
    order = torch.zeros(len(valid), steps, dtype=torch.long, device=valid.device)
    if not order.numel():
        return torch.zeros_like(valid)
    pairs = Pairs(directions)
    likeness: Tensor | None = None
    for step in range(steps):
        chosen = (gain if likeness is None else gain - (1 - trade) * likeness).argmax(1)
        order[:, step] = chosen
        gain.scatter_(1, chosen.unsqueeze(1), -torch.inf)
        row = pairs.row(chosen)
        likeness = row if likeness is None else torch.maximum(likeness, row)
    return first_chosen(order, valid, budget)
