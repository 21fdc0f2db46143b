# SPDX-License-Identifier: Apache-2.0
"""Subsets that are relevant and diverse at once: greedy search under a determinantal point process."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError

# Of a token's own weight, what the tokens chosen leave unexplained: below this it is rounding error.
_EXPLAINED = 1e-5


def mean_similarity(features: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """Mean cosine of each token with all rows of its group's text.

    Args:
        features: ``(groups, tokens, dim)``.
        texts: one ``(rows, dim)`` a group; without rows the similarity is 0.

    Returns:
        ``(groups, tokens)`` float32.
    """
    directions = [normalize(text.float().to(features.device), dim=-1, eps=1e-8) for text in texts]
    means = [rows.sum(0) / max(len(rows), 1) for rows in directions]
    if not means:
        return features.new_zeros(features.shape[:2], dtype=torch.float32)
    return torch.einsum("gnd,gd->gn", normalize(features.float(), dim=-1, eps=1e-8), torch.stack(means))


def scaled_relevance(scores: Tensor, valid: Tensor, *, together: bool = False) -> Tensor:
    """Scores moved to between about 0 (but above it) and 1.

    Args:
        scores: ``(groups, tokens)``, higher is more relevant.
        valid: ``(groups, tokens)`` bool.
        together: one minimum and maximum for all groups (as the reference of CDPruner does) instead of each group's.

    Returns:
        ``(groups, tokens)`` float32, 0 where not valid; 1 in a group (or in all) whose scores are all the same.
    """
    scores = scores.float()
    dims = (0, 1) if together else 1
    if not scores.numel():
        return scores
    least = scores.masked_fill(~valid, torch.inf).amin(dims, keepdim=True)
    span = scores.masked_fill(~valid, -torch.inf).amax(dims, keepdim=True) - least
    return torch.where(span > 0, (scores - least + 1e-6) / span, 1.0).masked_fill(~valid, 0.0)


def conditional_diversity_order(features: Tensor, relevance: Tensor, valid: Tensor, k: int) -> Tensor:
    """The greedy solution of :func:`conditional_diversity` in the order in which it was found.

    Returns:
        ``(groups, k)`` long; what follows a group's last valid token has no meaning.
    """
    directions = normalize(features.float().masked_fill(~valid.unsqueeze(2), 0.0), dim=2, eps=1e-8)
    relevance = relevance.float().masked_fill(~valid, 0.0)
    kernel = (directions @ directions.transpose(1, 2)) * relevance.unsqueeze(2) * relevance.unsqueeze(1)
    if not kernel.isfinite().all():
        raise VTPruneError("features or relevance hold NaN or infinite values: there is no kernel of them")
    groups, width = valid.shape
    rows = torch.arange(groups, device=valid.device)
    own = kernel.diagonal(dim1=1, dim2=2)
    gain, left = own.clone(), valid.clone()
    order = torch.zeros(groups, k, dtype=torch.long, device=valid.device)
    # Incremental Cholesky factor of the kernel of what is chosen, continued to all tokens.
    factor = kernel.new_zeros(groups, k, width)
    for step in range(k):
        fresh = left & (gain > _EXPLAINED * own)
        some = fresh.any(1, keepdim=True)
        ranked = torch.where(some, gain.masked_fill(~fresh, -torch.inf), own.masked_fill(~left, -torch.inf))
        best = ranked.argmax(1)
        order[:, step] = best
        before = factor[:, :step]
        along = kernel[rows, best] - (before[rows, :, best].unsqueeze(1) @ before).squeeze(1)
        along = along * gain[rows, best].clamp_min(torch.finfo(gain.dtype).tiny).rsqrt().unsqueeze(1)
        factor[:, step] = torch.where(some, along, 0.0)
        gain = gain - factor[:, step].square()
        left[rows, best] = False
    return order


def conditional_diversity(features: Tensor, relevance: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Greedy choice of the most probable subset of each group (CDPruner, arXiv 2506.10967).

    The kernel of two tokens is the cosine of their features times the relevance of each; each step takes the token
    that makes the determinant of the chosen ones' kernel largest. Deviation: a token that the chosen ones explain up to
    rounding (a duplicate; any, once the rank is exhausted) comes after all others, by relevance; the reference takes
    the root of a negative number there. Of equal gains the lower index is taken.

    Args:
        features: ``(groups, tokens, dim)``.
        relevance: ``(groups, tokens)``, at least 0.
        valid: ``(groups, tokens)`` bool; a token outside is never kept.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool.

    Raises:
        VTPruneError: a feature or the relevance of a valid token is NaN or infinite.
    """
    budget = torch.minimum(budget.to(valid.device), valid.sum(1))
    steps = int(budget.max()) if len(budget) else 0
    order = conditional_diversity_order(features, relevance, valid, steps)
    chosen = torch.arange(steps, device=valid.device) < budget.unsqueeze(1)
    # A group that is done chooses anything from then on, tokens it has already, too: those must not unset.
    return torch.zeros_like(valid, dtype=torch.long).scatter_add(1, order, chosen.long()) > 0
