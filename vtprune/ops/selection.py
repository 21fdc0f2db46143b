# SPDX-License-Identifier: Apache-2.0
"""Choosing the best tokens of each group by their score."""

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Mark the ``budget[g]`` best valid tokens of every group ``g``.

    Args:
        scores: ``(groups, tokens)`` float, higher is better.
        valid: ``(groups, tokens)`` bool; a token outside is never kept, whatever its score.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool. Of equal scores the lower index is kept, so the result does not depend on
        how a device sorts.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    valid_by_rank = valid.gather(1, order)
    kept_by_rank = valid_by_rank & (valid_by_rank.cumsum(1) <= budget.to(scores.device).unsqueeze(1))
    return torch.zeros_like(valid).scatter(1, order, kept_by_rank)
