# SPDX-License-Identifier: Apache-2.0
"""Dropping what repeats a few pivots: each of them chooses the tokens that are least like it."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune.ops.selection import top_k_mask


def leading(norms: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens with the largest norm of each group, the pivots of :func:`unlike_pivots`.

    Args:
        norms: ``(groups, tokens)`` float.
        valid: ``(groups, tokens)`` bool.
        count: of tokens, at least 0; fewer where a group has fewer.

    Returns:
        index: ``(groups, min(count, tokens))`` long, largest norm first, of equal ones the lower index.
        real: bool, same shape, False where a group has no further valid token.
    """
    index = norms.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    return index, torch.arange(index.shape[1], device=index.device) < valid.sum(1, keepdim=True)


def unlike_pivots(
    points: Tensor, pivots: Tensor, real: Tensor, chosen: Tensor, valid: Tensor, budget: Tensor
) -> Tensor:
    """Let pivots choose, one after another, the tokens with the lowest cosine to them (DART, arXiv 2502.11494).

    What the budget leaves beside the tokens chosen already is divided evenly, the first pivots choosing one more where
    it does not come out even. Of equally similar tokens the lower index is chosen.

    Args:
        points: ``(groups, tokens, dim)``.
        pivots: ``(groups, pivots, dim)``, in the order in which they choose.
        real: ``(groups, pivots)`` bool, False for padding; at least one of each group that has something to choose.
        chosen: ``(groups, tokens)`` bool, tokens that are kept anyway.
        valid: ``(groups, tokens)`` bool.
        budget: ``(groups,)`` long, with the chosen ones; above the number of valid tokens it keeps them all.

    Returns:
        ``(groups, tokens)`` bool.
    """
    rest = (torch.minimum(budget.to(chosen.device), valid.sum(1)) - chosen.sum(1)).clamp(min=0)[:, None]
    count = real.sum(1, keepdim=True).clamp(min=1)
    rank = real.cumsum(1) - 1
    shares = (rest // count + (rank < rest % count)) * real
    keep = chosen & valid
    for pivot, share in zip(pivots.unbind(1), shares.unbind(1), strict=True):
        cosine = cosine_similarity(points.float(), pivot.float()[:, None], dim=-1, eps=1e-8)
        keep = keep | top_k_mask(-cosine, valid & ~keep, share)
    return keep
