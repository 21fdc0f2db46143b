# SPDX-License-Identifier: Apache-2.0
"""Greedy choice under a determinantal point process (CDPruner): subsets that are relevant and diverse at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require
from vtprune.ops.selection import first_chosen
from vtprune.ops.token_pairs import Pairs, directions_of

# The chosen tokens explain a part of each other token's weight. A remaining share below this is rounding error.
_EXPLAINED = 1e-5


def mean_similarity(features: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """Mean cosine of each token with all rows of its group's text.

    Args:
        features: ``(groups, tokens, dim)``.
        texts: one ``(rows, dim)`` tensor a group; without rows the similarity is 0.

    Returns:
        ``(groups, tokens)`` float32.
    """
    directions = [normalize(text.float().to(features.device), dim=-1, eps=1e-8) for text in texts]
    means = [rows.sum(0) / max(len(rows), 1) for rows in directions]
    if not means:
        return features.new_zeros(features.shape[:2], dtype=torch.float32)
    return torch.einsum("gnd,gd->gn", normalize(features.float(), dim=-1, eps=1e-8), torch.stack(means))


def scaled_relevance(scores: Tensor, valid: Tensor, *, together: bool = False) -> Tensor:
    """Scale scores to the range from slightly above 0 to 1.

    Args:
        scores: ``(groups, tokens)``, higher is more relevant.
        valid: ``(groups, tokens)`` bool.
        together: use one minimum and maximum for all groups, as the reference of CDPruner does; by default each group
            has its own.

    Returns:
        ``(groups, tokens)`` float32, 0 where not valid; 1 in a group (with ``together`` in all groups) if all scores
        are equal.
    """
    scores = scores.float()
    dims = (0, 1) if together else 1
    if not scores.numel():
        return scores
    least = scores.masked_fill(~valid, torch.inf).amin(dims, keepdim=True)
    extent = scores.masked_fill(~valid, -torch.inf).amax(dims, keepdim=True) - least
    return torch.where(extent > 0, (scores - least + 1e-6) / extent, 1.0).masked_fill(~valid, 0.0)


def conditional_diversity_order(features: Tensor, relevance: Tensor, valid: Tensor, k: int) -> Tensor:
    """The greedy solution of :func:`conditional_diversity` in the order in which it was found.

    Returns:
        ``(groups, k)`` long; entries after all valid tokens of a group are chosen have no meaning.
    """
    directions = directions_of(features, valid)
    relevance = relevance.float().masked_fill(~valid, 0.0)
    pairs = Pairs(directions)
    # The diagonal of the kernel. No element of the kernel is larger than the largest of these.
    weight = pairs.squares() * relevance * relevance
    require(
        weight.isfinite().all(), "features or relevance hold NaN or infinite values: the kernel is not defined on them"
    )
    groups, width = valid.shape
    rows = torch.arange(groups, device=valid.device)
    gain, candidates = weight.clone(), valid.clone()
    order = torch.zeros(groups, k, dtype=torch.long, device=valid.device)
    # Incremental Cholesky factor of the kernel of the chosen tokens, extended to the columns of all tokens.
    factor = weight.new_zeros(groups, k, width)
    for step in range(k):
        fresh = candidates & (gain > _EXPLAINED * weight)
        any_fresh = fresh.any(1, keepdim=True)
        by_weight = weight.masked_fill(~candidates, -torch.inf)
        ranked = torch.where(any_fresh, gain.masked_fill(~fresh, -torch.inf), by_weight)
        best = ranked.argmax(1)
        order[:, step] = best
        before = factor[:, :step]
        kernel = pairs.row(best) * relevance[rows, best].unsqueeze(1) * relevance
        along = kernel - (before[rows, :, best].unsqueeze(1) @ before).squeeze(1)
        along = along * gain[rows, best].clamp_min(torch.finfo(gain.dtype).tiny).rsqrt().unsqueeze(1)
        factor[:, step] = torch.where(any_fresh, along, 0.0)
        gain = gain - factor[:, step].square()
        candidates[rows, best] = False
    return order


def conditional_diversity(features: Tensor, relevance: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Greedy choice of the most probable subset of each group (CDPruner, arXiv 2506.10967).

    The kernel of two tokens is the cosine of their features times the relevance of both. Each step takes the token
    that makes the determinant of the kernel of the chosen tokens largest. Of equal gains the lower index is taken.
    Deviation: a token that the chosen tokens explain up to rounding comes after all others, by relevance. Such tokens
    are duplicates, or all tokens once the rank of the kernel is exhausted. The reference takes the root of a negative
    number there.

    Args:
        features: ``(groups, tokens, dim)``.
        relevance: ``(groups, tokens)``, at least 0.
        valid: ``(groups, tokens)`` bool; a token that is not valid is never kept.
        budget: ``(groups,)`` long, on the CPU; at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool.

    Raises:
        VTPruneError: a feature or the relevance of a valid token is NaN or infinite.
    """
    steps = min(int(budget.max()), valid.shape[1]) if len(budget) else 0
    return first_chosen(conditional_diversity_order(features, relevance, valid, steps), valid, budget)
