# SPDX-License-Identifier: Apache-2.0
"""The best tokens of each group by their score (all methods that give scores)."""

import torch
from torch import Tensor

from vtprune.devices import send


def top_k_mask(scores: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Mark the ``budget[g]`` best valid tokens of every group ``g``.

    Args:
        scores: ``(groups, tokens)`` float, higher is better.
        valid: ``(groups, tokens)`` bool; a token that is not valid is never kept, whatever its score.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool. Of equal scores the lower index is kept, so the result is the same on every device.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    valid_by_rank = valid.gather(1, order)
    kept_by_rank = valid_by_rank & (valid_by_rank.cumsum(1) <= send(budget, scores.device).unsqueeze(1))
    return torch.zeros_like(valid).scatter(1, order, kept_by_rank)


def first_chosen(order: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Mark the first ``budget[g]`` tokens of each group ``g`` in the order of a greedy choice.

    Args:
        order: ``(groups, steps)`` long; all valid tokens of a group, if there are as many steps, come first, and once.
        valid: ``(groups, tokens)`` bool.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool.
    """
    count = torch.minimum(send(budget, valid.device), valid.sum(1))
    chosen = torch.arange(order.shape[1], device=valid.device) < count.unsqueeze(1)
    # A group that has met its budget still gets choices, also of tokens that it has. Adding keeps those marked.
    return torch.zeros_like(valid, dtype=torch.long).scatter_add(1, order, chosen.long()) > 0


def evenly_among(others: Tensor, counts: Tensor) -> Tensor:
    """Mark ``counts[g]`` of the tokens ``others`` of each group, spread evenly over them.

    Args:
        others: ``(groups, tokens)`` bool.
        counts: ``(groups,)`` long, at least 0; more than there are marks all.

    Returns:
        ``(groups, tokens)`` bool.
    """
    number = others.sum(1, keepdim=True)
    counts = torch.minimum(send(counts, others.device).unsqueeze(1), number)
    before = others.cumsum(1) * counts // number.clamp_min(1)
    return others & (before > (others.cumsum(1) - 1) * counts // number.clamp_min(1))


def best_per_part(scores: Tensor, parts: Tensor, counts: Tensor) -> Tensor:
    """Mark the best tokens of every part of one group; a part is for example a frame of a video.

    Args:
        scores: ``(tokens,)`` float, higher is better; of equal scores the lower index is kept.
        parts: ``(tokens,)`` long, the part of each token, numbered from 0; tokens of a part need not be adjacent.
        counts: ``(parts,)`` long, how many tokens each part keeps, at least 0; a count above its size keeps them all.

    Returns:
        ``(tokens,)`` bool.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[parts[order].argsort(stable=True)]
    # Counted without waiting for an accelerator, which `bincount` would do.
    sizes = torch.zeros(len(counts), dtype=torch.long, device=parts.device).scatter_add(
        0, parts, torch.ones_like(parts)
    )
    first = sizes.cumsum(0) - sizes
    part = parts[order]
    rank = torch.arange(len(order), device=order.device) - first[part]
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[order] = rank < send(counts, rank.device)[part]
    return keep
