# SPDX-License-Identifier: Apache-2.0
"""DART's pivot tokens: each of a few pivots chooses the tokens that are least similar to it."""

import torch
from torch import Tensor

from vtprune.ops.selection import top_k_mask


def leading(norms: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens of each group with the largest norm: the pivots of :func:`unlike_pivots`.

    Args:
        norms: ``(groups, tokens)`` float.
        valid: ``(groups, tokens)`` bool.
        count: number of pivots, at least 0; a group with fewer valid tokens has fewer.

    Returns:
        index: ``(groups, min(count, tokens))`` long, the largest norm first; of equal norms the lower index first.
        real: bool, the same shape, False for padding of a group with fewer valid tokens.
    """
    index = norms.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    return index, torch.arange(index.shape[1], device=index.device) < valid.sum(1, keepdim=True)


def unlike_pivots(
    points: Tensor, pivots: Tensor, real: Tensor, chosen: Tensor, valid: Tensor, budget: Tensor
) -> Tensor:
    """Let pivots choose, one after another, the tokens with the lowest cosine to them (DART, arXiv 2502.11494).

    The budget minus the tokens that are kept anyway is divided evenly among the pivots. If it cannot be divided evenly,
    the first pivots choose one token more. Of equally similar tokens the lower index is chosen.

    Args:
        points: ``(groups, tokens, dim)``.
        pivots: ``(groups, pivots, dim)``, in the order in which they choose.
        real: ``(groups, pivots)`` bool, False for padding; a group with tokens to choose has at least one pivot.
        chosen: ``(groups, tokens)`` bool, tokens that are kept anyway.
        valid: ``(groups, tokens)`` bool.
        budget: ``(groups,)`` long, number of tokens to keep, the chosen ones included. A budget above the number of
            valid tokens keeps them all.

    Returns:
        ``(groups, tokens)`` bool.
    """
    rest = (torch.minimum(budget.to(chosen.device), valid.sum(1)) - chosen.sum(1)).clamp(min=0)[:, None]
    count = real.sum(1, keepdim=True).clamp(min=1)
    rank = real.cumsum(1) - 1
    shares = (rest // count + (rank < rest % count)) * real
    keep = chosen & valid
    points, pivots = points.float(), pivots.float()
    # One product reads the points once, and not once a pivot; so do their norms.
    cosines = points @ pivots.mT / (_norms(points) * _norms(pivots).mT)
    for cosine, share in zip(cosines.unbind(2), shares.unbind(1), strict=True):
        keep = keep | top_k_mask(-cosine, valid & ~keep, share)
    return keep


def _norms(vectors: Tensor) -> Tensor:
    """``(..., n, dim)`` -> ``(..., n, 1)``, never zero."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-8)
